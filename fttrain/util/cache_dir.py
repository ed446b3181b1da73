"""Cache folders: built once by the first process that needs them, verified before each use."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fttrain.util.errors import UserError
from fttrain.util.locks import locked
from fttrain.util.manifest import fault, seal_folder
from fttrain.util.warn import warn_of_rank

FORM = {"format": "fttrain-cache", "version": 1}


def cache_root(cache_dir: str | None) -> Path:
    """``cache_dir``, or ``fttrain`` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fttrain"


def find(root: Path, key: str, kind: str = "data") -> Path | None:
    """The folder ``root/kind/key``; None where it is missing or damaged."""
    folder = root / kind / key
    return folder if fault(folder, FORM) is None else None


def load_or_build(
    root: Path,
    key: str,
    build: Callable[[Path], None],
    kind: str = "data",
    setting: str = "data.cache_dir",
) -> Path:
    """The folder ``root/kind/key``; ``build(folder)`` fills it when it is missing or damaged.

    Any number of processes may call this at once: one builds, the others wait. The remains of a
    build that died are never taken for the folder. Raises UserError where ``root`` cannot be
    written; ``setting``: the setting that moves it.
    """
    folder = root / kind / key
    if fault(folder, FORM) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{key}.lock")):
            problem = fault(folder, FORM)
            if problem is None:
                return folder
            if folder.exists():
                warn_of_rank(f"{folder}: {problem}; it is made again")
                shutil.rmtree(folder)
            building = folder.with_name(f"{key}.building")
            shutil.rmtree(building, ignore_errors=True)  # of a build that died
            building.mkdir()
            try:
                build(building)
                seal_folder(building, FORM)
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
