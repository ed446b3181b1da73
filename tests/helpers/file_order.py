"""The order of test files: the longest first. One that starts last leaves the other processes of
tests without work until it has ended.
"""

from pathlib import Path

TESTS = Path(__file__).parents[1]
# More than about ten seconds each by `pytest --durations=0`, without and then with `-m slow`.
LONGEST = Path(__file__).with_name("longest_files.txt").read_text().split()
_PLACES = {name: place for place, name in enumerate(LONGEST)}


def place(file: Path) -> int:
    """The key to sort by. Files that are not listed come last, in the order in which they are."""
    return _PLACES.get(str(file).removeprefix(f"{TESTS}/"), len(_PLACES))
