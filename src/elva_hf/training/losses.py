"""The losses of section 3.2 as pure functions: tubes (Eq. 2), frames (Eq. 3), words, and their sum (Eq. 4).

Features may come in any floating type; sums, norms and softmax are in float32 (float64 if given), also under autocast.
Letters: `P` patches, `F` frames, `C` clips, `V` videos, `D` features. A clip is the frames of one video that share one
grid of patches; a video of one resolution is one clip, a video of hybrid resolution (section 3.4) is several.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import VisualGeometry
from elva_hf.training.gathering import gather_counts, gather_rows

IGNORED = -100

NORM_EPS = 1e-6
"""Shortest vector that is normalised to length one: bounds the gradient at the zero vector by its inverse."""


@dataclass(frozen=True)
class VisualTargets:
    """What a teacher shows the student of one batch.

    Args:
        tubes: `(C, h, w, D)` map of each clip, averaged over its frames.
        frames: `(F, D)` mean over the map of each frame.
        patches: `(P, D)` map of each frame on the student's own grid; None if nobody asked for it.
    """

    tubes: Tensor | None
    frames: Tensor | None
    patches: Tensor | None = None


@dataclass(frozen=True)
class LossComponents:
    """The terms of Eq. 4, unweighted scalars; None for a term that is not in use.

    Args:
        loss_gen: L_Gen.
        loss_mse: L_MSE (Eq. 2).
        loss_con: L_Con (Eq. 3).
        loss_distill: Video-Panda's distillation (its Eq. 19), no term of ELVA's.
    """

    loss_gen: Tensor | None = None
    loss_mse: Tensor | None = None
    loss_con: Tensor | None = None
    loss_distill: Tensor | None = None

    def total(self, tube_weight: float = 1.0, frame_weight: float = 1.0, patch_weight: float = 1.0) -> Tensor:
        """The sum of Eq. 4, which weighs all terms equally.

        Args:
            tube_weight: Weight of L_MSE.
            frame_weight: Weight of L_Con.
            patch_weight: Weight of the distillation.

        Raises:
            ConfigurationError: There is no term.
        """
        weights = {"loss_gen": 1.0, "loss_mse": tube_weight, "loss_con": frame_weight, "loss_distill": patch_weight}
        terms = [weight * getattr(self, name) for name, weight in weights.items() if getattr(self, name) is not None]
        if not terms:
            raise ConfigurationError(
                "no loss to add up: give labels (loss_gen), or a teacher whose loss has a weight (loss_mse, loss_con)."
            )
        return sum(terms[1:], terms[0])

    def detached(self) -> dict[str, Tensor]:
        """The terms in use under their names, without gradient."""
        terms = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: term.detach() for name, term in terms.items() if term is not None}


def frame_clips(geometry: VisualGeometry) -> tuple[Tensor, Tensor]:
    """Number the clips of a batch in order of first appearance.

    Args:
        geometry: Of the batch.

    Returns:
        `(F,)` clip of each frame and `(C,)` video of each clip, videos without frames not counted; on the device of
        the geometry, worked out on the host.
    """
    frame_clip, clip_video, _ = _read_clips(geometry.host or geometry)
    device = geometry.tube_ids.device
    return frame_clip.to(device), clip_video.to(device)


def tubes_of_patches(features: Tensor, geometry: VisualGeometry) -> Tensor:
    """Average features of patches over the frames of each clip: the targets of a teacher on the student's own grid.

    Args:
        features: `(P, D)`.
        geometry: Of the batch; every frame must have the same grid.

    Returns:
        `(C, h, w, D)`.

    Raises:
        ConfigurationError: The grids differ.
    """
    means = _clip_means(features, geometry)
    if len(means) != 1:
        grids = ", ".join(f"{rows}x{columns}" for rows, columns in means)
        raise ConfigurationError(f"frames of grids {grids} make no one tensor of tubes; give a batch of one grid.")
    ((_, maps),) = means.values()
    return maps


def tube_alignment_errors(student_features: Tensor, teacher_tubes: Tensor, geometry: VisualGeometry | None) -> Tensor:
    """Eq. 2 of each video: `2 - 2 cos`, mean over the places of all its clips.

    Both sides are tube means; per axis the finer one is average-pooled to the size of the coarser one, so that a place
    is the same share of the picture on both sides; then both are normalised. The squared error is summed over
    features: a mean over them would be at most 4 / D, which carries no weight beside the other losses.

    Args:
        student_features: `(P, D)` task-head outputs at the patch tokens.
        teacher_tubes: `(C, h, w, D)` teacher's map of each clip, averaged over its frames.
        geometry: Of the batch; None if it holds no video.

    Returns:
        `(V,)` from 0 to 4.

    Raises:
        ConfigurationError: Features, targets and geometry do not belong together.
    """
    if geometry is None:
        return _full(student_features).sum(-1)[:0]
    _check_tubes(student_features, teacher_tubes, geometry)
    _, clip_video, _ = _read_clips(geometry.host or geometry)
    video = clip_video.to(student_features.device)
    errors = _full(student_features.new_zeros(int(clip_video.max()) + 1))
    places = torch.zeros(len(errors), dtype=torch.long)
    for clips, student in _clip_means(student_features, geometry).values():
        rows = min(student.shape[1], teacher_tubes.shape[1])
        columns = min(student.shape[2], teacher_tubes.shape[2])
        place_errors = _squared_error(
            _pool(student, rows, columns), _pool(teacher_tubes[clips].to(student), rows, columns)
        )  # (clips, rows, columns)
        errors = errors.index_add(0, video[clips], place_errors.sum((1, 2)))
        places.index_add_(0, clip_video[clips], torch.full((len(clips),), rows * columns))
    return errors / places.to(errors.device)


def tube_alignment_loss(
    student_features: Tensor,
    teacher_tubes: Tensor,
    geometry: VisualGeometry | None,
    num_videos: int | Tensor | None = None,
) -> Tensor:
    """L_MSE (Eq. 2): the mean of `tube_alignment_errors` over videos.

    Args:
        student_features: `(P, D)` task-head outputs at the patch tokens.
        teacher_tubes: `(C, h, w, D)` teacher's map of each clip, averaged over its frames.
        geometry: Of the batch; None if it holds no video.
        num_videos: What the sum is divided by, for batches that come in parts; the videos of this batch if None.

    Returns:
        A scalar; zero, with a gradient, if there is no video.
    """
    errors = tube_alignment_errors(student_features, teacher_tubes, geometry)
    if not len(errors):
        return errors.sum()  # whatever num_videos is, also 0
    return errors.sum() / (len(errors) if num_videos is None else num_videos)


def patch_alignment_loss(student_features: Tensor, teacher_features: Tensor, weights: Tensor) -> Tensor:
    """The error of Eq. 2 for every patch by itself, without the mean over frames; not in the paper.

    A mean over frames has no use for what differs between them, which is how a thing moves.

    Args:
        student_features: `(P, D)` task-head outputs at the patch tokens.
        teacher_features: `(P, D)`.
        weights: `(P,)` how much each patch counts.

    Returns:
        The weighted mean of `2 - 2 cos`, a scalar from 0 to 4.
    """
    errors = _squared_error(_full(student_features), teacher_features.float())
    return (errors * weights).sum() / weights.sum()


def frame_contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    logit_scale: Tensor,
    *,
    video_ids: Tensor | None = None,
    mask_same_video: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """L_Con (Eq. 3): symmetric InfoNCE of frames over all processes, mean over pairs.

    Every process compares its own frames with all frames, in both directions. Its value is scaled so that the mean
    over processes, of values and of gradients as DDP takes it, is that of one process with all frames.

    Args:
        student: `(F, D)` task-head outputs at the `<FRAME>` tokens; F may differ between processes, and be 0.
        teacher: `(F, D)` teacher's features of the same frames.
        logit_scale: One element, tau of Eq. 3: what cosines are multiplied by.
        video_ids: `(F,)` integers, video of each frame; numbers need to differ within a process only.
        mask_same_video: Whether other frames of the same video are left out of the negatives.
        group: Processes to compare with; the default group if None, and this process alone without one.

    Returns:
        A scalar; zero, with a gradient, if no process has a frame.

    Raises:
        ConfigurationError: Shapes differ, or `video_ids` are missing.
    """
    _check_frames(student, teacher, video_ids, mask_same_video)
    counts, rank = gather_counts(student, group)
    first, total = sum(counts[:rank]), sum(counts)
    with torch.autocast(student.device.type, enabled=False):
        own_student = _normalise(_full(student))
        own_teacher = _normalise(teacher.to(own_student))
        all_student = gather_rows(own_student, counts, group)
        all_teacher = gather_rows(own_teacher, counts, group)
        to_teacher = logit_scale * (own_student @ all_teacher.T)  # (F, all frames)
        to_student = logit_scale * (own_teacher @ all_student.T)
        if mask_same_video:
            hidden = _same_video(video_ids, counts, rank, group)
            to_teacher, to_student = (scores.masked_fill(hidden, -torch.inf) for scores in (to_teacher, to_student))
        pairs = torch.arange(first, first + len(student), device=student.device)
        loss = F.cross_entropy(to_teacher, pairs, reduction="sum") + F.cross_entropy(to_student, pairs, reduction="sum")
        return loss / 2 * (len(counts) / max(total, 1))


def negative_cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Video-Panda's distillation (its Eq. 19): minus the mean cosine.

    Args:
        student: `(P, D)` features.
        teacher: `(P, D)` features to come close to.

    Returns:
        A scalar between -1 and 1; zero, with a gradient, if there is no row.
    """
    student = _full(student)
    cosines = (_normalise(student) * _normalise(teacher.to(student))).sum(-1)
    return -cosines.sum() / max(cosines.numel(), 1)


