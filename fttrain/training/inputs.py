"""The inputs of a run: checkpoint, tokenizer and data set."""

from dataclasses import dataclass
from typing import Any

from fttrain.config.run_config import RunConfig
from fttrain.data.dataset import Dataset, prepare
from fttrain.frozen.source import (
    Source,
    check_length,
    check_vocabulary,
    load_config,
    load_tokenizer,
    resolve,
)


@dataclass(frozen=True)
class RunInputs:
    """Everything that a run reads, apart from its settings."""

    source: Source
    tokenizer: Any  # transformers' own
    dataset: Dataset


def prepare_inputs(config: RunConfig) -> RunInputs:
    """Find the checkpoint, load its tokenizer and prepare the data set, which is tokenised where
    its cache is missing. Needs no process group.

    Raises UserError where one of them cannot be used, or where they do not fit each other.
    """
    source = resolve(config.model)
    tokenizer, tokenizer_id = load_tokenizer(config.model)
    check_vocabulary(tokenizer, load_config(source))
    check_length(config.data.seq_len, load_config(source))
    return RunInputs(source, tokenizer, prepare(config.data, tokenizer, tokenizer_id))
