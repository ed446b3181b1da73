"""Which layers a rank keeps, and settings that are refused by name."""

from typing import Any

import pytest

from fttrain.strategy.config import StrategyConfig
from fttrain.util.errors import UserError


@pytest.mark.parametrize(
    ("resident_layers", "expected"),
    [(0, [0, 0]), (3, [3, 3]), ("all", [5, 5]), ((5, 0), [5, 0])],
)
def test_resident_layers_of_each_rank(resident_layers: Any, expected: list[int]) -> None:
    config = StrategyConfig("stream", resident_layers, 3)
    assert [config.resident(rank, 2, 5) for rank in (0, 1)] == expected


def test_more_resident_layers_than_there_are() -> None:
    with pytest.raises(UserError, match=r"resident_layers=6: the model has 5 layers"):
        StrategyConfig("stream", 6).resident(0, 1, 5)
    with pytest.raises(UserError, match=r"resident_layers=6: the model has 5 layers"):
        StrategyConfig("stream", (0, 6)).resident(1, 2, 5)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_list_names_every_rank(world_size: int) -> None:
    with pytest.raises(UserError, match=rf"resident_layers=\[1, 2\]: a number for .* {world_size}"):
        StrategyConfig("stream", (1, 2)).resident(0, world_size, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("zero",), r"strategy=zero: replicate, shard, stream, pipeline"),
        (("deepspeed", 2), r"strategy=deepspeed: .*strategy.slots belong to strategy=stream"),
        (("auto", 2), r"strategy=auto: strategy.resident_layers and .* belong to strategy=stream"),
        (
            ("shard", 2),
            r"strategy=shard: strategy.resident_layers and .* belong to strategy=stream",
        ),
        (("pipeline", 0, 3), r"strategy=pipeline: .*strategy.slots belong to strategy=stream"),
        (("stream", 0, 1), r"strategy.slots=1: 2 or 3"),
        (("stream", -1), r"strategy.resident_layers=-1: a number of 0 or more, all, or a list"),
        (("stream", "some"), r"strategy.resident_layers=some: a number of 0 or more"),
        (("stream", ()), r"strategy.resident_layers=\(\): a number of 0 or more"),
        (("stream", (1, -2)), r"strategy.resident_layers=\(1, -2\): a number of 0 or more"),
    ],
)
def test_refused(settings: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StrategyConfig(*settings)
