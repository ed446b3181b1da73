"""What each of DeepSpeed's ZeRO optimizers keeps on this rank, behind one interface.

DeepSpeed offers no public way to learn the norm of a step's gradient before the step, to leave the
step out, or to publish masters that were set from outside. These few lines say how its optimizers
of version 0.19 do it. A step is left out in the way they themselves leave one out whose gradient is
not finite: they clear what it has accumulated, and update nothing.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor


class Partitions(Protocol):
    """This rank's part of masters and gradients. Every rank makes every call."""

    @property
    def masters(self) -> Sequence[Tensor]:
        """fp32, flat: this rank's part of each group, padding included."""
        ...

    def norm(self) -> float:
        """Of the gradient over all ranks, between the last backward and the step; negative or not
        finite where the gradient is not finite.
        """
        ...

    def spoil(self) -> None:
        """Make the next step one that DeepSpeed leaves out."""
        ...

    def publish(self) -> None:
        """Weights that compute become what masters are."""
        ...

    def link_moments(self) -> None:
        """Let DeepSpeed find the state that the inner optimizer has by now."""
        ...


def partitions_of(optimizer: Any) -> Partitions:
    """Those of DeepSpeed's own optimizer."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Stage3(optimizer)
    if isinstance(optimizer, BF16_Optimizer):
        return _Stage1Bf16(optimizer)
    return _Stage12(optimizer)


class _Stage12:
    """Stages 1 and 2."""

    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer

    @property
    def masters(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._zero.single_partition_of_fp32_groups
        return found

    def norm(self) -> float:
        return float(self._zero.scaled_global_norm())

    def spoil(self) -> None:
        zero = self._zero
        if not zero.cpu_offload:
            for own in zero.averaged_gradients.values():
                _spoil(own)
            return
        zero.local_overflow = True
        _spoil(zero.norm_for_param_grads.values())
        # Where these accumulate in fp32 on the device, a step that is left out does not clear them.
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)

    def publish(self) -> None:
        self._zero.update_lp_params()

    def link_moments(self) -> None:
        self._zero._lazy_init_hp_params_optimizer_state()


class _Stage1Bf16(_Stage12):
    """Stage 1 in bf16 with gradients that accumulate in fp32."""

    @property
    def masters(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._zero.fp32_groups_flat_partition
        return found

    def norm(self) -> float:
        gradients, _ = self._zero.get_grads_for_norm()
        return float(get_global_norm_of_tensors(gradients, mpu=self._zero.mpu))

    def spoil(self) -> None:
        _spoil(self._zero.fp32_groups_gradients_flat)


class _Stage3:
    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer

    @property
    def masters(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._zero.fp32_partitioned_groups_flat
        return found

    def norm(self) -> float:
        return float(combine_grad_norm_groups(self._zero._get_norm_groups()))

    def spoil(self) -> None:
        zero = self._zero
        if zero.offload_optimizer:
            _spoil(zero.norm_for_param_grads.values())
            return
        for own in zero.averaged_gradients.values():
            _spoil(own)

    def publish(self) -> None:
        self._zero._partition_all_parameters()  # one that is still gathered would stay as it is
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:  # which each rank has whole
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def link_moments(self) -> None:
        """It asks the inner optimizer itself."""


def _spoil(gradients: Iterable[Tensor]) -> None:
    for gradient in gradients:
        gradient.fill_(math.nan)
