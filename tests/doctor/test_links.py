"""Links between fresh processes: right ones, and ones that hang, die or corrupt."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from fttrain.doctor import links
from fttrain.doctor.finding import FAILURE, OK
from fttrain.doctor.processes import run_module


def test_two_ranks_sum_right_over_gloo() -> None:
    found = links.all_reduce("gloo", "cpu")
    assert found.verdict == OK, found
    assert "the sum is right" in found.figure


@pytest.mark.parametrize(
    ("fault", "limit_s", "text"),
    [
        ("hangs", 1.0, "no answer within 1 s: it hangs"),
        ("dies", 60.0, "libgloo: no interface"),
        ("flips", 60.0, "1 of 4194304 values are not what they have to be, the first at 77"),
    ],
)
def test_a_link_with_a_fault_is_a_failure_and_nobody_stays(
    fault: str, limit_s: float, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path.cwd()}")
    found = links.all_reduce("gloo", "cpu", limit_s, probe="link_faults")
    assert found.verdict == FAILURE
    assert text in found.figure
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    assert not [child for child in psutil.Process().children() if "link_faults" in child.cmdline()]


def test_where_there_is_no_second_card_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for found in (links.all_reduce("nccl", "cuda"), links.peer_copy(1)):
        assert (found.verdict, "not available" in found.figure) == (OK, True)


def test_ranks_are_told_who_they_are() -> None:
    """The first one's words are the answer; what it is told comes from its environment."""
    outcome = run_module("platform", ["--terse"], 1, 60.0)
    assert outcome.problem == ""
    assert os.uname().release in outcome.answer


@pytest.mark.cuda
def test_cards_copy_to_each_other_and_sum_over_nccl() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    assert links.peer_copy(torch.cuda.device_count()).verdict == OK
    assert links.all_reduce("nccl", "cuda").verdict == OK
