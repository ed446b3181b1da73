"""Which accesses to memory are ordered, and which are not: races between streams and host threads.

Every stream and every thread of the host is a timeline with a vector clock (Lamport 1978, Mattern
1989): how far it knows each other one to have come. Each op is an access to bytes of allocations.
Two that overlap, one of them a write, are a race unless the later one's timeline knows of the
earlier one. Device memory that is freed goes to whoever allocates next on the stream that made it,
as torch's caching allocator does it: what other streams still do with it is a race as soon as that
stream goes on. A read that comes too late for that is harmless where nobody uses what it gave.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase


class Timeline:
    """What runs one after the other: a stream, or a thread of the host."""

    def __init__(self, name: str, is_host: bool = False) -> None:
        self.name, self.is_host = name, is_host
        self.clock: dict[Timeline, int] = {self: 0}  # ops of each that are over before what is next

    def step(self) -> None:
        """One more op."""
        self.clock[self] += 1

    def join(self, clock: Mapping["Timeline", int]) -> None:
        """What comes next is ordered after all that ``clock`` knows of."""
        for timeline, ops in clock.items():
            if ops > self.clock.get(timeline, -1):
                self.clock[timeline] = ops

    def knows(self, access: "Access") -> bool:
        """Whether ``access`` is over before what comes next here."""
        return self.clock.get(access.by, -1) >= access.number


@dataclass(eq=False)
class Block:
    """One allocation."""

    what: str
    owner: Timeline  # device memory: the stream that made it; host memory: a thread of the host
    accesses: list["Access"] = field(default_factory=list)  # those that may still matter


@dataclass(frozen=True)
class Span:
    """Bytes of an allocation."""

    block: Block
    start: int
    end: int


@dataclass(frozen=True)
class Race:
    """Two accesses to the same memory, in words, that nothing orders."""

    memory: str
    earlier: str
    later: str

    def is_like(self, memory: str, earlier: str, later: str) -> bool:
        """Whether it is said in these words, with * for any others."""
        return (
            fnmatchcase(self.memory, memory)
            and fnmatchcase(self.earlier, earlier)
            and fnmatchcase(self.later, later)
        )


@dataclass(eq=False)
class Access:
    """What one op does with some bytes."""

    start: int
    end: int
    by: Timeline
    number: int  # of the op, among those of ``by``
    writes: bool
    op: tuple[str, str]  # its name, and the function that asks for it
    gives: Sequence[Span] = ()  # what the op writes
    spoiled: Race | None = None  # what it wrote are not the bytes that it should have read

    def __str__(self) -> str:
        name, where = self.op
        return f"{name} in {where} {'writes' if self.writes else 'reads'} it on {self.by.name}"


class Memory:
    """All allocations, and the races found in them, each once."""

    def __init__(self) -> None:
        self._found: dict[Race, None] = {}
        self._freed: dict[Timeline, list[Block]] = defaultdict(list)  # by owner

    @property
    def races(self) -> list[Race]:
        """In the order in which they were found."""
        return list(self._found)

    def begin(self, by: Timeline) -> None:
        """One more op of ``by``, which may be given what was freed there."""
        by.step()
        for block in self._freed.pop(by, ()):
            for access in block.accesses:
                if not by.knows(access):
                    self._given_away(block, access)

    def access(
        self, by: Timeline, op: tuple[str, str], reads: Sequence[Span], writes: Sequence[Span]
    ) -> None:
        """What the op that began last on ``by`` does."""
        number = by.clock[by]
        for span in reads:
            new = Access(span.start, span.end, by, number, False, op, writes)
            self._add(span.block, new)
        for span in writes:
            self._add(span.block, Access(span.start, span.end, by, number, True, op))

    def free(self, block: Block) -> None:
        """Nobody refers to it any more. Host memory is not given out again under a copy: torch
        waits for what used a page-locked piece, and ours live as long as the run.
        """
        if not block.owner.is_host:
            self._freed[block.owner].append(block)

    def _add(self, block: Block, new: Access) -> None:
        kept = []
        for old in block.accesses:
            if old.end <= new.start or new.end <= old.start:
                kept.append(old)
                continue
            if (new.writes or old.writes) and not new.by.knows(old):
                self._found[Race(block.what, str(old), str(new))] = None
            if old.spoiled is not None and not new.writes:
                self._found[old.spoiled] = None
            kept += _left_over(block, old, new)
        block.accesses = [*kept, new]

    def _given_away(self, block: Block, access: Access) -> None:
        """``block``'s memory may be another tensor's before ``access`` to it is over."""
        race = Race(block.what, str(access), f"it is freed on {block.owner.name}")
        if access.writes:
            self._found[race] = None
        for span in access.gives:
            self._spoil(span, access, race)

    def _spoil(self, span: Span, access: Access, race: Race) -> None:
        """What ``access`` gave is wrong: a race if someone reads it, before now or later."""
        written = False
        for other in span.block.accesses:
            if other.writes and (other.by, other.number) == (access.by, access.number):
                other.spoiled, written = race, True
            elif written and not other.writes and other.start < span.end and span.start < other.end:
                self._found[race] = None


def _left_over(block: Block, old: Access, new: Access) -> list[Access]:
    """What of ``old`` may still matter once ``new``, which overlaps it, has been recorded: whoever
    is ordered after ``new`` need not be compared with what ``new`` was compared with.
    """
    if not new.writes:
        # Two reads in a row; those that may come too late for a free are needed one by one.
        late = old.by is not block.owner and not block.owner.is_host
        again = not (old.writes or late) and old.by is new.by
        return [] if again and new.start <= old.start and old.end <= new.end else [old]
    ends = [(old.start, new.start), (new.end, old.end)]
    return [replace(old, start=start, end=end) for start, end in ends if start < end]
