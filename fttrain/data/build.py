"""The builder of a data set: tokenises records and writes the rows of both splits as flat arrays.

One pass over the source. The arrays are memory-mapped by their readers. Documents lie end to end in
flat arrays from the start: a Python object per token would need a hundred times the memory.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fttrain.data.chat import Chat
from fttrain.data.config import DataConfig
from fttrain.data.encode import Encoder, Rendered
from fttrain.data.pack import one_per_row, pack
from fttrain.data.records import BadRow, Located, RecordSource
from fttrain.data.report import Report
from fttrain.data.shapes import Example, detect, to_example
from fttrain.util.errors import UserError

DETECT_ROWS = 20  # the majority of these decides the shape of the data set
BATCH_ROWS = 128  # rows tokenised at once
SPLITS = ("train", "holdout")


class Builder:
    """Writer of the arrays of one data set into a folder. For a single use."""

    def __init__(
        self,
        config: DataConfig,
        source: RecordSource,
        tokenizer: Any,
        encoder: Encoder,
        template: str | None,
    ):
        self._config, self._source, self._encoder = config, source, encoder
        self._tokenizer, self._template = tokenizer, template
        self._chat: Chat | None = None
        self.report = Report(notes=list(source.notes))
        self._ids = array("i")  # int32, all documents end to end
        self._trained = bytearray()  # one byte a token: 1 where the token is trained on
        self._lengths = array("q")  # tokens of each document
        self._rows = array("q")  # example of each document
        self._hashes = array("Q")  # seeded hash of each example's content; decides the hold-out
        self._record_ends = array("q")  # end of each example's line in the records file, in bytes

    def write(self, folder: Path) -> None:
        """Read, tokenise, split and pack the source into ``folder``.

        Raises UserError for a bad row when the policy is ``error``.
        """
        records = folder / "records.tmp"
        with open(records, "wb") as stream, _progress() as advance:
            batch: list[tuple[Located, Example]] = []
            for located in self._located():
                self.report.read += 1
                advance()
                try:
                    if isinstance(located.value, BadRow):
                        raise located.value
                    batch.append((located, to_example(located.value, self.report.shape)))
                except BadRow as bad:
                    self._refuse(located, bad)
                if len(batch) == BATCH_ROWS:
                    self._encode(batch, stream)
                    batch = []
            self._encode(batch, stream)
        self._check_any()
        self._write_splits(folder, records)
        records.unlink()
        (folder / "report.json").write_text(json.dumps(self.report.to_json()), encoding="utf-8")

    def _located(self) -> Iterator[Located]:
        rows = islice(self._source.read(), self._config.max_rows)
        first = list(islice(rows, DETECT_ROWS))
        if not first:
            raise UserError(f"data.path={self._config.path}: holds no rows")
        shape = self._config.format
        if shape == "auto":
            readable = (row.value for row in first if isinstance(row.value, dict))
            unreadable = all(isinstance(row.value, BadRow) for row in first)
            if unreadable and self._config.on_bad_row == "error":
                self._refuse(first[0], first[0].value)  # type: ignore[arg-type]
            shape = detect(readable, self._where(first[0]))
        self.report.shape = shape
        return chain(first, rows)

    def _encode(self, batch: list[tuple[Located, Example]], records: Any) -> None:
        """Tokenise the examples of ``batch`` and add their documents, or refuse them."""
        rendered: list[Rendered | BadRow | None] = [self._render(example) for _, example in batch]
        encoded = iter(self._encoder.encode([row for row in rendered if isinstance(row, Rendered)]))
        for (located, example), row in zip(batch, rendered, strict=True):
            result = next(encoded) if isinstance(row, Rendered) else row
            try:
                if isinstance(result, BadRow):
                    raise result
                documents = (
                    self._text(example, located)
                    if result is None
                    else [self._fit(*result, located)]
                )
            except BadRow as bad:
                self._refuse(located, bad)
                continue
            self._add(example, documents, records)

    def _render(self, example: Example) -> Rendered | BadRow | None:
        """The chat-formatted example; None for plain text, which has no template."""
        if not example.messages:
            return None
        if self._chat is None:
            self._chat = Chat(self._tokenizer, self._template, self._config.loss_on)
            if "strftime_now" in self._chat.template and "date_string" not in self._chat.template:
                note = (
                    "the chat template prints today's date: the day of tokenising stays in the rows"
                )
                self.report.notes.append(note)
        messages = example.conversation()
        try:
            row = self._chat.rendered(messages)
            self._chat.check_special(row, messages, self._encoder)
        except BadRow as bad:
            return bad
        return row

    def _fit(
        self, ids: list[int], trained: list[bool], located: Located
    ) -> tuple[list[int], list[bool]]:
        seq_len = self._config.seq_len
        if len(ids) > seq_len:
            if self._config.on_bad_row != "truncate":
                advice = "raise data.seq_len, or set data.on_bad_row=truncate"
                raise BadRow(
                    "longer than seq_len", f"{len(ids):,} tokens, data.seq_len={seq_len}", advice
                )
            ids, trained = ids[:seq_len], trained[:seq_len]
            if not any(trained[1:]):
                raise BadRow(
                    "all labels masked", f"no answer is left in the first {seq_len} tokens"
                )
            self.report.truncated.add(located.place)
        elif not any(trained[1:]):
            raise BadRow("all labels masked", "no token of the row is trained on")
        return ids, trained

    def _text(self, example: Example, located: Located) -> list[tuple[list[int], list[bool]]]:
        """The documents of a plain text: pieces of seq_len tokens. Neighbours share one token, so
        that each token is a target exactly once.
        """
        ids, seq_len = self._encoder.document(example.text), self._config.seq_len
        if len(ids) < 2:
            raise BadRow("all labels masked", "a text of one token has nothing to predict")
        starts = range(0, len(ids) - 1, seq_len - 1)
        if len(starts) > 1:
            self.report.cut.add(located.place)
        pieces = [ids[start : start + seq_len] for start in starts]
        return [(piece, [True] * len(piece)) for piece in pieces]

    def _add(
        self, example: Example, documents: list[tuple[list[int], list[bool]]], records: Any
    ) -> None:
        canonical = example.canonical()
        for ids, trained in documents:
            self._ids.extend(ids)
            self._trained.extend(trained)
            self._lengths.append(len(ids))
            self._rows.append(len(self._hashes))
        key = self._config.seed.to_bytes(16, "big", signed=True)
        digest = hashlib.blake2b(canonical, digest_size=8, key=key).digest()
        self._hashes.append(int.from_bytes(digest, "big"))
        records.write(canonical + b"\n")
        self._record_ends.append(records.tell())
        self.report.ignore(example.ignored)

    def _where(self, located: Located) -> str:
        path = self._config.path
        if path is None or self._config.kind != "file":
            return f"data={self._config.kind}, {located.place}"
        inside = f"/{located.file}" if Path(path).expanduser().is_dir() else ""
        return f"{path}{inside}:{located.line}"

    def _refuse(self, located: Located, bad: BadRow) -> None:
        if self._config.on_bad_row == "error":
            advice = f"{bad.advice}, or " if bad.advice else ""
            raise UserError(
                " ".join(f"{self._where(located)}: {bad}".split())
                + f" ({advice}set data.on_bad_row=skip to leave such rows out and count them)"
            )
        self.report.skip(bad.reason, located.place)

    def _check_any(self) -> None:
        if self._lengths:
            return
        reasons = ", ".join(
            f"{tally.count:,} {reason}" for reason, tally in sorted(self.report.skipped.items())
        )
        what = (
            f"none of the {self.report.read:,} rows can be used ({reasons})"
            if reasons
            else "there are no rows"
        )
        raise UserError(f"data.path={self._config.path}: {what}")

    def _held(self) -> NDArray[np.bool_]:
        """The mask of the examples that are held out, bool (examples,).

        These have the smallest hashes, so copies of an example stay together.
        """
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        distinct = np.unique(hashes)
        count = round(self._config.holdout * len(distinct))
        if self._config.holdout > 0:
            count = min(max(count, 1), len(distinct) - 1)
        if count <= 0:
            return np.zeros(len(hashes), dtype=bool)
        return np.asarray(hashes <= distinct[count - 1])

    def _write_splits(self, folder: Path, records: Path) -> None:
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        held = self._held()
        first = np.zeros(len(hashes), dtype=bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        chosen = {"train": ~held, "holdout": held & first}
        self.report.train, self.report.holdout = (
            int(chosen["train"].sum()),
            int(chosen["holdout"].sum()),
        )
        self.report.duplicates_removed = int((held & ~first).sum())
        self.report.duplicates_in_train = int((~held & ~first).sum())
        rows = np.frombuffer(self._rows, dtype=np.int64)
        for split in SPLITS:
            self._write_split(folder, split, chosen[split][rows])
        ends = np.frombuffer(self._record_ends, dtype=np.int64)
        sizes = []
        with open(records, "rb") as whole, open(folder / "holdout.jsonl", "wb") as holdout:
            for example in np.flatnonzero(chosen["holdout"]).tolist():
                whole.seek(int(ends[example - 1]) if example else 0)
                sizes.append(holdout.write(whole.readline()))
        np.save(folder / "holdout.records.npy", np.cumsum([0, *sizes], dtype=np.int64))

    def _write_split(self, folder: Path, split: str, chosen: NDArray[np.bool_]) -> None:
        """Write the arrays of ``split``; ``chosen``: bool (documents,)."""
        all_lengths = np.frombuffer(self._lengths, dtype=np.int64)
        tokens = np.repeat(chosen, all_lengths)  # bool (tokens,)
        lengths = all_lengths[chosen]
        order, rows = (
            pack(lengths, self._config.seq_len) if self._config.packing else one_per_row(lengths)
        )
        arrays = {
            "ids": np.frombuffer(self._ids, dtype=np.int32)[tokens],
            "trained": np.frombuffer(self._trained, dtype=np.bool_)[tokens],
            "documents": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "order": order,
            "rows": rows,
        }
        for name, values in arrays.items():
            np.save(folder / f"{split}.{name}.npy", values, allow_pickle=False)


@contextmanager
def _progress() -> Iterator[Callable[[], None]]:
    """A count of tokenised rows on the terminal, removed at the end.

    Yields a function that counts one row.
    """
    columns = (
        TextColumn("tokenising"),
        SpinnerColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda: progress.advance(task)
