"""Seconds of an optimizer step, from what a step computes and moves and a rig's rates.

    compute     GEMMs at their rate, dequantisation, and the rest of a layer at that of real steps
    a pass      the longest of: compute, link between ranks, copies to the card, copies to the host;
                they run beside each other. A CPU computes, copies and sends with the same cores,
                one after the other
    a step      its passes, and what nothing hides: a streamed head, the last gradient's sum, the
                update on the device, the part of the host's update that outlasts the next forward

A step is one in the middle of a run: layers in the slots where passes meet are not copied again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fttrain.plan.memory import ReservedRank
from fttrain.plan.work import (
    dequantisations,
    head_dequantised_bytes,
    head_flops,
    layer_values,
    layer_work,
    weight_bytes,
)
from fttrain.rig.profile import CardProfile, CopyRates, RigProfile
from fttrain.store.sharded import SLOTS
from fttrain.strategy import trainable_state
from fttrain.strategy.context import BuildContext
from fttrain.strategy.model_slice import activation_bytes, slice_policies
from fttrain.util.errors import UserError

BACKWARD_SHARE = 2 / 3  # of a layer's work outside GEMMs


@dataclass
class PassTime:
    """Seconds of concurrent work in one pass over a rank's layers."""

    compute_s: float = 0.0
    link_s: float = 0.0
    to_card_s: float = 0.0
    to_host_s: float = 0.0
    cores_s: float = 0.0  # seconds of the computing cores that sending and copying take

    @property
    def seconds(self) -> float:
        return max(self.compute_s + self.cores_s, self.link_s, self.to_card_s, self.to_host_s)

    @property
    def limit(self) -> str:
        """The longest of the concurrent kinds of work."""
        sides = {
            "compute": self.compute_s + self.cores_s,
            "link": self.link_s,
            "to the card": self.to_card_s,
            "to the host": self.to_host_s,
        }
        return max(sides, key=lambda side: sides[side])


@dataclass(frozen=True)
class StepTime:
    """The time of an optimizer step."""

    seconds: float
    tokens_per_s: float  # of all ranks
    limit: str  # the bottleneck of a pass: compute | link | to the card | to the host


def step_time(reserved: Sequence[ReservedRank], rig: RigProfile) -> StepTime:
    """The time of a step of all ranks. Raises UserError for a rate that ``rig`` lacks."""
    ranks = [_Rank(plan, rig) for plan in reserved]
    if reserved[0].context.spec.strategy.name == "pipeline":
        seconds, slowest = _pipeline(ranks)
    else:  # every rank waits for the slowest
        seconds, slowest = max((rank.data_parallel_s(), rank) for rank in ranks)
    size = reserved[0].context.spec.size
    tokens = size.micro_batch_size * size.seq_len * size.gradient_accumulation_steps * len(ranks)
    return StepTime(seconds, tokens / seconds, slowest.backward(1).limit)


def _pipeline(ranks: "Sequence[_Rank]") -> tuple[float, "_Rank"]:
    """(seconds, slowest rank) of a pipeline: its longest stage for every micro-batch, and the
    bubble while the pipeline fills and empties.
    """
    slowest = max(ranks, key=lambda rank: rank.stage_s())
    micro_batches = slowest.accumulation * len(ranks)
    bubble_s = sum(rank.stage_s() for rank in ranks if rank is not slowest)
    update_s = max(rank.update_s() for rank in ranks)
    return micro_batches * slowest.stage_s() + bubble_s + update_s, slowest


def rate(value: float | None, rig: RigProfile, name: str) -> float:
    """Return ``value``. Raises UserError where the profile lacks it."""
    if value is None:
        raise UserError(
            f"rig {rig.name}: {name} is not in its profile; `fttrain measure`, or another "
            "rig.profile helps"
        )
    return value


