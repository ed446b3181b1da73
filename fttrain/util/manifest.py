"""Sealed manifests: a JSON file that shows a flipped bit in itself and in the files it lists."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fttrain.util import atomic_files
from fttrain.util.atomic_files import sha256, sync

MANIFEST = "manifest.json"


def seal_folder(folder: Path, form: Mapping[str, Any], **entries: Any) -> None:
    """Lists every file of ``folder`` with size and SHA-256, last of all; syncs the folder.

    ``form``: format and version, which ``read_sealed`` compares; ``entries`` are kept beside them.
    """
    names = sorted(path.name for path in folder.iterdir())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }
    write_sealed(folder / MANIFEST, {**form, **entries, "files": files})
    sync(folder)


def fault(folder: Path, form: Mapping[str, Any], contents: bool = True) -> str | None:
    """What is wrong with a sealed folder (file and reason), or None when it is whole.

    ``contents=False`` compares names and sizes only, which costs nothing.
    """
    name = MANIFEST
    try:
        for name, entry in read_sealed(folder / MANIFEST, form)["files"].items():
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


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Writes and syncs ``body`` as JSON with the SHA-256 of itself: a flip anywhere shows."""
    atomic_files.write_bytes(path, _seal(body))


def read_sealed(path: Path, form: Mapping[str, Any]) -> dict[str, Any]:
    """The content that ``write_sealed`` wrote, whose entries ``form`` (format and version) are as
    given.

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


def _seal(body: Mapping[str, Any]) -> bytes:
    """``body`` in the one way it is written, with the SHA-256 of itself."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=2) + "\n").encode()
