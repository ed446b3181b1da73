"""``fttrain data``: a few examples as the model sees them, the report of the rows, and a table of
lengths.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fttrain.data.batch import IGNORE
from fttrain.data.dataset import Dataset, Document, prepare

if TYPE_CHECKING:
    from fttrain.config.run_config import RunConfig

EXAMPLES = 3
EXAMPLE_TOKENS = 400  # tokens shown of an example


def run(config: "RunConfig", argv: Sequence[str] = ()) -> int:
    """Prepare the data set of ``config`` and show it.

    Raises UserError for data that cannot be used.
    """
    from fttrain.frozen.source import load_tokenizer  # heavy

    tokenizer, tokenizer_id = load_tokenizer(config.model)
    loop = config.loop
    rows_per_step = loop.micro_batch_size * loop.gradient_accumulation_steps
    dataset = prepare(config.data, tokenizer, tokenizer_id)
    show(Console(), dataset, tokenizer, config.data.seq_len, rows_per_step)
    return 0


def show(
    console: Console, dataset: Dataset, tokenizer: Any, seq_len: int, rows_per_step: int
) -> None:
    """Print examples, the report and the table.

    ``rows_per_step``: rows of one step on one rank.
    """
    count = min(EXAMPLES, len(dataset.train.document_tokens))
    for which in range(count):
        document = dataset.train.document(which)
        console.rule(f"training example {which + 1}: {len(document[0]):,} tokens", align="left")
        console.print(decode_dimmed(tokenizer, document, colour=console.color_system is not None))
    console.rule("rows", align="left")
    console.print("dim: read by the model; the rest is trained on", style="dim", highlight=False)
    for line in dataset.report.lines():
        console.print(Text(line))
    console.print(lengths_table(dataset, seq_len))
    steps = -(-len(dataset.train) // rows_per_step)
    console.print(
        f"{steps:,} optimizer steps an epoch on one rank, {rows_per_step:,} rows each",
        highlight=False,
    )
    console.print(f"fingerprint {dataset.fingerprint}", style="dim", highlight=False)


def decode_dimmed(tokenizer: Any, document: Document, colour: bool = True) -> Text:
    """The decoded document, masked parts dimmed. Without colours, trained parts stand in ⟦ ⟧."""
    ids, labels = (values[:EXAMPLE_TOKENS] for values in document)
    out = Text()
    start = 0
    for end in range(1, len(ids) + 1):
        trained = labels[start] != IGNORE
        if end < len(ids) and (labels[end] != IGNORE) == trained:
            continue
        part = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        if trained:
            out.append(part if colour else f"⟦{part}⟧", style="bold")
        else:
            out.append(part, style="dim")
        start = end
    if len(document[0]) > EXAMPLE_TOKENS:
        out.append(f" … {len(document[0]) - EXAMPLE_TOKENS:,} more tokens", style="italic")
    return out


def lengths_table(dataset: Dataset, seq_len: int) -> Table:
    """Lengths in tokens of both splits. ``filled``: tokens of the rows / rows x seq_len."""
    table = Table("", "train", "held out", title="lengths in tokens", title_justify="left")
    splits = (dataset.train, dataset.holdout)
    lengths = [split.document_tokens for split in splits]
    table.add_row("documents", *(f"{len(values):,}" for values in lengths))
    for name, at in (("shortest", 0), ("median", 50), ("90 % are within", 90), ("longest", 100)):
        table.add_row(name, *(_percentile(values, at) for values in lengths))
    table.add_row("tokens", *(f"{split.tokens:,}" for split in splits))
    table.add_row("trained tokens", *(f"{split.trained_tokens:,}" for split in splits))
    table.add_row("rows", *(f"{len(split):,}" for split in splits))
    filled = (
        f"{split.tokens / (len(split) * seq_len):.1%}" if len(split) else "-" for split in splits
    )
    table.add_row(f"filled (seq_len {seq_len:,})", *filled)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _percentile(lengths: NDArray[np.int64], at: float) -> str:
    return f"{int(np.percentile(lengths, at, method='higher')):,}" if len(lengths) else "-"
