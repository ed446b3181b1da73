"""A suggestion where nothing fits: the first sufficient change of a short list, or the smallest
rig.
"""

from collections.abc import Iterator
from dataclasses import replace

from fttrain.model.decoder import Architecture
from fttrain.plan.choose import Candidate, judge
from fttrain.plan.rigs import find_rig, shipped
from fttrain.rig.profile import RigProfile
from fttrain.strategy.spec import StrategySpec

SHORTEST, SMALL_R = 128, 8  # tokens of a row; LoRA rank: smaller ones are of no use


def suggest_change(nearest: Candidate, architecture: Architecture, rig: RigProfile) -> str:
    """The suggestion, with settings as typed. ``nearest``: the candidate that lacks least."""
    for settings, spec in _smaller(nearest.spec):
        if judge(spec, architecture, rig).fits:
            return f"it fits with {settings}"
    rigs = sorted(map(find_rig, shipped()), key=_memory_bytes)
    for other in rigs:
        if _memory_bytes(other) > _memory_bytes(rig):
            candidate = judge(nearest.spec, architecture, other)
            if candidate.fits:
                return f"the smallest rig of conf/rig/profiles that it fits is {other.name}"
    return "no smaller rows, no lower rank and no rig of conf/rig/profiles helps"


def _memory_bytes(rig: RigProfile) -> int:
    return sum(card.memory_bytes for card in rig.cards)


def _smaller(spec: StrategySpec) -> Iterator[tuple[str, StrategySpec]]:
    """(settings, spec) of each change, the mildest first; each includes those before it. Moving
    memory to the host comes first: it does not change the training.
    """
    settings: list[str] = []
    for setting, changed in list(_moved_to_host(spec)):
        settings.append(setting)
        spec = changed
        yield " ".join(settings), spec
    rows, steps = spec.size.micro_batch_size, spec.size.gradient_accumulation_steps
    if rows > 1:
        settings.append(f"loop.micro_batch_size=1 loop.gradient_accumulation_steps={rows * steps}")
        size = replace(spec.size, micro_batch_size=1, gradient_accumulation_steps=rows * steps)
        spec = replace(spec, size=size)
        yield " ".join(settings), spec
    if spec.lora.r > SMALL_R:
        settings.append(f"lora.r={SMALL_R}")
        spec = replace(spec, lora=replace(spec.lora, r=SMALL_R))
        yield " ".join(settings), spec
    while spec.size.seq_len // 2 >= SHORTEST:
        seq_len, documents = spec.size.seq_len // 2, -(-spec.size.row_documents // 2)
        size = replace(spec.size, seq_len=seq_len, row_documents=documents)
        spec = replace(spec, size=size)
        yield " ".join([*settings, f"data.seq_len={seq_len}"]), spec


def _moved_to_host(spec: StrategySpec) -> Iterator[tuple[str, StrategySpec]]:
    """(setting, spec) of each part that still can move to the host, one after the other."""
    if not spec.optim.offload:
        spec = replace(spec, optim=replace(spec.optim, offload=True))
        yield "optim.offload=true", spec
    placement = spec.placement
    for field, location in (("layer_inputs", "host"), ("embedding", "host"), ("lm_head", "host")):
        if getattr(placement, field) == location:
            continue
        if field == "layer_inputs" and "recompute" not in str(placement.activations):
            continue  # there are none
        placement = replace(placement, **{field: location})
        spec = replace(spec, placement=placement)
        yield f"{field}={location}", spec
