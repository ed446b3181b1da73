"""Settings that do not go together, and what a plan derives from a spec."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy

from fttrain.data.batch import collate
from fttrain.memory.ledger import MemoryLedger
from fttrain.optim.config import OptimConfig
from fttrain.schedule import layer_pass
from fttrain.schedule.config import KINDS, ScheduleConfig
from fttrain.strategy.config import SCHEDULES, Placement, StrategyConfig, check_together
from fttrain.strategy.context import BuildContext
from fttrain.strategy.model_slice import activation_bytes
from fttrain.strategy.spec import StepSize
from fttrain.util.errors import UserError


@pytest.mark.parametrize(("strategy", "kind"), list(itertools.product(SCHEDULES, KINDS)))
def test_a_strategy_and_its_schedule(strategy: str, kind: str) -> None:
    pair = StrategyConfig(strategy), ScheduleConfig(kind=kind), OptimConfig()
    wanted = "one_f_one_b" if strategy == "pipeline" else "grouped"
    if kind == wanted:
        check_together(*pair)
        return
    message = rf"strategy={strategy} with schedule={kind}: .* write schedule={wanted}"
    with pytest.raises(UserError, match=message):
        check_together(*pair)


def test_a_pipeline_has_nothing_to_shard() -> None:
    schedule, optim = ScheduleConfig(kind="one_f_one_b"), OptimConfig(shard=True)
    with pytest.raises(UserError, match=r"optim\.shard=true with strategy=pipeline: .* leave it"):
        check_together(StrategyConfig("pipeline"), schedule, optim)
    check_together(StrategyConfig("shard"), ScheduleConfig(), optim)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": "all"}, "activations=all: recompute, keep, offload, or a list of them by"),
        ({"activations": ("keep", "drop*2")}, r"activations=\[keep,drop\*2\]: recompute, keep, of"),
        ({"activations": ("keep*0",)}, r"activations=\[keep\*0\]: recompute, keep, offload"),
        ({"activations": ("keep*x",)}, r"activations=\[keep\*x\]: recompute, keep, offload"),
        ({"activations": "keep*2"}, r"activations=keep\*2: recompute, keep, offload"),
        ({"layer_inputs": "disk"}, "layer_inputs=disk: device or host"),
        ({"embedding": "streamed"}, "embedding=streamed: device or host"),
        ({"lm_head": "disk"}, "lm_head=disk: device, host or quantized"),
        ({"mlp_tile_tokens": 1000}, "mlp_tile_tokens=1000: all, or a multiple of 1024 tokens"),
        ({"mlp_tile_tokens": 0}, "mlp_tile_tokens=0: all, or a multiple of 1024 tokens"),
        ({"mlp_tile_tokens": -1024}, "mlp_tile_tokens=-1024: all, or a multiple of 1024 tokens"),
        ({"mlp_tile_tokens": "some"}, "mlp_tile_tokens=some: all, or a multiple of 1024 tokens"),
        (
            {"layer_inputs": "host", "activations": "keep"},
            "layer_inputs=host: activations=keep leaves none; layers with activations=recompute do",
        ),
        (
            {"layer_inputs": "host", "activations": ("keep*4", "offload")},
            r"layer_inputs=host: activations=\[keep\*4,offload\] leaves none",
        ),
    ],
)
def test_refused_placements(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Placement(**settings)


def test_policies_by_layer() -> None:
    assert Placement("offload").policies(3) == ["offload"] * 3
    mixed = Placement(("recompute*2", "keep", "offload*1"))
    assert mixed.policies(4) == ["recompute", "recompute", "keep", "offload"]
    for layers in (3, 5):
        message = rf"activations=\[recompute\*2,keep,offload\*1\]: 4 layers, the model has {layers}"
        with pytest.raises(UserError, match=message):
            mixed.policies(layers)


def test_sizes_of_a_plan() -> None:
    frozen, group = tiny_strategy.base(), tiny_strategy.this_group()
    spec = tiny_strategy.variant(dtype="bfloat16")
    context = BuildContext(
        spec, group, frozen.architecture, frozen.frozen_format, MemoryLedger(group)
    )
    assert context.layer_bytes == len(frozen.flats[0])
    assert context.table_bytes == 2 * 300 * 64


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("tile", ["all", 1024])
def test_host_memory_of_offloaded_activations_is_what_a_layer_leaves(
    tile: int | str, use_dora: bool
) -> None:
    """Gate and up are one tensor of all tokens, however they were written."""
    frozen, group = tiny_strategy.base(), tiny_strategy.this_group()
    spec = tiny_strategy.variant(dtype="bfloat16", activations="offload", mlp_tile_tokens=tile)
    lora = replace(spec.lora, use_dora=use_dora)
    spec = replace(spec, size=StepSize(1, 1500, 1), lora=lora)
    context = BuildContext(
        spec, group, frozen.architecture, frozen.frozen_format, MemoryLedger(group)
    )
    strategy = tiny_strategy.build(spec, tiny_strategy.base(dtype="bfloat16"))
    assert strategy.decoder.layers[0].shell.mlp.tile_tokens == (0 if tile == "all" else tile)
    batch = collate(tiny.documents((spec.size.seq_len,)), 0)
    work = layer_pass.start(strategy.decoder, batch, None, None)
    for layer in layer_pass.iterate_layers(strategy.decoder, strategy._store, range(1)):
        layer_pass.forward(strategy.decoder.layers[layer], work, strategy._policies[layer])
    _, (kept, _) = work.saved[0]
    assert kept.used_bytes == activation_bytes(context)
