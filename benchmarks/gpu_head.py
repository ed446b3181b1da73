"""The head on a card: our chunks, Liger's fused linear cross entropy, Cut Cross-Entropy, in turns.

    python benchmarks/gpu_head.py [--json FILE] [--widths 4096 8192] [--tokens 2048 8192]

Final norm, loss and the gradient of the hidden states, with the table (V, C) frozen in bf16. Hidden
states lean towards their targets, so that a token's loss is that of a trained model, about 2 nats:
Cut Cross-Entropy (Wijmans et al. 2024) leaves out what is too unlikely to count. Every side norms
by the same function. A peer that is not installed is named with the reason.

Legend: T tokens, C hidden width, V vocabulary.
"""

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any

import common
import torch
from harness import card
from torch import Tensor

from fttrain.model.functions import rms_norm, rms_norm_backward
from fttrain.model.head import Head
from fttrain.model.projection import ResidentHead
from fttrain.util.errors import first_line

EPS, LOSS_NATS, WEIGHT_STD = 1e-5, 2.0, 0.02
CALLS = 1  # of a turn: each takes milliseconds
OURS, LIGER, CUT = "fttrain", "Liger", "Cut Cross-Entropy"
PEERS = {LIGER: "liger_kernel", CUT: "cut_cross_entropy"}  # name -> module
Work = Callable[[], tuple[Tensor, Tensor]]  # loss sum, gradient of the hidden states (T, C)


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    device = card.required("gpu_head.py")
    environment = card.environment(device)
    results = [
        result
        for width in arguments.widths
        for tokens in arguments.tokens
        for result in measured(arguments.vocabulary, width, tokens, arguments.turns, device)
    ]
    show(results, f"{environment['card']}, V={arguments.vocabulary}, bf16", environment)
    common.write_json(arguments.json, {"environment": environment, "results": results})


def measured(
    vocabulary: int, width: int, tokens: int, turns: int, device: torch.device
) -> list[dict[str, Any]]:
    """Of each side: seconds of a call in each turn, the most that a first call has at once beside
    its inputs, how far it is from ours; or why it was not measured.
    """
    sides = _sides(*inputs(vocabulary, width, tokens, device))
    missing = {name: _missing(module) for name, module in PEERS.items()}
    works, found, peaks = {}, {}, {}
    for name, made in sides.items():
        if missing.get(name):
            continue
        try:
            found[name] = made()()  # the first call compiles and tunes, in memory that is not its
            peaks[name] = card.peak_bytes(lambda made=made: made()(), device)
            works[name] = made()
        except Exception as error:  # a peer that does not know this card, or has no room
            if name == OURS:
                raise
            missing[name] = f"{type(error).__name__}: {first_line(error)}"
            found.pop(name, None)
    seconds = card.in_turns(works, device, turns, CALLS)
    size = {"vocabulary": vocabulary, "width": width, "tokens": tokens}
    results: list[dict[str, Any]] = []
    for name in sides:
        if name not in found:
            results.append({**size, "side": name, "missing": missing[name]})
            continue
        results.append(
            {
                **size,
                "side": name,
                "seconds": seconds[name],
                "ratio": card.ratio(seconds[OURS], seconds[name]),
                "peak_bytes": peaks[name],
                **_apart(found[name], found[OURS], tokens),
            }
        )
    return results


