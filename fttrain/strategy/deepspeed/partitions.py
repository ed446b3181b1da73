"""Partitions of masters and gradients in DeepSpeed's ZeRO optimizers, behind one interface.

DeepSpeed has no public way to read the norm of a step's gradient before the step, to skip the step,
or to copy masters that were set from outside to the compute weights. The classes below do it for
the optimizers of version 0.19. A step is skipped as these optimizers skip one whose gradient is not
finite: they clear the accumulated gradient, and update nothing.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor


class Partitions(Protocol):
    """The rank's partitions of masters and gradients. All methods are collective calls."""

    @property
    def masters(self) -> Sequence[Tensor]:
        """fp32 (values,): this rank's partition of each parameter group, with padding."""
        ...

    def norm(self) -> float:
        """The norm of the gradient over all ranks, between the last backward and the step; negative
        or not finite where the gradient is not finite.
        """
        ...

    def poison(self) -> None:
        """Make the gradient not finite, so that DeepSpeed skips the next step."""
        ...

    def publish(self) -> None:
        """Copy the masters to the compute weights."""
        ...

    def link_moments(self) -> None:
        """Register the inner optimizer's state with DeepSpeed."""
        ...


def partitions_of(optimizer: Any) -> Partitions:
    """The partitions of DeepSpeed's ``optimizer``."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Stage3(optimizer)
    if isinstance(optimizer, BF16_Optimizer):
        return _Stage1Bf16(optimizer)
    return _Stage12(optimizer)


class _Stage12:
    """Stages 1 and 2, but for ``_Stage1Bf16``."""

    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer

    @property
    def masters(self) -> Sequence[Tensor]:
        masters: Sequence[Tensor] = self._zero.single_partition_of_fp32_groups
        return masters

    def norm(self) -> float:
        return float(self._zero.scaled_global_norm())

    def poison(self) -> None:
        zero = self._zero
        if not zero.cpu_offload:
            for gradients in zero.averaged_gradients.values():
                _poison(gradients)
            return
        zero.local_overflow = True
        _poison(zero.norm_for_param_grads.values())
        # A skipped step does not clear these where they accumulate in fp32 on the device.
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)

    def publish(self) -> None:
        self._zero.update_lp_params()

    def link_moments(self) -> None:
        self._zero._lazy_init_hp_params_optimizer_state()


class _Stage1Bf16(_Stage12):
    """Stage 1 in bf16 with gradients that accumulate in fp32."""

    @property
    def masters(self) -> Sequence[Tensor]:
        masters: Sequence[Tensor] = self._zero.fp32_groups_flat_partition
        return masters

    def norm(self) -> float:
        gradients, _ = self._zero.get_grads_for_norm()
        return float(get_global_norm_of_tensors(gradients, mpu=self._zero.mpu))

    def poison(self) -> None:
        _poison(self._zero.fp32_groups_gradients_flat)


class _Stage3:
    def __init__(self, optimizer: Any) -> None:
        self._zero = optimizer

    @property
    def masters(self) -> Sequence[Tensor]:
        masters: Sequence[Tensor] = self._zero.fp32_partitioned_groups_flat
        return masters

    def norm(self) -> float:
        return float(combine_grad_norm_groups(self._zero._get_norm_groups()))

    def poison(self) -> None:
        zero = self._zero
        if zero.offload_optimizer:
            _poison(zero.norm_for_param_grads.values())
            return
        for gradients in zero.averaged_gradients.values():
            _poison(gradients)

    def publish(self) -> None:
        self._zero._partition_all_parameters()  # parameters that are still gathered would stay old
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:  # small ones, which every rank has whole
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def link_moments(self) -> None:
        """Do nothing: stage 3 reads the inner optimizer's state itself."""


def _poison(gradients: Iterable[Tensor]) -> None:
    for gradient in gradients:
        gradient.fill_(math.nan)
