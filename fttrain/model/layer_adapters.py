"""All adapters of one layer: flat masters, flat gradient, and compute copies.

Each layer's fp32 masters are one flat parameter (``optim/flat.py``: A's, B's, magnitudes), and its
gradient one flat tensor, so that a layer is reduced by one collective. With ``optim.shard`` a rank
has the masters of its shard alone, and gathers the copies that other ranks updated.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fttrain.distributed.collectives import Handle, HandleGroup, all_gather
from fttrain.model.config import LoraConfig
from fttrain.model.lora import GroupAdapter, GroupMembers, target_indices
from fttrain.optim.flat import FlatLayout, Shard
from fttrain.quant.frozen_layer import FrozenLayer
from fttrain.store.side_stream import copy


@dataclass(frozen=True)
class HostShard:
    """Host memory of this rank's shard of a layer's adapters."""

    masters: Tensor  # fp32 (values of the shard,)
    copies: Tensor  # in ``copy_dtype`` (values of the shard,), staged for the copy to the device


class LayerAdapters(nn.Module):
    """All adapters of one layer. ``flat`` is the fp32 parameter: the shard that this rank updates.

    The gradient is a flat fp32 tensor on the compute device, bound by ``bind_gradient``.
    """

    def __init__(
        self,
        layer: int,
        groups: Iterable[GroupMembers],
        config: LoraConfig,
        device: torch.device,
        dtype: torch.dtype,
        on_host: HostShard | None = None,
        shard: Shard | None = None,
    ) -> None:
        """``device`` and ``dtype``: of the compute copies. ``on_host``: host memory of masters and
        staged copies, None: the masters are on ``device``. ``shard``: the shard that this rank
        updates, None: everything.
        """
        super().__init__()
        groups = list(groups)
        self._scaling = config.scaling
        self._pending: Handle | None = None  # of an update whose copies may not have arrived
        targets = target_indices(groups, config)
        self.layer = layer
        self.groups = {
            group.shape.name: GroupAdapter(group, targets[group.shape.name], config)
            for group in groups
            if targets[group.shape.name]
        }
        sizes = [group.sizes for group in self.groups.values()]
        sections = {name: [group_sizes[name] for group_sizes in sizes] for name in sizes[0]}
        self.layout = FlatLayout(sections, shard)
        masters = (
            torch.zeros(self.layout.shard_values, device=device)
            if on_host is None
            else on_host.masters
        )  # fp32 (values of the shard,)
        self.flat = nn.Parameter(masters)
        # The compute copies (values in the layer,), padding included
        self._copies = torch.zeros(
            self.layout.values, dtype=copy_dtype(config, dtype), device=device
        )
        self._staging = None if on_host is None else on_host.copies
        for adapter, parts in self._parts(self._copies):
            adapter.bind_copies(parts, dtype)

    def bind_gradient(self, grad: Tensor) -> None:
        """Have backward add to ``grad``, fp32 (values in the layer,), from here on."""
        self.grad = grad
        for adapter, parts in self._parts(grad):
            adapter.bind_gradient(parts)

    def _parts(self, flat: Tensor) -> Iterator[tuple[GroupAdapter, dict[str, Tensor]]]:
        """Each group's adapter with its part of each section of ``flat`` (values in the layer,)."""
        sections = {name: self.layout.tensors(flat, name) for name in self.layout.names}
        for index, adapter in enumerate(self.groups.values()):
            yield adapter, {name: tensors[index] for name, tensors in sections.items()}

    def reset(self, seed: int) -> None:
        """Set LoRA's initial values: A uniform as in torch's Linear and PEFT, B zero; the same with
        any number of ranks. ``start_magnitudes`` sets magnitudes.
        """
        whole = torch.zeros(self.layout.values)
        for index, (adapter, parts) in enumerate(self._parts(whole)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.layer) * 101 + index)
            bound = 1 / math.sqrt(adapter.group.shape.in_features)
            parts["a"].uniform_(-bound, bound, generator=generator)
        self.load(whole)

    @torch.no_grad()
    def start_magnitudes(self, frozen: FrozenLayer) -> None:
        """Set DoRA's initial magnitudes, the norms of the frozen rows. Every rank calls it."""
        whole = torch.zeros(self.layout.values, device=self._copies.device)
        for adapter, parts in self._parts(whole):
            assert adapter.magnitudes is not None
            weight = frozen.weight(adapter.group.shape.name)
            parts["m"].copy_(adapter.magnitudes.frozen_norms(weight))
        self.flat.add_(self.layout.shard.view(whole).to(self.flat.device))
        self.refresh()

    @torch.no_grad()
    def load(self, whole: Tensor) -> None:
        """Set the masters to ``whole``, fp32 (values in the layer,). Every rank calls it."""
        self.flat.copy_(self.layout.shard.view(whole))
        self.refresh()

    def refresh(self) -> None:
        """Make the compute copies from the masters. Every rank calls it."""
        self.stage()
        self.send()
        self.gather().wait()
        self._invalidate()

    def named(self, whole: Tensor, layer: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of each A (r, in), B (out, r) and magnitude vector (out,) in ``whole``
        (values in the layer,). ``layer``: index in the names, None: this layer's.
        """
        for adapter, parts in self._parts(whole):
            yield from adapter.named(self.layer if layer is None else layer, parts)

    @property
    def copy_bytes(self) -> int:
        """Bytes of this rank's shard of the compute copies."""
        return self.layout.shard.view(self._copies).nbytes

    @torch.no_grad()
    def stage(self) -> None:
        """Round this rank's masters to the copies' dtype, on the masters' device; B's times
        ``scaling``.
        """
        copies = self.layout.shard.view(self._copies) if self._staging is None else self._staging
        for section in self.layout.local_sections():
            scale = self._scaling if section.name == "b" else 1.0
            copies[section.span].copy_(self.flat[section.span] * scale)

    def send(self) -> None:
        """Copy the staged values from host to device; the host does not wait for it."""
        if self._staging is not None:
            copy(self.layout.shard.view(self._copies), self._staging)

    def gather(self) -> Handle:
        """Start gathering the other ranks' shards. Every rank calls it, in the same order."""
        if self.layout.shard.world_size == 1:
            return HandleGroup(())
        return all_gather(self._copies, self.layout.shard.view(self._copies))

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of all masters after the last update; only where this rank updates all."""
        assert self.layout.shard.world_size == 1, "this rank has a part of the masters"
        self.ready()
        yield from self.named(self.flat.detach())

    def expect(self, pending: Handle) -> None:
        """Record that an update is under way, for which ``ready`` waits."""
        self._pending = pending

    def ready(self) -> None:
        """Wait until the compute copies are those of the last update."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._invalidate()

    def _invalidate(self) -> None:
        for adapter in self.groups.values():
            adapter.invalidate()


def copy_dtype(config: LoraConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the compute copies, with GEMMs in ``dtype``. Magnitudes need fp32: in bf16 m / n
    is not exactly 1 at the start, and the model would not start as the frozen one.
    """
    return torch.float32 if config.use_dora else dtype
