"""Chat, text, videos and images -> inputs of Mavors: chunks of frames, sub-images, true times (section 3.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers.processing_utils import MultiModalData

from elva_hf.budget_elva import FrameCost
from elva_hf.decoding_elva import read_frames, resize_frame
from elva_hf.errors_elva import ConfigurationError
from elva_hf.frames_elva import NUM_BORDER_TOKENS, FramePlan, Grid
from elva_hf.layout_elva import FrameLayout
from elva_hf.options_elva import ElvaVideosKwargs, FrameOptions, check_flag, check_whole
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.sampled_elva import OpenVideo, SampledVideo
from elva_hf.siblings.mavors.chunks_mavors import Box, fit_size, image_boxes, place_chunks, playback_stride
from elva_hf.siblings.mavors.rows_mavors import HEADER, MAX_CHUNK_FRAMES, average_frames, header
from elva_hf.source_elva import VideoInfo, VideoSource
from elva_hf.video_processing_elva import COUNT_FIELDS, ElvaVideoProcessor, write_patches


class MavorsVideosKwargs(ElvaVideosKwargs, total=False):
    """Options of the video processor: ELVA's, and Mavors' own."""

    image_size: int | None
    max_chunks: int | None
    sub_images: bool | None
    max_sub_images: int | None


_OWN_OPTIONS = tuple(MavorsVideosKwargs.__annotations__.keys() - ElvaVideosKwargs.__annotations__.keys())


@dataclass(frozen=True)
class MavorsFrameOptions(FrameOptions):
    """Which frames of a video and how large; fields as in `MavorsVideoProcessor`."""

    image_size: int = 384
    chunk_frames: int = 16
    playback_fps: float = 2.0
    max_chunks: int = 60
    sub_images: bool = True
    max_sub_images: int | None = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self.image_size, "image_size", "pixels")
        check_whole(self.chunk_frames, "chunk_frames", "frames")
        check_whole(self.max_chunks, "max_chunks", "chunks")
        check_flag(self.sub_images, "sub_images")
        if self.max_sub_images is not None:
            check_whole(self.max_sub_images, "max_sub_images", "sub-images")
        if self.chunk_frames > MAX_CHUNK_FRAMES:
            raise ConfigurationError(f"chunk_frames is {self.chunk_frames}; it must be at most {MAX_CHUNK_FRAMES}.")
        if not 0 < self.playback_fps < math.inf:
            raise ConfigurationError(f"playback_fps is {self.playback_fps!r}; it must be frames per second above 0.")

    def plan(self, info: VideoInfo, image: bool = False, counts: tuple[int, int] | None = None) -> FramePlan:
        """Choose frames of a source; of a video with more than `max_chunks` chunks of them, every a-th."""
        plan = super().plan(info, image, counts)
        stride = playback_stride(len(plan), self.max_chunks * self.chunk_frames)
        asked = math.ceil(plan.num_asked / stride)
        return FramePlan(plan.indices[::stride], plan.high[::stride], asked)

    def grid(self, height: int, width: int, high: bool = True) -> Grid:
        """Rows and columns of tokens of a frame, or of a part of an image; all frames are of one resolution."""
        rows, columns = fit_size(
            height, width, image_size=self.image_size, multiple=self.patch_size, longest_edge=self.longest_edge
        )
        return Grid(rows // self.patch_size, columns // self.patch_size)

    @property
    def has_low(self) -> bool:
        """There is one resolution."""
        return False

    @property
    def fps(self) -> float:
        """Frames per second at which chunks follow one another without a gap."""
        return self.sampling.fps or self.playback_fps

    def boxes(self, height: int, width: int) -> list[Box]:
        """The parts of an image that go through the encoder: the whole, and its sub-images."""
        return image_boxes(
            height,
            width,
            image_size=self.image_size,
            max_sub_images=self.max_sub_images,
            sub_images=self.sub_images,
        )

    def image_grids(self, height: int, width: int) -> list[Grid]:
        """Rows and columns of tokens of each of them."""
        return [self.grid(box.height, box.width) for box in self.boxes(height, width)]


class MavorsOpenVideo(OpenVideo):
    """A source that has been looked at; an image falls into a thumbnail and sub-images.

    Each of them is a chunk, whose grid the `SampledVideo` repeats as if the image were shown for all of it.
    """

    options: MavorsFrameOptions

    def sample(self, counts: tuple[int, int] | None = None) -> SampledVideo:
        """As `OpenVideo.sample`."""
        sampled = super().sample(counts)
        if not self.reader.info.is_image:
            return sampled
        grids = self.options.image_grids(self.reader.info.height, self.reader.info.width)
        return replace(sampled, grids=tuple(grid for grid in grids for _ in range(self.options.chunk_frames)))

    def memory(self, sampled: SampledVideo) -> int:
        """Bytes of the rows of these frames, float32."""
        rows, width = self.rows_of(sampled)
        return 4 * rows * width

    def rows_of(self, sampled: SampledVideo) -> tuple[int, int]:
        """Shape of the rows of these frames."""
        shown = sampled.grids[:: self.options.chunk_frames] if sampled.info.is_image else sampled.grids
        return sum(rows * columns for rows, columns in shown), 3 * self.options.patch_size**2 + HEADER

    def read(self, planned: SampledVideo) -> tuple[SampledVideo, list[Tensor]]:
        """Decode the frames of a plan; of an image its thumbnail and sub-images, each resized from the whole."""
        if not planned.info.is_image:
            return super().read(planned)
        plan = FramePlan(planned.indices, planned.high, planned.num_asked)
        decoded = read_frames(self.reader, plan, lambda height, width, _: (height, width), on_damage=self.on_damage)
        image = decoded.frames[0].permute(1, 2, 0)
        frames = []
        for left, top, width, height in self.options.boxes(planned.info.height, planned.info.width):
            size = self.options.frame_size(height, width, True)
            frames.append(resize_frame(image[top : top + height, left : left + width], size))
        return replace(planned, info=decoded.info, missing=decoded.missing, damage=decoded.damage), frames

    def _cost(self, grid: Grid) -> FrameCost:
        """Of one frame of a chunk, rounded up; of all parts of an image."""
        if self.reader.info.is_image:
            sampled = self.sample()
            return FrameCost(sampled.num_visual_tokens, self.memory(sampled))
        tokens = grid.rows * grid.cols
        return FrameCost(
            math.ceil(tokens / self.options.chunk_frames), 4 * tokens * (3 * self.options.patch_size**2 + HEADER)
        )


class MavorsVideoProcessor(ElvaVideoProcessor):
    """Turns videos into chunks and images into sub-images.

    Arguments and options as in `ElvaVideoProcessor`, and those below. Frames are of one resolution, so there are no
    low-resolution frames; a video is read at 2 frames per second unless another option says how many (Appendix D).

    Args:
        patch_size: Side in pixels of the square that one token stands for, pooled patches of the tower.
        longest_edge: Most pixels the longer side of a frame may have; only very long or high frames reach it.
        image_size: Side of the tower's square training images in pixels, R_v (section 3.5).
        chunk_frames: Frames of a chunk, F (section 5.1).
        playback_fps: Frames per second that C-RoPE takes for no gap where no `fps` says so.
        max_chunks: The most chunks of a video; of a longer one every a-th frame is taken (section 3.5).
        sub_images: Whether an image goes in as a thumbnail and sub-images (Eq. 8), or as the thumbnail alone.
        max_sub_images: The most sub-images of an image; None for no limit.
    """

    valid_kwargs = MavorsVideosKwargs

    def __init__(
        self,
        patch_size: int = 28,
        longest_edge: int = 1792,
        image_size: int = 384,
        chunk_frames: int = 16,
        playback_fps: float = 2.0,
        max_chunks: int = 60,
        sub_images: bool = True,
        max_sub_images: int | None = 9,
        **kwargs: Any,
    ):
        if all(kwargs.get(name) is None for name in COUNT_FIELDS):
            kwargs["fps"] = playback_fps
        self.image_size = image_size
        self.chunk_frames = chunk_frames
        self.playback_fps = playback_fps
        self.max_chunks = max_chunks
        self.sub_images = sub_images
        self.max_sub_images = max_sub_images
        super().__init__(patch_size=patch_size, longest_edge=longest_edge, **kwargs)

    @property
    def layout(self) -> FrameLayout:
        """A chunk is written as its patches alone."""
        return FrameLayout(frame_token=False, line_token=False, chunk_size=self.chunk_frames)

    def resolve_options(self, **options: Any) -> MavorsFrameOptions:
        """As in `ElvaVideoProcessor`, with the rules for chunks and images."""
        own, others = _split_own(options)
        base = super().resolve_options(**others)
        if base.sampling.num_low:
            raise ConfigurationError(
                f"num_low_res_frames is {base.sampling.num_low}, but Mavors has one resolution; use fps or num_frames."
            )
        given = {field.name: getattr(base, field.name) for field in fields(base)}
        names = [field.name for field in fields(MavorsFrameOptions) if field.name not in given]
        return MavorsFrameOptions(**given, **{name: own.get(name, getattr(self, name)) for name in names})

    def resolve_budgets(self, **options: Any) -> Any:
        """As in `ElvaVideoProcessor`."""
        return super().resolve_budgets(**_split_own(options)[1])

    @contextmanager
    def open(
        self, sources: Sequence[VideoSource], *, images: Sequence[bool] | None = None, **options: Any
    ) -> Iterator[list[OpenVideo]]:
        """As in `ElvaVideoProcessor`."""
        own, others = _split_own(options)
        with super().open(sources, images=images, **others) as opened:
            yield [
                MavorsOpenVideo(**{**vars(video), "options": replace(video.options, **own)})  # every field of it
                for video in opened
            ]

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, which leaves out what is None; here that means no limit."""
        return {**super().to_dict(), "max_sub_images": self.max_sub_images}

    def pixels_of_tokens(self, rows: Tensor) -> Tensor:
        """The mean of each chunk's frames; see `average_frames`."""
        return average_frames(rows)

    def rows_of(self, video: OpenVideo, sampled: SampledVideo) -> tuple[int, int]:
        """Shape of the rows of `pixel_values_videos` that stand for a video; see `rows_mavors`."""
        return video.rows_of(sampled)

    def write_rows(self, video: OpenVideo, sampled: SampledVideo, frames: Sequence[Tensor], out: np.ndarray) -> None:
        """Write the rows of a video, chunk by chunk, in each token by token and frame by frame."""
        options: MavorsFrameOptions = video.options
        if sampled.info.is_image:
            chunks, positions = [[frame] for frame in frames], [0] * len(frames)
        else:
            size = options.chunk_frames
            chunks = [frames[first : first + size] for first in range(0, len(frames), size)]
            positions = place_chunks(sampled.times, len(frames), chunk_frames=size, fps=options.fps)
        filled = 0
        for chunk, position in zip(chunks, positions, strict=True):
            side, width = options.patch_size, out.shape[1] - HEADER
            tokens = (chunk[0].shape[1] // side) * (chunk[0].shape[2] // side)
            rows = out[filled : filled + tokens * len(chunk)].reshape(tokens, len(chunk), -1)
            pixels = np.empty((tokens, width), np.float32)
            for number, frame in enumerate(chunk):
                write_patches(frame.numpy(), side, options.image_mean, options.image_std, pixels)
                rows[:, number, :width] = pixels
                rows[:, number, width:] = header(number, position)
            filled += tokens * len(chunk)


class MavorsProcessor(ElvaProcessor):
    """A tokenizer and a video processor: text with `<video>` and `<image>` placeholders in, model inputs out.

    As `ElvaProcessor`. A chunk of a video stands in the text as one frame without `<FRAME>` and `<LINE>` tokens of its
    own; an image as its thumbnail and sub-images, one after another.
    """

    default_video_processor = MavorsVideoProcessor

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        video_sizes: Sequence[tuple[int, int, int]] | None = None,
        **options: Any,
    ) -> MultiModalData:
        """As in `ElvaProcessor`, with all parts of an image."""
        counts = vars(super()._get_num_multimodal_tokens(None, video_sizes, **options))
        if image_sizes is not None:
            chosen = self.video_processor.resolve_options(**options)
            patches = [sum(rows * cols for rows, cols in chosen.image_grids(*size)) for size in image_sizes]
            counts |= {"num_image_tokens": [count + NUM_BORDER_TOKENS for count in patches]}
            counts["num_image_patches"] = patches
        return MultiModalData(**counts)


def _split_own(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of Mavors that are given, and all others."""
    own = {name: options[name] for name in _OWN_OPTIONS if options.get(name) is not None}
    return own, {name: value for name, value in options.items() if name not in _OWN_OPTIONS}
