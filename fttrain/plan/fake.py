"""Memory of one rank's step: the real strategy, built and stepped on fake tensors.

The CPU stands in for a card, since fake CUDA tensors need a build with CUDA. Buffers of the
``MemoryLedger`` are host memory and do not count. Collectives go to torch's ``fake`` backend, which
returns at once; no bytes are ever read.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

from fttrain.data.batch import MicroBatch
from fttrain.distributed.rank_group import RankGroup
from fttrain.memory.ledger import MemoryLedger
from fttrain.memory.parts import MemoryPart
from fttrain.model.head import chunk_rows
from fttrain.model.projection import QuantizedHead, ResidentHead
from fttrain.plan.live_bytes import LiveBytes
from fttrain.quant.scheme import dynamic_code
from fttrain.strategy.builder import strategy_page
from fttrain.strategy.context import BuildContext
from fttrain.strategy.optimizer_step import DeviceUpdate
from fttrain.strategy.spec import StepSize

CPU = torch.device("cpu")


class NeedsOtherRanks(Exception):
    """A rank gathers figures of the other ranks, which are not known yet."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values


@dataclass(frozen=True)
class PlannedGroup(RankGroup):
    """One of several ranks that are all at the same point and differ in ``known`` alone."""

    known: tuple[tuple[float, ...], ...] = ()  # each rank's values in ``gather``

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor

    def any(self, flag: bool) -> bool:
        return flag

    def maximum(self, value: float) -> float:
        return value

    def sum(self, value: int) -> int:
        return value * self.world_size

    def gather(self, values: list[float]) -> list[list[float]]:
        if not self.known:
            raise NeedsOtherRanks(values)
        return [list(values) for values in self.known]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return tensor

    def broadcast_str(self, text: str, source: int = 0) -> str:
        return text


class PlannedLedger(MemoryLedger):
    """Reservations, and buffers without memory. ``free_bytes``: of the planned card."""

    def __init__(self, group: RankGroup, free_bytes: int, live: LiveBytes | None = None) -> None:
        super().__init__(group)
        self._free_bytes, self._live = free_bytes, live

    @property
    def free_device_bytes(self) -> int:
        return self._free_bytes

    def allocate(self, part: MemoryPart) -> Tensor:
        size_bytes = next(r.size_bytes for r in self.reservations if r.part is part)
        assert self._live is not None, "this ledger is for reservations"
        with self._live.elsewhere():
            return torch.empty(size_bytes, dtype=torch.uint8)


class EmptyBase:
    """A ``FrozenBase`` without bytes."""

    def __init__(self, layers: int, tied: bool) -> None:
        self._layers, self.tied = layers, tied

    def __len__(self) -> int:
        return self._layers

    def read(self, layer: int, into: Tensor, offset_bytes: int = 0) -> None:
        """Leave ``into`` as it is."""

    def checksum(self, layer: int) -> None:
        return None

    def path(self, layer: int) -> Path:
        return Path("planned")

    def read_end(self, name: str, into: Tensor) -> None:
        """Leave ``into`` as it is."""


@dataclass(frozen=True)
class Peak:
    """The largest memory of a rank's tensors on its device."""

    building_bytes: int
    step_bytes: int


