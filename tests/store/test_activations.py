"""Activation offload: tensors saved by autograd, in host memory between forward and backward."""

import random
from typing import Any

import pytest
import tiny_store
import torch
from torch import Tensor

from fttrain.store.activations import UNDER_WAY, HostActivations
from fttrain.store.side_stream import SideStream, ThreadSideStream

PASSES, SIZE = 7, 50
SLOT_BYTES = 4096


def offloading(slots: int = PASSES, *streams: SideStream) -> HostActivations:
    buffer = torch.zeros(slots * SLOT_BYTES, dtype=torch.uint8)
    return HostActivations(buffer, slots, torch.device("cpu"), *streams)


def layer(x: Tensor) -> Tensor:
    """Save x twice, once as a view, and two tensors of its own; one of them is no fp32."""
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
        with host.offload() as saved:
            output = layer(x)
        graphs.append((output, saved))
    for position, number in enumerate(order):
        output, saved = graphs[number]
        if host is not None:
            for upcoming in order[position : position + 2]:
                host.bring(graphs[upcoming][1])
        output.sum().backward()
        if host is not None:
            host.drop(saved)
    return [x.grad for x in inputs if x.grad is not None]


def test_backward_reads_what_forward_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ThreadSideStream, "_start", ThreadSideStream._start
    )  # restored after the delays
    tiny_store.delay_streams(seed=1)
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
    passes = []
    for _ in range(PASSES):
        x = torch.randn(SIZE, requires_grad=True)
        with host.offload() as saved:
            output = x * x.view(5, -1).flatten()
        passes.append((output, saved))
    for _, saved in passes:
        assert [part.shape for part in saved.parts] == [(SIZE,)]  # x and its view
        assert saved.used_bytes == 4 * SIZE
    gone = [saved.tensors is None for _, saved in passes]
    assert gone == [True] * (PASSES - UNDER_WAY) + [False] * UNDER_WAY
    for _, saved in passes[::-1]:
        host.bring(saved)
        host.drop(saved)
    assert host.take_traffic().activation_bytes == 4 * SIZE * (PASSES - UNDER_WAY)
    assert host.take_traffic().activation_bytes == 0


def test_slots_that_were_discarded_and_resized_are_whole_again() -> None:
    """Passes that failed, that were copied out and that are being copied back are discarded. Then
    the slots are halved, and backward reads what forward saved.
    """
    streams = tiny_store.CountingSideStream(1e-3), tiny_store.CountingSideStream(1e-2)
    host = offloading(PASSES, *streams)
    for round_ in range(4):
        passes = []
        for _ in range(PASSES - 1):
            with host.offload() as saved:
                layer(torch.randn(SIZE, requires_grad=True))
            passes.append(saved)
        with pytest.raises(RuntimeError, match="allocate memory"), host.offload():
            layer(torch.randn(SIZE, requires_grad=True)).new_empty(1 << 60)
        if round_ % 2:
            for saved in passes:
                host.bring(saved)
        host.discard()
        assert all(stream.ended == stream.started for stream in streams)  # no copy is under way
    assert all(stream.started for stream in streams)
    host.resize(2)
    order = list(range(PASSES))[::-1]
    for found, expected in zip(grads(order, host), grads(order, None), strict=True):
        assert torch.equal(found, expected)


def test_more_passes_than_slots_is_an_error_and_not_an_overwritten_slot() -> None:
    host = offloading(slots=2)
    x = torch.randn(SIZE, requires_grad=True)
    for _ in range(2):
        with host.offload():
            layer(x)
    with pytest.raises(IndexError), host.offload():
        layer(x)
