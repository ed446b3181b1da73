"""How a layer's trained values lie in one flat tensor, and which part of it a rank updates.

    | a: all A's    0 | b: all B's    0 | m: magnitudes 0 | 0 0 |    0: padding; nothing reads it
    | rank 0's part              | rank 1's part                |    optim.shard; else all of it

The magnitudes are DoRA's, and without it there are none.

Every section is padded to whole blocks of 8-bit moments and the whole to as many blocks for each
rank, so no block belongs to two sections or two ranks: moments are the same however many ranks
divide them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fttrain.util.units import round_up

BLOCK_VALUES = 256  # of 8-bit moments that share a scale


@dataclass(frozen=True)
class Shard:
    """The part of every flat tensor that a rank updates: one of ``world_size`` equal ones."""

    rank: int = 0
    world_size: int = 1

    def of(self, flat: Tensor) -> Tensor:
        """This rank's part (values / world_size,) of ``flat`` (values,), as a view."""
        return flat.view(self.world_size, -1)[self.rank]


@dataclass(frozen=True)
class Section:
    """What of a section lies in a rank's part."""

    name: str
    own: slice  # of the part
    first: int  # value of the section that is the part's first of it
    whole: int  # values of the section over all parts, padding included


class FlatLayout:
    """Sections end to end. All layers of a model have the same layout."""

    def __init__(self, sizes: Mapping[str, Sequence[int]], portion: Shard | None = None) -> None:
        """``sizes``: of each section, the values of each of its tensors."""
        self.portion = portion or Shard()
        self._sizes = {name: list(own) for name, own in sizes.items()}
        self._sections: dict[str, slice] = {}
        end = 0
        for name, own in self._sizes.items():
            start, end = end, end + round_up(sum(own), BLOCK_VALUES)
            self._sections[name] = slice(start, end)
        self.values = round_up(end, BLOCK_VALUES * self.portion.world_size)
        self.own_values = self.values // self.portion.world_size

    @property
    def names(self) -> list[str]:
        """Of the sections, in order."""
        return list(self._sections)

    def section_values(self, name: str) -> int:
        """Of a section, padding included."""
        return self._sections[name].stop - self._sections[name].start

    def tensors(self, flat: Tensor, name: str) -> list[Tensor]:
        """The tensors of a section in ``flat`` (values,), each flat."""
        start = self._sections[name].start
        own = self._sizes[name]
        return list(flat[start : start + sum(own)].split(own))

    def own_sections(self) -> list[Section]:
        """Those of which a part is this rank's."""
        found = []
        first, end = (self.own_values * (self.portion.rank + more) for more in (0, 1))
        for name, section in self._sections.items():
            start, stop = max(first, section.start), min(end, section.stop)
            if start < stop:
                own = slice(start - first, stop - first)
                whole = section.stop - section.start
                found.append(Section(name, own, start - section.start, whole))
        return found
