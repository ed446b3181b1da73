"""The list of the longest test files."""

from file_order import LONGEST, TESTS, place


def test_every_listed_file_is_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


def test_the_longest_come_first() -> None:
    files = [TESTS / "a" / "test_a.py", TESTS / LONGEST[1], TESTS / LONGEST[0]]
    assert sorted(files, key=place) == files[::-1]
