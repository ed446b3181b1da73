"""A share of a card's multiprocessors: slower, forward and backward alike."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

Module = Callable[[str], ModuleType]
pytestmark = pytest.mark.cuda


class WhichStream(torch.autograd.Function):
    """The identity; its backward notes the stream that it is asked on."""

    seen: ClassVar[list[int]] = []

    @staticmethod
    def forward(_context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_context: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        WhichStream.seen.append(torch.cuda.current_stream().cuda_stream)
        return grad


def test_a_quarter_multiplies_at_less_than_half_the_rate(module: Module) -> None:
    multiprocessors, gauge = module("harness.multiprocessors"), module("harness.fit_gauge")
    card = torch.device("cuda", 0)
    if why := multiprocessors.why_not_green(card):
        pytest.skip(f"no green contexts: {why}")
    whole = gauge.rates(card)["gemm_tflops"]
    with multiprocessors.limited({"by": "green contexts", "share": 0.25}, card):
        part = gauge.rates(card)["gemm_tflops"]
        own = torch.cuda.current_stream().cuda_stream
        x = torch.ones(3, device=card, requires_grad=True)
        WhichStream.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert part < whole / 2
    assert WhichStream.seen == [own] != [torch.cuda.current_stream().cuda_stream]
