"""Sealed manifests: JSON files that reveal a flipped bit in themselves and in the files listed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fttrain.util import atomic_files
from fttrain.util.atomic_files import sha256, sync

MANIFEST = "manifest.json"


def seal_folder(folder: Path, form: Mapping[str, Any], **entries: Any) -> None:
    """Write the manifest of ``folder``, with every file's size and SHA-256, and sync the folder.
    Call it when all files are written.

    ``form``: format and version, which ``read_sealed`` compares; ``entries``: stored beside them.
    """
    names = sorted(path.name for path in folder.iterdir())
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }
    write_sealed(folder / MANIFEST, {**form, **entries, "files": files})
    sync(folder)


def fault(folder: Path, form: Mapping[str, Any], contents: bool = True) -> str | None:
    """The first fault of a sealed folder (file and reason); None when it is whole.

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
    """Write and sync ``body`` as JSON with its own SHA-256, which reveals a flip anywhere."""
    atomic_files.write_bytes(path, _seal(body))


def read_sealed(path: Path, form: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file that ``write_sealed`` has written. ``form``: the format and version
    that it must have.

    Raises:
        ValueError: the file is missing, damaged, or of an unknown version; the text says which.
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
    """``body`` as the bytes of the file, with its own SHA-256."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=2) + "\n").encode()
