"""The toy teacher: checked against a loop over patches, and for what it must tell apart."""

import numpy as np
import pytest

from elva_hf.data.toy_teacher import NUM_FEATURES, _raw_features, toy_teacher_features
from elva_hf.data.toy_world import render, sample_scene


def describe_one_patch(patch: np.ndarray) -> np.ndarray:
    """The 29 numbers of one `(P, P, 3)` uint8 patch, block by block and pixel by pixel."""
    pixels = patch.astype(np.float64) / 255
    size, block = len(pixels), len(pixels) // 4
    luminance = pixels.mean(-1)
    blocks = [
        luminance[i * block : (i + 1) * block, j * block : (j + 1) * block].mean() for i in range(4) for j in range(4)
    ]
    rows = abs(sum(value * (-1) ** (index // 4) for index, value in enumerate(blocks)))
    columns = abs(sum(value * (-1) ** (index % 4) for index, value in enumerate(blocks)))
    checks = abs(sum(value * (-1) ** (index // 4 + index % 4) for index, value in enumerate(blocks)))
    down = np.mean([abs(luminance[y + 1, x] - luminance[y, x]) for y in range(size - 1) for x in range(size)])
    across = np.mean([abs(luminance[y, x + 1] - luminance[y, x]) for y in range(size) for x in range(size - 1)])
    bars = [rows, columns, checks, down, across, luminance.max(), luminance.min()]
    return np.array([*pixels.mean((0, 1)), *pixels.std((0, 1)), *blocks, *bars])


@pytest.mark.parametrize("size", [8, 16, 32])
def test_features_equal_a_loop_over_pixels(size):
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 32, 3), dtype=np.uint8)
    features = _raw_features(frames, size)
    assert features.shape == (2, 64 // size, 32 // size, NUM_FEATURES)
    for t, row, column in np.ndindex(features.shape[:3]):
        patch = frames[t, row * size : (row + 1) * size, column * size : (column + 1) * size]
        np.testing.assert_allclose(features[t, row, column], describe_one_patch(patch), atol=2e-5)


def test_features_are_standardised_finite_and_the_same_every_time():
    frames = np.concatenate([render(sample_scene(seed, split="validation")) for seed in range(100)])
    features = toy_teacher_features(frames, 16)
    assert features.shape == (800, 4, 4, NUM_FEATURES)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert np.abs(features.mean((0, 1, 2))).max() < 0.3
    assert np.abs(features.std((0, 1, 2)) - 1).max() < 0.3
    np.testing.assert_array_equal(features, toy_teacher_features(frames, 16))


def test_each_texture_lifts_its_own_bar_contrast():
    y, x = np.mgrid[:16, :16] // 4 % 2
    for index, dark in enumerate((y, x, y ^ x)):
        frame = np.repeat((200 - 100 * dark)[None, ..., None], 3, axis=-1).astype(np.uint8)
        contrasts = _raw_features(frame, 16)[0, 0, 0, 22:25]
        assert contrasts[index] == pytest.approx((8 * 200 - 8 * 100) / 255, abs=1e-4)
        assert np.delete(contrasts, index) == pytest.approx(0, abs=1e-4)
