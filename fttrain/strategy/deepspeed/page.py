"""deepspeed: transformers' own model under DeepSpeed's ZeRO, which divides optimizer state,
gradients and weights among the ranks. All weights may train, or adapters as in native strategies.
"""

import os

from fttrain.store import FrozenBase
from fttrain.store.loading import Progress
from fttrain.strategy.context import BuildContext
from fttrain.strategy.deepspeed import reservations
from fttrain.strategy.deepspeed.settings import Settings, resolve
from fttrain.strategy.protocol import Strategy


def reserve(context: BuildContext) -> Settings:
    """Reserve the memory of device and host. Return the settings of ZeRO."""
    settings = resolve(context, os.environ)
    reservations.reserve(context, settings)
    return settings


def build(
    context: BuildContext, base: FrozenBase, settings: Settings, progress: Progress
) -> Strategy:
    """Load the model and put DeepSpeed's engine around it."""
    # Late: the import takes seconds, and DeepSpeed is not installed everywhere. It reads variables
    # that ``launcher.environment`` has set.
    from fttrain.strategy.deepspeed.strategy import DeepSpeed

    return DeepSpeed(context, base, settings, progress)
