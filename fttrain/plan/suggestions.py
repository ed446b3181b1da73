"""What would fit where nothing does: the first of a short list of changes, or the smallest rig."""

from collections.abc import Iterator
from dataclasses import replace

from fttrain.model.decoder import Architecture
from fttrain.plan.choose import Candidate, judge
from fttrain.plan.rigs import find_rig, shipped
from fttrain.rig.profile import RigProfile
from fttrain.strategy.spec import StrategySpec

SHORTEST, SMALL_R = 128, 8  # tokens of a row; rank: below these it says nothing of use


def what_fits(nearest: Candidate, architecture: Architecture, rig: RigProfile) -> str:
    """In words, as settings are typed. ``nearest``: the candidate that lacks least."""
    for said, spec in _smaller(nearest.spec):
        if judge(spec, architecture, rig).fits:
            return f"it fits with {said}"
    rigs = sorted(map(find_rig, shipped()), key=_memory_bytes)
    for other in rigs:
        if _memory_bytes(other) > _memory_bytes(rig):
            found = judge(nearest.spec, architecture, other)
            if found.fits:
                return f"the smallest rig of conf/rig/profiles that it fits is {other.name}"
    return "no smaller rows, no lower rank and no rig of conf/rig/profiles helps"


def _memory_bytes(rig: RigProfile) -> int:
    return sum(card.memory_bytes for card in rig.cards)


def _smaller(spec: StrategySpec) -> Iterator[tuple[str, StrategySpec]]:
    """The mildest change first; each one keeps those before it. What moves memory to the host
    changes nothing of what is trained.
    """
    said: list[str] = []
    for setting, moved in list(_moved_to_host(spec)):
        said.append(setting)
        spec = moved
        yield " ".join(said), spec
    rows, steps = spec.size.micro_batch_size, spec.size.gradient_accumulation_steps
    if rows > 1:
        said.append(f"loop.micro_batch_size=1 loop.gradient_accumulation_steps={rows * steps}")
        size = replace(spec.size, micro_batch_size=1, gradient_accumulation_steps=rows * steps)
        spec = replace(spec, size=size)
        yield " ".join(said), spec
    if spec.lora.r > SMALL_R:
        said.append(f"lora.r={SMALL_R}")
        spec = replace(spec, lora=replace(spec.lora, r=SMALL_R))
        yield " ".join(said), spec
    while spec.size.seq_len // 2 >= SHORTEST:
        seq_len, documents = spec.size.seq_len // 2, -(-spec.size.row_documents // 2)
        size = replace(spec.size, seq_len=seq_len, row_documents=documents)
        spec = replace(spec, size=size)
        yield " ".join([*said, f"data.seq_len={seq_len}"]), spec


def _moved_to_host(spec: StrategySpec) -> Iterator[tuple[str, StrategySpec]]:
    """(setting, recipe) of each lever that is still to be pulled, one after the other."""
    if not spec.optim.offload:
        spec = replace(spec, optim=replace(spec.optim, offload=True))
        yield "optim.offload=true", spec
    kept = spec.placement
    for lever, place in (("layer_inputs", "host"), ("embedding", "host"), ("lm_head", "host")):
        if getattr(kept, lever) == place:
            continue
        if lever == "layer_inputs" and "recompute" not in str(kept.activations):
            continue  # there are none
        kept = replace(kept, **{lever: place})
        spec = replace(spec, placement=kept)
        yield f"{lever}={place}", spec
