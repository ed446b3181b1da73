"""Liger's Triton kernels (Hsu et al. 2024) for norm, SwiGLU and rotary embedding on a GPU.

``functions.py`` alone calls this module, where ``takes`` says so. A kernel reads a row once where
plain torch reads it several times, and beside the result it allocates less than a tile of rows.
Liger's autograd functions save inputs and statistics; they are not used.

``use`` switches the kernels on for the whole process. Liger and Triton are optional and imported in
this file alone, when the kernels are used.

Legend: N tokens, C width of the input, F width of the MLP, H heads, D width of a head.
"""

import importlib.util

import torch
from torch import Tensor

from fttrain.model.config import AUTO_KERNELS, LIGER_KERNELS, TORCH_KERNELS
from fttrain.model.rows import inverse_rms, row_tiles
from fttrain.util.errors import UserError, first_line

_DEVICE = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 65536  # values of a row, which a kernel holds whole
_LLAMA = 0  # the norm's casting mode "llama", by its number in backward

_off_reason = "nobody asked for Liger's kernels"  # "": the kernels are in use


def use(kernels: str, device: torch.device) -> None:
    """Compute with ``kernels``, one of ``KERNELS``, in this process from here on.

    Raises UserError where ``kernels`` is liger and Liger's do not run on ``device``.
    """
    global _off_reason
    _off_reason = f"kernels={kernels}" if kernels == TORCH_KERNELS else missing_on(device)
    if kernels == LIGER_KERNELS and _off_reason:
        raise UserError(
            f"kernels={kernels}: {_off_reason}; kernels={AUTO_KERNELS} takes torch's then"
        )


def missing_on(device: torch.device) -> str:
    """The reason why the kernels do not run on ``device``; "" where they run."""
    if device.type != _DEVICE:
        return f"Liger's kernels run on a GPU, not on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger is not installed, which pip install 'fttrain[liger]' does"
    x = torch.ones(1, 1, 16, device=device)
    try:  # kernels are compiled: a C compiler may be missing, Triton or Liger be another version
        with torch.cuda.device_of(x):  # Triton launches on the current device
            rms_norm_backward(rms_norm(x, x[0, 0], 0.0), x, x[0, 0], 0.0)
            swiglu_backward(swiglu(x[0]), x[0])
            rotate_(x, x[0], x[0])
    except Exception as error:
        return f"Liger's kernels do not run on {device}: {first_line(error)}"
    return ""


def name() -> str:
    """The kernels of norm, SwiGLU and rotary embedding in this process, for the log."""
    return f"torch ({_off_reason})" if _off_reason else "Liger's kernels"


def takes(x: Tensor, width: int) -> bool:
    """Whether the kernels are in use and read rows of ``width`` values such as those of ``x``."""
    return (
        not _off_reason
        and x.device.type == _DEVICE
        and x.dtype in _DTYPES
        and x.numel() > 0
        and x.stride(-1) == 1
        and width <= _MAX_WIDTH
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, as ``functions.rms_norm``."""
    from liger_kernel.ops.rms_norm import rms_norm_forward

    def normed(x: Tensor) -> Tensor:
        # The weight has no offset. The casting mode "llama" casts x before the product.
        result: Tensor = rms_norm_forward(x, weight, eps, 0.0, "llama", None)[0]
        return result

    if _one_stride(x):
        return normed(x)
    out = x.new_empty(x.shape)
    for rows in row_tiles(x):
        out[rows] = normed(x[rows].contiguous())
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Gradient of RMS norm, as ``functions.rms_norm_backward``."""
    out = grad.new_empty(grad.shape) if out is None else out
    if _one_stride(x) and _one_stride(out):
        _norm_gradient_(out.copy_(grad), x, weight, eps)
        return out
    for rows in row_tiles(x):
        tile = grad[rows].clone(memory_format=torch.contiguous_format)
        _norm_gradient_(tile, x[rows].contiguous(), weight, eps)
        out[rows] = tile
    return out


def _norm_gradient_(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Overwrite ``grad`` (N, ..., C) of the output with the gradient of ``x``."""
    from liger_kernel.ops.rms_norm import rms_norm_backward as backward
    from liger_kernel.ops.utils import calculate_settings

    rms = inverse_rms(x, eps).view(-1)  # fp32 (N,), which Liger's forward would have saved
    block, warps = calculate_settings(x.shape[-1])
    x = x.view(-1, x.shape[-1])  # Liger's function reshapes grad itself
    backward(grad, x, weight, rms, 0.0, _LLAMA, block, warps, True, None, needs_dw=False)


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU, as ``functions.swiglu``."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    out: Tensor = swiglu_fused_gate_up_forward(gate_up)[1]
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of SwiGLU, as ``functions.swiglu_backward``; ``gate_up`` is contiguous."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward as backward

    if out is None:
        result: Tensor = backward(gate_up, grad)
        return result
    for rows in row_tiles(gate_up):
        out[rows] = backward(gate_up[rows], grad[rows])
    return out


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, as ``functions.rotate_``. ``heads`` is contiguous, for Liger rotates a copy
    of other tensors, and has several heads, for the dummy key is as large as one.
    """
    from liger_kernel.ops.rope import rope_forward

    for rows in row_tiles(heads):
        queries = heads[rows].transpose(0, 1).unsqueeze(0)  # (1, H, n, D)
        keys = torch.empty_like(queries[:, :1])  # dummy, for the kernel rotates keys, too
        rope_forward(queries, keys, cos[rows], sin[rows])
    return heads


def _one_stride(x: Tensor) -> bool:
    """Whether all rows of ``x`` (..., C) have the same distance in memory, as kernels need."""
    return x.dim() == 2 or x.is_contiguous()
