"""The inputs of a run: checkpoint, tokenizer and data set."""

from dataclasses import dataclass
from typing import Any

from fttrain.config.run_config import RunConfig
from fttrain.data.dataset import Dataset, prepare
from fttrain.distributed.rank_group import rank_from_environment
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


def rows_per_step(config: RunConfig) -> int:
    """Rows of one optimizer step over all ranks of the launcher's environment."""
    loop, (_, world_size, _) = config.loop, rank_from_environment()
    return loop.micro_batch_size * loop.gradient_accumulation_steps * world_size


def prepare_inputs(config: RunConfig, least_rows: int | None = None) -> RunInputs:
    """Find the checkpoint, load its tokenizer and prepare the data set, which is tokenised where
    its cache is missing. Needs no process group.

    ``least_rows``: rows of one optimizer step; None: any number of rows will do. Raises UserError
    where one of them cannot be used, where they do not fit each other, and for fewer rows.
    """
    source = resolve(config.model)
    tokenizer, tokenizer_id = load_tokenizer(config.model)
    check_vocabulary(tokenizer, load_config(source))
    check_length(config.data.seq_len, load_config(source))
    dataset = prepare(config.data, tokenizer, tokenizer_id, least_rows)
    return RunInputs(source, tokenizer, dataset)
