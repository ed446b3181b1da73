"""What the user hears before answers are made."""

from typing import Any

import pytest
import tiny_files

from fttrain.data.samples import HoldoutSample
from fttrain.training.evaluation import ANSWER_TOKENS, answer

SAMPLES = [HoldoutSample("question", "reference", [3, 4, 5])] * 2


class Answering:
    """A strategy whose last pass took ``pass_s``; it writes down when it is asked to answer."""

    def __init__(self, pass_s: float, log: list[str]) -> None:
        self.pass_s, self.log = pass_s, log

    def generate(self, prompts: list[list[int]], tokens: int, stop: set[int]) -> list[list[int]]:
        self.log.append("generates")
        return [[] for _ in prompts]


@pytest.mark.parametrize(
    ("pass_s", "estimate"),
    [
        (0.001, "at most 1 s"),
        (0.05, "at most 3 s"),
        (20.0, f"at most {20 * ANSWER_TOKENS // 60} min 20 s"),
        (0.0, "none was timed yet"),
    ],
)
def test_the_estimate_comes_first(pass_s: float, estimate: str) -> None:
    log: list[str] = []
    strategy: Any = Answering(pass_s, log)
    assert answer(strategy, SAMPLES, tiny_files.tokenizer(), log.append) == ["", ""]
    said = f"answering 2 prompt(s): up to {ANSWER_TOKENS} passes over the layers, {estimate}"
    assert log == [said, "generates"]


def test_without_prompts_nothing_is_said() -> None:
    log: list[str] = []
    strategy: Any = Answering(1.0, log)
    assert answer(strategy, [], tiny_files.tokenizer(), log.append) == []
    assert log == []
