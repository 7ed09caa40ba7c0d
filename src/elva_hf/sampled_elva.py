"""A source that is open: what would be taken of it, known before it is decoded, and what was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .budget_elva import FrameCost, VideoDemand
from .decoding_elva import read_frames
from .frames_elva import FULL_LAYOUT, FramePlan, Grid, count_video_tokens, tokens_per_frame
from .layout_elva import FrameLayout
from .options_elva import SAMPLING_FIELDS, FrameOptions
from .source_elva import Damage, Reader, VideoInfo


@dataclass(frozen=True)
class SampledVideo:
    """What the model gets of a video or image: which frames, when, and how many tokens each.

    Args:
        info: The source; `info.rotation` is what was applied.
        indices: Frame numbers in the source.
        times: Seconds from the first frame, true presentation times; None where unknown.
        high: Per frame, True for high resolution.
        grids: Per frame, rows and columns of patches.
        num_asked: Frames asked for; more than `len(indices)` where the source has fewer, or a budget allows fewer.
        missing: Numbers of the frames that could not be decoded.
        damage: What else was wrong with the source.
        layout: How a frame is written in tokens.
    """

    info: VideoInfo
    indices: tuple[int, ...]
    times: tuple[float, ...] | None
    high: tuple[bool, ...]
    grids: tuple[Grid, ...]
    num_asked: int
    missing: tuple[int, ...] = ()
    damage: Damage = field(default_factory=Damage)
    layout: FrameLayout = FULL_LAYOUT

    @property
    def num_frames(self) -> int:
        """Frames used."""
        return len(self.indices)

    @property
    def tokens_per_frame(self) -> tuple[int, ...]:
        """Tokens of each frame, with `<FRAME>` and `<LINE>`."""
        return tokens_per_frame(self.grids, self.layout)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of all frames, without the two borders: the count of Table 6."""
        return count_video_tokens(self.grids, borders=False, layout=self.layout)

    @property
    def num_tokens(self) -> int:
        """Positions the video takes in the context: frames and the two borders, without time marks."""
        return count_video_tokens(self.grids, layout=self.layout)

    @property
    def num_patches(self) -> int:
        """Rows of `pixel_values_videos`."""
        return sum(rows * cols for rows, cols in self.grids[:: self.layout.chunk_size])


@dataclass(frozen=True)
class OpenVideo:
    """A source that has been looked at, and the options for it.

    Args:
        reader: The source.
        options: Which frames to take of it.
        image: Whether it must be a still image.
        on_damage: See `DecodingOptions`.
        counts_itself: Whether options of its own, which those of a call do not change, say how many frames.
    """

    reader: Reader
    options: FrameOptions
    image: bool = False
    on_damage: str = "warn"
    counts_itself: bool = False

    def sample(self, counts: tuple[int, int] | None = None) -> SampledVideo:
        """What would be taken of it; with `counts` of high- and low-resolution frames, fewer than the options ask for.

        Raises:
            VideoError: A video where an image is wanted, or a time that the video does not have.
            ConfigurationError: Options that this video cannot have.
        """
        info = self.reader.info
        plan = self.options.plan(info, self.image, counts)
        timed = info.duration is not None or info.is_image
        grids = {high: self.options.grid(info.height, info.width, high) for high in set(plan.high)}
        return SampledVideo(
            info=info,
            indices=plan.indices,
            times=tuple(info.times[index] for index in plan.indices) if timed else None,
            high=plan.high,
            grids=tuple(grids[high] for high in plan.high),
            num_asked=plan.num_asked,
            damage=self.reader.damage,
            layout=self.options.layout,
        )

    def demand(self) -> VideoDemand:
        """What it asks of a budget; borders are counted with the text."""
        asked, info = self.sample(), self.reader.info
        high, low = (self._cost(self.options.grid(info.height, info.width, role)) for role in (True, False))
        num_high = sum(asked.high)
        return VideoDemand(num_high, asked.num_frames - num_high, high, low, fixed_tokens=0)

    def memory(self, sampled: SampledVideo) -> int:
        """Bytes of the patches of these frames, float32."""
        return sampled.num_patches * 4 * 3 * self.options.patch_size**2

    def changed(self, options: Mapping[str, Any]) -> OpenVideo:
        """The same, had the call been given these options as well; a way to count frames replaces another."""
        if self.counts_itself:
            options = {name: value for name, value in options.items() if name not in SAMPLING_FIELDS}
        return replace(self, options=self.options.changed(options))

    def read(self, planned: SampledVideo) -> tuple[SampledVideo, list[Tensor]]:
        """Decode the frames of a plan.

        Returns:
            What was taken, and its frames, `(3, height, width)` uint8.

        Raises:
            VideoError: Too many of them cannot be decoded.
        """
        patch_size, scenes = self.options.patch_size, self.options.high_res_selection == "scenes"
        plan = FramePlan(planned.indices, planned.high, planned.num_asked)
        decoded = read_frames(self.reader, plan, self.options.frame_size, on_damage=self.on_damage, scenes=scenes)
        sampled = SampledVideo(
            info=decoded.info,
            indices=decoded.indices,
            times=decoded.times,
            high=decoded.high,
            grids=tuple(Grid(frame.shape[1] // patch_size, frame.shape[2] // patch_size) for frame in decoded.frames),
            num_asked=decoded.num_asked,
            missing=decoded.missing,
            damage=decoded.damage,
            layout=planned.layout,
        )
        return sampled, decoded.frames

    def _cost(self, grid: Grid) -> FrameCost:
        rows, cols = grid
        return FrameCost(self.options.layout.count(grid), rows * cols * 4 * 3 * self.options.patch_size**2)
