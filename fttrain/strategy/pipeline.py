"""pipeline: ResidentStore of a rank's own contiguous layers x one_f_one_b. Only boundary
activations and their gradients travel; each adapter has one home on its machine, so there is
nothing to sum. Several machines are as many pipelines side by side, with the same stages, which
divide the micro-batches; then a stage sums its gradients with its like on the other machines.
"""

from dataclasses import replace

from fttrain.memory.ledger import MemoryLedger
from fttrain.schedule.one_f_one_b import in_flight
from fttrain.store import FrozenBase
from fttrain.store.loading import Progress, reserve_layers, to_device
from fttrain.store.resident import ResidentStore
from fttrain.strategy import trainable_state
from fttrain.strategy.balance import balance
from fttrain.strategy.grad_reduce import gradient_sync
from fttrain.strategy.model_slice import ModelSlice, reserve_slice, saved_bytes
from fttrain.strategy.native import build_parts
from fttrain.strategy.pipeline_stage import PipelineStage
from fttrain.strategy.spec import BuildContext


def reserve(context: BuildContext) -> ModelSlice:
    """Divide the layers among the stages; host memory that this one needs.

    Raises UserError where the layers do not fit.
    """
    model_slice = _slices(context)[context.group.intra_node.rank]
    reserve_slice(context, model_slice, _kept(context))
    reserve_layers(context.ledger, len(model_slice.layers), context.layer_bytes)
    return model_slice


def build(
    context: BuildContext, base: FrozenBase, model_slice: ModelSlice, progress: Progress
) -> PipelineStage:
    """Load this stage's layers onto its device and join the parts."""
    flats = to_device(base, model_slice.layers, context.layer_bytes, context.ledger, progress)
    store = ResidentStore(flats, context.frozen_format)
    sync = gradient_sync(context.group.inter_node)
    return PipelineStage(build_parts(context, base, model_slice, store, _kept(context), sync))


def fixed_bytes(context: BuildContext) -> int:
    """What this stage takes on its device whatever its layers are: all that is reserved for
    none.
    """
    machine = context.group.intra_node
    books = replace(context, ledger=MemoryLedger(context.group))
    none = ModelSlice(range(0), machine.rank == 0, machine.rank == machine.world_size - 1)
    reserve_slice(books, none, _kept(context))
    return books.ledger.device_bytes


def _kept(context: BuildContext) -> int:
    """Micro-batches that this stage keeps at most between forward and backward."""
    machine = context.group.intra_node
    of_a_step = context.spec.size.gradient_accumulation_steps * machine.world_size
    return min(in_flight(machine.rank, machine.world_size), of_a_step)


def _slices(context: BuildContext) -> list[ModelSlice]:
    """Each stage's part, balanced by the memory that its device has free, on whichever machine that
    is least: a stage has the same layers everywhere.
    """
    layers = context.architecture.layers
    policies = context.spec.placement.policies(layers)
    # Of a layer of the mean: which ones a stage gets is not known yet.
    of_layers = sum(saved_bytes(context, policy) for policy in policies)
    mean_bytes = -(-of_layers // layers)
    own = [
        context.layer_bytes + trainable_state.adapter_bytes(context) + _kept(context) * mean_bytes,
        fixed_bytes(context),
        context.ledger.free_device_bytes,
    ]
    ranks = context.group.gather([float(value) for value in own])
    stages = context.group.intra_node.world_size
    layer_bytes, fixed, free_bytes = (
        [int(fullest(by_rank[stage::stages])) for stage in range(stages)]
        for fullest, by_rank in zip((max, max, min), zip(*ranks, strict=True), strict=True)
    )
    ranges = balance(layers, layer_bytes, fixed, free_bytes)
    return [ModelSlice(part, stage == 0, stage == stages - 1) for stage, part in enumerate(ranges)]
