"""Disks that are full, too small or damaged, and checkpoints that are broken: one line each."""

import errno
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_frozen
import torch
from tiny_frozen import LAYERS, build, truncate

from fttrain.cli import main
from fttrain.util import atomic_files
from fttrain.util.errors import UserError

UNREADABLE = "/proc/self/mem"  # opens, and then reading it is EIO, as of a bad sector


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_frozen.model(tmp_path / "model")


def overlap(shard: Path) -> None:
    """The second tensor claims bytes of the first one."""
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = sorted(
        (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    begin, end = header[names[1]]["data_offsets"]
    header[names[1]]["data_offsets"] = [begin - 64, end - 64]
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("fault", [overlap, truncate])
def test_a_broken_shard_is_refused_by_name(
    fault: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    shard = sorted(model.glob("*.safetensors"))[2]
    fault(shard)
    with pytest.raises(UserError, match=f"{shard.name}: not a whole safetensors file"):
        build(model, tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_500_000))
    with pytest.raises(UserError, match=r"frozen cache .*bytes needed, 1,500,000 free.*cache_dir"):
        build(model, tmp_path)
    assert not list(tmp_path.rglob("*.bin"))


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("file", ["layer_002.bin", "layer_002.json", "manifest.json"])
def test_a_disk_that_fills_up_is_one_line_and_the_build_goes_on(
    file: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems that allocate late tell a full disk at fsync."""
    digest = build(model, tmp_path / "other").digest
    sync = atomic_files.sync
    with monkeypatch.context() as patched:
        patched.setattr(
            atomic_files, "sync", lambda path: full(path) if path.name == file else sync(path)
        )
        with pytest.raises(UserError, match=r"^frozen cache .*No space left.*cache_dir") as told:
            build(model, tmp_path)
    assert "\n" not in str(told.value)
    (folder,) = (tmp_path / "frozen").iterdir()
    assert not (folder / "manifest.json").exists()
    assert not list(folder.glob(".*part"))
    made: list[int] = []
    cache = build(model, tmp_path, progress=lambda _, total: made.append(total))
    assert made[:1] == ([] if file == "manifest.json" else [LAYERS + 3 - 3])
    assert cache.digest == digest


def test_a_full_disk_while_verifying_leaves_the_cache_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, write = build(model, tmp_path).digest, atomic_files.write_bytes

    def half(path: Path, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        full(path)

    with monkeypatch.context() as patched:
        patched.setattr(atomic_files, "write_bytes", half)
        with pytest.raises(UserError, match="No space left"):
            build(model, tmp_path, verify=True)
    made: list[int] = []
    again = build(model, tmp_path, progress=lambda done, _: made.append(done))
    assert (again.digest, made) == (digest, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program took the room after it had been looked at."""
    right = build(model, tmp_path)
    assert right.size_bytes > 400 * 1024
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
        with pytest.raises(UserError, match=r"^frozen cache .*No space left.*cache_dir"):
            build(model, small_disk)
    (folder,) = (small_disk / "frozen").iterdir()
    kept = {path.stem for path in folder.glob("*.json")}
    assert 1 < len(kept) < LAYERS + 3
    assert not (folder / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    made: list[int] = []
    cache = build(model, small_disk, progress=lambda _, total: made.append(total))
    assert made[0] in (LAYERS + 3 - len(kept), LAYERS + 4 - len(kept))  # a record may be half
    assert cache.digest == right.digest


def test_a_place_that_cannot_be_written_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "frozen").write_text("a file")
    with pytest.raises(UserError, match=r"frozen cache .*cannot be made.*frozen.cache_dir"):
        build(model, tmp_path)


def test_a_file_that_ends_early_is_named(model: Path, tmp_path: Path) -> None:
    cache = build(model, tmp_path)
    truncate(cache.path(0))
    with pytest.raises(UserError, match=r"layer_000.bin: it ends too early"):
        cache.read(0, torch.empty(cache.path(1).stat().st_size, dtype=torch.uint8))


@pytest.mark.parametrize("what", ["layer_002.bin", "embedding.bin"])
def test_the_command_makes_again_what_the_disk_does_not_deliver(
    what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = build(model, tmp_path)
    (cache.folder / what).unlink()
    (cache.folder / what).symlink_to(UNREADABLE)
    command = ["quantize", "model=local", f"model.path={model}", f"frozen.cache_dir={tmp_path}"]
    assert main([*command, "model.dtype=float32", "rig.device=cpu"]) == 0
    assert "1 file(s) made" in capsys.readouterr().out
    assert build(model, tmp_path, verify=True).digest == cache.digest
    assert not (cache.folder / what).is_symlink()


@pytest.mark.parametrize("target", ["/nowhere", UNREADABLE], ids=["dangling", "unreadable"])
@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00004.safetensors"])
def test_a_file_of_the_checkpoint_that_cannot_be_read_is_named(
    name: str, target: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / name).unlink()
    (model / name).symlink_to(target)
    command = ["quantize", "model=local", f"model.path={model}", f"frozen.cache_dir={tmp_path}"]
    assert main([*command, "model.dtype=float32", "rig.device=cpu"]) == 2
    told = capsys.readouterr().err
    assert name in told
    assert "Traceback" not in told
    assert not list(tmp_path.rglob("*.bin"))


def test_an_untied_checkpoint_without_a_head_is_refused_before_anything_is_made(
    model: Path, tmp_path: Path
) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model: tensor lm_head.weight is missing, .*config.json"):
        build(model, tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
