"""One frozen ``RunConfig`` from ``conf/`` and ``key=value`` overrides.

Hydra composes the groups, ``schema.build`` checks the result against each module's own dataclass,
and the rest of the project never sees Hydra. Nothing in a configuration names code to run.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fttrain import schema
from fttrain.checkpoint.config import CheckpointConfig, FrozenConfig, ModelConfig
from fttrain.data.config import DataConfig
from fttrain.errors import UserError
from fttrain.launch import LaunchConfig
from fttrain.loop import LoopConfig
from fttrain.model.config import LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.paths import conf_folder
from fttrain.quant.config import QuantConfig
from fttrain.rig.config import RigConfig
from fttrain.schedule import ScheduleConfig
from fttrain.secrets import is_secret, redact
from fttrain.strategy.config import AUTO, Placement, StrategyConfig, check_together, check_trained
from fttrain.strategy.zero.config import DEEPSPEED
from fttrain.track import TrackConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is told. A builder gets only its own part."""

    model: ModelConfig
    quant: QuantConfig
    lora: LoraConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    strategy: StrategyConfig
    loop: LoopConfig
    frozen: FrozenConfig
    checkpoint: CheckpointConfig
    rig: RigConfig
    launch: LaunchConfig
    track: TrackConfig
    # recompute (only a layer's input is saved) | keep | offload (to the host), or a list by layer
    # | auto: the fastest of the three that fits
    activations: str | tuple[str, ...]
    boundaries: str  # inputs of layers until their backward: device | host
    embedding: str  # the embedding table: device | host
    head: str  # the output projection: resident | nf4 (on the device) | streamed (from the host)
    mlp_tile_tokens: int | str  # that pass a layer's MLP at once: a multiple of 1024 | all
    resume: str  # auto (the newest whole snapshot in output) | none | path of a snapshot
    output: str  # folder of the run
    dry_run: int = 0  # examples of a trial that leaves nothing behind; 0: the run itself

    def __post_init__(self) -> None:
        placement = self.placement  # refuses what does not exist
        check_together(self.strategy, self.schedule, self.optim)
        check_trained(self.strategy, self.quant, self.lora, self.optim, self.schedule, placement)
        if self.strategy.name == DEEPSPEED and self.activations == AUTO:
            raise UserError(
                f"activations=auto with strategy={DEEPSPEED}: the planner knows native strategies; "
                "write recompute or keep"
            )
        if not self.resume:
            raise UserError("resume is empty: auto, none or the path of a snapshot")
        if self.dry_run < 0:
            raise UserError(
                f"dry_run={self.dry_run}: a number of examples such as 50, or 0 for the run itself"
            )
        if not self.output:
            raise UserError("output is empty: the folder of the run")
        if self.quant.kind == "none" and self.quant.double_quant:
            raise UserError(
                "quant.double_quant=true: quant.kind=none has no scales; write quant=none"
            )
        group, steps = self.schedule.group, self.loop.gradient_accumulation_steps
        if isinstance(group, int) and group > steps:
            raise UserError(
                f"schedule.group={group}: more than loop.gradient_accumulation_steps={steps}; "
                f"write {steps} or all"
            )
        if self.loop.eval_every and not self.data.holdout:
            raise UserError(
                f"loop.eval_every={self.loop.eval_every}: data.holdout=0 leaves nothing to evaluate"
            )

    @property
    def placement(self) -> Placement:
        """Where a step keeps what is not the frozen layers; what is still to be chosen starts from
        recompute.
        """
        kept = "recompute" if self.activations == AUTO else self.activations
        return Placement(kept, self.boundaries, self.embedding, self.head, self.mlp_tile_tokens)

    @property
    def left_open(self) -> tuple[str, ...]:
        """What the planner is to choose: strategy, activations, both or nothing."""
        asked = {"strategy": self.strategy.name, "activations": self.activations}
        return tuple(name for name, value in asked.items() if value == AUTO)


_HOW = ("experiment", "sweep")  # groups that say how settings are chosen; no settings of a run


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that ``overrides`` (``key=value`` or ``group=option``) make of ``conf/``.

    Raises UserError, in one line, for everything that is wrong with them.
    """
    return checked(compose_values(overrides)[0])


def checked(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that ``values`` make; UserError where one of them cannot be."""
    return schema.build(RunConfig, _expand_home(values))


