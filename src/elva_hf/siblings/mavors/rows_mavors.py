"""Rows of `pixel_values_videos`: the pixels of one frame that a token stands for, and where they belong.

A chunk is written token by token, and a token frame by frame: as many rows as the chunk has frames, one for an image,
so nothing is repeated and the model counts them itself. Behind its pixels each row names its frame in the chunk and the
chunk's place in time. That way no other input has to keep pace with the pixels through collators, beams, assistants
and continuations, which know one tensor of pixels. Both are written in digits below 256, which every floating-point
format of a model holds exactly. Letters: `R` rows, `n` tokens, `T` frames, `s` side of a token's square in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elva_hf.errors_elva import PlaceholderError

DIGITS = 5
HEADER = 1 + DIGITS
"""Values of a row behind its pixels: the number of its frame, and the digits of its chunk's position, lowest first."""

MAX_CHUNK_FRAMES = 256
_BASE = 256


def header(frame: int, position: int) -> list[float]:
    """The values behind the pixels of a row.

    Args:
        frame: Number of its frame in the chunk, from 0.
        position: Of its chunk, from `place_chunks`; 0 for an image, and for the first chunk of a video.

    Example:
        >>> header(3, 258)
        [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    """
    return [float(frame), *(float(position // _BASE**place % _BASE) for place in range(DIGITS))]


def arrange_rows(pixels: Tensor, chunk_frames: int, positions: Sequence[int]) -> Tensor:
    """Put the pixels of a video's frames in the order of rows, each with its header.

    Args:
        pixels: `(T, n, 3 * s * s)` of all frames, `n` tokens each.
        chunk_frames: Frames of a chunk; the last may be short.
        positions: Of each chunk, from `place_chunks`.

    Returns:
        `(T * n, 3 * s * s + HEADER)`.
    """
    rows = []
    for chunk, position in zip(pixels.split(chunk_frames), positions, strict=True):
        headers = torch.tensor([header(frame, position) for frame in range(len(chunk))], dtype=pixels.dtype)
        whole = torch.cat([chunk, headers[:, None].expand(-1, chunk.shape[1], -1)], 2)
        rows.append(whole.transpose(0, 1).flatten(0, 1))
    return torch.cat(rows)


def average_frames(rows: Tensor) -> Tensor:
    """Average the pixels of each token over the frames of its chunk: what an inflated tower sees of it.

    Args:
        rows: `(R, 3 * s * s + HEADER)`.

    Returns:
        `(n, 3 * s * s)`.

    Raises:
        PlaceholderError: As `find_tokens`.
    """
    _, counts = find_tokens(read_frames(rows))
    return torch.stack([token.mean(0) for token in rows[:, :-HEADER].split(counts.tolist())])


def read_frames(rows: Tensor) -> Tensor:
    """Number of each row's frame, `(R,)` int64 on the host."""
    return rows[:, -HEADER].cpu().long()


def read_positions(rows: Tensor) -> Tensor:
    """Position of each row's chunk, `(R,)` int64 on the host; of rows that still have their digits last."""
    digits = rows[:, -DIGITS:].detach().cpu().long()
    return (digits * _BASE ** torch.arange(DIGITS)).sum(1)


def find_tokens(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Find where each token starts.

    Args:
        frames: `(R,)` from `read_frames`.

    Returns:
        `(n,)` first row of each token, and `(n,)` its rows, the frames of its chunk.

    Raises:
        PlaceholderError: The frames of a token do not count up from 0: rows are missing, or out of order.
    """
    starts = (frames == 0).nonzero().squeeze(1)
    counts = torch.diff(starts, append=torch.tensor([len(frames)]))
    here = torch.arange(len(frames))
    last = torch.where(frames == 0, here, -1).cummax(0).values
    if bool((last < 0).any()) or bool((here - last != frames).any()):
        raise PlaceholderError(
            "the frames of a token in pixel_values_videos do not count up from 0; pass what the processor made, whole "
            "and in its order."
        )
    return starts, counts
