"""The searches that ship in conf/sweep."""

import pytest
import yaml

from fttrain.config.groups import groups
from fttrain.sweep import axes, check, multirun
from fttrain.sweep.config import SweepConfig
from fttrain.util import schema
from fttrain.util.paths import conf_folder


def test_the_defaults_are_those_of_the_code_and_commented() -> None:
    text = (conf_folder() / "sweep" / "default.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert list(values) == schema.keys_of(SweepConfig)
    assert schema.build(SweepConfig, values, "sweep") == SweepConfig()
    assert all("#" in line for line in text.splitlines())


@pytest.mark.parametrize("name", [name for name in groups()["sweep"] if name != "default"])
def test_every_search_composes_and_so_do_its_trials(name: str) -> None:
    """It names itself in its first lines, minimises, and repeats its choices."""
    request = axes.read([f"sweep={name}"])
    config = multirun.search_config(request.search, request.hydra)
    values = multirun.settings_of(config)
    schema.build(SweepConfig, values["sweep"], "sweep")
    axes.add_searched(request, values["params"])
    check.check_axes(request.axes, multirun.takes_intervals(config))
    trials = check.samples(request.axes)
    assert len(check.check_trials([], trials, SweepConfig())) == len(trials) > 1
    assert multirun.trial_count(config, len(trials)) > 1
    if "n_trials" in config.hydra.sweeper:
        assert config.hydra.sweeper.sampler.seed is not None
    text = (conf_folder() / "sweep" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"fttrain train -m sweep={name}" in "\n".join(text.splitlines()[:2])