def inputs(
    vocabulary: int, width: int, tokens: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ResidentHead (V, C), norm's weight (C,) and hidden states (T, C) in bf16, targets int64
    (T,).
    """
    random = torch.Generator(device).manual_seed(0)

    def values(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    table = torch.empty(vocabulary, width, dtype=torch.bfloat16, device=device)
    table.normal_(std=WEIGHT_STD, generator=random)
    targets = torch.randint(vocabulary, (tokens,), generator=random, device=device)
    # The logit of a word is |normed| |w| times the cosine between them. Of any other word it is
    # N(0, |w|^2), so log-sum-exp is about log V + |w|^2 / 2; the target's lies LOSS_NATS below it.
    length, normed_length = WEIGHT_STD * math.sqrt(width), math.sqrt(width)
    wanted = math.log(vocabulary) + length**2 / 2 - LOSS_NATS
    cosine = min(wanted / (normed_length * length), 0.9)  # a narrow model cannot be so sure
    towards = table[targets].float() * (cosine * normed_length / length)
    hidden = (values(tokens, width) * math.sqrt(1 - cosine**2) + towards).bfloat16()
    return table, torch.ones(width, dtype=torch.bfloat16, device=device), hidden, targets


def _sides(
    table: Tensor, norm: Tensor, hidden: Tensor, targets: Tensor
) -> dict[str, Callable[[], Work]]:
    """By name: what makes a side's work."""

    def ours() -> Work:
        head, trained = Head(norm, ResidentHead(table), EPS), torch.arange(len(targets)).to(targets)

        def work() -> tuple[Tensor, Tensor]:
            with head.on_device():
                return head.loss_and_gradient(hidden, targets, trained)

        return work

    def peer(loss_and_gradient: Callable[..., tuple[Tensor, Tensor]]) -> Work:
        @torch.no_grad()
        def work() -> tuple[Tensor, Tensor]:
            loss, gradient = loss_and_gradient(rms_norm(hidden, norm, EPS), table, targets)
            return loss, rms_norm_backward(gradient, hidden, norm, EPS, out=gradient)

        return work

    return {
        OURS: ours,
        LIGER: lambda: peer(_liger),
        CUT: lambda: peer(_cut_cross_entropy),
    }


def _liger(normed: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    loss, *_, gradient, _, _ = fused_linear_cross_entropy_forward(
        normed, table, targets, reduction="sum", compute_gradients=True
    )
    return loss, gradient


def _cut_cross_entropy(normed: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    normed = normed.detach().requires_grad_()
    with torch.enable_grad():
        loss = linear_cross_entropy(normed, table, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, normed)
    return loss.detach(), gradient


def _missing(module: str) -> str:
    return "" if importlib.util.find_spec(module) else "not installed"


def _apart(
    found: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], tokens: int
) -> dict[str, float]:
    """Loss of a token in nats and how far it is from ours; the gradient's, as a part of ours."""
    (loss, gradient), (our_loss, our_gradient) = found, ours
    difference = (gradient.float() - our_gradient.float()).norm() / our_gradient.float().norm()
    return {
        "loss": float(loss) / tokens,
        "loss_apart": (float(loss) - float(our_loss)) / tokens,
        "gradient_apart": float(difference),
    }


def show(results: list[dict[str, Any]], title: str, environment: dict[str, Any]) -> None:
    """A row for each side; a line between sizes."""
    rows: list[list[str]] = []
    for result in results:
        if result["side"] == OURS and rows:
            rows.append([])
        label = f"C={result['width']} T={result['tokens']}: {result['side']}"
        if "missing" in result:
            rows.append([label, result["missing"], *["-"] * 5])
            continue
        rows.append(
            [
                label,
                f"{statistics.median(result['seconds']) * 1e3:.1f}",
                f"{result['ratio']:.2f}",
                f"{result['peak_bytes'] / 2**20:.0f}",
                f"{result['loss']:.4f}",
                f"{result['loss_apart']:+.5f}",
                f"{result['gradient_apart']:.4f}",
            ]
        )
    columns = [
        "head",
        "ms",
        "times as fast",
        "peak MiB",
        "loss",
        "apart",
        "gradient apart",
    ]
    common.show(title, columns, rows, environment)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the figures there")
    add("--vocabulary", type=int, default=128256)
    add("--widths", type=int, nargs="+", default=[4096, 8192])
    add("--tokens", type=int, nargs="+", default=[2048, 8192])
    add("--turns", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    main()
