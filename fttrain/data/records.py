"""Records of files and hub data sets, each with its file and line.

A record is one JSON object. No row is dropped in silence: an unreadable row is yielded as a
``BadRow``, and the caller's policy decides.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fttrain.data.json_array import elements
from fttrain.util.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class BadRow(Exception):
    """A row that cannot be trained on.

    ``reason``: a short name, under which such rows are counted; ``advice``: a remedy.
    """

    def __init__(self, reason: str, detail: str, advice: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.advice = reason, detail, advice


@dataclass(frozen=True)
class Located:
    """One row with its position. ``line`` counts from 1: lines of a text file, rows of Parquet and
    hub data.
    """

    file: str
    line: int
    value: dict[str, Any] | BadRow

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class RecordSource:
    """A source of records.

    ``identity`` changes with the content; ``read`` may be called several times.
    """

    identity: str
    read: Callable[[], Iterator[Located]]
    notes: tuple[str, ...] = ()


def file_source(path: str) -> RecordSource:
    """The source of a file, or of a folder of files, of JSONL, JSON, CSV or Parquet (text formats
    also as ``.gz``).

    Raises UserError for a path without a data file and for an unknown format.
    """
    root = Path(path).expanduser()
    if not root.exists():
        near = (
            ", ".join(sorted(p.name for p in root.parent.glob("*") if _kind(p))[:5])
            if root.parent.is_dir()
            else ""
        )
        raise UserError(
            f"data.path={path}: no such file" + (f" (there is: {near})" if near else "")
        )
    files = (
        sorted(p for p in root.iterdir() if p.is_file() and _kind(p)) if root.is_dir() else [root]
    )
    if not files:
        raise UserError(f"data.path={path}: the folder holds no data file ({' '.join(SUFFIXES)})")
    for file in files:
        if _kind(file) is None:
            raise UserError(
                f"data.path={file}: unknown kind of file; allowed: {' '.join(SUFFIXES)}, also "
                "with .gz"
            )
    digest = hashlib.sha256()
    notes = []
    for file in files:
        with _open(file, raw=True) as stream:
            head = stream.read(4)
            stream.seek(0)
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        if head.startswith(b"\xef\xbb\xbf"):
            notes.append(f"{file.name}: starts with a byte order mark (BOM), which was left out")
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"data.path={file}: the file is UTF-16; save it as UTF-8")
        digest.update(f"{file.name}\0{content}\0".encode())
    return RecordSource(digest.hexdigest(), lambda: _read_files(files), tuple(notes))


def hub_source(path: str, split: str) -> RecordSource:
    """The source of a hub data set, ``owner/name`` or ``owner/name:config``, through ``datasets``.

    ``datasets`` has a cache of its own, keyed by the hub's commit. Raises UserError where the data
    set does not load.
    """
    import datasets

    progress_was_on = datasets.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        name, _, configuration = path.partition(":")
        table = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub client raises dozens of kinds: each becomes one line
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"data.path={path} data.split={split}: the hub's data set did not load "
            f"({type(error).__name__}: {cause}); a configuration is named by owner/name:config; "
            "without a network, save the data as JSONL or Parquet where there is one and use "
            "data=file data.path=FILE"
        ) from None
    finally:
        if progress_was_on:
            datasets.enable_progress_bars()

    def read() -> Iterator[Located]:
        for number, row in enumerate(table, 1):
            yield Located(path, number, dict(row))

    return RecordSource(f"{path}\0{split}\0{table._fingerprint}", read)


def _kind(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def _open(path: Path, raw: bool = False) -> Any:
    try:
        if path.suffix == ".gz" and not raw:
            return gzip.open(path)
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read ({error.strerror})") from None


def _read_files(files: list[Path]) -> Iterator[Located]:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".json": _read_json}
    for file in files:
        try:
            yield from readers.get(_kind(file) or "", _read_jsonl)(file)
        except (EOFError, gzip.BadGzipFile) as error:
            raise UserError(f"data.path={file}: the compressed file is damaged ({error})") from None


def _read_jsonl(path: Path) -> Iterator[Located]:
    with _open(path) as stream:
        # A binary stream splits at \n only: U+2028 inside a string is no line end.
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Located(path.name, number, _parse(line))


def _parse(line: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"byte {error.start} of the line", "save the file as UTF-8")
    except RecursionError:
        return BadRow("not JSON", "nested too deeply")
    except ValueError as error:  # also an integer with thousands of digits
        advice = (
            "a byte order mark inside the file: remove it"
            if line.startswith(b"\xef\xbb\xbf")
            else ""
        )
        return BadRow("not JSON", str(error), advice)
    return _object(value)


def _refuse_constant(name: str) -> Any:
    raise BadRow("NaN literal", f"{name} is not JSON", "write null or leave the field out")


def _object(value: Any) -> dict[str, Any] | BadRow:
    return (
        value
        if isinstance(value, dict)
        else BadRow("not an object", f"a JSON {type(value).__name__}")
    )


def _read_json(path: Path) -> Iterator[Located]:
    """Yield the records of an array of objects, of an object with one such array, or of JSONL."""
    with _open(path) as stream:
        data = stream.read().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"data.path={path}:{line}: not UTF-8; save the file as UTF-8") from None
    start = re.match(r"\s*", text).end()  # type: ignore[union-attr]
    if text.startswith("{", start):
        wrapped = re.match(r'\s*\{\s*"(?:data|rows|train|examples)"\s*:\s*(?=\[)', text)
        if wrapped is None:
            yield from _read_jsonl(path) if _one_object_a_line(data) else _one_object(path, text)
            return
        start = wrapped.end()
    if not text.startswith("[", start):
        raise UserError(
            f"data.path={path}: a .json file holds an array of objects ([{{...}}, ...])"
        )
    for line, element in elements(path, text, start + 1):
        yield Located(path.name, line, _parse(element))


def _one_object_a_line(data: bytes) -> bool:
    first = data.lstrip().split(b"\n", 1)[0]
    return not isinstance(_parse(first), BadRow)


def _one_object(path: Path, text: str) -> Iterator[Located]:
    yield Located(path.name, 1, _parse(text.encode()))


def _read_csv(path: Path) -> Iterator[Located]:
    """Yield one record for each row, with the header's names. A cell is text exactly as written:
    'NA' is no missing value.
    """
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    with _open(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise UserError(
                    f"data.path={path}:1: the header names a column twice: {', '.join(header)}"
                )
            while True:
                number = reader.line_num + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue  # an empty line
                whole = len(cells) == len(header)
                bad = BadRow(
                    "wrong number of cells", f"{len(cells)} cells under {len(header)} columns"
                )
                yield Located(
                    path.name, number, dict(zip(header, cells, strict=True)) if whole else bad
                )
        except UnicodeDecodeError:
            raise UserError(
                f"data.path={path}:{reader.line_num + 1}: not UTF-8; save the file as UTF-8"
            ) from None
        except csv.Error as error:
            raise UserError(f"data.path={path}:{reader.line_num + 1}: not CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[Located]:
    """Yield the rows through ``datasets`` in streaming mode, which leaves no copy on disk that
    could become stale.
    """
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it also raises
    files = glob.escape(str(path.absolute()))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            table = datasets.load_dataset(
                "parquet", data_files=files, split="train", streaming=True, cache_dir=scratch
            )
            for number, row in enumerate(table, 1):
                yield Located(path.name, number, row)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"data.path={path}: not a readable Parquet file ({cause})") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
