"""Limits of the fit benchmark: the share that comes nearest, or a line that says why not.

A card is modelled by what its multiprocessors multiply; a real one is measured in other processes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fttrain.util.errors import UserError

Module = Callable[[str], ModuleType]
Figures = dict[str, Any]
COPY_GB_S = {"host to card": 52.0, "card to host": 50.0}


class Card:
    """132 multiprocessors given out by eights, each as fast alone as power lets it be with all."""

    def __init__(self, why_not_green: str = "", obeys: bool = True) -> None:
        self._why, self._obeys = why_not_green, obeys
        self.shares: list[float] = []  # that were tried

    def measure(self, limits: Figures) -> Figures:
        count, paced = 132, limits["link"]
        if limits["multiprocessors"]:
            self.shares.append(limits["multiprocessors"]["share"])
            if self._obeys:
                count = max(8, round(self.shares[-1] * 132 / 8) * 8)
        return {
            "gemm_tflops": min(6.0 * count, 650.0),
            "copy_gb_s": dict.fromkeys(COPY_GB_S, paced["gb_s"]) if paced else COPY_GB_S,
            "multiprocessors": 132,
            "cycles_per_s": 1.9e9,
            "why_not_green": self._why,
        }


@pytest.fixture(autouse=True)
def no_mps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    # Once set, so that it is taken out again whatever a test leaves.
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")


def test_the_nearer_of_two_shares_is_taken(module: Module) -> None:
    limits, card = module("harness.fit_limits"), Card()
    found = limits.settle(60, 12, card.measure)
    assert card.shares[0] == pytest.approx(60 / 650)  # 16 multiprocessors, whose rate is 96
    assert found["reached"]["gemm_tflops"] == 48  # 8 are nearer
    assert found["limits"]["multiprocessors"] == {"by": "green contexts", "share": card.shares[1]}
    assert found["limits"]["link"]["own_gb_s"] == COPY_GB_S
    said = limits.described(found)
    assert "48.00 TFLOPS of bf16 GEMMs, 60 asked, 650.00 without" in said
    assert "12.00 GB/s card to host, 12 asked, 50.00 without" in said


def test_one_limit_leaves_the_other_rate_alone(module: Module) -> None:
    limits, card = module("harness.fit_limits"), Card()
    found = limits.settle(None, 12, card.measure)
    assert (card.shares, found["limits"]["multiprocessors"]) == ([], None)
    assert "650.00 TFLOPS of bf16 GEMMs, not limited" in limits.described(found)
    found = limits.settle(300, None, card.measure)
    assert found["limits"]["link"] is None
    assert found["reached"]["gemm_tflops"] == pytest.approx(300, rel=0.1)


def test_without_green_contexts_mps_is_told_the_share(module: Module, tmp_path: Path) -> None:
    limits, card = module("harness.fit_limits"), Card("not built with them")
    with pytest.raises(UserError, match=r"not built with them.*nvidia-cuda-mps-control -d"):
        limits.settle(300, None, card.measure)
    (tmp_path / "control").touch()
    found = limits.settle(300, None, card.measure)
    share = found["limits"]["multiprocessors"]
    assert share["by"] == "MPS"
    assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == str(round(100 * share["share"]))


def test_rates_out_of_reach_are_refused(module: Module) -> None:
    limits = module("harness.fit_limits")
    with pytest.raises(UserError, match="--tflops 700: this card has 650"):
        limits.settle(700, None, Card().measure)
    with pytest.raises(UserError, match=r"--tflops 71: green contexts came no nearer than 650"):
        limits.settle(71, None, Card(obeys=False).measure)
