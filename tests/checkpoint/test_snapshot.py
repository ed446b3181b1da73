"""Real faults: kills (see killer.py), full disks, flipped bits, lost files, a second run."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fttrain.checkpoint.adapter_peft import AdapterInfo, load_adapter
from fttrain.checkpoint.config import CheckpointConfig
from fttrain.checkpoint.discovery import find_snapshot
from fttrain.checkpoint.output_lock import lock_output
from fttrain.checkpoint.snapshot import FORM, Snapshot, load_snapshot, save_snapshot
from fttrain.util.errors import UserError

KILLER = Path(__file__).with_name("killer.py")
FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
)


def snapshot(step: int, size: int = 8) -> Snapshot:
    """A snapshot with every dtype an optimizer may hold, and the values that are easily lost."""
    generator = torch.Generator().manual_seed(step)
    name = "model.layers.0.self_attn.q_proj"
    adapter = {
        f"{name}.lora_A": torch.randn(2, size, generator=generator),
        f"{name}.lora_B": torch.zeros(5, 2),
    }
    adapter[f"{name}.lora_B"][0, 0] = -0.0
    adapter[f"{name}.lora_B"][0, 1] = 1e-45  # the smallest denormal
    optimizer = {
        f"exp_avg.{name}.lora_A": torch.randn(2, size, generator=generator),
        "quantised": torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8),
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(step),
        "none": torch.zeros(0),
        "nan": torch.tensor([float("nan"), float("inf")]),
    }
    scalars = {"loss": 0.1 + 0.2, "position": step, "guard": {"recent": [1e-300, 3.0]}, "name": "é"}
    info = AdapterInfo(2, 4.0, 0.05, "all-linear", True)
    return Snapshot(step, adapter, optimizer, scalars, info, "some/base", "main")


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    """Equal to the last bit, NaN and the sign of zero included."""
    for mine, theirs in ((one.adapter, other.adapter), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype), name
            assert raw(tensor) == raw(theirs[name]), name
    plain = [(s.step, s.scalars, s.adapter_info, s.base_model, s.revision) for s in (one, other)]
    assert plain[0] == plain[1]


def steps(folder: Path) -> list[int]:
    return sorted(int(name.removeprefix("step_")) for name in os.listdir(folder))


def test_every_bit_comes_back(tmp_path: Path) -> None:
    path = save_snapshot(tmp_path / "checkpoints", snapshot(100))
    assert path == tmp_path / "checkpoints" / "step_00000100"
    assert tuple(sorted(os.listdir(path))) == FILES
    assert_equal(load_snapshot(path), snapshot(100))
    assert find_snapshot(tmp_path / "checkpoints", "auto") == path
    assert load_adapter(path)[1].r == 2, "a snapshot is an adapter folder, too"


def test_auto_none_and_path(tmp_path: Path) -> None:
    assert find_snapshot(tmp_path / "nothing", "auto") is None
    for step in (7, 100_000_000, 30):
        save_snapshot(tmp_path / str(step), snapshot(step))
        shutil.move(tmp_path / str(step) / f"step_{step:08d}", tmp_path / f"step_{step:08d}")
    assert find_snapshot(tmp_path, "auto") == tmp_path / "step_100000000"
    assert find_snapshot(tmp_path, "none") is None
    chosen = str(tmp_path / "step_00000007")
    assert find_snapshot(tmp_path, chosen) == Path(chosen)
    with pytest.raises(UserError, match=r"manifest\.json is missing; it holds step_.*00000007"):
        find_snapshot(tmp_path, str(tmp_path))
    (Path(chosen) / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json is missing"):
        find_snapshot(tmp_path, chosen)
    with pytest.raises(UserError, match=r"state\.json is missing"):
        load_snapshot(chosen)


def test_three_hundred_flipped_bits_are_all_found(tmp_path: Path) -> None:
    older = save_snapshot(tmp_path, snapshot(1))
    newer = save_snapshot(tmp_path, snapshot(2))
    dice, hit = random.Random(0), set()
    for _ in range(300):
        file = dice.choice(FILES)
        whole = (newer / file).read_bytes()
        damaged = bytearray(whole)
        damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        (newer / file).write_bytes(damaged)
        said: list[str] = []
        assert find_snapshot(tmp_path, "auto", said.append) == older
        assert len(said) == 1
        assert f"{newer} is refused: {file} is damaged" in said[0]
        (newer / file).write_bytes(whole)
        hit.add(file)
    assert hit == set(FILES)
    assert find_snapshot(tmp_path, "auto", pytest.fail) == newer


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (lambda path: path.unlink(), "is missing"),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes instead|damaged"),
    "emptied": (lambda path: os.truncate(path, 0), "bytes instead|damaged"),
    "zeroed": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "damaged"),
    "half zeroed": (
        lambda path: path.write_bytes(path.read_bytes()[:70] + bytes(path.stat().st_size - 70)),
        "damaged",
    ),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "bytes instead|damaged"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is missing|cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_falls_back_to_the_newest_whole_one(file: str, damage: str, tmp_path: Path) -> None:
    paths = [save_snapshot(tmp_path, snapshot(step), keep_last=3) for step in (1, 2, 3)]
    harm, reason = DAMAGES[damage]
    said: list[str] = []
    harm(paths[2] / file)
    assert find_snapshot(tmp_path, "auto", said.append) == paths[1]
    assert_equal(load_snapshot(paths[1]), snapshot(2))
    harm(paths[1] / file)
    assert find_snapshot(tmp_path, "auto", said.append) == paths[0]
    harm(paths[0] / file)
    with pytest.raises(UserError, match="none of the 3 checkpoints is whole"):
        find_snapshot(tmp_path, "auto", said.append)
    assert len(said) == 6
    for text in said:
        assert f"is refused: {file} " in text
        assert any(part in text for part in reason.split("|"))


def test_a_later_format_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORM, "version", 2)
    path = save_snapshot(tmp_path, snapshot(1))
    monkeypatch.undo()
    with pytest.raises(UserError, match="version 2; this program reads 1"):
        load_snapshot(path)


def test_rotation_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_snapshot(tmp_path, snapshot(step), keep_last=3)
        assert steps(tmp_path) == list(range(max(1, step - 2), step + 1))
    os.truncate(tmp_path / "step_00000006" / "optimizer.safetensors", 10)
    save_snapshot(tmp_path, snapshot(7), keep_last=2)
    assert steps(tmp_path) == [5, 7], "a damaged one does not count as kept"
    save_snapshot(tmp_path, snapshot(8), keep_last=1)
    assert steps(tmp_path) == [8]


def test_going_back_to_an_earlier_step_leaves_the_later_ones_behind(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_snapshot(tmp_path, snapshot(step), keep_last=3)
    save_snapshot(tmp_path, snapshot(15), keep_last=2)
    assert steps(tmp_path) == [10, 15], "the newest written stays, whatever its number"
    save_snapshot(tmp_path, snapshot(12), keep_last=1)
    assert steps(tmp_path) == [12]


def test_a_step_saved_twice_is_replaced(tmp_path: Path) -> None:
    path = save_snapshot(tmp_path, snapshot(5))
    os.truncate(path / "state.json", 3)
    save_snapshot(tmp_path, snapshot(5))
    assert steps(tmp_path) == [5]
    assert_equal(load_snapshot(path), snapshot(5))


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    save_snapshot(tmp_path, snapshot(1))
    bad = snapshot(2)
    bad.adapter["model.layers.0.self_attn.q_proj.lora_B"][1, 1] = float("nan")
    with pytest.raises(UserError, match=r"q_proj\.lora_B holds values that are not finite"):
        save_snapshot(tmp_path, bad)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the real calls: files, manifest, folder, rename, parent, deletion."""
    save_snapshot(tmp_path, snapshot(1))
    calls: list[str] = []
    fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

    def spy_fsync(descriptor: int) -> None:
        calls.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def spy_rename(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        calls.append(f"rename {Path(source).name} {Path(target).name}")
        rename(source, target)

    def spy_rmtree(path: os.PathLike[str], ignore_errors: bool = False) -> None:
        calls.append(f"delete {Path(path).name}")
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    monkeypatch.setattr(shutil, "rmtree", spy_rmtree)
    save_snapshot(tmp_path, snapshot(2), keep_last=1)
    monkeypatch.undo()
    part, final = ".part_step_00000002", "step_00000002"
    tail = [
        "sync manifest.json",
        f"sync {part}",
        f"rename {part} {final}",
        f"sync {tmp_path.name}",
        "rename step_00000001 .part_step_00000001",
        "delete .part_step_00000001",
    ]
    assert calls[-6:] == tail
    before = " ".join(calls[:-6])
    for file in set(FILES) - {"manifest.json"}:
        assert f"sync {file}" in before
    assert "manifest" not in before
    assert "step_00000001" not in before


def run(*command: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize("what", ["moments 40", "lines new 3", "lines again 3"])
def test_killed_at_any_moment_it_leaves_a_whole_one(what: str, tmp_path: Path) -> None:
    mode, *arguments = what.split()
    done = run(sys.executable, KILLER, mode, tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills" in done.stdout


FULL_DISK = """
import os, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_snapshot import UserError, assert_equal, snapshot
from test_snapshot import find_snapshot, load_snapshot, save_snapshot
from fttrain.util import atomic_files
folder = Path(sys.argv[1])
save_snapshot(folder, snapshot(1, size=8))
{limit}
try:
    save_snapshot(folder, snapshot(2, size=400_000))
except UserError as error:
    print(error)
else:
    raise SystemExit("the save must fail")
assert os.listdir(folder) == ["step_00000001"], os.listdir(folder)
assert_equal(load_snapshot(find_snapshot(folder, "auto")), snapshot(1, size=8))
save_snapshot(folder, snapshot(3, size=8))
"""
NO_LIMIT = ""
FILE_LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
BLIND = (
    "atomic_files.shutil.disk_usage = lambda _: __import__('types').SimpleNamespace(free=10**12)"
)


def full_disk(limit: str, folder: Path, *prefix: str) -> str:
    program = FULL_DISK.format(tests=str(KILLER.parent), limit=limit)
    done = run(*prefix, sys.executable, "-c", program, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_refused_write_leaves_nothing_half_written(tmp_path: Path) -> None:
    told = full_disk(FILE_LIMIT, tmp_path)
    assert "refused a write" in told
    assert "bytes needed" in told
    assert "free" in told


@pytest.mark.parametrize("limit", [NO_LIMIT, BLIND], ids=["foreseen", "hit while writing"])
def test_a_full_disk_leaves_nothing_half_written(limit: str, tmp_path: Path) -> None:
    """A tmpfs of 3 MiB in its own mount namespace; ``BLIND`` hides its size at first."""
    shell = f'mount -t tmpfs -o size=3m none {tmp_path} && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", shell, "sh")
    try:
        probe = run(*prefix, "true")
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if probe.returncode != 0:
        pytest.skip(f"this user may not mount a tmpfs: {probe.stderr.strip()}")
    told = full_disk(limit, tmp_path, *prefix)
    assert "bytes needed" in told
    assert "free" in told
    assert ("refused a write (No space left" in told) == (limit == BLIND)


def test_one_folder_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = (
        "import sys, time\n"
        "from fttrain.checkpoint.output_lock import lock_output\n"
        "lock = lock_output(sys.argv[1], 'auto')\n"
        "print('mine', flush=True)\n"
        "time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=f"process {other.pid} on .* is writing there"):
        lock_output(folder, "auto")
    other.kill()
    other.wait()
    other.stdout.close()
    mine = lock_output(folder, "auto")
    with mine, pytest.raises(UserError, match=f"process {os.getpid()} "):
        lock_output(folder, "auto")
    lock_output(folder, "none").release()


def test_runs_are_not_mixed(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    lock_output(mine, "none").release()
    path = save_snapshot(mine / "checkpoints", snapshot(1))
    foreign = save_snapshot(other / "checkpoints", snapshot(1))
    with pytest.raises(UserError, match=r"already holds a run \(checkpoints\).*resume=auto"):
        lock_output(mine, "none")
    with pytest.raises(UserError, match="is of another one"):
        lock_output(mine, str(foreign))
    lock_output(mine, "auto").release()
    lock_output(mine, str(path)).release()
    lock_output(tmp_path / "third", str(foreign)).release()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        lock_output(tmp_path / "file", "auto")


@pytest.mark.parametrize(("key", "value"), [("every", -1), ("keep_last", 0)])
def test_config_names_the_bad_key(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"checkpoint\.{key}={value}"):
        CheckpointConfig(**{key: value})


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    bad = snapshot(1)
    bad.scalars["loss"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        save_snapshot(tmp_path, bad)
    assert os.listdir(tmp_path) == []
