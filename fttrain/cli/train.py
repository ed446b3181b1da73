"""``fttrain train``: fine-tune a model. Starts the ranks where no launcher has."""

from fttrain import launch
from fttrain.config import RunConfig


def run(config: RunConfig, argv: list[str]) -> int:
    """Train on this rank, or start the ranks that ``launch=`` asks for and wait for them."""
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    from fttrain.train import train  # loads torch and transformers: a launcher does without

    return train(config)