def run(context: BuildContext, kind: str) -> Peak:
    """Build the strategy of ``context`` on fake tensors, update it once, so that the optimizer has
    its state, and step it. The device of ``context`` is the CPU, which stands in for a card of
    ``kind``; its ledger is replaced.
    """
    dynamic_code(CPU)  # bitsandbytes makes it of real tensors and caches it
    group = context.group
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _fake_ranks(group), fake, _FakeBytes(kind=kind) as live:
        context = replace(
            context, ledger=PlannedLedger(group, context.ledger.free_device_bytes, live)
        )
        page = strategy_page(context.spec.strategy.name)
        model_slice = page.reserve(context)
        base = EmptyBase(context.architecture.layers, context.architecture.tied)
        strategy = page.build(context, base, model_slice, lambda done, total: None)
        building_bytes = live.peak
        if isinstance(strategy.update, DeviceUpdate):
            strategy.update.start(1.0, context.spec.optim.lr)
        _, places = strategy.data_parallel
        count = context.spec.size.gradient_accumulation_steps * (group.world_size // places)
        with live.elsewhere():  # small, and on the host until used
            targets = _chunk_tokens(context)
            batches = [full_batch(context.spec.size, index, targets) for index in range(count)]
        live.start_peak()
        # Its sums are zero, so it counts as a step without targets, which updates nothing.
        strategy.train_step(batches, 0, context.spec.optim.lr, lambda loss, norm: False)
        return Peak(building_bytes, live.peak)


def _chunk_tokens(context: BuildContext) -> int:
    """Tokens that fill one chunk of the head, and one more: further chunks need no more memory."""
    form = QuantizedHead if context.spec.placement.lm_head == "quantized" else ResidentHead
    vocabulary = int(context.architecture.config.vocab_size)
    tokens = context.spec.size.micro_batch_tokens
    return chunk_rows(vocabulary, context.dtype, tokens, form.chunk_factor) + 1


def full_batch(size: StepSize, index: int, targets: int | None = None) -> MicroBatch:
    """A micro-batch of full rows of ``size.row_documents`` documents each; the first ``targets``
    tokens have a target, None: all.
    """
    tokens = size.micro_batch_size * size.seq_len
    ids = torch.zeros(tokens, dtype=torch.int64)
    shorter, longer = divmod(size.seq_len, size.row_documents)
    row = (shorter + 1,) * longer + (shorter,) * (size.row_documents - longer)
    lengths = row * size.micro_batch_size
    trained = torch.arange(min(tokens, targets or tokens))
    ends = [min(end, len(trained)) for end in accumulate(lengths, initial=0)]
    target_counts = tuple(end - start for start, end in pairwise(ends))
    return MicroBatch(ids, ids.clone(), ids.clone(), lengths, index, trained, target_counts)


class _FakeBytes(LiveBytes):
    """Bytes of fake tensors. Operators that make no storage are handled here: ``FakeTensorMode`` is
    slow, and most operators do not need it.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check costs more than an operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:  # fake tensors have no numbers
            return 0.0 if args[0].dtype.is_floating_point else 0
        written = _written(func)
        if written is not None:
            return args[written] if isinstance(written, int) else (kwargs or {})[written]
        if _is_view(func) and isinstance(args[0], FakeTensor):
            return _view(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)


def _view(func: Any, args: Any, kwargs: dict[str, Any]) -> FakeTensor:
    """The view as ``FakeTensorMode`` makes it, in half the time: without a look-up and without
    counting, since its storage exists. Two of three operators of a step are views.
    """
    base = args[0]
    with in_kernel_invocation_manager(base.fake_mode):
        return FakeTensor(base.fake_mode, func(*args, **kwargs), base.fake_device)


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether ``func`` returns one tensor, a view of its first argument."""
    returns = func._schema.returns
    if len(returns) != 1 or not isinstance(returns[0].type, torch.TensorType):
        return False
    alias = returns[0].alias_info
    return alias is not None and not alias.is_write


@functools.cache
def _written(func: Any) -> int | str | None:
    """The argument that ``func`` writes into and returns (``add_``, ``out=``): its index, or its
    name where it is keyword-only. None: ``func`` may return something else.
    """
    schema = func._schema
    if len(schema.returns) != 1 or schema.name in ("aten::resize_", "aten::set_"):
        return None
    alias = schema.returns[0].alias_info
    if alias is None or not alias.is_write:
        return None
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return argument.name if argument.kwarg_only else index
    return None


@contextmanager
def _fake_ranks(group: RankGroup) -> Iterator[None]:
    """A process group whose other ranks do not exist."""
    if group.world_size == 1:
        yield
        return
    from torch.distributed._tools import fake_collectives  # noqa: F401  (registers fake kernels)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch_dist.init_process_group(
        "fake", rank=group.rank, world_size=group.world_size, store=FakeStore()
    )
    try:
        yield
    finally:
        torch_dist.destroy_process_group()
