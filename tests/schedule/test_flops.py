"""What each activation policy computes, in FLOPs: counted at Llama-3-70B's shape on fake tensors.

GEMMs are counted by torch; attention, an operator of our own, by the formula: two GEMMs forward and
five backward over half of a causal square.
"""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from fttrain.model.config import LoraConfig
from fttrain.model.decoder import Architecture, Layer
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.plan.work import layer_work
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.schedule.activations import Keep, Policy, Recompute

CPU = torch.device("cpu")
TOKENS, RANK = 2048, 16
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


def addmm_flops(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Of shapes (m, k) and (k, n): torch counts addmm, but not the one in place."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def gemm_flops(architecture: Architecture, policy: Policy, skip: bool, tile: int = 0) -> int:
    """Of one layer's forward and backward over ``TOKENS`` tokens. ``skip``: leave out what backward
    never reads when the layer is run again. ``tile``: tokens that pass the MLP at once, 0: all.
    """
    lora = LoraConfig(r=RANK)
    plain = QuantConfig("none", double_quant=False)
    frozen_format = architecture.frozen_format(plain, torch.bfloat16)
    with FakeTensorMode():
        adapters = LayerAdapters(0, architecture.groups, lora, CPU, torch.bfloat16)
        adapters.bind_gradient(torch.zeros_like(adapters.flat))
        layer = Layer(architecture, adapters, tile)
        flat = torch.empty(frozen_format.layout.size_bytes, dtype=torch.uint8)
        layer.state.frozen, layer.state.lengths = FrozenLayer(flat, frozen_format), (TOKENS,)
        if not skip:
            layer.shell.mlp.down.unread = False
        hidden = torch.empty(TOKENS, architecture.hidden, dtype=torch.bfloat16)
        rotary = (torch.empty(TOKENS, architecture.head_dim, dtype=torch.bfloat16),) * 2
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}
        ) as counter:
            output, saved = policy.forward(layer, hidden, rotary)
            policy.backward(layer, saved, torch.empty_like(output), rotary)
    return int(counter.get_total_flops())


def stated(a: Architecture) -> dict[str, int]:
    """FLOPs of a token in the parts of a layer's forward."""
    members = [
        (group.shape.in_features, out) for group in a.groups for out in group.shape.out_features
    ]
    down_in = a.config.intermediate_size
    return {
        "frozen": sum(2 * i * o for i, o in members),
        "down": 2 * down_in * a.hidden,
        "lora_a": sum(2 * i * RANK for i, _ in members),
        "lora_b": sum(2 * RANK * o for _, o in members),
        "lora_a of down": 2 * down_in * RANK,
        "lora_b of down": 2 * RANK * a.hidden,
    }


@pytest.mark.parametrize("tile", [0, TOKENS // 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_policy_computes_what_it_says(shape: str, tile: int) -> None:
    a = Architecture(LlamaConfig(**SHAPES[shape]))
    part = stated(a)
    forward = part["frozen"] + part["lora_a"] + part["lora_b"]
    # Backward: gradients of the inputs, and of A and B; no gradient of a frozen weight.
    backward = part["frozen"] + 2 * (part["lora_a"] + part["lora_b"])
    whole = forward + backward
    # What keep saves are inputs of prologues: A's projections are made again, no frozen linear is.
    assert gemm_flops(a, Keep(), True, tile) == TOKENS * (whole + part["lora_a"])
    assert gemm_flops(a, Recompute(), False, tile) == TOKENS * (whole + forward)
    # Skipped in the second forward: down_proj and its B; A's projection is part of its backward.
    skipped = part["down"] + part["lora_b of down"]
    assert gemm_flops(a, Recompute(), True, tile) == TOKENS * (whole + forward - skipped)


@pytest.mark.parametrize("policy", [Recompute(), Keep()])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_reckons_with_what_is_computed(shape: str, policy: Policy) -> None:
    a = Architecture(LlamaConfig(**SHAPES[shape]))
    name = type(policy).__name__.lower()
    work = layer_work(a, LoraConfig(r=RANK), name, TOKENS)
    passes = 1 + 2.5 + (name == "recompute")
    attention = passes * 2 * 2 * (TOKENS / 2) * a.heads * a.head_dim
    counted = gemm_flops(a, policy, True) / TOKENS
    assert work.forward + work.backward == pytest.approx(counted + attention)


def test_the_ratios_of_a_70b_step_are_those_of_the_design() -> None:
    a = Architecture(LlamaConfig(**SHAPES["Llama-3-70B"]))
    attention = 2 * 2 * (TOKENS / 2) * a.heads * a.head_dim  # of a token's forward, causal
    head = 2 * 2 * a.hidden * a.config.vocab_size  # logits, and the gradient of their input
    for policy, skip, again, giga in (
        (Recompute(), False, 1, 429),
        (Recompute(), True, 1, 391),
        (Keep(), True, 0, 289),
    ):
        gemms = gemm_flops(a, policy, skip) / TOKENS
        step = a.layers * (gemms + attention * (1 + 2.5 + again)) + head
        assert step / 1e9 == pytest.approx(giga, abs=1)
