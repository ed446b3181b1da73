"""``fttrain train``: fine-tune a model. Starts the ranks where no launcher has."""

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch


def run(config: RunConfig, argv: list[str]) -> int:
    """Train on this rank, or start the ranks that ``launch=`` asks for and wait for them.

    With ``dry_run`` only a few examples, to say how long it would take.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    # Late: these load torch and transformers, and a launcher does without.
    if config.dry_run:
        from fttrain.training.dry_run import dry_run

        return dry_run(config)
    from fttrain.training.train import train

    return train(config).exit_code
