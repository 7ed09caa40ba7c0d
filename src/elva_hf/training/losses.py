"""The losses of section 3.2 as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elva_hf.geometry_elva import VisualGeometry


def tube_means(features: Tensor, tube_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Average each tube over its frames.

    Args:
        features: `(P, D)` features of patches.
        tube_ids: `(P,)` tube of each patch.

    Returns:
        `(S, D)` means in float32, one for each tube in ascending order of its id, and `(P,)` the tube's row.
    """
    tubes, rows = tube_ids.unique(return_inverse=True)
    sums = features.new_zeros(len(tubes), features.shape[-1], dtype=torch.float32).index_add(0, rows, features.float())
    sizes = torch.bincount(rows, minlength=len(tubes))
    return sums / sizes[:, None], rows


def tube_alignment_loss(student_features: Tensor, teacher_features: Tensor, geometry: VisualGeometry) -> Tensor:
    """L_MSE of Eq. 2 for a teacher on the student's own grid: `2 - 2 cos`, mean over places, then over videos.

    The squared error of the two normalised tube means is summed over features. (A mean over features
    would be at most 4 / width and carry no weight.)

    Args:
        student_features: `(P, D)` task-head outputs at the patch tokens.
        teacher_features: `(P, D)` teacher features of the same patches.
        geometry: Tubes and videos of the patches.

    Returns:
        Scalar in float32, between 0 and 4.
    """
    tube_ids = geometry.tube_ids.flatten()[geometry.patch_index]
    student, rows = tube_means(student_features, tube_ids)
    teacher, _ = tube_means(teacher_features, tube_ids)
    error = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)  # (S,)
    videos, video_rows = geometry.patch_video.unique(return_inverse=True)
    tube_video = rows.new_zeros(len(error)).scatter(0, rows, video_rows)
    places = torch.bincount(tube_video, minlength=len(videos))
    return (error / places[tube_video]).sum() / len(videos)
