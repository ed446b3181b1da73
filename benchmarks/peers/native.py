"""This project, behind the same two functions as its peers."""

from typing import Any

from peers.work import Row
from safetensors.torch import load_file

from fttrain.data.batch import MicroBatch, collate
from fttrain.distributed.rank_group import RankGroup
from fttrain.frozen.config import FrozenConfig, ModelConfig
from fttrain.frozen.source import resolve
from fttrain.model.config import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.builder import build_strategy
from fttrain.strategy.config import Placement, StrategyConfig
from fttrain.strategy.spec import StepSize, StrategySpec
from fttrain.util import schema


def trial_spec(job: dict[str, Any]) -> StrategySpec:
    """What the job says of a run."""
    return StrategySpec(
        schema.build(StrategyConfig, job["strategy"], "strategy"),
        QuantConfig(**job["quant"]),
        LoraConfig(**job["lora"]),
        OptimConfig(**job["optim"]),
        ScheduleConfig(**job["schedule"]),
        Placement(**job["placement"]),
        FrozenConfig(job["cache_dir"]),
        StepSize(job["micro_batch_size"], job["seq_len"], job["gradient_accumulation_steps"]),
        "bfloat16",
        job["seed"],
    )


class Native:
    """One rank of fttrain."""

    def __init__(self, job: dict[str, Any], group: RankGroup) -> None:
        spec = trial_spec(job)
        source = resolve(ModelConfig("benchmark", job["model"]))
        self._strategy, _ = build_strategy(spec, source, group)
        if not job["lora"]["use_dora"]:  # it has no magnitudes; the seed starts from the same A
            self._strategy.load_adapter_state(load_file(job["adapter"]))
        if not job.get("skip", True):
            for layer in self._strategy.decoder.layers:  # to see what leaving it out is worth
                layer.shell.mlp.down.unread = False
        self._lr = job["optim"]["lr"]

    def prepare(self, ranks: list[list[list[Row]]]) -> list[MicroBatch]:
        """The tensors of this rank's micro-batches of one step, of those of all ``ranks``. Nothing
        is padded. A stage of a pipeline has a part in all of them.
        """
        place, places = self._strategy.data_parallel
        in_order = [rows for same_turn in zip(*ranks, strict=True) for rows in same_turn]
        return [
            collate([document for row in in_order[index] for document in row], index)
            for index in range(place, len(in_order), places)
        ]

    def step(self, batches: list[MicroBatch], number: int) -> float:
        """One optimizer step. Returns the loss in nats per target token over all ranks."""
        return self._strategy.train_step(batches, number, self._lr, lambda loss, norm: True).loss
