"""Greedy generation with keys and values kept: all prompts in one pass over the layers a token.

Legend: P prompts still going, N tokens of this pass over all of them, H query heads, K key heads, D
width of a head.
"""

import torch
from torch import Tensor

from fttrain.model.attention import Attention
from fttrain.model.decoder import Decoder
from fttrain.schedule import layer_pass
from fttrain.store import Store


class KeyValueCache:
    """Keys and values of the tokens seen so far, by layer and prompt."""

    def __init__(self, layers: int, prompts: int) -> None:
        self._entries: list[list[tuple[Tensor, Tensor] | None]] = [
            [None] * prompts for _ in range(layers)
        ]
        # of this pass: (prompt, its rows among the N tokens)
        self.rows: list[tuple[int, slice]] = []

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` (N, H, D), ``k``, ``v`` (N, K, D) of each prompt's newest tokens -> (N, H * D)."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        entries = self._entries[attention.qkv.layer]
        for prompt, rows in self.rows:
            entry = entries[prompt]
            keys, values = k[rows], v[rows]
            if entry is not None:
                keys, values = torch.cat([entry[0], keys]), torch.cat([entry[1], values])
            entries[prompt] = (keys, values)
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


@torch.no_grad()
def greedy(
    decoder: Decoder, store: Store, prompts: list[list[int]], max_new_tokens: int, stop: set[int]
) -> list[list[int]]:
    """The most likely continuations, up to a token of ``stop`` or ``max_new_tokens``."""
    device = decoder.embedding.weight.device
    cache = KeyValueCache(len(store), len(prompts))
    answers: list[list[int]] = [[] for _ in prompts]
    # prompt -> (position, tokens not yet seen)
    fresh = {prompt: (0, ids) for prompt, ids in enumerate(prompts)}
    for _ in range(max_new_tokens):
        if not fresh:
            break
        ends: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        cache.rows = []
        for prompt, (position, ids) in fresh.items():
            cache.rows.append((prompt, slice(len(tokens), len(tokens) + len(ids))))
            positions += range(position, position + len(ids))
            tokens += ids
            ends.append(len(tokens) - 1)
        hidden = _pass(
            decoder,
            store,
            cache,
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
        )
        chosen = decoder.head.logits(hidden[ends]).argmax(-1).tolist()
        upcoming = {}
        for (prompt, (position, ids)), token in zip(fresh.items(), chosen, strict=True):
            if token not in stop:
                answers[prompt].append(token)
                upcoming[prompt] = (position + len(ids), [token])
        fresh = upcoming
    return answers


def _pass(
    decoder: Decoder, store: Store, cache: KeyValueCache, tokens: Tensor, positions: Tensor
) -> Tensor:
    """int64 (N,) token ids and positions -> hidden states after the last layer (N, C)."""
    hidden, rotary = decoder.embedding(tokens), decoder.rotary(positions)
    for index in layer_pass.walk(decoder, store, range(len(store))):
        layer = decoder.layers[index]
        layer.state.cache, layer.state.dropout = cache, None
        hidden = layer(hidden, rotary)
        layer.state.cache = None
    return hidden
