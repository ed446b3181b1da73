"""fttrain: QLoRA fine-tuning of large language models on two consumer GPUs.

The names below are the Python API, for notebooks and scripts. Each is loaded when it is first used:
``import fttrain`` alone loads neither torch nor Hydra.

    import fttrain

    config = fttrain.load_config(["experiment=demo", "output=outputs/mine"])
    result = fttrain.train(config)
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fttrain.config.run_config import RunConfig
    from fttrain.config.run_config import compose as load_config
    from fttrain.config.saved_config import load_run_config
    from fttrain.doctor.finding import Finding
    from fttrain.rig.profile import RigProfile
    from fttrain.training.diagnosis import doctor
    from fttrain.training.evaluate import evaluate
    from fttrain.training.evaluation import Evaluation
    from fttrain.training.export import export
    from fttrain.training.measuring import measure
    from fttrain.training.planning import plan
    from fttrain.training.train import TrainResult, train
    from fttrain.util.errors import UserError

__version__ = "0.1.0"

__all__ = [
    "Evaluation",
    "Finding",
    "RigProfile",
    "RunConfig",
    "TrainResult",
    "UserError",
    "doctor",
    "evaluate",
    "export",
    "load_config",
    "load_run_config",
    "measure",
    "plan",
    "train",
]

_SOURCES = {  # name -> module and name there
    "Evaluation": "training.evaluation.Evaluation",
    "Finding": "doctor.finding.Finding",
    "RigProfile": "rig.profile.RigProfile",
    "RunConfig": "config.run_config.RunConfig",
    "TrainResult": "training.train.TrainResult",
    "UserError": "util.errors.UserError",
    "doctor": "training.diagnosis.doctor",
    "evaluate": "training.evaluate.evaluate",
    "export": "training.export.export",
    "load_config": "config.run_config.compose",
    "load_run_config": "config.saved_config.load_run_config",
    "measure": "training.measuring.measure",
    "plan": "training.planning.plan",
    "train": "training.train.train",
}


def _load(name: str) -> Any:
    module, _, attribute = _SOURCES[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """The package plan/ or doctor/, which as ``fttrain.plan`` is also the function of that name."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return _load(self.__name__.rpartition(".")[2])(*arguments, **settings)


class _Package(ModuleType):
    """This package. The import system stores each subpackage as an attribute here, in place of a
    function of the same name; such a subpackage is made callable.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SOURCES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
