"""Held-out loss and answers, before and after: what ``evaluation.json`` holds."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fttrain.data.loader import PackedRows, evaluation_batches
from fttrain.data.samples import HoldoutSample
from fttrain.strategy.protocol import OutOfMemory, Strategy
from fttrain.track.report import verdict
from fttrain.util.atomic_files import write_text
from fttrain.util.units import duration

FILE = "evaluation.json"
ANSWER_TOKENS = 64  # of a sample answer


@dataclass
class SampleAnswer:
    """One held-out prompt, what the data says and what the model said before and after training."""

    prompt: str
    reference: str
    before: str = ""
    after: str = ""


@dataclass
class Evaluation:
    """Held-out figures of a run, as far as it has come."""

    base: dict[str, Any] | None = None  # {"nll": nats per token, "tokens": n}
    tuned: dict[str, Any] | None = None
    # {"step": n, "nll": nats per token}
    history: list[dict[str, Any]] = field(default_factory=list)
    samples: list[SampleAnswer] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Evaluation":
        """What an earlier part of the run found; empty where there is nothing that can be read."""
        try:
            values = json.loads((folder / FILE).read_text())
            samples = [SampleAnswer(**sample) for sample in values.pop("samples", [])]
            return cls(**values, samples=samples)
        except (OSError, ValueError, TypeError):
            return cls()

    def go_back(self, step: int) -> None:
        """Forgets what was found of the model after a later step than ``step``, and of an end: the
        run goes on from here.
        """
        self.tuned = None
        self.history = [entry for entry in self.history if entry["step"] <= step]
        for sample in self.samples:
            sample.after = ""

    def write(self, folder: Path) -> None:
        """Replaces the file in one step."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """Answers before and after, and the verdict."""
        answers = [
            f"question: {sample.prompt}\n  before: {sample.before}\n  after:  {sample.after}\n"
            for sample in self.samples
        ]
        return "\n".join([*answers, self.verdict()])

    def verdict(self) -> str:
        """One line: both losses, the fall and what it is worth."""
        if self.base is None or self.tuned is None:
            return "held-out loss: not measured (nothing is held out, or the run has not ended)"
        return verdict(_number(self.base["nll"]), _number(self.tuned["nll"]))


def _number(nll: float | None) -> float:
    """NaN and infinity are written as null, for they are not JSON."""
    return math.nan if nll is None else nll


@dataclass
class HoldOut:
    """The held-out rows, and in which micro-batches they pass."""

    rows: PackedRows
    micro_batch_size: int  # smaller from the time on that memory ran out
    halve: bool  # whether it may become so

    def loss(self, strategy: Strategy, say: Callable[[str], None]) -> dict[str, Any]:
        """In nats per target token over all ranks. Every rank calls it. ``say`` tells the user
        where memory ran out, and the rows are measured again with smaller micro-batches.

        Raises OutOfMemory where they cannot be smaller.
        """
        while True:
            size = self.micro_batch_size
            try:
                loss_sum, targets = strategy.evaluate(
                    evaluation_batches(self.rows, size, *strategy.data_parallel)
                )
            except OutOfMemory as error:
                self.micro_batch_size = size // error.pieces(size, self.halve)
                say(
                    f"warning: held-out rows: {error.what}; they are measured again with "
                    f"micro-batches of {self.micro_batch_size} row(s)"
                )
                continue
            nll = loss_sum / max(1, targets)
            return {"nll": nll if math.isfinite(nll) else None, "tokens": targets}


def answer(
    strategy: Strategy,
    samples: list[HoldoutSample],
    tokenizer: Any,
    say: Callable[[str], None],
) -> list[str]:
    """Greedy answers to all prompts in one batch. Every rank calls it. ``say`` tells the user
    first how long it may take.

    Each token is a pass over all layers, so where they have to be moved the time of a pass is what
    counts; the one that was just measured, of held-out rows, is more than that of a few tokens.
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
    """Tokens that end an answer: end of text, and the usual ends of a turn that exist."""
    names = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>")
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[name] for name in names if name in vocabulary}
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
