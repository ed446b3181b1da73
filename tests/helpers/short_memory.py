"""Memory that really runs out in a chosen place: a tensor that no machine can hold is asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fttrain.model.decoder import Mlp
from fttrain.model.head import Head
from fttrain.model.linears import LinearGroup
from fttrain.schedule import layer_pass
from fttrain.schedule.pipeline_p2p import PipelineP2P


def limit(patch: pytest.MonkeyPatch, place: str, tokens: int, layer: int = 0) -> None:
    """From here on this process has no memory for more than ``tokens`` tokens of a micro-batch. It
    shows in ``place``: embed | head | loss | receive, or of ``layer`` forward | recompute |
    backward.
    """

    def forward(mlp: Mlp, hidden: torch.Tensor) -> int:
        return (
            len(hidden) if mlp.gate_up.layer == layer and not mlp.gate_up.state.recomputing else 0
        )

    def recompute(mlp: Mlp, hidden: torch.Tensor) -> int:
        return len(hidden) if mlp.gate_up.layer == layer and mlp.gate_up.state.recomputing else 0

    def backward(group: LinearGroup, grad: torch.Tensor, *_: Any) -> int:
        """In the middle of a layer: some of its groups have added their gradients, some not."""
        return len(grad) if group.layer == layer and group.shape.name == "o" else 0

    def receive(p2p: PipelineP2P, rows: int, neighbour: int) -> int:
        """Once for each limit: then the stage has dropped what was in the way."""
        asked.append(rows)
        return max(asked) if len(asked) == 1 else 0

    asked: list[int] = []
    owner: Any
    owner, name, measure = {
        "embed": (layer_pass, "start", lambda decoder, batch, *_: sum(batch.lengths)),
        "forward": (Mlp, "forward", forward),
        "recompute": (Mlp, "forward", recompute),
        "head": (Head, "loss_and_gradient", lambda head, hidden, *_: len(hidden)),
        "loss": (Head, "loss", lambda head, hidden, *_: len(hidden)),  # of an evaluation
        "backward": (LinearGroup, "backward", backward),
        "receive": (PipelineP2P, "receive", receive),
    }[place]
    patch.setattr(owner, name, _limited(getattr(owner, name), measure, tokens))


def _limited(
    function: Callable[..., Any], measure: Callable[..., int], tokens: int
) -> Callable[..., Any]:
    def limited(*args: Any, **more: Any) -> Any:
        if measure(*args) > tokens:
            torch.empty(1 << 60, dtype=torch.uint8)
        return function(*args, **more)

    return limited
