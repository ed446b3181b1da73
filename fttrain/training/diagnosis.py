"""The checks of ``fttrain doctor`` for the run that the settings describe.

Of fttrain only the rooms that load no model library are imported here: where one of these is
broken, a check says so.
"""

from pathlib import Path

from fttrain.config.run_config import RunConfig, compose
from fttrain.doctor.checks import Check, RunNeeds, all_checks, examine
from fttrain.doctor.finding import Finding


def doctor(config: RunConfig | None = None) -> list[tuple[str, Finding]]:
    """Check whether this machine is fit for the run of ``config``, by default of the default
    settings: each check's name and its finding, in the order of ``fttrain doctor``. No finding
    raises an error; ``verdict`` is "failure" where a run would fail.
    """
    checks = checks_of(compose() if config is None else config)
    return list(examine(checks, lambda name, number, count: None))


def checks_of(config: RunConfig) -> list[tuple[str, Check]]:
    """Every check with its name, the quick ones first."""
    wanted = RunNeeds(
        config.model,
        config.quant,
        config.lora,
        config.frozen.cache_dir,
        Path(config.output),
        config.checkpoint.keep_last,
    )
    return all_checks(config.rig, wanted)
