from typing import Any

import pytest

from fttrain.data.loader import Loader, evaluation_batches
from fttrain.util.errors import UserError


class Numbered:
    """Row i is one document [i, i, i]: enough of Rows to see which rows come."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[tuple[list[int], list[int]]]:
        return [([index] * 3, [index] * 3)]


def ids(batches: list[Any]) -> list[int]:
    return [token for batch in batches for token in batch.input_ids.tolist()[::3]]


def make(
    count: int = 23, mbs: int = 2, gas: int = 2, rank: int = 0, world: int = 1, **more: Any
) -> Loader:
    return Loader(Numbered(count), mbs, gas, rank, world, more.pop("seed", 0), **more)  # type: ignore[arg-type]


def test_an_epoch_has_each_row_once_in_a_new_order() -> None:
    loader = make()
    assert loader.steps_per_epoch == 6
    epochs = [[row for _ in range(6) for row in ids(loader.next_step())] for _ in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loader.position == 18
    in_order = make(shuffle=False)
    assert [row for _ in range(6) for row in ids(in_order.next_step())] == list(range(23))
    assert ids(make(seed=1).next_step()) != ids(make(seed=0).next_step())
    assert ids(make(seed=2**40).next_step()) != ids(make(seed=0).next_step())


def test_the_position_is_all_that_a_resume_needs() -> None:
    whole = make(world=2, rank=1)
    steps = [whole.next_step() for _ in range(15)]
    for position in range(15):
        again = make(world=2, rank=1, position=position).next_step()
        assert [batch.input_ids.tolist() for batch in again] == [
            batch.input_ids.tolist() for batch in steps[position]
        ]


@pytest.mark.parametrize(
    ("mbs", "gas", "world"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2), (1, 1, 8)]
)
def test_every_split_takes_the_same_rows_in_a_step(mbs: int, gas: int, world: int) -> None:
    loaders = [make(mbs=mbs, gas=gas, rank=rank, world=world) for rank in range(world)]
    reference = make(mbs=8, gas=1)
    for _ in range(7):
        batches = [batch for loader in loaders for batch in loader.next_step()]
        assert sorted(batch.index for batch in batches) == list(range(gas * world))
        batches.sort(key=lambda batch: batch.index)
        assert ids(batches) == ids(reference.next_step())


@pytest.mark.parametrize(("mbs", "pieces"), [(4, 2), (4, 4), (6, 3), (3, 3)])
def test_divided_it_goes_on_as_one_that_began_so(mbs: int, pieces: int) -> None:
    for rank in range(2):
        loader = make(mbs=mbs, gas=2, rank=rank, world=2)
        expected = make(mbs=mbs // pieces, gas=2 * pieces, rank=rank, world=2)
        loader.next_step()
        loader.divide(pieces)
        expected.position = loader.position
        assert loader.micro_batch_size == mbs // pieces
        assert loader.rows_per_step == expected.rows_per_step == mbs * 4
        for _ in range(5):
            ours, theirs = loader.next_step(), expected.next_step()
            assert [batch.index for batch in ours] == [batch.index for batch in theirs]
            assert [ids([batch]) for batch in ours] == [ids([batch]) for batch in theirs]


def test_a_partial_step_has_empty_micro_batches_not_fewer() -> None:
    loaders = [make(count=5, rank=rank, world=2) for rank in range(2)]
    assert [loader.steps_per_epoch for loader in loaders] == [1, 1]
    sizes = [[len(batch.lengths) for batch in loader.next_step()] for loader in loaders]
    assert sizes == [[2, 1], [2, 0]]


def test_refuses_nothing_and_nonsense() -> None:
    with pytest.raises(UserError, match="no rows"):
        make(count=0)
    with pytest.raises(UserError, match=r"loop\.micro_batch_size=0"):
        make(mbs=0)
    with pytest.raises(UserError, match=r"loop\.gradient_accumulation_steps=0"):
        make(gas=0)


@pytest.mark.parametrize("count", [0, 1, 4, 7, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_each_row_once(count: int, world: int) -> None:
    per_rank = [evaluation_batches(Numbered(count), 2, rank, world) for rank in range(world)]  # type: ignore[arg-type]
    assert len({len(batches) for batches in per_rank}) == 1
    assert sorted(row for batches in per_rank for row in ids(batches)) == list(range(count))
