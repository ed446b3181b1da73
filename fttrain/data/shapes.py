"""The shapes of records. A record of any of them becomes an ``Example``: a conversation or plain
text.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fttrain.data.records import BadRow
from fttrain.util.errors import UserError

Message = dict[str, str]  # {"role": system | user | assistant | tool, "content": text}

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Fields that are part of a turn. They are refused by name: without them half a turn would be
# trained.
REFUSED_FIELDS = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Example:
    """One record, normalised. Exactly one of ``messages`` and ``text`` is set."""

    messages: tuple[tuple[str, str], ...] = ()  # (role, content)
    text: str = ""
    ignored: frozenset[str] = frozenset()  # fields of the record that were not used

    def conversation(self) -> list[Message]:
        """The example as chat messages; plain text is one message with the role ``text``."""
        if not self.messages:
            return [{"role": "text", "content": self.text}]
        return [{"role": role, "content": content} for role, content in self.messages]

    def canonical(self) -> bytes:
        """The same bytes for the same content, whatever shape it was written in."""
        return json.dumps(self.conversation(), ensure_ascii=True, sort_keys=True).encode()


def detect(records: Iterable[dict[str, Any]], where: str) -> str:
    """The shape of the majority of ``records``; the earlier one where two are even.

    Raises UserError where no record has a known shape.
    """
    first: list[dict[str, Any]] = list(records)
    votes = Counter(shape for shape in map(shape_of, first) if shape)
    if votes:
        return votes.most_common(1)[0][0]
    keys = ", ".join(sorted(first[0])) if first else "none"
    raise UserError(
        f"{where}: no known record shape (fields found: {keys}); allowed: messages | prompt, "
        "completion | instruction, output (input) | conversations | text; rename the fields, or "
        "set data.format"
    )


def shape_of(record: dict[str, Any]) -> str | None:
    """The first shape whose fields ``record`` has; None where there is none."""
    for shape, fields in FIELDS.items():
        if all(field in record for field in fields):
            return shape
    return None


def to_example(record: dict[str, Any], shape: str) -> Example:
    """Return ``record``, of the given shape, as an Example. Raises BadRow."""
    for field in FIELDS[shape]:
        if record.get(field) is None:
            other = shape_of(record)
            mixed = (
                f"; it has the shape {other}, the data set is {shape}"
                if other not in (None, shape)
                else ""
            )
            raise BadRow("missing field", f"{field}{mixed}")
    example = READERS[shape](record)
    if shape == "text":
        if not example.text.strip():
            raise BadRow("empty answer", "the text is empty")
        return example
    if not any(role == "assistant" for role, _ in example.messages):
        raise BadRow("all labels masked", "no assistant turn to train on")
    for number, (role, content) in enumerate(example.messages, 1):
        if role == "assistant" and not content.strip():
            raise BadRow("empty answer", f"turn {number} of {len(example.messages)}")
    return example


def _messages(record: dict[str, Any]) -> Example:
    return _conversation(record, "messages", "role", "content")


def _sharegpt(record: dict[str, Any]) -> Example:
    turns = record["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return _conversation(record, "conversations", "role", "content")
    return _conversation(record, "conversations", "from", "value")


def _conversation(record: dict[str, Any], field: str, role_key: str, content_key: str) -> Example:
    turns = _list(record[field], field)
    ignored = set(record) - {field, "system"}
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"{field}[{number - 1}]"
        if not isinstance(turn, dict):
            raise BadRow("wrong type", f"{where} is {_type(turn)}, not an object")
        for name in REFUSED_FIELDS:
            if turn.get(name):
                raise BadRow(
                    "unsupported field",
                    f"{where}.{name}",
                    "write it into the content, or remove it",
                )
        if turn.get(role_key) is None or turn.get(content_key) is None:
            raise BadRow(
                "missing field",
                f"{where}.{role_key if turn.get(role_key) is None else content_key}",
            )
        name = turn[role_key]
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            allowed = ", ".join(ROLES)
            raise BadRow(
                "unknown role", f"{where}.{role_key}={str(name)[:40]!r}; allowed: {allowed}"
            )
        messages.append((role, _text(turn[content_key], f"{where}.{content_key}")))
        ignored |= {
            f"{field}[].{key}" for key in turn if key not in (role_key, content_key) and turn[key]
        }
    return Example((*_system(record, messages), *messages), ignored=frozenset(ignored))


def _prompt_completion(record: dict[str, Any]) -> Example:
    turns: list[tuple[str, str]] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[field]
        if isinstance(value, list):  # both may also be lists of messages
            turns += _conversation({field: value}, field, "role", "content").messages
        else:
            turns.append((role, _text(value, field)))
    return Example((*_system(record, turns), *turns), ignored=_rest(record, "prompt", "completion"))


def _alpaca(record: dict[str, Any]) -> Example:
    question = _text(record["instruction"], "instruction")
    context = _text(record.get("input") or "", "input")
    if context.strip():
        question = f"{question}\n\n{context}"
    turns = [("user", question), ("assistant", _text(record["output"], "output"))]
    return Example(
        (*_system(record, turns), *turns), ignored=_rest(record, "instruction", "input", "output")
    )


def _plain(record: dict[str, Any]) -> Example:
    return Example(
        text=_text(record["text"], "text"),
        ignored=_rest(record, "text") | ({"system"} & set(record)),
    )


def _system(record: dict[str, Any], turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The ``system`` field beside the turns as the first message; [] without one."""
    text = record.get("system")
    if not text:
        return []
    if turns and turns[0][0] == "system":
        raise BadRow("two system messages", "a field system and a first turn with the role system")
    return [("system", _text(text, "system"))]


def _rest(record: dict[str, Any], *used: str) -> frozenset[str]:
    return frozenset(record) - {*used, "system"}


def _text(value: Any, where: str) -> str:
    """``value`` as text; it may be a list of text parts ({"type": "text", "text": ...})."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        kinds = {str(part.get("type", "text")) for part in value}
        if kinds != {"text"}:
            raise BadRow(
                "unsupported field",
                f"{where} holds {', '.join(sorted(kinds))}",
                "only text is trained on",
            )
        value = "".join(_text(part.get("text"), f"{where}[].text") for part in value)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where} is {_type(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("not Unicode", f"{where} holds half a surrogate pair") from None
    return value


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("wrong type", f"{where} is text, not a list of turns") from None
    if not isinstance(value, list):
        raise BadRow("wrong type", f"{where} is {_type(value)}, not a list of turns")
    if not value:
        raise BadRow("empty answer", f"{where} is an empty list")
    return value


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# The order is the precedence when a record has the fields of several shapes.
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
READERS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _plain,
}
