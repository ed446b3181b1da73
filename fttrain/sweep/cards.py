"""``sweep.parallel=cards``: trials side by side, one on each card, or on the CPU one on each share
of the cores. This is a launcher of Hydra's, so every sweeper can use it.
"""

import importlib
import itertools
import os
import queue
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pynvml
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from fttrain.config.run_config import RunConfig
from fttrain.launcher import launch
from fttrain.launcher.environment import PARENT_PID
from fttrain.rig.nvml import ask
from fttrain.sweep.trial import TrialPlace
from fttrain.util.errors import UserError

NAME = "cards"
# A single rank, in the trial's own process.
ALONE = ("launch=none", "launch.file=null", "launch.processes=null")
_OF_A_RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    PARENT_PID,
)


def places(config: RunConfig) -> list[TrialPlace]:
    """The places for trials side by side: one for each visible card; without cards, one for each
    rank that ``launch=`` would start. Each has the environment that the launch file sets.

    Raises UserError where there is a single place.
    """
    ranks = [environment for _, environment in launch.commands(config.launch, [])]
    variables = {key: value for key, value in ranks[0].items() if key not in _OF_A_RANK}
    cards = [] if config.rig.device == "cpu" else visible_cards(variables)
    if len(cards) > 1:
        return [TrialPlace(ALONE, {**variables, "CUDA_VISIBLE_DEVICES": card}) for card in cards]
    if cards or len(ranks) < 2:
        devices = "one card" if cards else "no card, and launch= names one rank"
        raise UserError(
            f"sweep.parallel=cards: there is {devices}: nothing runs side by side; on the CPU "
            "launch.processes=2 makes two places; or leave sweep.parallel=none"
        )
    return [TrialPlace(ALONE, variables, cores) for cores in shares_of_cores(len(ranks))]


def visible_cards(variables: dict[str, str]) -> list[str]:
    """The visible cards by the names and in the order of CUDA_VISIBLE_DEVICES; without it, all."""
    listed = variables.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(ask(pynvml.nvmlDeviceGetCount) or 0)]
    names = [name.strip() for name in listed.split(",")]
    # Cards behind the first invalid name are not visible (CUDA programming guide).
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


def shares_of_cores(number: int) -> list[tuple[int, ...]]:
    """The cores of this process in ``number`` equal parts of neighbours; () where too few."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    each = len(cores) // number
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(number)]


class CardsLauncher(Launcher):
    """Launcher that runs each job in the first free place."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Set the launcher up; ``task_function``: a ``multirun.Job``."""
        self._job: Any = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run all jobs; return their results in order."""
        free: queue.SimpleQueue[TrialPlace] = queue.SimpleQueue()
        for trial_place in self._job.places:
            free.put(trial_place)

        def work(overrides: Sequence[str]) -> JobReturn:
            trial_place = free.get()
            try:
                value = self._job.run(list(overrides), trial_place)
            finally:
                free.put(trial_place)
            result = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
            result.return_value = value
            return result

        # A thread waits for the end of its trial: the kernel ends a child process with the thread
        # that started it.
        with ThreadPoolExecutor(len(self._job.places)) as threads:
            return list(threads.map(work, job_overrides))


def register() -> None:
    """Register ``hydra/launcher=cards``.

    Hydra accepts plugins of the package ``hydra_plugins`` alone, so the launcher gets a module
    there.
    """
    plugins = Plugins.instance()  # first: it scans the disk for plugins
    try:
        importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no plugin is installed
        sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
    home = types.ModuleType("hydra_plugins.fttrain")
    home.CardsLauncher = CardsLauncher  # type: ignore[attr-defined]
    CardsLauncher.__module__ = home.__name__
    sys.modules[home.__name__] = home
    node = {"_target_": f"{CardsLauncher.__module__}.{CardsLauncher.__name__}"}
    ConfigStore.instance().store(NAME, node, "hydra/launcher", provider="fttrain")
    plugins.register(CardsLauncher)
