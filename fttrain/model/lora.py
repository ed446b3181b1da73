"""The adapters: all that trains.

LoRA (Hu et al. 2021) adds ``scaling * B @ A`` to a frozen weight; at the start A (r, in) is random
and B (out, r) zero:

    x (N, in) ──── frozen W (out, in) ────────────┐
        └── A (r, in) ── B (out, r) ── * scaling ─┴── y (N, out)

The linears of a group share their input, so their A's are one, stacked (R, in) with
R = members * r; each B reads its own r columns of A x and adds to its own part of y. Each layer's
fp32 masters are one flat parameter, all A's before all B's, and its gradient one flat tensor: one
collective. With ``optim.shard`` a rank has the masters of its part alone, and fetches what the
others made of theirs.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fttrain.collectives import Handle, Handles, all_gather
from fttrain.errors import UserError
from fttrain.optim.flat import FlatLayout, Portion
from fttrain.quant.frozen_layer import GroupShape


@dataclass(frozen=True)
class LoraConfig:
    """Which linears get an adapter, and how large."""

    r: int = 16  # rank of the update
    lora_alpha: float = 32.0  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # probability of zeroing an input of the adapter, in [0, 1)
    # all-linear, or names such as (q_proj, v_proj)
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"lora.r={self.r}: a whole number of at least 1 is allowed")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora.lora_dropout={self.lora_dropout}: a number in [0, 1) is allowed")
        if self.lora_alpha <= 0:
            raise UserError(f"lora.lora_alpha={self.lora_alpha}: a number above 0 is allowed")
        if not self.target_modules:
            raise UserError(
                "lora.target_modules is empty: all-linear, or names such as [q_proj,v_proj] are "
                "allowed"
            )
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            object.__setattr__(self, "target_modules", (self.target_modules,))

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class GroupMembers:
    """A group's shapes and the names of its linears in the layer, such as self_attn.q_proj."""

    shape: GroupShape
    paths: tuple[str, ...]


def target_indices(groups: Iterable[GroupMembers], config: LoraConfig) -> dict[str, list[int]]:
    """Group name -> the members that get an adapter.

    Raises UserError for a name that no linear has.
    """
    groups = list(groups)
    known = [path.rsplit(".", 1)[-1] for group in groups for path in group.paths]
    wanted = known if config.target_modules == "all-linear" else list(config.target_modules)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(
            f"lora.target_modules: no linear is called {', '.join(unknown)}; there are "
            f"{', '.join(known)}"
        )
    return {
        group.shape.name: [
            i for i, path in enumerate(group.paths) if path.rsplit(".", 1)[-1] in wanted
        ]
        for group in groups
    }


