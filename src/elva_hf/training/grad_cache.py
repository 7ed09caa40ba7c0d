"""GradCache (Gao et al., 2021): L_Con over the frames of a whole optimiser step, whose graph no memory would hold.

A first pass without gradient collects the features of all micro-batches; the loss over all of them gives each feature
its gradient, and the second pass, micro-batch by micro-batch, hands these to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elva_hf.training.losses import VisualTargets, frame_contrastive_loss


@dataclass
class FrameFeatures:
    """Both sides of L_Con (Eq. 3) of a batch, without gradient, and the teacher's targets they came with.

    Args:
        student: `(F, W)` after the head.
        targets: Of the teacher; None if the batch has no frame.
        video_ids: `(F,)` video of each frame.
        logit_scale: `(1,)` tau.
    """

    student: Tensor
    targets: VisualTargets | None
    video_ids: Tensor
    logit_scale: Tensor


def contrast_gradients(features: Sequence[FrameFeatures], mask_same_video: bool) -> list[dict[str, Tensor]]:
    """L_Con (Eq. 3) over the frames of several micro-batches and all processes, and its gradient (GradCache).

    Args:
        features: Of each micro-batch, from `GuidanceHook.collect`.
        mask_same_video: As in `frame_contrastive_loss`.

    Returns:
        Of each micro-batch the batch keys `frame_gradients` `(F, W)`, `logit_scale_gradient` `(1,)`, which is that of
        the whole step, and `frame_loss`, the value of the whole step.
    """
    sizes = [len(part.student) for part in features]
    student = torch.cat([part.student for part in features])
    student = (student if student.dtype == torch.float64 else student.float()).requires_grad_()
    teachers = [part.student if part.targets is None else part.targets.frames.to(student) for part in features]
    video_ids, number = [], 0
    for part in features:
        video_ids.append(part.video_ids + number)
        number += len(part.student)  # a micro-batch has no more videos than frames
    scale = features[0].logit_scale.clone().requires_grad_()
    with torch.enable_grad():
        loss = frame_contrastive_loss(
            student, torch.cat(teachers), scale, video_ids=torch.cat(video_ids), mask_same_video=mask_same_video
        )
        gradients, scale_gradient = torch.autograd.grad(loss, (student, scale))
    common = {"logit_scale_gradient": scale_gradient, "frame_loss": loss.detach()}
    return [{"frame_gradients": part, **common} for part in gradients.split(sizes)]


def random_state() -> list[Tensor]:
    """State of torch's generators: the host's and, where there is one, the current GPU's."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpu]


def set_random_state(state: list[Tensor]) -> None:
    """Put back what `random_state` read."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
