"""The encoder: text becomes token ids. Special tokens of the template are parsed; special tokens
that users wrote stay text.

The rendered text must be tokenised as one string (merges cross the borders between template and
content, as they do at inference), yet a user who writes ``<|im_end|>`` must not end a turn. So a
string whose content has no special token is encoded as a whole. The rare other string is cut at the
template's special tokens, and the pieces between are encoded with special tokens switched off. The
cut is verified for each such string on a copy in which the content's special tokens are broken up:
there both ways must give the same ids.
"""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fttrain.data.records import BadRow
from fttrain.util.errors import UserError

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Rendered:
    """A string to tokenise. Spans are in characters, sorted, and do not overlap."""

    text: str
    contents: tuple[Span, ...]  # written by users: no special token is parsed here
    trained: tuple[Span, ...]  # spans that the loss counts


class Encoder:
    """The fast tokenizer behind a transformers tokenizer, without its padding and truncation."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"model.path: its tokenizer ({type(tokenizer).__name__}) has no fast version "
                "(tokenizer.json), which tells where each token lies in the text; convert it, or "
                "use a model that ships one"
            )
        settings = json.loads(backend.to_str())
        settings["truncation"] = settings["padding"] = None  # state of earlier calls
        serialised = json.dumps(settings, sort_keys=True)
        self.identity = hashlib.sha256(serialised.encode()).hexdigest()
        self._parsing = Tokenizer.from_str(serialised)
        self._plain = Tokenizer.from_str(serialised)
        self._plain.encode_special_tokens = True
        self._specials: dict[str, AddedToken] = {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.special
        }
        self._special_ids = {
            token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special = _any_of(self._specials)
        self.prefix, self.suffix = self._frame(tokenizer.eos_token_id)

    def _frame(self, eos_token_id: int | None) -> tuple[list[int], list[int]]:
        """The ids before and after a whole document: BOS where the tokenizer writes one; EOS
        wherever the tokenizer has one.
        """
        bare = self._parsing.encode("a", add_special_tokens=False).ids
        framed = self._parsing.encode("a", add_special_tokens=True).ids
        if not bare:  # transformers makes an empty one where a folder has no tokenizer
            raise UserError(
                "model: the tokenizer has no token for plain text; model.path needs a "
                "tokenizer.json beside config.json"
            )
        at = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        prefix, suffix = framed[:at], framed[at + len(bare) :]
        if eos_token_id is not None and eos_token_id not in suffix:
            suffix = [*suffix, eos_token_id]
        return prefix, suffix

    def document(self, text: str) -> list[int]:
        """Plain text as one document: BOS if the tokenizer has one, the text, EOS.

        Special tokens in it stay text.
        """
        return [*self.prefix, *self._plain.encode(text, add_special_tokens=False).ids, *self.suffix]

    def encode(self, batch: list[Rendered]) -> list[tuple[list[int], list[bool]] | BadRow]:
        """Token ids and mask of each string of ``batch``. The mask is True where a token overlaps a
        trained span. A string whose special tokens cannot be kept apart gives its BadRow.
        """
        rare = [i for i, row in enumerate(batch) if self._in_content(row)]
        whole = self._parsing.encode_batch([row.text for row in batch], add_special_tokens=False)
        results: list[tuple[list[int], list[bool]] | BadRow] = [
            (encoding.ids, _mark(encoding.offsets, row.trained))
            for encoding, row in zip(whole, batch, strict=True)
        ]
        for i in rare:
            try:
                ids, offsets = self._encode_cut(batch[i])
                results[i] = ids, _mark(offsets, batch[i].trained)
            except BadRow as bad:
                results[i] = bad
        return results

    def special_in(self, text: str) -> str | None:
        """The first special token in ``text``; None where there is none."""
        match = self._special.search(text)
        return match.group() if match else None

    def _in_content(self, row: Rendered) -> bool:
        return any(
            _touches(match.span(), row.contents) for match in self._special.finditer(row.text)
        )

    def _encode_cut(self, row: Rendered) -> tuple[list[int], list[Span]]:
        spoiled = self._spoil(row)
        for anchor in ("", "\n", "a"):
            reference = self._parsing.encode(spoiled.text, add_special_tokens=False).ids
            if self._cut(spoiled, anchor)[0] == reference:
                return self._cut(row, anchor)
        token = next(
            match.group()
            for match in self._special.finditer(row.text)
            if _touches(match.span(), row.contents)
        )
        raise BadRow(
            "special token in the text",
            f"this tokenizer cannot write {token} as plain text",
            "reword it",
        )

    def _cut(self, row: Rendered, anchor: str) -> tuple[list[int], list[Span]]:
        """Encode the pieces between the template's special tokens as plain text, and each of these
        tokens as its id.
        """
        ids: list[int] = []
        offsets: list[Span] = []
        start = 0
        template_tokens = [
            match
            for match in self._special.finditer(row.text)
            if not _touches(match.span(), row.contents)
        ]
        for token in [*template_tokens, None]:
            end = token.start() if token else len(row.text)
            stop = end
            if token and self._specials[token.group()].lstrip:
                stop = start + len(row.text[start:end].rstrip())
            piece_ids, piece_offsets = self._piece(row.text[start:stop], anchor if start else "")
            ids += piece_ids
            offsets += [(a + start, b + start) for a, b in piece_offsets]
            if token is None:
                break
            start = token.end()
            if self._specials[token.group()].rstrip:
                start += len(row.text[start:]) - len(row.text[start:].lstrip())
            ids.append(self._special_ids[token.group()])
            offsets.append((token.start(), start))
        return ids, offsets

    def _piece(self, text: str, anchor: str) -> tuple[list[int], list[Span]]:
        """Ids and offsets of a piece from the middle of a string.

        ``anchor``: text before the piece that keeps SentencePiece from adding a leading space.
        """
        if not text:
            return [], []
        encoding = self._plain.encode(anchor + text, add_special_tokens=False)
        skip = sum(1 for _, end in encoding.offsets if end <= len(anchor)) if anchor else 0
        shift = len(anchor)
        return encoding.ids[skip:], [
            (max(a - shift, 0), b - shift) for a, b in encoding.offsets[skip:]
        ]

    def _spoil(self, row: Rendered) -> Rendered:
        """The same string with an x inside each special token that the content contains."""
        cuts = []
        for match in self._special.finditer(row.text):
            if _touches(match.span(), row.contents):
                inside = (
                    range(max(a, match.start() + 1), min(b, match.end() - 1) + 1)
                    for a, b in row.contents
                )
                cuts += [at for positions in inside for at in positions[:1]][:1]
        edges = zip([0, *cuts], [*cuts, len(row.text)], strict=True)
        text = "x".join(row.text[start:end] for start, end in edges)
        contents = tuple(
            (a + bisect_left(cuts, a), b + bisect_right(cuts, b)) for a, b in row.contents
        )
        spoiled = Rendered(text, contents, ())
        if self._in_content(spoiled):
            raise BadRow(
                "special token in the text", "it cannot be kept as plain text", "reword it"
            )
        return spoiled


def _any_of(tokens: Any) -> re.Pattern[str]:
    """The pattern that matches any of ``tokens``, the longest first; without any, nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _touches(span: Span, spans: tuple[Span, ...]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in spans)


def _mark(offsets: list[Span], spans: tuple[Span, ...]) -> list[bool]:
    """The mask of the tokens that overlap one of the sorted spans.

    Byte-level tokenizers may leave leading spaces out of a token's offsets: such a gap belongs to
    the token after it.
    """
    marks: list[bool] = []
    reached = which = 0
    for start, end in offsets:
        start = min(start, reached)
        reached = max(reached, end)
        while which < len(spans) and spans[which][1] <= start:
            which += 1
        marks.append(which < len(spans) and start < spans[which][1] and spans[which][0] < end)
    return marks
