"""What ``fit70b.py`` says of its results: the table."""

from typing import Any

import common
from harness.fit_limits import described
from harness.fit_rank import CONTEXT_GIB

GIB = 2**30
CARD_GIB = 23.4  # of 24 GB, what a driver leaves
MOVED = ("gather_bytes", "h2d_bytes", "stage_bytes", "activation_bytes")
COLUMNS = (
    "strategy",
    "fits",
    "peak GiB allocator",
    "GiB NVML",
    "GiB NVML, whole card",
    "host GiB, all",
    "tokens/s",
    "s a step",
    "s waited",
    "GB moved a step",
    "longest T",
)


def show(
    results: list[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any]
) -> None:
    """Print the table, and below it why rows are empty."""
    ranks = [rank for result in results for rank in result["ranks"]]
    shared = any(rank["shared_device"] for rank in ranks)
    names = ", ".join(sorted({rank["device_name"] for rank in ranks})) or settings["device"]
    title = (
        f"{settings['shape']} on {settings['ranks']} x {names}, capped at "
        f"{settings['cap_gib']} GiB a rank: T={settings['seq_len']}, {settings['steps']} steps, of "
        "which the first is left out of the times; the higher of the ranks' figures; host memory "
        "over all ranks, what they share once"
    )
    columns = list(COLUMNS)
    if shared:
        columns[columns.index("s waited")] = "s waited, not representative"
        over = "gloo" if settings["backend"] == "gloo" else "NCCL over its socket transport"
        title += (
            f".\nTHE RANKS SHARE A CARD: {over}, computing in turns. Memory is what it would be; "
            "waits, steps and tokens/s are not representative"
        )
    common.show(title, columns, map(row, results), environment)
    if settings["limits"]:
        print(described(settings["limits"]))
    for result in results:
        if result["reason"]:
            print(f"{result['outcome']}: {result['side']}: {result['reason']}")


def row(result: dict[str, Any]) -> list[str]:
    """The cells of a side."""
    ranks = result["ranks"]
    if not ranks:
        topic = result["reason"].split(":")[0]
        outcome = f"refused: {topic}" if result["outcome"] == "refused" else result["outcome"]
        return [result["side"], outcome, *["-"] * (len(COLUMNS) - 2)]
    timed = [_timed(rank) for rank in ranks]
    step_s = _step_s(ranks)
    wait_s = max(sum(step["wait_s"] for step in steps) / len(steps) for steps in timed)
    last = [steps[-1] for steps in timed]
    moved = max(sum(step[kind] for kind in MOVED) for step in last)
    cut = "" if result["outcome"] == "fits" else f", then {result['outcome']}"
    return [
        result["side"],
        f"yes{cut}",
        _gib(highest(ranks, "reserved_bytes")),
        _gib(highest(ranks, "nvml_bytes")),
        _gib(highest(ranks, "nvml_card_bytes")),
        _gib(host_bytes(ranks)),
        f"{tokens_per_s(ranks):.0f}",
        f"{step_s:.2f}",
        f"{wait_s:.2f}",
        f"{moved / 1e9:.2f}",
        str(longest(result)) if "tries" in result else "-",
    ]


def tokens_per_s(ranks: list[dict[str, Any]]) -> float:
    """Over all ranks, at the pace of the slowest."""
    return float(_timed(ranks[0])[-1]["tokens"] / _step_s(ranks))


def host_bytes(ranks: list[dict[str, Any]]) -> int:
    """Of all ranks together: what each has for itself, and once what several map."""
    shared: dict[str, int] = {}
    own = 0
    for rank in ranks:
        own += rank["peak_host_bytes"] - sum(rank["shared_host_bytes"].values())
        for name, size_bytes in rank["shared_host_bytes"].items():
            shared[name] = max(shared.get(name, 0), size_bytes)
    return own + sum(shared.values())


def longest(result: dict[str, Any]) -> int:
    """The longest row that a step was seen to fit with."""
    fitted = [run["seq_len"] for run in (result, *result["tries"]) if run["outcome"] == "fits"]
    return int(max(fitted))


def card_gib(ranks: list[dict[str, Any]]) -> float:
    """With what lies outside torch's allocator."""
    nvml_bytes = highest(ranks, "nvml_bytes")
    if nvml_bytes is not None:
        return nvml_bytes / GIB
    return (highest(ranks, "reserved_bytes") or 0) / GIB + CONTEXT_GIB


def _timed(rank: dict[str, Any]) -> list[dict[str, Any]]:
    """Its steps without the first, which also finds its feet."""
    return rank["steps"][1:] or rank["steps"]


def _step_s(ranks: list[dict[str, Any]]) -> float:
    means = (sum(step["step_s"] for step in _timed(rank)) / len(_timed(rank)) for rank in ranks)
    return float(max(means))


def highest(ranks: list[dict[str, Any]], name: str) -> int | None:
    """Of the ranks' figures of this ``name``; None where none has one."""
    values = [rank[name] for rank in ranks if rank[name] is not None]
    return max(values, default=None)


def _gib(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / GIB:.2f}"
