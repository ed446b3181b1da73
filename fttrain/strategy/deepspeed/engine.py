"""DeepSpeed's engine, with the gradient's norm between backward and the update.

Import it late: importing DeepSpeed takes seconds, and reads the environment.
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
Trained = Sequence[tuple[str, nn.Parameter]]  # the trained parameters with their names


# DeepSpeed's warnings of intended behaviour: a skipped step, and an optimizer built here
EXPECTED_WARNINGS = ("OVERFLOW! Skipping step", "untested optimizer")


def quiet() -> None:
    """Silence DeepSpeed's messages below warnings, and its warnings of intended behaviour."""
    logger = deepspeed.utils.logger
    logger.setLevel(logging.WARNING)
    if not logger.filters:
        logger.addFilter(
            lambda record: not any(text in record.getMessage() for text in EXPECTED_WARNINGS)
        )
    # torch 2.13 renamed two collectives; DeepSpeed calls them by the old names, which still work.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)


def partition_layer(layer: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Partition ``layer``'s weights among the ranks (stage 3)."""
    deepspeed.zero.Init(module=layer, config_dict_or_path=settings, dtype=dtype)


class Engine:
    """A model that trains under ZeRO. All methods are collective calls."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        optim: OptimConfig,
        settings: dict[str, Any],
        offloaded: bool,
    ) -> None:
        """``groups``: parameter groups of torch's optimizers, each with ``lr_ratio``, its learning
        rate over that of the step. ``settings``: DeepSpeed's configuration.
        """
        kind = "deepspeed_cpu_adam" if offloaded else "adamw"
        self._inner = make(groups, replace(optim, kind=kind, offload=offloaded))
        with redirect_stdout(StringIO()):  # some of its optimizers print memory figures
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=self._inner, config=settings, dist_init_required=False
            )
        self._partitions = partitions_of(self._optimizer)
        # All groups need a state before the first step: DeepSpeed looks them all up once the first
        # one has a state.
        for group, master in enumerate(self._partitions.masters):
            blank_state(self._inner, master, group)
        self._partitions.link_moments()

    def run(self, *arguments: Any, training: bool) -> Any:
        """The model's output for ``arguments``."""
        self._engine.train(training)
        return self._engine(*arguments)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of ``loss`` (), summed over the ranks. ``last``: of the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        # The factor undoes the engine's mean over the ranks.
        self._engine.backward(loss * torch.distributed.get_world_size(), scale_wrt_gas=False)

    def grad_norm(self) -> float:
        """The norm of all gradients since the last step; infinite where one is not finite."""
        norm = self._partitions.norm()
        return norm if math.isfinite(norm) and norm >= 0 else math.inf

    def step(self, lr: float) -> None:
        """Clip and update."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self._engine.step()
        assert self._engine.was_step_applied(), "DeepSpeed skipped a step"

    def skip_step(self) -> None:
        """Drop the gradients since the last step."""
        self._partitions.poison()
        self._engine.step()
        assert not self._engine.was_step_applied(), "DeepSpeed took a step that was refused"

    def masters(self, parameters: Trained) -> dict[str, Tensor]:
        """The fp32 masters by name, whole, in host memory of rank 0; empty on other ranks."""
        return _on_main(
            (name, safe_get_full_fp32_param(parameter)) for name, parameter in parameters
        )

    def set_masters(self, parameters: Trained, values: dict[str, Tensor]) -> None:
        """Set masters and compute weights to ``values``, which are whole on every rank."""
        for name, parameter in parameters:
            safe_set_full_fp32_param(parameter, values[name].to(torch.float32))
        self._partitions.publish()

    def moments(self, parameters: Trained, which: str) -> dict[str, Tensor]:
        """The moments ``which`` (``exp_avg`` or ``exp_avg_sq``) by name, as ``masters``; empty
        before the first step.
        """
        if not self.steps:
            return {}
        return _on_main(
            (name, safe_get_full_optimizer_state(parameter, which))
            for name, parameter in parameters
        )

    def set_moments(self, parameters: Trained, which: str, values: dict[str, Tensor]) -> None:
        """Set the moments ``which`` to ``values``, which are whole on every rank."""
        for name, parameter in parameters:
            safe_set_full_optimizer_state(parameter, values[name].to(torch.float32), which)

    @property
    def steps(self) -> int:
        """The number of updates so far, as AdamW counts them."""
        return int(self._inner.state[self._partitions.masters[0]]["step"])

    def set_steps(self, steps: int) -> None:
        """Set the number of updates so far."""
        for master in self._partitions.masters:
            state = self._inner.state[master]
            state["step"] = steps + 0 * state["step"]  # a number, or a tensor on its device


def join_ranks(device: torch.device) -> CountedBackend:
    """Initialise DeepSpeed's communication over the ranks' process group. Return its backend, which
    counts the traffic.
    """
    if (
        not torch.distributed.is_initialized()
    ):  # a single rank: DeepSpeed needs a group all the same
        torch.distributed.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=HashStore(),
            rank=0,
            world_size=1,
        )
    # On a CPU DeepSpeed would compile a kernel for most of a minute that inference alone uses. On a
    # GPU it has no such kernel, and an access to this table makes it probe all kernels.
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )
    backend = deepspeed.comm.comm.cdb
    if not isinstance(backend, CountedBackend):
        backend = deepspeed.comm.comm.cdb = CountedBackend(backend)
    return backend


def _on_main(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """fp32 copies of ``tensors`` in host memory of rank 0; empty on other ranks. The iterator makes
    collective calls, so every rank exhausts it.
    """
    is_main, copies = torch.distributed.get_rank() == 0, {}
    for name, tensor in tensors:
        if is_main:
            copies[name] = tensor.detach().to("cpu", torch.float32, copy=True)
    return copies
