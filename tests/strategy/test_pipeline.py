"""What a stage takes on its device beside its layers, against the tensors that are really made."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch

from fttrain.dist import Group
from fttrain.model import head as head_module
from fttrain.model.head import Head
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.store.hostpool import HostPool
from fttrain.strategy.pipeline import fixed_bytes
from fttrain.strategy.recipe import Plan

STAGES = 3
TABLE_BYTES = 300 * 64 * 4


def fixed(stage: int, quant: Any = tiny_strategy.RECIPE.quant, **placement: str) -> int:
    frozen, group = tiny_strategy.base(quant=quant), Group(stage, STAGES, stage, tiny.CPU)
    recipe = replace(tiny_strategy.variant("pipeline", **placement), quant=quant)
    plan = Plan(recipe, group, frozen.architecture, frozen.frozen_format, HostPool(group))
    return fixed_bytes(plan)


def weights(quant: Any) -> list[int]:
    """Bytes of each group's weight, dequantised."""
    frozen = tiny_strategy.base(quant=quant)
    layer = FrozenLayer(frozen.flats[0], frozen.frozen_format)
    return [layer.weight(group).nbytes for group in frozen.frozen_format.groups]


@pytest.mark.parametrize("dequant", ["tile", "layer"])
def test_a_middle_stage_has_the_dequantised_weights(dequant: str) -> None:
    quant = replace(tiny_strategy.RECIPE.quant, dequant=dequant)
    found = weights(quant)
    assert fixed(1, quant) == (sum(found) if dequant == "layer" else max(found))


def test_without_quantisation_there_are_none() -> None:
    assert fixed(1, tiny.PLAIN) == 0


def test_the_first_stage_has_the_embedding() -> None:
    assert fixed(0) - fixed(1) == TABLE_BYTES
    assert fixed(0, embedding="host") == fixed(1)


@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_the_last_stage_has_the_head_and_a_chunk_of_logits(
    placement: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)
    head = Head(torch.ones(64), torch.zeros(300, 64), 1e-6)
    head.loss(torch.zeros(1, 64), torch.tensor([3]), torch.tensor([0]))
    assert head._scratch is not None
    chunk = sum(tensor.nbytes for tensor in head._scratch)
    assert fixed(STAGES - 1, head=placement) - fixed(1) == TABLE_BYTES + chunk