class GroupAdapter:
    """One group's adapter: views into the layer's flat gradient and compute copies."""

    def __init__(self, group: GroupMembers, members: list[int], config: LoraConfig) -> None:
        self.group = group
        self.members = members
        self.r = config.r
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.rank = len(members) * config.r  # R
        rows = group.shape.rows
        self._rows = [rows[member] for member in members]  # of the group's output
        self._blocks = [slice(i * config.r, (i + 1) * config.r) for i in range(len(members))]

    @property
    def sizes(self) -> tuple[int, int]:
        """Values in all A's and in all B's."""
        out = sum(self.group.shape.out_features[member] for member in self.members)
        return self.rank * self.group.shape.in_features, out * self.r

    def bind_copies(self, a: Tensor, b: Tensor) -> None:
        """Take this adapter's parts of what computes: A's (R, in), and scaling * B of all members
        (their rows, r).
        """
        self.a, self.b = self._shaped(a, b)

    def bind_gradient(self, a: Tensor, b: Tensor) -> None:
        """Take this adapter's parts of a flat fp32 gradient of the layer."""
        self.a_grad, self.b_grad = self._shaped(a, b)

    def _shaped(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """All A's (R, in) and all B's (their rows, r), as views."""
        return a.view(self.rank, -1), b.view(-1, self.r)

    def add_to_(self, y: Tensor, down: Tensor) -> None:
        """``y`` (N, out) += scaling * B of ``down`` = A x (N, R)."""
        for rows, block, b in self._member_parts(self.b):
            y[:, rows].addmm_(down[:, block], b.t())

    def down_gradient(self, grad: Tensor) -> Tensor:
        """``grad`` of y (N, out) -> that of A x (N, R)."""
        parts = [grad[:, rows] @ b for rows, _, b in self._member_parts(self.b)]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def accumulate(self, grad_a: Tensor, down: Tensor, grad: Tensor) -> None:
        """Add to the fp32 gradient: A's (R, in), and B's from A x (N, R) and y's (N, out)."""
        self.a_grad.add_(grad_a)
        for rows, block, b_grad in self._member_parts(self.b_grad):
            # (r, out) and then transposed: the GEMM is faster that way round on a CPU
            b_grad.add_((down[:, block].t() @ grad[:, rows]).t(), alpha=self.scaling)

    def named(self, layer: int, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of each A (r, in) and B (out, r) in this adapter's parts of a flat one."""
        stacked_a, stacked_b = self._shaped(a, b)
        for member, (_, block, own_b) in zip(
            self.members, self._member_parts(stacked_b), strict=True
        ):
            name = f"model.layers.{layer}.{self.group.paths[member]}"
            yield f"{name}.lora_A", stacked_a[block]
            yield f"{name}.lora_B", own_b

    def _member_parts(self, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows in the group's output, columns in R, rows of ``b``) of each adapted member."""
        start = 0
        for rows, block in zip(self._rows, self._blocks, strict=True):
            end = start + rows.stop - rows.start
            yield rows, block, b[start:end]
            start = end


@dataclass(frozen=True)
class OnHost:
    """Where this rank's part of a layer's adapters is in host memory."""

    masters: Tensor  # fp32 (values of the part,)
    copies: Tensor  # the same in the compute dtype, on their way to the device


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
        portion: Portion | None = None,
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
        a_sizes, b_sizes = zip(*(group.sizes for group in self.groups.values()), strict=True)
        self.layout = FlatLayout({"a": a_sizes, "b": b_sizes}, portion)
        made = (
            torch.zeros(self.layout.own_values, device=device)
            if on_host is None
            else on_host.masters
        )
        self.flat = nn.Parameter(made)
        # What computes, (values,), padding and all
        self._copies = torch.zeros(self.layout.values, dtype=dtype, device=device)
        self._staging = None if on_host is None else on_host.copies
        for adapter, a, b in self._parts(self._copies):
            adapter.bind_copies(a, b)

    def bind_gradient(self, grad: Tensor) -> None:
        """Backward adds to ``grad`` fp32 (values in the layer,) from here on."""
        self.grad = grad
        for adapter, a, b in self._parts(grad):
            adapter.bind_gradient(a, b)

    def _parts(self, flat: Tensor) -> Iterator[tuple[GroupAdapter, Tensor, Tensor]]:
        """Each group's adapter with its A's and its B's in ``flat`` (values in the layer,)."""
        sections = (self.layout.tensors(flat, name) for name in ("a", "b"))
        return zip(self.groups.values(), *sections, strict=True)

    def reset(self, seed: int) -> None:
        """LoRA's start: A uniform as torch's Linear (so does PEFT), B zero; on any world_size."""
        whole = torch.zeros(self.layout.values)
        for index, (adapter, a, _) in enumerate(self._parts(whole)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + self.layer) * 101 + index)
            bound = 1 / math.sqrt(adapter.group.shape.in_features)
            a.uniform_(-bound, bound, generator=generator)
        self.load(whole)

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

    def named(self, whole: Tensor, layer: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of each A (r, in) and B (out, r) in ``whole`` (values in the layer,);
        ``layer``: whose, None: this one's.
        """
        for adapter, a, b in self._parts(whole):
            yield from adapter.named(self.layer if layer is None else layer, a, b)

    @property
    def copy_bytes(self) -> int:
        """Of this rank's part of the compute copies."""
        return self.layout.portion.of(self._copies).nbytes

    @torch.no_grad()
    def stage(self) -> None:
        """Round this rank's masters to the compute dtype, where they lie; B's times ``scaling``."""
        own = self.layout.portion.of(self._copies) if self._staging is None else self._staging
        for section in self.layout.own_sections():
            scale = self._scaling if section.name == "b" else 1.0
            own[section.own].copy_(self.flat[section.own] * scale)

    def send(self) -> None:
        """Copy what is staged on the host to the device; the host does not wait for it."""
        if self._staging is not None:
            self.layout.portion.of(self._copies).copy_(self._staging, non_blocking=True)

    def gather(self) -> Handle:
        """Start fetching the parts that other ranks update. Every rank calls it, in one order."""
        if self.layout.portion.world_size == 1:
            return Handles(())
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
