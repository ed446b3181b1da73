"""The peer under FSDP: each rank has a part of the model, whole layers are gathered before use.

The 4-bit bytes pass for bf16, since FSDP divides float tensors only. A unit of gathering is a
decoder layer; embedding and head, tied here, are one more. PEFT's own policy for FSDP1, in which
every adapter matrix is a unit too, takes an eighth less memory and is slower on gloo.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peers.plain import PlainLoop, load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


class Fsdp2(PlainLoop):
    """One rank under ``fully_shard``."""

    sharded = True

    def __init__(self, job: dict[str, Any]) -> None:
        model = load(job, torch.bfloat16)
        mesh = init_device_mesh("cpu", (job["ranks"],))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=job["reshard_after_forward"])
        self._fsdp: Any = fully_shard(model, mesh=mesh)
        super().__init__(job, model)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        self._fsdp.set_requires_gradient_sync(last)
        return nullcontext()


class Fsdp1(PlainLoop):
    """One rank under ``FullyShardedDataParallel``."""

    sharded = True

    def __init__(self, job: dict[str, Any]) -> None:
        model = load(job, torch.bfloat16)
        layer = type(model.get_base_model().model.layers[0])
        fsdp = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({layer}),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            use_orig_params=True,  # frozen and trained tensors share a unit
            device_id=torch.device("cpu"),
        )
        super().__init__(job, fsdp)
        self._no_sync = fsdp.no_sync

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self._no_sync()
