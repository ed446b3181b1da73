"""Settings that do not go together, and what a plan derives from a recipe."""

import itertools

import pytest
import tiny_strategy

from fttrain.errors import UserError
from fttrain.schedule import KINDS, ScheduleConfig
from fttrain.store.hostpool import HostPool
from fttrain.strategy.protocol import SCHEDULES, StrategyConfig
from fttrain.strategy.recipe import Placement, Plan, check_pair


@pytest.mark.parametrize(("strategy", "kind"), list(itertools.product(SCHEDULES, KINDS)))
def test_a_strategy_and_its_schedule(strategy: str, kind: str) -> None:
    pair = StrategyConfig(strategy), ScheduleConfig(kind=kind)
    wanted = "one_f_one_b" if strategy == "pipeline" else "grouped"
    if kind == wanted:
        check_pair(*pair)
        return
    message = rf"strategy={strategy} with schedule={kind}: .* write schedule={wanted}"
    with pytest.raises(UserError, match=message):
        check_pair(*pair)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": "offload"}, "activations=offload: recompute or keep"),
        ({"boundaries": "disk"}, "boundaries=disk: device or host"),
        ({"embedding": "streamed"}, "embedding=streamed: device or host"),
        ({"head": "host"}, "head=host: resident or streamed"),
        (
            {"boundaries": "host", "activations": "keep"},
            "boundaries=host: with activations=keep .* activations=recompute goes with it",
        ),
    ],
)
def test_refused_placements(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Placement(**settings)


def test_sizes_of_a_plan() -> None:
    frozen, group = tiny_strategy.base(), tiny_strategy.this_group()
    recipe = tiny_strategy.variant(dtype="bfloat16")
    plan = Plan(recipe, group, frozen.architecture, frozen.frozen_format, HostPool(group))
    assert plan.layer_bytes == len(frozen.flats[0])
    assert plan.table_bytes == 2 * 300 * 64
