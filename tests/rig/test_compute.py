"""Rates count what is really computed: FLOP as torch counts them, bytes as a model has them."""

from collections.abc import Callable

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from fttrain.model.decoder import Architecture
from fttrain.quant.config import QuantConfig
from fttrain.rig import compute

CPU = torch.device("cpu")


def test_flop_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0

    def one_second(work: Callable[[], object], device: torch.device) -> float:
        nonlocal counted
        with FlopCounterMode(display=False) as counter:
            work()
        counted += counter.get_total_flops()
        return 1.0

    monkeypatch.setattr(compute, "median_s", one_second)
    shapes = [(96, 64), (64, 128)]
    rate = compute.gemm_flop_per_s(shapes, 40, torch.bfloat16, CPU)
    assert rate * len(shapes) == counted > 0


def test_bytes_are_those_of_a_layer_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def half_a_second(work: Callable[[], object], device: torch.device) -> float:
        ran.append(work())
        return 0.5

    monkeypatch.setattr(compute, "median_s", half_a_second)
    model = tiny.model()
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if "layers.0." in name and "proj" in name
    ]
    architecture = Architecture(model.config)
    frozen_format = architecture.frozen_format(QuantConfig(), torch.bfloat16)
    rate = compute.dequantise_bytes_per_s(frozen_format, CPU)
    assert rate == 2 * 2 * sum(weight.numel() for weight in weights)  # bf16, in half a second
    assert len(ran) == 1
    plain = architecture.frozen_format(tiny.PLAIN, torch.bfloat16)
    assert compute.dequantise_bytes_per_s(plain, CPU) is None
