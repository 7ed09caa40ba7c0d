"""Shared-prefix packing: one video, many questions, each of which sees the video and itself only.

A packed row is exactly as many single-turn conversations as it has questions, at the cost of one pass over the video:
positions restart after the prefix, and `segment_ids` say who may look at whom. Letters: `N` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elva_hf.chat_elva import MEDIA_KEYS
from elva_hf.errors_elva import ElvaError

IGNORED = -100
PREFIX = 0
PADDING = -1

Chat = list[dict[str, Any]]


def split_turns(chat: Chat) -> list[Chat]:
    """The single-turn conversations of a chat whose turns are independent.

    Each is the messages before the first user message, then the videos and images of the first user message followed
    by one question's own text, then its answer.

    Args:
        chat: Checked messages: any system messages, then user and assistant in turn.

    Raises:
        ElvaError: Roles do not alternate, or a later question brings a video of its own.
    """
    start = next((i for i, message in enumerate(chat) if message["role"] == "user"), len(chat))
    opening, turns = chat[:start], chat[start:]
    roles = [message["role"] for message in turns]
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise ElvaError(
            f"the roles of independent turns are {', '.join(roles) or 'none'}; expected user and assistant in turn. "
            "Without independent_turns a row may have any."
        )
    media, _ = _sort_blocks(turns[0]["content"])
    conversations = []
    for number in range(0, len(turns), 2):
        own, texts = _sort_blocks(turns[number]["content"])
        if number and own:
            raise ElvaError(
                f"question {number // 2} of independent turns brings a {own[0]['type']} of its own; put all videos and "
                "images into the first user message, or leave independent_turns out."
            )
        conversations.append([*opening, {**turns[number], "content": [*media, *texts]}, turns[number + 1]])
    return conversations


def _sort_blocks(content: Any) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Videos and images of a message, and its text."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    media = [block for block in blocks if block["type"] in MEDIA_KEYS]
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    return media, [{"type": "text", "text": "".join(texts)}] if texts else []


def share_prefix(conversations: Sequence[tuple[list[int], list[int]]], last_shared: int) -> tuple[Tensor, ...]:
    """Write conversations one after another, with what they share once.

    Args:
        conversations: Ids and labels of each, of one length.
        last_shared: Id of the token with which the shared part ends, at its last place in the first conversation; what
            is before the first difference, if it is not there.

    Returns:
        `input_ids`, `labels` and `segment_ids`, each `(N,)`: 0 for the shared part, then 1, 2, ... for each question.

    Raises:
        ElvaError: The conversations differ before the end of their videos, or from the start.
    """
    first = conversations[0][0]
    room = min(_first_label(labels) for _, labels in conversations) - 1  # every answer follows a token of its own turn
    common = min(_common_length(first, ids, room) for ids, _ in conversations)
    length = len(first) - first[::-1].index(last_shared) if last_shared in first else common
    if not length:
        raise ElvaError("independent turns share no token, so nothing is spared; make each a row of its own.")
    if length > common:
        raise ElvaError("independent turns differ before the end of their videos; the template must write them alike.")
    input_ids, labels, segments = first[:length], [IGNORED] * length, [PREFIX] * length
    for number, (ids, own_labels) in enumerate(conversations, start=1):
        input_ids = input_ids + ids[length:]
        labels = labels + own_labels[length:]
        segments = segments + [number] * (len(ids) - length)
    return torch.tensor(input_ids), torch.tensor(labels), torch.tensor(segments)


def _first_label(labels: Sequence[int]) -> int:
    return next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))


def _common_length(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    different = (i for i, (a, b) in enumerate(zip(one[:limit], other, strict=False)) if a != b)
    return next(different, min(limit, len(one), len(other)))


def restart_positions(segment_ids: Tensor) -> Tensor:
    """Positions of packed rows: each question continues the prefix; padding has 0.

    Args:
        segment_ids: `(B, N)` or `(N,)`: the prefix, the questions one after another, padding at the end.

    Returns:
        The same shape, int64.
    """
    place = torch.arange(segment_ids.shape[-1], device=segment_ids.device).expand(segment_ids.shape)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    began = torch.where(starts, place, 0).cummax(-1).values
    prefix = (segment_ids == PREFIX).sum(-1, keepdim=True)
    positions = torch.where(segment_ids > PREFIX, prefix + place - began, place)
    return positions.masked_fill(segment_ids == PADDING, 0)


def unpack_turns(segment_ids: Tensor) -> list[Tensor]:
    """Indices `(n,)` of the tokens of each question's own conversation, prefix included.

    Args:
        segment_ids: `(N,)` of one row.
    """
    shared = segment_ids == PREFIX
    return [(shared | (segment_ids == number)).nonzero().squeeze(1) for number in range(1, int(segment_ids.max()) + 1)]
