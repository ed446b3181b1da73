"""Chat templates: messages become one string and the spans of it that are trained, the assistant's
turns.

The tokenizer's own sandboxed template engine renders. Few templates carry ``{% generation %}``
marks, so the turns are located without them and verified:

1. Each message is rendered between private marks. If the text without the marks equals the unmarked
   rendering, the marks show the span of each content. A turn starts after the generation prompt
   before it (so a ``<think>`` that the model has to write itself is trained) and ends behind the
   end-of-turn token that follows.
2. Where a template rewrites a marked content (Qwen3 splits at ``</think>``), the turn is the
   difference of two renderings: up to the message, and including it. Both must be prefixes of the
   whole, and the turn must contain the whole message; otherwise the template drops something and
   the row is refused.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2

from fttrain.data.encode import Encoder, Rendered, Span
from fttrain.data.records import BadRow
from fttrain.data.shapes import Message
from fttrain.util.errors import UserError

# Private-use characters, which texts do not contain. The number of the message stands between OPEN
# and START, and between OPEN and END.
OPEN, START, END = "\U0010f8f0", "\U0010f8f1", "\U0010f8f2"
_MARK = re.compile(f"{OPEN}(\\d+)([{START}{END}])")
# Replaces today's date in templates that print it, so that a row is the same on every day and rank.
FIXED_DATE = "26 Jul 2024"
KEEP_ADVICE = (
    "data.loss_on=last trains on the last turn only; or take <think> parts out of earlier turns; "
    "or set data.chat_template=FILE to a template that keeps every turn"
)


def load_template(tokenizer: Any, path: str | None) -> str | None:
    """The jinja text of ``path``, or the tokenizer's own; None when there is neither."""
    if path is not None:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template={path}: cannot be read ({error})") from None
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates by name
        template = template.get("default")
    return template


