"""This project, behind the same two functions as its peers."""

from typing import Any

from peers.work import Row
from safetensors.torch import load_file

from fttrain.checkpoint.source import ModelConfig, resolve
from fttrain.data.batch import MicroBatch, collate
from fttrain.dist import Group
from fttrain.model.lora import LoraConfig
from fttrain.optim.factory import OptimConfig
from fttrain.quant.scheme import QuantConfig
from fttrain.schedule import ScheduleConfig
from fttrain.strategy.build import Recipe, build_strategy
from fttrain.strategy.protocol import StrategyConfig


class Native:
    """One rank of fttrain."""

    def __init__(self, job: dict[str, Any], group: Group) -> None:
        recipe = Recipe(
            StrategyConfig(),
            QuantConfig(**job["quant"]),
            LoraConfig(**job["lora"]),
            OptimConfig(**job["optim"]),
            ScheduleConfig(job["group"]),
            job["activations"],
            "bfloat16",
            job["seed"],
        )
        source = resolve(ModelConfig("benchmark", job["model"]))
        self._strategy = build_strategy(recipe, source, group)
        self._strategy.load_adapter_state(load_file(job["adapter"]))
        self._group, self._lr = group, job["optim"]["lr"]

    def prepare(self, micro_batches: list[list[Row]]) -> list[MicroBatch]:
        """The tensors of this rank's micro-batches of one step. Nothing is padded."""
        return [
            collate(
                [document for row in rows for document in row],
                accumulated * self._group.world_size + self._group.rank,
            )
            for accumulated, rows in enumerate(micro_batches)
        ]

    def step(self, batches: list[MicroBatch], number: int) -> float:
        """One optimizer step. Returns the loss in nats per target token over all ranks."""
        return self._strategy.train_step(batches, number, self._lr, lambda loss, norm: True).loss
