"""Memory of models of common sizes on a card and on the host, by method and by scenario.

QLoRA and LoRA: the reservations of a run and the workspace of its real step (``memory``). Every
reserved part counts, also where not all of them exist at the same time.

Full fine-tuning, which is not done here: by formula. The bytes of a parameter are those of mixed
precision with Adam (Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section 3.1). The rest of a
step is that of LoRA without its base and its adapters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fttrain.frozen.config import FrozenConfig
from fttrain.memory.parts import MemoryPart
from fttrain.model.config import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.plan import memory, shapes, workspace
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
class SizeScenario:
    """A way to place a model's parts, with the settings with which QLoRA and LoRA run so."""

    strategy: str
    cards: int
    placement: Placement
    optim: OptimConfig


_ON_HOST = Placement(layer_inputs="host", embedding="host", lm_head="host")
_OFFLOADED = OptimConfig(offload=True)
SCENARIOS = {
    # All on one card, layers recomputed: the default of published figures
    "whole": SizeScenario("replicate", 1, Placement(), OptimConfig()),
    # Same, with layer inputs on the host and moments in 8 bits
    "frugal": SizeScenario(
        "replicate", 1, Placement(layer_inputs="host"), OptimConfig(kind="adamw8bit")
    ),
    # Two cards share the layers; everything else that can lie in host memory does
    "two": SizeScenario("shard", 2, _ON_HOST, _OFFLOADED),
    # The layers lie in host memory as well
    "least": SizeScenario("stream", 1, _ON_HOST, _OFFLOADED),
}


@dataclass(frozen=True)
class SizeRequest:
    """A model, a method, a scenario, and the work of a step."""

    model: str  # a name in shapes
    method: str  # of METHODS
    scenario: str = "whole"  # of SCENARIOS
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
    requests: Iterable[SizeRequest], progress: Callable[[int, int], None]
) -> dict[SizeRequest, SizeEstimate]:
    """The estimate of each request. ``progress``: (done, total)."""
    unique = list(dict.fromkeys(requests))
    estimates = {}
    for done, request in enumerate(unique, start=1):
        estimates[request] = estimate_size(request)
        progress(done, len(unique))
    return estimates


def estimate_size(request: SizeRequest) -> SizeEstimate:
    """The memory of ``request``."""
    if request.method in FULL:
        return _full(request)
    scenario, a = SCENARIOS[request.scenario], shapes.architecture(request.model)
    spec = _spec(request, scenario)
    rooms = [memory.ROOMY_BYTES] * scenario.cards
    ranks = [memory.reserved_memory(rank) for rank in memory.reserve_ranks(spec, a, "cuda", rooms)]
    # Ranks of these strategies are alike: one runs on fake tensors, for all of them.
    [first] = workspace.with_workspace(ranks[:1], spec, a, "cuda")
    card = first.device | {
        MemoryPart.WORKSPACE: max(0, first.device[MemoryPart.WORKSPACE]),
        MemoryPart.CONTEXT: context_bytes(),
    }
    return SizeEstimate(card, memory.host_bytes(ranks, "cuda"))


def _spec(request: SizeRequest, scenario: SizeScenario) -> StrategySpec:
    return StrategySpec(
        StrategyConfig(scenario.strategy),
        QuantConfig(QUANT[request.method], dequant="tile"),
        LoraConfig(r=request.r),
        scenario.optim,
        ScheduleConfig(),
        scenario.placement,
        FrozenConfig(),
        StepSize(request.rows, request.seq_len),
        "bfloat16",
        seed=0,
    )


def _full(request: SizeRequest) -> SizeEstimate:
    """Full fine-tuning, by formula.

    whole    all bytes of a parameter on the card
    two      half of them on each card (ZeRO stage 3), and two layers' gathered weights
    least    weights on the card, the rest on the host (Ren et al. 2021, ZeRO-Offload, arXiv
             2101.06840), and gradients of two layers or of a table in transfer
    """
    a = shapes.architecture(request.model)
    lora = estimate_size(replace(request, method="LoRA", scenario="whole"))
    count, of_parameter = shapes.parameters(a), FULL[request.method]
    two_layers = 2 * shapes.layer_parameters(a)
    table = int(a.config.vocab_size) * a.hidden
    states = {part: size * count for part, size in of_parameter.items()}
    host_bytes = lora.host_bytes  # buffers for loading weights
    if request.scenario == "two":
        states = {part: size_bytes // 2 for part, size_bytes in states.items()}
        states[MemoryPart.SLOTS] = of_parameter[WEIGHTS] * two_layers
        host_bytes *= 2
    elif request.scenario == "least":
        host_bytes += sum(states.values()) - states[WEIGHTS]
        in_transfer = of_parameter[GRADIENTS] * max(two_layers, table)
        states = {WEIGHTS: states[WEIGHTS], GRADIENTS: in_transfer}
    return SizeEstimate(states | _step(lora), host_bytes)


def _step(lora: SizeEstimate) -> dict[MemoryPart, int]:
    """Memory of a step besides trained and frozen weights."""
    model = {
        MemoryPart.FROZEN_LAYERS,
        MemoryPart.EMBEDDING,
        MemoryPart.HEAD,
        MemoryPart.ADAPTERS,
    }
    return {part: size_bytes for part, size_bytes in lora.card.items() if part not in model}


def context_bytes() -> int:
    """Bytes of a card before the first tensor, as shipped profiles allow for."""
    return find_rig("one_24gb").cards[0].overhead_bytes or 0
