"""Frame choice, grids and token counts (section 4, Tables 5 and 6)."""

import math
import random
from bisect import bisect_right
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elva_hf.errors_elva import ConfigurationError, VideoError
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
        {"fps": 1e300},
        {"fps": 10**400},
        {"fps": "2"},
        {"frame_times": ()},
        {"frame_times": 3.0},
        {"frame_times": "12"},
        {"frame_times": b"12"},
        {"frame_times": (1.0, "2")},
        {"frame_times": (1.0, float("nan"))},
        {"frame_times": (10**400,)},
        {"frame_times": (1.0,), "num_frames": 1},
        {"frame_times": (1.0,), "fps": 1},
        {"frame_times": (1.0,), "num_low_res_frames": 1},
        {"video_start": -1.0},
        {"video_start": float("nan")},
        {"video_start": "1"},
        {"video_end": float("inf")},
        {"video_end": 0.0},
        {"video_end": -2},
        {"video_start": 3.0, "video_end": 3.0},
        {"video_start": 3.0, "video_end": 2.0},
    ],
)
def test_impossible_counts_are_refused(options):
    with pytest.raises(ConfigurationError):
        FrameSampling(**options)


WAYS = [
    {"num_frames": 7},
    {"num_high_res_frames": 3, "num_low_res_frames": 8},
    {"fps": 5.0},
    {"frame_times": (0.1, 0.5, 1.1, 1.15, 3.9)},
    {},
]
variable_times = st.lists(st.integers(2, 900), min_size=1, max_size=40).map(
    lambda gaps: [sum(gaps[:i]) / 1000 for i in range(len(gaps) + 1)]
)


@settings(max_examples=200, deadline=None)
@given(starts=variable_times, asked=st.integers(1, 50), high=st.integers(0, 50))
def test_a_video_without_a_window_is_sampled_as_a_whole(starts, asked, high):
    *starts, duration = starts
    high = min(high, asked)
    plan = FrameSampling(num_high_res_frames=high, num_low_res_frames=asked - high).plan(starts, duration)
    count = min(asked, len(starts))
    indices = []
    for i in range(count):
        shown = bisect_right(starts, (i + 0.5) * duration / count + 1e-3) - 1
        indices.append(min(max(shown, indices[-1] + 1 if indices else 0), len(starts) - count + i))
    assert plan.indices == tuple(indices) and plan.num_asked == asked
    assert plan.high == tuple(spread_high_frames(count, min(high, count)))
    whole = FrameSampling(
        num_high_res_frames=high, num_low_res_frames=asked - high, video_start=0.0, video_end=duration + 5
    )
    assert whole.plan(starts, duration) == plan


@settings(max_examples=300, deadline=None)
@given(starts=variable_times, edges=st.tuples(st.floats(0, 1), st.floats(0, 1.5)), asked=st.integers(1, 50))
def test_a_window_takes_exactly_the_frames_on_screen_in_it(starts, edges, asked):
    *starts, duration = starts
    start, end = edges[0] * duration * 0.999, edges[1] * duration
    if start >= end:
        return
    ends = [*starts[1:], duration]
    shown = [i for i in range(len(starts)) if ends[i] > start + 1e-3 and starts[i] < end - 1e-3]
    shown = shown or [max(i for i in range(len(starts)) if starts[i] <= start + 1e-3)]
    shown = shown if ends[-1] > start + 1e-3 else [len(starts) - 1]
    every = FrameSampling(video_start=start, video_end=end).plan(starts, duration)
    assert every.indices == tuple(shown) and every.num_asked == len(shown)
    some = FrameSampling(num_frames=asked, video_start=start, video_end=end).plan(starts, duration)
    assert len(some) == min(asked, len(shown)) and set(some.indices) <= set(shown) and some.num_asked == asked


def test_the_frame_showing_at_the_start_is_in_and_the_one_that_begins_at_the_end_is_out():
    plan = FrameSampling(video_start=1.05, video_end=1.2).plan(times(100), 4.0)
    assert plan.indices == (26, 27, 28, 29)  # frame 26 shows from 1.04 s
    assert FrameSampling(video_start=1.0, video_end=1.001).plan(times(100), 4.0).indices == (25,)
    assert FrameSampling(video_start=3.9).plan(times(100), 4.0).indices == (97, 98, 99)
    assert FrameSampling(video_end=0.1).plan(times(100), 4.0).indices == (0, 1, 2)
    assert FrameSampling(video_start=3.9, video_end=1e9).plan(times(100), 4.0).indices == (97, 98, 99)


def test_moments_are_the_middles_of_equal_parts_of_the_window():
    plan = FrameSampling(num_frames=4, video_start=1.0, video_end=3.0).plan(times(100), 4.0)
    assert plan.indices == (31, 43, 56, 68)  # 1.25, 1.75, 2.25, 2.75 s
    assert FrameSampling(num_frames=2, video_start=2.0, video_end=50).plan(times(100), 4.0).indices == (62, 87)


def test_fps_counts_frames_over_the_window():
    assert FrameSampling(fps=2, video_start=1.0, video_end=3.0).plan(times(100), 4.0).num_asked == 4
    assert FrameSampling(fps=2, video_start=3.0, video_end=30.0).plan(times(100), 4.0).num_asked == 2


