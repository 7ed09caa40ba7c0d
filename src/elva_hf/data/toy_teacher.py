"""A hand-made teacher for the toy world: numbers a patch, computed from pixels and never from labels.

Looks: mean and deviation of the colour channels, the luminance of 4x4 blocks, edge energies, the contrast of bars and
checks at block width, and the luminance range. Place: row and column. Time: how far what a patch shows has moved since
the first frame, found by its colours, and whether it was there at all. It hands over what the questions need, so it is
favourable by construction; it stands in for a pretrained encoder in L_MSE (Eq. 2) and proves nothing about one.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from elva_hf.data.toy_world import GRID_SIZE, render, sample_scene
from elva_hf.errors_elva import ConfigurationError

NUM_FEATURES = 29
ASPECTS: dict[str, int] = {"looks": NUM_FEATURES, "place": 2 * GRID_SIZE, "time": 8}
"""What the teacher can know of a patch, and in how many numbers."""

PLACE_SCALE, COLOR_TIME_SCALE, FLOW_SCALE = 3.45, 2.0, 4.0
"""Looks have deviation 1; the few numbers of place and time are louder, to be heard in a cosine beside 29 of those."""

_CONTRAST, _CHROMA, _FLASH, _SAME_COLORS = 40.0, 8.0, 250, 0.15
_BLOCKS = 4
_STANDARD_SCENES = 200
_ALTERNATING = np.array([1, -1, 1, -1], np.float32)


def toy_teacher_features(frames: np.ndarray, patch_size: int) -> np.ndarray:
    """Describe every patch of a video.

    Args:
        frames: `(T, H, W, 3)` uint8, sides multiples of `patch_size`.
        patch_size: Side of a patch, a multiple of 4.

    Returns:
        `(T, rows, columns, 29)` float32, standardised over the patches of a fixed set of training scenes.
    """
    mean, deviation = _standard(patch_size)
    return (_raw_features(frames, patch_size) - mean) / deviation


def teacher_width(aspects: Sequence[str] = ("looks",)) -> int:
    """Numbers a patch that `teacher_features` gives.

    Raises:
        ConfigurationError: An aspect is unknown, or looks are not the first.
    """
    if list(aspects) not in (list(ASPECTS)[: n + 1] for n in range(len(ASPECTS))):
        raise ConfigurationError(f"aspects={list(aspects)}: expected the first one, two or three of {list(ASPECTS)}.")
    return sum(ASPECTS[aspect] for aspect in aspects)


def teacher_features(frames: np.ndarray, patch_size: int, aspects: Sequence[str] = ("looks",)) -> np.ndarray:
    """Describe every patch of a video of the world by its looks, its place and what became of it.

    Args:
        frames: `(T, 64, 64, 3)` uint8.
        patch_size: Side of a patch; 16 for more than looks.
        aspects: `["looks"]`, `["looks", "place"]` or `["looks", "place", "time"]`.

    Returns:
        `(T, rows, columns, teacher_width(aspects))` float32.

    Raises:
        ConfigurationError: As in `teacher_width`, or the video has no 4x4 patches and more than looks is asked for.
    """
    teacher_width(aspects)
    looks = toy_teacher_features(frames, patch_size)
    if len(aspects) > 1 and looks.shape[1:3] != (GRID_SIZE, GRID_SIZE):
        raise ConfigurationError(
            f"{looks.shape[1]}x{looks.shape[2]} patches: place and time are known of {GRID_SIZE}x{GRID_SIZE} only."
        )
    parts = {"place": _place_features, "time": _time_features}
    return np.concatenate([looks, *(parts[aspect](frames, looks) for aspect in aspects[1:])], -1)


def busy_patches(features: np.ndarray) -> np.ndarray:
    """`(T, 4, 4)` bool of features with time `(T, 4, 4, 45)`: where something coloured is seen."""
    return np.abs(features[..., -5:]).sum(-1) > 0


def _place_features(frames: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """`(T, 4, 4, 8)`: row and column, one-hot around 0."""
    known = PLACE_SCALE * (np.eye(GRID_SIZE, dtype=np.float32) - 1 / GRID_SIZE)
    rows = np.broadcast_to(known[None, :, None], (*looks.shape[:3], GRID_SIZE))
    columns = np.broadcast_to(known[None, None], (*looks.shape[:3], GRID_SIZE))
    return np.concatenate([rows, columns], -1)


def _time_features(frames: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """`(T, 4, 4, 8)`: mean colour times time (3); rows and columns moved, moved at all, entered later, time (5).

    Time runs from -1 to 1. The last five are of patches that show a colour, 0 elsewhere; where in the first frame a
    thing was is found by the nearest mean and deviation of colour.
    """
    t = len(frames)
    time = np.linspace(-1, 1, t, dtype=np.float32) if t > 1 else np.zeros(1, np.float32)
    flow = np.zeros((*looks.shape[:3], 5), np.float32)
    busy, first = _busy(frames)
    start = np.argwhere(busy[first])
    colors = looks[..., :6]
    for frame, row, column in np.argwhere(busy):
        flow[frame, row, column, 4] = time[frame] if t > 1 else -1
        gaps = [((colors[frame, row, column] - colors[first, y, x]) ** 2).mean() for y, x in start]
        if not gaps or min(gaps) > _SAME_COLORS:
            flow[frame, row, column, 3] = 1
            continue
        y, x = start[int(np.argmin(gaps))]
        flow[frame, row, column, :3] = (row - y) / 2, (column - x) / 2, (row, column) != (y, x)
    timed = COLOR_TIME_SCALE * time[:, None, None, None] * looks[..., :3]
    return np.concatenate([timed, FLOW_SCALE * flow], -1).astype(np.float32)


def _busy(frames: np.ndarray) -> tuple[np.ndarray, int]:
    """`(T, 4, 4)` bool, where a patch shows a colour, and the first frame that does not flash."""
    t, size = len(frames), frames.shape[1] // GRID_SIZE
    cells = frames[:, 1::2, 1::2].reshape(t, GRID_SIZE, size // 2, GRID_SIZE, size // 2, 3).swapaxes(2, 3)
    contrast = cells.astype(np.float32).std((-3, -2)).sum(-1)
    chroma = (cells.max(-1) - cells.min(-1)).mean((-2, -1))  # digits are grey
    flash = cells.reshape(t, -1).min(1) > _FLASH
    return (contrast > _CONTRAST) & (chroma > _CHROMA) & ~flash[:, None, None], int(np.argmin(flash))


def _raw_features(frames: np.ndarray, patch_size: int) -> np.ndarray:
    t, height, width, _ = frames.shape
    rows, columns, block = height // patch_size, width // patch_size, patch_size // _BLOCKS
    patches = frames.reshape(t, rows, patch_size, columns, patch_size, 3).swapaxes(2, 3).astype(np.float32) / 255
    luminance = patches.mean(-1)  # (T, rows, columns, P, P)
    blocks = luminance.reshape(t, rows, columns, _BLOCKS, block, _BLOCKS, block).mean((4, 6))
    bars = np.einsum("...ij,i->...", blocks, _ALTERNATING), np.einsum("...ij,j->...", blocks, _ALTERNATING)
    checks = np.einsum("...ij,i,j->...", blocks, _ALTERNATING, _ALTERNATING)
    edges = [np.abs(np.diff(luminance, axis=axis)).mean((-2, -1)) for axis in (-2, -1)]
    extremes = [luminance.max((-2, -1)), luminance.min((-2, -1))]
    scalars = np.stack([*np.abs(bars), np.abs(checks), *edges, *extremes], -1)
    looks = [patches.mean((-3, -2)), patches.std((-3, -2))]
    return np.concatenate([*looks, blocks.reshape(t, rows, columns, -1), scalars], -1)


@lru_cache(maxsize=4)
def _standard(patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each feature, `(29,)`, over the first training scenes."""
    scenes = [_raw_features(render(sample_scene(seed)), patch_size) for seed in range(_STANDARD_SCENES)]
    features = np.concatenate(scenes).reshape(-1, NUM_FEATURES)
    return features.mean(0), features.std(0) + 1e-3
