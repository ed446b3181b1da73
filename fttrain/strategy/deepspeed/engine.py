"""DeepSpeed's engine, driven so that a judge comes between backward and the update.

Imported late: DeepSpeed takes seconds, and looks at the environment while it is imported.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import deepspeed
import deepspeed.comm.comm
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from fttrain.optim.config import OptimConfig
from fttrain.optim.optimizer import blank_state, make
from fttrain.strategy.deepspeed.counting import CountedBackend
from fttrain.strategy.deepspeed.partitions import partitions_of

MOMENTS = ("exp_avg", "exp_avg_sq")
Trained = Sequence[tuple[str, nn.Parameter]]  # what trains, by name


# DeepSpeed's warnings of what is meant: a step that was left out, and an optimizer of our own
MEANT = ("OVERFLOW! Skipping step", "untested optimizer")


def quiet() -> None:
    """DeepSpeed tells of its own settings and progress on every rank; warnings stay."""
    logger = deepspeed.utils.logger
    logger.setLevel(logging.WARNING)
    if not logger.filters:
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in MEANT))
    # torch 2.13 has new names for two collectives; DeepSpeed calls the old ones, which still work.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)


def partition(layer: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Each rank keeps its part of ``layer``'s weights from here on (stage 3)."""
    deepspeed.zero.Init(module=layer, config_dict_or_path=settings, dtype=dtype)


class Engine:
    """One model that trains under ZeRO. Every rank makes every call."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        settings: dict[str, Any],
        offloaded: bool,
    ) -> None:
        """``groups``: of parameters, as torch's optimizers take them, each with ``lr_ratio``, its
        learning rate over that of the step. ``settings``: DeepSpeed's own.
        """
        kind = "deepspeed_cpu_adam" if offloaded else "adamw"
        self._inner = make(groups, replace(optim, kind=kind, offload=offloaded))
        with redirect_stdout(StringIO()):  # some of its optimizers print figures of memory
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=self._inner, config=settings, dist_init_required=False
            )
        self._partitions = partitions_of(self._optimizer)
        # Before the first step, after which DeepSpeed would look for the state of all groups where
        # that of the first one alone is there.
        for group, part in enumerate(self._partitions.masters):
            blank_state(self._inner, part, group)
        self._partitions.link_moments()

    def run(self, *arguments: Any, training: bool) -> Any:
        """What the model gives for ``arguments``."""
        self._engine.train(training)
        return self._engine(*arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss`` (scalar), summed over the ranks. ``last``: of the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        # The engine averages over the ranks.
        self._engine.backward(loss * torch.distributed.get_world_size(), scale_wrt_gas=False)

    def grad_norm(self) -> float:
        """Of all gradients since the last step; infinite where one is not finite."""
        norm = self._partitions.norm()
        return norm if math.isfinite(norm) and norm >= 0 else math.inf

    def step(self, lr: float) -> None:
        """Clip and update."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self._engine.step()
        assert self._engine.was_step_applied(), "DeepSpeed left a step out"

    def leave_out(self) -> None:
        """Forget the gradients since the last step."""
        self._partitions.spoil()
        self._engine.step()
        assert not self._engine.was_step_applied(), "DeepSpeed took a step that was refused"

    def masters(self, parameters: Trained) -> dict[str, Tensor]:
        """fp32 by name, whole, on the host of rank 0; empty on the others."""
        return _kept((name, safe_get_full_fp32_param(own)) for name, own in parameters)

    def set_masters(self, parameters: Trained, values: dict[str, Tensor]) -> None:
        """Masters, and the weights that compute, become ``values``, whole on every rank."""
        for name, own in parameters:
            safe_set_full_fp32_param(own, values[name].to(torch.float32))
        self._partitions.publish()

    def moments(self, parameters: Trained, which: str) -> dict[str, Tensor]:
        """``exp_avg`` or ``exp_avg_sq`` by name, as ``masters``; empty before the first step."""
        if not self.steps:
            return {}
        return _kept((name, safe_get_full_optimizer_state(own, which)) for name, own in parameters)

    def set_moments(self, parameters: Trained, which: str, values: dict[str, Tensor]) -> None:
        """``values``: whole on every rank."""
        for name, own in parameters:
            safe_set_full_optimizer_state(own, values[name].to(torch.float32), which)

    @property
    def steps(self) -> int:
        """Updates so far, as AdamW counts them."""
        return int(self._inner.state[self._partitions.masters[0]]["step"])

    def set_steps(self, steps: int) -> None:
        """As if so many updates had been made."""
        for part in self._partitions.masters:
            state = self._inner.state[part]
            state["step"] = steps + 0 * state["step"]  # a number, or a tensor on its device


def join_ranks(device: torch.device) -> CountedBackend:
    """DeepSpeed talks over the ranks' process group from here on; what it moves is counted."""
    if not torch.distributed.is_initialized():  # one rank: nobody else to meet, but it asks
        torch.distributed.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=HashStore(),
            rank=0,
            world_size=1,
        )
    # On a CPU it would compile a kernel for most of a minute that inference alone uses. On a GPU
    # there is none, and a look at this table has it probe every kernel that it could compile.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    backend = deepspeed.comm.comm.cdb
    if not isinstance(backend, CountedBackend):
        backend = deepspeed.comm.comm.cdb = CountedBackend(backend)
    return backend


def _kept(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On the host of rank 0. Every rank goes through all of them."""
    is_main, found = torch.distributed.get_rank() == 0, {}
    for name, tensor in tensors:
        if is_main:
            found[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return found
