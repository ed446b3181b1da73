"""Two machines, as network namespaces that share no file: torchrun on each, as a user starts it.

A run whose rank is killed, and later one of whose machines is, ends as the run of one machine that
nobody disturbed does.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tiny_run import WAIT_S, adapter, arguments, exit_codes, inputs, losses, two_ranks

from benchmarks.harness.netns import Veth, veth_pair
from fttrain.track import read_metrics

STEPS, KILLED_RANK, KILLED_MACHINE = 12, 2, 6  # the last two: after which step
SETTINGS = (f"loop.max_steps={STEPS}", "loop.log_every=1", "loop.samples=0")
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None,
    reason="network namespaces need root, ip and tc",
)


class Machine:
    """One of two: its own folder for everything that a run reads and writes."""

    def __init__(self, link: Veth, number: int, folder: Path) -> None:
        self.link, self.number, self.folder = link, number, folder / f"machine{number}"
        self.folder.mkdir()
        self.output, self.log = self.folder / "run", self.folder / "log"
        for name in ("model", "data.jsonl"):
            (self.folder / name).symlink_to(folder / name)
        self.agent: subprocess.Popen[bytes] | None = None

    def start(self, *settings: str) -> None:
        """Its agent, which starts two ranks."""
        here = f"is_host={1 - self.number},keep_alive_interval=1,keep_alive_max_attempt=3"
        command = [*self.link.command(self.number), sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={self.link.address}:29500", f"--rdzv-conf={here}"]
        command += [f"--local-addr=10.77.0.{self.number + 1}", "--monitor-interval=0.2"]
        command += ["-m", "fttrain", *arguments(self.folder, self.output, *settings)]
        variables = {"GLOO_SOCKET_IFNAME": self.link.interface, "OMP_NUM_THREADS": "1"}
        # An agent that joins later is told the address of the ranks' store only without this.
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=log, stderr=log, cwd=self.folder
            )

    def ranks(self) -> list[psutil.Process]:
        assert self.agent is not None
        return psutil.Process(self.agent.pid).children()

    def end(self) -> int:
        assert self.agent is not None
        return self.agent.wait(WAIT_S)

    def kill(self) -> None:
        """The agent, without a word; its ranks end with it."""
        if self.agent is None or self.agent.poll() is not None:
            return
        ranks = self.ranks()
        self.agent.kill()
        self.agent.wait()
        _, alive = psutil.wait_procs(ranks, 10)
        for rank in alive:
            rank.kill()
        assert not alive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory, layers=4)


@pytest.fixture
def pair(folder: Path, tmp_path: Path) -> Iterator[list[Machine]]:
    for name in ("model", "data.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    with veth_pair() as link:
        machines = [Machine(link, number, tmp_path) for number in range(2)]
        yield machines
        for machine in machines:
            machine.kill()


def wait_until(happened: Callable[[], bool], machines: list[Machine]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        said = "\n".join(machine.log.read_text() for machine in machines)
        assert time.monotonic() < deadline, said
        assert all(m.agent is None or m.agent.poll() is None for m in machines), said
        time.sleep(0.05)


def steps_of(machines: list[Machine]) -> int:
    """As far as the run has come, whichever machine writes."""
    files = [machine.output / "metrics.jsonl" for machine in machines]
    lines = [line for file in files if file.exists() for line in read_metrics(file)]
    return max((line["step"] for line in lines), default=0)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of such a run on four ranks of one machine."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with two_ranks() as start:
        ranks = start(arguments(folder, output, *SETTINGS), world_size=4)
        assert exit_codes(ranks) == [0] * 4
    return output


@pytest.mark.slow
@needs_namespaces
def test_a_killed_rank_and_a_killed_machine_change_nothing(
    undisturbed: Path, pair: list[Machine]
) -> None:
    settings = (*SETTINGS, "strategy=stream", "embedding=host", "checkpoint.every=1")
    for machine in pair:
        machine.start(*settings)
    wait_until(lambda: steps_of(pair) >= KILLED_RANK, pair)
    pair[1].ranks()[1].kill()
    wait_until(lambda: steps_of(pair) >= KILLED_MACHINE, pair)
    pair[1].kill()
    pair[1].start(*settings)
    assert [machine.end() for machine in pair] == [0, 0], pair[0].log.read_text()
    said = [machine.log.read_text() for machine in pair]
    assert "died without a word" in said[1]
    assert said[0].count("resuming after step") + said[1].count("resuming after step") == 2
    assert "Traceback" not in said[0]
    writer = max(pair, key=lambda machine: steps_of([machine]))
    assert losses(writer.output)[STEPS] == losses(undisturbed)[STEPS]
    ours, theirs = adapter(writer.output), adapter(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
