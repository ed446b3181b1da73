"""Sides that take turns at the same work: their settings, figures and ratios."""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.work import Size, Work, demo_work

Turn = list[dict[str, Any]]  # what each rank reported, by rank
SIZES = ("ranks", "micro_batch_size", "gradient_accumulation_steps", "seq_len")
RUNS = ("threads", "warmup", "steps", "turns", "peer_host_settings")
COLUMNS = (
    "tokens/s",
    "ratio",
    "best step's",
    "ratio",
    "peak GiB",
    "ratio",
    "MB sent a step",
    "ratio",
    "final loss",
    "ratio",
)


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    name: str
    settings: dict[str, Any] = field(hash=False)

    @property
    def is_peer(self) -> bool:
        return self.settings["side"] == "peer"


def native(
    name: str,
    strategy: dict[str, Any],
    schedule: dict[str, Any],
    placement: dict[str, Any] | None = None,
    **other: Any,
) -> Side:
    """fttrain, with the settings of its configuration groups; ``other``: of its job."""
    settings = {"strategy": strategy, "schedule": schedule, "placement": placement or {}, **other}
    return Side(f"fttrain {name}", {"side": "fttrain", **settings})


def ddp(checkpointing: bool) -> Side:
    """The peer under DistributedDataParallel."""
    name = f"peer, {'with' if checkpointing else 'no'} checkpointing"
    return Side(name, {"side": "peer", "peer": "ddp", "checkpointing": checkpointing})


def parser(description: str, usual: dict[str, tuple[int, int]]) -> argparse.ArgumentParser:
    """The arguments that all share. ``usual``: of warmup, steps and turns, and with ``--quick``."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--quick", action="store_true", help="a smoke run: one turn, few steps, few sides")
    add("--model", metavar="PATH", help="as model.path (default: the demo's)")
    add("--ranks", type=int, default=2)
    add("--threads", type=int, default=1, help="of each rank")
    add("--micro-batch-size", type=int, help="rows (default: the demo's)")
    add("--gradient-accumulation-steps", type=int, help="default: the demo's; of strategies.py: 8")
    for name, what in (
        ("warmup", "steps before the clock starts"),
        ("steps", "timed steps of a turn"),
        ("turns", "how often each side is measured"),
    ):
        default, quick = usual[name]
        add(f"--{name}", type=int, help=f"{what} (default: {default}; quick: {quick})")
    add(
        "--peer-host-settings",
        action="store_true",
        help="give the peer fttrain's settings of denormals and malloc too",
    )
    add("--rank", metavar="JOB", help=argparse.SUPPRESS)
    return made


def parse(made: argparse.ArgumentParser, usual: dict[str, tuple[int, int]]) -> argparse.Namespace:
    """The arguments of this process, with the usual values where they were not given."""
    arguments = made.parse_args()
    for name, values in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values[arguments.quick])
    return arguments


@contextmanager
def prepared(arguments: argparse.Namespace, kinds: list[str]) -> Iterator[tuple[Work, Path]]:
    """The work, and a folder that lasts as long as it."""
    with tempfile.TemporaryDirectory(prefix="fttrain-bench-") as name:
        size = Size(
            arguments.model,
            arguments.ranks,
            arguments.micro_batch_size,
            arguments.gradient_accumulation_steps,
            arguments.warmup + arguments.steps,
        )
        work = demo_work(size, kinds, Path(name))
        work.job.update(
            warmup=arguments.warmup,
            threads=arguments.threads,
            peer_host_settings=arguments.peer_host_settings,
        )
        yield work, Path(name)


def take_turns(
    sides: Sequence[Side], numbers: Sequence[int], run: Callable[[Side], Turn], label: str = ""
) -> dict[Side, list[Turn]]:
    """What the ranks reported in the turns ``numbers``, in which side comes after side."""
    turns: dict[Side, list[Turn]] = {side: [] for side in sides}
    for number in numbers:
        for side in sides:
            print(f"{label}turn {number}: {side.name}", flush=True)
            turns[side].append(run(side))
    return turns


def figures(side: Side, turns: list[Turn], tokens: list[int]) -> dict[str, Any]:
    """One side's figures over its turns. ``tokens``: of each timed step over all ranks."""
    step_s = [slowest_s(ranks) for ranks in turns]
    speeds = [
        [count / seconds for count, seconds in zip(tokens, turn, strict=True)] for turn in step_s
    ]
    in_all = [speed for turn in speeds for speed in turn]
    return {
        "side": side.name,
        "settings": side.settings,
        "tokens_per_s": statistics.median(in_all),
        "best_tokens_per_s": max(in_all),
        "turn_tokens_per_s": [statistics.median(turn) for turn in speeds],
        "step_s": step_s,
        "tokens": tokens,
        "peak_host_bytes": _median_of_highest(turns, "peak_host_bytes"),
        "step_peak_host_bytes": _median_of_highest(turns, "step_peak_host_bytes"),
        "sent_bytes_per_step": statistics.median(
            sum(rank["sent_bytes_per_step"] for rank in ranks) for ranks in turns
        ),
        "losses": turns[0][0]["losses"],
        "final_loss": turns[0][0]["losses"][-1],
    }


def slowest_s(turn: Turn) -> list[float]:
    """Seconds of each timed step: those of the rank that took longest."""
    return [max(seconds) for seconds in zip(*(rank["step_s"] for rank in turn), strict=True)]


def _median_of_highest(turns: list[Turn], name: str) -> float:
    return statistics.median(max(rank[name] for rank in ranks) for ranks in turns)


def fastest(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one with the highest median."""
    return max(results, key=lambda result: result["tokens_per_s"])


def ratios(own: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Of the figures of two sides."""
    names = ["tokens_per_s", "best_tokens_per_s", "peak_host_bytes", "final_loss"]
    if reference["sent_bytes_per_step"]:  # a single rank sends nothing
        names.append("sent_bytes_per_step")
    return {name: own[name] / reference[name] for name in names}


def paired_ratio(own: dict[str, Any], reference: dict[str, Any]) -> float:
    """Of tokens/s, turn by turn: what slows a whole turn down cancels out."""
    pairs = zip(own["turn_tokens_per_s"], reference["turn_tokens_per_s"], strict=False)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def cells(result: dict[str, Any]) -> list[str]:
    """A row of the table, under ``COLUMNS``."""
    row = []
    for name, text in (
        ("tokens_per_s", f"{result['tokens_per_s']:.0f}"),
        ("best_tokens_per_s", f"{result['best_tokens_per_s']:.0f}"),
        ("peak_host_bytes", f"{result['peak_host_bytes'] / 2**30:.2f}"),
        ("sent_bytes_per_step", f"{result['sent_bytes_per_step'] / 1e6:.1f}"),
        ("final_loss", f"{result['final_loss']:.4f}"),
    ):
        digits = 4 if name == "final_loss" else 2
        found = result["ratios"].get(name)
        row += [text, "-" if found is None else f"{found:.{digits}f}"]
    return row


def settings(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    """What belongs beside the figures: the size of the work and how it was run."""
    return {name: work.job[name] for name in SIZES} | {
        name: getattr(arguments, name) for name in RUNS
    }


def described(settings: dict[str, Any]) -> str:
    """The same in a line."""
    return (
        f"{settings['ranks']} ranks x {settings['threads']} thread(s): "
        f"micro-batches of {settings['micro_batch_size']} rows of up to {settings['seq_len']} "
        f"tokens, gradient accumulation {settings['gradient_accumulation_steps']}; "
        f"{settings['warmup']} + {settings['steps']} steps, {settings['turns']} turn(s)"
    )
