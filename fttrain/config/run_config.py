"""One frozen ``RunConfig`` from ``conf/`` and ``key=value`` overrides.

Hydra composes the groups, ``schema.build`` checks the result against each module's own dataclass,
and the rest of the project never sees Hydra. Nothing in a configuration names code to run.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fttrain.checkpoint.config import CheckpointConfig
from fttrain.config.groups import HOW_CHOSEN, groups, one_line, option_of
from fttrain.config.loop_config import LoopConfig
from fttrain.data.config import DataConfig
from fttrain.frozen.config import FrozenConfig, ModelConfig
from fttrain.launcher.launch import LaunchConfig
from fttrain.model.config import AUTO_KERNELS, LoraConfig
from fttrain.optim.config import OptimConfig
from fttrain.quant.config import QuantConfig
from fttrain.rig.config import RigConfig
from fttrain.schedule.config import ScheduleConfig
from fttrain.strategy.config import AUTO, Placement, StrategyConfig
from fttrain.strategy.spec import StepSize, StrategySpec
from fttrain.strategy.zero_config import DEEPSPEED
from fttrain.track import TrackConfig
from fttrain.util import schema
from fttrain.util.errors import UserError
from fttrain.util.paths import conf_folder
from fttrain.util.redact import is_secret, redact


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. A builder gets only its own part."""

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
    layer_inputs: str  # inputs of layers until their backward: device | host
    embedding: str  # the embedding table: device | host
    lm_head: str  # the output projection: device | quantized (on the device, in 4 bits) | host
    mlp_tile_tokens: int | str  # that pass a layer's MLP at once: a multiple of 1024 | all
    resume: str  # auto (the newest whole snapshot in output) | none | path of a snapshot
    output: str  # folder of the run
    kernels: str = AUTO_KERNELS  # of norms, rotary and SwiGLU on a GPU: auto | torch | liger
    dry_run: int = 0  # examples of a trial that writes nothing; 0: the run itself

    def __post_init__(self) -> None:
        self._spec(self.strategy, self.schedule)  # refuses settings that do not go together
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
        group, steps = self.schedule.micro_batch_group, self.loop.gradient_accumulation_steps
        if isinstance(group, int) and group > steps:
            raise UserError(
                f"schedule.micro_batch_group={group}: more than "
                f"loop.gradient_accumulation_steps={steps}; "
                f"write {steps} or all"
            )
        if self.loop.eval_every and not self.data.holdout:
            raise UserError(
                f"loop.eval_every={self.loop.eval_every}: data.holdout=0 leaves nothing to evaluate"
            )

    @property
    def placement(self) -> Placement:
        """The place of everything in a step but the frozen layers. Activations that are left open
        (``auto``) read as ``recompute``.
        """
        activations = "recompute" if self.activations == AUTO else self.activations
        return Placement(
            activations, self.layer_inputs, self.embedding, self.lm_head, self.mlp_tile_tokens
        )

    def strategy_spec(self) -> StrategySpec:
        """The settings that a strategy is built from; strategy=auto starts from replicate."""
        if self.strategy.name == AUTO:
            return self._spec(StrategyConfig(), ScheduleConfig())
        return self._spec(self.strategy, self.schedule)

    def _spec(self, strategy: StrategyConfig, schedule: ScheduleConfig) -> StrategySpec:
        loop = self.loop
        return StrategySpec(
            strategy,
            self.quant,
            self.lora,
            self.optim,
            schedule,
            self.placement,
            self.frozen,
            StepSize(loop.micro_batch_size, self.data.seq_len, loop.gradient_accumulation_steps),
            self.model.dtype,
            loop.seed,
            loop.z_loss,
            self.kernels,
        )

    @property
    def left_open(self) -> tuple[str, ...]:
        """The settings that the planner is to choose: strategy, activations, both or none."""
        settings = {"strategy": self.strategy.name, "activations": self.activations}
        return tuple(name for name, value in settings.items() if value == AUTO)


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of ``conf/`` with ``overrides`` (``key=value`` or ``group=option``).

    Raises UserError, in one line, for anything that is wrong with them.
    """
    return checked(compose_values(overrides)[0])


def checked(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with these ``values``. Raises UserError for one that is wrong."""
    return schema.build(RunConfig, _expand_home(values))


def compose_values(overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a configuration before they are checked, and the option of each group."""
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
        hydra_choices = composed.hydra.runtime.choices
        choices = {
            group: str(hydra_choices[group]) for group in groups() if group not in HOW_CHOSEN
        }
        values = {
            key: OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if OmegaConf.is_config(value)
            else value
            # Resolved one by one: Hydra's own node has values that exist only in its jobs.
            for key, value in composed.items()
            if key not in (*HOW_CHOSEN, "hydra")
        }
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {one_line(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration: {one_line(error)}") from None
    return {str(key): value for key, value in values.items()}, choices


def plain(config: RunConfig) -> dict[str, Any]:
    """``config`` as JSON and YAML values, secrets redacted."""
    values: dict[str, Any] = _plain(dataclasses.asdict(config), "")
    return values


def to_yaml(config: RunConfig) -> str:
    """``config`` as YAML, secrets redacted."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def split_override(text: str) -> tuple[str, str]:
    """The two halves of ``key=value``. Raises UserError for any other text, for a secret and for
    Hydra's own settings.
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
    """``key=value`` in Hydra's form. Raises UserError for an unknown key or a value that Hydra
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
    """Whether the setting ``key`` is text. Raises UserError where there is no such key."""
    return schema.lookup(RunConfig, key.split(".")) in (str, str | None)


def quoted(text: str) -> str:
    """``text`` as Hydra's grammar reads it back."""
    # In Hydra's quotes a backslash means itself, except in a row of them before a quote or the end.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"


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
