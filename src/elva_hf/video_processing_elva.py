"""Frames -> patches: which frames, the patch grid, resize, normalise, patchify. An image is a one-frame video."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import logging
from transformers.video_processing_utils import VideoProcessorMixin

from .decoding_elva import VideoInfo, VideoSource, array_fps, probe, read_video
from .errors_elva import ConfigurationError, VideoError
from .frames_elva import FramePlan, FrameSampling, Grid, check_edge, count_frame_tokens, count_video_tokens, fit_grid

logger = logging.get_logger(__name__)

HYBRID_FIELDS = ("num_high_res_frames", "num_low_res_frames")
SAMPLING_FIELDS = (*HYBRID_FIELDS, "num_frames", "fps")
DEFAULT_FRAMES = {"num_high_res_frames": 32, "num_low_res_frames": 32}  # section 4.1


class ElvaVideosKwargs(TypedDict, total=False):
    """Options of the video processor, at construction and at each call."""

    patch_size: int | None
    longest_edge: int | None
    low_res_longest_edge: int | None
    num_high_res_frames: int | None
    num_low_res_frames: int | None
    num_frames: int | None
    fps: float | None
    image_mean: float | list[float] | tuple[float, ...] | None
    image_std: float | list[float] | tuple[float, ...] | None
    do_sample_frames: bool | None
    video_metadata: Any
    return_metadata: bool | None


CALL_ONLY = frozenset({"do_sample_frames", "video_metadata", "return_metadata"})


@dataclass(frozen=True)
class SampledVideo:
    """What the model gets of a video or image: which frames, when, and how many tokens each.

    Args:
        info: The source.
        indices: Frame numbers in the source.
        times: Seconds from the first frame, true presentation times; None where unknown.
        high: Per frame, True for high resolution.
        grids: Per frame, rows and columns of patches.
        num_asked: Frames asked for; more than `len(indices)` where the source has fewer.
    """

    info: VideoInfo
    indices: tuple[int, ...]
    times: tuple[float, ...] | None
    high: tuple[bool, ...]
    grids: tuple[Grid, ...]
    num_asked: int

    @property
    def num_frames(self) -> int:
        """Frames used."""
        return len(self.indices)

    @property
    def tokens_per_frame(self) -> tuple[int, ...]:
        """Tokens of each frame, with `<FRAME>` and `<LINE>`."""
        return tuple(count_frame_tokens(grid) for grid in self.grids)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of all frames, without the two borders: the count of Table 6."""
        return count_video_tokens(self.grids, borders=False)

    @property
    def num_tokens(self) -> int:
        """Positions the video takes in the context: frames and the two borders."""
        return count_video_tokens(self.grids)

    @property
    def num_patches(self) -> int:
        """Rows of `pixel_values_videos`."""
        return sum(rows * cols for rows, cols in self.grids)


