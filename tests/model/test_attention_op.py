"""Packed attention against plain SDPA with a dense mask, document by document."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fttrain.model.attention_op import (
    _tiles,
    cuda_backward_bytes,
    varlen_attention,
    varlen_attention_backward,
)
from fttrain.util.units import KIB

CASES = {  # documents, window
    "one": ([24], 0),
    "several": ([5, 1, 13, 8], 0),
    "with an empty one": ([5, 0, 7], 0),
    "window": ([30, 5, 1, 9, 8, 16, 17], 8),
    "window of one": ([6, 3], 1),
    "window longer than all": ([5, 9], 64),
}
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
SCALE = 0.3


def inputs(
    tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a gradient; q, k and v as views of one projection, as the model has them."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, width, generator=generator)
    grad = torch.randn(tokens, heads, width, generator=generator)
    q, k, v = qkv.to(device, dtype).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v, grad.to(device, dtype)


def reference(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: list[int], window: int
) -> tuple[Tensor, Tensor]:
    """Output and gradients of q, k, v side by side, in fp64, over one dense mask."""
    document = torch.repeat_interleave(torch.tensor(lengths))
    place = torch.arange(len(document))
    distance = place[:, None] - place[None, :]
    mask = (document[:, None] == document[None, :]) & (distance >= 0)
    if window:
        mask &= distance < window
    tensors = [t.detach().double().cpu().requires_grad_() for t in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in tensors),
        attn_mask=mask,
        scale=SCALE,
        enable_gqa=True,
    )[0].transpose(0, 1)
    out.backward(grad.double().cpu())
    return out.detach(), torch.cat([t.grad for t in tensors if t.grad is not None], dim=1)


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double().cpu() - theirs).norm() / theirs.norm().clamp_min(1e-30))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_equals_dense_attention(
    case: tuple[list[int], int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    limit: float,
    device: str,
) -> None:
    if device == "cuda" and dtype == torch.float32:
        dtype, limit = torch.float16, 2e-3  # flash attention takes half precision only
    lengths, window = case
    q, k, v, grad = inputs(sum(lengths), *heads, 16, dtype, device)
    out, lse = varlen_attention(q, k, v, lengths, SCALE, window)
    grads = varlen_attention_backward(grad, q, k, v, out, lse, lengths, SCALE, window)
    expected_out, expected_grads = reference(q, k, v, grad, lengths, window)
    assert off(out, expected_out) < limit
    for ours, theirs in zip(
        grads.split([heads[0], heads[1], heads[1]], dim=1),
        expected_grads.split([heads[0], heads[1], heads[1]], dim=1),
        strict=True,
    ):
        # A token alone in its window has no gradient of q and k at all.
        assert off(ours, theirs) < 2 * limit or float(theirs.norm()) < 1e-9


@pytest.mark.parametrize("window", [0, 256])
def test_long_documents_in_bfloat16(window: int) -> None:
    """Past the length from which backward runs in bf16 itself."""
    lengths = [700, 513]
    q, k, v, grad = inputs(sum(lengths), 2, 1, 32, torch.bfloat16, "cpu")
    out, lse = varlen_attention(q, k, v, lengths, SCALE, window)
    grads = varlen_attention_backward(grad, q, k, v, out, lse, lengths, SCALE, window)
    expected_out, expected_grads = reference(q, k, v, grad, lengths, window)
    assert off(out, expected_out) < 1e-2
    assert off(grads, expected_grads) < 2e-2


def test_a_document_never_sees_another() -> None:
    lengths = [9, 12, 4]
    q, k, v, _ = inputs(sum(lengths), 4, 2, 16, torch.float32, "cpu")
    out, _ = varlen_attention(q, k, v, lengths, SCALE, 0)
    k, v = k.clone(), v.clone()
    k[9:21], v[9:21] = torch.nan, torch.nan
    poisoned, _ = varlen_attention(q, k, v, lengths, SCALE, 0)
    assert torch.equal(poisoned[:9], out[:9])
    assert torch.equal(poisoned[21:], out[21:])
    assert bool(poisoned[9:21].isnan().all())


@pytest.mark.parametrize("window", [0, 4])
def test_fake_kernels_agree_with_the_real_ones(window: int) -> None:
    lengths = [5, 6]
    q, k, v, grad = (t.contiguous() for t in inputs(11, 4, 2, 16, torch.float32, "cpu"))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(varlen_attention, (q, k, v, lengths, SCALE, window), test_utils=checks)
    out, lse = varlen_attention(q, k, v, lengths, SCALE, window)
    torch.library.opcheck(
        varlen_attention_backward,
        (grad, q, k, v, out, lse, lengths, SCALE, window),
        test_utils=checks,
    )


def test_no_tile_of_a_window_is_the_document_squared() -> None:
    tiles = _tiles(slice(10, 1010), 64, torch.device("cpu"))
    assert max(mask.numel() for _, _, mask in tiles if mask is not None) <= 64 * 128
    assert sum(rows.stop - rows.start for rows, _, _ in tiles) == 1000


@pytest.mark.parametrize("window", [None, 5])
def test_a_plain_transformers_model_can_use_the_operator(window: int | None) -> None:
    """Packed documents through the registry equal each document alone through sdpa."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    documents = [torch.randint(0, 50, (length,)) for length in (7, 12)]
    model.set_attn_implementation("sdpa")
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    alone.square().sum().backward()
    expected = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    model.set_attn_implementation("fttrain_varlen")
    packed = model(
        torch.cat(documents)[None],
        position_ids=torch.cat([torch.arange(len(document)) for document in documents])[None],
        lengths=tuple(len(document) for document in documents),
        use_cache=False,
    ).logits[0]
    packed.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    grad = model.model.layers[0].self_attn.k_proj.weight.grad
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_sliding"])
def test_a_plain_transformers_model_runs_on_it(name: str) -> None:
    """Registered with transformers: one packed row gives the logits and gradients of separate
    documents, and without lengths the row is one document.
    """
    packed, plain = (tiny.model(name) for _ in range(2))
    packed.set_attn_implementation("fttrain_varlen")
    lengths = (11, 1, 20)
    documents = [torch.tensor([ids]) for ids, _ in tiny.documents(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ours = packed(
        input_ids=torch.cat(documents, dim=1), position_ids=positions, lengths=lengths
    ).logits
    theirs = torch.cat([plain(input_ids=ids).logits for ids in documents], dim=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, expected in zip(packed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-3, atol=1e-3)
    one = packed(input_ids=documents[2]).logits
    torch.testing.assert_close(one, theirs[:, 12:], rtol=1e-4, atol=1e-4)


TAKEN_INSIDE = {  # (N, documents, H, K, D) -> fp32 and bf16 tensors, as mha_varlen_bwd makes them
    (8192, 200, 64, 8, 128): (  # Llama-3-70B: (N + 128 * documents, H, D), (H, N + 128 * documents)
        [(33792, 64, 128), (64, 33792)],
        [(8192, 64, 128)] * 3 + [(8192, 8, 128)] * 2,  # dk and dv of each query head, dq; dk, dv
    ),
    (1000, 3, 12, 12, 80): ([(1384, 12, 96), (12, 1384)], [(1000, 12, 80)] * 3),  # none are shared
    # Llama-2-7B: the parts beside the result are more than what the kernel takes inside
    (8192, 1, 32, 32, 128): ([(8320, 32, 128), (32, 8320)], [(8192, 32, 128)] * 3),
    (64, 1, 2, 1, 136): ([(192, 2, 192), (2, 192)], [(64, 2, 136)] * 3 + [(64, 1, 136)] * 2),
}


def values(shapes: list[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("shape", TAKEN_INSIDE, ids=str)
def test_what_backward_takes_inside_on_a_card(shape: tuple[int, int, int, int, int]) -> None:
    fp32, bf16 = TAKEN_INSIDE[shape]
    tokens, _, heads, kv_heads, width = shape
    result_bytes = 2 * tokens * (heads + 2 * kv_heads) * width  # made of three parts in bf16
    most = max(4 * values(fp32) + 2 * values(bf16), 2 * result_bytes)
    assert cuda_backward_bytes(*shape, 2) == most - result_bytes


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(16, 16, 128), (16, 2, 128), (6, 3, 64), (4, 2, 80)], ids=str)
@pytest.mark.parametrize("documents", [1, 50])
def test_a_card_takes_inside_what_is_foretold(documents: int, heads: tuple[int, int, int]) -> None:
    tokens, lengths = 4000, [4000 // documents] * documents
    q, k, v, grad = inputs(tokens, *heads, torch.bfloat16, "cuda")
    (out, lse), forward_bytes = measured(lambda: varlen_attention(q, k, v, lengths, SCALE, 0))
    grads, backward_bytes = measured(
        lambda: varlen_attention_backward(grad, q, k, v, out, lse, lengths, SCALE, 0)
    )
    foretold = cuda_backward_bytes(tokens, documents, *heads, 2) + grads.nbytes
    # Beside it: where documents begin, and numbers for a dropout that there is not.
    assert 0 <= forward_bytes - out.nbytes - lse.nbytes < 16 * KIB
    assert 0 <= backward_bytes - foretold < 16 * KIB


def measured(work: Callable[[], Any]) -> tuple[Any, int]:
    """What ``work`` gives, and the most that it asked torch's allocator for at once: as
    ``torch.cuda.max_memory_allocated``, but without the allocator's rounding.
    """
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = work()
    return found, torch.cuda.memory_stats()["requested_bytes.all.peak"] - before_bytes
