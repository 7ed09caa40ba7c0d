"""Chat, text, videos and images -> inputs of Video-Panda."""

from __future__ import annotations

from typing import Any

from elva_hf.layout_elva import FrameLayout
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.video_processing_elva import ElvaVideoProcessor


class VideoPandaVideoProcessor(ElvaVideoProcessor):
    """Turns videos and images into the pixels of visual tokens: 8 frames of at most 448 pixels (section 4.1).

    Arguments and options as in `ElvaVideoProcessor`, and:

    Args:
        row_tokens: Whether a row token closes each row; as in the model's configuration.
    """

    def __init__(
        self,
        patch_size: int = 28,
        longest_edge: int = 448,
        low_res_longest_edge: int = 224,
        row_tokens: bool = True,
        **kwargs: Any,
    ):
        if all(kwargs.get(name) is None for name in ("num_high_res_frames", "num_low_res_frames", "num_frames", "fps")):
            kwargs["num_frames"] = 8
        self.row_tokens = row_tokens
        super().__init__(
            patch_size=patch_size, longest_edge=longest_edge, low_res_longest_edge=low_res_longest_edge, **kwargs
        )

    @property
    def layout(self) -> FrameLayout:
        """How a frame is written in tokens."""
        return FrameLayout(line_token=self.row_tokens)


class VideoPandaProcessor(ElvaProcessor):
    """A tokenizer and a video processor: text with `<video>` and `<image>` placeholders in, model inputs out.

    As `ElvaProcessor`; an image is a video of one frame.
    """

    default_video_processor = VideoPandaVideoProcessor
