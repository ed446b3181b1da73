import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from fttrain.util.cache_dir import FORM, cache_root, load_or_build
from fttrain.util.errors import UserError
from fttrain.util.manifest import fault


def build(folder: Path) -> None:
    (folder / "values").write_bytes(b"whole")


def die(folder: Path) -> None:
    (folder / "values").write_bytes(b"ha")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_build_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(
        target=load_or_build, args=(tmp_path, "key", die)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    folder = load_or_build(tmp_path, "key", build)
    assert (folder / "values").read_bytes() == b"whole"
    assert {path.name for path in folder.parent.iterdir()} == {"key", "key.lock"}


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise UserError("data.jsonl:3: not JSON")

    with pytest.raises(UserError, match="not JSON"):
        load_or_build(tmp_path, "key", fail)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"key.lock"}


def test_a_whole_folder_is_not_built_again(tmp_path: Path) -> None:
    def never(folder: Path) -> None:
        raise AssertionError("built again")

    folder = load_or_build(tmp_path, "key", build)
    assert fault(folder, FORM) is None
    assert load_or_build(tmp_path, "key", never) == folder
    (folder / "values").write_bytes(b"wholE")
    assert fault(folder, FORM) == "values is damaged (its SHA-256 differs)"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        with open("/dev/full", "wb") as stream:
            stream.write(b"x" * 100_000)

    with pytest.raises(UserError, match=r"cannot write .*No space left.*data\.cache_dir"):
        load_or_build(tmp_path, "key", fill)
    assert not (tmp_path / "data" / "key").exists()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root("/some/where") == Path("/some/where")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_root(None) == Path("/cache/fttrain")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == Path.home() / ".cache" / "fttrain"
