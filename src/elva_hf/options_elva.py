"""Options of the video processor: which frames of a video, how large, what they may cost, and how files are read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, TypedDict

from .decoding_elva import DecodingOptions
from .errors_elva import ConfigurationError, VideoError
from .frames_elva import FULL_LAYOUT, FramePlan, FrameSampling, Grid, check_edge, fit_grid
from .layout_elva import FrameLayout
from .limits_elva import DecodingLimits, UrlPolicy, parse_bytes
from .source_elva import VideoInfo, VideoSource

HYBRID_FIELDS = ("num_high_res_frames", "num_low_res_frames")
SAMPLING_FIELDS = (*HYBRID_FIELDS, "num_frames", "fps", "frame_times")
"""Ways to say how many frames; one replaces another, only the first two go together."""

WINDOW_FIELDS = ("video_start", "video_end")


class ElvaVideosKwargs(TypedDict, total=False):
    """Options of the video processor: those of a video, of a sample, and of how files are read."""

    patch_size: int | None
    longest_edge: int | None
    low_res_longest_edge: int | None
    num_high_res_frames: int | None
    num_low_res_frames: int | None
    num_frames: int | None
    fps: float | None
    frame_times: Sequence[float] | None
    video_start: float | None
    video_end: float | None
    high_res_selection: str | None
    timestamps: bool | None
    max_visual_tokens: int | None
    max_memory: int | str | None
    context_length: int | None
    overflow: str | None
    image_mean: float | list[float] | tuple[float, ...] | None
    image_std: float | list[float] | tuple[float, ...] | None
    limits: DecodingLimits | None
    allow_urls: bool | UrlPolicy | None
    isolate: bool | None
    threads: int | None
    on_damage: str | None
    do_sample_frames: bool | None
    video_metadata: Any
    return_metadata: bool | None


MACHINE_FIELDS = ("limits", "allow_urls", "isolate", "threads", "on_damage", "max_memory", "context_length")
"""What the one who runs the processor decides, never the one who wrote its files."""

CALL_FIELDS = frozenset(
    (*MACHINE_FIELDS, "frame_times", *WINDOW_FIELDS, "do_sample_frames", "video_metadata", "return_metadata")
)
"""Options of a call that are no fields of the processor, and so are in none of its files."""


@dataclass(frozen=True)
class VideoClip:
    """A source with options of its own, which go before those of the call.

    Args:
        source: See `VideoSource`.
        num_high_res_frames: As in `ElvaVideoProcessor`, and so the next three.
        num_low_res_frames: Low-resolution frames.
        num_frames: Frames, all at high resolution.
        fps: Frames per second of video, all at high resolution.
        frame_times: Seconds from the first frame: the frames on screen then, all at high resolution.
        video_start: Seconds from the first frame; nothing shown only before it is taken.
        video_end: Seconds from the first frame; nothing shown from then on is taken.
        high_res_selection: `"uniform"` or `"scenes"`.

    Example:
        >>> clip = VideoClip("clip.mp4", video_start=3.0, video_end=9.0, num_frames=8)
        >>> clip.options
        {'num_frames': 8, 'video_start': 3.0, 'video_end': 9.0}
    """

    source: VideoSource
    _: KW_ONLY
    num_high_res_frames: int | None = None
    num_low_res_frames: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    frame_times: Sequence[float] | None = None
    video_start: float | None = None
    video_end: float | None = None
    high_res_selection: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options that are given."""
        given = {name: getattr(self, name) for name in CLIP_FIELDS}
        return {name: value for name, value in given.items() if value is not None}


CLIP_FIELDS = tuple(field.name for field in fields(VideoClip) if field.name != "source")


@dataclass(frozen=True)
class FrameOptions:
    """Which frames of a video and how large; complete and checked. Fields as in `ElvaVideoProcessor`."""

    patch_size: int
    longest_edge: int
    low_res_longest_edge: int
    sampling: FrameSampling
    high_res_selection: str
    timestamps: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    layout: FrameLayout = FULL_LAYOUT

    def __post_init__(self) -> None:
        for name in ("patch_size", "longest_edge", "low_res_longest_edge"):
            check_whole(getattr(self, name), name, "pixels")
        check_edge(self.longest_edge, self.patch_size)
        if self.sampling.num_low:
            check_edge(self.low_res_longest_edge, self.patch_size, name="low_res_longest_edge")
        check_choice(self.high_res_selection, "high_res_selection", ("uniform", "scenes"))
        check_flag(self.timestamps, "timestamps")
        if min(self.image_std) <= 0:
            raise ConfigurationError(f"image_std is {self.image_std}; every value must be above 0.")

    def plan(self, info: VideoInfo, image: bool = False, counts: tuple[int, int] | None = None) -> FramePlan:
        """Choose frames of a source; a still image is one frame, of high resolution unless `counts` says otherwise."""
        if info.is_image:
            return FramePlan((0,), (counts is None or counts[0] > 0,), 1)
        if image:
            raise VideoError(
                f"{info.source} holds {info.num_frames} frames, but was given as an image.",
                hint="Give it as a video.",
                reason="not_an_image",
                source=info.source,
            )
        return self.sampling.plan(info.times, info.duration, counts)

    def grid(self, height: int, width: int, high: bool) -> Grid:
        """Patch grid of a frame by its role."""
        edge = self.longest_edge if high else min(self.low_res_longest_edge, self.longest_edge)
        return fit_grid(height, width, patch_size=self.patch_size, longest_edge=edge)

    def frame_size(self, height: int, width: int, high: bool) -> tuple[int, int]:
        """Pixels `(height, width)` a frame is resized to."""
        rows, cols = self.grid(height, width, high)
        return rows * self.patch_size, cols * self.patch_size

    @property
    def has_low(self) -> bool:
        """Whether frames may be taken at low resolution: its ceiling is not checked where no option asks for such."""
        return self.low_res_longest_edge % self.patch_size == 0

    def changed(self, options: Mapping[str, Any]) -> FrameOptions:
        """The same with other options of a video, as a `VideoClip` has them."""
        own = {name: getattr(self.sampling, name) for name in SAMPLING_FIELDS}
        window = {name: options.get(name, getattr(self.sampling, name)) for name in WINDOW_FIELDS}
        others = {name: value for name, value in options.items() if name not in (*SAMPLING_FIELDS, *WINDOW_FIELDS)}
        return replace(self, sampling=FrameSampling(**merge_sampling(own, options), **window), **others)


