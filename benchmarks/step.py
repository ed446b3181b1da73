"""An optimizer step, here and in a plain transformers + PEFT + bitsandbytes loop under DDP.

    python benchmarks/step.py [--json FILE] [--quick]

Both sides train the demo's model on the demo's data: the same token ids in the same order from the
same initial adapter, on gloo ranks with equally many threads. In ``padded`` a row is one document
and the peer pads a micro-batch to its longest; in ``packed`` a row is filled with several, and both
sides keep attention inside a document. Only tokens that are not padding count.

The sides take turns, and each turn has processes of its own. Figures are medians over steps and
turns; the best step's speed stands beside them, which other work on the machine disturbs least.
Memory is the most that any rank reached since its start (VmHWM), above the interpreter with torch,
transformers and bitsandbytes imported; traffic is what the loopback interface counted during the
timed steps, headers included, so nothing else should use it meanwhile.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from peers.work import Size, Work, demo_work

KINDS = ("padded", "packed")


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    name: str
    settings: dict[str, Any] = field(hash=False)

    @property
    def is_peer(self) -> bool:
        return self.settings["side"] == "peer"


def peer(checkpointing: bool) -> Side:
    name = f"peer, {'with' if checkpointing else 'no'} checkpointing"
    return Side(name, {"side": "peer", "checkpointing": checkpointing})


def native(activations: str, group: str | int) -> Side:
    settings = {"side": "fttrain", "activations": activations, "group": group}
    return Side(f"fttrain, {activations}, group={group}", settings)


SIDES = (
    peer(True),
    peer(False),
    native("recompute", "all"),
    native("keep", "all"),
    native("keep", 1),
)
QUICK_SIDES = (peer(True), native("recompute", "all"))


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    if arguments.rank:
        run_rank(arguments.rank)
        return
    environment = common.environment()
    with tempfile.TemporaryDirectory(prefix="fttrain-step-") as folder:
        size = Size(
            arguments.model,
            arguments.ranks,
            arguments.micro_batch_size,
            arguments.gradient_accumulation_steps,
            arguments.warmup + arguments.steps,
        )
        work = demo_work(size, arguments.data, Path(folder))
        results = [
            result for kind in arguments.data for result in compare(kind, work, arguments, folder)
        ]
    sizes = ("ranks", "micro_batch_size", "gradient_accumulation_steps", "seq_len")
    settings = {name: work.job[name] for name in sizes}
    settings |= {
        name: getattr(arguments, name)
        for name in ("threads", "warmup", "steps", "turns", "peer_host_settings")
    }
    _show(results, settings, environment)
    common.write_json(
        arguments.json,
        {"environment": environment, "settings": settings, "results": results},
    )


def compare(
    kind: str, work: Work, arguments: argparse.Namespace, folder: str
) -> list[dict[str, Any]]:
    """The figures of all sides on one kind of data, beside those of the faster peer."""
    sides = QUICK_SIDES if arguments.quick else SIDES
    job = work.job | {
        "data": kind,
        "steps": work.steps[kind],
        "warmup": arguments.warmup,
        "threads": arguments.threads,
        "peer_host_settings": arguments.peer_host_settings,
    }
    turns: dict[Side, list[list[dict[str, Any]]]] = {side: [] for side in sides}
    for turn in range(arguments.turns):
        for side in sides:
            print(f"{kind}, turn {turn + 1} of {arguments.turns}: {side.name}", flush=True)
            turns[side].append(
                common.run_ranks(
                    __file__, job | side.settings, Path(folder), arguments.ranks, arguments.threads
                )
            )
    tokens = work.tokens(kind)[arguments.warmup :]
    figures = {side: _figures(kind, side, turns[side], tokens) for side in sides}
    faster_peer = max(
        (figures[side] for side in sides if side.is_peer), key=lambda own: own["tokens_per_s"]
    )
    return [own | {"ratios": _ratios(own, faster_peer)} for own in figures.values()]


def _figures(
    kind: str, side: Side, turns: list[list[dict[str, Any]]], tokens: list[int]
) -> dict[str, Any]:
    """One side's figures over its ``turns`` of all ranks. ``tokens``: of each timed step."""
    step_s = [ranks[0]["step_s"] for ranks in turns]
    speeds = [
        count / seconds for turn in step_s for count, seconds in zip(tokens, turn, strict=True)
    ]
    return {
        "data": kind,
        "side": side.name,
        "settings": side.settings,
        "tokens_per_s": statistics.median(speeds),
        "best_tokens_per_s": max(speeds),
        "step_s": step_s,
        "tokens": tokens,
        "peak_host_bytes": _median_of_highest(turns, "peak_host_bytes"),
        "step_peak_host_bytes": _median_of_highest(turns, "step_peak_host_bytes"),
        "loopback_bytes_per_step": statistics.median(
            ranks[0]["loopback_bytes_per_step"] for ranks in turns
        ),
        "losses": turns[0][0]["losses"],
        "final_loss": turns[0][0]["losses"][-1],
    }


