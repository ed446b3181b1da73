"""The group of linears with LoRA against autograd over plain modules; dropout and its masks."""

import copy

import pytest
import tiny
import torch
from torch import Tensor

from fttrain.model import linears
from fttrain.model.config import MASK_TOKENS, LoraConfig
from fttrain.model.dora import Magnitudes, Member
from fttrain.model.layer_adapters import LayerAdapters
from fttrain.model.linears import DropoutKey, LayerState, LinearGroup
from fttrain.model.lora import GroupMembers
from fttrain.model.tiles import apply_linears
from fttrain.quant.frozen_layer import FrozenFormat, FrozenLayer, GroupShape

TOKENS, WIDTH, R, EPS = 13, 32, 3, 1e-5
SHAPE = GroupShape("qkv", WIDTH, (16, 8, 8), bias=True)
MEMBERS = GroupMembers(SHAPE, ("a.q_proj", "a.k_proj", "a.v_proj"))
TARGETS = ("q_proj", "v_proj")
KEY = DropoutKey(seed=1, step=2, micro_batch=3)


class Case:
    """One group with its frozen weights and adapters, all random, in fp32."""

    def __init__(
        self,
        prologue: str,
        dropout: float = 0.0,
        targets: tuple[str, ...] = TARGETS,
        dora: bool = False,
    ):
        frozen_format = FrozenFormat([SHAPE], {"norm": (WIDTH,)}, tiny.PLAIN, torch.float32)
        flat = torch.zeros(frozen_format.layout.size_bytes, dtype=torch.uint8)
        torch.manual_seed(0)
        for view in frozen_format.layout.views(flat).values():
            view.normal_()
        config = LoraConfig(R, 7, dropout, targets, use_dora=dora)
        self.layer = LayerAdapters(0, [MEMBERS], config, tiny.CPU, torch.float32)
        self.layer.flat.data.normal_()
        self.layer.bind_gradient(torch.zeros_like(self.layer.flat))
        self.layer.refresh()
        self.state = LayerState()
        self.state.frozen = self.frozen = FrozenLayer(flat, frozen_format)
        self.group = LinearGroup(
            SHAPE, 0, self.state, self.layer.groups.get("qkv"), prologue, "norm", EPS
        )
        width = 2 * WIDTH if prologue == "swiglu" else WIDTH
        self.x, self.grad = torch.randn(TOKENS, width), torch.randn(TOKENS, 32)

    def ours(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Output, gradient of x, gradients of the masters."""
        self.layer.grad.zero_()
        x = self.x.clone().requires_grad_()
        y = apply_linears(x, self.group)
        y.backward(self.grad)
        assert x.grad is not None
        return y.detach(), x.grad, _master_gradients(self.layer)

    def reference(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The same by autograd, with the same masks."""
        x = self.x.clone().requires_grad_()
        masters = {n: m.detach().clone().requires_grad_() for n, m in self.layer.named_masters()}
        norm = self.frozen.tensor("norm")
        inputs = {
            "none": lambda: x,
            "rmsnorm": lambda: torch.nn.functional.rms_norm(x, (WIDTH,), norm, EPS),
            "swiglu": lambda: torch.nn.functional.silu(x[:, :WIDTH]) * x[:, WIDTH:],
        }[self.group.prologue]()
        parts = []
        for member, path in enumerate(MEMBERS.paths):
            rows = SHAPE.rows[member]
            bias = self.frozen.bias("qkv")
            assert bias is not None
            y = inputs @ self.frozen.weight("qkv")[rows].t() + bias[rows]
            a = masters.get(f"model.layers.0.{path}.lora_A")
            if a is not None:
                b = masters[f"model.layers.0.{path}.lora_B"]
                y = y + inputs * self.mask(member, inputs) @ a.t() @ b.t() * (7 / R)
                m = masters.get(f"model.layers.0.{path}.lora_magnitude_vector")
                if m is not None:
                    whole = self.frozen.weight("qkv")[rows] + (7 / R) * b @ a
                    y = (y - bias[rows]) * m / whole.norm(dim=1).detach() + bias[rows]
            parts.append(y)
        out = torch.cat(parts, dim=-1)
        out.backward(self.grad)
        assert x.grad is not None
        found = {n: m.grad for n, m in masters.items() if m.grad is not None}
        return out.detach(), x.grad, found

    def mask(self, member: int, inputs: Tensor) -> Tensor:
        if self.state.dropout is None:
            return torch.ones_like(inputs)
        return linears._mask(self.group, member, inputs.detach(), self.state.dropout)


def _master_gradients(layer: LayerAdapters) -> dict[str, Tensor]:
    return {name: grad.clone() for name, grad in layer.named(layer.grad)}


def assert_equal_to_autograd(case: Case) -> None:
    y, grad_x, grads = case.ours()
    expected_y, expected_grad_x, expected = case.reference()
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_x, expected_grad_x, rtol=1e-4, atol=1e-4)
    assert tiny.difference(grads, expected) < 1e-6


