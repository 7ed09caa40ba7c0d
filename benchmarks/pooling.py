"""Fewer visual tokens before the decoder: averages after the patch embedding (section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elva_hf.geometry_elva import VisualGeometry, read_geometry


@dataclass(frozen=True)
class Pooling:
    """Averages after the patch embedding.

    Args:
        frames: Frames that are left of a video; neighbours are averaged in equal shares.
        side: Side of the square of places that are averaged in a frame.
        marks: Whether `<FRAME>` and `<LINE>` of averaged frames are averaged too.
    """

    frames: int = 8
    side: int = 1
    marks: bool = False


def pooling_matrix(geometry: VisualGeometry, length: int, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """What pooling does to one row of `length` tokens that holds one video of a single grid.

    Returns:
        `(M, N)` weights of the tokens in each mean, and the `(M,)` position of the last token of each.
    """
    rows, columns = int(geometry.frame_rows[0]), int(geometry.frame_columns[0])
    block = torch.arange(geometry.num_frames) * pooling.frames // geometry.num_frames
    place = geometry.patch_row // pooling.side * columns + geometry.patch_column // pooling.side
    group = torch.arange(length)
    group[geometry.patch_index] = length + block[geometry.patch_frame] * rows * columns + place
    if pooling.marks:
        line = torch.arange(geometry.line_index.shape[0])
        group[geometry.frame_index] = -1 - block
        group[geometry.line_index] = -1 - geometry.num_frames - (block[line // rows] * rows + line % rows)
    members = torch.nn.functional.one_hot(group.unique(return_inverse=True)[1]).T
    last = (members * torch.arange(length)).amax(1)
    order = last.argsort()
    return (members / members.sum(1, keepdim=True))[order], last[order]


def embed(model: Any, input_ids: Tensor, pixels: Tensor) -> Tensor:
    """`(B, N, D)` what enters layer 0: text, patches, `<FRAME>` and `<LINE>`."""
    geometry = read_geometry(model.model.token_kinds(input_ids))
    features = model.get_video_features(pixels).last_hidden_state
    where = torch.cat([geometry.patch_index, geometry.frame_index, geometry.line_index])
    embeddings = model.get_input_embeddings()(input_ids)
    visual = torch.cat(model.model.patch_embed(features, geometry)).to(embeddings.dtype)
    return embeddings.flatten(0, 1).index_copy(0, where, visual).view_as(embeddings)