class _Rank:
    """Times of one rank's work at its card's rates."""

    def __init__(self, reserved: ReservedRank, rig: RigProfile) -> None:
        self._context, self._layers = reserved.context, reserved.model_slice.layers
        self._model_slice, self._rig = reserved.model_slice, rig
        self._card: CardProfile = rig.cards[reserved.context.group.rank]
        spec = self._context.spec
        self.accumulation = spec.size.gradient_accumulation_steps
        self._tokens = spec.size.micro_batch_size * spec.size.seq_len
        self._policies = slice_policies(self._context, reserved.model_slice)
        self._layout = trainable_state.layout_of(self._context)
        self._world_size = self._context.group.world_size
        self._on_cpu = self._card.kind == "cpu"

    def __lt__(self, other: "_Rank") -> bool:
        return self._context.group.rank < other._context.group.rank

    def data_parallel_s(self) -> float:
        together = self._context.spec.schedule.size(self.accumulation)
        full, rest = divmod(self.accumulation, together)
        groups = [together] * full + [rest] * bool(rest)
        seconds = 0.0
        for number, group in enumerate(groups):
            backward = self.backward(group)
            if number == len(groups) - 1:
                self._add_sums(backward)
            seconds += self.forward(group).seconds + backward.seconds + self._head_s(group)
        return seconds + self._sum_s() + self.update_s()

    def stage_s(self) -> float:
        """Seconds of a micro-batch, forward and backward."""
        seconds = self.forward(1).seconds + self.backward(1).seconds
        return seconds + (self._head_s(1) if self._model_slice.has_head else 0.0)

    def forward(self, micro_batches: int) -> PassTime:
        """The forward pass of ``micro_batches``."""
        time = self._pass(micro_batches, backward=False)
        time.to_host_s += self._to_host_s(micro_batches * self._saved_bytes())
        return self._on_cores(time)

    def backward(self, micro_batches: int) -> PassTime:
        """The backward pass of ``micro_batches``, with the copies of tensors saved on the host."""
        time = self._pass(micro_batches, backward=True)
        time.to_card_s += self._to_card_s(micro_batches * self._saved_bytes())
        if self._context.spec.optim.offload:
            values = self._layout.shard_values * len(self._layers)
            time.to_host_s += self._to_host_s(trainable_state.FP32_BYTES * values)
        return self._on_cores(time)

    def _on_cores(self, time: PassTime) -> PassTime:
        """``time`` with a CPU's copies, which stay within its memory, as work of its cores."""
        if self._on_cpu:
            time.cores_s += time.to_card_s + time.to_host_s
            time.to_card_s = time.to_host_s = 0.0
        return time

    def _pass(self, micro_batches: int, backward: bool) -> PassTime:
        time = PassTime(self._compute_s(micro_batches, backward))
        layers = len(self._layers)
        strategy = self._context.spec.strategy
        if strategy.name == "shard" and self._world_size > 1:
            moved = max(0, layers - SLOTS)
            self._add_messages(time, moved, "all_gather", self._context.layer_bytes)
        elif strategy.name == "stream":
            resident = strategy.resident(self._context.group.rank, self._world_size, layers)
            moved = max(0, layers - resident - strategy.slots)
            time.to_card_s += self._to_card_s(moved * self._context.layer_bytes)
        elif strategy.name == "pipeline" and self._world_size > 1:
            row_bytes = self._context.architecture.hidden * self._context.dtype.itemsize
            size_bytes = self._tokens * row_bytes
            self._add_messages(time, micro_batches, "send_recv", size_bytes)
        return time

    def _add_messages(self, time: PassTime, count: int, collective: str, size_bytes: float) -> None:
        time.link_s += count * self._link_s(collective, size_bytes)
        if self._on_cpu:
            time.cores_s += count * self._rig.link().cores_s(collective, size_bytes)

    def _compute_s(self, micro_batches: int, backward: bool) -> float:
        spec, a = self._context.spec, self._context.architecture
        flops = 0.0
        for policy in self._policies:
            work = layer_work(a, spec.lora, policy, spec.size.seq_len)
            flops += work.backward if backward else work.forward
        dequantised_layers = dequantisations(self._context, micro_batches) * len(self._layers)
        tokens = micro_batches * self._tokens
        seconds = tokens * flops / self._gemm() + tokens * self._outside_gemms_s(backward)
        return seconds + self._dequantise_s(dequantised_layers * weight_bytes(self._context))

    def _outside_gemms_s(self, backward: bool) -> float:
        """Seconds of a token outside GEMMs, in all layers. The policy matters little: norms, rotary
        and SwiGLU are recomputed under every one.
        """
        values_per_s = self._card.layer_values_per_s
        if values_per_s is None:
            return 0.0
        share = BACKWARD_SHARE if backward else 1 - BACKWARD_SHARE
        return share * len(self._layers) * layer_values(self._context.architecture) / values_per_s

    def _head_s(self, micro_batches: int) -> float:
        """Seconds of the head: only targets have logits. Copying a streamed table is not hidden."""
        context = self._context
        flop_per_s = self._card.head_flop_per_s or self._gemm()
        targets = micro_batches * self._tokens * context.spec.size.target_share
        seconds = targets * head_flops(context.architecture) / flop_per_s
        seconds += self._dequantise_s(micro_batches * head_dequantised_bytes(context))
        if context.spec.placement.lm_head == "host":
            seconds += self._to_card_s(context.table_bytes)
        return seconds

    def _saved_bytes(self) -> float:
        """Bytes that one micro-batch's layers save on the host."""
        context, saved_bytes = self._context, 0
        boundary_bytes = self._tokens * context.architecture.hidden * context.dtype.itemsize
        on_host = context.spec.placement.layer_inputs == "host"
        for policy in self._policies:
            if policy == "offload":
                saved_bytes += activation_bytes(context)
            elif policy == "recompute" and on_host:
                saved_bytes += boundary_bytes
        return saved_bytes

    def _add_sums(self, time: PassTime) -> None:
        """Add the reduction of adapter gradients over all ranks, layer after layer."""
        if self._sum_bytes():
            self._add_messages(time, len(self._layers), self._sum_name(), self._sum_bytes())

    def _sum_s(self) -> float:
        """Seconds of the last layer's reduction, which nothing hides."""
        return self._link_s(self._sum_name(), self._sum_bytes()) if self._sum_bytes() else 0.0

    def _sum_name(self) -> str:
        return "reduce_scatter" if self._context.spec.optim.shard else "all_reduce"

    def _sum_bytes(self) -> int:
        """Bytes of a layer's adapter gradient; 0 where no other rank adds to it."""
        if self._world_size == 1 or self._context.spec.strategy.name == "pipeline":
            return 0
        return trainable_state.FP32_BYTES * self._layout.values

    def update_s(self) -> float:
        """Seconds of the optimizer that the next forward does not hide."""
        context, rig, layers = self._context, self._rig, len(self._layers)
        layout = self._layout
        if not context.spec.optim.offload:
            moved = update_bytes(context) * layers
            seconds = moved / rate(self._card.memory_bytes_per_s, rig, "cards.memory_bytes_per_s")
            if context.spec.optim.shard and self._world_size > 1:
                seconds += layers * self._link_s(
                    "all_gather", context.dtype.itemsize * layout.values
                )
            return seconds
        values = layout.shard_values * layers * self._world_size  # of all ranks, on one host
        host_s = values / rate(rig.host.adamw_values_per_s, rig, "host.adamw_values_per_s")
        together = context.spec.schedule.size(self.accumulation)
        return max(0.0, host_s - self.forward(together).seconds)

    def _link_s(self, collective: str, size_bytes: float) -> float:
        return self._rig.link().seconds(collective, size_bytes)

    def _dequantise_s(self, size_bytes: float) -> float:
        if not size_bytes:
            return 0.0
        bytes_per_s = self._card.dequantise_bytes_per_s
        return size_bytes / rate(bytes_per_s, self._rig, "cards.dequantise_bytes_per_s")

    def _gemm(self) -> float:
        return rate(self._card.gemm_flop_per_s, self._rig, "cards.gemm_flop_per_s")

    def _to_card_s(self, size_bytes: float) -> float:
        return self._copied_s(size_bytes, self._card.to_card, "cards.to_card")

    def _to_host_s(self, size_bytes: float) -> float:
        return self._copied_s(size_bytes, self._card.to_host, "cards.to_host")

    def _copied_s(self, size_bytes: float, rates: CopyRates, name: str) -> float:
        """Seconds of a copy while all cards copy. A CPU copies within its own memory."""
        if not size_bytes:
            return 0.0
        bytes_per_s = rates.all_cards_bytes_per_s or rates.pinned_bytes_per_s
        if self._card.kind == "cpu" and bytes_per_s is None:
            bytes_per_s, name = self._card.memory_bytes_per_s, "cards.memory_bytes_per_s"
        return size_bytes / rate(bytes_per_s, self._rig, name)


def update_bytes(context: BuildContext) -> int:
    """Bytes that one layer's update reads and writes on the device: masters and moments both ways,
    the gradient, the compute copies.
    """
    layout = trainable_state.layout_of(context)
    adapter_bytes = trainable_state.adapter_bytes(context)
    copies = context.dtype.itemsize * layout.values
    gradient = trainable_state.FP32_BYTES * layout.shard_values
    return 2 * max(0, adapter_bytes - copies - gradient) + gradient + copies
