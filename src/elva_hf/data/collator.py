"""Batches of one video and many questions: shared-prefix packing.

Every question of a row sees the video and itself, never another question, and positions restart after
the video. A row is therefore exactly as many single-turn conversations as it has questions, at the
cost of one pass over the video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class PackedRow:
    """One video and its questions as token ids.

    Args:
        prefix: Ids up to and including the video.
        turns: Per question the ids after the video up to the answer, and the answer's ids.
    """

    prefix: list[int]
    turns: list[tuple[list[int], list[int]]]

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(question) + len(answer) for question, answer in self.turns)


def pack_rows(rows: Sequence[PackedRow], pad_token_id: int) -> dict[str, Tensor]:
    """Build a right-padded batch of packed rows.

    Args:
        rows: `B` rows.
        pad_token_id: Id of the padding.

    Returns:
        `input_ids`, `labels`, `position_ids`, each `(B, N)`, and `attention_mask`, `(B, 1, N, N)` float32: 0 where a
        token may look, the lowest float where it may not. Rows of one question are plain sequences: their mask is
        `(B, N)`, 1 for a token, which is the only kind that merging takes.
    """
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        start = len(row.prefix)
        input_ids[i, :start] = torch.tensor(row.prefix)
        position_ids[i, :start] = torch.arange(start)
        segments[i, :start] = 0
        for number, (question, answer) in enumerate(row.turns, start=1):
            stop = start + len(question) + len(answer)
            input_ids[i, start:stop] = torch.tensor(question + answer)
            labels[i, start + len(question) : stop] = torch.tensor(answer)
            position_ids[i, start:stop] = len(row.prefix) + torch.arange(stop - start)
            segments[i, start:stop] = number
            start = stop
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": (segments >= 0).long() if int(segments.max()) <= 1 else shared_prefix_mask(segments),
    }


def shared_prefix_mask(segments: Tensor) -> Tensor:
    """Attention mask of packed rows: causal, within a segment and to the prefix.

    Args:
        segments: `(B, N)` 0 for the prefix, 1, 2, ... for the questions, -1 for padding.

    Returns:
        `(B, 1, N, N)` float32, to be added to the scores. Padding sees itself, so no row is empty.
    """
    seen, looking = segments[:, None, None, :], segments[:, None, :, None]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    allowed = causal & ((seen == 0) | (seen == looking)) & (seen >= 0)
    allowed = allowed | torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
