"""How a layer's peak memory grows with the tokens: the live bytes of storages, on fake tensors.

What attention's kernels take inside themselves is not seen; all that goes in and comes out is.
"""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, Qwen3Config

from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture, Layer
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.plan.live_bytes import LiveBytes
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.schedule.activations import Keep, Policy, Recompute

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
TILE, RANK = 1024, 16
TOKENS = 12 * TILE  # from here on it is attention's backward that takes most, not a tile
SHAPES = {
    "Llama-2-7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "Qwen3-0.6B": Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
}


def peak_bytes(a: Architecture, policy: Policy, tokens: int, tile: int) -> int:
    """Of one layer's forward and backward, the layer's weights among them."""
    frozen_format = a.frozen_format(QuantConfig("none", double_quant=False), DTYPE)
    with FakeTensorMode(), LiveBytes() as live:
        adapters = LayerAdapters(0, a.groups, LoraConfig(r=RANK), CPU, DTYPE)
        adapters.bind_gradient(torch.zeros_like(adapters.flat))
        layer = Layer(a, adapters, tile)
        flat = torch.empty(frozen_format.layout.size_bytes, dtype=torch.uint8)
        layer.state.frozen, layer.state.lengths = FrozenLayer(flat, frozen_format), (tokens,)
        rotary = (torch.empty(tokens, a.head_dim, dtype=DTYPE),) * 2
        output, saved = policy.forward(layer, torch.empty(tokens, a.hidden, dtype=DTYPE), rotary)
        grad = torch.empty_like(output)
        del output
        policy.backward(layer, saved, grad, rotary)
    return live.peak


def growth_bytes(a: Architecture, policy: Callable[[], Policy], tile: int) -> float:
    """Of the peak, a token: between ``TOKENS`` and twice as many."""
    once, twice = (peak_bytes(a, policy(), tokens, tile) for tokens in (TOKENS, 2 * TOKENS))
    return (twice - once) / TOKENS


def attention_bytes(a: Architecture) -> int:
    """Of a token, what recompute has in attention's backward: q, k and v and their gradients; q and
    k rotated; the output, its gradient and fp32 log-sum-exp; cosine, sine and its negative; A x̂.
    """
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    return 2 * (2 * (q + 2 * kv) + (q + kv) + 2 * q + 3 * a.head_dim + 3 * RANK) + 4 * a.heads


def layer_ends_bytes(a: Architecture) -> int:
    """Of a token: the layer's input, the gradient of its output, that of the second residual."""
    return 2 * 3 * a.hidden


def saved_bytes(a: Architecture) -> int:
    """Of a token, what keep saves: input, q, k and v, output and log-sum-exp, second residual, gate
    and up.
    """
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    return 2 * (2 * a.hidden + 2 * (q + kv) + 2 * a.config.intermediate_size) + 4 * a.heads


@pytest.mark.parametrize("shape", SHAPES)
def test_recompute_grows_by_attention_and_layer_inputs_alone(shape: str) -> None:
    a = Architecture(SHAPES[shape])
    allowed = attention_bytes(a) + layer_ends_bytes(a)
    assert growth_bytes(a, Recompute, TILE) <= allowed
    assert growth_bytes(a, Recompute, 0) > 1.5 * allowed


@pytest.mark.parametrize("shape", SHAPES)
def test_keep_grows_by_what_it_saves_or_attention_takes(shape: str) -> None:
    """Whichever is more: as the MLP's backward begins all that is saved is there, in attention's
    gate and up are gone.
    """
    a = Architecture(SHAPES[shape])
    # Beside what is saved: the gradients of the output and the second residual, cosine and sine.
    in_mlp = saved_bytes(a) + 2 * (2 * a.hidden + 2 * a.head_dim)
    allowed = max(in_mlp, attention_bytes(a) + layer_ends_bytes(a))
    assert growth_bytes(a, Keep, TILE) <= allowed
    assert growth_bytes(a, Keep, 0) > 1.2 * allowed
