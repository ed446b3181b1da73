"""What the planner says of the runs of ``fit70b.py``, beside what they took."""

from collections.abc import Iterator
from typing import Any

from harness.fit_rank import CONTEXT_GIB
from harness.fit_report import GIB, highest
from harness.fit_steps import architecture_of, trial_spec

from fttrain.plan import memory, workspace
from fttrain.util.errors import UserError

WITHIN = 0.03  # of what torch's allocator reserved
GOAL = f"predicted peaks within {WITHIN:.0%} of torch.cuda.max_memory_reserved"

Figures = dict[str, Any]


def pairs(results: list[Figures], settings: Figures, shape: Figures) -> Iterator[Figures]:
    """For each run, the longer rows among them: the fullest card's peak, predicted and measured,
    and whether it fits. ``settings``: of the benchmark.
    """
    room_bytes = round((settings["cap_gib"] - CONTEXT_GIB) * GIB)
    for result in results:
        for run in (result, *result.get("tries", [])):
            job = {**result, "seq_len": run["seq_len"], "shape": shape}
            predicted = predicted_bytes(job, settings["ranks"], room_bytes)
            measured = highest(run["ranks"], "reserved_bytes")
            yield {
                "side": result["side"],
                "seq_len": run["seq_len"],
                "outcome": run["outcome"],
                "predicted_bytes": predicted,
                "predicted_to_fit": predicted is not None and predicted <= room_bytes,
                "measured_bytes": measured,
                "off": predicted / measured - 1 if predicted and measured else None,
            }


def predicted_bytes(job: Figures, ranks: int, room_bytes: int) -> int | None:
    """Of the fullest of ``ranks`` cards, without what lies outside torch's allocator; None where a
    part does not even fit by itself.
    """
    spec, architecture = trial_spec(job), architecture_of(job["shape"])
    try:
        booked = memory.reserve_ranks(spec, architecture, "cuda", [room_bytes] * ranks)
    except UserError:
        return None
    taken = [memory.reserved_memory(own) for own in booked]
    taken = workspace.with_workspace(taken, spec, architecture, "cuda")
    return max(max(own.device_bytes, own.reserved_device_bytes) for own in taken)


def goal(found: list[Figures]) -> Figures:
    """Of the runs that were measured: how far off the worst is."""
    measured = [pair for pair in found if pair["off"] is not None]
    values = {f"{pair['side']}, T={pair['seq_len']}": pair["off"] for pair in measured}
    met = all(abs(off) <= WITHIN for off in values.values()) if values else None
    return {"goal": GOAL, "values": values, "met": met}


def row(pair: Figures) -> list[str]:
    """The cells of a run."""
    return [
        pair["side"],
        str(pair["seq_len"]),
        _gib(pair["predicted_bytes"]),
        _gib(pair["measured_bytes"]),
        "-" if pair["off"] is None else f"{pair['off']:+.1%}",
        "fits" if pair["predicted_to_fit"] else "does not fit",
        pair["outcome"],
    ]


def _gib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / GIB:.2f}"