@pytest.mark.parametrize("way", WAYS)
def test_times_rounded_to_milliseconds_give_the_same_frames(way):
    exact = [i * 1001 / 30000 for i in range(120)]
    rounded = [round(time, 3) for time in exact]
    if "frame_times" in way:
        way = {**way, "frame_times": tuple(exact[i] for i in (4, 7, 50))}
    for first, end in ((1, 117), (1, 116), (1, 115), (0, 117), (3, 117)):
        way = {**way, "video_start": exact[first], "video_end": exact[end]}
        plan = FrameSampling(**way).plan(exact, 120 * 1001 / 30000)
        assert plan == FrameSampling(**way).plan(rounded, round(120 * 1001 / 30000, 3))
        assert plan.indices[0] >= first and plan.indices[-1] < end


def test_frame_times_take_the_frame_on_screen_at_each_time():
    plan = FrameSampling(frame_times=[0.0, 0.039, 0.04, 1.0, 3.99]).plan(times(100), 4.0)
    assert plan.indices == (0, 1, 25, 99)  # within a millisecond of a frame it is on screen
    assert all(plan.high) and plan.num_asked == 5


def test_frame_times_may_come_in_any_order_and_name_a_frame_twice():
    plan = FrameSampling(frame_times=(2.0, 1.0, 1.01, 0.5)).plan(times(100), 4.0)
    assert plan.indices == (12, 25, 50) and plan.num_asked == 4


@pytest.mark.parametrize("time", [-0.1, 4.0, 17.5])
def test_a_frame_time_outside_the_video_is_named(time):
    with pytest.raises(VideoError, match=rf"holds {time:g} s, outside the 0 to 4 s") as caught:
        FrameSampling(frame_times=(1.0, time)).plan(times(100), 4.0)
    assert caught.value.reason == "bad_time"


@pytest.mark.parametrize("time", [0.99, 3.0])
def test_a_frame_time_outside_the_window_is_named(time):
    sampling = FrameSampling(frame_times=(1.0, time), video_start=1.0, video_end=3.0)
    with pytest.raises(VideoError, match=rf"holds {time:g} s, outside the 1 to 3 s") as caught:
        sampling.plan(times(100), 4.0)
    assert caught.value.reason == "bad_time"
    inside = FrameSampling(frame_times=(1.0, 2.9999), video_start=1.0, video_end=3.0).plan(times(100), 4.0)
    assert inside.indices == (25, 74)


@pytest.mark.parametrize("start", [4.0, 9.5])
def test_a_window_that_starts_after_the_video_is_refused(start):
    with pytest.raises(VideoError, match=rf"video_start is {start:g} s, and the video ends at 4 s") as caught:
        FrameSampling(num_frames=2, video_start=start).plan(times(100), 4.0)
    assert caught.value.reason == "bad_time"


@pytest.mark.parametrize(
    "options", [{"frame_times": (1.0,)}, {"video_start": 0.0}, {"video_end": 3.0, "num_frames": 2}]
)
def test_times_need_a_video_that_has_times(options):
    with pytest.raises(VideoError, match="known times") as caught:
        FrameSampling(**options).plan(range(10), None)
    assert caught.value.reason == "bad_time"


@pytest.mark.parametrize("window", [{}, {"video_start": 0.08, "video_end": 3.95}])
@pytest.mark.parametrize("way", WAYS)
def test_counts_of_all_that_is_taken_change_nothing(way, window):
    sampling = FrameSampling(**way, **window)
    plan = sampling.plan(times(100), 4.0)
    counts = sum(plan.high), len(plan) - sum(plan.high)
    assert sampling.plan(times(100), 4.0, counts) == plan


@pytest.mark.parametrize("way", [way for way in WAYS if "frame_times" not in way])
def test_smaller_counts_spread_over_the_window_again(way):
    window = {"video_start": 1.0, "video_end": 3.0}
    plan = FrameSampling(**way, **window).plan(times(100), 4.0, (1, 3))
    alone = FrameSampling(num_high_res_frames=1, num_low_res_frames=3, **window).plan(times(100), 4.0)
    assert (plan.indices, plan.high) == (alone.indices, alone.high) == ((31, 43, 56, 68), (False, False, True, False))
    assert plan.num_asked == FrameSampling(**way, **window).plan(times(100), 4.0).num_asked > 4


def test_smaller_counts_take_an_even_part_of_the_frame_times():
    sampling = FrameSampling(frame_times=tuple(i / 10 for i in range(1, 10)))
    plan = sampling.plan(times(100), 4.0, (1, 2))
    assert plan.indices == (5, 12, 20) and plan.high == (False, True, False)  # 0.2, 0.5, 0.8 s
    assert plan.num_asked == 9
    twice = FrameSampling(frame_times=(1.0, 1.0, 2.0)).plan(times(100), 4.0, (0, 3))
    assert twice.indices == (25, 50) and twice.num_asked == 3


def test_counts_beyond_a_short_video_take_every_frame():
    plan = FrameSampling(num_frames=64).plan(times(10), 0.4, (4, 20))
    assert plan.indices == tuple(range(10)) and sum(plan.high) == 4 and plan.num_asked == 64


@pytest.mark.parametrize("counts", [(0, 0), (5, 4), (-1, 3), (1.0, 2), (True, 2), (1, 2, 3), (4,)])
def test_counts_that_are_no_reduction_are_refused(counts):
    with pytest.raises(ConfigurationError, match="at most the 8 frames asked for"):
        FrameSampling(num_frames=8).plan(times(100), 4.0, counts)


def test_sampling_can_be_compared_and_hashed_however_the_times_were_given():
    assert FrameSampling(frame_times=[1, 2]) == FrameSampling(frame_times=(1.0, 2.0))
    assert len({FrameSampling(frame_times=[1, 2]), FrameSampling(frame_times=(1.0, 2.0))}) == 1
    assert all(type(time) is float for time in FrameSampling(frame_times=[np.float32(1), 2]).frame_times)
