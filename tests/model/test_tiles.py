"""A layer's MLP in tiles of tokens against all tokens at once, and against transformers + PEFT."""

from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor

from fttrain.data.batch import MicroBatch
from fttrain.model.config import LoraConfig
from fttrain.model.linears import DropoutKey
from fttrain.schedule import grouped
from fttrain.schedule.activations import Keep, Offload, Policy, Recompute
from fttrain.store.activations import HostActivations

TILE = 1024
DOCUMENTS = tiny.documents((900, 1300, 70), masked=0.2)  # 2304 rows: two tiles and a quarter
HOST_BYTES = 8 << 20  # more than one layer leaves


def offload() -> Policy:
    host = torch.empty(HOST_BYTES, dtype=torch.uint8)
    return Offload(HostActivations(host, 1, tiny.CPU))


POLICIES: dict[str, Callable[[], Policy]] = {
    "recompute": Recompute,
    "keep": Keep,
    "offload": offload,
}


def masks(batch: MicroBatch) -> DropoutKey:
    return DropoutKey(seed=3, step=5, micro_batch=batch.index)


def step(
    policy: str,
    tile_tokens: int,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    read: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a micro-batch. ``read``: backward may read the MLP's output."""
    lora = LoraConfig(r=4, lora_dropout=dropout)
    decoder, store = tiny.build(
        tiny.model("llama_bias"), lora=lora, dtype=dtype, mlp_tile_tokens=tile_tokens
    )
    for layer in decoder.layers:
        assert layer.shell.mlp.down.unread
        layer.shell.mlp.down.unread = not read
    policies = [POLICIES[policy]() for _ in decoder.layers]
    home, batches = tiny.gradient_home(decoder), [tiny.one_batch(DOCUMENTS)]
    attempt = grouped.forward_backward(decoder, store, batches, 1, policies, masks, home)
    return float(attempt.loss_sum), tiny.gradients(decoder)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", POLICIES)
def test_tiles_change_nothing_but_the_order_of_sums(policy: str, dropout: float) -> None:
    """An adapter's gradient is a sum over tokens, of tiles now; all the rest is row by row. A mask
    that followed the tiles would be far off.
    """
    loss, gradients = step(policy, 0, dropout)
    for tile_tokens in (TILE, 2 * TILE):
        tiled_loss, tiled = step(policy, tile_tokens, dropout)
        assert tiled_loss == pytest.approx(loss, rel=1e-7)
        assert tiny.difference(tiled, gradients) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policies_are_bit_equal_in_tiles(dtype: torch.dtype) -> None:
    loss, gradients = step("recompute", TILE, 0.3, dtype)
    others = [step("keep", TILE, 0.3, dtype), step("offload", TILE, 0.3, dtype)]
    others.append(step("recompute", TILE, 0.3, dtype, read=True))
    for other_loss, other in others:
        assert other_loss == loss
        assert all(torch.equal(other[n], gradients[n]) for n in gradients)


@pytest.mark.parametrize("policy", ["recompute", "keep"])
def test_tiles_equal_peft(policy: str) -> None:
    source, lora = tiny.model("qwen3"), LoraConfig(r=4, lora_alpha=10)
    decoder, store = tiny.build(source, lora=lora, mlp_tile_tokens=TILE)
    reference = tiny.with_peft(source, decoder, lora)
    expected = tiny.reference_loss(reference, DOCUMENTS)
    expected.backward()
    loss, gradients = tiny.run(decoder, store, [tiny.one_batch(DOCUMENTS)], activations=policy)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert tiny.difference(gradients, tiny.peft_gradients(reference, decoder)) <= 1e-5
