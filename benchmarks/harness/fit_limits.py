"""Limits that make a datacentre GPU a consumer card for ``fit70b.py``, and what they reach.

The rates are measured in processes of their own, without limits and under them: what a limit
reaches is never taken from what was asked for.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fttrain.util.errors import UserError

GREEN, MPS = "green contexts", "MPS"  # what divides a card
MPS_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
FARTHEST = 2.0  # between the rate that is asked for and the one that is reached
UNLIMITED: dict[str, Any] = {"multiprocessors": None, "link": None}

Measure = Callable[[dict[str, Any]], dict[str, Any]]  # limits -> what ``fit_gauge`` measures


def settle(tflops: float | None, link_gb_s: float | None, measure: Measure) -> dict[str, Any]:
    """``limits`` for the ranks, and beside what was ``asked`` the rates ``without`` them and those
    ``reached``. None: no such limit.

    Raises UserError for a rate that this card does not have, or cannot be brought down to.
    """
    asked = {"tflops": tflops, "link_gb_s": link_gb_s}
    without = measure(UNLIMITED)
    link = None
    if link_gb_s is not None:
        link = {
            "gb_s": link_gb_s,
            "own_gb_s": without["copy_gb_s"],
            "cycles_per_s": without.get("cycles_per_s"),
        }
    limits: dict[str, Any] = UNLIMITED | {"link": link}
    if tflops is None:
        reached = measure(limits)
    else:
        limits, reached = _divided(tflops, without, limits, measure)
    return {"asked": asked, "without": without, "limits": limits, "reached": reached}


def described(settled: dict[str, Any]) -> str:
    """What was asked for and what came of it, in a line."""
    asked, without, reached = (settled[name] for name in ("asked", "without", "reached"))
    figures = [
        (asked["tflops"], "TFLOPS of bf16 GEMMs", reached["gemm_tflops"], without["gemm_tflops"])
    ]
    for way, found in reached["copy_gb_s"].items():
        figures.append((asked["link_gb_s"], f"GB/s {way}", found, without["copy_gb_s"][way]))
    parts = [
        f"{found:.2f} {what}, not limited"
        if limit is None
        else f"{found:.2f} {what}, {limit:g} asked, {whole:.2f} without"
        for limit, what, found, whole in figures
    ]
    share = settled["limits"]["multiprocessors"]
    if share is not None:
        parts.append(
            f"{share['share']:.1%} of {without['multiprocessors']} multiprocessors by {share['by']}"
        )
    return f"limits: {'; '.join(parts)}"


def _divided(
    tflops: float, without: dict[str, Any], limits: dict[str, Any], measure: Measure
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The better of two shares of the multiprocessors, and its figures. One that is small has more
    than its share of the rate: the whole card is held back by its power.
    """
    whole = without["gemm_tflops"]
    if tflops > whole:
        raise UserError(f"--tflops {tflops:g}: this card has {whole:.1f}; ask for less")
    by, share = _means(without["why_not_green"]), tflops / whole
    tries = []
    for _ in range(2):
        tried = limits | {"multiprocessors": {"by": by, "share": share}}
        _announce(tried["multiprocessors"])
        found = measure(tried)
        tries.append((abs(math.log(found["gemm_tflops"] / tflops)), tried, found))
        share = min(1.0, share * tflops / found["gemm_tflops"])
    distance, best, reached = min(tries, key=lambda attempt: attempt[0])
    if distance > math.log(FARTHEST):
        raise UserError(
            f"--tflops {tflops:g}: {by} came no nearer than {reached['gemm_tflops']:.1f}; ask for "
            "a rate like that"
        )
    _announce(best["multiprocessors"])
    return best, reached


def _means(why_not_green: str) -> str:
    """What divides the card: GREEN or MPS. Raises UserError where nothing does."""
    if not why_not_green:
        return GREEN
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if (folder / "control").exists():
        return MPS
    raise UserError(
        f"--tflops: torch has no green contexts here ({why_not_green}), and no MPS runs "
        f"({folder} has no control pipe); nvidia-cuda-mps-control -d starts it"
    )


def _announce(share: dict[str, Any]) -> None:
    """To processes that start after this: of MPS they learn it as they start."""
    if share["by"] == MPS:
        os.environ[MPS_VARIABLE] = str(max(1, round(100 * share["share"])))
