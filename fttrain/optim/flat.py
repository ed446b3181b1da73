"""The layout of a layer's trained values in one flat tensor, and the shard that a rank updates.

    | a: all A's    0 | b: all B's    0 | m: magnitudes 0 | 0 0 |    0: padding; nothing reads it
    | rank 0's shard             | rank 1's shard               |    optim.shard; else all of it

The magnitudes are DoRA's, and without it there are none.

Every section is padded to whole blocks of 8-bit moments, and the flat tensor to equally many blocks
for each rank. No block belongs to two sections or two ranks, so moments do not depend on the number
of ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fttrain.util.units import round_up

BLOCK_VALUES = 256  # 8-bit moments that share a scale


@dataclass(frozen=True)
class Shard:
    """The part of every flat tensor that a rank updates: one of ``world_size`` equal parts."""

    rank: int = 0
    world_size: int = 1

    def view(self, flat: Tensor) -> Tensor:
        """The rank's part of ``flat`` (values,), as a view (values / world_size,)."""
        return flat.view(self.world_size, -1)[self.rank]


@dataclass(frozen=True)
class Section:
    """The part of a section that lies in a rank's shard."""

    name: str
    span: slice  # values in the shard
    first: int  # offset in the section of the first of these values
    whole: int  # values of the section over all shards, padding included


class FlatLayout:
    """Sections end to end. All layers of a model have the same layout."""

    def __init__(self, sizes: Mapping[str, Sequence[int]], shard: Shard | None = None) -> None:
        """``sizes``: section -> the number of values of each of its tensors."""
        self.shard = shard or Shard()
        self._sizes = {name: list(counts) for name, counts in sizes.items()}
        self._sections: dict[str, slice] = {}
        end = 0
        for name, counts in self._sizes.items():
            start, end = end, end + round_up(sum(counts), BLOCK_VALUES)
            self._sections[name] = slice(start, end)
        self.values = round_up(end, BLOCK_VALUES * self.shard.world_size)
        self.shard_values = self.values // self.shard.world_size

    @property
    def names(self) -> list[str]:
        """Names of the sections, in order."""
        return list(self._sections)

    def section_values(self, name: str) -> int:
        """Values of a section, padding included."""
        return self._sections[name].stop - self._sections[name].start

    def tensors(self, flat: Tensor, name: str) -> list[Tensor]:
        """The tensors of a section in ``flat`` (values,), each flat."""
        start = self._sections[name].start
        counts = self._sizes[name]
        return list(flat[start : start + sum(counts)].split(counts))

    def local_sections(self) -> list[Section]:
        """The sections that lie in this rank's shard, wholly or in part."""
        local = []
        first, end = (self.shard_values * (self.shard.rank + more) for more in (0, 1))
        for name, section in self._sections.items():
            start, stop = max(first, section.start), min(end, section.stop)
            if start < stop:
                span = slice(start - first, stop - first)
                whole = section.stop - section.start
                local.append(Section(name, span, start - section.start, whole))
        return local
