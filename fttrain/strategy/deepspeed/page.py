"""deepspeed: transformers' own model under DeepSpeed's ZeRO, which divides optimizer state,
gradients and weights among the ranks. All weights may train, or adapters as elsewhere.
"""

import os

from fttrain.store import FrozenBase
from fttrain.store.loading import Progress
from fttrain.strategy.deepspeed import reservations
from fttrain.strategy.deepspeed.settings import Settings, resolve
from fttrain.strategy.protocol import Strategy
from fttrain.strategy.spec import BuildContext


def reserve(context: BuildContext) -> Settings:
    """Memory that it needs; what DeepSpeed is told."""
    settings = resolve(context, os.environ)
    reservations.reserve(context, settings)
    return settings


def build(
    context: BuildContext, base: FrozenBase, model_slice: Settings, progress: Progress
) -> Strategy:
    """Load the model and put DeepSpeed's engine around it."""
    # DeepSpeed looks at the environment while it is imported: without this it warns of a machine
    # without a GPU, and takes a GPU that rig.device=cpu leaves alone.
    os.environ["DS_ACCELERATOR"] = context.group.device.type
    os.environ.setdefault(
        "LOCAL_RANK", str(context.group.local_rank)
    )  # a single rank needs it, too
    # Late: it takes seconds to import, and is not installed everywhere.
    from fttrain.strategy.deepspeed.strategy import DeepSpeed

    return DeepSpeed(context, base, model_slice, progress)
