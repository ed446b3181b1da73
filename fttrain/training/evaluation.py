"""Held-out loss and answers, before and after training: the content of ``evaluation.json``."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fttrain.data.loader import PackedRows, evaluation_batches
from fttrain.data.samples import HoldoutSample
from fttrain.objective.metrics import METRICS
from fttrain.strategy.protocol import OutOfMemory, Strategy
from fttrain.track.report import verdict
from fttrain.util.atomic_files import write_text
from fttrain.util.units import duration
from fttrain.util.warn import Warn, warn

FILE = "evaluation.json"
ANSWER_TOKENS = 64  # at most in a sample answer


@dataclass
class SampleAnswer:
    """A held-out prompt, the reference of the data, and the model's answers before and after."""

    prompt: str
    reference: str
    before: str = ""
    after: str = ""


@dataclass
class Evaluation:
    """The held-out figures of a run so far."""

    base: dict[str, Any] | None = None  # {"nll": nats per token, "tokens": n}
    tuned: dict[str, Any] | None = None
    # {"step": n, "nll": nats per token}
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[SampleAnswer] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Evaluation":
        """The figures in evaluation.json; empty where there is no file that can be read."""
        try:
            values = json.loads((folder / FILE).read_text())
            samples = [SampleAnswer(**sample) for sample in values.pop("samples", [])]
            return cls(**values, samples=samples)
        except (OSError, ValueError, TypeError):
            return cls()

    def go_back(self, step: int) -> None:
        """Drop the figures of later steps than ``step``, and those of the end of the run, which
        goes on from ``step``.
        """
        self.tuned = None
        self.history = [entry for entry in self.history if entry["step"] <= step]
        for sample in self.samples:
            sample.after = ""

    def write(self, folder: Path) -> None:
        """Replace evaluation.json in one step."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """The answers before and after, and the verdict."""
        answers = [
            f"question: {sample.prompt}\n  before: {sample.before}\n  after:  {sample.after}\n"
            for sample in self.samples
        ]
        return "\n".join([*answers, self.verdict()])

    def verdict(self) -> str:
        """A line with both losses, the fall, and whether it is large."""
        if self.base is None or self.tuned is None:
            return "held-out loss: not measured (nothing is held out, or the run has not ended)"
        return verdict(_number(self.base["nll"]), _number(self.tuned["nll"]))


def _number(nll: float | None) -> float:
    """The loss as a number. None, as NaN and infinity are written in JSON, is NaN."""
    return math.nan if nll is None else nll


@dataclass
class HoldOut:
    """The held-out rows, and the size of the micro-batches that they pass in."""

    rows: PackedRows
    micro_batch_size: int  # rows; smaller once memory has run out
    halve: bool  # whether it may become smaller

    def loss(self, strategy: Strategy, warn: Warn = warn) -> dict[str, Any]:
        """Measure the metrics on all rows: {"nll": nats per target token, "tokens": targets}, and
        the mean of any other metric under its name. Every rank calls it and gets the same.

        Where memory runs out the rows are measured again with smaller micro-batches, after a line
        to ``warn``. Raises OutOfMemory where micro-batches cannot be smaller.
        """
        while True:
            size = self.micro_batch_size
            try:
                sums = strategy.evaluate(
                    evaluation_batches(self.rows, size, *strategy.data_parallel)
                )
            except OutOfMemory as error:
                self.micro_batch_size = size // error.pieces(size, self.halve)
                warn(
                    f"held-out rows: {error.what}; they are measured again with "
                    f"micro-batches of {self.micro_batch_size} row(s)"
                )
                continue
            means = {metric: sums.mean(metric) for metric in METRICS}
            figures = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
            return {**figures, "tokens": sums.targets}


def answer(
    strategy: Strategy,
    samples: list[HoldoutSample],
    tokenizer: Any,
    say: Callable[[str], None],
) -> list[str]:
    """Greedy answers to all prompts, in one batch. Every rank calls it. ``say`` gets an estimate of
    the time first.

    Each token is a pass over all layers. The estimate takes the time of the last pass, that of
    held-out rows, which is longer than a pass of a few tokens.
    """
    if not samples:
        return []
    longest_s = ANSWER_TOKENS * strategy.pass_s
    estimate = f"at most {duration(max(1, longest_s))}" if longest_s else "none was timed yet"
    passes = f"up to {ANSWER_TOKENS} passes over the layers"
    say(f"answering {len(samples)} prompt(s): {passes}, {estimate}")
    answers = strategy.generate(
        [sample.ids for sample in samples], ANSWER_TOKENS, stop_tokens(tokenizer)
    )
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def stop_tokens(tokenizer: Any) -> set[int]:
    """The tokens that end an answer: end of text, and the usual ends of a turn that exist."""
    names = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>")
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[name] for name in names if name in vocabulary}
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
