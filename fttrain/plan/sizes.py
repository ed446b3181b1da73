"""What a model of a size takes of a card and of the host, by method and by where its parts lie.

QLoRA and LoRA: as a run books it and as its real step takes it (``memory``). What a run refuses to
start without counts, also where not all of it is taken at the same time.

Full fine-tuning, which is not done here: by formula. The bytes of a parameter are those of mixed
precision with Adam (Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section 3.1); what a step
takes beside them is that of LoRA without its base and its adapters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fttrain.frozen.config import FrozenConfig
from fttrain.memory.parts import MemoryPart
from fttrain.model.config import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.plan import memory, shapes
from fttrain.plan.rigs import find_rig
from fttrain.quant.config import QuantConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import Placement, StrategyConfig
from fttrain.strategy.spec import StepSize, StrategySpec

SEQ_LEN = 2048
QUANT = {"QLoRA": "nf4", "LoRA": "none"}  # method -> how the frozen base is stored
WEIGHTS, GRADIENTS = MemoryPart.TRAINED_WEIGHTS, MemoryPart.GRADIENTS
MASTERS, MOMENTS = MemoryPart.FP32_MASTERS, MemoryPart.MOMENTS
FULL = {  # method -> bytes of a parameter
    "full": {WEIGHTS: 2, GRADIENTS: 2, MASTERS: 4, MOMENTS: 8},
    "full, 8-bit Adam": {WEIGHTS: 2, GRADIENTS: 2, MASTERS: 4, MOMENTS: 2},
}
METHODS = (*QUANT, *FULL)


@dataclass(frozen=True)
class SizePlace:
    """Where a model's parts lie. QLoRA and LoRA run so."""

    strategy: str
    cards: int
    placement: Placement
    optim: OptimConfig


_ON_HOST = Placement(layer_inputs="host", embedding="host", lm_head="host")
_OFFLOADED = OptimConfig(offload=True)
PLACES = {
    # All on one card, layers recomputed: what is meant where nothing else is said
    "whole": SizePlace("replicate", 1, Placement(), OptimConfig()),
    # The same, but layer inputs on the host, and moments in 8 bits
    "frugal": SizePlace(
        "replicate", 1, Placement(layer_inputs="host"), OptimConfig(kind="adamw8bit")
    ),
    # Two cards share the layers; whatever else can be in host memory is there
    "two": SizePlace("shard", 2, _ON_HOST, _OFFLOADED),
    # The layers are in host memory, too
    "least": SizePlace("stream", 1, _ON_HOST, _OFFLOADED),
}


@dataclass(frozen=True)
class SizeQuestion:
    """What is asked for: a model, a method, a place, and the work of a step."""

    model: str  # a name in shapes
    method: str  # of METHODS
    place: str = "whole"  # of PLACES
    rows: int = 1  # of a micro-batch
    seq_len: int = SEQ_LEN
    r: int = 16  # of LoRA, on all linears


@dataclass(frozen=True)
class SizeEstimate:
    """Bytes of each card, by part, and of the host, all ranks together."""

    card: dict[MemoryPart, int]
    host_bytes: int

    @property
    def card_bytes(self) -> int:
        return sum(self.card.values())


def estimate_sizes(
    questions: Iterable[SizeQuestion], progress: Callable[[int, int], None]
) -> dict[SizeQuestion, SizeEstimate]:
    """What each takes. ``progress``: (done, total)."""
    unique = list(dict.fromkeys(questions))
    found = {}
    for done, question in enumerate(unique, start=1):
        found[question] = estimate_size(question)
        progress(done, len(unique))
    return found


def estimate_size(question: SizeQuestion) -> SizeEstimate:
    """What ``question`` asks for."""
    if question.method in FULL:
        return _full(question)
    place, a = PLACES[question.place], shapes.architecture(question.model)
    spec = _recipe(question, place)
    rooms = [memory.ROOMY_BYTES] * place.cards
    ranks = [memory.reserved_memory(rank) for rank in memory.reserve_ranks(spec, a, "cuda", rooms)]
    # Ranks of these strategies differ in nothing: one is run on fake tensors, for all places alike.
    [first] = memory.with_workspace(ranks[:1], spec, a, "cuda")
    card = first.device | {
        MemoryPart.WORKSPACE: max(0, first.device[MemoryPart.WORKSPACE]),
        MemoryPart.CONTEXT: context_bytes(),
    }
    return SizeEstimate(card, memory.host_bytes(ranks, "cuda"))


def _recipe(question: SizeQuestion, place: SizePlace) -> StrategySpec:
    return StrategySpec(
        StrategyConfig(place.strategy),
        QuantConfig(QUANT[question.method], dequant="tile"),
        LoraConfig(r=question.r),
        place.optim,
        ScheduleConfig(),
        place.placement,
        FrozenConfig(),
        StepSize(question.rows, question.seq_len),
        "bfloat16",
        seed=0,
    )


def _full(question: SizeQuestion) -> SizeEstimate:
    """By formula.

    whole    all of a parameter's bytes on the card
    two      half of them on each (ZeRO stage 3), and two layers' weights, gathered
    least    weights on the card, the rest on the host (Ren et al. 2021, ZeRO-Offload, arXiv
             2101.06840), and gradients of two layers or of a table on their way there
    """
    a = shapes.architecture(question.model)
    lora = estimate_size(replace(question, method="LoRA", place="whole"))
    count, each = shapes.parameters(a), FULL[question.method]
    two_layers = 2 * shapes.layer_parameters(a)
    table = int(a.config.vocab_size) * a.hidden
    states = {part: size * count for part, size in each.items()}
    host_bytes = lora.host_bytes  # buffers that weights are loaded through
    if question.place == "two":
        states = {part: size_bytes // 2 for part, size_bytes in states.items()}
        states[MemoryPart.SLOTS] = each[WEIGHTS] * two_layers
        host_bytes *= 2
    elif question.place == "least":
        host_bytes += sum(states.values()) - states[WEIGHTS]
        on_their_way = each[GRADIENTS] * max(two_layers, table)
        states = {WEIGHTS: states[WEIGHTS], GRADIENTS: on_their_way}
    return SizeEstimate(states | _step(lora), host_bytes)


def _step(lora: SizeEstimate) -> dict[MemoryPart, int]:
    """What a step takes beside what is trained and what is frozen."""
    model = {
        MemoryPart.FROZEN_LAYERS,
        MemoryPart.EMBEDDING,
        MemoryPart.HEAD,
        MemoryPart.ADAPTERS,
    }
    return {part: size_bytes for part, size_bytes in lora.card.items() if part not in model}


def context_bytes() -> int:
    """What a card has taken before the first tensor, as shipped profiles allow for."""
    return find_rig("one_24gb").cards[0].overhead_bytes or 0
