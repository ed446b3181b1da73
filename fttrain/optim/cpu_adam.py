"""AdamW by DeepSpeed's kernel for host memory (ZeRO-Offload, Ren et al. 2021).

DeepSpeed is optional. This file alone imports it, when the kernel is first needed: the import takes
seconds, and the first use on a machine compiles the kernel, which takes a minute or two.
"""

import functools
import importlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from fttrain.distributed.rank_group import rank_from_environment
from fttrain.util.errors import UserError, first_line
from fttrain.util.locks import locked


class CpuAdam(torch.optim.Optimizer):
    """AdamW over fp32 parameters in host memory, with fp32 moments; state as torch's AdamW has it.

    DeepSpeed's own class reads the processor's name in each constructor call (a second or more, and
    there is one instance for each layer), so its kernel is called here without it. The kernel holds
    the GIL during an update: no other Python thread of this process runs meanwhile. torch's AdamW
    releases it.
    """

    # Names of the kernel's instances in this process. DeepSpeed's own classes count up from 0.
    _names = itertools.count(-1, -1)

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Load the kernel. Raises UserError where it cannot be compiled."""
        super().__init__(
            groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._kernel, self._name = kernel(), next(self._names)

    def init_state(self, parameter: torch.Tensor) -> None:
        """Set the state of ``parameter`` before its first step: zeros."""
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        self.state[parameter].update(step=0, **zeros)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update each parameter from its ``grad``; there is no closure."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.init_state(parameter)
                self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["step"] += 1
        settings = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        # An instance accumulates the powers of the betas in fp32 from step to step. A new one
        # computes them from the step count: more exact, and the same after a resume.
        self._kernel.create_adam(self._name, *settings, True, False)  # AdamW; without a log line
        self._kernel.adam_update(
            self._name,
            state["step"],
            *settings,
            True,  # bias correction
            parameter,
            parameter.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
        )
        self._kernel.destroy_adam(self._name)


@functools.cache
def kernel() -> Any:
    """DeepSpeed's extension module, compiled on its first use on this machine.

    Raises UserError where the compilation fails.
    """
    if rank_from_environment()[2] == 0:  # the compiler prints nothing for a minute
        print("DeepSpeed's kernel: its first use on a machine compiles it", flush=True)
    variables = {
        # ninja lies beside the interpreter, also where its environment is not activated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # DeepSpeed searches for an accelerator and warns where there is none.
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "TORCH_EXTENSIONS_DIR": str(build_folder()),
    }
    try:
        with _alone(build_folder()), _environment(variables):
            return importlib.import_module("deepspeed.ops.op_builder.cpu").CPUAdamBuilder().load()
    except Exception as error:  # from DeepSpeed, torch's extensions or the compiler
        raise UserError(
            f"optim.kind=deepspeed_cpu_adam: DeepSpeed's kernel could not be made "
            f"({first_line(error)}); it needs a C++ compiler and ninja, which "
            "optim=adamw with optim.offload=true does not"
        ) from error


def build_folder() -> Path:
    """The folder that the kernel is compiled in: among torch's extensions, used by this project
    alone, one for each version of Python and torch.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path(root) / f"fttrain-{python}-torch{torch.__version__}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Exclusive use of ``folder`` for the length of the block.

    torch's own lock is a file that stays behind when a compiler is killed, and the next process
    would wait for ever. The lock here is released with its process, so its holder may delete
    torch's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "fttrain.lock"):
        for stale_lock in folder.glob("*/lock"):
            stale_lock.unlink()
        yield


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment with ``variables`` set, for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
