"""Which frames of a video are used and at which resolution; the patch grid and token count of a frame.

Plain numbers in, plain numbers out (section 4 and Tables 5 and 6 of the paper give the resolutions).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors_elva import ConfigurationError

TIME_TOLERANCE = 1e-3  # seconds; matroska rounds to milliseconds, and containers must agree on a frame
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


def count_frame_tokens(grid: tuple[int, int]) -> int:
    """Tokens of a frame: `<FRAME>`, then rows of patches, each closed by `<LINE>` (section 3.1).

    Example:
        >>> [count_frame_tokens((side // 28, side // 28)) for side in (672, 448, 336, 224, 168)]
        [601, 273, 157, 73, 43]
    """
    rows, cols = grid
    return 1 + rows * (cols + 1)


def count_video_tokens(grids: Iterable[tuple[int, int]], *, borders: bool = True) -> int:
    """Tokens of a video with frames of these grids; the paper's tables leave the two borders out."""
    return sum(count_frame_tokens(grid) for grid in grids) + (NUM_BORDER_TOKENS if borders else 0)


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
        num_asked: How many frames the options asked for; more than `len(indices)` when the video is shorter.
    """

    indices: tuple[int, ...]
    high: tuple[bool, ...]
    num_asked: int

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class FrameSampling:
    """How many frames to take. Either high and low counts, or `num_frames`, or `fps`, or none: every frame.

    Args:
        num_high_res_frames: Frames at high resolution.
        num_low_res_frames: Frames at low resolution.
        num_frames: Frames, all at high resolution.
        fps: Frames per second of video, all at high resolution.
    """

    num_high_res_frames: int | None = None
    num_low_res_frames: int | None = None
    num_frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        hybrid = self.num_high_res_frames is not None or self.num_low_res_frames is not None
        chosen = [hybrid, self.num_frames is not None, self.fps is not None]
        if sum(chosen) > 1:
            raise ConfigurationError(
                f"num_high_res_frames={self.num_high_res_frames}, num_low_res_frames={self.num_low_res_frames}, "
                f"num_frames={self.num_frames} and fps={self.fps} exclude each other; give the high/low pair, or "
                "num_frames, or fps."
            )
        for name in ("num_high_res_frames", "num_low_res_frames", "num_frames"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigurationError(f"{name} is {value!r}; it must be a whole number of frames, 0 or more.")
        if self.num_frames == 0 or (hybrid and not self.num_high + self.num_low):
            raise ConfigurationError("0 frames asked for; ask for at least one.")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ConfigurationError(f"fps is {self.fps!r}; it must be a positive number of frames per second.")

    @property
    def num_high(self) -> int:
        """High-resolution frames of the pair."""
        return self.num_high_res_frames or 0

    @property
    def num_low(self) -> int:
        """Low-resolution frames of the pair."""
        return self.num_low_res_frames or 0

    def plan(self, times: Sequence[float], duration: float | None) -> FramePlan:
        """Choose frames of a video.

        Args:
            times: Start of each frame, increasing, in seconds (or any unit, without `duration` and `fps`).
            duration: End of the last frame, in the same unit; None where `times` just count the frames.
        """
        end = float(len(times)) if duration is None else duration
        asked = self._count(len(times), duration)
        indices = nearest_frames(uniform_moments(min(asked, len(times)), end), times)
        hybrid = self.num_high_res_frames is not None or self.num_low_res_frames is not None
        high = spread_high_frames(len(indices), min(self.num_high, len(indices)) if hybrid else len(indices))
        return FramePlan(tuple(indices), tuple(high), asked)

    def _count(self, available: int, duration: float | None) -> int:
        if self.num_frames is not None:
            return self.num_frames
        if self.fps is not None:
            if duration is None:
                raise ConfigurationError(
                    f"fps={self.fps} needs a video with known times, and arrays have none; use num_frames, or give "
                    'video_metadata={"fps": ...} with the arrays.'
                )
            return max(1, int(duration * self.fps + 0.5))
        return self.num_high + self.num_low or available


def uniform_moments(count: int, duration: float) -> list[float]:
    """Middles of `count` equal parts of `[0, duration)`, in seconds.

    Example:
        >>> uniform_moments(4, 8.0)
        [1.0, 3.0, 5.0, 7.0]
    """
    return [(i + 0.5) * duration / count for i in range(count)]


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
        shown = max(0, bisect_right(times, moment + TIME_TOLERANCE) - 1)
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


def _round_ratio(numerator: int, denominator: int) -> int:
    """Round half up, in whole numbers."""
    return (2 * numerator + denominator) // (2 * denominator)
