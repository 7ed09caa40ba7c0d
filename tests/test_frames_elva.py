"""Frame choice, grids and token counts (section 4, Tables 5 and 6)."""

import math
import random
from fractions import Fraction

import pytest

from elva_hf.errors_elva import ConfigurationError
from elva_hf.frames_elva import (
    FrameSampling,
    Grid,
    count_frame_tokens,
    count_video_tokens,
    fit_grid,
    nearest_frames,
    spread_high_frames,
    uniform_moments,
)


@pytest.mark.parametrize(("side", "tokens"), [(672, 601), (448, 273), (336, 157), (224, 73), (168, 43)])
def test_a_square_frame_has_the_papers_tokens(side, tokens):
    assert count_frame_tokens(fit_grid(side, side, patch_size=28, longest_edge=672)) == tokens
    assert count_frame_tokens(fit_grid(2000, 2000, patch_size=28, longest_edge=side)) == tokens


def test_a_video_counts_its_borders_as_text():
    grids = [Grid(2, 3), Grid(1, 1)]
    assert count_video_tokens(grids) == 2 + (1 + 2 * 4) + (1 + 2)
    assert count_video_tokens(grids, borders=False) == count_video_tokens(grids) - 2


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        (720, 1280, (14, 24)),  # 378 of 672 is 13.5 patches: up
        (1280, 720, (24, 14)),
        (300, 300, (11, 11)),  # 10.7: rounding may add less than half a patch
        (28, 28, (1, 1)),
        (3, 5, (1, 1)),
        (10, 4000, (1, 24)),
        (41, 43, (1, 2)),
        (672, 673, (24, 24)),
    ],
)
def test_a_grid_keeps_the_aspect_and_stays_below_the_ceiling(height, width, grid):
    assert fit_grid(height, width, patch_size=28, longest_edge=672) == grid


def test_a_grid_never_exceeds_the_ceiling_nor_enlarges_and_rounds_to_the_nearest():
    draw = random.Random(0)
    for _ in range(2000):
        height, width, patch = draw.randint(1, 5000), draw.randint(1, 5000), draw.choice([4, 14, 16, 28])
        edge = patch * draw.randint(1, 60)
        grid = fit_grid(height, width, patch_size=patch, longest_edge=edge)
        scale = min(Fraction(1), Fraction(edge, max(height, width)))
        wanted = [max(1, math.floor(side * scale / patch + Fraction(1, 2))) for side in (height, width)]
        assert list(grid) == wanted
        assert max(grid) * patch <= edge
        assert all(
            rows * patch < side + patch / 2 + 1 or rows == 1 for rows, side in zip(grid, (height, width), strict=True)
        )


@pytest.mark.parametrize("edge", [0, 14, 670, -28])
def test_a_ceiling_that_patches_do_not_fill_is_refused(edge):
    with pytest.raises(ConfigurationError, match="multiple of patch_size 28"):
        fit_grid(100, 100, patch_size=28, longest_edge=edge)


def test_a_frame_without_pixels_is_refused():
    with pytest.raises(ConfigurationError, match="0x5"):
        fit_grid(0, 5, patch_size=28, longest_edge=672)


def test_high_frames_stand_at_the_stated_places():
    for count in range(1, 70):
        for high in range(count + 1):
            wanted = {math.floor(Fraction(2 * i + 1, 2) * count / high) for i in range(high)} if high else set()
            marks = spread_high_frames(count, high)
            assert {i for i, mark in enumerate(marks) if mark} == wanted
            assert len(marks) == count and sum(marks) == high


def test_moments_are_the_middles_of_equal_parts():
    assert uniform_moments(2, 10.0) == [2.5, 7.5]
    assert uniform_moments(1, 3.0) == [1.5]


def times(count, rate=25.0):
    return [i / rate for i in range(count)]


def test_a_constant_rate_gives_the_frame_on_screen_at_each_moment():
    for count in (1, 7, 30, 31):
        for asked in range(1, count + 1):
            plan = FrameSampling(num_frames=asked).plan(times(count), count / 25)
            places = [Fraction(2 * i + 1, 2 * asked) * count + 25 * Fraction(1, 1000) for i in range(asked)]
            assert plan.indices == tuple(math.floor(place) for place in places)
            assert all(plan.high) and plan.num_asked == asked


def test_sampling_is_by_time_not_by_frame_number():
    slow_then_fast = [0.0, 1.0, 2.0, 3.0] + [4 + i / 100 for i in range(100)]
    assert FrameSampling(num_frames=5).plan(slow_then_fast, 5.0).indices == (0, 1, 2, 3, 53 + 1)


def test_frames_are_distinct_and_increasing_whatever_the_times():
    draw = random.Random(1)
    for _ in range(300):
        starts = sorted({draw.choice([draw.random(), 5 + draw.random() / 10]) for _ in range(draw.randint(1, 40))})
        asked = draw.randint(1, len(starts))
        chosen = nearest_frames(uniform_moments(asked, 6.0), starts)
        assert len(chosen) == asked == len(set(chosen)) and chosen == sorted(chosen)
        assert chosen[0] >= 0 and chosen[-1] < len(starts)


def test_a_short_video_gives_every_frame_once_and_keeps_the_high_ones():
    plan = FrameSampling(num_high_res_frames=4, num_low_res_frames=60).plan(times(10), 0.4)
    assert plan.indices == tuple(range(10)) and sum(plan.high) == 4 and plan.num_asked == 64
    plan = FrameSampling(num_high_res_frames=16, num_low_res_frames=16).plan(times(10), 0.4)
    assert plan.indices == tuple(range(10)) and all(plan.high)


def test_all_low_is_possible():
    plan = FrameSampling(num_high_res_frames=0, num_low_res_frames=3).plan(times(9), 9 / 25)
    assert plan.high == (False, False, False)


@pytest.mark.parametrize(("fps", "asked"), [(1, 10), (2.5, 25), (0.01, 1), (100, 1000)])
def test_fps_counts_frames_over_the_duration(fps, asked):
    plan = FrameSampling(fps=fps).plan(times(250), 10.0)
    assert plan.num_asked == asked and len(plan) == min(asked, 250) and all(plan.high)


def test_fps_needs_known_times():
    with pytest.raises(ConfigurationError, match="fps"):
        FrameSampling(fps=1).plan(range(10), None)


def test_no_option_takes_every_frame():
    assert FrameSampling().plan(range(6), None).indices == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 4, "fps": 1.0},
        {"num_frames": 4, "num_high_res_frames": 2},
        {"fps": 1.0, "num_low_res_frames": 2},
        {"num_frames": 0},
        {"num_frames": -1},
        {"num_frames": 2.5},
        {"num_frames": True},
        {"num_high_res_frames": 0, "num_low_res_frames": 0},
        {"num_high_res_frames": -1},
        {"fps": 0.0},
        {"fps": -2},
        {"fps": float("nan")},
        {"fps": float("inf")},
    ],
)
def test_impossible_counts_are_refused(options):
    with pytest.raises(ConfigurationError):
        FrameSampling(**options)
