"""Frames -> patches: which frames, the patch grid, resize, normalise, patchify. An image is a one-frame video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging
from transformers.video_processing_utils import VideoProcessorMixin

from .arrays_elva import array_fps
from .decoding_elva import open_reader
from .errors_elva import ConfigurationError, VideoError
from .fitting_elva import Sample, choose_frames
from .frames_elva import FULL_LAYOUT, FrameSampling
from .options_elva import (
    SAMPLING_FIELDS,
    WINDOW_FIELDS,
    Budgets,
    ElvaVideosKwargs,
    FrameOptions,
    VideoClip,
    given_options,
    merge_sampling,
    read_budgets,
    read_decoding,
    refuse_fields,
)
from .sampled_elva import OpenVideo, SampledVideo
from .source_elva import VideoSource

logger = logging.get_logger(__name__)

DEFAULT_FRAMES = {"num_high_res_frames": 32, "num_low_res_frames": 32}  # section 4.1
COUNT_FIELDS = tuple(name for name in SAMPLING_FIELDS if name != "frame_times")
"""Ways to say how many frames that a processor keeps; times belong to one video."""

_SERVICE_FIELDS = frozenset({"video_processor_type", "processor_class", "auto_map"})  # written by transformers


class ElvaVideoProcessor(VideoProcessorMixin):
    """Turns videos and images into patches. Needs neither torchvision nor torchcodec.

    Each call takes these options too, and: `frame_times`, `video_start`, `video_end` (as in `VideoClip`);
    `max_memory` (bytes of the patches of a sample, also `"512MB"`) and `context_length` (all tokens of a sample);
    `limits` (`DecodingLimits`), `allow_urls` (True or a `UrlPolicy`), `isolate` (decode in a process of its own that
    can open nothing), `threads` (of a decoder) and `on_damage` (`"warn"` leaves out up to a tenth of the frames,
    `"raise"` fails). Those are never saved, and never taken from a checkpoint.

    Args:
        patch_size: Side of a patch in pixels.
        longest_edge: Most pixels the longer side of a frame may have; a multiple of `patch_size` (section 4.1).
        low_res_longest_edge: The same for low-resolution frames of a hybrid video; `longest_edge` bounds these too.
        num_high_res_frames: High-resolution frames of a video (32 unless another option says how many frames).
        num_low_res_frames: Low-resolution frames of a video (likewise 32).
        num_frames: Frames of a video, all at high resolution; excludes the pair above and `fps`.
        fps: Frames per second of a video, all at high resolution; excludes the pair above and `num_frames`.
        high_res_selection: Which frames are the high ones: `"uniform"` in time, or `"scenes"`, one for each scene.
        timestamps: Whether a processor writes the time of each frame before it, as text.
        max_visual_tokens: Most tokens of all frames of a sample, `<FRAME>` and `<LINE>` included; None for no limit.
        overflow: What happens to a sample beyond a budget: `"error"` refuses it, `"fit"` takes fewer frames of it, and
            fewer of them at high resolution (`budget_elva` has the rule).
        image_mean: Mean of pixel values in [0, 1], one or one per channel.
        image_std: Standard deviation likewise.
    """

    valid_kwargs = ElvaVideosKwargs
    layout = FULL_LAYOUT  # how a frame is written in tokens
    model_input_names = ["pixel_values_videos"]

    def __init__(
        self,
        patch_size: int = 28,
        longest_edge: int = 672,
        low_res_longest_edge: int = 336,
        num_high_res_frames: int | None = None,
        num_low_res_frames: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        high_res_selection: str = "uniform",
        timestamps: bool = False,
        max_visual_tokens: int | None = None,
        overflow: str = "error",
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        **kwargs: Any,
    ):
        refuse_fields(name for name in kwargs if name not in _SERVICE_FIELDS)
        super().__init__()
        self.patch_size = patch_size
        self.longest_edge = longest_edge
        self.low_res_longest_edge = low_res_longest_edge
        counts = {
            "num_high_res_frames": num_high_res_frames,
            "num_low_res_frames": num_low_res_frames,
            "num_frames": num_frames,
            "fps": fps,
        }
        counts = merge_sampling(DEFAULT_FRAMES, counts)
        for name in COUNT_FIELDS:
            setattr(self, name, counts[name])
        self.high_res_selection = high_res_selection
        self.timestamps = timestamps
        self.max_visual_tokens = max_visual_tokens
        self.overflow = overflow
        self.image_mean = _three(image_mean, "image_mean")
        self.image_std = _three(image_std, "image_std")
        self.resolve_options()
        self.resolve_budgets()

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from saved fields; `kwargs` override them, and one way to count frames replaces another."""
        chosen = {name: kwargs[name] for name in COUNT_FIELDS if kwargs.get(name) is not None}
        if chosen:
            merged = merge_sampling(video_processor_dict, chosen)
            video_processor_dict = {**video_processor_dict, **{name: merged[name] for name in COUNT_FIELDS}}
            kwargs = {name: value for name, value in kwargs.items() if name not in COUNT_FIELDS}
        return super().from_dict(video_processor_dict, **kwargs)

    def preprocess(self, videos: Any, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """Decode, resize, normalise and cut into patches; budgets hold for each video by itself.

        Args:
            videos: A video or a list of videos; see `split_videos` for what a list means.
            return_tensors: `"pt"` (also when not given) or `"np"`.
            **options: `ElvaVideosKwargs`, for this call only.

        Returns:
            `pixel_values_videos`, `(num_patches, 3 * patch_size**2)` float32: video by video, frame by frame, row by
            row; inside a patch channel, row, column. `video_grids`: per video a list of per-frame `(rows, cols)`.
            `video_metadata`: per video a `SampledVideo`, if `return_metadata` is True.

        Raises:
            VideoError: A video that cannot be used.
            ContextOverflowError: A video beyond a budget.
            ConfigurationError: Options that no video can have.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ConfigurationError(f'return_tensors is {return_tensors!r}; this processor returns "pt" or "np".')
        patches, sampled = self.encode(split_videos(videos), **options)
        data: dict[str, Any] = {
            "pixel_values_videos": patches.numpy() if return_tensors == "np" else patches,
            "video_grids": [list(video.grids) for video in sampled],
        }
        if options.get("return_metadata"):
            data["video_metadata"] = sampled
        return BatchFeature(data, skip_tensor_conversion=["video_grids", "video_metadata"])

    def encode(
        self, sources: Sequence[VideoSource], *, images: Sequence[bool] | None = None, **options: Any
    ) -> tuple[Tensor, list[SampledVideo]]:
        """Patches of many sources, flat, and what was taken of each; budgets hold for each source by itself.

        Args:
            sources: Videos and images, each of them alone or in a `VideoClip`.
            images: Per source, True where it must be a still image.
            **options: `ElvaVideosKwargs`.
        """
        budgets = self.resolve_budgets(**options)
        with self.open(sources, images=images, **options) as videos:
            return self.decode(videos, [choose_frames(_alone(video), budgets)[0] for video in videos])

    def sample(self, source: VideoSource, *, image: bool = False, **options: Any) -> SampledVideo:
        """What `encode` would take of a source, from its index alone: nothing but the first frame is decoded.

        Raises:
            VideoError: A source that cannot be used.
            ContextOverflowError: It is beyond a budget.
            ConfigurationError: Options that no video can have.
        """
        with self.open([source], images=[image], **options) as (video,):
            return choose_frames(_alone(video), self.resolve_budgets(**options))[0]

    @contextmanager
    def open(
        self, sources: Sequence[VideoSource], *, images: Sequence[bool] | None = None, **options: Any
    ) -> Iterator[list[OpenVideo]]:
        """Look at sources, and keep them open for `decode`.

        Args:
            sources: As in `encode`.
            images: Likewise.
            **options: Likewise.
        """
        chosen = self.resolve_options(**options)
        decoding = read_decoding(given_options(options))
        rates = _source_rates(options.get("video_metadata"), len(sources))
        with ExitStack() as stack:
            videos = []
            for source, image, fps in zip(sources, images or [False] * len(sources), rates, strict=True):
                clip = source if isinstance(source, VideoClip) else VideoClip(source)
                video = OpenVideo(
                    reader=stack.enter_context(open_reader(clip.source, fps=fps, options=decoding)),
                    options=chosen.changed(clip.options),
                    image=image,
                    on_damage=decoding.on_damage,
                    counts_itself=any(name in clip.options for name in SAMPLING_FIELDS),
                )
                videos.append(video)
            yield videos

    def decode(self, videos: Sequence[OpenVideo], planned: Sequence[SampledVideo]) -> tuple[Tensor, list[SampledVideo]]:
        """Decode what was planned of each video, one after another.

        Args:
            videos: From `open`.
            planned: Per video what to take of it.

        Returns:
            `(num_patches, 3 * patch_size**2)` float32, and what was taken: less than planned where frames are damaged.

        Raises:
            VideoError: A video of which too much is damaged.
        """
        sizes = [self.rows_of(video, plan) for video, plan in zip(videos, planned, strict=True)]
        width = sizes[0][1] if sizes else 3 * self.patch_size**2
        patches = torch.empty(sum(rows for rows, _ in sizes), width)
        values = patches.numpy()
        taken, filled = [], 0
        for video, plan in zip(videos, planned, strict=True):
            sampled, frames = video.read(plan)
            rows, _ = self.rows_of(video, sampled)
            self.write_rows(video, sampled, frames, values[filled : filled + rows])
            filled += rows
            _report(video, plan, sampled)
            taken.append(sampled)
        return patches if filled == len(patches) else patches[:filled].clone(), taken

    def pixels_of_tokens(self, rows: Tensor) -> Tensor:
        """From rows of `pixel_values_videos`, `(P, 3 * patch_size**2)`: the normalised pixels of each visual token."""
        return rows

    def rows_of(self, video: OpenVideo, sampled: SampledVideo) -> tuple[int, int]:
        """Shape of the rows of `pixel_values_videos` that stand for a video."""
        return sampled.num_patches, 3 * video.options.patch_size**2

    def write_rows(self, video: OpenVideo, sampled: SampledVideo, frames: Sequence[Tensor], out: np.ndarray) -> None:
        """Write the rows of a video.

        Args:
            video: Where its options are.
            sampled: What was taken of it.
            frames: Per frame `(3, height, width)` uint8.
            out: Float32, of the shape that `rows_of` says.
        """
        options, filled = video.options, 0
        for frame, (rows, cols) in zip(frames, sampled.grids, strict=True):
            part = out[filled : filled + rows * cols]
            write_patches(frame.numpy(), options.patch_size, options.image_mean, options.image_std, part)
            filled += rows * cols

    def resolve_options(self, **options: Any) -> FrameOptions:
        """Which frames a call takes, with the processor's own fields for options not given; checked.

        Raises:
            ConfigurationError: An unknown name, or a value that no video can have.
        """
        given = given_options(options)
        window = {name: given.get(name) for name in WINDOW_FIELDS}
        own = {name: getattr(self, name, None) for name in SAMPLING_FIELDS}
        counts = merge_sampling(own, given)
        if given.get("do_sample_frames") is False:
            if any(name in given for name in SAMPLING_FIELDS):
                raise ConfigurationError("do_sample_frames=False takes every frame; give no number of frames with it.")
            counts = {}
        return FrameOptions(
            patch_size=given.get("patch_size", self.patch_size),
            longest_edge=given.get("longest_edge", self.longest_edge),
            low_res_longest_edge=given.get("low_res_longest_edge", self.low_res_longest_edge),
            sampling=FrameSampling(**counts, **window),
            high_res_selection=given.get("high_res_selection", self.high_res_selection),
            timestamps=given.get("timestamps", self.timestamps),
            image_mean=tuple(_three(given.get("image_mean", self.image_mean), "image_mean")),
            image_std=tuple(_three(given.get("image_std", self.image_std), "image_std")),
            layout=self.layout,
        )

    def resolve_budgets(self, **options: Any) -> Budgets:
        """What a sample of a call may cost, likewise.

        Raises:
            ConfigurationError: An unknown name, or a value that is no budget.
        """
        return read_budgets(given_options(options), vars(self))


def patchify(frame: Tensor, patch_size: int) -> Tensor:
    """Cut a frame into patches, row by row.

    Args:
        frame: `(C, H, W)`, sides multiples of `patch_size`.
        patch_size: Side of a patch in pixels.

    Returns:
        `(rows * cols, C * patch_size**2)`; inside a patch channel, row, column.
    """
    channels, height, width = frame.shape
    cut = frame.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch_size**2)


def normalize(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bring pixel values to about [-1, 1].

    Args:
        patches: `(N, 3 * P * P)` uint8, channel first.
        mean: Per channel, of values in [0, 1].
        std: Per channel, likewise.

    Returns:
        `(N, 3 * P * P)` float32.
    """
    channels = patches.float().view(len(patches), len(mean), -1).div_(255)
    return channels.sub_(torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None]).flatten(1)


