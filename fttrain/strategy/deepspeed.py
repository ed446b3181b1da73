"""deepspeed: transformers' own model under DeepSpeed's ZeRO, which divides optimizer state,
gradients and weights among the ranks. All weights may train, or adapters as elsewhere.
"""

import os

from fttrain.store import FrozenBase
from fttrain.store.filling import Progress
from fttrain.strategy.protocol import Strategy
from fttrain.strategy.recipe import Plan
from fttrain.strategy.zero import books
from fttrain.strategy.zero.settings import Settings, resolve


def book(plan: Plan) -> Settings:
    """Memory that it needs; what DeepSpeed is told."""
    settings = resolve(plan, os.environ)
    books.book(plan, settings)
    return settings


def build(plan: Plan, base: FrozenBase, share: Settings, progress: Progress) -> Strategy:
    """Load the model and put DeepSpeed's engine around it."""
    # DeepSpeed looks at the environment while it is imported: without this it warns of a machine
    # without a GPU, and takes a GPU that rig.device=cpu leaves alone.
    os.environ["DS_ACCELERATOR"] = plan.group.device.type
    os.environ.setdefault("LOCAL_RANK", str(plan.group.local_rank))  # a single rank needs it, too
    # Late: it takes seconds to import, and is not installed everywhere.
    from fttrain.strategy.zero.strategy import DeepSpeed

    return DeepSpeed(plan, base, share, progress)
