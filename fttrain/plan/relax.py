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
    """The mildest change first; each one keeps those before it."""
    said: list[str] = []
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
        seq_len = recipe.size.seq_len // 2
        recipe = replace(recipe, size=replace(recipe.size, seq_len=seq_len))
        yield " ".join([*said, f"data.seq_len={seq_len}"]), recipe
