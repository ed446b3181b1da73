"""An update on the host, beside what follows it, against the same update at once."""

import threading
from typing import Any

import pytest
import tiny
import torch

from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture
from fttrain.model.layer_adapters import HostShard, LayerAdapters
from fttrain.optim.config import OptimConfig
from fttrain.optim.optimizer import Optimizer
from fttrain.strategy import optimizer_step
from fttrain.strategy.optimizer_step import DeviceUpdate, HostUpdate, Update, UpdateStats

LAYERS, STEPS = 3, 4
CONFIG = OptimConfig(lr=1e-2, weight_decay=0.1)
GROUPS = Architecture(tiny.model().config).groups


def adapters(on_host: bool) -> list[LayerAdapters]:
    lora, made = LoraConfig(r=4, lora_alpha=10), []
    for index in range(LAYERS):
        size = LayerAdapters(index, GROUPS, lora, tiny.CPU, torch.bfloat16).layout.shard_values
        place = HostShard(torch.zeros(size), torch.zeros(size, dtype=torch.bfloat16))
        made.append(
            LayerAdapters(index, GROUPS, lora, tiny.CPU, torch.bfloat16, place if on_host else None)
        )
        made[-1].reset(seed=1)
    return made


def optimizer_of(layers: list[LayerAdapters]) -> Optimizer:
    return Optimizer([(layer.flat, layer.layout.local_sections()) for layer in layers], CONFIG)


def give_gradients(layers: list[LayerAdapters], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for layer in layers:
        layer.flat.grad = torch.randn(layer.flat.shape, generator=generator)


def host(layers: list[LayerAdapters]) -> HostUpdate:
    return HostUpdate(layers, optimizer_of(layers), tiny.CPU)


def test_the_host_makes_the_same_weights() -> None:
    found = []
    for on_host in (False, True):
        layers = adapters(on_host)
        optimizer = optimizer_of(layers)
        made: Update = (
            HostUpdate(layers, optimizer, tiny.CPU) if on_host else DeviceUpdate(layers, optimizer)
        )
        for step in range(STEPS):
            give_gradients(layers, step)
            made.start(0.5, 1e-2 / (step + 1))
            for layer in layers:
                layer.ready()
        made.settle()
        copies = [group.b.clone() for layer in layers for group in layer.groups.values()]
        masters = [layer.flat.detach().clone() for layer in layers]
        found.append((masters, copies, list(optimizer.state().values())))
    for one, other in zip(*found, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_layer_waits_for_its_own_weights_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, may_go_on, work = adapters(True), threading.Event(), optimizer_step.update_layer

    def held(layer: LayerAdapters, place: int, *arguments: Any) -> None:
        if place == 1:
            assert may_go_on.wait(60)
        work(layer, place, *arguments)

    monkeypatch.setattr(optimizer_step, "update_layer", held)
    made = host(layers)
    before = [layer.flat.detach().clone() for layer in layers]
    give_gradients(layers, 0)
    made.start(1.0, 1e-2)
    layers[0].ready()  # returns while layer 1 is held
    assert not torch.equal(layers[0].flat, before[0])
    assert torch.equal(layers[1].flat, before[1])
    assert torch.equal(layers[2].flat, before[2])
    may_go_on.set()
    names = dict(layers[2].named_masters())  # they are those after the update
    assert not torch.equal(layers[2].flat, before[2])
    assert names
    made.settle()


def test_what_the_thread_raises_is_raised_where_the_weights_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = adapters(True)

    def broken(layer: LayerAdapters, place: int, *arguments: Any) -> None:
        raise RuntimeError(f"layer {place}")

    monkeypatch.setattr(optimizer_step, "update_layer", broken)
    made = host(layers)
    give_gradients(layers, 0)
    made.start(1.0, 1e-2)
    with pytest.raises(RuntimeError, match="layer 2"):
        layers[2].ready()


def test_figures_are_those_of_the_update_before() -> None:
    layers = adapters(True)
    made = host(layers)
    assert made.take_stats() == UpdateStats()
    for step in range(2):
        give_gradients(layers, step)
        made.start(1.0, 1e-2)
        stats = made.take_stats()
        if not step:
            assert stats == UpdateStats()
    # fp32 gradients out, bf16 weights back
    assert stats.optim_bytes == sum(6 * layer.flat.numel() for layer in layers)
    assert stats.optim_s > 0
    assert stats.optim_wait_s > 0  # nothing was done meanwhile
    made.settle()
