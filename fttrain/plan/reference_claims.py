"""Published figures of the memory of fine-tuning, compared with the memory it takes here."""

from collections.abc import Iterable
from dataclasses import dataclass

from fttrain.memory.parts import MemoryPart
from fttrain.plan.sizes import SizeEstimate, SizeRequest
from fttrain.util.units import GIB

TOLERANCE = 0.05  # of the needed bytes: a card that lacks more runs out of memory
LOW, RIGHT, HIGH = "too low", "right", "too high"
CARD = "GB card"  # a card that is claimed to suffice; cards are sold by GiB
UNITS = {"GB": 10**9, "GiB": GIB, CARD: GIB}


@dataclass(frozen=True)
class Claim:
    """A published figure, and the request that it is compared with."""

    publisher: str
    source: str
    request: SizeRequest  # the model, the method and the settings that the figure is for
    value: float
    unit: str = "GB"
    if_low: str = ""  # the reason where the figure is too low
    if_high: str = ""  # the reason where the figure is too high
    by_torch: bool = False  # measured by torch's allocator: without the context

    @property
    def figure(self) -> str:
        return f"{self.value:g} {self.unit}"

    @property
    def size_bytes(self) -> float:
        return self.value * UNITS[self.unit]

    def parts(self, need: SizeEstimate) -> dict[MemoryPart, int]:
        """The parts of ``need`` that the figure covers."""
        excluded = {MemoryPart.CONTEXT} if self.by_torch else set()
        return {part: size for part, size in need.card.items() if part not in excluded}

    def shown(self, size_bytes: float) -> str:
        """``size_bytes`` in the claim's unit."""
        unit = "GiB" if self.unit == CARD else self.unit
        return f"{size_bytes / UNITS[unit]:.1f} {unit}"


@dataclass(frozen=True)
class ClaimVerdict:
    """The result of comparing a claim."""

    word: str  # LOW, RIGHT or HIGH
    why: str
    needed: str  # memory needed here, in the claim's unit


def judge(claim: Claim, need: SizeEstimate) -> ClaimVerdict:
    """Compare ``claim`` with the needed memory: right within TOLERANCE; a card is right where it
    suffices, however much is to spare.
    """
    parts = claim.parts(need)
    needed_bytes = sum(parts.values())
    over_bytes = claim.size_bytes - needed_bytes
    needed, difference = claim.shown(needed_bytes), claim.shown(abs(over_bytes))
    if claim.unit == CARD and over_bytes >= 0:
        return ClaimVerdict(RIGHT, f"{difference} to spare", needed)
    if claim.unit != CARD and abs(over_bytes) <= TOLERANCE * needed_bytes:
        return ClaimVerdict(RIGHT, "", needed)
    if over_bytes > 0:
        return ClaimVerdict(
            HIGH, _joined(f"{difference} more than all parts", claim.if_high), needed
        )
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    shares = ", ".join(f"{part.label} {claim.shown(size_bytes)}" for part, size_bytes in largest)
    return ClaimVerdict(
        LOW, _joined(f"{difference} short; it takes {shares} ...", claim.if_low), needed
    )


def _joined(figures: str, reason: str) -> str:
    return f"{figures}; {reason}" if reason else figures


def _several(
    publisher: str,
    source: str,
    method: str,
    figures: dict[str, float],
    if_low: str = "",
    if_high: str = "",
    scenario: str = "whole",
) -> Iterable[Claim]:
    """Claims in GB for several models with the same settings."""
    for model, value in figures.items():
        yield Claim(
            publisher, source, SizeRequest(model, method, scenario), value, "GB", if_low, if_high
        )


THUMB = ("rule of thumb", "repeated in many guides, without a source")
FACTORY = ("LLaMA-Factory", "https://github.com/hiyouga/LLaMA-Factory#hardware-requirement")
UNSLOTH = (
    "Unsloth",
    "https://unsloth.ai/docs/get-started/fine-tuning-for-beginners/unsloth-requirements",
)
TORCHTUNE = ("torchtune", "https://github.com/pytorch/torchtune#memory-and-training-speed")
PAPER = ("QLoRA paper", "https://arxiv.org/abs/2305.14314")
ANSWER_AI = ("Answer.AI", "https://www.answer.ai/posts/2024-03-06-fsdp-qlora.html")

CARD_SIZE = "a card's size rather than a need: it leaves room for longer rows, or more of them"
WEIGHTS_ALONE = (
    "the bf16 weights alone; adapters with their moments, inputs of layers, logits and the context "
    "come on top"
)
BF16_TABLES = "4 bits a parameter do not hold for embedding and head, which stay in bf16"
BF16_ADAPTERS = "measured: adapters and moments there are in bf16, and kernels are compiled"
ROUNDED = "2 bytes a parameter, and more than what comes on top of them at this length"

CLAIMS = (
    *_several(
        *THUMB, "QLoRA", {"Llama-2-7B": 12, "Llama-2-13B": 18, "CodeLlama-34B": 36}, "", CARD_SIZE
    ),
    *_several(*THUMB, "QLoRA", {"Llama-3.1-70B": 48}, BF16_TABLES, CARD_SIZE),
    *_several(
        *THUMB,
        "QLoRA",
        {"Llama-3.1-70B": 20},
        "not one card's need, but near that of each of two which share the base",
    ),
    *_several(*THUMB, "LoRA", {"Llama-2-7B": 14, "Llama-3.1-70B": 140}, WEIGHTS_ALONE),
    *_several(
        *FACTORY,
        "QLoRA",
        {"Llama-2-7B": 6, "Qwen3-14B": 12, "Llama-3.1-70B": 48},
        BF16_TABLES,
        CARD_SIZE,
    ),
    *_several(
        *FACTORY,
        "LoRA",
        {"Llama-2-7B": 16, "Qwen3-14B": 32, "Llama-3.1-70B": 160},
        WEIGHTS_ALONE,
        ROUNDED,
    ),
    *_several(
        *FACTORY,
        "full",
        {"Llama-2-7B": 120, "Llama-3.1-70B": 1200},
        "",
        "its formula has 18 bytes a parameter: gradients in fp32 take 4, in bf16 2",
    ),
    *_several(
        *UNSLOTH,
        "QLoRA",
        {"Llama-3.1-8B": 6, "Llama-3.1-70B": 41},
        "frozen base, embedding and head are nearly all of it",
        scenario="frugal",
    ),
    *_several(*UNSLOTH, "LoRA", {"Llama-3.1-8B": 22, "Llama-3.1-70B": 164}, WEIGHTS_ALONE, ROUNDED),
    Claim(*PAPER, SizeRequest("LLaMA-65B", "QLoRA", seq_len=512, r=64), 48, CARD),
    Claim(
        *PAPER,
        SizeRequest("LLaMA-33B", "QLoRA", seq_len=512, r=64),
        24,
        CARD,
        "the paper pages the optimizer's moments to the host for it",
    ),
    Claim(*ANSWER_AI, SizeRequest("Llama-3.1-70B", "QLoRA", "two"), 24, CARD),
    Claim(
        *TORCHTUNE,
        SizeRequest("Llama-3.1-8B", "QLoRA", rows=2, r=8),
        7.4,
        "GiB",
        BF16_ADAPTERS,
        by_torch=True,
    ),
)
