"""What is refused before anything is reserved."""

from typing import Any

import pytest
import tiny
import tiny_strategy
import torch

from fttrain.distributed.rank_group import RankGroup
from fttrain.model.decoder import Architecture
from fttrain.strategy.builder import StrategyBuilder
from fttrain.util.errors import UserError

CARD = RankGroup(0, 1, 0, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("dtype", "shape", "capability", "message"),
    [
        ("float32", {}, (8, 6), "model.dtype=float32: flash attention on a GPU"),
        ("bfloat16", {"head_dim": 20}, (8, 6), "heads have 20 values: .* multiples of 8 up to 256"),
        ("bfloat16", {"head_dim": 320}, (8, 6), "heads have 320 values"),
        ("bfloat16", {}, (7, 5), r"rank 0: RTX 2080 has compute capability 7\.5, .* 8\.0 \(RTX 30"),
    ],
)
def test_what_flash_attention_on_a_card_does_not_take(
    dtype: str,
    shape: dict[str, Any],
    capability: tuple[int, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2080")
    monkeypatch.setattr(RankGroup, "any", lambda self, flag: flag)  # its flag travels on the card
    spec = tiny_strategy.variant(dtype=dtype)
    architecture = Architecture(tiny.model(**shape).config)
    frozen_format = architecture.frozen_format(spec.quant, getattr(torch, dtype))
    with pytest.raises(UserError, match=message):
        StrategyBuilder(spec, architecture, frozen_format, CARD)
