"""What would fit where nothing does: the first of a short list of changes, or the smallest rig."""

from collections.abc import Iterator
from dataclasses import replace

from fttrain.model.decoder import Architecture
from fttrain.plan.choose import Verdict, judge
from fttrain.plan.rigs import find_rig, shipped
from fttrain.rig.profile import RigProfile
from fttrain.strategy.recipe import Recipe

SHORTEST, SMALL_R = 128, 8  # tokens of a row; rank: below these it says nothing of use


def what_fits(nearest: Verdict, architecture: Architecture, rig: RigProfile) -> str:
    """In words, as settings are typed. ``nearest``: the candidate that lacks least."""
    for said, recipe in _smaller(nearest.recipe):
        if judge(recipe, architecture, rig).fits:
            return f"it fits with {said}"
    rigs = sorted(map(find_rig, shipped()), key=_memory_bytes)
    for other in rigs:
        if _memory_bytes(other) > _memory_bytes(rig):
            found = judge(nearest.recipe, architecture, other)
            if found.fits:
                return f"the smallest rig of conf/rig/profiles that it fits is {other.name}"
    return "no smaller rows, no lower rank and no rig of conf/rig/profiles helps"


def _memory_bytes(rig: RigProfile) -> int:
    return sum(card.memory_bytes for card in rig.cards)


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The mildest change first; each one keeps those before it. What moves memory to the host
    changes nothing of what is trained.
    """
    said: list[str] = []
    for setting, moved in list(_moved_to_host(recipe)):
        said.append(setting)
        recipe = moved
        yield " ".join(said), recipe
    rows, steps = recipe.size.micro_batch_size, recipe.size.gradient_accumulation_steps
    if rows > 1:
        said.append(f"loop.micro_batch_size=1 loop.gradient_accumulation_steps={rows * steps}")
        size = replace(recipe.size, micro_batch_size=1, gradient_accumulation_steps=rows * steps)
        recipe = replace(recipe, size=size)
        yield " ".join(said), recipe
    if recipe.lora.r > SMALL_R:
        said.append(f"lora.r={SMALL_R}")
        recipe = replace(recipe, lora=replace(recipe.lora, r=SMALL_R))
        yield " ".join(said), recipe
    while recipe.size.seq_len // 2 >= SHORTEST:
        seq_len, documents = recipe.size.seq_len // 2, -(-recipe.size.row_documents // 2)
        size = replace(recipe.size, seq_len=seq_len, row_documents=documents)
        recipe = replace(recipe, size=size)
        yield " ".join([*said, f"data.seq_len={seq_len}"]), recipe


def _moved_to_host(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """(setting, recipe) of each lever that is still to be pulled, one after the other."""
    if not recipe.optim.offload:
        recipe = replace(recipe, optim=replace(recipe.optim, offload=True))
        yield "optim.offload=true", recipe
    kept = recipe.placement
    for lever, place in (("boundaries", "host"), ("embedding", "host"), ("head", "streamed")):
        if getattr(kept, lever) == place:
            continue
        if lever == "boundaries" and "recompute" not in str(kept.activations):
            continue  # there are none
        kept = replace(kept, **{lever: place})
        recipe = replace(recipe, placement=kept)
        yield f"{lever}={place}", recipe
