"""Which frames of a video are used and at which resolution; the patch grid and token count of a frame.

Plain numbers in, plain numbers out (section 4 and Tables 5 and 6 of the paper give the resolutions).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from .errors_elva import ConfigurationError, VideoError
from .layout_elva import FrameLayout

TIME_TOLERANCE = 1e-3  # seconds; matroska rounds to milliseconds, and containers must agree on a frame
MAX_FPS = 10**6  # keeps counts of frames finite
FULL_LAYOUT = FrameLayout()
NUM_BORDER_TOKENS = 2  # the start and the end of a video; they count as text in the paper's token tables


class Grid(NamedTuple):
    """Rows and columns of patches of one frame."""

    rows: int
    cols: int


def fit_grid(height: int, width: int, *, patch_size: int, longest_edge: int) -> Grid:
    """Choose the patch grid of a frame: aspect kept, sides rounded to the patch size, never more than the ceiling.

    Args:
        height: Pixels of the source.
        width: Pixels of the source.
        patch_size: Side of a patch in pixels.
        longest_edge: Most pixels the longer side may have, a multiple of `patch_size`. A smaller frame keeps its size
            but for rounding; a side shorter than a patch gets one patch.

    Returns:
        The grid; the frame is resized to `(rows * patch_size, cols * patch_size)`.

    Example:
        >>> fit_grid(720, 1280, patch_size=28, longest_edge=672)
        Grid(rows=14, cols=24)
    """
    check_edge(longest_edge, patch_size)
    if height < 1 or width < 1:
        raise ConfigurationError(f"a frame of {height}x{width} pixels has no grid; both sides must be at least 1.")
    limit = max(height, width, longest_edge)
    rows, cols = (max(1, _round_ratio(side * longest_edge, limit * patch_size)) for side in (height, width))
    return Grid(rows, cols)


def count_frame_tokens(grid: tuple[int, int], layout: FrameLayout = FULL_LAYOUT) -> int:
    """Tokens of a frame: `<FRAME>`, then rows of patches, each closed by `<LINE>` (section 3.1).

    Example:
        >>> [count_frame_tokens((side // 28, side // 28)) for side in (672, 448, 336, 224, 168)]
        [601, 273, 157, 73, 43]
    """
    return layout.count(grid)


def count_video_tokens(
    grids: Iterable[tuple[int, int]], *, borders: bool = True, layout: FrameLayout = FULL_LAYOUT
) -> int:
    """Tokens of a video with frames of these grids; the paper's tables leave the two borders out."""
    return sum(tokens_per_frame(grids, layout)) + (NUM_BORDER_TOKENS if borders else 0)


def tokens_per_frame(grids: Iterable[tuple[int, int]], layout: FrameLayout = FULL_LAYOUT) -> tuple[int, ...]:
    """Tokens of each frame, or of each chunk of frames where the layout has such."""
    return tuple(layout.count(grid) for grid in tuple(grids)[:: layout.chunk_size])


def check_edge(longest_edge: int, patch_size: int, *, name: str = "longest_edge") -> None:
    """Refuse a ceiling that no whole number of patches fills.

    Raises:
        ConfigurationError: `longest_edge` is not a positive multiple of `patch_size`.
    """
    if patch_size < 1:
        raise ConfigurationError(f"patch_size is {patch_size}; it must be at least 1.")
    if longest_edge < patch_size or longest_edge % patch_size:
        nearest = max(1, _round_ratio(longest_edge, patch_size)) * patch_size
        raise ConfigurationError(
            f"{name} is {longest_edge}; it must be a multiple of patch_size {patch_size}, for example {nearest}."
        )


@dataclass(frozen=True)
class FramePlan:
    """The frames to use, in time order.

    Args:
        indices: Frame numbers, strictly increasing.
        high: Per frame, True for high resolution.
        num_asked: How many frames the options asked for; more than `len(indices)` when the video is shorter, when
            several times fall on one frame, or when a budget allows fewer.
    """

    indices: tuple[int, ...]
    high: tuple[bool, ...]
    num_asked: int

    def __len__(self) -> int:
        return len(self.indices)


class _Window(NamedTuple):
    """`[start, end)` of a video in seconds, and the numbers of the frames on screen in it; at least one."""

    start: float
    end: float
    frames: range


@dataclass(frozen=True)
class FrameSampling:
    """Which frames to take: high and low counts, or `num_frames`, or `fps`, or `frame_times`, or none: every frame.

    Args:
        num_high_res_frames: Frames at high resolution.
        num_low_res_frames: Frames at low resolution.
        num_frames: Frames, all at high resolution.
        fps: Frames per second of video, all at high resolution.
        frame_times: Seconds from the first frame, in any order: the frames on screen then, all at high resolution.
        video_start: Seconds from the first frame; nothing shown only before it is taken.
        video_end: Seconds from the first frame; nothing shown from then on is taken. Beyond the video, its end.
    """

    num_high_res_frames: int | None = None
    num_low_res_frames: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    frame_times: tuple[float, ...] | None = None
    video_start: float | None = None
    video_end: float | None = None

    def __post_init__(self) -> None:
        if sum([self._hybrid, self.num_frames is not None, self.fps is not None, self.frame_times is not None]) > 1:
            raise ConfigurationError(
                f"num_high_res_frames={self.num_high_res_frames}, num_low_res_frames={self.num_low_res_frames}, "
                f"num_frames={self.num_frames}, fps={self.fps} and frame_times={self.frame_times} exclude each other; "
                "give the high/low pair, or num_frames, or fps, or frame_times."
            )
        for name in ("num_high_res_frames", "num_low_res_frames", "num_frames"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ConfigurationError(f"{name} is {value!r}; it must be a whole number of frames, 0 or more.")
        if self.num_frames == 0 or (self._hybrid and not self.num_high + self.num_low):
            raise ConfigurationError("0 frames asked for; ask for at least one.")
        if self.fps is not None and not (_is_finite(self.fps) and 0 < self.fps <= MAX_FPS):
            raise ConfigurationError(
                f"fps is {self.fps!r}; it must be a positive number of frames per second, at most {MAX_FPS}."
            )
        if self.frame_times is not None:
            object.__setattr__(self, "frame_times", _check_times(self.frame_times))
        _check_window(self.video_start, self.video_end)

    @property
    def num_high(self) -> int:
        """High-resolution frames of the pair."""
        return self.num_high_res_frames or 0

    @property
    def num_low(self) -> int:
        """Low-resolution frames of the pair."""
        return self.num_low_res_frames or 0

    @property
    def _hybrid(self) -> bool:
        return self.num_high_res_frames is not None or self.num_low_res_frames is not None

    def plan(self, times: Sequence[float], duration: float | None, counts: tuple[int, int] | None = None) -> FramePlan:
        """Choose frames of a video.

        Args:
            times: Start of each frame, increasing, in seconds (or any unit, without `duration` and `fps`).
            duration: End of the last frame, in the same unit; None where `times` just count the frames.
            counts: High- and low-resolution frames to take instead, no more in all than asked for: what a budget
                allows. They spread evenly over the window, or over the frames at `frame_times`.

        Raises:
            VideoError: A time or a window that the video does not have, or a video without times.
            ConfigurationError: `fps` of a video without times, or `counts` that are no reduction.

        Example:
            >>> FrameSampling(num_frames=4, video_start=2.0, video_end=4.0).plan(range(10), 10.0)
            FramePlan(indices=(2, 3), high=(True, True), num_asked=4)
        """
        window = self._window(times, duration)
        asked = self._count(window, duration)
        if counts is not None:
            _check_reduction(counts, asked)
        allowed = asked if counts is None else sum(counts)
        shown = times[window.frames.start : window.frames.stop]
        if self.frame_times is None:
            count = min(allowed, len(window.frames))
            places = nearest_frames(uniform_moments(count, window.end - window.start, window.start), shown)
        else:
            places = self._places_at_times(shown, window)
            places = _thin_out(places, min(allowed, len(places)))
        num_high = counts[0] if counts is not None else self.num_high if self._hybrid else len(places)
        high = spread_high_frames(len(places), min(num_high, len(places)))
        return FramePlan(tuple(window.frames.start + place for place in places), tuple(high), asked)

    def _window(self, times: Sequence[float], duration: float | None) -> _Window:
        named = [name for name in ("frame_times", "video_start", "video_end") if getattr(self, name) is not None]
        if duration is None and named:
            raise VideoError(
                f"{' and '.join(named)} need a video with known times, and arrays have none;",
                hint='use num_frames, or give video_metadata={"fps": ...} with the arrays.',
                reason="bad_time",
            )
        start, end = self.video_start or 0.0, float(len(times)) if duration is None else duration
        if self.video_start is None and self.video_end is None:
            return _Window(start, end, range(len(times)))
        if start >= end:
            raise VideoError(
                f"video_start is {start:.10g} s, and the video ends at {end:.10g} s;",
                hint="choose an earlier start.",
                reason="bad_time",
            )
        end = end if self.video_end is None else min(end, self.video_end)
        first = _frame_on_screen(times, start)
        return _Window(start, end, range(first, max(first + 1, bisect_left(times, end - TIME_TOLERANCE))))

    def _count(self, window: _Window, duration: float | None) -> int:
        if self.frame_times is not None:
            return len(self.frame_times)
        if self.num_frames is not None:
            return self.num_frames
        if self.fps is not None:
            if duration is None:
                raise ConfigurationError(
                    f"fps={self.fps} needs a video with known times, and arrays have none; use num_frames, or give "
                    'video_metadata={"fps": ...} with the arrays.'
                )
            return max(1, int((window.end - window.start) * self.fps + 0.5))
        return self.num_high + self.num_low or len(window.frames)

    def _places_at_times(self, shown: Sequence[float], window: _Window) -> list[int]:
        """Places among the window's frames, in order, each once."""
        for time in self.frame_times or ():
            if not window.start <= time < window.end:
                raise VideoError(
                    f"frame_times holds {time:.10g} s, outside the {window.start:.10g} to {window.end:.10g} s that the "
                    "video, or the part of it asked for, spans;",
                    hint="leave that time out.",
                    reason="bad_time",
                )
        return sorted({_frame_on_screen(shown, time) for time in self.frame_times or ()})


def uniform_moments(count: int, duration: float, start: float = 0.0) -> list[float]:
    """Middles of `count` equal parts of `[start, start + duration)`, in seconds.

    Example:
        >>> uniform_moments(4, 8.0)
        [1.0, 3.0, 5.0, 7.0]
    """
    return [start + (i + 0.5) * duration / count for i in range(count)]


def nearest_frames(moments: Sequence[float], times: Sequence[float]) -> list[int]:
    """The frame on screen at each moment, each frame once; where two moments meet, the next free frame.

    Args:
        moments: Increasing, at most as many as `times`.
        times: Start of each frame, increasing.

    Returns:
        Strictly increasing frame numbers, one per moment.

    Example:
        >>> nearest_frames([1.0, 2.0, 3.0], [0.0, 0.1, 2.5, 2.6])
        [1, 2, 3]
    """
    chosen: list[int] = []
    for place, moment in enumerate(moments):
        last = len(times) - len(moments) + place  # leaves a frame for every later moment
        shown = _frame_on_screen(times, moment)
        chosen.append(min(max(shown, chosen[-1] + 1 if chosen else 0), last))
    return chosen


def spread_high_frames(count: int, num_high: int) -> list[bool]:
    """Mark `num_high` of `count` frames, uniform in time: those at floor((i + .5) * count / num_high).

    Example:
        >>> spread_high_frames(6, 2)
        [False, True, False, False, True, False]
    """
    high = {(2 * i + 1) * count // (2 * num_high) for i in range(num_high)}
    return [place in high for place in range(count)]


def _thin_out(places: list[int], count: int) -> list[int]:
    return [place for place, kept in zip(places, spread_high_frames(len(places), count), strict=True) if kept]


def _frame_on_screen(times: Sequence[float], moment: float) -> int:
    return max(0, bisect_right(times, moment + TIME_TOLERANCE) - 1)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_reduction(counts: tuple[int, int], asked: int) -> None:
    if len(counts) != 2 or not all(_is_count(count) for count in counts) or not 1 <= sum(counts) <= asked:
        raise ConfigurationError(
            f"counts is {counts}; it must be (high, low), together at least 1 and at most the {asked} frames asked for."
        )


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def _check_times(times: object) -> tuple[float, ...]:
    if isinstance(times, Iterable) and not isinstance(times, (str, bytes)):
        listed = tuple(times)
        if listed and all(_is_finite(time) for time in listed):
            return tuple(float(time) for time in listed)
    raise ConfigurationError(f"frame_times is {times!r}; it must be one or more numbers of seconds.")


def _check_window(start: float | None, end: float | None) -> None:
    for name, value in (("video_start", start), ("video_end", end)):
        if value is not None and (not _is_finite(value) or value < 0):
            raise ConfigurationError(f"{name} is {value!r}; it must be a number of seconds, 0 or more.")
    if end is not None and (start or 0.0) >= end:
        raise ConfigurationError(
            f"video_start={start} and video_end={end} leave nothing between them; the end must be after the start."
        )


def _round_ratio(numerator: int, denominator: int) -> int:
    """Round half up, in whole numbers."""
    return (2 * numerator + denominator) // (2 * denominator)
