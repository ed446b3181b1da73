"""pipeline: ResidentStore of a rank's own contiguous layers x one_f_one_b. Only boundary
activations and their gradients travel; each adapter has one home, so there is nothing to sum.
"""

from dataclasses import replace

from fttrain.schedule.one_f_one_b import in_flight
from fttrain.store import FrozenBase
from fttrain.store.filling import Progress, book_layers, to_device
from fttrain.store.hostpool import HostPool
from fttrain.store.resident import ResidentStore
from fttrain.strategy import parts, trained
from fttrain.strategy.balance import balance
from fttrain.strategy.native import join
from fttrain.strategy.parts import Share
from fttrain.strategy.pipeline_stage import PipelineStage
from fttrain.strategy.recipe import Plan
from fttrain.strategy.sync import NoSync


def book(plan: Plan) -> Share:
    """Divide the layers among the stages; host memory that this one needs.

    Raises UserError where the layers do not fit.
    """
    group = plan.group
    share = _shares(plan)[group.rank]
    parts.book(plan, share, _kept(plan))
    book_layers(plan.pool, len(share.layers), plan.layer_bytes)
    return share


def build(plan: Plan, base: FrozenBase, share: Share, progress: Progress) -> PipelineStage:
    """Load this stage's layers onto its device and join the parts."""
    flats = to_device(base, share.layers, plan.layer_bytes, plan.pool, progress)
    store = ResidentStore(flats, plan.frozen_format)
    return PipelineStage(join(plan, base, share, store, _kept(plan), NoSync()))


def fixed_bytes(plan: Plan) -> int:
    """What this stage takes on its device whatever its layers are: all that is booked for none."""
    group = plan.group
    books = replace(plan, pool=HostPool(group))
    none = Share(range(0), group.rank == 0, group.rank == group.world_size - 1)
    parts.book(books, none, _kept(plan))
    return sum(b.size_bytes for b in books.pool.bookings if b.place == "device")


def _kept(plan: Plan) -> int:
    """Micro-batches that this stage keeps at most between forward and backward."""
    stages = plan.group.world_size
    of_a_step = plan.recipe.size.gradient_accumulation_steps * stages
    return min(in_flight(plan.group.rank, stages), of_a_step)


def _shares(plan: Plan) -> list[Share]:
    """Each stage's part, balanced by the memory that its device has free."""
    group = plan.group
    layers = plan.architecture.layers
    policies = plan.recipe.placement.policies(layers)
    # Of a layer of the mean: which ones a stage gets is not known yet.
    saved_bytes = -(-sum(parts.saved_bytes(plan, policy) for policy in policies) // layers)
    own = [
        plan.layer_bytes + trained.adapter_bytes(plan) + _kept(plan) * saved_bytes,
        fixed_bytes(plan),
        plan.pool.free_device_bytes,
    ]
    layer_bytes, fixed, free_bytes = (
        [int(value) for value in column]
        for column in zip(*group.gather([float(value) for value in own]), strict=True)
    )
    ranges = balance(layers, layer_bytes, fixed, free_bytes)
    return [
        Share(part, stage == 0, stage == group.world_size - 1) for stage, part in enumerate(ranges)
    ]
