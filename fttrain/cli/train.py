"""``fttrain train``: fine-tune a model. Starts the ranks where no launcher did."""

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch


def run(config: RunConfig, argv: list[str]) -> int:
    """Train on this rank, or start the ranks of ``launch=`` and wait for them.

    With ``dry_run`` train on a few examples only, to estimate the time of the run.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    # Late: these load torch and transformers, which a launcher does not need.
    if config.dry_run:
        from fttrain.training.dry_run import dry_run

        return dry_run(config)
    from fttrain.training.train import train

    return train(config).exit_code
