"""The build of the frozen cache: missing files are quantised and written, one by one, by all ranks.

A file counts once its record lies beside it (written after the file is durable), the cache once its
manifest is there. So a build that is killed is continued by the next one, and never taken for
complete. Host memory of a rank: that of a layer, as quantize_layer.py states it, or the embedding.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.build_lock import build_lock
from fttrain.frozen.cache import (
    FORM,
    HELP,
    FileRecord,
    FrozenCache,
    file_of,
    has_size,
    layer_name,
    read_records,
)
from fttrain.frozen.hub import HubFiles
from fttrain.frozen.quantize_layer import ENDS, check_head, load_end, load_layer
from fttrain.frozen.readers import SINGLE, Reader, SafetensorsReader, open_checkpoint, read_index
from fttrain.frozen.spec import FrozenSpec
from fttrain.quant.checksum import checksum
from fttrain.store.loading import Progress
from fttrain.util import atomic_files
from fttrain.util.errors import UserError
from fttrain.util.manifest import MANIFEST, read_sealed, write_sealed


def open_or_build(
    base: FrozenSpec,
    cache_dir: str | None,
    group: RankGroup,
    progress: Progress,
    verify: bool = False,
) -> FrozenCache:
    """The complete cache of ``base``; missing files are built, on each node by its ranks. Every
    rank calls it.

    ``cache_dir``: as ``frozen.cache_dir``. ``progress`` counts files. ``verify``: compare every
    file with its SHA-256 first; damaged ones are built again. Raises UserError, on all ranks, for a
    checkpoint that cannot be used, a disk that is too small, a cache of another base, and nodes
    whose caches differ.
    """
    with group.node_local_work("frozen base"):
        cache = _open_on_node(base, cache_dir, group.intra_node, progress, verify)
    group.raise_where_nodes_differ(
        {"frozen base": cache.digest},
        "it was made of another checkpoint, or by cards whose kernels round otherwise; the same "
        "files everywhere help: `fttrain quantize` on one machine, and its frozen.cache_dir and "
        "checkpoint copied with their times (rsync -a)",
    )
    return cache


def _open_on_node(
    base: FrozenSpec, cache_dir: str | None, group: RankGroup, progress: Progress, verify: bool
) -> FrozenCache:
    """The complete cache on this node, whose ranks are ``group``. A folder that nodes share is
    built by the node that holds its lock; the others find it complete.
    """
    folder, complete, problem = base.folder(cache_dir), True, ""
    if group.is_main:
        try:
            complete = _is_complete(folder, base.identity)
        except UserError as error:
            problem = str(error)
    group.raise_everywhere(problem)
    if verify or not group.all(complete):
        with build_lock(folder, group):
            _Build(base, folder, group).run(progress, verify)
    return FrozenCache(folder, read_records(folder, base.identity))


class _Build:
    """The work of one rank on a cache that is not complete, or is to be verified."""

    def __init__(self, base: FrozenSpec, folder: Path, group: RankGroup) -> None:
        self._base, self._folder, self._group = base, folder, group
        source = base.source
        self._hub: HubFiles | None = None
        if source.hub_id is not None:
            assert source.commit is not None
            self._hub = HubFiles(source.hub_id, source.commit, folder / ".downloads")

    def run(self, progress: Progress, verify: bool) -> None:
        """Build the missing files and seal the cache. Every rank of the node calls it."""
        damaged = self._damaged() if verify else set()
        names = self._names()
        missing = [name for name in names if name in damaged or not self._has(name)]
        if missing:
            self._build_all(missing, progress)
        self._run_on_main(lambda: self._seal(names))

    def _build_all(self, missing: list[str], progress: Progress) -> None:
        self._run_on_main(lambda: self._check_room(missing))
        reader, ranks = self._open(), self._group.world_size
        for begin in range(0, len(missing), ranks):
            names = missing[begin + self._group.rank :][:1]
            self._group.raise_everywhere(_problem(partial(self._build, reader, names)))
            progress(min(begin + ranks, len(missing)), len(missing))
            if self._group.is_main:
                self._drop_files(reader, missing[begin + ranks :])

    def _run_on_main(self, work: Callable[[], None]) -> None:
        """Do ``work`` on rank 0; the others wait, and raise its UserError as well."""
        self._group.raise_everywhere(_problem(work) if self._group.is_main else "")

    def _open(self) -> Reader:
        """The checkpoint, opened. The weights of a hub id without an index are downloaded here."""
        problem, fetch = "", None if self._hub is None else self._hub.fetch
        try:
            reader = open_checkpoint(self._base.source, self._base.architecture.config, fetch)
            check_head(reader, self._base.architecture, self._base.source.name)
        except UserError as error:
            problem = str(error)
        self._group.raise_everywhere(problem)
        return reader

    def _names(self) -> list[str]:
        """The names of all files, in the order in which checkpoints have them."""
        layers = [layer_name(layer) for layer in range(self._base.architecture.layers)]
        head = [] if self._base.architecture.tied else ["head"]
        return ["embedding", *layers, "final_norm", *head]

    def _has(self, name: str) -> bool:
        with contextlib.suppress(ValueError):
            return has_size(self._folder, name, self._record(name))
        return False

    def _record(self, name: str) -> FileRecord:
        """The record of a file. A record beside the file is newer than the manifest: the file was
        built again.

        Raises ValueError where there is none, or a damaged one.
        """
        form = {**FORM, **self._base.identity}
        with contextlib.suppress(ValueError):
            return FileRecord.read(read_sealed(self._folder / f"{name}.json", form)["file"])
        return read_records(self._folder, self._base.identity)[name]

    def _damaged(self) -> set[str]:
        """The names of the files whose SHA-256 is not their record's, or which cannot be read. Each
        rank reads a part of them; all return the same.
        """
        local: list[str] = []
        files = sorted(self._folder.glob("*.bin"))
        for file in files[self._group.rank :: self._group.world_size]:
            with contextlib.suppress(ValueError, KeyError):  # one without a record is missing
                if _sha256(file) != self._record(file.stem).sha256:
                    local.append(file.stem)
        ranks = range(self._group.world_size)
        lists = [json.loads(self._group.broadcast_str(json.dumps(local), rank)) for rank in ranks]
        return {name for names in lists for name in names}

    def _check_room(self, missing: list[str]) -> None:
        """Raise UserError where the disk has no room for the missing files."""
        needed = sum(self._size_bytes(name) for name in missing)
        if self._hub is not None:
            # The layers of a round are neighbours: they lie in one file more than there are ranks.
            weights = set(read_index(self._base.source.folder).values()) or {SINGLE}
            needed += self._hub.needed_bytes(weights, self._group.world_size + 1)
        with atomic_files.room_for(self._folder, needed, f"frozen cache {self._folder}", HELP):
            pass

    def _size_bytes(self, name: str) -> int:
        architecture, frozen_format = self._base.architecture, self._base.frozen_format
        if name.startswith("layer_"):
            return frozen_format.layout.size_bytes
        rows = 1 if name == "final_norm" else architecture.config.vocab_size
        return rows * architecture.hidden * frozen_format.dtype.itemsize

    def _build(self, reader: Reader, names: list[str]) -> None:
        """Build this rank's file of a round; ``names`` is empty where it has none."""
        try:
            for name in names:
                self._write(name, self._content(reader, name))
        finally:
            reader.rest()

    def _content(self, reader: Reader, name: str) -> Tensor:
        """The bytes of a file: uint8 (n,) in host memory."""
        architecture, frozen_format = self._base.architecture, self._base.frozen_format
        if not name.startswith("layer_"):
            end = load_end(reader, architecture, name).to(frozen_format.dtype)
            return end.contiguous().view(-1).view(torch.uint8)
        layer = int(name.removeprefix("layer_"))
        return load_layer(reader, architecture, frozen_format, layer, self._group.device).cpu()

    def _write(self, name: str, content: Tensor) -> None:
        data = content.numpy().data
        record = FileRecord(len(data), hashlib.sha256(data).hexdigest(), int(checksum(content)))

        def write(path: Path) -> None:
            with open(path, "wb") as file:
                file.write(data)
            atomic_files.sync(path)

        with atomic_files.room_for(self._folder, len(data), f"frozen cache {self._folder}", HELP):
            atomic_files.replace(file_of(self._folder, name), write)
            self._write_sealed(f"{name}.json", {"file": asdict(record)})

    def _write_sealed(self, name: str, body: dict[str, Any]) -> None:
        """Write a manifest or a record in one step."""
        content = {**FORM, **self._base.identity, **body}
        atomic_files.replace(self._folder / name, lambda path: write_sealed(path, content))

    def _drop_files(self, reader: Reader, still_missing: list[str]) -> None:
        """Delete the downloads that no missing file needs any more."""
        if self._hub is not None and isinstance(reader, SafetensorsReader):
            wanted = [reader.files(_prefix(name)) for name in still_missing]
            self._hub.keep_only(set().union(*wanted))

    def _seal(self, names: list[str]) -> None:
        """Write the manifest, and delete records and downloads."""
        records = {name: asdict(self._record(name)) for name in names}
        with atomic_files.room_for(self._folder, 0, f"frozen cache {self._folder}", HELP):
            self._write_sealed(MANIFEST, {"files": records})
            atomic_files.sync(self._folder)
            for name in names:
                (self._folder / f"{name}.json").unlink(missing_ok=True)
        if self._hub is not None:
            self._hub.clear()


def _prefix(name: str) -> str:
    """The beginning of the names of a cache file's tensors."""
    return ENDS.get(name) or f"model.layers.{int(name.removeprefix('layer_'))}."


def _problem(work: Callable[[], None]) -> str:
    """The text of the UserError that ended ``work``; "" without one."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def _sha256(file: Path) -> str:
    """The SHA-256 as hex; of a file that cannot be read, a text that no record has."""
    try:
        return atomic_files.sha256(file)
    except OSError as error:
        return str(error)


def _is_complete(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether all files are there, as large as they were written. Raises UserError where the cache
    is of another base.
    """
    try:
        records = read_records(folder, identity)
    except ValueError:
        return False
    return all(has_size(folder, name, record) for name, record in records.items())
