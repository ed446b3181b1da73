"""Saves snapshots in forked children and kills them; run by test_snapshot.py in a process of its
own.

killer.py moments FOLDER COUNT   SIGKILL at random moments of an endless series of saves
killer.py lines FOLDER CASE      SIGKILL before every line of one save that may write
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fttrain.checkpoint.adapter_peft import AdapterInfo
from fttrain.checkpoint.discovery import find_snapshot
from fttrain.checkpoint.snapshot import FORM, Snapshot, load_snapshot, save_snapshot
from fttrain.util.manifest import fault

NAME = "model.layers.0.mlp.up_proj"


READS_ONLY = {
    "check",
    "_problem",
    "sha256",
    "fault",
    "read_sealed",
    "_seal",
    "tensor_bytes",
    "free",
}


def snapshot(step: int, content: int) -> Snapshot:
    size = 2000 if sys.argv[1] == "moments" else 4
    state = {
        f"{NAME}.lora_A": torch.full((2, size), float(content)),
        f"{NAME}.lora_B": torch.ones(3, 2),
    }
    moments = {"exp_avg": torch.full((size,), float(content)), "step": torch.tensor(step)}
    return Snapshot(step, state, moments, {"content": content}, AdapterInfo(2, 4.0), "base")


def content_of(path: Path) -> tuple[int, int]:
    """(step, content) of a snapshot, all of whose parts must tell the same story."""
    found = load_snapshot(path)
    content = found.scalars["content"]
    assert (found.adapter[f"{NAME}.lora_A"] == content).all()
    assert (found.optimizer["exp_avg"] == content).all()
    assert found.optimizer["step"] == found.step
    return found.step, content


def refuse(text: str) -> None:
    raise AssertionError(f"a killed save must not leave anything that needs a warning: {text}")


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # the child must never return into the parent's code
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def moments(folder: Path, count: int) -> None:
    dice = random.Random(0)
    begin = kills = 0
    started = time.perf_counter()
    save_snapshot(folder / "probe", snapshot(1, 1))
    save_s = time.perf_counter() - started
    while kills < count or begin < count:  # both the kills and the saves between them
        kills += 1
        reader, writer = os.pipe()

        def work(begin: int = begin, writer: int = writer) -> None:
            for step in range(begin + 1, begin + 100_000):
                save_snapshot(folder, snapshot(step, step), keep_last=1 + step % 3)
                os.write(writer, f"{step}\n".encode())

        pid = child(work)
        os.close(writer)
        time.sleep(dice.uniform(0, 3 * save_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader) as told:
            acknowledged = max([begin, *map(int, told.read().split())])
        path = find_snapshot(folder, "auto", refuse)
        assert path is not None or acknowledged == 0
        if path is not None:
            step, content = content_of(path)
            assert step == content
            assert acknowledged <= step <= acknowledged + 1
            begin = step
    print(f"{kills} kills, {begin} steps")


def dies_before_line(number: int) -> Callable[..., Any]:
    """A trace function that kills its own process at the ``number``-th line of our code."""
    seen = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        code = frame.f_code
        rooms = ("fttrain/checkpoint", "fttrain/util", "shutil.py")
        ours = any(room in code.co_filename for room in rooms)
        if not ours or code.co_name in READS_ONLY:
            return None
        if event == "line":
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def lines(folder: Path, case: str, stride: int) -> None:
    """``new``: step 2 replaces step 1 under keep_last=1. ``again``: step 1 is saved once more."""
    step = 2 if case == "new" else 1
    start, number = folder / "start", 0
    save_snapshot(start, snapshot(1, 1), keep_last=1)
    while True:
        number += stride
        place = folder / "checkpoints"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)

        def work(number: int = number, place: Path = place) -> None:
            sys.settrace(dies_before_line(number))
            save_snapshot(place, snapshot(step, 2), keep_last=1)

        status = os.waitpid(child(work), 0)[1]
        path = find_snapshot(place, "auto", refuse)
        assert path is not None, f"line {number}: nothing whole was left"
        assert content_of(path) in [(1, 1), (step, 2)], f"line {number}"
        if number % 8 == 1:  # the next save clears up whatever was left
            save_snapshot(place, snapshot(step, 2), keep_last=1)
            assert os.listdir(place) == [f"step_{step:08d}"]
            assert fault(place / f"step_{step:08d}", FORM) is None
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert number > 100
    print(f"{number // stride} kills")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "moments":
        moments(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        lines(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 1)
