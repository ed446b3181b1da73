"""Kernels that deliver something else than they have to are named."""

import bitsandbytes.functional as bnb
import pytest
import tiny_liger
import torch

from fttrain.doctor import kernels
from fttrain.doctor.finding import FAILURE, OK, WARNING

CPU = torch.device("cpu")


def test_the_kernels_of_this_machine_are_right() -> None:
    for check in (kernels.quantiser, kernels.attention):
        assert check(CPU).verdict == OK, check(CPU)


def test_the_known_codes_are_those_of_bitsandbytes_table() -> None:
    """The values here are the paper's; the library's own table is another account of them."""
    assert torch.equal(torch.tensor(kernels.NF4), bnb.get_4bit_type("nf4", device="cpu"))


def test_a_quantiser_that_corrupts_one_byte_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bnb.quantize_4bit

    def flips(*args, **settings):
        packed, state = right(*args, **settings)
        packed.view(-1)[100] ^= 0x10
        return packed, state

    monkeypatch.setattr(bnb, "quantize_4bit", flips)
    found = kernels.quantiser(CPU)
    assert found.verdict == FAILURE
    assert "1 of 32768 values and 1 of 16384 bytes" in found.figure


def test_a_library_that_does_not_load_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **settings):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(bnb, "quantize_4bit", broken)
    found = kernels.quantiser(CPU)
    assert found.verdict == FAILURE
    assert "libcudart.so.12" in found.figure


@pytest.mark.parametrize("fault", [lambda out: out * 1.1, lambda out: out * torch.nan])
def test_attention_that_is_wrong_is_caught(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.varlen_attention
    monkeypatch.setattr(
        kernels, "varlen_attention", lambda *args: (fault(right(*args)[0]), right(*args)[1])
    )
    assert kernels.attention(CPU).verdict == FAILURE


@pytest.mark.liger
@pytest.mark.parametrize("device", tiny_liger.DEVICES)
def test_kernels_of_liger_are_right_and_one_that_is_not_is_named(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_liger.prepare(monkeypatch, device)
    found = kernels.norm_rotary_swiglu(torch.device(device))
    assert found.verdict == OK, found
    right = kernels.liger.rms_norm_backward
    monkeypatch.setattr(
        kernels.liger, "rms_norm_backward", lambda *args: right(*args).mul_(torch.nan)
    )
    found = kernels.norm_rotary_swiglu(torch.device(device))
    assert (found.verdict, found.figure) == (
        FAILURE,
        "norm's gradient is off by nan of the largest value",
    )


def test_where_kernels_of_liger_cannot_run_runs_go_without() -> None:
    found = kernels.norm_rotary_swiglu(CPU)
    assert (found.verdict, found.figure) == (
        WARNING,
        "Liger's kernels run on a GPU, not on cpu: runs take torch's kernels",
    )


@pytest.mark.cuda
def test_the_kernels_of_a_card_are_right() -> None:
    for check in (kernels.quantiser, kernels.attention):
        assert check(torch.device("cuda", 0)).verdict == OK, check(torch.device("cuda", 0))
