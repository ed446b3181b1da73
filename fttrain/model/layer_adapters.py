"""All adapters of one layer: flat masters, flat gradient, and the copies that compute.

Each layer's fp32 masters are one flat parameter (``optim/flat.py``: A's, B's, magnitudes), and its
gradient one flat tensor: one collective. With ``optim.shard`` a rank has the masters of its part
alone, and fetches what the others made of theirs.
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
class OnHost:
    """Where this rank's part of a layer's adapters is in host memory."""

    masters: Tensor  # fp32 (values of the part,)
    copies: Tensor  # the same in ``copy_dtype``, on their way to the device


class LayerAdapters(nn.Module):
    """All adapters of one layer. ``flat`` is the fp32 parameter: the part that this rank updates.

    The gradient is a flat fp32 tensor on the device that computes; ``bind_gradient`` says which.
    """

    def __init__(
        self,
        layer: int,
        groups: Iterable[GroupMembers],
        config: LoraConfig,
        device: torch.device,
        dtype: torch.dtype,
        on_host: OnHost | None = None,
        portion: Shard | None = None,
    ) -> None:
        """``device`` and ``dtype``: of the compute copies. ``on_host``: where the masters are,
        None: on ``device``. ``portion``: what this rank updates, None: everything.
        """
        super().__init__()
        groups = list(groups)
        self._scaling = config.scaling
        self._on_way: Handle | None = None  # of an update whose copies may not be here yet
        targets = target_indices(groups, config)
        self.layer = layer
        self.groups = {
            group.shape.name: GroupAdapter(group, targets[group.shape.name], config)
            for group in groups
            if targets[group.shape.name]
        }
        sizes = [group.sizes for group in self.groups.values()]
        sections = {name: [own[name] for own in sizes] for name in sizes[0]}
        self.layout = FlatLayout(sections, portion)
        made = (
            torch.zeros(self.layout.own_values, device=device)
            if on_host is None
            else on_host.masters
        )
        self.flat = nn.Parameter(made)
        # What computes, (values,), padding and all
        copies_in = copy_dtype(config, dtype)
        self._copies = torch.zeros(self.layout.values, dtype=copies_in, device=device)
        self._staging = None if on_host is None else on_host.copies
        for adapter, parts in self._parts(self._copies):
            adapter.bind_copies(parts, dtype)

    def bind_gradient(self, grad: Tensor) -> None:
        """Backward adds to ``grad`` fp32 (values in the layer,) from here on."""
        self.grad = grad
        for adapter, parts in self._parts(grad):
            adapter.bind_gradient(parts)

    def _parts(self, flat: Tensor) -> Iterator[tuple[GroupAdapter, dict[str, Tensor]]]:
        """Each group's adapter with its part of each section of ``flat`` (values in the layer,)."""
        sections = {name: self.layout.tensors(flat, name) for name in self.layout.names}
        for place, adapter in enumerate(self.groups.values()):
            yield adapter, {name: tensors[place] for name, tensors in sections.items()}

    def reset(self, seed: int) -> None:
        """LoRA's start: A uniform as torch's Linear (so does PEFT), B zero; on any world_size.

        Magnitudes, if any, are still to come: ``start_magnitudes``.
        """
        whole = torch.zeros(self.layout.values)
        for index, (adapter, parts) in enumerate(self._parts(whole)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.layer) * 101 + index)
            bound = 1 / math.sqrt(adapter.group.shape.in_features)
            parts["a"].uniform_(-bound, bound, generator=generator)
        self.load(whole)

    @torch.no_grad()
    def start_magnitudes(self, frozen: FrozenLayer) -> None:
        """DoRA's start: each is the norm of its frozen row. Every rank calls it."""
        whole = torch.zeros(self.layout.values, device=self._copies.device)
        for adapter, parts in self._parts(whole):
            assert adapter.magnitudes is not None
            weight = frozen.weight(adapter.group.shape.name)
            parts["m"].copy_(adapter.magnitudes.frozen_norms(weight))
        self.flat.add_(self.layout.portion.of(whole).to(self.flat.device))
        self.refresh()

    @torch.no_grad()
    def load(self, whole: Tensor) -> None:
        """Take masters from ``whole`` fp32 (values in the layer,). Every rank calls it."""
        self.flat.copy_(self.layout.portion.of(whole))
        self.refresh()

    def refresh(self) -> None:
        """Bring the compute copies to what the masters are. Every rank calls it."""
        self.stage()
        self.send()
        self.gather().wait()
        self._invalidate()

    def named(self, whole: Tensor, layer: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of each A (r, in), B (out, r) and magnitude vector (out,) in ``whole``
        (values in the layer,); ``layer``: whose, None: this one's.
        """
        for adapter, parts in self._parts(whole):
            yield from adapter.named(self.layer if layer is None else layer, parts)

    @property
    def copy_bytes(self) -> int:
        """Of this rank's part of the compute copies."""
        return self.layout.portion.of(self._copies).nbytes

    @torch.no_grad()
    def stage(self) -> None:
        """Round this rank's masters to what computes, where they lie; B's times ``scaling``."""
        own = self.layout.portion.of(self._copies) if self._staging is None else self._staging
        for section in self.layout.own_sections():
            scale = self._scaling if section.name == "b" else 1.0
            own[section.own].copy_(self.flat[section.own] * scale)

    def send(self) -> None:
        """Copy what is staged on the host to the device; the host does not wait for it."""
        if self._staging is not None:
            copy(self.layout.portion.of(self._copies), self._staging)

    def gather(self) -> Handle:
        """Start fetching the parts that other ranks update. Every rank calls it, in one order."""
        if self.layout.portion.world_size == 1:
            return HandleGroup(())
        return all_gather(self._copies, self.layout.portion.of(self._copies))

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """As they are after the last update, where this rank updates them all."""
        assert self.layout.portion.world_size == 1, "this rank has a part of the masters"
        self.ready()
        yield from self.named(self.flat.detach())

    def expect(self, on_way: Handle) -> None:
        """An update is under way; ``ready`` waits for it."""
        self._on_way = on_way

    def ready(self) -> None:
        """The compute copies are those of the last update for whoever computes after this."""
        if self._on_way is not None:
            self._on_way.wait()
            self._on_way = None
            self._invalidate()

    def _invalidate(self) -> None:
        for adapter in self.groups.values():
            adapter.invalidate()


def copy_dtype(config: LoraConfig, dtype: torch.dtype) -> torch.dtype:
    """What compute copies are kept in; GEMMs are in ``dtype``. Magnitudes need fp32: in bf16 no m
    / n is 1, and the frozen model would not be itself.
    """
    return torch.float32 if config.use_dora else dtype
