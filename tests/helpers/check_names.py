"""Check of the names in ``fttrain/``: part of ``make lint``.

    a class name stands once
    a public docstring begins with a noun or a verb, not with a preposition or a pronoun
    a variable has a noun for its name, none of ``VAGUE``

Exit code 1, with a line for each fault: file, line, what is wrong.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
VAGUE = {"own", "found", "said", "told", "place", "kept", "made", "one"}
OPENINGS = re.compile(
    r"(about|after|around|as|at|before|beside|between|beyond|by|for|from|in|inside|into|like|of|on"
    r"|onto|out|over|per|since|than|through|to|toward|under|until|upon|with|within|without"
    r"|what|which|who|whom|whose|that|those|these|this|it|its|they|where|when|how|why)\b",
    re.IGNORECASE,
)
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    """Print the faults of all files; the exit code."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "fttrain").rglob("*.py"))}
    faults = [*_repeated_classes(trees)]
    for path, tree in trees.items():
        faults += [
            f"{path.relative_to(ROOT)}:{fault}" for fault in (*_openings(tree), *_vague(tree))
        ]
    print("\n".join(faults) if faults else "names: no faults")
    return 1 if faults else 0


def _repeated_classes(trees: dict[Path, ast.Module]) -> Iterator[str]:
    first: dict[str, str] = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                if node.name in first:
                    yield f"{place}: class {node.name} is defined in {first[node.name]}, too"
                first.setdefault(node.name, place)


def _openings(tree: ast.Module) -> Iterator[str]:
    """Faults of public docstrings' first words."""
    for node in _public(tree):
        if opening := OPENINGS.match(ast.get_docstring(node) or ""):
            name = getattr(node, "name", "the module")
            line = getattr(node, "lineno", 1)
            yield f"{line}: {name}: docstring begins with {opening[0]!r}; a noun or verb is wanted"


def _public(tree: ast.Module) -> Iterator[Documented]:
    yield tree
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    item
                    for item in node.body
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
                )


def _vague(tree: ast.Module) -> Iterator[str]:
    """Faults of the names that are bound: variables, parameters, attributes, fields."""
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.arg):
            name = node.arg
        if name is not None and name.lstrip("_") in VAGUE:
            yield f"{node.lineno}: {name} names no thing; a noun is wanted"


if __name__ == "__main__":
    sys.exit(main())
