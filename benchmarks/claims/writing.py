"""Rows of worlds as another model than ELVA reads them; worlds write ELVA's tokens, and pixels frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from claims.world import Asked
from elva_hf.configuration_elva import VideoDecoderConfig
from elva_hf.frames_elva import FULL_LAYOUT
from elva_hf.training.toy import encode_text

SHUFFLES = 1_000_003
"""Seed of `shuffle_frames` for a row is this number times the seed, plus the row's place."""


def rewrite(row: Asked, config: VideoDecoderConfig, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """A row in the frame layout of a model and with pixels in its order; for ELVA the row itself.

    Args:
        row: As a world wrote it.
        config: Of the model.
        tokenizer: Of the toy model.

    Raises:
        ValueError: Frames of several grids, which a chunk cannot have.
    """
    layout = config.frame_layout
    if layout == FULL_LAYOUT:
        return row
    (frames,) = row.sample.grids
    if len(set(frames)) > 1:
        raise ValueError(f"frames of grids {sorted(set(frames))} in one video; {type(config).__name__} takes one grid.")
    written = layout.write(frames[0], "<FRAME>", "<LINE>", "<video>") * -(-len(frames) // layout.chunk_size)
    visual = torch.tensor(encode_text(tokenizer, written))
    ids = row.sample.input_ids
    start, end = (int((ids == border).nonzero()) for border in (config.video_start_token_id, config.video_end_token_id))
    # labels and segments of the new tokens are those of the one before them
    taken = torch.cat([torch.arange(start + 1), torch.full((len(visual),), start), torch.arange(end, len(ids))])
    sample = replace(
        row.sample,
        input_ids=torch.cat([ids[: start + 1], visual, ids[end:]]),
        labels=row.sample.labels[taken],
        segment_ids=row.sample.segment_ids[taken],
        pixel_values_videos=config.arrange_pixels(row.sample.pixel_values_videos.unflatten(0, (len(frames), -1))),
    )
    return replace(row, sample=sample)


def shuffle_frames(rows: Sequence[Asked], chunk_frames: int, seed: int) -> list[Asked]:
    """Rows as a world wrote them, the frames of each chunk in another order than theirs.

    Args:
        rows: Videos of one grid each.
        chunk_frames: Frames of a chunk, one after another; a chunk of one frame stays as it is.
        seed: Of the orders.
    """
    return [_shuffle(row, chunk_frames, SHUFFLES * seed + place) for place, row in enumerate(rows)]


def _shuffle(row: Asked, chunk_frames: int, seed: int) -> Asked:
    order = np.concatenate(_orders(len(row.frames), chunk_frames, np.random.default_rng(seed)))
    pixels = row.sample.pixel_values_videos.unflatten(0, (len(order), -1))[torch.from_numpy(order)].flatten(0, 1)
    return replace(row, sample=replace(row.sample, pixel_values_videos=pixels), frames=row.frames[order])


def _orders(num_frames: int, chunk_frames: int, rng: np.random.Generator) -> list[np.ndarray]:
    orders = []
    for first in range(0, num_frames, chunk_frames):
        own = np.arange(first, min(first + chunk_frames, num_frames))
        drawn = rng.permutation(own)
        while len(own) > 1 and (drawn == own).all():
            drawn = rng.permutation(own)
        orders.append(drawn)
    return orders