def generative_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """L_Gen: cross-entropy of the next token where there is a label.

    `ElvaForCausalLM` takes the same loss of its hidden states, without logits where no label is.

    Args:
        logits: `(B, N, vocab)`.
        labels: `(B, N)` token ids, -100 where there is nothing to learn.
        num_items_in_batch: What the sum is divided by; the labels of this batch if None.

    Returns:
        A scalar; zero, with a gradient, if there is no label.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    total = F.cross_entropy(_full(logits).flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    return total / ((targets != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def _full(features: Tensor) -> Tensor:
    """In float32, or in float64 if it was."""
    return features if features.dtype == torch.float64 else features.float()


def _normalise(features: Tensor) -> Tensor:
    return F.normalize(features, dim=-1, eps=NORM_EPS)


def _squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the normalised vectors, summed over features; no cancellation where they agree, unlike 2 - 2 cos."""
    return (_normalise(student) - _normalise(teacher)).square().sum(-1)


def _read_clips(geometry: VisualGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """`(F,)` clip of each frame, `(C,)` video of each clip, `(C, 2)` grid of each clip; all on the host."""
    video = torch.zeros_like(geometry.frame_rows).scatter(0, geometry.patch_frame, geometry.patch_video)
    kinds = torch.stack([video, geometry.frame_rows, geometry.frame_columns])
    _, found = kinds.unique(dim=1, return_inverse=True)
    first = torch.full((int(found.max()) + 1,), len(found)).scatter_reduce(0, found, torch.arange(len(found)), "amin")
    order = first.argsort()
    _, clip_video = video[first[order]].unique(return_inverse=True)
    return order.argsort()[found], clip_video, kinds[1:, first[order]].T


def _clip_means(features: Tensor, geometry: VisualGeometry) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Per grid its clips, on the host, and their `(clips, rows, columns, D)` means over frames."""
    host = geometry.host or geometry
    frame_clip, _, grids = _read_clips(host)
    clips_of: dict[tuple[int, int], list[int]] = {}
    for clip, (rows, columns) in enumerate(grids.tolist()):
        clips_of.setdefault((rows, columns), []).append(clip)
    start, at = torch.zeros(len(grids), dtype=torch.long), 0
    for (rows, columns), clips in clips_of.items():
        start[clips] = at + rows * columns * torch.arange(len(clips))
        at += rows * columns * len(clips)
    clip = frame_clip[host.patch_frame]
    places = (start[clip] + host.patch_row * grids[clip, 1] + host.patch_column).to(features.device)
    num_frames = frame_clip.bincount()
    sums = _full(features.new_zeros(at, features.shape[-1])).index_add(0, places, _full(features))
    parts = sums.split([rows * columns * len(clips) for (rows, columns), clips in clips_of.items()])
    return {
        (rows, columns): (
            torch.tensor(clips),
            part.view(len(clips), rows, columns, -1) / num_frames[clips, None, None, None].to(part.device),
        )
        for ((rows, columns), clips), part in zip(clips_of.items(), parts, strict=True)
    }


def _pool(maps: Tensor, rows: int, columns: int) -> Tensor:
    """Average `(C, h, w, D)` adaptively to `(C, rows, columns, D)`, as `adaptive_avg_pool2d` does.

    By sums, not by that function or a product of matrices: deterministic backward on a GPU, and full precision under
    autocast and TF32.
    """
    return _pool_axis(_pool_axis(maps, rows, 1), columns, 2)


def _pool_axis(maps: Tensor, size: int, dim: int) -> Tensor:
    old = maps.shape[dim]
    if size == old:
        return maps
    begin = torch.arange(size) * old // size
    length = -(-(torch.arange(size) + 1) * old // size) - begin
    offset = torch.arange(int(length.max()))
    index = (begin[:, None] + offset).clamp(max=old - 1).flatten().to(maps.device)
    weight = ((offset < length[:, None]) / length[:, None]).to(maps)  # (size, longest window)
    windows = maps.index_select(dim, index).unflatten(dim, (size, len(offset)))
    return (windows * weight.view(*weight.shape, *[1] * (maps.ndim - 1 - dim))).sum(dim + 1)


def _same_video(video_ids: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup | None) -> Tensor:
    """`(F, all frames)` bool, True for another frame of the same video."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(video_ids.device)
    everyone = gather_rows(video_ids[:, None], counts, group)[:, 0]
    same = (video_ids[:, None] == everyone) & (owner == rank)
    own = torch.arange(len(video_ids), device=video_ids.device)
    same[own, sum(counts[:rank]) + own] = False
    return same


def _check_tubes(student: Tensor, teacher: Tensor, geometry: VisualGeometry) -> None:
    clips = len(_read_clips(geometry.host or geometry)[1])
    if student.ndim != 2 or len(student) != geometry.num_patches:
        raise ConfigurationError(
            f"student_features has shape {tuple(student.shape)}; expected ({geometry.num_patches}, D), one row for "
            "each patch token of the batch."
        )
    if teacher.ndim != 4 or len(teacher) != clips or teacher.shape[-1] != student.shape[-1]:
        raise ConfigurationError(
            f"teacher_tubes has shape {tuple(teacher.shape)}; expected ({clips}, h, w, {student.shape[-1]}): one map "
            "for each clip (frames of one video on one grid), as wide as the student's task head (teacher_width)."
        )


def _check_frames(student: Tensor, teacher: Tensor, video_ids: Tensor | None, mask_same_video: bool) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ConfigurationError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; expected (F, D) twice, one "
            "row for each frame, as wide as the task head (teacher_width)."
        )
    if mask_same_video and (video_ids is None or tuple(video_ids.shape) != (len(student),)):
        shape = None if video_ids is None else tuple(video_ids.shape)
        raise ConfigurationError(
            f"mask_same_video=True needs video_ids of shape ({len(student)},), the video of each frame; got {shape}."
        )
