"""Layers from host memory beside resident ones: the same bytes, and only the others move."""

import itertools

import pytest
import tiny_store
import torch

from fttrain.store.host import HostStore, resident_set

LAYERS = 6


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("resident_layers", [0, 1, 3, 5, 6])
@pytest.mark.usefixtures("late_streams")
def test_every_layer_is_what_it_was(resident_layers: int, slots: int) -> None:
    flats = tiny_store.flats(LAYERS)
    kept = resident_set(LAYERS, resident_layers)
    resident = {layer: flats[layer].clone() for layer in kept}
    on_host = {layer: flat for layer, flat in enumerate(flats) if layer not in kept}
    store = HostStore(LAYERS, resident, on_host, tiny_store.FORMAT, tiny_store.CPU, slots)
    assert len(store) == LAYERS
    orders = [*tiny_store.passes_up_and_down(LAYERS, 12), [4, 1], [4, 1], [2]]
    for layer, flat in tiny_store.read(store, orders):
        assert torch.equal(flat, flats[layer]), layer
    moved = 2 * max(0, LAYERS - resident_layers - slots)
    traffic = tiny_store.steady(store)
    assert (traffic.h2d_bytes, traffic.gather_bytes) == (moved * tiny_store.LAYER_BYTES, 0)
    assert store.take_traffic().h2d_bytes == 0


def test_resident_layers_are_given_out_as_they_lie() -> None:
    flat = tiny_store.flats(1)[0]
    store = HostStore(1, {0: flat}, {}, tiny_store.FORMAT, tiny_store.CPU)
    store.prefetch([0])
    assert store.get(0).flat is flat
    store.release(0)


@pytest.mark.parametrize("layers", [1, 2, 7, 80])
def test_resident_layers_are_evenly_spread(layers: int) -> None:
    """Between two resident layers, and before the first and after the last, there are as many
    others as anywhere else, give or take one.
    """
    for resident_layers in range(layers + 1):
        chosen = sorted(resident_set(layers, resident_layers))
        assert len(chosen) == resident_layers
        assert all(0 <= layer < layers for layer in chosen)
        between = [b - a for a, b in itertools.pairwise(chosen)]
        assert max(between, default=0) - min(between, default=0) <= 1
        if chosen:
            assert abs(chosen[0] - (layers - 1 - chosen[-1])) <= 1
