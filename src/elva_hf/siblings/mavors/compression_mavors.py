"""Token compression between chunks (section 5.4), with ELVA's merging functions, before the aggregator.

Tokens at the same place of neighbouring chunks that are more alike than a threshold become one, which stays where the
earlier one was. A later chunk's content then stands at an earlier position: what is compressed is not causal in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elva_hf.merging_elva import find_survivors, link_tubes, merge_above, merge_tokens, similarity_to_next


@dataclass(frozen=True)
class CompressedTokens:
    """Tokens of chunks after compression.

    Args:
        hidden: `(m, D)` the tokens that are left, in their order.
        kept: `(m,)` the indices they had, ascending.
        survivors: `(n,)` index, before compression, of the token that stands for each token.
        new_index: `(n,)` the same after compression.
        lengths: Tokens left of each video.
    """

    hidden: Tensor
    kept: Tensor
    survivors: Tensor
    new_index: Tensor
    lengths: list[int]


def find_places(chunks: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Number the places of videos, so that tokens of one place in all chunks have one number.

    Args:
        chunks: Chunks of each video.
        tokens: Tokens of a chunk of each video.

    Returns:
        `(n,)` int64 for all tokens of all videos, video by video, chunk by chunk.
    """
    places, start = [torch.empty(0, dtype=torch.long)], 0
    for count, size in zip(chunks, tokens, strict=True):
        places.append(torch.arange(start, start + size).repeat(count))
        start += size
    return torch.cat(places)


def compress_tokens(hidden: Tensor, chunks: Sequence[int], tokens: Sequence[int], threshold: float) -> CompressedTokens:
    """Merge each run of alike tokens of a place into its first one; waits once for the device.

    Args:
        hidden: `(n, D)` tokens of all videos, video by video, chunk by chunk.
        chunks: Chunks of each video.
        tokens: Tokens of a chunk of each video.
        threshold: Neighbours of higher cosine similarity merge; above 1 nothing does.
    """
    links = link_tubes(find_places(chunks, tokens).to(hidden.device))
    merge = merge_above(similarity_to_next(hidden.detach(), links), threshold)
    survivors = find_survivors(merge, links, survivor="first")
    alive = survivors == torch.arange(len(hidden), device=hidden.device)
    inputs = [count * size for count, size in zip(chunks, tokens, strict=True)]
    lengths = [int(part.sum()) for part in alive.cpu().split(inputs)]
    sizes = torch.ones(len(hidden), device=hidden.device)
    merged, _, kept, new_index = merge_tokens(hidden, sizes, survivors, sum(lengths))
    return CompressedTokens(merged, kept, survivors, new_index, lengths)
