"""What all benchmarks share."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Module = Callable[[str], ModuleType]


def test_a_checkout_that_is_not_installed_has_an_environment_too(
    module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where PYTHONPATH alone names it."""
    common, version = module("common"), importlib.metadata.version

    def installed(name: str) -> str:
        if name == "fttrain":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    versions = common.environment()["versions"]
    assert versions["fttrain"] == "not installed"
    assert versions["torch"] == version("torch")


def test_what_ranks_noted_last_is_whole(
    module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common, job_file = module("common"), str(tmp_path / "job.json")
    assert common.reports(tmp_path, 2) == []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        common.note(job_file, {"steps": [rank]})
        assert bool(common.reports(tmp_path, 2)) == (rank == 1)
    common.note(job_file, {"steps": [1, 2]})
    assert common.reports(tmp_path, 2) == [{"steps": [0]}, {"steps": [1, 2]}]


def test_figures_are_never_half_written(
    module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that ends in the middle of it leaves what was there."""
    common, path = module("common"), tmp_path / "figures.json"
    common.write_json(str(path), {"runs": 1})
    right = Path.write_text

    def half(self: Path, text: str) -> int:
        right(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        common.write_json(str(path), {"runs": 2})
    assert json.loads(path.read_text()) == {"runs": 1}