@pytest.mark.parametrize("prologue", ["none", "rmsnorm", "swiglu"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_equals_autograd(prologue: str, dropout: float, recomputing: bool, dora: bool) -> None:
    case = Case(prologue, dropout, dora=dora)
    case.state.dropout = KEY if dropout else None
    case.state.recomputing = recomputing
    assert_equal_to_autograd(case)


@pytest.mark.parametrize("prologue", ["none", "rmsnorm", "swiglu"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
def test_a_group_whose_output_nobody_reads_has_the_same_gradients(
    prologue: str, dropout: float, dora: bool
) -> None:
    case = Case(prologue, dropout, dora=dora)
    case.state.dropout = KEY if dropout else None
    _, grad_x, grads = case.ours()
    unread = copy.copy(case)
    unread.group = copy.copy(case.group)
    unread.group.unread = unread.state.recomputing = True
    y, unread_grad_x, unread_grads = unread.ours()
    assert not y.any()
    assert y.untyped_storage().nbytes() == 4
    assert torch.equal(grad_x, unread_grad_x)
    assert all(torch.equal(grads[n], unread_grads[n]) for n in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_start_as_the_norms_of_frozen_rows_and_change_no_bit(dtype: torch.dtype) -> None:
    shape = GroupShape("qkv", WIDTH, (16, 8, 8))
    members = GroupMembers(shape, MEMBERS.paths)
    frozen_format = FrozenFormat([shape], {}, tiny.PLAIN, dtype)
    flat = torch.zeros(frozen_format.layout.size_bytes, dtype=torch.uint8)
    state, found = LayerState(), []
    state.frozen = frozen = FrozenLayer(flat, frozen_format)
    frozen.weight("qkv").normal_()
    x = torch.randn(TOKENS, WIDTH, dtype=dtype)
    for dora in (False, True):
        config = LoraConfig(R, target_modules=TARGETS, use_dora=dora)
        layer = LayerAdapters(0, [members], config, tiny.CPU, dtype)
        layer.reset(0)
        if dora:
            layer.start_magnitudes(frozen)
        group = LinearGroup(shape, 0, state, layer.groups["qkv"], "none")
        with torch.no_grad():
            found.append(apply_linears(x, group))
    assert torch.equal(*found)
    magnitudes = dict(layer.named_masters())["model.layers.0.a.v_proj.lora_magnitude_vector"]
    rows = frozen.weight("qkv")[shape.rows[2]].float()
    torch.testing.assert_close(magnitudes, rows.norm(dim=1))


def test_a_large_bias_does_not_drown_the_magnitudes_gradient() -> None:
    """Both in bf16, a bias far larger than what it is added to; reference: the same in fp64."""
    members = [Member(slice(0, 4), slice(0, 2), slice(0, 4))]
    magnitudes = Magnitudes(torch.full((4,), 2.0), members)
    torch.manual_seed(0)
    u, grad = 3 * torch.randn(2048, 4).bfloat16(), torch.randn(2048, 4).bfloat16()
    bias = torch.tensor([0.0, 10.0, 60.0, 100.0]).bfloat16()
    y = u + bias
    exact = (grad.double() * (y.double() - bias.double())).sum(0) / 2
    found = magnitudes.gradient(grad, y, bias)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)


def test_gradients_of_several_micro_batches_add_up() -> None:
    case = Case("rmsnorm")
    _, _, once = case.ours()
    for _ in range(2):
        apply_linears(case.x.clone().requires_grad_(), case.group).backward(case.grad)
    thrice = _master_gradients(case.layer)
    assert tiny.difference(thrice, {n: g * 3 for n, g in once.items()}) < 1e-6


def test_use_outside_get_and_release_is_an_error() -> None:
    case = Case("none")
    case.state.frozen = None
    with pytest.raises(AssertionError, match="outside the store's get and release"):
        apply_linears(case.x, case.group)


def test_evaluation_has_no_dropout() -> None:
    with_dropout, without = Case("none", 0.5), Case("none", 0.0)
    found, expected = (apply_linears(case.x, case.group) for case in (with_dropout, without))
    assert torch.equal(found, expected)


def big_mask(key: DropoutKey = KEY, layer: int = 0, member: int = 0, rate: float = 0.3) -> Tensor:
    group = copy.copy(Case("none", rate, targets=("q_proj", "k_proj", "v_proj")).group)
    group.layer = layer
    return linears._mask(group, member, torch.zeros(500, 400), key)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_rate_and_scale_of_dropout(rate: float) -> None:
    mask = big_mask(rate=rate)
    kept = mask != 0
    assert float(kept.float().mean()) == pytest.approx(1 - rate, abs=0.01)
    assert mask[kept].unique().tolist() == pytest.approx([1 / (1 - rate)])
    assert float(mask.mean()) == pytest.approx(1, abs=0.02)


def test_masks_depend_on_their_key_and_on_nothing_else() -> None:
    first = big_mask()
    torch.manual_seed(5)
    torch.rand(100)
    assert torch.equal(big_mask(), first)
    others = [
        big_mask(DropoutKey(2, 2, 3)),
        big_mask(DropoutKey(1, 3, 3)),
        big_mask(DropoutKey(1, 2, 4)),
        big_mask(DropoutKey(12, 3, 3)),
        big_mask(layer=1),
        big_mask(member=1),
    ]
    for other in others:
        both = float(((first != 0) & (other != 0)).float().mean())
        assert both == pytest.approx(0.7 * 0.7, abs=0.01)  # independent


def test_the_mask_of_a_tile_is_its_part_of_the_whole() -> None:
    group = Case("none", 0.3, targets=("q_proj",)).group
    inputs = torch.zeros(3 * MASK_TOKENS + 100, 8)
    whole = linears._mask(group, 0, inputs, KEY)
    for tile in (MASK_TOKENS, 2 * MASK_TOKENS):
        for start in range(0, len(inputs), tile):
            rows = slice(start, start + tile)
            part = linears._mask(group, 0, inputs[rows], KEY.at(start))
            assert torch.equal(part, whole[rows])
    first, second = whole[:MASK_TOKENS] != 0, whole[MASK_TOKENS : 2 * MASK_TOKENS] != 0
    both = float((first & second).float().mean())
    assert both == pytest.approx(0.7 * 0.7, abs=0.02)  # independent


def test_a_tile_that_cuts_a_block_of_the_mask_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no block of a mask begins with token 1000"):
        KEY.at(1000)
