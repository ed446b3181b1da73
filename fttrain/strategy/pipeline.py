"""pipeline: ResidentStore of a rank's own contiguous layers x one_f_one_b. Only boundary
activations and their gradients travel; each adapter has one home on its machine, so there is
nothing to sum. Several machines are as many pipelines side by side, with the same stages, which
divide the micro-batches; then a stage sums its gradients with its like on the other machines.
"""

from dataclasses import replace

from fttrain.memory.ledger import MemoryLedger
from fttrain.schedule.one_f_one_b import in_flight
from fttrain.store import FrozenBase
from fttrain.store.filling import Progress, reserve_layers, to_device
from fttrain.store.resident import ResidentStore
from fttrain.strategy import parts, trained
from fttrain.strategy.balance import balance
from fttrain.strategy.native import join
from fttrain.strategy.parts import Share
from fttrain.strategy.pipeline_stage import PipelineStage
from fttrain.strategy.recipe import Plan
from fttrain.strategy.sync import gradient_sync


def book(plan: Plan) -> Share:
    """Divide the layers among the stages; host memory that this one needs.

    Raises UserError where the layers do not fit.
    """
    share = _shares(plan)[plan.group.intra_node.rank]
    parts.book(plan, share, _kept(plan))
    reserve_layers(plan.pool, len(share.layers), plan.layer_bytes)
    return share


def build(plan: Plan, base: FrozenBase, share: Share, progress: Progress) -> PipelineStage:
    """Load this stage's layers onto its device and join the parts."""
    flats = to_device(base, share.layers, plan.layer_bytes, plan.pool, progress)
    store = ResidentStore(flats, plan.frozen_format)
    sync = gradient_sync(plan.group.inter_node)
    return PipelineStage(join(plan, base, share, store, _kept(plan), sync))


def fixed_bytes(plan: Plan) -> int:
    """What this stage takes on its device whatever its layers are: all that is booked for none."""
    machine = plan.group.intra_node
    books = replace(plan, pool=MemoryLedger(plan.group))
    none = Share(range(0), machine.rank == 0, machine.rank == machine.world_size - 1)
    parts.book(books, none, _kept(plan))
    return books.pool.device_bytes


def _kept(plan: Plan) -> int:
    """Micro-batches that this stage keeps at most between forward and backward."""
    machine = plan.group.intra_node
    of_a_step = plan.recipe.size.gradient_accumulation_steps * machine.world_size
    return min(in_flight(machine.rank, machine.world_size), of_a_step)


def _shares(plan: Plan) -> list[Share]:
    """Each stage's part, balanced by the memory that its device has free, on whichever machine that
    is least: a stage has the same layers everywhere.
    """
    layers = plan.architecture.layers
    policies = plan.recipe.placement.policies(layers)
    # Of a layer of the mean: which ones a stage gets is not known yet.
    saved_bytes = -(-sum(parts.saved_bytes(plan, policy) for policy in policies) // layers)
    own = [
        plan.layer_bytes + trained.adapter_bytes(plan) + _kept(plan) * saved_bytes,
        fixed_bytes(plan),
        plan.pool.free_device_bytes,
    ]
    ranks = plan.group.gather([float(value) for value in own])
    stages = plan.group.intra_node.world_size
    layer_bytes, fixed, free_bytes = (
        [int(fullest(by_rank[stage::stages])) for stage in range(stages)]
        for fullest, by_rank in zip((max, max, min), zip(*ranks, strict=True), strict=True)
    )
    ranges = balance(layers, layer_bytes, fixed, free_bytes)
    return [Share(part, stage == 0, stage == stages - 1) for stage, part in enumerate(ranges)]
