"""Gradients in host memory are those on the device, bit for bit, whatever groups add to them."""

import functools

import pytest
import tiny
import tiny_store
import tiny_strategy
import torch
from ranks import run_ranks
from torch import Tensor

from fttrain.model.config import LoraConfig
from fttrain.strategy.grad_reduce import gradient_sync
from fttrain.strategy.gradients import DoubleBufferedGradients, GradientBuffers, ResidentGradients

GROUPS, STEPS = 3, 2
Found = list[tuple[list[Tensor], Tensor, int]]  # of each step: gradients, norms, bytes summed


def steps(where: str) -> Found:
    """Random values are added as groups of micro-batches would, from the last layer to the first;
    between steps the sums are changed in place, as clipping does.
    """
    decoder, _ = tiny.build(tiny.model(), tiny.PLAIN, LoraConfig(r=4))
    adapters = [layer.adapters for layer in decoder.layers]
    group = tiny_strategy.this_group()
    sync = gradient_sync(group)
    buffers: GradientBuffers
    if where == "device":
        buffers = ResidentGradients(adapters, sync)
    else:  # what was in that memory before must not count
        on_host = [torch.full_like(layer.flat.data, torch.nan) for layer in adapters]
        buffers = DoubleBufferedGradients(adapters, sync, tiny.CPU, on_host)
    generator = torch.Generator().manual_seed(group.rank)
    found = []
    for _ in range(STEPS):
        buffers.start()
        for number in range(GROUPS):
            for layer in reversed(range(len(adapters))):
                buffers.begin_layer(layer)
                for _ in range(2):
                    values = torch.randn(adapters[layer].flat.shape, generator=generator)
                    adapters[layer].grad.add_(values)
                buffers.end_layer(layer, last=number == GROUPS - 1)
        norms, stats = buffers.finish()
        gradients = [layer.flat.grad for layer in adapters]
        found.append(([grad.clone() for grad in gradients], norms.clone(), stats.sync_bytes))
        for grad in gradients:
            grad.mul_(0.5)
    return found


def both() -> tuple[Found, Found]:
    """On late side streams: nothing may depend on when a copy happens to be made."""
    tiny_store.delay_streams(seed=tiny_strategy.this_group().rank)
    return steps("device"), steps("host")


@functools.cache
def found_on(world_size: int) -> list[tuple[Found, Found]]:
    return run_ranks(both, world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_host_equals_device(world_size: int) -> None:
    for on_device, on_host in found_on(world_size):
        for (grads, norms, size), (host_grads, host_norms, host_size) in zip(
            on_device, on_host, strict=True
        ):
            assert all(map(torch.equal, grads, host_grads))
            assert torch.equal(norms, host_norms)
            assert size == host_size
            assert size == (world_size > 1) * sum(4 * grad.numel() for grad in grads)
            expected = torch.stack([grad.norm() for grad in grads])
            assert torch.allclose(norms, expected, rtol=1e-6)


def test_ranks_sum_what_each_of_them_added() -> None:
    sizes = [len(grad) for grad in found_on(1)[0][0][0][0]]
    added = [[torch.zeros(size) for size in sizes] for _ in range(2)]
    for rank in range(2):
        generator = torch.Generator().manual_seed(rank)
        for _ in range(GROUPS):
            for layer in reversed(range(len(sizes))):
                for _ in range(2):
                    added[rank][layer] += torch.randn(sizes[layer], generator=generator)
    expected = [one + other for one, other in zip(*added, strict=True)]
    for of_device_and_host in found_on(2):
        for found in of_device_and_host:
            grads, _, _ = found[0]
            assert all(map(torch.equal, grads, expected))
