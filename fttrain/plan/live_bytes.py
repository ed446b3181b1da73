"""Bytes of live tensors, real or fake, counted as operators make and drop them.

The workspace inside a kernel is not seen, only its inputs and outputs. The one large workspace, of
attention's backward on a GPU, is counted by formula.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fttrain.model.attention_op import cuda_backward_bytes


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still referenced."""

    def __init__(self, device_type: str | None = None, kind: str | None = None) -> None:
        """device_type: only tensors of this type count, such as cuda; None: all.
        kind: the device whose kernels the CPU stands in for; None: that of the tensors.
        """
        super().__init__()
        self.now = self.peak = 0
        self._device_type, self._kind = device_type, kind
        self._counts = True
        self._seen: dict[int, Any] = {}  # storage -> weak reference

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Count nothing inside the block: its tensors and their views lie in other memory."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def start_peak(self) -> None:
        """Reset the peak to the bytes that are live now."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._seen:
                    here = self._device_type in (None, tensor.device.type)
                    self._count(storage, storage.nbytes() if self._counts and here else 0)
        self.peak = max(self.peak, self.now + self._inside_bytes(func, args))
        return result

    def _inside_bytes(self, func: Any, args: Any) -> int:
        """Bytes of the workspace of ``func`` besides its arguments and its result."""
        if func is not torch.ops.fttrain.varlen_attention_backward.default:
            return 0
        _, q, k, _, _, _, lengths, *_ = args
        if (self._kind or q.device.type) != "cuda":
            return 0
        tokens, heads, width = q.shape
        return cuda_backward_bytes(tokens, len(lengths), heads, k.shape[1], width, q.dtype.itemsize)

    def _count(self, storage: torch.UntypedStorage, size_bytes: int) -> None:
        key = id(storage)

        def gone(_: Any) -> None:
            self.now -= size_bytes
            del self._seen[key]

        self.now += size_bytes
        self._seen[key] = weakref.ref(storage, gone)
