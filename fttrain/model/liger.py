"""Liger's Triton kernels (Hsu et al. 2024) for norm, SwiGLU and rotary embedding on a GPU.

``functions.py`` asks ``takes`` and calls what is here; nobody else does. A kernel does in one pass
over a row what plain torch does in several, and beside the result it makes less than a tile of
rows. Liger's own autograd functions save inputs and statistics; they are not used.

The kernels are in use once ``use`` was called, for the whole process. Liger and Triton are
optional: they are imported here alone, and not before.

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
_MOST_WIDTH = 65536  # a kernel holds a row whole
_LLAMA = 0  # the casting mode "llama", as the norm's backward takes it

_why_not = "nobody asked for Liger's kernels"  # "": they are in use


def use(kernels: str, device: torch.device) -> None:
    """From here on this process computes with ``kernels``, one of ``KERNELS``.

    Raises UserError where Liger's are asked for by name and do not run on ``device``.
    """
    global _why_not
    _why_not = f"kernels={kernels}" if kernels == TORCH_KERNELS else missing_on(device)
    if kernels == LIGER_KERNELS and _why_not:
        raise UserError(f"kernels={kernels}: {_why_not}; kernels={AUTO_KERNELS} takes torch's then")


def missing_on(device: torch.device) -> str:
    """What keeps the kernels from running on ``device``; "" where they run."""
    if device.type != _DEVICE:
        return f"Liger's kernels run on a GPU, not on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger is not installed, which pip install 'fttrain[liger]' does"
    x = torch.ones(1, 1, 16, device=device)
    try:  # they are compiled: there may be no C compiler, another Triton, another Liger
        with torch.cuda.device_of(x):  # where Triton launches
            rms_norm_backward(rms_norm(x, x[0, 0], 0.0), x, x[0, 0], 0.0)
            swiglu_backward(swiglu(x[0]), x[0])
            rotate_(x, x[0], x[0])
    except Exception as error:
        return f"Liger's kernels do not run on {device}: {first_line(error)}"
    return ""


def name() -> str:
    """What computes norm, SwiGLU and rotary embedding in this process, for the log."""
    return f"torch ({_why_not})" if _why_not else "Liger's kernels"


def takes(x: Tensor, width: int) -> bool:
    """Whether the kernels are in use and read rows of ``width`` values such as those of ``x``."""
    return (
        not _why_not
        and x.device.type == _DEVICE
        and x.dtype in _DTYPES
        and x.numel() > 0
        and x.stride(-1) == 1
        and width <= _MOST_WIDTH
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``functions.rms_norm``."""
    from liger_kernel.ops.rms_norm import rms_norm_forward

    def normed(x: Tensor) -> Tensor:
        # No offset of the weight; cast before it is multiplied, as Llama does.
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
    """As ``functions.rms_norm_backward``."""
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
    """``grad`` of the output (N, ..., C) becomes that of ``x``."""
    from liger_kernel.ops.rms_norm import rms_norm_backward as backward
    from liger_kernel.ops.utils import calculate_settings

    rms = inverse_rms(x, eps).view(-1)  # fp32 (N,), which Liger's forward would have saved
    block, warps = calculate_settings(x.shape[-1])
    x = x.view(-1, x.shape[-1])  # of ``grad`` the kernel's caller does so itself
    backward(grad, x, weight, rms, 0.0, _LLAMA, block, warps, True, None, needs_dw=False)


def swiglu(gate_up: Tensor) -> Tensor:
    """As ``functions.swiglu``."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    out: Tensor = swiglu_fused_gate_up_forward(gate_up)[1]
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """As ``functions.swiglu_backward``; ``gate_up`` is contiguous."""
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward as backward

    if out is None:
        made: Tensor = backward(gate_up, grad)
        return made
    for rows in row_tiles(gate_up):
        out[rows] = backward(gate_up[rows], grad[rows])
    return out


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``functions.rotate_``; ``heads`` is contiguous: of others Liger rotates a copy. Beside a
    single head the one for nobody would be as large.
    """
    from liger_kernel.ops.rope import rope_forward

    for rows in row_tiles(heads):
        queries = heads[rows].transpose(0, 1).unsqueeze(0)  # (1, H, n, D), as it wants them
        keys = torch.empty_like(queries[:, :1])  # it rotates keys as well: one head for nobody
        rope_forward(queries, keys, cos[rows], sin[rows])
    return heads


def _one_stride(x: Tensor) -> bool:
    """Whether each row of ``x`` (..., C) is as far from the next: what a kernel can walk along."""
    return x.dim() == 2 or x.is_contiguous()
