"""What all benchmarks share: environment, pairs of ranks, memory, traffic, tables, JSON.

A rank is a process of its own, started by ``run_ranks`` with its work in a JSON file. Its memory is
therefore its own: what one side of a comparison has touched never counts for the other.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import psutil
from rich.console import Console
from rich.table import Table

from fttrain.launcher.launch import PARENT_PID, die_with_parent, free_port, supervise
from fttrain.util.units import duration, gib

STACK = ("torch", "transformers", "bitsandbytes")  # what every side needs: not held against any
VERSIONS = (*STACK, "peft", "fttrain")
JOB_FILE = "job.json"


def environment() -> dict[str, Any]:
    """The machine, the versions and the date, as they belong beside every figure."""
    cpus = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpus.read_text()) if cpus.is_file() else []
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0],  # of the minute before: others at work spoil timings
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
    }


def _version(name: str) -> str:
    """A checkout that only PYTHONPATH names is not installed, and runs all the same."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class HostMemory:
    """Memory of this process above the interpreter with the libraries that every side imports.

    Made at the very start of a rank, before anything else is imported.
    """

    def __init__(self) -> None:
        for module in STACK:
            importlib.import_module(module)
        self.interpreter_bytes = psutil.Process().memory_info().rss
        self._earlier_peak_bytes = 0

    def peak_bytes(self) -> int:
        """The most since the start of the process (VmHWM), above the interpreter."""
        return max(self._earlier_peak_bytes, self._high_water_bytes()) - self.interpreter_bytes

    def restart_peak(self) -> None:
        """``recent_peak_bytes`` counts from here; ``peak_bytes`` still knows what was before."""
        self._earlier_peak_bytes = max(self._earlier_peak_bytes, self._high_water_bytes())
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM falls to the present RSS

    def recent_peak_bytes(self) -> int:
        """The most since ``restart_peak``, above the interpreter."""
        return self._high_water_bytes() - self.interpreter_bytes

    @staticmethod
    def shared_bytes() -> dict[str, int]:
        """What of this process's memory is the machine's one host copy of something, by its name
        (``store/hostpool.py``): the same pages in every rank that maps it.
        """
        # A mapping's first line says what it maps, below it is `Rss: N kB`; page-locking splits it.
        smaps = Path("/proc/self/smaps").read_text()
        found = re.findall(r"/memfd:fttrain (.*) \(deleted\)\n(?:.*\n)*?Rss: +(\d+) kB", smaps)
        sizes: dict[str, int] = {}
        for name, kilobytes in found:
            sizes[name] = sizes.get(name, 0) + int(kilobytes) * 1024
        return sizes

    @staticmethod
    def _high_water_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        found = re.search(r"VmHWM:\s*(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


class Link(Protocol):
    """What joins the ranks."""

    @property
    def interface(self) -> str:
        """The network interface that a rank sends on."""
        ...

    @property
    def address(self) -> str:
        """Of rank 0."""
        ...

    def command(self, rank: int) -> list[str]:
        """What goes before a rank's own command."""
        ...


class Loopback:
    """All ranks send on the machine's loopback interface."""

    interface, address = "lo", "127.0.0.1"

    def command(self, rank: int) -> list[str]:
        return []


def sent_bytes() -> float:
    """Bytes that this rank's interface sent since boot, headers and everybody's included.

    Loopback counts what all ranks send: there it is an equal part of that for each of them.
    """
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    sent = int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
    return sent / int(os.environ["WORLD_SIZE"]) if interface == Loopback.interface else sent


def run_ranks(
    script: str,
    job: dict[str, Any],
    folder: Path,
    link: Link | None = None,
    option: str = "--rank",
) -> list[dict[str, Any]]:
    """Runs ``python script --rank JOB`` on the job's ``ranks`` over gloo, with its ``threads``
    each; what they reported, by rank. ``link``: None for loopback; ``option``: in the place of
    ``--rank``.

    The script's rank reads its work with ``read_job`` and ends with ``report``. Raises SystemExit
    with the rank's code when one fails; its traceback is on stderr by then.
    """
    link, world_size = link or Loopback(), job["ranks"]
    job_file = folder / JOB_FILE
    job_file.write_text(json.dumps(job))
    variables = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": link.address,
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": link.interface,
        "OMP_NUM_THREADS": str(job["threads"]),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as launch/cpu_demo.env; for both sides
        PARENT_PID: str(os.getpid()),
        # Of the peers' own libraries; FSDP1 also warns of each layer that some of it is frozen.
        "PYTHONWARNINGS": "ignore::FutureWarning,"
        "ignore::UserWarning:torch.distributed.fsdp._wrap_utils",
    }
    commands = [
        (
            [*link.command(rank), sys.executable, script, option, str(job_file)],
            variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    code = supervise(commands)
    if code:
        raise SystemExit(code)
    return reports(folder, world_size)


def reports(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """What the ranks of a job in ``folder`` last noted, by rank; [] where one has noted nothing."""
    files = [_report_file(folder / JOB_FILE, rank) for rank in range(world_size)]
    if not all(file.is_file() for file in files):
        return []
    return [json.loads(file.read_text()) for file in files]


def read_job(job_file: str) -> dict[str, Any]:
    """This rank's work. From here on the rank dies with whoever started it."""
    die_with_parent()
    return json.loads(Path(job_file).read_text())


def note(job_file: str, figures: dict[str, Any]) -> None:
    """Write down what this rank has so far, in the place of what it noted before."""
    _write(_report_file(Path(job_file), int(os.environ["RANK"])), json.dumps(figures))


def report(job_file: str, figures: dict[str, Any]) -> NoReturn:
    """Hand this rank's figures to ``run_ranks`` and end the process.

    Without Python's own clean-up: it now and then waits forever for gloo's thread, which waits for
    the interpreter, where DistributedDataParallel still holds the process group.
    """
    note(job_file, figures)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _report_file(job_file: Path, rank: int) -> Path:
    return job_file.with_suffix(f".rank{rank}.json")


def show(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], environment: dict[str, Any]
) -> None:
    """Print a table with the environment below it; an empty row draws a line."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width to keep to
    console.print(table)
    versions = ", ".join(f"{name} {value}" for name, value in environment["versions"].items())
    console.print(
        f"{environment['date']}; {environment['cpu']}, {environment['cores']} cores, "
        f"{gib(environment['memory_bytes'])}, load {environment['load_average']:.1f} before the "
        f"start; Python {environment['python']}, {versions}",
        highlight=False,
    )


def show_goals(reached: Iterable[dict[str, Any]]) -> None:
    """Print what was aimed at and what came out: ``goal``, ``values`` by side, ``met`` or None."""
    for goal in reached:
        values = ", ".join(f"{side} {value:.3f}" for side, value in goal["values"].items())
        met = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
        print(f"{met}: {goal['goal']}{': ' if values else ''}{values}")


def say(started_s: float, text: str) -> None:
    """Print a line of progress. ``started_s``: when the benchmark began, as ``time.time`` has it:
    ranks, which begin later, take it from their job.
    """
    print(f"[{duration(time.time() - started_s)}] {text}", flush=True)


def write_json(path: str | None, figures: dict[str, Any]) -> None:
    """Write the figures where ``--json`` says; None: nowhere."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        _write(Path(path), json.dumps(figures, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: whoever runs a benchmark may have a time limit, too."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
