"""Files that are whole at any moment: what is new takes their place in one step."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces the file. It survives a kill, not a power cut (``checkpoint.durable`` does both)."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