@dataclass(frozen=True)
class Budgets:
    """What one sample may cost.

    Args:
        max_visual_tokens: Tokens of all its frames, `<FRAME>` and `<LINE>` included, borders not.
        max_memory: Bytes of its `pixel_values_videos`, float32.
        context_length: All its tokens, text and visual.
        overflow: `"error"` refuses what does not fit, `"fit"` takes fewer frames, and fewer at high resolution.
        context_name: What the caller calls `context_length`: that, or `max_length` where a text is cut to it.
    """

    max_visual_tokens: int | None = None
    max_memory: int | None = None
    context_length: int | None = None
    overflow: str = "error"
    context_name: str = "context_length"

    def __post_init__(self) -> None:
        for name, unit in (("max_visual_tokens", "tokens"), ("max_memory", "bytes"), ("context_length", "tokens")):
            if getattr(self, name) is not None:
                check_whole(getattr(self, name), name, unit)
        check_choice(self.overflow, "overflow", ("error", "fit"))


def read_budgets(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Budgets:
    """Budgets from options of a call, with the processor's own for those not given.

    Raises:
        ConfigurationError: A value that is none.
    """
    memory = given.get("max_memory")
    return Budgets(
        max_visual_tokens=given.get("max_visual_tokens", defaults.get("max_visual_tokens")),
        max_memory=None if memory is None else parse_bytes(memory, "max_memory"),
        context_length=given.get("context_length"),
        overflow=given.get("overflow", defaults.get("overflow", "error")),
    )


def read_decoding(given: Mapping[str, Any]) -> DecodingOptions:
    """How files are read, from options of a call.

    Raises:
        ConfigurationError: A value of the wrong kind.
    """
    limits, urls, isolate = (given.get(name) for name in ("limits", "allow_urls", "isolate"))
    if limits is not None and not isinstance(limits, DecodingLimits):
        raise ConfigurationError(f"limits is a {type(limits).__name__}; give DecodingLimits(...).")
    if not isinstance(urls, (bool, UrlPolicy, type(None))):
        raise ConfigurationError(f"allow_urls is {urls!r}; give True, False or UrlPolicy(...).")
    check_flag(isolate or False, "isolate")
    return DecodingOptions(
        limits=limits or DecodingLimits(),
        urls=UrlPolicy() if urls is True else urls or None,
        isolate=bool(isolate),
        threads=given.get("threads"),
        on_damage=given.get("on_damage", "warn"),
    )


def merge_sampling(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All fields that say how many frames: what is given replaces any other way to say it."""
    given = {name: given[name] for name in SAMPLING_FIELDS if given.get(name) is not None}
    pair = not given or any(name in given for name in HYBRID_FIELDS)
    kept = {name: base.get(name) for name in (SAMPLING_FIELDS if not given else HYBRID_FIELDS if pair else ())}
    return {**dict.fromkeys(SAMPLING_FIELDS), **kept, **given}


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None.

    Raises:
        ConfigurationError: A name that is no option.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in ElvaVideosKwargs.__annotations__:
            raise ConfigurationError(f"{name!r} is no option of the video processor;{meant(name)}")
    return given


def refuse_fields(names: Iterable[str]) -> None:
    """Refuse what is no field of the processor, with a word on what is an option of a call.

    Raises:
        ConfigurationError: There is such a name.
    """
    for name in names:
        if name in CALL_FIELDS:
            raise ConfigurationError(
                f"{name!r} is an option of a call, neither saved with a processor nor taken from its files: remove it "
                f"there, and pass {name}=... to the processor or the pipeline."
            )
        raise ConfigurationError(f"{name!r} is no option of the video processor;{meant(name)}")


def meant(name: str, known: Iterable[str] = ElvaVideosKwargs.__annotations__) -> str:
    """A guess at what a wrong name should have been, or all that there are."""
    close = difflib.get_close_matches(name, [*known], n=1)
    return f" did you mean {close[0]}?" if close else f" known are {', '.join(known)}."


def check_whole(value: Any, name: str, unit: str) -> None:
    """Refuse what is no whole number from 1 up.

    Raises:
        ConfigurationError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} is {value!r}; it must be a whole number of {unit}, 1 or more.")


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ConfigurationError: It is none.
    """
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; give {' or '.join(map(repr, choices))}.")


def check_flag(value: Any, name: str) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigurationError: It is neither.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}; give True or False.")
