"""The tokenised data set, built once and cached."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fttrain.data.batch import IGNORE
from fttrain.data.build import Builder
from fttrain.data.chat import load_template
from fttrain.data.config import DataConfig
from fttrain.data.encode import Encoder
from fttrain.data.records import RecordSource, file_source, hub_source
from fttrain.data.report import Report
from fttrain.data.stdlib import stdlib_source
from fttrain.util.cache_dir import cache_root, find, load_or_build
from fttrain.util.errors import UserError

# Version of the cached files and of the rules that make them: raise it when either changes.
FORMAT_VERSION = 1
# Token ids and labels of one document, aligned; IGNORE where masked.
Document = tuple[list[int], list[int]]


class Rows:
    """The packed rows of one split, memory-mapped.

    A row is a list of documents with at most seq_len tokens in total.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._ids = _load(folder / f"{split}.ids.npy")  # int32 (tokens,)
        self._trained = _load(folder / f"{split}.trained.npy")  # bool (tokens,)
        # int64 (documents + 1,): first token of each document
        self._documents = _load(folder / f"{split}.documents.npy")
        self._order = _load(folder / f"{split}.order.npy")  # int64 (documents,): row after row
        self._rows = _load(folder / f"{split}.rows.npy")  # int64 (rows + 1,): starts in _order

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int) -> list[Document]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return [
            self.document(int(which))
            for which in self._order[self._rows[index] : self._rows[index + 1]]
        ]

    def __iter__(self) -> Iterator[list[Document]]:
        return (self[index] for index in range(len(self)))

    def document(self, which: int) -> Document:
        """Token ids and labels of document ``which`` in the order of the source."""
        span = slice(self._documents[which], self._documents[which + 1])
        ids = self._ids[span]
        return ids.tolist(), np.where(self._trained[span], ids, IGNORE).tolist()

    @property
    def document_tokens(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self._documents)

    @property
    def row_tokens(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 (rows,)."""
        ends = np.concatenate([[0], np.cumsum(self.document_tokens[self._order])])
        return np.diff(ends[self._rows])

    @property
    def row_documents(self) -> NDArray[np.int64]:
        """Documents of each row, int64 (rows,)."""
        return np.diff(self._rows)

    @property
    def tokens(self) -> int:
        return len(self._ids)

    @property
    def trained_tokens(self) -> int:
        """The number of targets that are not masked. A document's first token is no target."""
        first = self._documents[:-1]
        return int(np.count_nonzero(self._trained)) - int(np.count_nonzero(self._trained[first]))

    @property
    def target_share(self) -> float:
        """The fraction of all tokens that are trained on."""
        return self.trained_tokens / max(1, self.tokens)


class Records(Sequence[list[dict[str, str]]]):
    """The conversations of the held-out examples, read from disk one by one. Plain text has the
    role ``text``.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "holdout.jsonl"
        self._starts = _load(folder / "holdout.records.npy")  # int64 (records + 1,): bytes

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        with open(self._file, "rb") as stream:
            stream.seek(int(self._starts[:-1][index]))
            return json.loads(stream.readline())


@dataclass(frozen=True)
class Dataset:
    """A tokenised data set."""

    train: Rows
    holdout: Rows
    holdout_records: Records
    report: Report
    fingerprint: str  # changes with the data, the tokenizer, the template and the settings


def prepare(
    config: DataConfig, tokenizer: Any, tokenizer_id: str, rows_per_step: int | None = None
) -> Dataset:
    """Return the data set that ``config`` describes, tokenised and packed at most once.

    Later calls, and other processes at the same time, map the cached result. ``tokenizer_id``: part
    of the cache key; changes with the tokenizer. ``rows_per_step``: rows of one optimizer step over
    all ranks; None: any number of rows will do. Raises UserError for a bad row (by policy), an
    unusable template, a missing file, an empty training split, or one that does not fill a step.
    """
    fingerprint, builder = _described(config, tokenizer, tokenizer_id)
    folder = load_or_build(cache_root(config.cache_dir), fingerprint, builder.write)
    report = Report.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    dataset = Dataset(
        Rows(folder, "train"), Rows(folder, "holdout"), Records(folder), report, fingerprint
    )
    _check_enough(config, dataset, rows_per_step)
    return dataset


def cached_rows(config: DataConfig, tokenizer: Any, tokenizer_id: str) -> Rows | None:
    """The training rows of a data set that is in the cache already; None where it is not.

    Raises UserError as ``prepare`` does for a missing file or an unusable template.
    """
    fingerprint, _ = _described(config, tokenizer, tokenizer_id)
    folder = find(cache_root(config.cache_dir), fingerprint)
    return None if folder is None else Rows(folder, "train")


def _described(config: DataConfig, tokenizer: Any, tokenizer_id: str) -> tuple[str, Builder]:
    """The fingerprint of the tokenised data set, and its builder."""
    source = _source(config)
    encoder = Encoder(tokenizer)
    template = load_template(tokenizer, config.chat_template)
    named = Path(config.path).name if config.path and config.kind == "file" else config.path
    # The contents of files count, not their paths.
    settings = asdict(replace(config, path=named, chat_template=None, cache_dir=None))
    meaning = [FORMAT_VERSION, settings, source.identity, tokenizer_id, encoder.identity, template]
    meaning += [sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())]
    fingerprint = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:32]
    return fingerprint, Builder(config, source, tokenizer, encoder, template)


def _source(config: DataConfig) -> RecordSource:
    if config.kind == "stdlib":
        return stdlib_source(config.seed)
    if config.kind == "hub":
        return hub_source(str(config.path), config.split)
    return file_source(str(config.path))


def _check_enough(config: DataConfig, dataset: Dataset, rows_per_step: int | None) -> None:
    rows, name = len(dataset.train), config.path or config.kind
    if rows == 0:
        raise UserError(
            f"data.path={name}: no row is left to train on ({'; '.join(dataset.report.lines())})"
        )
    if rows_per_step is not None and rows < rows_per_step:
        packed = f" packed into rows of data.seq_len={config.seq_len}" if config.packing else ""
        advice = "data.packing=false, a shorter data.seq_len, " if config.packing else ""
        raise UserError(
            f"data.path={name}: {dataset.report.train:,} examples{packed} make {rows:,} rows, one "
            f"optimizer step takes {rows_per_step:,} (loop.micro_batch_size x "
            f"loop.gradient_accumulation_steps x ranks): use {advice}a smaller "
            "loop.micro_batch_size or loop.gradient_accumulation_steps, or more data"
        )


def _load(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