def write_patches(
    frame: np.ndarray, patch_size: int, mean: Sequence[float], std: Sequence[float], out: np.ndarray
) -> None:
    """`normalize(patchify(frame))` into memory that is there; numpy, for torch would wake its threads for each frame.

    Args:
        frame: `(3, H, W)` uint8, sides multiples of `patch_size`.
        patch_size: Side of a patch in pixels.
        mean: Per channel, of values in [0, 1].
        std: Per channel, likewise.
        out: `(N, 3 * patch_size**2)` float32, written.
    """
    channels, height, width = frame.shape
    rows, cols = height // patch_size, width // patch_size
    values = out.reshape(rows, cols, channels, patch_size, patch_size)
    np.copyto(
        values, frame.reshape(channels, rows, patch_size, cols, patch_size).transpose(1, 3, 0, 2, 4), casting="safe"
    )
    values /= 255
    values -= np.asarray(mean, np.float32)[:, None, None]
    values /= np.asarray(std, np.float32)[:, None, None]


def split_videos(videos: Any) -> list[VideoSource]:
    """A video or a list of videos as a list of videos.

    A list of single frames (PIL images, or arrays of three axes) is one video; any other list is several.
    """
    if not isinstance(videos, (list, tuple)):
        return [videos]
    if not videos:
        raise VideoError("the list of videos is empty; give at least one video.", reason="empty")
    return [videos] if is_frame_list(videos) else list(videos)