class ElvaVideoProcessor(VideoProcessorMixin):
    """Turns videos and images into patches. Needs neither torchvision nor torchcodec.

    Args:
        patch_size: Side of a patch in pixels.
        longest_edge: Most pixels the longer side of a frame may have; a multiple of `patch_size` (section 4.1).
        low_res_longest_edge: The same for low-resolution frames of a hybrid video; `longest_edge` bounds these too.
        num_high_res_frames: High-resolution frames of a video (32 unless another option says how many frames).
        num_low_res_frames: Low-resolution frames of a video (likewise 32).
        num_frames: Frames of a video, all at high resolution; excludes the pair above and `fps`.
        fps: Frames per second of a video, all at high resolution; excludes the pair above and `num_frames`.
        image_mean: Mean of pixel values in [0, 1], one or one per channel.
        image_std: Standard deviation likewise.
    """

    valid_kwargs = ElvaVideosKwargs
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
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        **kwargs: Any,
    ):
        kwargs = {name: value for name, value in kwargs.items() if name not in _SERVICE_FIELDS}
        _refuse_unknown(kwargs, ())
        super().__init__()
        self.patch_size = patch_size
        self.longest_edge = longest_edge
        self.low_res_longest_edge = low_res_longest_edge
        sampling = {
            "num_high_res_frames": num_high_res_frames,
            "num_low_res_frames": num_low_res_frames,
            "num_frames": num_frames,
            "fps": fps,
        }
        self._set_sampling(_merge_sampling(DEFAULT_FRAMES, sampling))
        self.image_mean = _three(image_mean, "image_mean")
        self.image_std = _three(image_std, "image_std")
        self.resolve_options()

    @classmethod
    def from_dict(cls, video_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from saved fields; `kwargs` override them, and one way to count frames replaces another."""
        chosen = {name: kwargs[name] for name in SAMPLING_FIELDS if kwargs.get(name) is not None}
        if chosen:
            video_processor_dict = {**video_processor_dict, **_merge_sampling(video_processor_dict, chosen)}
            kwargs = {name: value for name, value in kwargs.items() if name not in SAMPLING_FIELDS}
        return super().from_dict(video_processor_dict, **kwargs)

    def preprocess(self, videos: Any, return_tensors: str | None = None, **options: Any) -> BatchFeature:
        """Decode, resize, normalise and cut into patches.

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
        """Patches of many sources, flat, and what was taken of each.

        Args:
            sources: Videos and images.
            images: Per source, True where it must be a still image.
            **options: `ElvaVideosKwargs`.
        """
        chosen = self.resolve_options(**options)
        rates = _source_rates(options.get("video_metadata"), len(sources))
        patches, sampled = [], []
        for source, image, fps in zip(sources, images or [False] * len(sources), rates, strict=True):
            decoded = read_video(source, lambda info, image=image: chosen.plan(info, image), chosen.frame_size, fps=fps)
            grids = tuple(
                Grid(frame.shape[1] // chosen.patch_size, frame.shape[2] // chosen.patch_size)
                for frame in decoded.frames
            )
            video = SampledVideo(decoded.info, decoded.indices, decoded.times, decoded.high, grids, decoded.num_asked)
            _warn_if_short(video)
            patches.extend(patchify(frame, chosen.patch_size) for frame in decoded.frames)
            sampled.append(video)
        return normalize(torch.cat(patches), chosen.image_mean, chosen.image_std), sampled

    def sample(self, source: VideoSource, *, image: bool = False, **options: Any) -> SampledVideo:
        """What `encode` would take of a source, from its index alone: nothing but the first frame is decoded.

        Raises:
            VideoError: A source that cannot be used.
            ConfigurationError: Options that no video can have.
        """
        chosen = self.resolve_options(**options)
        info = probe(source, fps=_source_rates(options.get("video_metadata"), 1)[0])
        plan = chosen.plan(info, image)
        known = info.duration is not None or info.is_image
        times = tuple(info.times[index] for index in plan.indices) if known else None
        grids = tuple(chosen.grid(info.height, info.width, high) for high in plan.high)
        return SampledVideo(info, plan.indices, times, plan.high, grids, plan.num_asked)

    def resolve_options(self, **options: Any) -> FrameOptions:
        """Options of a call, with the processor's own fields for those not given; checked.

        Raises:
            ConfigurationError: An unknown name, or a value that no video can have.
        """
        given = {name: value for name, value in options.items() if value is not None}
        _refuse_unknown(given, self.valid_kwargs.__annotations__)
        own = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        sampling = FrameSampling(**_merge_sampling(own, given))
        if given.get("do_sample_frames") is False:
            if any(name in given for name in SAMPLING_FIELDS):
                raise ConfigurationError("do_sample_frames=False takes every frame; give no number of frames with it.")
            sampling = FrameSampling()
        return FrameOptions(
            patch_size=given.get("patch_size", self.patch_size),
            longest_edge=given.get("longest_edge", self.longest_edge),
            low_res_longest_edge=given.get("low_res_longest_edge", self.low_res_longest_edge),
            sampling=sampling,
            image_mean=tuple(_three(given.get("image_mean", self.image_mean), "image_mean")),
            image_std=tuple(_three(given.get("image_std", self.image_std), "image_std")),
        )

    def _set_sampling(self, sampling: dict[str, Any]) -> None:
        for name in SAMPLING_FIELDS:
            setattr(self, name, sampling[name])


@dataclass(frozen=True)
class FrameOptions:
    """The options of one call, complete and checked; fields as in `ElvaVideoProcessor`."""

    patch_size: int
    longest_edge: int
    low_res_longest_edge: int
    sampling: FrameSampling
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("patch_size", "longest_edge", "low_res_longest_edge"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} is {value!r}; it must be a whole number of pixels, 1 or more.")
        check_edge(self.longest_edge, self.patch_size)
        if self.sampling.num_low:
            check_edge(self.low_res_longest_edge, self.patch_size, name="low_res_longest_edge")
        if min(self.image_std) <= 0:
            raise ConfigurationError(f"image_std is {self.image_std}; every value must be above 0.")

    def plan(self, info: VideoInfo, image: bool = False) -> FramePlan:
        """Choose frames of a source; a still image is one high-resolution frame."""
        if info.is_image:
            return FramePlan((0,), (True,), 1)
        if image:
            raise VideoError(
                f"{info.source} holds {info.num_frames} frames, but was given as an image.",
                hint="Give it as a video.",
                reason="not_an_image",
                source=info.source,
            )
        return self.sampling.plan(info.times, info.duration)

    def grid(self, height: int, width: int, high: bool) -> Grid:
        """Patch grid of a frame by its role."""
        edge = self.longest_edge if high else min(self.low_res_longest_edge, self.longest_edge)
        return fit_grid(height, width, patch_size=self.patch_size, longest_edge=edge)

    def frame_size(self, height: int, width: int, high: bool) -> tuple[int, int]:
        """Pixels `(height, width)` a frame is resized to."""
        rows, cols = self.grid(height, width, high)
        return rows * self.patch_size, cols * self.patch_size


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
    values = patches.float().view(len(patches), len(mean), -1).div_(255)
    return values.sub_(torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None]).flatten(1)


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


_SERVICE_FIELDS = frozenset({"video_processor_type", "processor_class", "auto_map"})  # written by transformers


def _merge_sampling(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """All four sampling fields: what is given replaces any other way to count frames."""
    given = {name: given[name] for name in SAMPLING_FIELDS if given.get(name) is not None}
    pair = not given or any(name in given for name in HYBRID_FIELDS)
    kept = {name: base.get(name) for name in (SAMPLING_FIELDS if not given else HYBRID_FIELDS if pair else ())}
    return {**dict.fromkeys(SAMPLING_FIELDS), **kept, **given}


def _refuse_unknown(options: dict[str, Any], known: Any) -> None:
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, [*ElvaVideosKwargs.__annotations__], n=1)
            meant = (
                f" did you mean {close[0]}?" if close else f" known are {', '.join(ElvaVideosKwargs.__annotations__)}."
            )
            raise ConfigurationError(f"{name!r} is no option of the video processor;{meant}")


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


def _warn_if_short(video: SampledVideo) -> None:
    if video.num_frames < video.num_asked:
        logger.warning_once(
            f"{video.info.source} gave {video.num_frames} of {video.num_asked} frames asked for "
            f"(it holds {video.info.num_frames}); none is repeated."
        )
