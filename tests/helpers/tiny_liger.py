"""Liger's kernels on a card or, where there is none, on the CPU in Triton's interpreter."""

import os
from typing import Any

import numpy as np
import pytest
import torch

from fttrain.model import liger
from fttrain.model.config import LIGER_KERNELS, TORCH_KERNELS

# Marks and parameters of a test of both.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def prepare(patch: pytest.MonkeyPatch, device: str) -> None:
    """Liger's kernels may be asked for on ``device``; nothing uses them when ``patch`` ends."""
    patch.setattr(liger, "_off_reason", liger._off_reason)
    if device == "cpu":
        if "TRITON_INTERPRET" not in os.environ:
            pytest.skip("there is a card: Triton's interpreter is not asked for")
        patch.setattr(liger, "_DEVICE", "cpu")
        _complete_interpreter(patch)


def use(yes: bool, device: str) -> None:
    """From here on Liger's kernels compute, or plain torch does."""
    liger.use(LIGER_KERNELS if yes else TORCH_KERNELS, torch.device(device))


def _complete_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter knows bf16 as bits alone, hands a kernel Python's own floats, where
    compiled ones get fp32, and has no function of CUDA's libdevice.
    """
    import liger_kernel.ops.rms_norm as rms_norm_module
    import triton.language as tl
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    convert, calculate, cast = interpreter._implicit_cvt, builder.binary_op, builder.cast_impl

    def argument(value: object) -> object:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(handle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return calculate(self, left, right, op)
        with np.errstate(all="ignore"):  # the head that nobody reads holds anything
            return handle(_bf16_bits(op(_fp32(left.data), _fp32(right.data))), tl.bfloat16)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) == (tl.float32, tl.bfloat16):
            return handle(_bf16_bits(source.data), tl.bfloat16)
        if (source.dtype.scalar, kind.scalar) == (tl.bfloat16, tl.float32):
            return handle(_fp32(source.data), tl.float32)
        return cast(self, source, kind)

    patch.setattr(interpreter, "_implicit_cvt", argument)
    # Arguments are on the host as it is; what takes them there keeps them until Python's collector
    # comes.
    executor = interpreter.GridExecutor
    patch.setattr(executor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    patch.setattr(executor, "_restore_args_dev", lambda self, *arguments: None)
    patch.setattr(builder, "binary_op", binary_op)
    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(rms_norm_module, "rsqrt", lambda x: tl.rsqrt(x))


def _fp32(bits: np.ndarray) -> np.ndarray:
    """uint16, those of bf16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """fp32 -> uint16, rounded to the nearest bf16, of two to the even one."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