class Chat:
    """Renderer of conversations. Raises UserError for a template that cannot be trained with."""

    def __init__(self, tokenizer: Any, template: str | None, loss_on: str = "all") -> None:
        if not template:
            raise UserError(
                "model.path: its tokenizer has no chat template, so conversations cannot be "
                "written; set data.chat_template=FILE (a jinja file), or train on plain text "
                "(data.format=text)"
            )
        self._tokenizer, self.template, self._loss_on = tokenizer, template, loss_on
        self._date = {"date_string": FIXED_DATE} if "date_string" in template else {}
        never_ends = {tokenizer.bos_token} - {tokenizer.eos_token}
        enders = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and token.content not in never_ends
        } | ({tokenizer.eos_token} - {None})
        longest_first = sorted(enders, key=len, reverse=True)
        self._end_of_turn = re.compile(rf"\s*({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._generation_prompt = ""
        self._probe()

    def _probe(self) -> None:
        """Refuse a template that no row can be trained with, and find its generation prompt."""
        question: list[Message] = [{"role": "user", "content": "Question?"}]
        answer: list[Message] = [*question, {"role": "assistant", "content": "Answer."}]
        try:
            opened, closed = self.render(question, True), self.render(question)
            row = self.rendered(answer)
        except BadRow as bad:
            raise UserError(
                f"the chat template cannot be trained on: {bad}; set data.chat_template=FILE"
            ) from None
        if opened.startswith(closed):
            self._generation_prompt = opened[len(closed) :]
        (_, end), *_ = row.trained
        if row.text[:end].endswith("Answer."):
            raise UserError(
                "the chat template writes no end-of-turn token after an answer, so the model "
                "would never learn to stop; set data.chat_template=FILE to one that ends each "
                "assistant turn with eos_token"
            )

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it.

        Raises BadRow when the template refuses it.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._date,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise BadRow(
                "refused by the chat template", " ".join(str(error).split())[:200]
            ) from None
        return str(text)

    def rendered(self, messages: list[Message]) -> Rendered:
        """Text, user-written spans and trained spans of a conversation. Raises BadRow."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise BadRow("all labels masked", "no assistant turn to train on")
        if self._loss_on == "last":
            turns = turns[-1:]
        text = self.render(messages)
        contents = self._locate(messages, text)
        edges = sorted(span for spans in contents.values() for span in spans)
        trained = []
        for i in turns:
            spans = contents.get(i, [])
            verbatim = len(spans) == 1 and text[slice(*spans[0])] == messages[i]["content"].strip()
            trained.append(
                self._extend(text, spans[0], edges)
                if verbatim
                else self._difference(messages, i, text)
            )
        if any(after[0] < before[1] for before, after in pairwise(trained)):
            raise BadRow(
                "refused by the chat template", "it writes the turns in another order", KEEP_ADVICE
            )
        return Rendered(text, tuple(edges), tuple(trained))

    def _locate(self, messages: list[Message], text: str) -> dict[int, list[Span]]:
        """The spans of each message's content in ``text``; a message whose marks were lost has
        none.
        """
        if any(mark in message["content"] for message in messages for mark in (OPEN, START, END)):
            return {}
        marked = [
            {**message, "content": _mark(i, message["content"])}
            for i, message in enumerate(messages)
        ]
        try:
            pieces = _MARK.split(self.render(marked))
        except BadRow:
            return {}
        if "".join(pieces[::3]) != text:
            return {}
        spans: dict[int, list[Span]] = {}
        at = 0
        opened: tuple[int, int] | None = None  # (message, start) of the content that is open
        for piece, number, kind in zip(
            pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True
        ):
            at += len(piece)
            if kind == START:
                opened = int(number), at
            elif kind == END and opened and opened[0] == int(number):
                spans.setdefault(opened[0], []).append((opened[1], at))
                opened = None
        return spans

    def _extend(self, text: str, content: Span, edges: list[Span]) -> Span:
        """The turn around ``content``: from the end of the generation prompt to the end of the
        end-of-turn token.
        """
        start, end = content
        floor = max((b for _, b in edges if b <= start), default=0)
        ceiling = min((a for a, _ in edges if a >= end), default=len(text))
        if self._generation_prompt:
            prompt = text.rfind(self._generation_prompt, floor, start)
            start = prompt + len(self._generation_prompt) if prompt >= 0 else start
        return start, self._end(text, end, ceiling)

    def _end(self, text: str, end: int, ceiling: int) -> int:
        match = self._end_of_turn.match(text, end, ceiling)
        return match.end() if match else end

    def _difference(self, messages: list[Message], i: int, text: str) -> Span:
        """The turn as the text that message ``i`` adds to the rendering; verified, see the top of
        this file.
        """
        where = f"assistant turn {i + 1} of {len(messages)}"
        content = messages[i]["content"]
        prompt = self.render(messages[:i], add_generation_prompt=True) if i else ""
        through = self.render(messages[: i + 1])
        turn = through[len(prompt) :]
        whole = text.startswith(prompt) and text.startswith(through) and through.startswith(prompt)
        if not (i and whole and _squeeze(content) in _squeeze(turn)):
            raise BadRow(
                "refused by the chat template", f"it drops or rewrites part of {where}", KEEP_ADVICE
            )
        body = turn.rstrip()
        ends = [
            match.end() for match in self._end_of_turn.finditer(body) if match.end() == len(body)
        ]
        return len(prompt), len(prompt) + (ends[-1] if ends else len(body))

    def check_special(self, row: Rendered, messages: list[Message], encoder: Encoder) -> None:
        """Raise BadRow when a content that was not located contains a special token."""
        if len(row.contents) >= len(messages):
            return
        located = {row.text[a:b] for a, b in row.contents}
        for message in messages:
            token = encoder.special_in(message["content"])
            if token and message["content"].strip() not in located:
                advice = "take it out of the text"
                raise BadRow(
                    "special token in the text",
                    f"{token} in a turn that the template rewrites",
                    advice,
                )

    def prompt(self, messages: list[Message]) -> Rendered:
        """The conversation up to the assistant's next answer, for generation. Special tokens that
        users wrote stay text.
        """
        text = self.render(messages, add_generation_prompt=True)
        spans = self._locate(messages, self.render(messages))
        edges = sorted(span for message_spans in spans.values() for span in message_spans)
        contents = edges if text.startswith(self.render(messages)) else []
        return Rendered(text, tuple(contents), ())


def _mark(number: int, content: str) -> str:
    """``content`` with marks inside its surrounding space, so that a template's trim keeps them."""
    core = content.strip()
    if not core:
        return content
    lead, trail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    return f"{lead}{OPEN}{number}{START}{core}{OPEN}{number}{END}{trail}"


def _squeeze(text: str) -> str:
    return "".join(text.split())
