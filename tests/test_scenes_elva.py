"""Frames that stand for scenes: the best segmentation, one typical frame of each part."""

import subprocess
import sys
import time
from fractions import Fraction
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elva_hf import scenes_elva
from elva_hf.frames_elva import spread_high_frames
from elva_hf.scenes_elva import pick_scene_frames, thumbnail


def segment_cost(rows, weight):
    """Sum of squared distances to the mean, and `weight` times the squared length."""
    length = len(rows)
    spread = sum(Fraction(value) ** 2 for row in rows for value in row)
    spread -= sum(Fraction(sum(column)) ** 2 for column in zip(*rows, strict=True)) / length
    return spread + weight * length**2


def best_segmentation(rows, count, noise):
    """Of all segmentations the cheapest, then the most even, the nearest to equal parts, the one cut earliest."""
    total = len(rows)
    weight = 4 * len(rows[0]) * Fraction(noise) ** 2 * Fraction(count, total) ** 2

    def key(inner):
        bounds = (0, *inner, total)
        return (
            sum(segment_cost(rows[a:b], weight) for a, b in pairwise(bounds)),
            sum((b - a) ** 2 for a, b in pairwise(bounds)),
            sum(abs(b - (2 * i * total + count) // (2 * count)) for i, b in enumerate(bounds)),
            bounds[::-1],
        )

    return min(map(key, combinations(range(1, total), count - 1)))[-1][::-1]


def typical_frame(rows, start, end, expected, noise):
    segment = rows[start:end]
    mean = [Fraction(sum(column), len(segment)) for column in zip(*segment, strict=True)]
    distances = [sum((value - m) ** 2 for value, m in zip(row, mean, strict=True)) for row in segment]
    near = min(distances) + len(mean) * Fraction(noise) ** 2
    places = [start + i for i, distance in enumerate(distances) if distance <= near]
    return min(places, key=lambda place: (abs(2 * place - start - end + 1), abs(place - expected)))


def test_the_scenes_of_every_short_black_and_white_video_are_the_best():
    for total in range(2, 9):
        for values in product((0, 1), repeat=total - 1):
            rows = [(value,) for value in (0, *values)]
            for count in range(1, total):
                check_marks(rows, count, noise=0)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 3).flatmap(
        lambda size: st.lists(st.tuples(*[st.integers(0, 4)] * size), min_size=2, max_size=9)
    ),
    data=st.data(),
    noise=st.sampled_from([0, 0.5, 1]),
)
def test_the_scenes_are_the_best_of_all_segmentations(rows, data, noise):
    check_marks(rows, data.draw(st.integers(1, len(rows) - 1)), noise)


def check_marks(rows, count, noise):
    total, bounds = len(rows), best_segmentation(rows, count, noise)
    wanted = {
        typical_frame(rows, a, b, (2 * i + 1) * total // (2 * count), noise)
        for i, (a, b) in enumerate(pairwise(bounds))
    }
    marks = pick_scene_frames(np.array(rows, dtype=float), count, noise=noise)
    assert {place for place, mark in enumerate(marks) if mark} == wanted


def test_a_still_video_is_marked_like_a_uniform_one():
    for total in (*range(1, 30), 64):
        for count in range(total + 1):
            still = np.full((total, 2), 0.1)
            assert pick_scene_frames(still, count) == spread_high_frames(total, count)
            assert pick_scene_frames(still, count, noise=0.0) == spread_high_frames(total, count)


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6])
def test_noise_in_a_still_video_does_not_gather_the_marks(noise):
    draw = np.random.default_rng(0)
    features = draw.uniform(0, 255, 192) + draw.normal(0, noise, (64, 192))
    assert pick_scene_frames(features, 8) == spread_high_frames(64, 8)
    assert pick_scene_frames(features, 8, noise=0.0) != spread_high_frames(64, 8)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), total=st.integers(2, 60), cuts=st.integers(0, 10), more=st.integers(0, 5))
def test_every_scene_between_hard_cuts_has_a_mark(seed, total, cuts, more):
    draw = np.random.default_rng(seed)
    cuts = min(cuts, total - 1)
    count = min(cuts + 1 + more, total)
    scenes = np.searchsorted(np.sort(draw.choice(np.arange(1, total), cuts, replace=False)), np.arange(total), "right")
    features = draw.uniform(0, 255, (cuts + 1, 192))[scenes] + draw.normal(0, 0.3, (total, 192))
    marks = np.array(pick_scene_frames(features, count))
    assert marks.sum() == count and set(scenes[marks]) == set(range(cuts + 1))


