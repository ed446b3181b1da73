"""What autograd keeps, in host memory between forward and backward."""

import random
from typing import Any

import pytest
import tiny_store
import torch
from torch import Tensor

from fttrain.store.activations import UNDER_WAY, HostActivations
from fttrain.store.side_stream import SideStream, ThreadSideStream

PASSES, SIZE = 7, 50
PLACE_BYTES = 4096


def offloading(places: int = PASSES, *streams: SideStream) -> HostActivations:
    buffer = torch.zeros(places * PLACE_BYTES, dtype=torch.uint8)
    return HostActivations(buffer, places, torch.device("cpu"), *streams)


def layer(x: Tensor) -> Tensor:
    """Keeps x twice, once as a view, and two tensors of its own; one of them is no fp32."""
    y = x * x.view(5, -1).flatten()
    return y.sin() * y.double().exp().float().clamp(max=3)


def grads(order: list[int], host: HostActivations | None) -> list[Tensor]:
    """Gradients of the inputs of passes whose backward runs in ``order``."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(SIZE, generator=generator).requires_grad_() for _ in range(PASSES)]
    graphs: list[tuple[Tensor, Any]] = []
    for x in inputs:
        if host is None:
            graphs.append((layer(x), None))
            continue
        with host.taking() as kept:
            output = layer(x)
        graphs.append((output, kept))
    for place, number in enumerate(order):
        output, kept = graphs[number]
        if host is not None:
            for upcoming in order[place : place + 2]:
                host.bring(graphs[upcoming][1])
        output.sum().backward()
        if host is not None:
            host.drop(kept)
    return [x.grad for x in inputs if x.grad is not None]


def test_backward_reads_what_forward_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ThreadSideStream, "_start", ThreadSideStream._start
    )  # restored after the delays
    tiny_store.delay_lanes(seed=1)
    chance = random.Random(2)
    host = offloading()
    for order in (
        list(range(PASSES))[::-1],
        list(range(PASSES)),
        chance.sample(range(PASSES), PASSES),
    ):
        for found, expected in zip(grads(order, host), grads(order, None), strict=True):
            assert torch.equal(found, expected)


def test_each_tensor_lies_there_once_and_only_the_last_ones_stay_on_the_device() -> None:
    host = offloading()
    taken = []
    for _ in range(PASSES):
        x = torch.randn(SIZE, requires_grad=True)
        with host.taking() as kept:
            output = x * x.view(5, -1).flatten()
        taken.append((output, kept))
    for _, kept in taken:
        assert [part.shape for part in kept.parts] == [(SIZE,)]  # x and its view
        assert kept.used_bytes == 4 * SIZE
    gone = [kept.tensors is None for _, kept in taken]
    assert gone == [True] * (PASSES - UNDER_WAY) + [False] * UNDER_WAY
    for _, kept in taken[::-1]:
        host.bring(kept)
        host.drop(kept)
    assert host.take_traffic().activation_bytes == 4 * SIZE * (PASSES - UNDER_WAY)
    assert host.take_traffic().activation_bytes == 0


def test_places_that_were_forgotten_and_divided_are_whole_again() -> None:
    """Passes that failed, that left and that come back are forgotten; then there are halves of the
    places, two times as many, and backward reads what forward left.
    """
    streams = tiny_store.CountingLane(1e-3), tiny_store.CountingLane(1e-2)
    host = offloading(PASSES, *streams)
    for attempt in range(4):
        taken = []
        for _ in range(PASSES - 1):
            with host.taking() as kept:
                layer(torch.randn(SIZE, requires_grad=True))
            taken.append(kept)
        with pytest.raises(RuntimeError, match="allocate memory"), host.taking():
            layer(torch.randn(SIZE, requires_grad=True)).new_empty(1 << 60)
        if attempt % 2:
            for kept in taken:
                host.bring(kept)
        host.discard()
        assert all(stream.ended == stream.started for stream in streams)  # no copy is under way
    assert all(stream.started for stream in streams)
    host.resize(2)
    order = list(range(PASSES))[::-1]
    for found, expected in zip(grads(order, host), grads(order, None), strict=True):
        assert torch.equal(found, expected)


def test_more_passes_than_places_is_an_error_and_not_an_overwritten_place() -> None:
    host = offloading(places=2)
    x = torch.randn(SIZE, requires_grad=True)
    for _ in range(2):
        with host.taking():
            layer(x)
    with pytest.raises(IndexError), host.taking():
        layer(x)
