"""Norm, rotary embedding and SwiGLU on a card: plain torch and Liger's kernels, in turns.

    python benchmarks/gpu_functions.py [--json FILE] [--tokens 2048] [--turns 20]

GB/s counts what a function has to read and write at least: its inputs and its result, once. Both
sides are called as a step calls them (fttrain/model/functions.py).

Legend: T tokens, C hidden width, F width of the MLP, H query heads, K key heads, D width of a head.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import torch
from harness import card

from fttrain.model import functions, liger
from fttrain.model.config import LIGER_KERNELS, TORCH_KERNELS

SIDES = (TORCH_KERNELS, LIGER_KERNELS)
EPS = 1e-5
CALLS = 20  # of a turn


@dataclass(frozen=True)
class Shape:
    """Of a decoder layer."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 128


SHAPES = (
    Shape("Llama-3-70B", 8192, 28672, 64, 8),
    Shape("Llama-3-8B", 4096, 14336, 32, 8),
)


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    device = card.required("gpu_functions.py")
    environment, missing = card.environment(device), liger.missing_on(device)
    sides = SIDES[:1] if missing else SIDES
    results = [
        result
        for shape in SHAPES
        for result in measured(shape, arguments.tokens, arguments.turns, sides, device)
    ]
    title = f"{environment['card']}, {arguments.tokens} tokens, bf16"
    show(results, f"{title}; {missing}" if missing else title, environment)
    common.write_json(
        arguments.json, {"environment": environment, "missing": missing, "results": results}
    )


def measured(
    shape: Shape, tokens: int, turns: int, sides: tuple[str, ...], device: torch.device
) -> list[dict[str, Any]]:
    """Of each function, by side: seconds of a call in each turn, GB/s, bytes at its peak."""
    results = []
    for name, (work, moved_bytes) in works(shape, tokens, device).items():

        def choose(side: str) -> None:
            liger.use(side, device)

        seconds = card.in_turns(dict.fromkeys(sides, work), device, turns, CALLS, choose)
        result: dict[str, Any] = {"shape": shape.name, "function": name, "moved_bytes": moved_bytes}
        for side in sides:
            choose(side)
            result[side] = {
                "seconds": seconds[side],
                "gb_per_s": moved_bytes / statistics.median(seconds[side]) / 1e9,
                "peak_bytes": card.peak_bytes(work, device),
            }
        if LIGER_KERNELS in seconds:
            result["ratio"] = card.ratio(seconds[TORCH_KERNELS], seconds[LIGER_KERNELS])
        results.append(result)
    return results


def works(
    shape: Shape, tokens: int, device: torch.device
) -> dict[str, tuple[Callable[[], object], int]]:
    """By name: a function's call, and the bytes that it has to move."""
    random = torch.Generator(device).manual_seed(0)

    def values(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, device=device).bfloat16()

    x, grad, weight = (
        values(tokens, shape.hidden),
        values(tokens, shape.hidden),
        values(shape.hidden),
    )
    gate_up, grad_mlp = values(tokens, 2 * shape.mlp), values(tokens, shape.mlp)
    qkv = values(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    grads, norm = torch.randn_like(qkv), values(shape.head_dim)
    rotated = qkv[:, : -shape.kv_heads].clone()  # as a layer copies q and k (T, H + K, D)
    angles = values(tokens, shape.head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    q, grad_q = qkv[:, : shape.heads], grads[:, : shape.heads]
    return {
        "norm": (lambda: functions.rms_norm(x, weight, EPS), 2 * x.nbytes),
        "norm, backward": (
            lambda: functions.rms_norm_backward(grad, x, weight, EPS),
            3 * x.nbytes,
        ),
        "norm of q": (lambda: functions.rms_norm(q, norm, EPS), 2 * q.nbytes),
        "norm of q, backward": (
            lambda: functions.rms_norm_backward(grad_q, q, norm, EPS, out=grad_q),
            3 * q.nbytes,
        ),
        "rotary": (
            lambda: functions.rotate_(rotated, cos, sin),
            2 * rotated.nbytes + 2 * cos.nbytes,
        ),
        "SwiGLU": (lambda: functions.swiglu(gate_up), gate_up.nbytes + grad_mlp.nbytes),
        "SwiGLU, backward": (
            lambda: functions.swiglu_backward(grad_mlp, gate_up),
            2 * gate_up.nbytes + grad_mlp.nbytes,
        ),
    }


def show(results: list[dict[str, Any]], title: str, environment: dict[str, Any]) -> None:
    """A row for each function; a line between shapes."""
    rows: list[list[str]] = []
    for before, result in zip([None, *results], results, strict=False):
        if before and before["shape"] != result["shape"]:
            rows.append([])
        rows.append(
            [
                f"{result['shape']}: {result['function']}",
                *(_cells(result[side]) if side in result else "-" for side in SIDES),
                f"{result['ratio']:.2f}" if "ratio" in result else "-",
            ]
        )
    columns = ["function", *(f"{side}: µs, GB/s, MiB" for side in SIDES), "times as fast"]
    common.show(title, columns, rows, environment)


def _cells(figures: dict[str, Any]) -> str:
    microseconds = statistics.median(figures["seconds"]) * 1e6
    mib = figures["peak_bytes"] / 2**20
    return f"{microseconds:.0f}, {figures['gb_per_s']:.0f}, {mib:.0f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--tokens", type=int, default=2048)
    add("--turns", type=int, default=20, help=f"of {CALLS} calls each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
