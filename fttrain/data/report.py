"""The report of a preparation: counts of all rows that were read, left out or cut."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PLACES = 5  # file:line listed for each reason


@dataclass
class Tally:
    """A count, with the first places as ``file:line``."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, location: str) -> None:
        self.count += 1
        if len(self.places) < PLACES:
            self.places.append(location)


@dataclass
class Report:
    """Counts of one preparation of a data set. ``to_json`` and ``from_json`` store it."""

    shape: str = ""  # messages | sharegpt | alpaca | prompt_completion | text
    read: int = 0  # rows of the source
    train: int = 0  # rows that went into the training split
    holdout: int = 0  # rows held out
    skipped: dict[str, Tally] = field(default_factory=dict)  # by reason
    truncated: Tally = field(default_factory=Tally)  # cut to seq_len
    # plain text longer than seq_len, divided into several documents; nothing is lost
    cut: Tally = field(default_factory=Tally)
    # fields of the records that are not used -> rows
    ignored_fields: dict[str, int] = field(default_factory=dict)
    duplicates_removed: int = 0  # exact copies of held-out rows: they are in neither split
    duplicates_in_train: int = 0  # exact copies within the training split; they stay
    notes: list[str] = field(default_factory=list)

    def skip(self, reason: str, location: str) -> None:
        self.skipped.setdefault(reason, Tally()).add(location)

    def ignore(self, fields: Iterable[str]) -> None:
        for name in fields:
            self.ignored_fields[name] = self.ignored_fields.get(name, 0) + 1

    @property
    def skipped_rows(self) -> int:
        return sum(tally.count for tally in self.skipped.values())

    def lines(self) -> list[str]:
        """The report for a user, one line for each count; the first is the balance of rows."""
        out = [f"{self.read:,} rows read: {self.train:,} to train on, {self.holdout:,} held out"]
        for reason, tally in sorted(self.skipped.items()):
            out.append(f"{tally.count:,} skipped, {reason}: {_where(tally)}")
        if self.truncated.count:
            out.append(
                f"{self.truncated.count:,} truncated to data.seq_len: {_where(self.truncated)}"
            )
        if self.cut.count:
            out.append(
                f"{self.cut.count:,} texts longer than data.seq_len cut in pieces: "
                f"{_where(self.cut)}"
            )
        if self.duplicates_removed:
            out.append(f"{self.duplicates_removed:,} exact copies of held-out rows removed")
        if self.duplicates_in_train:
            out.append(f"{self.duplicates_in_train:,} exact copies within the training rows (kept)")
        if self.ignored_fields:
            fields = ", ".join(
                f"{name} ({count:,})" for name, count in sorted(self.ignored_fields.items())
            )
            out.append(f"fields not used (rows): {fields}")
        return out + self.notes

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        skipped = {reason: Tally(**tally) for reason, tally in values["skipped"].items()}
        tallies = {name: Tally(**values[name]) for name in ("truncated", "cut")}
        return cls(**{**values, "skipped": skipped, **tallies})


def _where(tally: Tally) -> str:
    return ", ".join(tally.places) + (" ..." if tally.count > len(tally.places) else "")
