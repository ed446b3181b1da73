"""What a stage takes on its device beside its layers, against the tensors that are really made."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_strategy
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.ledger import MemoryLedger
from fttrain.model import head as head_module
from fttrain.model.head import Head
from fttrain.model.projection import Projection, QuantizedHead, ResidentHead, tiled_format
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer
from fttrain.strategy.context import BuildContext
from fttrain.strategy.pipeline import fixed_bytes
from fttrain.util.errors import UserError

STAGES = 3
TABLE_BYTES = 300 * 64 * 4


def fixed(
    stage: int, quant: Any = tiny_strategy.SPEC.quant, hidden: int = 64, **placement: str
) -> int:
    frozen = tiny_strategy.base(quant=quant, hidden_size=hidden)
    group = RankGroup(stage, STAGES, stage, tiny.CPU)
    spec = replace(tiny_strategy.variant("pipeline", **placement), quant=quant)
    context = BuildContext(
        spec, group, frozen.architecture, frozen.frozen_format, MemoryLedger(group)
    )
    return fixed_bytes(context)


def weights(quant: Any) -> list[int]:
    """Bytes of each group's weight, dequantised."""
    frozen = tiny_strategy.base(quant=quant)
    layer = FrozenLayer(frozen.flats[0], frozen.frozen_format)
    return [layer.weight(group).nbytes for group in frozen.frozen_format.groups]


@pytest.mark.parametrize("dequant", ["tile", "layer"])
def test_a_middle_stage_has_the_dequantised_weights(dequant: str) -> None:
    quant = replace(tiny_strategy.SPEC.quant, dequant=dequant)
    found = weights(quant)
    assert fixed(1, quant) == (sum(found) if dequant == "layer" else max(found))


def test_without_quantisation_there_are_none() -> None:
    assert fixed(1, tiny.PLAIN) == 0


def test_the_first_stage_has_the_embedding() -> None:
    assert fixed(0) - fixed(1) == TABLE_BYTES
    assert fixed(0, embedding="host") == fixed(1)


def quantised_bytes(form: FrozenFormat) -> int:
    """Of 300 x 64 values: codes, scales of 64 codes in 8 bits, their own scales and offset, each
    from a multiple of 256 on, and all of it one of lcm(1..8) x 256.
    """
    starts = [slot.offset_bytes for slot in form.layout.slots.values()]
    assert starts == [0, 9728, 10240, 10496]
    return 215040


@pytest.mark.parametrize("chunk_bytes", [1, 80000, 10**6])
@pytest.mark.parametrize("form", ["device", "host", "quantized"])
def test_the_last_stage_has_the_head_and_a_chunk_of_logits(
    form: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)
    table: Projection = ResidentHead(torch.zeros(300, 64))
    head_bytes, beside = TABLE_BYTES, 0
    if form == "quantized":
        tiles = tiled_format(300, 64, QuantConfig(), torch.float32)
        table = QuantizedHead(torch.zeros(300, 64), tiles, tiny.CPU)
        head_bytes = quantised_bytes(tiles)
    head = Head(torch.ones(64), table, 1e-6)
    head.metric_sums(torch.zeros(66, 64), torch.tensor([3] * 66), torch.arange(66))
    assert head._scratch is not None
    chunk = sum(tensor.nbytes for tensor in head._scratch)
    if form == "quantized":  # the one tile, its scales, the gradient and what is added to it
        beside = TABLE_BYTES + 4 * 300 + 2 * 4 * 64 * len(head._scratch[0])
    assert fixed(STAGES - 1, lm_head=form) - fixed(1) == head_bytes + chunk + beside


def test_a_head_that_cannot_be_quantised_is_refused_on_every_rank() -> None:
    message = "lm_head=quantized: rows of 96 values are not a multiple of quant.blocksize=64"
    for stage in range(STAGES):
        with pytest.raises(UserError, match=message):
            fixed(stage, tiny.PLAIN, hidden=96, lm_head="quantized")
    assert fixed(0, replace(tiny.PLAIN, blocksize=32), hidden=96, lm_head="quantized")
