"""Which frames stand for the scenes of a video: cut it where it changes, take the most typical frame of each part.

The frames are compared by one vector of features each, here a thumbnail. Letters: `T` frames, `D` features.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

THUMBNAIL_SIDE = 8

_EXACT = 2.0**50  # float64 holds whole numbers eight times as large
_ROUNDING = 1 + 1e-12  # sums this close are equal but for rounding


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Means of the cells of an 8x8 grid over a frame.

    Args:
        pixels: `(C, h, w)` uint8, or a CPU tensor; along a side shorter than 8, cells share pixels.

    Returns:
        `(C * 64,)` float32, channel first, 0 to 255.
    """
    cells = np.asarray(pixels)
    for axis in (1, 2):
        edges = np.arange(THUMBNAIL_SIDE + 1) * cells.shape[axis] // THUMBNAIL_SIDE
        sums = np.add.reduceat(cells, edges[:-1], axis=axis, dtype=np.float64)
        lengths = np.maximum(np.diff(edges), 1)
        cells = sums / (lengths[:, None] if axis == 1 else lengths)
    return cells.astype(np.float32).ravel()


def pick_scene_frames(features: np.ndarray, count: int, *, noise: float = 1.0) -> list[bool]:
    """Mark `count` frames, one in each of `count` scenes.

    The scenes are the runs of frames with the least sum of squared distances to their means, found exactly; of equally
    good ones those of most equal length. A scene's frame is the one nearest to its mean; of equally near ones the
    middle one. A still video is marked as `spread_high_frames` does.

    Args:
        features: `(T, D)` finite numbers, one row per frame, rounded here to about one part in 4000 of their range.
        count: Frames to mark; all `T` if it is more.
        noise: Change per feature, in their unit, too small to mean anything: a scene half longer or shorter than
            `T / count` must explain more than that change in one frame, and frames this near are equally near.

    Returns:
        Per frame, True where marked.

    Example:
        >>> pick_scene_frames(np.array([[0.0], [0.0], [0.0], [9.0], [9.0], [9.0], [9.0], [9.0]]), 2)
        [False, True, False, False, False, True, False, False]
    """
    num_frames, size = features.shape
    if count < 1 or count >= num_frames:
        return [count >= num_frames] * num_frames
    levels, scale = _whole_levels(np.asarray(features, dtype=np.float64))
    meaningless = size * (noise * scale) ** 2
    bounds = _best_bounds(_segment_costs(levels, 4 * meaningless * (count / num_frames) ** 2), count)
    chosen = {
        _typical_frame(levels[start:end], (2 * scene + 1) * num_frames // (2 * count) - start, meaningless) + start
        for scene, (start, end) in enumerate(pairwise(bounds))
    }
    return [place in chosen for place in range(num_frames)]


def _whole_levels(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Features times a scale as whole numbers from 0, as large as the sums below stay exact."""
    shifted = features - features.min(axis=0)
    largest = shifted.max(initial=0.0)
    if not largest:
        return shifted, 1.0
    limit = np.sqrt(_EXACT / features.shape[1]) / len(features)
    scale = 2.0 ** np.floor(np.log2(limit / largest))
    return np.rint(shifted * scale), float(scale)


def _segment_costs(levels: np.ndarray, per_squared_length: float) -> np.ndarray:
    """`(T + 1, T + 1)` cost of frames `[start, end)`, infinite unless start < end.

    The sum of squared distances to their mean, and `per_squared_length` times the squared length.
    """
    sums = np.concatenate([np.zeros((1, levels.shape[1])), levels.cumsum(axis=0)])
    squares = np.concatenate([[0.0], (levels**2).sum(axis=1).cumsum()])
    products = sums @ sums.T
    norms = products.diagonal()
    lengths = _lengths(len(levels))
    spread = lengths * (squares - squares[:, None]) - (norms + norms[:, None] - 2 * products)
    costs = spread / np.maximum(lengths, 1) + per_squared_length * lengths**2
    return np.where(lengths > 0, costs, np.inf)


def _best_bounds(costs: np.ndarray, count: int) -> list[int]:
    """Starts of the `count` cheapest segments, and the end of the last, by dynamic programming over their ends.

    Of equal costs the least sum of squared lengths wins, then the bounds nearest to those of equal parts, then the
    earliest last ones.
    """
    num_frames = len(costs) - 1
    spare = num_frames - count + 1  # places for the end of each segment, one frame being left to each later one
    unevenness = _lengths(num_frames) ** 2 * (count * num_frames + 1)  # outweighs all distances of bounds
    best, uneven = np.full(spare, np.inf), np.zeros(spare, dtype=np.int64)
    best[0] = 0.0
    came_from = []
    for segment in range(count):
        window = slice(segment, segment + spare), slice(segment + 1, segment + 1 + spare)
        totals = best[:, None] + costs[window]
        best = totals.min(axis=0)
        tied = np.where(totals <= best * _ROUNDING, uneven[:, None] + unevenness[window], np.iinfo(np.int64).max)
        equal_part = (2 * (segment + 1) * num_frames + count) // (2 * count)  # rounded half up
        uneven = tied.min(axis=0) + abs(np.arange(window[1].start, window[1].stop) - equal_part)
        came_from.append(tied.argmin(axis=0) + segment)
    bounds = [num_frames]
    for segment in reversed(range(count)):
        bounds.append(int(came_from[segment][bounds[-1] - segment - 1]))
    return bounds[::-1]


def _typical_frame(levels: np.ndarray, expected: int, meaningless: float) -> int:
    """The row nearest to the mean, then to the middle, then to `expected`."""
    length = len(levels)
    distances = ((length * levels - levels.sum(axis=0)) ** 2).sum(axis=1)  # length**2 times those to the mean
    nearest = np.flatnonzero(distances <= distances.min() + length**2 * meaningless)
    return int(min(nearest, key=lambda row: (abs(2 * row - length + 1), abs(row - expected))))


def _lengths(num_frames: int) -> np.ndarray:
    """`(T + 1, T + 1)` length of frames `[start, end)`."""
    ends = np.arange(num_frames + 1)
    return ends - ends[:, None]
