"""AdamW by DeepSpeed's kernel for host memory (ZeRO-Offload, Ren et al. 2021).

DeepSpeed is optional and imported here alone, once its kernel is asked for: the import takes
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

    DeepSpeed's own class asks the processor for its name each time one is made (a second or more,
    and there is one for each layer), so its kernel is called here without it. The kernel holds
    Python's lock while it works: beside an update nothing else of this process goes on that needs
    Python, whereas torch's AdamW lets it go.
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
        """Raises UserError where the kernel cannot be compiled."""
        super().__init__(
            groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self._kernel, self._name = kernel(), next(self._names)

    def init_state(self, parameter: torch.Tensor) -> None:
        """As before the first step."""
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
        # An instance multiplies the powers of the betas up in fp32, from step to step. A new one
        # takes them from the step count: more exact, and the same after a resume.
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
    """DeepSpeed's extension module, compiled if this machine has not done it yet.

    Raises UserError where it cannot be.
    """
    if rank_from_environment()[2] == 0:  # a compiler says nothing for a minute
        print("DeepSpeed's kernel: its first use on a machine compiles it", flush=True)
    variables = {
        # ninja lies beside the interpreter, also where nobody activated its environment.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # DeepSpeed looks for one, and warns where it finds none.
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "TORCH_EXTENSIONS_DIR": str(build_folder()),
    }
    try:
        with _alone(build_folder()), _environment(variables):
            return importlib.import_module("deepspeed.ops.op_builder.cpu").CPUAdamBuilder().load()
    except Exception as error:  # of DeepSpeed, of torch's extensions, of the compiler
        raise UserError(
            f"optim.kind=deepspeed_cpu_adam: DeepSpeed's kernel could not be made "
            f"({first_line(error)}); it needs a C++ compiler and ninja, which "
            "optim=adamw with optim.offload=true does not"
        ) from error


def build_folder() -> Path:
    """Where the kernel is compiled: among torch's extensions, but nobody else's, and of this Python
    and torch alone.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path(root) / f"fttrain-{python}-torch{torch.__version__}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, in ``folder``, for the length of the block.

    torch's own lock is a file that stays where a compiler was killed, and the next process would
    wait for ever. Who holds this one, which the system drops with its process, may take it away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "fttrain.lock"):
        for left in folder.glob("*/lock"):
            left.unlink()
        yield


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """``variables`` set, for the length of the block."""
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