def compose_values(overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a configuration before they are checked, and the option that each group of it
    ended with.
    """
    options: dict[str, str] = {}  # group -> option; the last one counts, as for values
    settings: list[str] = []
    for text in overrides:
        key, value = split_override(text)
        if key in groups():
            options[key] = option_of(key, value)
        else:
            settings.append(_setting(key, value))
    if options.get("experiment") == "null":
        del options["experiment"]
    chosen = [f"{group}={option}" for group, option in options.items()]
    try:
        with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
            composed = hydra_compose("config", chosen + settings, return_hydra_config=True)
        ended = composed.hydra.runtime.choices
        choices = {group: str(ended[group]) for group in groups() if group not in _HOW}
        values = {
            key: OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if OmegaConf.is_config(value)
            else value
            # Resolved one by one: hydra's own node has values of a process that it starts.
            for key, value in composed.items()
            if key not in (*_HOW, "hydra")
        }
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {one_line(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {one_line(error)}") from None
    return {str(key): value for key, value in values.items()}, choices


def plain(config: RunConfig) -> dict[str, Any]:
    """``config`` as JSON and YAML know it, secrets redacted."""
    values: dict[str, Any] = _plain(dataclasses.asdict(config), "")
    return values


def to_yaml(config: RunConfig) -> str:
    """``config`` as YAML, secrets redacted."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def groups() -> dict[str, list[str]]:
    """The options of each configuration group: names of the files in ``conf/GROUP/``."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def split_override(text: str) -> tuple[str, str]:
    """``key=value`` as its two halves; UserError for what is none, for a secret and for Hydra's own
    settings.
    """
    key, equals, value = text.partition("=")
    key = key.lstrip("+")  # Hydra's sign for a new key; here every key exists already
    if is_secret(key, value) or redact(key) != key:
        raise UserError(
            f"{redact(key)}: secrets do not belong on a command line; "
            "set an environment variable instead (HF_TOKEN, WANDB_API_KEY)"
        )
    if not equals or not key or key.startswith("-"):
        raise UserError(
            f"{text!r}: write key=value or group=option; `fttrain train --help` lists them"
        )
    if key.startswith(("~", "hydra.", "hydra/")) or "@" in key:
        raise UserError(
            f"{text!r}: only fttrain's own settings can be changed (a sweep's search and launcher "
            "with -m); `fttrain train --help` lists them"
        )
    if key.partition(".")[0] == "sweep":
        raise UserError(f"{text!r}: a sweep is started with `fttrain train -m`")
    return key, value


def _setting(key: str, value: str) -> str:
    """``key=value`` in the form in which Hydra takes it; UserError for an unknown key or a value it
    cannot read.
    """
    if is_text(key) and value != "null" and "${" not in value and value[:1] not in ("'", '"'):
        # Text stays as it was typed (~/runs, a=b, 1e5, x,y); Hydra's grammar would see lists,
        # numbers and errors in it.
        value = quoted(value)
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise UserError(f"{key}={value}: cannot be read: {one_line(error)}") from None
    if override.is_sweep_override():
        raise UserError(
            f"{key}={value}: one value is wanted; a list is written "
            f"'{key}=[{value.strip('[]')}]', and `fttrain train -m` tries one after the other"
        )
    return f"++{key}={override.get_value_string()}"


def is_text(key: str) -> bool:
    """Whether the setting ``key`` is text; UserError where there is no such key."""
    return schema.lookup(RunConfig, key.split(".")) in (str, str | None)


def quoted(text: str) -> str:
    """``text`` as Hydra's grammar reads it back."""
    # In Hydra's quotes a backslash means itself, except in a row of them before a quote or the end.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"


def option_of(group: str, option: str) -> str:
    """The name by which Hydra finds ``option`` of ``group``, which for an experiment or a sweep may
    be a file's path; UserError with the list and the nearest where there is none.
    """
    options = groups()[group]
    if option in options or (group == "experiment" and option == "null"):
        return option
    if group in _HOW and is_path(option):
        return _load_file(group, option)
    near = schema.nearest(option, options)
    advice = f"did you mean {near}? " if near else ""
    paths = ", or the path of a .yaml file" if group in _HOW else ""
    raise UserError(
        f"{group}={option}: no such option; {advice}There are: {', '.join(options)}{paths}"
    )


def is_path(option: str) -> bool:
    """Whether an option is meant as a file."""
    return option.endswith((".yaml", ".yml")) or "/" in option


def _load_file(group: str, text: str) -> str:
    """Gives Hydra the file as an option of ``group`` and returns its name there."""
    content = read_option_file(group, text)
    path = Path(text).expanduser()
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    ConfigStore.instance().store(name, content, group, package="_global_")
    return name


def read_option_file(group: str, text: str) -> dict[str, Any]:
    """The content of an option that is given as a file.

    Raises UserError where it is no file, no YAML, no group of keys, or sets what is Hydra's and not
    the search of a sweep.
    """
    path, what = Path(text).expanduser(), f"{group}={text}"
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))  # refuses keys that come twice
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: cannot be read ({error})") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{what}: not YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{what}: wanted is a group of keys")
    named = {str(key): value for key, value in content.items()}
    if group != "sweep" and any(key.startswith(("hydra", "sweep")) for key in named):
        raise UserError(f"{what}: a search belongs into a file of its own, for `-m sweep=FILE`")
    return named


def one_line(error: Exception) -> str:
    """What a library says, without its line breaks."""
    return " ".join(str(error).split())


def _expand_home(value: Any) -> Any:
    # A shell leaves the ~ of output=~/run alone.
    if isinstance(value, dict):
        return {key: _expand_home(item) for key, item in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{name}.{key}" if name else key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    return redact(value, name) if isinstance(value, str) else value
