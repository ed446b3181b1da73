"""Liger's kernels against plain torch, which tests/model/test_functions.py compares with
transformers: on a card and, where there is none, in Triton's interpreter.
"""

from collections.abc import Callable

import pytest
import tiny
import tiny_liger
import torch
from torch import Tensor

from fttrain.data.batch import collate
from fttrain.model import functions, liger, rows
from fttrain.model.config import AUTO_KERNELS, LIGER_KERNELS, LoraConfig
from fttrain.plan.live_bytes import LiveBytes
from fttrain.util.errors import UserError

pytestmark = pytest.mark.liger
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
TILE_VALUES = 5 * 576  # neither divides what the tests pass
Case = Callable[[torch.device, torch.dtype], Callable[[], Tensor]]


@pytest.fixture(params=tiny_liger.DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    tiny_liger.prepare(monkeypatch, request.param)
    return torch.device(request.param)


def random(shape: tuple[int, ...], like: tuple[torch.device, torch.dtype], seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(*like)


def norm(shape: tuple[int, ...]) -> Case:
    def prepared(*like: object) -> Callable[[], Tensor]:
        x, weight = random(shape, like, 0) * 3, random(shape[-1:], like, 1)
        return lambda: functions.rms_norm(x, weight, EPS)

    return prepared


def norm_of_heads(heads: int, width: int) -> Case:
    """As q and k are normed: views of q, k and v side by side."""

    def prepared(*like: object) -> Callable[[], Tensor]:
        x, weight = random((13, heads + 3, width), like, 0)[:, 1:-2], random((width,), like, 1)
        return lambda: functions.rms_norm(x, weight, EPS)

    return prepared


def norm_backward(width: int, into: str) -> Case:
    """``into``: fresh | grad | other: part of a larger gradient."""

    def prepared(*like: object) -> Callable[[], Tensor]:
        x, grad = random((11, width), like, 0) * 3, random((11, width), like, 1)
        weight, whole = random((width,), like, 2), random((40, width), like, 3)

        def made() -> Tensor:
            own = grad.clone()
            out = {"fresh": None, "grad": own, "other": whole[20:31]}[into]
            result = functions.rms_norm_backward(own, x, weight, EPS, out)
            assert out is None or result is out
            assert into == "grad" or torch.equal(own, grad)
            return result

        return made

    return prepared


def norm_backward_of_heads(*like: object) -> Tensor:
    """Over the gradients of q, k and v, of which it changes its own part alone."""
    qkv, grads, weight = random((13, 9, 64), like, 0), random((13, 9, 64), like, 1), None
    weight = random((64,), like, 2)

    def made() -> Tensor:
        whole = grads.clone()
        own = whole[:, :5]
        functions.rms_norm_backward(own, qkv[:, :5], weight, EPS, out=own)
        return whole

    return made


def swiglu(width: int) -> Case:
    def prepared(*like: object) -> Callable[[], Tensor]:
        gate_up = random((40, 2 * width), like, 0)[7:18] * 4
        return lambda: functions.swiglu(gate_up)

    return prepared


def swiglu_backward(width: int, given: bool) -> Case:
    def prepared(*like: object) -> Callable[[], Tensor]:
        gate_up, grad = random((11, 2 * width), like, 0) * 4, random((11, width), like, 1)

        def made() -> Tensor:
            before, out = gate_up.clone(), torch.empty_like(gate_up) if given else None
            result = functions.swiglu_backward(grad, gate_up, out)
            assert out is None or result is out
            assert torch.equal(gate_up, before)
            return result

        return made

    return prepared


def rotation(heads: int, width: int, inner: bool = False) -> Case:
    """``inner``: of some heads of each row, as the gradients of q and k lie beside that of v."""

    def prepared(*like: object) -> Callable[[], Tensor]:
        x, angles = random((23, heads, width), like, 0), random((23, width // 2), like, 1) * 50
        cos, sin = (f(angles.float()).repeat(1, 2).to(like[1]) for f in (torch.cos, torch.sin))

        def made() -> Tensor:
            whole = x.clone()
            part = whole[:, :-2] if inner else whole
            assert functions.rotate_(part, cos, -sin) is part
            return whole

        return made

    return prepared


CASES: dict[str, Case] = {
    "norm of 576": norm((11, 576)),
    "norm of 960": norm((11, 960)),
    "norm of heads": norm_of_heads(4, 64),
    "norm of heads of 48": norm_of_heads(3, 48),
    "norm of contiguous heads": norm((7, 3, 64)),
    "norm of no rows": norm((0, 576)),
    "norm's gradient, fresh": norm_backward(576, "fresh"),
    "norm's gradient, in its place": norm_backward(960, "grad"),
    "norm's gradient, elsewhere": norm_backward(576, "other"),
    "norm's gradient of heads": norm_backward_of_heads,
    "SwiGLU of 1536": swiglu(1536),
    "SwiGLU of 100": swiglu(100),
    "SwiGLU's gradient": swiglu_backward(960, given=False),
    "SwiGLU's gradient, given a place": swiglu_backward(576, given=True),
    "rotation": rotation(9, 64),
    "rotation of 3 heads of 48": rotation(3, 48),
    "rotation of one head": rotation(1, 64),
    "rotation within wider rows": rotation(9, 64, inner=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_torch_does(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(rows, "TILE_VALUES", TILE_VALUES)
    compute = CASES[name](device, dtype)
    tiny_liger.use(False, device.type)
    expected = compute()
    tiny_liger.use(True, device.type)
    found = compute()
    # In bf16 both round, at other places: two units in the last place of values about 1.
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", [name for name in CASES if "no rows" not in name])
def test_kernels_make_no_more_than_torch(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str
) -> None:
    """At once, the result included."""
    monkeypatch.setattr(rows, "TILE_VALUES", TILE_VALUES)
    made = []
    for yes in (False, True):
        tiny_liger.use(yes, device.type)
        with LiveBytes() as live:
            compute = CASES[name](device, torch.bfloat16)
            live.start_peak()
            before = live.now
            compute()
        made.append(live.peak - before)
    assert 0 < made[1] <= made[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_decoder_layer_by_kernels_equals_one_by_torch(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    """Loss and gradients of a model of one layer, computed again in its backward."""
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("flash attention on a GPU takes no fp32")
    model, batch = tiny.model(name, num_hidden_layers=1), collate(tiny.documents((9, 5)), 0)
    found = []
    for yes in (False, True):
        tiny_liger.use(yes, device.type)
        decoder, store = tiny.build(model, lora=LoraConfig(r=4), dtype=dtype, device=device)
        found.append(tiny.run(decoder, store, [batch]))
    (expected_loss, expected), (loss, gradients) = found
    apart = {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    assert loss == pytest.approx(expected_loss, rel=apart)
    assert 0 < tiny.difference(gradients, expected) < apart


def test_they_are_named_and_can_be_left_out(device: torch.device) -> None:
    tiny_liger.use(True, device.type)
    assert liger.name() == "Liger's kernels"
    tiny_liger.use(False, device.type)
    assert liger.name() == "torch (kernels=torch)"
    assert not liger.takes(torch.ones(2, 16, device=device), 16)


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((2, 65536), torch.bfloat16, True),
        ((2, 65537), torch.bfloat16, False),
        ((0, 16), torch.bfloat16, False),
        ((2, 16), torch.float64, False),
    ],
)
def test_what_they_cannot_take_is_left_to_torch(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, taken: bool
) -> None:
    tiny_liger.use(True, device.type)
    assert liger.takes(torch.zeros(shape, dtype=dtype, device=device), shape[-1]) is taken


def test_kernels_that_break_are_refused_by_name_and_otherwise_left_out(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    import liger_kernel.ops.swiglu

    monkeypatch.delattr(liger_kernel.ops.swiglu, "swiglu_fused_gate_up_backward")  # another version
    liger.use(AUTO_KERNELS, device)
    assert liger.name().startswith(f"torch (Liger's kernels do not run on {device}: cannot import")
    with pytest.raises(UserError, match="kernels=liger: Liger's kernels do not run on"):
        liger.use(LIGER_KERNELS, device)
