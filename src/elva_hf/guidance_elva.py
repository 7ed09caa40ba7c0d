"""The task heads through which a vision teacher guides training (section 3.2); not part of an exported model.

Letters: `P` patches, `F` frames, `D` hidden size, `W` width of the teacher.
"""

from __future__ import annotations

from torch import Tensor, nn

from .configuration_elva import VideoDecoderConfig
from .errors_elva import ConfigurationError
from .layout_elva import FrameLayout

MAX_LOGIT_SCALE = 100.0
"""Ceiling of Eq. 3's tau, as in CLIP."""


class ElvaGuidance(nn.Module):
    """Last hidden states to the teacher's width: a two-layer head per loss, and tau of Eq. 3.

    A head whose weight in `config.guidance` is 0 does not exist; without `frame_head` there is no `logit_scale`.
    Video-Panda's distillation (`patch_weight`) compares the same features of patches as L_MSE, frame by frame.

    Args:
        config: A configuration whose `guidance` is set.

    Attributes:
        tube_head: Head of L_MSE (Eq. 2) and of Video-Panda's distillation, or None.
        frame_head: Head of L_Con (Eq. 3), or None.
        logit_scale: `(1,)` logarithm of tau, or None.
    """

    def __init__(self, config: VideoDecoderConfig):
        super().__init__()
        guidance, hidden = config.guidance, config.text_config.hidden_size
        self.logit_scale_init = guidance["logit_scale_init"]
        width = guidance["teacher_width"]
        self.tube_head = task_head(hidden, width) if guidance["tube_weight"] or guidance["patch_weight"] else None
        self.frame_head = task_head(hidden, width) if guidance["frame_weight"] else None
        self.register_parameter("logit_scale", None)
        if self.frame_head is not None:
            scale = self.frame_head[0].weight.new_full((1,), self.logit_scale_init)  # FSDP2 shards no 0-dim parameter
            self.logit_scale = nn.Parameter(scale)

    @property
    def scale(self) -> Tensor | None:
        """`(1,)` tau of Eq. 3, at most 100; None without `frame_head`."""
        return None if self.logit_scale is None else self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def forward(self, patches: Tensor, frames: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Run the heads; empty inputs give empty features through which every parameter gets a zero gradient.

        Args:
            patches: `(P, D)` last hidden states of the patch tokens.
            frames: `(F, D)` last hidden states of the `<FRAME>` tokens.

        Returns:
            `(P, W)`, `(F, W)` and `(1,)` tau; None for what a missing head would give.
        """
        return _run(self.tube_head, patches), _run(self.frame_head, frames), self.scale


def check_frame_features(layout: FrameLayout) -> None:
    """Refuse a teacher, which looks at frames, for a model whose tokens stand for chunks of them.

    Raises:
        ConfigurationError: Such a model's layout.
    """
    if layout.chunk_size > 1:
        raise ConfigurationError(
            f"a teacher has features of frames, and a token of this model stands for {layout.chunk_size} of them: "
            "train without guidance (guidance: null in a recipe)."
        )


def task_head(hidden_size: int, width: int) -> nn.Sequential:
    """A head of section 3.2: Linear -> GELU -> Linear."""
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, width))


def _run(head: nn.Sequential | None, states: Tensor) -> Tensor | None:
    return None if head is None else head(states.to(head[0].weight.dtype))
