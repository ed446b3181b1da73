"""Chunked cross entropy over a frozen head against autograd over full logits."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import tiny_objective
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fttrain.data.batch import IGNORE
from fttrain.model import head as head_module
from fttrain.model import projection
from fttrain.model.functions import rms_norm
from fttrain.model.head import Embedding, Head, chunk_bytes, chunk_rows
from fttrain.model.projection import (
    QuantizedHead,
    ResidentHead,
    StreamedHead,
    tile_bytes,
    tiled_format,
)
from fttrain.objective.objective import Objective
from fttrain.quant.config import QuantConfig
from fttrain.quant.frozen_layer import FrozenFormat

TOKENS, WIDTH, VOCABULARY, EPS = 41, 64, 97, 1e-6
FORMS, TILE_ROWS = ("table", "tiles"), 64


def ends(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Norm (C,) and table (V, C)."""
    generator = torch.Generator().manual_seed(0)
    norm = torch.randn(WIDTH, generator=generator) + 1
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return norm.to(dtype), weight.to(dtype)


def head(
    dtype: torch.dtype = torch.float32, logit_scale: float = 1.0, form: str = "table"
) -> tuple[Head, Tensor]:
    """A head, and the table (V, C) that it computes with: of ``tiles`` what 4 bits leave of it."""
    norm, weight = ends(dtype)
    if form == "table":
        return Head(norm, ResidentHead(weight), EPS, logit_scale), weight
    quantised = QuantizedHead(weight, tiled(weight), torch.device("cpu"))
    table = torch.cat([dequantised(tile) for tile in weight.split(TILE_ROWS)])
    return Head(norm, quantised, EPS, logit_scale), table


def tiled(weight: Tensor) -> FrozenFormat:
    """In tiles of TILE_ROWS rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "TILE_BYTES", 1)
        return tiled_format(*weight.shape, QuantConfig(), weight.dtype)


def dequantised(weight: Tensor) -> Tensor:
    """Quantised and dequantised by bitsandbytes alone."""
    return bnb.dequantize_4bit(
        *bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    )


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[::3] = IGNORE
    return hidden.to(dtype), targets


def trained(targets: Tensor) -> Tensor:
    return (targets != IGNORE).nonzero().squeeze(-1)


def reference(head: Head, table: Tensor, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum and gradient of ``hidden`` in fp64 by autograd over all logits at once."""
    x = hidden.detach().double().requires_grad_()
    variance = x.square().mean(-1, keepdim=True)
    normed = x * torch.rsqrt(variance + EPS) * head.norm.double()
    logits = normed @ table.double().t() * head.logit_scale
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    squares = logits[targets != IGNORE].logsumexp(-1).square()
    (loss + head.z_loss * squares.sum()).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_bytes", [1, 3 * VOCABULARY * 8, 10**8])
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_equals_full_logits(
    dtype: torch.dtype,
    limit: float,
    logit_scale: float,
    chunk_bytes: int,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    (ours, table), (hidden, targets) = head(dtype, logit_scale, form), batch(dtype)
    before = hidden.clone()
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets))
    expected_loss, expected_grad = reference(ours, table, hidden, targets)
    assert float(loss) == pytest.approx(float(expected_loss), rel=limit)
    assert float((grad.double() - expected_grad).norm() / expected_grad.norm()) < limit
    assert not grad[::3].any()
    assert float(ours.metric_sums(hidden, targets, trained(targets))) == pytest.approx(
        float(loss), rel=1e-6
    )
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("logit_scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_z_loss_equals_full_logits_and_shows_in_the_gradient_alone(
    dtype: torch.dtype, limit: float, logit_scale: float, form: str
) -> None:
    (ours, table), (hidden, targets) = head(dtype, logit_scale, form), batch(dtype)
    without, plain = ours.loss_and_gradient(hidden, targets, trained(targets))
    ours.z_loss = 0.1
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets))
    _, expected = reference(ours, table, hidden, targets)
    assert float((grad.double() - expected).norm() / expected.norm()) < limit
    assert float((grad - plain).norm() / plain.norm()) > 0.1
    assert loss == without


