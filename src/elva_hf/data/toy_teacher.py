"""A hand-made teacher for the toy world: 29 numbers a patch, computed from pixels and never from labels.

Mean and deviation of the colour channels, the luminance of 4x4 blocks, edge energies, the contrast of bars and checks
at block width, and the luminance range. It hands over what the questions about looks need, so it is favourable by
construction; it stands in for a pretrained encoder in L_MSE (Eq. 2) and proves nothing about one.
"""

from functools import lru_cache

import numpy as np

from elva_hf.data.toy_world import render, sample_scene

NUM_FEATURES = 29
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
