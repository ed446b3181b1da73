"""``sweep.parallel=cards``: trials side by side, each on a card of its own, or on the CPU on its
share of the cores. As a launcher of Hydra's, so that every sweeper can use it.
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
# One rank, which is the trial's own process.
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
    """Where trials can run side by side: a place for each visible card; without any, one for each
    rank that ``launch=`` would start. What the launch file sets in the environment counts there.

    Raises UserError where that is one place.
    """
    ranks = [environment for _, environment in launch.commands(config.launch, [])]
    variables = {key: value for key, value in ranks[0].items() if key not in _OF_A_RANK}
    cards = [] if config.rig.device == "cpu" else visible_cards(variables)
    if len(cards) > 1:
        return [TrialPlace(ALONE, {**variables, "CUDA_VISIBLE_DEVICES": card}) for card in cards]
    if cards or len(ranks) < 2:
        found = "one card" if cards else "no card, and launch= names one rank"
        raise UserError(
            f"sweep.parallel=cards: there is {found}: nothing runs side by side; on the CPU "
            "launch.processes=2 makes two places; or leave sweep.parallel=none"
        )
    return [TrialPlace(ALONE, variables, cores) for cores in shares_of_cores(len(ranks))]


def visible_cards(variables: dict[str, str]) -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, in its order; all of the driver's without it."""
    listed = variables.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(ask(pynvml.nvmlDeviceGetCount) or 0)]
    names = [name.strip() for name in listed.split(",")]
    # What follows the first that is none is not visible (CUDA programming guide).
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


def shares_of_cores(number: int) -> list[tuple[int, ...]]:
    """The cores of this process in ``number`` parts of neighbours; () where cores are too few."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    each = len(cores) // number
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(number)]


class CardsLauncher(Launcher):
    """Hands each job the first place that is free."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """``task_function``: a ``multirun.Job``."""
        self._job: Any = task_function

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Runs all of them; what each came to, in order."""
        free: queue.SimpleQueue[TrialPlace] = queue.SimpleQueue()
        for place in self._job.places:
            free.put(place)

        def work(overrides: Sequence[str]) -> JobReturn:
            place = free.get()
            try:
                value = self._job.run(list(overrides), place)
            finally:
                free.put(place)
            done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
            done.return_value = value
            return done

        # A thread stays with its trial until that has ended: the kernel ends what a thread started
        # once the thread is gone.
        with ThreadPoolExecutor(len(self._job.places)) as threads:
            return list(threads.map(work, job_overrides))


def register() -> None:
    """Makes ``hydra/launcher=cards`` known, under a name that Hydra takes plugins from: those of
    the package ``hydra_plugins``, which is otherwise looked for on the disk.
    """
    plugins = Plugins.instance()  # first: it looks at what is on the disk
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
