"""Greedy generation with a key-value cache: all prompts share one pass over the layers a token.

Legend: P unfinished prompts, N tokens of this pass over all of them, n tokens of this pass of one
prompt, S tokens of one prompt so far, H query heads, K key heads, D width of a head, C hidden
width.
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
        # (layer, prompt) -> keys and values (S, K, D)
        self._entries: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # of this pass: (prompt, the prompt's rows among the N tokens)
        self.rows: list[tuple[int, slice]] = []

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` (N, H, D), ``k``, ``v`` (N, K, D) of each prompt's newest tokens -> (N, H * D)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)  # (N, H, D)
        for prompt, rows in self.rows:
            key = attention.qkv.layer, prompt
            keys, values = k[rows], v[rows]  # (n, K, D)
            if key in self._entries:
                before = self._entries[key]
                keys, values = torch.cat([before[0], keys]), torch.cat([before[1], values])
            self._entries[key] = (keys, values)
            out[rows] = _attend(q[rows], keys, values, attention.scale, attention.window)
        return out.flatten(1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
    """Causal attention of a prompt's newest tokens ``q`` (n, H, D) over ``keys``, ``values``
    (S, K, D) of the whole prompt -> (n, H, D).
    """
    new, total = len(q), len(keys)
    query_at = torch.arange(total - new, total, device=q.device)[:, None]  # (n, 1)
    distance = query_at - torch.arange(total, device=q.device)[None, :]  # (n, S)
    mask = (distance >= 0) & (distance < (window or total))
    # (n, H, D) -> (1, H, n, D), (S, K, D) -> (1, K, S, D)
    q, keys, values = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )  # (1, H, n, D)
    return out[0].transpose(0, 1)


@dataclass
class NewTokens:
    """The tokens of one pass, all prompts end to end, in host memory."""

    tokens: Tensor  # int64 (N,)
    positions: Tensor  # int64 (N,)
    ends: list[int]  # row of each prompt's last token, P of them


# One pass over a model: the most likely next token of each prompt, the same on every rank.
NextTokens = Callable[[KeyValueCache, NewTokens], list[int]]


@torch.no_grad()
def greedy(
    prompts: list[list[int]], max_new_tokens: int, stop: set[int], next_tokens: NextTokens
) -> list[list[int]]:
    """The most likely continuation of each prompt, without a token of ``stop``, which ends it, and
    of at most ``max_new_tokens``.
    """
    cache = KeyValueCache()
    answers: list[list[int]] = [[] for _ in prompts]
    # prompt -> (position, tokens that have not passed the model)
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
        still_going = {}
        for (prompt, (position, ids)), token in zip(unseen.items(), chosen, strict=True):
            if token not in stop:
                answers[prompt].append(token)
                still_going[prompt] = (position + len(ids), [token])
        unseen = still_going
    return answers


def whole_model(decoder: Decoder, store: Store) -> NextTokens:
    """Next tokens by a rank that has all layers, the embedding and the head."""

    def next_tokens(cache: KeyValueCache, fresh: NewTokens) -> list[int]:
        embedded = decoder.embed(fresh.tokens)  # (N, C)
        hidden = through_layers(decoder, store, cache, fresh, embedded)  # (N, C)
        return most_likely(decoder, fresh, hidden)

    return next_tokens


def through_layers(
    decoder: Decoder, store: Store, cache: KeyValueCache, fresh: NewTokens, hidden: Tensor
) -> Tensor:
    """``hidden`` (N, C) before the first of ``decoder``'s layers -> after the last one."""
    rotary = decoder.rotary(fresh.positions)  # cos and sin (N, D)
    for index in layer_pass.iterate_layers(decoder, store, range(len(store))):
        layer = decoder.layers[index]
        layer.state.cache, layer.state.dropout = cache, None
        hidden = layer(hidden, rotary)
        layer.state.cache = None
    return hidden


def most_likely(decoder: Decoder, fresh: NewTokens, hidden: Tensor) -> list[int]:
    """``hidden`` (N, C) after the last layer -> the most likely next token of each prompt."""
    with decoder.head.on_device():
        logits = decoder.head.logits(hidden[fresh.ends])  # (P, vocabulary)
        chosen: list[int] = logits.argmax(-1).tolist()
    return chosen