def is_frame_list(value: Any) -> bool:
    """True for a list of single frames: PIL images, or arrays of three axes."""
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_frame(item) for item in value)


def _is_frame(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    return getattr(value, "ndim", None) == 3 or (hasattr(value, "getbands") and hasattr(value, "convert"))


def _three(value: float | Sequence[float], name: str) -> list[float]:
    values = [float(value)] * 3 if isinstance(value, (int, float)) else [float(item) for item in value]
    if len(values) != 3:
        raise ConfigurationError(f"{name} has {len(values)} values; give one, or three for red, green and blue.")
    return values


def _source_rates(metadata: Any, count: int) -> list[float | None]:
    """Frames per second of each source, where the caller knows it."""
    if metadata is None:
        return [None] * count
    items = list(metadata) if isinstance(metadata, (list, tuple)) else [metadata] * count
    if len(items) != count:
        raise ConfigurationError(f"video_metadata describes {len(items)} videos, but {count} were given.")
    return [array_fps(item) for item in items]


def _alone(video: OpenVideo) -> Sample:
    """A video without a text: its tokens are its frames and borders."""

    def count(sampled: Sequence[SampledVideo]) -> int:
        return sum(video.num_tokens for video in sampled)

    return Sample([video], count, count)


def _report(video: OpenVideo, planned: SampledVideo, taken: SampledVideo) -> None:
    """Warn of what a source did not give, or not whole."""
    source, damage = taken.info.source, taken.damage
    asked = video.sample()
    if planned.num_frames == asked.num_frames < asked.num_asked:
        logger.warning_once(
            f"{source} gave {asked.num_frames} of {asked.num_asked} frames asked for "
            f"(it holds {taken.info.num_frames}); none is repeated."
        )
    if taken.missing:
        listed = ", ".join(map(str, taken.missing[:10])) + ", ..." * (len(taken.missing) > 10)
        logger.warning_once(f"{source}: {len(taken.missing)} frames cannot be decoded and are left out: {listed}.")
    if damage.num_bad_packets or damage.num_corrupt_frames:
        logger.warning_once(
            f"{source} is damaged: the decoder refused {damage.num_bad_packets} packets and concealed errors in "
            f"{damage.num_corrupt_frames} frames."
        )
    for note in damage.notes:
        logger.warning_once(f"{source}: {note}.")