def _median_of_highest(turns: list[list[dict[str, Any]]], name: str) -> float:
    return statistics.median(max(rank[name] for rank in ranks) for ranks in turns)


def _ratios(own: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    names = ("tokens_per_s", "best_tokens_per_s", "peak_host_bytes", "final_loss")
    ratios = {name: own[name] / reference[name] for name in names}
    if reference["loopback_bytes_per_step"]:  # a single rank sends nothing
        name = "loopback_bytes_per_step"
        ratios[name] = own[name] / reference[name]
    return ratios


def _show(
    results: list[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any]
) -> None:
    columns = (
        "data, side",
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
    rows: list[list[str]] = []
    for result in results:
        if rows and result["data"] != rows[-1][0].split(":")[0]:
            rows.append([])
        ratios = result["ratios"]
        row = [f"{result['data']}: {result['side']}"]
        for name, text in (
            ("tokens_per_s", f"{result['tokens_per_s']:.0f}"),
            ("best_tokens_per_s", f"{result['best_tokens_per_s']:.0f}"),
            ("peak_host_bytes", f"{result['peak_host_bytes'] / 2**30:.2f}"),
            ("loopback_bytes_per_step", f"{result['loopback_bytes_per_step'] / 1e6:.1f}"),
            ("final_loss", f"{result['final_loss']:.4f}"),
        ):
            digits = 4 if name == "final_loss" else 2
            row += [text, f"{ratios[name]:.{digits}f}" if name in ratios else "-"]
        rows.append(row)
    title = (
        f"An optimizer step on {settings['ranks']} ranks x {settings['threads']} thread(s): "
        f"micro-batches of {settings['micro_batch_size']} rows of up to {settings['seq_len']} "
        f"tokens, gradient accumulation {settings['gradient_accumulation_steps']}; "
        f"{settings['warmup']} + {settings['steps']} steps, {settings['turns']} turn(s); "
        "ratios to the peer with the higher median"
    )
    common.show(title, columns, rows, environment)


def run_rank(job_file: str) -> None:
    """Do the steps of a job on this rank and report the figures."""
    memory = common.HostMemory()
    job = common.read_job(job_file)
    import torch

    from fttrain.dist import process_group
    from fttrain.rig.probe import RigConfig, set_up

    device = torch.device("cpu")
    torch.set_num_threads(job["threads"])
    if job["side"] == "fttrain" or job["peer_host_settings"]:
        set_up(RigConfig("cpu", job["threads"]), 0, job["ranks"])
    with process_group(device) as group:
        if job["side"] == "fttrain":
            from peers.native import Native

            side: Any = Native(job, group)
        else:
            from peers.ddp import Ddp

            side = Ddp(job)
        steps = [side.prepare(ranks[group.rank]) for ranks in job["steps"]]
        step_s: list[float] = []
        losses: list[float] = []
        sent = 0
        for number, batches in enumerate(steps):
            if number == job["warmup"]:
                memory.restart_peak()
                group.barrier()
                sent = common.loopback_bytes()
            group.barrier()
            started = time.perf_counter()
            losses.append(side.step(batches, number))
            step_s.append(time.perf_counter() - started)
        sent = common.loopback_bytes() - sent
        timed_s = step_s[job["warmup"] :]
        figures = {
            "step_s": timed_s,
            "losses": losses,
            "loopback_bytes_per_step": sent / len(timed_s),
            "peak_host_bytes": memory.peak_bytes(),
            "step_peak_host_bytes": memory.recent_peak_bytes(),
            "interpreter_bytes": memory.interpreter_bytes,
        }
        group.barrier()  # nobody hangs up while another rank still talks
        common.report(job_file, figures)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--quick", action="store_true", help="a smoke run: one turn, two steps, two sides")
    add("--model", metavar="PATH", help="as model.path (default: the demo's)")
    add("--data", nargs="+", choices=KINDS, default=list(KINDS))
    add("--ranks", type=int, default=2)
    add("--threads", type=int, default=1, help="of each rank")
    add("--micro-batch-size", type=int, help="rows (default: the demo's)")
    add("--gradient-accumulation-steps", type=int, help="default: the demo's")
    add("--warmup", type=int, help="steps before the clock starts (default: 1)")
    add("--steps", type=int, help="timed steps of a turn (default: 3; quick: 2)")
    add("--turns", type=int, help="how often each side is measured (default: 3; quick: 1)")
    add(
        "--peer-host-settings",
        action="store_true",
        help="give the peer fttrain's settings of denormals and malloc too",
    )
    add("--rank", metavar="JOB", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    usual = {"warmup": (1, 1), "steps": (3, 2), "turns": (3, 1)}
    for name, values in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values[arguments.quick])
    return arguments


if __name__ == "__main__":
    main()
