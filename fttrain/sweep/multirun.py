"""The search: Hydra's sweepers and launchers over ``run_trial``. Only this file, and the launcher
in ``cards``, depends on the inner workings of Hydra's multirun.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from fttrain.config.groups import one_line
from fttrain.config.run_config import quoted
from fttrain.sweep import cards
from fttrain.sweep.axes import Axis
from fttrain.sweep.config import Sweep
from fttrain.sweep.trial import EVERYWHERE, TrialPlace, run_trial
from fttrain.util.errors import UserError
from fttrain.util.paths import conf_folder

EXTRAS = {
    "hydra/sweeper/optuna": "optuna",
    "hydra/sweeper/sampler": "optuna",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit": "submitit",
}


class Job:
    """The task that Hydra calls for each trial; launchers may send it to other processes."""

    def __init__(self, sweep: Sweep, places: Sequence[TrialPlace] = ()) -> None:
        """``places``: for trials that run side by side in threads."""
        self.sweep, self.places = sweep, tuple(places)

    def __call__(self, _config: DictConfig) -> float:
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task)
        assert isinstance(overrides, list)
        return self.run([str(text) for text in overrides], EVERYWHERE)

    def run(self, overrides: list[str], trial_place: TrialPlace) -> float:
        """Run a trial; return its value of the objective."""
        return run_trial(self.sweep, overrides, trial_place)


def search_config(search: str | None, overrides: Sequence[str]) -> DictConfig:
    """The configuration of Hydra and of the sweep: its nodes ``hydra`` and ``sweep``.

    Raises UserError, in one line, where it cannot be composed; a missing package is named.
    """
    cards.register()
    chosen = [] if search is None else [f"sweep={search}"]
    try:
        with _hydra() as hydra:
            composed = hydra.compose_config(
                "config", [*chosen, *overrides], RunMode.MULTIRUN, from_shell=False
            )
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {one_line(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explained(one_line(error))) from None
    _check(composed)
    return composed


def run(
    sweep: Sweep,
    axes: dict[str, Axis],
    search: str | None,
    overrides: Sequence[str],
    places: Sequence[TrialPlace],
) -> None:
    """Run the search. Trials leave their results in their folders.

    ``overrides``: for Hydra itself. ``places``: for trials that run side by side; none: Hydra's
    launcher chooses. Raises UserError where a sweeper or launcher fails.
    """
    fixed = [
        f"hydra.sweep.dir={quoted(str(sweep.folder))}",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
        "hydra.job.chdir=false",
    ]
    if places:
        fixed.append(f"hydra/launcher={cards.NAME}")
    config = search_config(search, [*overrides, *fixed])
    with read_write(config), open_dict(config):
        config.hydra.sweeper.params = None  # they are among the axes
        if places and "n_jobs" in config.hydra.sweeper:
            config.hydra.sweeper.n_jobs = len(places)
    with _hydra() as hydra:
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    # Outside of the block above: trials compose configurations of their own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sweepers warn of their own internals
        try:
            sweeper = Plugins.instance().instantiate_sweeper(
                hydra_context=context, task_function=Job(sweep, places), config=config
            )
            logging.getLogger("optuna").setLevel(logging.WARNING)  # it logs each trial
            sweeper.sweep([f"{axis.key}={axis.text}" for axis in axes.values()])
        except (HydraException, OmegaConfBaseException, ImportError, ValueError) as error:
            raise UserError(_explained(one_line(error))) from error


def trial_count(config: DictConfig, combinations: int | None) -> int:
    """The number of trials. ``combinations``: of all values, where they can be listed."""
    asked = config.hydra.sweeper.get("n_trials")
    if asked is None:
        assert combinations is not None
        return combinations
    is_grid = str(config.hydra.sweeper.sampler.get("_target_", "")).endswith("GridSampler")
    return min(int(asked), combinations) if is_grid and combinations else int(asked)


def takes_intervals(config: DictConfig) -> bool:
    """Whether the sweeper chooses values itself; Hydra's BasicSweeper tries all combinations."""
    return not str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper")


@contextmanager
def _hydra() -> Iterator[Hydra]:
    """Hydra, initialised with ``conf/`` for the length of the block."""
    with initialize_config_dir(str(conf_folder()), job_name="fttrain", version_base="1.3"):
        opened = GlobalHydra.instance().hydra
        assert opened is not None
        yield opened


def _explained(text: str) -> str:
    """Hydra's message, with the command that installs a missing package."""
    text = text.split(" Config search path:")[0]
    for name, extra in EXTRAS.items():
        if f"Could not find '{name}" in text:
            return f"{text}: it comes with pip install 'fttrain[{extra}]'"
    return f"sweep: {text}"


def _check(config: DictConfig) -> None:
    """Refuse settings of Hydra's sweepers that have no effect in a sweep of this project."""
    sweeper = config.hydra.sweeper
    if str(getattr(sweeper.get("direction"), "name", sweeper.get("direction"))) not in (
        "None",
        "minimize",
    ):
        raise UserError("hydra.sweeper.direction: what a sweep looks for is always minimised")
    for key in ("storage", "search_space", "custom_search_space"):
        if sweeper.get(key) is not None:
            raise UserError(
                f"hydra.sweeper.{key}: not taken: what differs stands in hydra.sweeper.params or "
                "on the command line, results in the sweep's folder"
            )


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The sweep's settings, and the axes that its search lists, as plain values."""
    settings = OmegaConf.to_container(config.sweep, resolve=True) if "sweep" in config else {}
    listed = OmegaConf.to_container(config.hydra.sweeper.get("params") or OmegaConf.create({}))
    return {"sweep": settings, "params": listed}
