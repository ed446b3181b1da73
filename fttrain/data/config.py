"""The settings of the data."""

from dataclasses import dataclass

from fttrain.util.errors import UserError

# Matrix kernels are set up anew for each number of rows, which costs milliseconds and megabytes: a
# few padding rows are cheaper than another number of rows in every micro-batch.
ROW_MULTIPLE = 64
KINDS = ("stdlib", "file", "hub")
FORMATS = ("auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text")


@dataclass(frozen=True)
class DataConfig:
    """The source of examples and the rules that make rows of tokens of them."""

    kind: str = "stdlib"  # stdlib (docstrings of Python's own library) | file | hub
    # file: a .jsonl .json .csv .tsv .parquet file (the text ones also as .gz), or a folder of them;
    # hub: an id such as org/name, or org/name:config
    path: str | None = None
    split: str = "train"  # split of a hub data set
    format: str = "auto"  # auto | messages | prompt_completion | alpaca | sharegpt | text
    seq_len: int = 1024  # tokens of a row
    holdout: float = 0.1  # fraction of the examples held out for evaluation, in [0, 1)
    packing: bool = True  # fill a row with several examples (attention never crosses them)
    loss_on: str = "all"  # which assistant turns are trained: all | last
    # error: stop and name the row | skip: leave it out and count it | truncate: cut what is longer
    # than seq_len (counted), skip the others
    on_bad_row: str = "error"
    max_rows: int | None = None  # examples read at most; None: all
    chat_template: str | None = None  # path of a jinja file; None: the tokenizer's own
    seed: int = 0  # of the hold-out
    cache_dir: str | None = None  # of the tokenised rows; None: the user's cache folder

    def __post_init__(self) -> None:
        for key, allowed in {
            "kind": KINDS,
            "format": FORMATS,
            "loss_on": ("all", "last"),
            "on_bad_row": ("error", "skip", "truncate"),
        }.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"data.{key}={getattr(self, key)}: {', '.join(allowed)}")
        if self.kind != "stdlib" and not self.path:
            what = (
                "a .jsonl, .json, .csv or .parquet file"
                if self.kind == "file"
                else "an id such as org/name"
            )
            raise UserError(f"data.path is not set: data={self.kind} needs {what}")
        if self.seq_len < 2:
            raise UserError(f"data.seq_len={self.seq_len}: tokens of a row, 2 or more")
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout={self.holdout}: a fraction in [0, 1)")
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"data.max_rows={self.max_rows}: a whole number of 1 or more, or null")
