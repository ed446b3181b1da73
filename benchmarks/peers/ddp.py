"""The peer under DistributedDataParallel: each rank has the whole model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peers.plain import PlainLoop, load
from torch.nn.parallel import DistributedDataParallel


class Ddp(PlainLoop):
    """One rank of the peer."""

    def __init__(self, job: dict[str, Any]) -> None:
        model = DistributedDataParallel(
            load(job), broadcast_buffers=False, gradient_as_bucket_view=True
        )
        super().__init__(job, model)
        self._no_sync = model.no_sync

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._no_sync()
