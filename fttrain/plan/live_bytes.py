"""Bytes that tensors hold, counted as operators make and drop them: real tensors or fake ones.

What a kernel takes inside itself is not seen; all that goes in and comes out is. The one that takes
much, attention's backward on a GPU, counts by formula.
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
    """Bytes of the storages that operators made and that something still holds."""

    def __init__(self, device_type: str | None = None, kind: str | None = None) -> None:
        """``device_type``: of the only tensors that count, such as cuda; None: all do.
        ``kind``: of the device whose kernels run, where the CPU stands in for it; None: that of
        their tensors.
        """
        super().__init__()
        self.now = self.peak = 0
        self._device_type, self._kind = device_type, kind
        self._counts = True
        self._seen: dict[int, Any] = {}  # storage -> weak reference

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made inside the block lies in other memory: neither it nor any view of it
        counts.
        """
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def start_peak(self) -> None:
        """The peak begins anew with what is held now."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._seen:
                    here = self._device_type in (None, tensor.device.type)
                    self._count(storage, storage.nbytes() if self._counts and here else 0)
        self.peak = max(self.peak, self.now + self._inside_bytes(func, args))
        return made

    def _inside_bytes(self, func: Any, args: Any) -> int:
        """What ``func`` took beside its arguments and its result, and gave back."""
        if func is not torch.ops.fttrain.varlen_attention_backward.default:
            return 0
        _, q, k, _, _, _, lengths, *_ = args
        if (self._kind or q.device.type) != "cuda":
            return 0
        tokens, heads, width = q.shape
        return cuda_backward_bytes(tokens, len(lengths), heads, k.shape[1], width, q.dtype.itemsize)

    def _count(self, storage: torch.UntypedStorage, size_bytes: int) -> None:
        place = id(storage)

        def gone(_: Any) -> None:
            self.now -= size_bytes
            del self._seen[place]

        self.now += size_bytes
        self._seen[place] = weakref.ref(storage, gone)
