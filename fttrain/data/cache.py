"""A folder made once, whoever asks first, and verified before each use."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fttrain.errors import UserError

MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


def cache_root(cache_dir: str | None) -> Path:
    """``cache_dir``, or ``fttrain`` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fttrain"


def find(root: Path, key: str, kind: str = "data") -> Path | None:
    """The folder ``root/kind/key``, if it is there and whole."""
    folder = root / kind / key
    return folder if fault(folder) is None else None


def load_or_build(
    root: Path,
    key: str,
    build: Callable[[Path], None],
    kind: str = "data",
    setting: str = "data.cache_dir",
) -> Path:
    """The folder ``root/kind/key``, whole; ``build(folder)`` fills it when it is missing or
    damaged.

    Any number of processes may call this at once: one builds, the others wait. A build that dies
    leaves nothing that is taken for whole. Raises UserError when the place cannot be written;
    ``setting`` is what puts ``root`` elsewhere.
    """
    folder = root / kind / key
    if fault(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{key}.lock")):
            found = fault(folder)
            if found is None:
                return folder
            if folder.exists():
                _log.warning("%s: %s; it is made again", folder, found)
                shutil.rmtree(folder)
            building = folder.with_name(f"{key}.building")
            shutil.rmtree(building, ignore_errors=True)  # of a build that died
            building.mkdir()
            try:
                build(building)
                _seal(building)
                building.rename(folder)
            except BaseException:
                shutil.rmtree(building, ignore_errors=True)
                raise
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"cache {root}: cannot write {where} ({error.strerror or error}); set {setting} to a "
            "folder with room that you may write to"
        ) from None
    return folder


def fault(folder: Path) -> str | None:
    """What is wrong with a cached folder, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for name, digest in manifest.items():
            if _digest(folder / name) != digest:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError, TypeError):
        return "it cannot be read"
    return None


def _seal(folder: Path) -> None:
    """Writes the manifest, last, once the other files are on the disk."""
    digests = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
        digests[file.name] = _digest(file)
    with open(folder / MANIFEST, "w", encoding="utf-8") as stream:
        json.dump(digests, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock of the file ``path`` and holds it; the system lets go of it when the
    process dies.
    """
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
