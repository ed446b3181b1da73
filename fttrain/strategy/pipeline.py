"""pipeline: ResidentStore of a rank's contiguous layers x one_f_one_b. Only boundary activations
and their gradients travel. Each adapter is on one rank of a node, so there is no reduction inside
it. Several nodes run one pipeline each, with the same stages, and divide the micro-batches; then
a stage reduces its gradients over the nodes.
"""

from dataclasses import replace

from fttrain.memory.ledger import MemoryLedger
from fttrain.schedule.one_f_one_b import in_flight
from fttrain.store import FrozenBase
from fttrain.store.loading import Progress, reserve_layers, to_device
from fttrain.store.resident import ResidentStore
from fttrain.strategy import trainable_state
from fttrain.strategy.balance import balance
from fttrain.strategy.context import BuildContext
from fttrain.strategy.grad_reduce import gradient_sync
from fttrain.strategy.model_slice import ModelSlice, reserve_slice, saved_bytes
from fttrain.strategy.native import build_parts
from fttrain.strategy.pipeline_stage import PipelineStage


def reserve(context: BuildContext) -> ModelSlice:
    """Divide the layers among the stages, and reserve this one's memory.

    Raises UserError where the layers do not fit.
    """
    model_slice = _slices(context)[context.group.intra_node.rank]
    reserve_slice(context, model_slice, _in_flight(context))
    reserve_layers(context.ledger, len(model_slice.layers), context.layer_bytes)
    return model_slice


def build(
    context: BuildContext, base: FrozenBase, model_slice: ModelSlice, progress: Progress
) -> PipelineStage:
    """Load this stage's layers onto its device and join the parts."""
    flats = to_device(base, model_slice.layers, context.layer_bytes, context.ledger, progress)
    store = ResidentStore(flats, context.frozen_format)
    sync = gradient_sync(context.group.inter_node)
    return PipelineStage(build_parts(context, base, model_slice, store, _in_flight(context), sync))


def fixed_bytes(context: BuildContext) -> int:
    """Bytes that this stage takes on its device without any layer."""
    node = context.group.intra_node
    without_layers = replace(context, ledger=MemoryLedger(context.group))
    empty = ModelSlice(range(0), node.rank == 0, node.rank == node.world_size - 1)
    reserve_slice(without_layers, empty, _in_flight(context))
    return without_layers.ledger.device_bytes


def _in_flight(context: BuildContext) -> int:
    """The most micro-batches that this stage has between forward and backward."""
    node = context.group.intra_node
    of_a_step = context.spec.size.gradient_accumulation_steps * node.world_size
    return min(in_flight(node.rank, node.world_size), of_a_step)


def _slices(context: BuildContext) -> list[ModelSlice]:
    """Each stage's part, balanced by free device memory. A stage has the same layers on every node,
    so the node with the least free memory counts.
    """
    layers = context.architecture.layers
    policies = context.spec.placement.policies(layers)
    # The mean over all layers: which ones a stage gets is not known yet.
    all_layers_bytes = sum(saved_bytes(context, policy) for policy in policies)
    mean_bytes = -(-all_layers_bytes // layers)
    needs = [
        context.layer_bytes
        + trainable_state.adapter_bytes(context)
        + _in_flight(context) * mean_bytes,
        fixed_bytes(context),
        context.ledger.free_device_bytes,
    ]
    ranks = context.group.gather([float(value) for value in needs])
    stages = context.group.intra_node.world_size
    layer_bytes, fixed, free_bytes = (
        [int(fullest(by_rank[stage::stages])) for stage in range(stages)]
        for fullest, by_rank in zip((max, max, min), zip(*ranks, strict=True), strict=True)
    )
    ranges = balance(layers, layer_bytes, fixed, free_bytes)
    return [ModelSlice(part, stage == 0, stage == stages - 1) for stage, part in enumerate(ranges)]
