"""The toy teacher: checked against a loop over patches, and for what it must tell apart."""

import numpy as np
import pytest

from elva_hf.data.toy_teacher import (
    NUM_FEATURES,
    _raw_features,
    busy_patches,
    teacher_features,
    teacher_width,
    toy_teacher_features,
)
from elva_hf.data.toy_world import render, sample_scene
from elva_hf.errors_elva import ConfigurationError

ALL = ("looks", "place", "time")


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


def test_looks_come_first_and_do_not_change():
    frames = render(sample_scene(3))
    features = teacher_features(frames, 16, ALL)
    assert features.shape == (8, 4, 4, teacher_width(ALL)) == (8, 4, 4, 45)
    np.testing.assert_array_equal(features[..., :NUM_FEATURES], toy_teacher_features(frames, 16))
    np.testing.assert_array_equal(features[..., :37], teacher_features(frames, 16, ALL[:2]))


def test_place_says_row_and_column():
    place = teacher_features(render(sample_scene(3)), 16, ALL[:2])[..., NUM_FEATURES:]
    rows, columns = np.mgrid[:4, :4]
    assert (place[..., :4].argmax(-1) == rows).all() and (place[..., 4:].argmax(-1) == columns).all()
    np.testing.assert_allclose(place.sum(-1), 0, atol=1e-5)


def test_time_tells_motion_and_who_came_later_without_labels():
    right = entered = moving = late = 0
    for seed in range(150):
        scene = sample_scene(seed)
        features = teacher_features(render(scene), 16, ALL)
        frame = 6 if scene.flash_frame == 7 else 7
        for thing in scene.objects:
            rows, columns, _, came_later, time = features[(frame, *thing.cells[frame])][-5:] / 4
            assert time == pytest.approx(2 * frame / 7 - 1, abs=1e-6)
            if thing.entry:
                late += 1
                entered += came_later == 1
            else:
                moving += 1
                (y, x), (top, left) = thing.cells[frame], thing.cells[0]
                right += (2 * rows, 2 * columns, came_later) == (y - top, x - left, 0)
    assert moving > 200 and late > 40
    assert right / moving > 0.98
    assert entered / late > 0.98


def test_busy_patches_are_those_of_things():
    for seed in range(20):
        scene = sample_scene(seed)
        busy = busy_patches(teacher_features(render(scene), 16, ALL))
        shown = np.zeros_like(busy)
        for thing in scene.objects:
            for frame in range(thing.entry, 8):
                shown[(frame, *thing.cells[frame])] = frame != scene.flash_frame
        np.testing.assert_array_equal(busy, shown)


@pytest.mark.parametrize("aspects", [(), ("place",), ("looks", "time"), ("looks", "sound")])
def test_unknown_aspects_are_refused(aspects):
    with pytest.raises(ConfigurationError, match="aspects"):
        teacher_width(aspects)


def test_more_than_looks_needs_the_grid_of_the_world():
    with pytest.raises(ConfigurationError, match="2x4"):
        teacher_features(np.zeros((1, 32, 64, 3), np.uint8), 16, ALL)
