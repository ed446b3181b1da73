"""What ``fit70b.py`` aims at, and what came out."""

from typing import Any

from harness.fit_report import CARD_GIB, card_gib, longest, tokens_per_s
from harness.fit_sides import OFFLOAD

GOAL = {"shape": "llama3_70b", "device": "cuda"}  # for which goals are set
GOAL_RANKS, GOAL_TOKENS = 2, 2048  # for which goals of memory are set; tokens of a row
STREAM_GIB = 8
LONGEST_TOKENS = 16384
OFFLOAD_RATIO = 1.3
TIME_LIMIT = "time limit"  # of a run: what it would have come to is not known
NOT_RUN = "not run"
UNKNOWN = (TIME_LIMIT, NOT_RUN)

Result = dict[str, Any]


def goals(
    results: list[Result], settings: dict[str, Any], names: list[str]
) -> list[dict[str, Any]]:
    """Those of the sides ``names`` and of all that ran, and what came out; None where this run
    does not say. ``settings``: of the benchmark, with the ``limits`` it ran under.
    """
    if any(settings[name] != value for name, value in GOAL.items()):
        results = []
    names = list(dict.fromkeys([*names, *(result["name"] for result in results)]))
    of_two = results if settings["ranks"] == GOAL_RANKS else []
    fitting = of_two if settings["seq_len"] == GOAL_TOKENS else []
    fits = f"T={GOAL_TOKENS} fits in {CARD_GIB} GiB of each card"
    return [
        *(_within(f"{name}: {fits}", _of(name, fitting), CARD_GIB) for name in names),
        _within(f"stream k=0: {STREAM_GIB} GiB or less", _of("stream k=0", fitting), STREAM_GIB),
        *(_long_rows(name, _of(name, of_two)) for name in names),
        *_offload(results, settings["limits"]),
    ]


def _of(name: str, results: list[Result]) -> list[Result]:
    return [result for result in results if result["name"] == name]


def _within(what: str, results: list[Result], most_gib: float) -> dict[str, Any]:
    """At every accumulation. Values: GiB of a card, with what lies outside torch's allocator."""
    values = {r["side"]: card_gib(r["ranks"]) for r in results if r["ranks"]}
    does_not_fit = any(r["outcome"] in ("refused", "out of memory") for r in results)
    met: bool | None = None
    if does_not_fit or any(value > most_gib for value in values.values()):
        met = False
    elif results and len(values) == len(results):
        met = True
    return {"goal": what, "values": values, "met": met}


def _long_rows(name: str, results: list[Result]) -> dict[str, Any]:
    """Values: tokens of the longest row that fits, of the sides that looked for it to the end, or
    far enough.
    """
    searched = {r["side"]: (longest(r), r["tries"]) for r in results if "tries" in r}
    values = {
        side: tokens
        for side, (tokens, tries) in searched.items()
        if tokens >= LONGEST_TOKENS or all(run["outcome"] not in UNKNOWN for run in tries)
    }
    met = all(value >= LONGEST_TOKENS for value in values.values()) if values else None
    return {"goal": f"{name}: rows of {LONGEST_TOKENS} tokens", "values": values, "met": met}


def _offload(results: list[Result], limits: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Tokens/s of activations that are offloaded over those of the same strategy that computes them
    again, at every accumulation.

    Only a consumer card's compute and link give the ratio a meaning, and only a card of one's own.
    """
    asked = limits["asked"] if limits else {"tflops": None, "link_gb_s": None}
    timed = {
        (result["name"], result["accumulation"]): tokens_per_s(result["ranks"])
        for result in results
        if result["ranks"] and not any(rank["shared_device"] for rank in result["ranks"])
    }
    found = []
    for base in ("shard", "stream k=0"):
        name = f"{base} {OFFLOAD}"
        values = {
            f"accumulation {accumulation}": speed / timed[base, accumulation]
            for (side, accumulation), speed in timed.items()
            if side == name and (base, accumulation) in timed and None not in asked.values()
        }
        met = all(value >= OFFLOAD_RATIO for value in values.values()) if values else None
        what = f"{name}: {OFFLOAD_RATIO} times the tokens/s of recompute, compute and link limited"
        found.append({"goal": what, "values": values, "met": met})
    return found
