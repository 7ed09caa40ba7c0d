"""Causal attention in tiles, for packed rows in bfloat16 on a CPU, where torch's own kernel is slower.

Scores and softmax are float32, as in torch's kernel; probabilities are rounded to the dtype of the values. A tile holds
some queries of the heads that share a key head, and the keys up to the last of them; what comes later is not computed.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

TILE_ROWS = 64  # queries of a tile
KEY_STEP = (
    256  # values are read in multiples of this: the library that multiplies bfloat16 keeps a program for each shape
)
TOKENS, FEWEST_SHARED = range(128, 4097), 4  # elsewhere torch's kernel is as fast (docs/LOG.md)


def suits_tiles(query: Tensor, key: Tensor, mask: Tensor | None, **kwargs: Any) -> bool:
    """Whether `causal_attention` should stand in for torch's kernel: plain causal inference in bfloat16 on a CPU.

    Args:
        query: `(B, heads, N, d)`.
        key: `(B, key_value_heads, K, d)`.
        mask: None where plain causal attention will do.
        **kwargs: What else the kernel is told.
    """
    return (
        mask is None
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[0] == 1
        and query.shape[2] == key.shape[2]
        and query.shape[2] in TOKENS
        and query.shape[1] >= FEWEST_SHARED * key.shape[1]
        and not torch.is_grad_enabled()
        and not kwargs.get("dropout")
        and kwargs.get("is_causal") is not False
        and multiplies_bfloat16()
    )


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in vectors only: torch's kernel is made for those with a matrix unit."""
    find = getattr(torch.cpu, "get_capabilities", dict)  # since torch 2.10
    capabilities = find()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Attend causally, tile by tile.

    Args:
        query: `(1, heads, N, d)`.
        key: `(1, key_value_heads, N, d)`; a head is read by `heads / key_value_heads` of the queries' heads in turn.
        value: As `key`.
        scaling: Factor of the scores; `d ** -0.5` by default.

    Returns:
        `(1, N, heads, d)`.
    """
    heads, tokens, width = query.shape[1:]
    groups = key.shape[1]
    shared = heads // groups
    most = min(TILE_ROWS, tokens)
    scale = 1 / math.sqrt(width) if scaling is None else scaling
    output = value.new_empty(tokens, groups, shared, value.shape[-1])
    later = torch.full((most, most), -torch.inf).triu(1)
    # New memory for every tile would cost as much as the softmax.
    scores_room, softmax_room = (later.new_empty(shared * most * tokens) for _ in range(2))
    room = value.new_empty(shared * most * tokens)
    for group, queries in enumerate(query[0].split(shared)):
        keys, values = key[0, group].float().T, value[0, group]
        for start in range(0, tokens, most):
            end = min(start + most, tokens)
            rows = end - start
            size = shared * rows
            scores, softmax = (flat[: size * end].view(size, end) for flat in (scores_room, softmax_room))
            read = min(-(-end // KEY_STEP) * KEY_STEP, tokens)
            probabilities = room[: size * read].view(size, read)
            tile = (queries[:, start:end].float() * scale).reshape(size, width)
            torch.mm(tile, keys[:, :end], out=scores)
            scores.view(shared, rows, end)[..., start:].add_(later[:rows, :rows])
            probabilities[:, :end] = torch.softmax(scores, -1, out=softmax)
            probabilities[:, end:] = 0
            output[start:end, group] = torch.mm(probabilities, values[:read]).view(shared, rows, -1).transpose(0, 1)
    return output.view(1, tokens, heads, -1)
