"""A smaller card: the compute gets a share of the multiprocessors.

By a green context where torch has streams of one: all that the compute is asked runs on such a
stream, and autograd takes it for backward as well (a context that is set is the calling thread's
alone, and backward runs on another). Else by MPS, whose clients are told their share before they
start. Copies and collectives have streams of their own, which keep the whole card.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness.fit_limits import GREEN

from fttrain.util.errors import first_line

_KEPT: list[Any] = []  # green contexts: an error leaves their block while they still have work


@contextmanager
def limited(settings: dict[str, Any] | None, device: torch.device) -> Iterator[None]:
    """Inside the block this thread's compute has the ``share`` of ``settings``; None: all of the
    card. ``by`` MPS it has that already.
    """
    if settings is None or settings["by"] != GREEN:
        yield
        return
    context, stream = _green(settings["share"], device)
    _KEPT.append(context)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def why_not_green(device: torch.device) -> str:
    """Why there is no green context with a stream here; empty: there is."""
    try:
        _green(0.5, device)
    except (AttributeError, ImportError, RuntimeError) as error:
        return first_line(error)
    return ""


def _green(share: float, device: torch.device) -> tuple[Any, torch.cuda.Stream]:
    from torch.cuda.green_contexts import GreenContext

    torch.zeros((), device=device)  # the card's context: a green one is a part of it
    count = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, round(share * count))
    # The driver makes of it what it can divide by: a multiple of 2, or of 8.
    context = GreenContext.create(num_sms=wanted, device_id=device.index or 0)
    return context, context.Stream()
