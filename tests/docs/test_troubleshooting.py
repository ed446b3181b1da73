"""The troubleshooting page is sorted by error text: each of its texts is one that the code has."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
TITLES = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
SHORTEST = 8  # characters of a piece between placeholders that has to be found


@cache
def texts_of_the_code() -> str:
    """Every string of fttrain/, one a line; what an f-string fills in is an ellipsis."""
    texts = []
    for file in sorted((ROOT / "fttrain").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_page_has_its_kinds_of_errors() -> None:
    assert len(TITLES) > 30


@pytest.mark.parametrize("title", TITLES)
def test_the_code_has_each_text(title: str) -> None:
    pieces = [piece.strip() for piece in title.split("…")]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    assert pieces, title
    for piece in pieces:
        assert piece in texts_of_the_code(), piece
