"""Stages talk in both directions at once: everything arrives, in order, and is counted."""

import functools
import random
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import simulated_streams
import tiny_strategy
import torch
from ranks import run_ranks
from stream_races import Race
from torch import Tensor

from fttrain.schedule import pipeline_p2p
from fttrain.schedule.pipeline_p2p import NEXT, PREV, PipelineP2P, _StagedSend
from fttrain.store import Traffic
from fttrain.store.side_stream import device_thread

WIDTH = 6
CASES = [(torch.float32, "gloo"), (torch.bfloat16, "gloo"), (torch.float32, "nccl")]
ROWS = [random.Random(3).randint(1, 40) for _ in range(50)]


def message(number: int, direction: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2 * number + (direction == NEXT))
    return torch.randn(ROWS[number], WIDTH, generator=generator).to(dtype)


def talk(dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """The first stage sends up and receives what comes down, a few behind; the last one answers.

    ``backend="nccl"``: over a communicator for each direction, as between GPUs.
    """
    group = tiny_strategy.this_group()
    with mock.patch.object(torch.distributed, "get_backend", return_value=backend):
        p2p, chance = PipelineP2P(group, WIDTH, dtype), random.Random(group.rank)
    found: list[Tensor] = []
    queue = p2p.recv_queue(ROWS, PREV if p2p.is_last else NEXT)
    ahead = 0 if p2p.is_last else 2
    for number in range(len(ROWS) + ahead):
        time.sleep(2e-3 * chance.random())
        if p2p.is_last:
            found.append(queue.next())
            p2p.send(message(number, PREV, dtype), PREV)
            continue
        if number < len(ROWS):
            sent = message(number, NEXT, dtype)
            p2p.send(sent.t().contiguous().t(), NEXT)  # not contiguous
        if number >= ahead:
            found.append(queue.next())
    p2p.flush()
    return {
        "found": found,
        "bytes": [p2p.take_traffic().stage_bytes for _ in range(2)],
        "place": (p2p.is_first, p2p.is_last),
    }


def talk_all() -> list[dict[str, Any]]:
    return [talk(*case) for case in CASES]


@functools.cache
def conversations() -> list[list[dict[str, Any]]]:
    """Of each rank, one for each of ``CASES``."""
    return run_ranks(talk_all, 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_messages_cross_in_both_directions(case: tuple[torch.dtype, str]) -> None:
    first, last = (rank[CASES.index(case)] for rank in conversations())
    dtype, _ = case
    assert (first["place"], last["place"]) == ((True, False), (False, True))
    for found, travelled in ((last["found"], NEXT), (first["found"], PREV)):
        assert len(found) == len(ROWS)
        for number, tensor in enumerate(found):
            assert tensor.dtype == dtype
            assert torch.equal(tensor, message(number, travelled, dtype)), number
    for rank in (first, last):
        assert rank["bytes"] == [sum(ROWS) * WIDTH * dtype.itemsize, 0]


LATE_S = 0.3


def wait() -> float:
    """Seconds for which this rank waited by its own account; the first one sends late."""
    group = tiny_strategy.this_group()
    p2p = PipelineP2P(group, WIDTH, torch.float32)
    group.barrier()
    if p2p.is_first:
        time.sleep(LATE_S)
        p2p.send(torch.zeros(1, WIDTH), NEXT)
    else:
        p2p.receive(1, PREV).tensor()
    p2p.flush()
    waited = [p2p.take_traffic().wait_s for _ in range(2)]
    assert waited[1] == 0
    return waited[0]


def test_the_wait_for_another_stage_is_timed() -> None:
    first, last = run_ranks(wait, 2)
    assert first == 0
    assert LATE_S / 2 < last < 100 * LATE_S


def test_a_single_stage_is_first_and_last() -> None:
    p2p = PipelineP2P(tiny_strategy.this_group(), WIDTH, torch.float32)
    assert p2p.is_first
    assert p2p.is_last
    assert p2p.take_traffic() == Traffic()


def staged_races() -> list[Race]:
    with simulated_streams.simulated_streams() as simulation:
        sender = device_thread(torch.device("cpu"), "sender")
        for number in range(3):
            _StagedSend(sender, torch.full((4, WIDTH), float(number)), 1, 0, None).wait()
    return simulation.races


def test_nothing_is_sent_before_it_has_come_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(tensor: Tensor, *_: Any, **__: Any) -> None:
        assert tensor.isfinite().all()

    monkeypatch.setattr(pipeline_p2p, "torch_dist", SimpleNamespace(send=send))
    assert staged_races() == []
    monkeypatch.setattr(simulated_streams.Event, "synchronize", lambda self: None)
    [race] = staged_races()[:1]
    expected = "float32 (4, 6) of _StagedSend.__init__", "copy_ * writes it on compute"
    assert race.is_like(*expected, "* in * reads it on thread sender")
