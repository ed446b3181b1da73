"""What DeepSpeed is told: agreed on by the run, the launch file and a JSON, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_strategy

from fttrain.config.run_config import compose
from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.ledger import MemoryLedger
from fttrain.model.config import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import Placement, StrategyConfig
from fttrain.strategy.context import BuildContext
from fttrain.strategy.deepspeed.settings import Settings, resolve
from fttrain.strategy.spec import StepSize
from fttrain.strategy.zero_checks import refuse_deepspeed_launch
from fttrain.strategy.zero_config import ZeroConfig
from fttrain.util.errors import UserError

ACCELERATE = "ACCELERATE_DEEPSPEED_"
OPTIM = OptimConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=0.5)


def settled(environment: dict[str, str] | None = None, **zero: Any) -> Settings:
    """Of two ranks of a bf16 run: 3 rows a micro-batch, 4 of them a step."""
    group = RankGroup(0, 2, 0, tiny.CPU)
    frozen = tiny_strategy.base()
    spec = replace(
        tiny_strategy.SPEC,
        strategy=StrategyConfig("deepspeed", zero=ZeroConfig(**zero)),
        optim=OPTIM,
        size=StepSize(3, 64, 4),
        dtype="bfloat16",
    )
    context = BuildContext(
        spec, group, frozen.architecture, frozen.frozen_format, MemoryLedger(group)
    )
    return resolve(context, environment or {})


def written(folder: Path, content: Any) -> str:
    file = folder / "zero.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def test_without_a_word_it_is_stage_2() -> None:
    found = settled()
    assert (found.stage, found.offload_optimizer, found.offload_params) == (2, False, False)
    assert found.values["train_batch_size"] == 24
    assert found.values["gradient_clipping"] == 0.5
    assert found.values["bf16"]["enabled"]
    assert "offload_optimizer" not in found.values["zero_optimization"]


def test_the_launch_file_is_heard() -> None:
    found = settled(
        {
            f"{ACCELERATE}ZERO_STAGE": "3",
            f"{ACCELERATE}OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            f"{ACCELERATE}OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_GRADIENT_CLIPPING": "auto",
        },
        stage=3,
    )
    assert (found.stage, found.offload_optimizer, found.offload_params) == (3, True, False)
    assert found.values["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_every_auto_is_filled(tmp_path: Path) -> None:
    own = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": 0.1},
        },
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": False},
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "sub_group_size": 1e9,
        },
    }
    found = settled(config=written(tmp_path, own))
    values, zero = found.values, found.values["zero_optimization"]
    assert "auto" not in json.dumps(values)
    assert values["train_micro_batch_size_per_gpu"] == 3
    assert values["gradient_accumulation_steps"] == 4
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["sub_group_size"] == 1e9
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert (found.stage, found.offload_params) == (3, True)
    assert "optimizer" not in values  # it is made by the run
    assert "fp16" not in values


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n  "bf16": {"enabled": true,}\n}', r"zero.json:2:\d+: not JSON: "),
        ('{"bf16": {}, "bf16": {}}', "zero.json: bf16 is there twice"),
        ("[]", "zero.json: a JSON object is wanted"),
        ({"fp16": {"enabled": True}}, "zero.json: fp16: not honoured; model.dtype=bfloat16"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: not honoured; optim.lr_schedule"),
        ({"train_batch_size": 16}, r"train_batch_size=16, but loop.micro_batch_size x .* ranks=24"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0, but optim.max_grad_norm=0.5: make"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=false, but model.dtype=bfloat16"),
        ({"bf16": True}, "bf16=true: an object is wanted"),
        ({"gradient_clipping": {}}, "gradient_clipping: a single value is wanted"),
        (
            {"optimizer": {"params": {"lr": 1e-3}}},
            "optimizer.params.lr=0.001, but optim.lr=0.0003: make them the same",
        ),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type="Lamb": strategy=deepspeed trains with'),
        (
            {"zero_optimization": {"sub_group_size": "auto"}},
            'zero_optimization.sub_group_size="auto": nothing says what it should be',
        ),
        (
            {"zero_optimization": {"stage3_prefetch_bucket_sise": 1}},
            "zero_optimization.stage3_prefetch_bucket_sise: .* did you mean stage3_prefetch_bucket",
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights: strategy=deepspeed does not honour it",
        ),
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0: .* takes 1, 2 or 3"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device of .*=nvme: none or cpu",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "strategy.zero.offload_params=true with stage 2: stage 3 alone divides weights",
        ),
        ({"gradient_acumulation_steps": 4}, "did you mean gradient_accumulation_steps?"),
    ],
)
def test_a_json_that_cannot_be_honoured(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        settled(config=written(tmp_path, content))
    assert "\n" not in str(refused.value)


def test_contradictions_have_both_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(.*No such file"):
        settled(config=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"strategy.zero.stage=2, but zero_stage of the .*=3: make"):
        settled({f"{ACCELERATE}ZERO_STAGE": "3"}, stage=2)
    with pytest.raises(
        UserError, match=r"zero.offload_optimizer=false, but offload_optimizer_device of .*=true"
    ):
        settled({f"{ACCELERATE}OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, offload_optimizer=False)
    file = written(tmp_path, {"zero_optimization": {"stage": 1}})
    with pytest.raises(UserError, match=r"strategy.zero.stage=3, but zero_optimization.stage of "):
        settled(config=file, stage=3)
    with pytest.raises(UserError, match=r"strategy.zero.config=.*, but deepspeed_config_file of"):
        settled({f"{ACCELERATE}CONFIG_FILE": "/other.json"}, config=file)
    with pytest.raises(
        UserError, match=r"accumulation_steps=4, but gradient_accumulation_steps of"
    ):
        settled({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"})
    with pytest.raises(UserError, match=r"strategy=shard, but the launch file says .*DEEPSPEED"):
        refuse_deepspeed_launch("shard", {"ACCELERATE_USE_DEEPSPEED": "true"})
    refuse_deepspeed_launch("shard", {})


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoraConfig(use_dora=True)}, "lora.use_dora=true with strategy=deepspeed"),
        ({"lora": LoraConfig(r=0)}, "lora.r=0 with quant=nf4: weights in 4 bits cannot train"),
        ({"optim": OptimConfig(kind="adamw8bit")}, "optim.kind=adamw8bit .* write optim=adamw"),
        ({"optim": OptimConfig(offload=True)}, "optim.offload=true .* strategy.zero.offload_opt"),
        ({"optim": OptimConfig(shard=True)}, "optim.shard=true .* ZeRO divides the optimizer's"),
        (
            {"schedule": ScheduleConfig(1)},
            "schedule.micro_batch_group=1 belongs to native strategies",
        ),
        ({"schedule": ScheduleConfig(kind="one_f_one_b")}, "schedule.kind=one_f_one_b belongs to"),
        ({"placement": Placement("offload")}, "activations=offload .* recompute or keep"),
        ({"placement": Placement(("recompute*5",))}, "recompute or keep, for all layers"),
        ({"placement": Placement(layer_inputs="host")}, "layer_inputs=host belongs to native"),
        ({"placement": Placement(embedding="host")}, "embedding=host belongs to native"),
        (
            {"placement": Placement(lm_head="quantized")},
            "lm_head=quantized belongs to native strategies",
        ),
        ({"placement": Placement(mlp_tile_tokens="all")}, "mlp_tile_tokens=all belongs to native"),
    ],
)
def test_what_belongs_to_native_strategies(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(tiny_strategy.SPEC, strategy=StrategyConfig("deepspeed"), **changes)


@pytest.mark.deepspeed
def test_the_planner_does_not_choose_for_it() -> None:
    with pytest.raises(UserError, match="activations=auto with strategy=deepspeed"):
        compose(["strategy=deepspeed", "activations=auto"])
