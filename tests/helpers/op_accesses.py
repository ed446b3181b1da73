"""What an op of torch's dispatcher does to memory, by its schema."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

# They take a tensor for its shape.
SHAPE_ONLY = (
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
)
OVERWRITE = ("copy_", "zero_", "fill_")  # other ops in place read what they change


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among ``values`` and in lists of them that have memory."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            if value.untyped_storage().nbytes():
                found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors(value)
    return found


def accessed(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors whose values an op reads, and those it writes; what it makes is not in them."""
    found: tuple[list[Any], list[Any]] = [], []
    for (place, name), roles in _roles(func).items():
        value = args[place] if place < len(args) else kwargs.get(name)
        for role in roles:
            found[role].append(value)
    return tensors(found[0]), tensors(found[1])


@functools.cache
def _roles(func: Any) -> dict[tuple[int, str], list[int]]:
    """Of each argument (place, name): 0 it is read, 1 it is written. Views do neither."""
    name, roles = func.overloadpacket.__name__, {}
    for place, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        if alias is None:
            role = [] if name in SHAPE_ONLY else [0]
        elif alias.is_write:
            role = [1] if name in OVERWRITE or argument.is_out else [0, 1]
        else:
            role = []
        if role:
            roles[place, argument.name] = role
    return roles


def waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], crosses: bool) -> bool:
    """Whether the host goes on only when the op is over. ``crosses``: between host and device."""
    if name == "_local_scalar_dense":
        return True
    non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    return name == "copy_" and crosses and not non_blocking
