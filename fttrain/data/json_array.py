"""The elements of a JSON array, each with the line on which it begins."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from fttrain.util.errors import UserError


def elements(path: Path, text: str, at: int) -> Iterator[tuple[int, bytes]]:
    """Yield (line, text) of each element of the array whose ``[`` stands before ``at``.

    ``path``: for messages. Raises UserError, with the line, for invalid JSON.
    """
    # Accepts NaN, which the caller refuses element by element: one does not hide the next.
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s]*")
    line, counted, first = 1, 0, True
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if not first and text.startswith(",", at):
            at = space.match(text, at + 1).end()  # type: ignore[union-attr]
        elif text.startswith("]", at) or (not first and at >= len(text)):
            break
        elif not first:
            at_line = line + text.count("\n", counted, at)
            raise UserError(
                f"data.path={path}:{at_line}: not JSON: a comma or ] is missing between two "
                "elements"
            )
        line, counted = line + text.count("\n", counted, at), at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data.path={path}:{line}: not JSON: {error}") from None
        yield line, text[at:end].encode("utf-8", "surrogatepass")
        at, first = end, False
    if not text.startswith("]", at):
        raise UserError(
            f"data.path={path}: not JSON: the array has no end; the file looks truncated"
        )
