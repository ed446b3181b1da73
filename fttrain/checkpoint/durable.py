"""Files that survive a kill, a power cut, a full disk: written, fsynced, hashed, then named."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fttrain.errors import UserError

MANIFEST = "manifest.json"
FORMAT = {"format": "fttrain-snapshot", "version": 1}
HELP = "free some space, or lower checkpoint.keep_last, or choose another output="
SLACK_BYTES = 1 << 20  # headers, JSON files, blocks of folders


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the data of ``tensors`` takes on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def sync(path: Path) -> None:
    """fsync of a file or a folder; a new name is only durable once its folder is synced, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes and syncs one file."""
    path.write_bytes(data)
    sync(path)


def write_json(path: Path, value: Any) -> None:
    """Writes and syncs one JSON file; NaN and infinity, which JSON lacks, raise ValueError."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes and syncs one safetensors file; the tensors may be views of one flat buffer."""
    on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    path.touch()
    usual = stat.S_IMODE(path.stat().st_mode)
    save_file(on_host, path, metadata={"format": "pt"})
    path.chmod(usual)  # the library makes it readable by its owner only
    sync(path)


def replace(path: Path, write: Callable[[Path], None]) -> None:
    """Gives ``path`` new content at once: readers see the old file or the new one, no part."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed save
    part.mkdir()  # a folder: libraries leave files of their own beside what they write
    try:
        write(part / path.name)
        os.replace(part / path.name, path)
    finally:
        shutil.rmtree(part)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """``mkdir -p`` whose every new name is durable."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(exist_ok=True)
        sync(part.parent)


@contextlib.contextmanager
def room_for(folder: Path, needed_bytes: int, what: str, help_: str = HELP) -> Iterator[None]:
    """Refuses a write that cannot fit and explains one that fails. ``help_``: what the user can do.

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
            raise  # a fault of ours, not of the disk
        reason = re.sub(r"^.*I/O error: ", "", str(error))
        raise UserError(
            f"{what}: the system refused a write ({reason}); {needed:,} bytes needed, "
            f"{free():,} free: {help_}"
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file as hex, in small pieces; from the disk itself where the system lets us."""
    with path.open("rb") as file:
        if hasattr(
            os, "posix_fadvise"
        ):  # drop clean cached pages, so that the platter is what we check
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, step: int) -> None:
    """Lists every file of ``folder`` with size and SHA-256, last of all; syncs the folder."""
    names = sorted(path.name for path in folder.iterdir())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }
    write_sealed(folder / MANIFEST, {**FORMAT, "step": step, "files": files})
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``, itself checked to the last bit.

    Raises:
        ValueError: not there, damaged, or of an unknown version; the text says which.
    """
    return read_sealed(folder / MANIFEST, FORMAT)


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Writes and syncs ``body`` as JSON with the SHA-256 of itself: a flip anywhere shows."""
    write_bytes(path, _seal(body))


def read_sealed(path: Path, form: Mapping[str, Any]) -> dict[str, Any]:
    """What ``write_sealed`` wrote, whose entries ``form`` (format and version) are as given.

    Raises:
        ValueError: not there, damaged, or of an unknown version; the text says which.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    try:
        body = json.loads(data)
        del body["sha256"]
        whole = _seal(body) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path.name} is damaged")
    if {key: body.get(key) for key in form} != form:
        raise ValueError(
            f"{path.name} has version {body.get('version')}; this program reads {form['version']}"
        )
    return dict(body)


def flaw(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a snapshot folder (file and reason), or None when it is whole.

    ``contents=False`` compares names and sizes only, which costs nothing.
    """
    name = MANIFEST
    try:
        for name, entry in read_manifest(folder)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
            if contents and sha256(path) != entry["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _seal(body: Mapping[str, Any]) -> bytes:
    """``body`` in the one way it is written, with the SHA-256 of itself."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=2) + "\n").encode()
