"""Greedy generation with keys and values kept: all prompts in one pass over the layers a token.

Legend: P prompts still going, N tokens of this pass over all of them, H query heads, K key heads, D
width of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fttrain.model.attention import Attention
from fttrain.model.decoder import Decoder
from fttrain.schedule import layer_pass
from fttrain.store import Store


class KeyValueCache:
    """Keys and values of the tokens seen so far, by layer and prompt."""

    def __init__(self) -> None:
        # (layer, prompt) -> keys and values (tokens so far, K, D)
        self._entries: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # of this pass: (prompt, its rows among the N tokens)
        self.rows: list[tuple[int, slice]] = []

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` (N, H, D), ``k``, ``v`` (N, K, D) of each prompt's newest tokens -> (N, H * D)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for prompt, rows in self.rows:
            place = attention.qkv.layer, prompt
            keys, values = k[rows], v[rows]
            if place in self._entries:
                before = self._entries[place]
                keys, values = torch.cat([before[0], keys]), torch.cat([before[1], values])
            self._entries[place] = (keys, values)
            out[rows] = _attend(q[rows], keys, values, attention.scale, attention.window)
        return out.flatten(1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """The newest len(q) tokens against all tokens of their prompt, causally."""
    new, total = len(q), len(keys)
    query_at = torch.arange(total - new, total, device=q.device)[:, None]
    distance = query_at - torch.arange(total, device=q.device)[None, :]
    mask = (distance >= 0) & (distance < (window or total))
    q, keys, values = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@dataclass
class NewTokens:
    """The tokens of one pass, those of all prompts end to end, in host memory."""

    tokens: Tensor  # int64 (N,)
    positions: Tensor  # int64 (N,)
    ends: list[int]  # row of each prompt's last token


# Passes a model and returns the most likely next token of each prompt, the same on every rank.
NextTokens = Callable[[KeyValueCache, NewTokens], list[int]]


@torch.no_grad()
def greedy(
    prompts: list[list[int]], max_new_tokens: int, stop: set[int], next_tokens: NextTokens
) -> list[list[int]]:
    """The most likely continuations, up to a token of ``stop`` or ``max_new_tokens``."""
    cache = KeyValueCache()
    answers: list[list[int]] = [[] for _ in prompts]
    # prompt -> (position, tokens not yet seen)
    unseen = {prompt: (0, ids) for prompt, ids in enumerate(prompts)}
    for _ in range(max_new_tokens):
        if not unseen:
            break
        ends: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        cache.rows = []
        for prompt, (position, ids) in unseen.items():
            cache.rows.append((prompt, slice(len(tokens), len(tokens) + len(ids))))
            positions += range(position, position + len(ids))
            tokens += ids
            ends.append(len(tokens) - 1)
        chosen = next_tokens(cache, NewTokens(torch.tensor(tokens), torch.tensor(positions), ends))
        upcoming = {}
        for (prompt, (position, ids)), token in zip(unseen.items(), chosen, strict=True):
            if token not in stop:
                answers[prompt].append(token)
                upcoming[prompt] = (position + len(ids), [token])
        unseen = upcoming
    return answers


def whole_model(decoder: Decoder, store: Store) -> NextTokens:
    """Next tokens by a model whose layers and ends this rank all has."""

    def next_tokens(cache: KeyValueCache, fresh: NewTokens) -> list[int]:
        hidden = through_layers(decoder, store, cache, fresh, decoder.embed(fresh.tokens))
        return most_likely(decoder, fresh, hidden)

    return next_tokens


def through_layers(
    decoder: Decoder, store: Store, cache: KeyValueCache, fresh: NewTokens, hidden: Tensor
) -> Tensor:
    """``hidden`` (N, C) before the first of ``decoder``'s layers -> after the last one."""
    rotary = decoder.rotary(fresh.positions)
    for index in layer_pass.iterate_layers(decoder, store, range(len(store))):
        layer = decoder.layers[index]
        layer.state.cache, layer.state.dropout = cache, None
        hidden = layer(hidden, rotary)
        layer.state.cache = None
    return hidden


def most_likely(decoder: Decoder, fresh: NewTokens, hidden: Tensor) -> list[int]:
    """``hidden`` (N, C) after the last layer -> the most likely token after each prompt's last."""
    with decoder.head.brought():
        chosen: list[int] = decoder.head.logits(hidden[fresh.ends]).argmax(-1).tolist()
    return chosen