COUNTS = (5, 0, 12, 10)  # targets of each sequence; one has none


def plain_objective(
    head: Head, table: Tensor, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss sum of the head's objective and gradient of what is minimised, in fp64 by autograd over
    all logits at once.
    """
    x = hidden.detach().double().requires_grad_()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * head.norm.double()
    logits = (normed @ table.double().t() * head.logit_scale)[trained(targets)]
    values = logits.log_softmax(-1).gather(1, targets[trained(targets), None])[:, 0]
    counts = [count for count in COUNTS if count]
    loss = tiny_objective.plain_loss(head.objective, values, counts)
    (loss + head.z_loss * logits.logsumexp(-1).square().sum()).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def head_of_form(form: str, dtype: torch.dtype, logit_scale: float) -> tuple[Head, Tensor]:
    """A head with lm_head=``form``, and the table (V, C) that it computes with."""
    if form == "host":
        norm, weight = ends(dtype)
        return Head(norm, StreamedHead(weight, torch.device("cpu")), EPS, logit_scale), weight
    return head(dtype, logit_scale, "tiles" if form == "quantized" else "table")


@pytest.mark.parametrize("form", ["device", "host", "quantized"])
@pytest.mark.parametrize(
    "objective", [tiny_objective.Sequences(), tiny_objective.Weighted()], ids=str
)
@pytest.mark.parametrize(
    ("z_loss", "logit_scale"), [(0.0, 1.0), (0.1, 0.25)], ids=["plain", "z_loss"]
)
@pytest.mark.parametrize("chunk_bytes", [1, 10**8], ids=["chunks", "one chunk"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_two_passes_equal_autograd_over_full_logits(
    dtype: torch.dtype,
    limit: float,
    chunk_bytes: int,
    z_loss: float,
    logit_scale: float,
    objective: Objective,
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    (ours, table), (hidden, targets) = head_of_form(form, dtype, logit_scale), batch(dtype)
    ours.objective, ours.z_loss = objective, z_loss
    with ours.on_device():
        loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets), COUNTS)
    expected_loss, expected_grad = plain_objective(ours, table, hidden, targets)
    assert float(loss) == pytest.approx(float(expected_loss), rel=limit)
    assert float((grad.double() - expected_grad).norm() / expected_grad.norm()) < limit
    assert not grad[::3].any()


@pytest.mark.parametrize("form", ["device", "host", "quantized"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_supervised_in_two_passes_is_supervised_in_one(
    dtype: torch.dtype, z_loss: float, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 1)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    (ours, _), (hidden, targets) = head_of_form(form, dtype, 0.5), batch(dtype)
    ours.z_loss = z_loss
    with ours.on_device():
        loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets), COUNTS)
        ours.objective = tiny_objective.TwoPasses()
        again, grad_again = ours.loss_and_gradient(hidden, targets, trained(targets), COUNTS)
    assert float(again) == pytest.approx(float(loss), rel=1e-12)
    assert torch.equal(grad_again, grad)


@pytest.mark.parametrize("tokens", [0, 5])
def test_an_objective_is_not_asked_about_no_targets(tokens: int) -> None:
    hidden, targets = torch.randn(tokens, WIDTH), torch.full((tokens,), IGNORE)
    ours, _ = head()
    ours.objective = tiny_objective.Sequences()
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets), (0,))
    assert float(loss) == 0
    assert not grad.any()


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the vocabulary's width has more rows than the chunk that was asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2:
                shape = result.shape
                if shape[1] == VOCABULARY and shape[0] != WIDTH:  # not the weight transposed
                    rows.append(shape[0])
            return result

    chunk_rows = 4
    monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk_rows * VOCABULARY * 8)
    monkeypatch.setattr(head_module, "ROW_MULTIPLE", 2)
    ours, _ = head()
    with Watch():
        hidden, targets = batch()
        ours.loss_and_gradient(hidden, targets, trained(targets))
    assert rows
    assert max(rows) <= chunk_rows


def peak_bytes(run: Callable[[], object], trace: Path) -> int:
    """The most memory that torch's allocator gave out while ``run`` ran: all of it, also what a
    kernel takes for itself and no operator shows.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    live = top = 0
    for event in sorted(
        (e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"]
    ):
        live += event["args"]["Bytes"]
        top = max(top, live)
    return top


@pytest.mark.parametrize(
    ("form", "dtype", "tokens"),
    [
        ("table", torch.bfloat16, 4096),
        ("tiles", torch.bfloat16, 4096),
        ("tiles", torch.float32, 1024),  # no copy of softmax hides what a tile takes
    ],
    ids=str,
)
def test_a_large_vocabulary_takes_what_is_booked(
    form: str, dtype: torch.dtype, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 128256  # logits of 4096 tokens at once: 1 GB in bf16, 2 GB in fp32
    monkeypatch.setattr(projection, "TILE_BYTES", 8 * 2**20)
    weight = (torch.randn(vocabulary, WIDTH) * 0.02).to(dtype)
    table: ResidentHead | QuantizedHead = ResidentHead(weight)
    rows = chunk_rows(vocabulary, dtype, tokens, 4 if form == "tiles" else 1)
    booked = chunk_bytes(vocabulary, dtype, rows)
    if form == "tiles":
        tiles = tiled_format(vocabulary, WIDTH, QuantConfig(), dtype)
        table = QuantizedHead(weight, tiles, torch.device("cpu"))
        booked = chunk_bytes(vocabulary, dtype, rows, tile_bytes(tiles, rows))
    ours = Head(torch.ones(WIDTH, dtype=dtype), table, EPS)
    hidden = torch.randn(tokens, WIDTH).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    run = partial(ours.loss_and_gradient, hidden, targets, trained(targets))
    of_hidden = 4 * tokens * WIDTH * dtype.itemsize  # gradient, and what a chunk reads and writes
    assert booked <= peak_bytes(run, tmp_path / "trace.json") <= booked + of_hidden


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_without_targets_nothing_is_lost_and_nothing_is_nan(tokens: int, form: str) -> None:
    hidden, targets = torch.randn(tokens, WIDTH), torch.full((tokens,), IGNORE)
    ours, _ = head(form=form)
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets))
    assert float(loss) == 0
    assert grad.shape == hidden.shape
    assert not grad.any()
    assert float(ours.metric_sums(hidden, targets, trained(targets))) == 0


def test_a_hopeless_target_has_a_finite_loss_and_a_nan_shows() -> None:
    (ours, table), (hidden, targets) = head(), batch()
    sure = Head(ours.norm, ResidentHead(table * 1000), EPS)
    loss, grad = sure.loss_and_gradient(hidden, targets, trained(targets))
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())
    hidden[1, 0] = torch.nan
    loss, grad = ours.loss_and_gradient(hidden, targets, trained(targets))
    assert bool(loss.isnan())
    assert bool(grad[1].isnan().any())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_logits(tokens: int, form: str) -> None:
    (ours, table), (hidden, _) = head(logit_scale=0.5, form=form), batch()
    expected = rms_norm(hidden[:tokens], ours.norm, EPS) @ table.t() * 0.5
    torch.testing.assert_close(ours.logits(hidden[:tokens]), expected)


def test_embedding() -> None:
    _, table = ends(torch.float32)
    ids = torch.tensor([3, 3, 90])
    assert torch.equal(Embedding(table)(ids), table[ids])
    assert torch.equal(Embedding(table, 2.0)(ids), table[ids] * 2)
