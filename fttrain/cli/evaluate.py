"""``fttrain evaluate output=DIR``: held-out loss and answers of the base and of the tuned model."""

from fttrain.config.run_config import RunConfig
from fttrain.config.saved_config import with_saved
from fttrain.launcher import launch


def run(config: RunConfig, argv: list[str]) -> int:
    """Evaluate the run in ``config.output`` on this rank, or start the ranks that ``launch=`` asks
    for and wait for them.

    The run's config.yaml has the settings. A group or a key that the command line names is taken
    from there, so that another data set or another rig can be asked for. Raises UserError where no
    run is there.
    """
    if launch.wanted(config.launch):
        return launch.start(config.launch, argv)
    # Late: it loads torch and transformers, and a launcher does without.
    from fttrain.training.evaluate import evaluate

    evaluate(with_saved(config, argv[1:]))
    return 0
