"""A damaged layer is found: all layers at first, then each of them in its turn."""

import pytest
import tiny
import tiny_store
import torch
from torch import Tensor

from fttrain.quant.checksum import checksum
from fttrain.store import Traffic
from fttrain.store.resident import ResidentStore
from fttrain.store.verify import VerifiedStore

LAYERS = 5


def verified(flats: list[Tensor], every: int) -> VerifiedStore:
    return tiny.verified(ResidentStore(flats, tiny_store.FORMAT), flats, every)


def damage(flat: Tensor) -> None:
    """One bit."""
    flat[1234] ^= 4


def step(store: VerifiedStore, number: int) -> list[int]:
    """An optimizer step, up and down; the layers found damaged."""
    store.start_step(number)
    up = list(range(LAYERS))
    tiny_store.read(store, [up, up[::-1]])
    return store.mismatched()


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("place", [0, 1234, tiny_store.LAYER_BYTES - 1])
def test_the_first_use_finds_a_flipped_bit(layer: int, place: int) -> None:
    flats = tiny_store.flats(LAYERS)
    store = verified(flats, every=50)
    flats[layer][place] ^= 128
    assert step(store, 7) == [layer]


def test_several_layers_are_found() -> None:
    flats = tiny_store.flats(LAYERS)
    store = verified(flats, every=0)
    for layer in (3, 1):
        damage(flats[layer])
    assert sorted(step(store, 0)) == [1, 3]
    assert store.mismatched() == []  # told once


def test_a_layer_that_memory_does_not_suffice_to_check_stays_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flats, tries = tiny_store.flats(LAYERS), list[int]()
    store = verified(flats, every=0)
    damage(flats[2])

    def short(flat: Tensor) -> Tensor:
        tries.append(len(tries))
        if len(tries) <= LAYERS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return checksum(flat)

    monkeypatch.setattr("fttrain.store.verify.checksum", short)
    assert step(store, 0) == [2]  # on its way down
    assert step(store, 1) == []
    assert len(tries) == 2 * LAYERS


@pytest.mark.parametrize("every", [1, 3, 8])
def test_each_layer_is_checked_once_in_so_many_steps(every: int) -> None:
    """After the first use; about as many layers in each step as in any other."""
    for layer in range(LAYERS):
        flats = tiny_store.flats(LAYERS)
        store = verified(flats, every)
        assert step(store, 0) == []
        damage(flats[layer])
        found = [step(store, number) for number in range(1, 3 * every + 1)]
        assert [bool(names) for names in found].count(True) == 3
        first = next(i for i, names in enumerate(found) if names)
        assert [i for i, names in enumerate(found) if names] == [
            first,
            first + every,
            first + 2 * every,
        ]
        assert first < every


def test_checks_are_spread_over_the_steps() -> None:
    flats = tiny_store.flats(LAYERS)
    store = verified(flats, every=3)
    step(store, 0)
    for flat in flats:
        damage(flat)
    counts = [len(step(store, number)) for number in range(10, 13)]
    assert sum(counts) == LAYERS
    assert max(counts) - min(counts) <= 1


def test_zero_checks_the_first_use_alone() -> None:
    flats = tiny_store.flats(LAYERS)
    store = verified(flats, every=0)
    assert step(store, 0) == []
    damage(flats[2])
    assert all(step(store, number) == [] for number in range(1, 60))


def test_everything_else_is_the_stores() -> None:
    flats = tiny_store.flats(LAYERS)
    store = verified(flats, every=1)
    assert len(store) == LAYERS
    assert store.get(3).flat is flats[3]
    assert store.take_traffic() == Traffic()
