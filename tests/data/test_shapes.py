from typing import Any

import pytest

from fttrain.data.records import BadRow
from fttrain.data.shapes import detect, shape_of, to_example
from fttrain.util.errors import UserError

QA = (("user", "Q"), ("assistant", "A"))
SYSTEM = ("system", "S")


@pytest.mark.parametrize(
    ("record", "shape", "messages"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
         "messages", QA),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
                       {"role": "assistant", "content": "A"}], "prompt": "Q"}, "messages", QA),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
         "sharegpt", QA),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
          "system": "S"}, "sharegpt", (SYSTEM, *QA)),
        ({"conversations": [{"role": "user", "content": "Q"},
                            {"role": "assistant", "content": "A"}]},
         "sharegpt", QA),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca", QA),
        ({"instruction": "Q", "input": None, "output": "A", "text": "all of it"}, "alpaca", QA),
        ({"instruction": "Q", "input": "I", "output": "A"},
         "alpaca", (("user", "Q\n\nI"), ("assistant", "A"))),
        ({"prompt": "Q", "completion": "A", "system": "S"}, "prompt_completion", (SYSTEM, *QA)),
        ({"prompt": [{"role": "user", "content": "Q"}],
          "completion": [{"role": "assistant", "content": "A"}]}, "prompt_completion", QA),
    ],
)  # fmt: skip
def test_shapes(record: dict[str, Any], shape: str, messages: Any) -> None:
    assert shape_of(record) == shape
    assert detect([record], "here") == shape
    assert to_example(record, shape).messages == messages


def test_text() -> None:
    example = to_example({"text": " as it is ", "label": 1}, "text")
    assert (example.messages, example.text) == ((), " as it is ")
    assert example.ignored == {"label"}


def turn(role: Any = "assistant", content: Any = "A", **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Q"}, {"role": role, "content": content, **more}]
    }


@pytest.mark.parametrize(
    ("record", "shape", "reason", "detail"),
    [
        ({"prompt": "Q"}, "prompt_completion", "missing field", "completion"),
        ({"prompt": "Q", "completion": None}, "prompt_completion", "missing field", "completion"),
        ({"prompt": "Q", "completion": " \n"}, "prompt_completion", "empty answer", "turn 2 of 2"),
        ({"prompt": "Q", "completion": 7}, "prompt_completion", "wrong type", "completion is int"),
        ({"text": "t"}, "alpaca", "missing field", "it has the shape text"),
        ({"text": " "}, "text", "empty answer", "empty"),
        ({"text": "\ud800"}, "text", "not Unicode", "surrogate"),
        ({"messages": []}, "messages", "empty answer", "empty list"),
        ({"messages": {}}, "messages", "wrong type", "messages is dict"),
        ({"messages": "not a list"}, "messages", "wrong type", "not a list"),
        ({"messages": ["Q"]}, "messages", "wrong type", r"messages\[0\] is str"),
        ({"messages": [{"role": "user"}]}, "messages", "missing field", r"messages\[0\].content"),
        ({"messages": [{"content": "Q"}]}, "messages", "missing field", r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": "Q"}]},
         "messages", "all labels masked", "no assistant turn"),
        (turn(role="narrator"), "messages", "unknown role", "narrator.*allowed: system"),
        (turn(role=["user"]), "messages", "unknown role", "allowed"),
        (turn(content=None), "messages", "missing field", "content"),
        (turn(content=["A"]), "messages", "wrong type", "is list"),
        (turn(content=[{"type": "image"}]), "messages", "unsupported field", "holds image"),
        (turn(tool_calls=[{"name": "f"}]), "messages", "unsupported field", "tool_calls"),
        (turn(reasoning_content="why"), "messages", "unsupported field", "reasoning_content"),
        ({"messages": [{"role": "system", "content": "S"}], "system": "S"},
         "messages", "two system messages", "system"),
    ],
)  # fmt: skip
def test_bad_rows(record: dict[str, Any], shape: str, reason: str, detail: str) -> None:
    with pytest.raises(BadRow, match=detail) as caught:
        to_example(record, shape)
    assert caught.value.reason == reason


def test_a_cell_may_hold_the_turns_as_json() -> None:
    cell = '[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]'
    assert to_example({"messages": cell}, "messages").messages == QA


def test_detection_goes_by_most_of_the_rows() -> None:
    text, qa = {"text": "t"}, {"prompt": "Q", "completion": "A"}
    assert detect([text, qa, qa], "here") == "prompt_completion"
    assert detect([{"x": 1}, text], "here") == "text"
    with pytest.raises(
        UserError, match=r"f\.jsonl:1: no known record shape \(fields found: a, q\)"
    ):
        detect([{"q": "Q", "a": "A"}], "f.jsonl:1")


def test_unused_fields_are_named() -> None:
    record = turn(weight=1)
    record["source"] = "web"
    assert to_example(record, "messages").ignored == {"source", "messages[].weight"}


def test_the_same_content_is_the_same_whatever_its_shape() -> None:
    one = to_example({"prompt": "Q", "completion": "A"}, "prompt_completion")
    two = to_example({"instruction": "Q", "output": "A"}, "alpaca")
    assert one.canonical() == two.canonical()