def test_a_faint_cut_beside_a_strong_one_has_a_mark():
    features = np.zeros((40, 192))
    features[20:] = 255.0
    features[38:] -= 3.0
    marks = np.flatnonzero(pick_scene_frames(features, 3))
    assert marks.tolist() == [9, 28, 38]


def test_a_slightly_better_cut_wins_over_a_more_even_one():
    levels = np.array([0.0] * 2 + [1000.0] * 4 + [1816.4] * 4)[:, None]
    first, _ = np.flatnonzero(pick_scene_frames(levels, 2, noise=0.0))
    assert first < 2  # 2 * 816.4**2 < 4 / 3 * 1000**2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), lengths=st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_between_hard_cuts_of_still_scenes_the_marks_are_even(seed, lengths):
    draw = np.random.default_rng(seed)
    count = len(lengths) + int(draw.integers(0, 6))
    features = draw.uniform(0, 255, (len(lengths), 192)).repeat(lengths, axis=0)
    simple = np.arange(len(lengths), dtype=float).repeat(lengths)[:, None]
    assert pick_scene_frames(features, count, noise=0.0) == pick_scene_frames(simple, count, noise=0.0)


def test_a_long_scene_is_cut_into_equal_parts_wherever_it_starts():
    features = np.zeros((100, 1))
    features[2:] = 9.0
    marks = np.flatnonzero(pick_scene_frames(features, 10, noise=0.0))
    assert marks.tolist() == [1, 7, 18, 29, 40, 51, 62, 73, 84, 95]  # of 2, eight times 11, and 10 frames


def test_the_frame_of_a_scene_is_a_typical_one():
    features = np.zeros((9, 4))
    features[3:6] = [[0], [200], [0]]  # a flash in the middle of a scene
    (mark,) = np.flatnonzero(pick_scene_frames(features, 1))
    assert mark in (3, 5)


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e9])
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**40])
def test_neither_the_unit_nor_the_origin_of_the_features_matters(offset, scale):
    draw = np.random.default_rng(1)
    features = draw.integers(0, 256, (30, 6)).repeat(2, axis=0).astype(float)
    wanted = pick_scene_frames(features, 7)
    assert pick_scene_frames((features + offset) * scale, 7, noise=scale) == wanted


def test_all_frames_are_marked_where_as_many_are_asked_for_and_none_for_none():
    features = np.eye(3)
    assert pick_scene_frames(features, 3) == pick_scene_frames(features, 9) == [True] * 3
    assert pick_scene_frames(features, 0) == [False] * 3


def test_a_thousand_frames_take_less_than_seconds():
    features = np.random.default_rng(0).normal(size=(1024, 192))
    start = time.process_time()
    assert sum(pick_scene_frames(features, 64)) == 64
    assert time.process_time() - start < 5


def test_a_thumbnail_holds_the_means_of_its_cells():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 29, 50), dtype=np.uint8)
    rows, columns = ([i * side // 8 for i in range(9)] for side in (29, 50))
    wanted = [
        pixels[channel, a:b, c:d].mean()
        for channel in range(3)
        for a, b in pairwise(rows)
        for c, d in pairwise(columns)
    ]
    found = thumbnail(pixels)
    assert found.dtype == np.float32 and found.shape == (192,)
    assert found == pytest.approx(np.array(wanted), abs=1e-4)


def test_a_thumbnail_of_a_tiny_frame_repeats_its_pixels():
    pixels = np.array([[[10, 20], [30, 40]]], dtype=np.uint8)
    wanted = np.array([[10, 20], [30, 40]]).repeat(4, axis=0).repeat(4, axis=1)
    assert thumbnail(pixels).tolist() == wanted.ravel().tolist()


def test_a_bright_frame_does_not_overflow():
    assert set(thumbnail(np.full((3, 2160, 3840), 255, dtype=np.uint8)).tolist()) == {255.0}


def test_choosing_frames_needs_no_torch():
    check = (
        "import sys; sys.modules['torch'] = None; "
        "import importlib.util as u, pathlib, types; root = pathlib.Path(sys.argv[1]); "
        "package = types.ModuleType('elva_hf'); package.__path__ = [str(root)]; sys.modules['elva_hf'] = package; "
        "import elva_hf.frames_elva, elva_hf.scenes_elva, elva_hf.budget_elva; "
        "assert not any(name.split('.')[0] in ('transformers', 'av', 'PIL') for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, Path(scenes_elva.__file__).parent], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
