"""Files that survive a kill, a power cut, a full disk: written, fsynced, hashed, then named.

A launcher and a sweep use this module: it loads no torch.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fttrain.util.errors import UserError

HELP = "free some space, or lower checkpoint.keep_last, or choose another output="
SLACK_BYTES = 1 << 20  # headers, JSON files, blocks of folders


def sync(path: Path) -> None:
    """fsync a file or a folder. A new name is only durable once its folder is synced, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write and sync one file."""
    path.write_bytes(data)
    sync(path)


def write_json(path: Path, value: Any) -> None:
    """Write and sync one JSON file; NaN and infinity, which JSON lacks, raise ValueError."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) as ``replace_unsynced`` does."""
    replace_unsynced(path, lambda part: part.write_text(text, encoding="utf-8"))


def replace_unsynced(path: Path, write: Callable[[Path], object]) -> None:
    """Give ``path`` new content in one step. A kill does no harm; with ``replace`` neither does a
    power cut.

    ``write``: writes the content to the path that it is called with.
    """
    part = path.with_name(f".{path.name}.part")
    write(part)
    os.replace(part, path)


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Give ``path`` new content in one step: readers see the old file or the new one, never a part,
    even after a power cut.

    ``write``: writes the content to the path that it is called with.
    """
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed save
    part.mkdir()  # a folder, for libraries may write other files beside the one that they are told
    try:
        write(part / path.name)
        os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, each durable."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(exist_ok=True)
        sync(part.parent)


@contextlib.contextmanager
def room_for(folder: Path, needed_bytes: int, what: str, help_: str = HELP) -> Iterator[None]:
    """Refuse a write that cannot fit, and explain one that fails. ``help_``: advice to the user.

    Raises:
        UserError: less than ``needed_bytes`` free, or the system refused a write (full disk, quota,
            permission).
    """
    needed = needed_bytes + SLACK_BYTES

    def free() -> int:
        home = next(part for part in (folder, *folder.parents) if part.exists())
        return shutil.disk_usage(home).free

    if free() < needed:
        raise UserError(f"{what}: {needed:,} bytes needed, {free():,} free at {folder}: {help_}")
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error):
            raise  # a mistake in the program, not of the disk
        reason = re.sub(r"^.*I/O error: ", "", str(error))
        raise UserError(
            f"{what}: the system refused a write ({reason}); {needed:,} bytes needed, "
            f"{free():,} free: {help_}"
        ) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file as hex, read in small pieces, from the disk itself where the system
    allows it.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # drop cached pages: the disk itself is to be checked
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()
