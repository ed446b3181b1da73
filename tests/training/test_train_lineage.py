"""A run told to go on from an earlier snapshot of its own, whose launcher starts it again."""

import shutil
from pathlib import Path

import pytest
from tiny_run import arguments, inputs, losses

from fttrain.checkpoint import lineage
from fttrain.cli import main
from fttrain.data.batch import MicroBatch
from fttrain.data.loader import Loader
from fttrain.training import train

STEPS, SAVED, EARLIER = 6, (2, 3, 4, 5, 6), 3


class Crash(Exception):
    """What nobody expects."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory, layers=1)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``STEPS`` steps that has kept most of its snapshots."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(folder, output, *settings())) == 0
    return output


def settings(*more: str) -> tuple[str, ...]:
    kept = (f"loop.max_steps={STEPS}", "checkpoint.every=1", f"checkpoint.keep_last={len(SAVED)}")
    return (*kept, "data.holdout=0", *more)


def snapshots(output: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (output / "checkpoints").glob("step_*"))


class Attempts:
    """``fttrain train resume=PATH`` as its launcher starts it, again and again."""

    def __init__(self, folder: Path, output: Path, patch: pytest.MonkeyPatch) -> None:
        self.earlier = output / "checkpoints" / f"step_{EARLIER:08d}"
        self.argv = arguments(folder, output, *settings(f"resume={self.earlier}"))
        self._patch, self._fetch = patch, Loader.next_step

    def start(self, number: int, crash_at: int | None = None) -> int:
        """Attempt ``number``, which crashes as it begins the step after ``crash_at``."""
        self._patch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))

        def next_step(loader: Loader) -> list[MicroBatch]:
            if loader.position == crash_at:
                raise Crash
            return self._fetch(loader)

        self._patch.setattr(Loader, "next_step", next_step)
        return main(self.argv)


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    assert snapshots(tmp_path / "run") == list(SAVED)
    return tmp_path / "run"


@pytest.fixture
def attempts(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    return Attempts(folder, output, monkeypatch)


def test_a_restart_goes_on_from_there_and_then_from_what_it_has_saved(
    attempts: Attempts, output: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Crash):
        attempts.start(0, crash_at=EARLIER)
    assert snapshots(output) == [2, 3], "the later ones are set aside"
    aside = output / "checkpoints" / f".left_step_{STEPS:08d}"
    assert (aside / "manifest.json").is_file()
    capsys.readouterr()
    with pytest.raises(Crash):
        attempts.start(1, crash_at=EARLIER + 1)
    assert f"resuming after step 3 from {attempts.earlier}" in capsys.readouterr().out
    assert snapshots(output) == [2, 3, 4]
    assert not list((output / "checkpoints").glob(".left_*")), "its own lineage has saved"
    assert attempts.start(2) == 0
    assert "resuming after step 4 from" in capsys.readouterr().out
    assert losses(output) == losses(whole)


def test_one_that_crashed_before_it_had_read_it_begins_there(
    attempts: Attempts,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is set aside yet, so the newest is of the lineage that it was to leave."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_session", crash)
        with pytest.raises(Crash):
            attempts.start(0)
    assert snapshots(output) == list(SAVED)
    capsys.readouterr()
    assert attempts.start(1) == 0
    assert f"resuming after step 3 from {attempts.earlier}" in capsys.readouterr().out


def crash(*_: object) -> None:
    raise Crash


def test_what_an_earlier_launcher_began_is_not_its_lineage(
    attempts: Attempts,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command a second time, by another process, which crashes at once."""
    with pytest.raises(Crash):
        attempts.start(0, crash_at=EARLIER + 2)
    assert snapshots(output) == [2, 3, 4, 5]
    capsys.readouterr()
    monkeypatch.setattr(lineage, "_launcher", lambda: (1, 0.0))
    assert attempts.start(1) == 0
    assert f"resuming after step 3 from {attempts.earlier}" in capsys.readouterr().out
