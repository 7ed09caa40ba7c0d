"""Budgets: the frames that fit, coverage first, against a search over all counts."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elva_hf.budget_elva import Budget, FrameCost, VideoDemand, fit_video, fit_videos, total_cost
from elva_hf.errors_elva import ConfigurationError

HIGH, LOW = FrameCost(601, 24 * 24 * 9408), FrameCost(73, 8 * 8 * 9408)  # Table 6's squares; float32 patches


@st.composite
def demands(draw, most=6):
    low = FrameCost(draw(st.integers(0, 6)), draw(st.integers(0, 6)))
    high = FrameCost(low.tokens + draw(st.integers(0, 9)), low.bytes + draw(st.integers(0, 9)))
    num_high, num_low = draw(st.tuples(st.integers(0, most), st.integers(0, most)).filter(any))
    return VideoDemand(num_high, num_low, high, low, draw(st.integers(0, 3)))


limits = st.none() | st.integers(-3, 90)
budgets = st.builds(Budget, limits, limits)


def fits(demand, counts, budget):
    tokens = demand.fixed_tokens + counts[0] * demand.high.tokens + counts[1] * demand.low.tokens
    size = counts[0] * demand.high.bytes + counts[1] * demand.low.bytes
    return (budget.tokens is None or tokens <= budget.tokens) and (budget.bytes is None or size <= budget.bytes)


def search(demand, budget):
    """Of all counts that fit, the most frames, then the most high ones."""
    asked = demand.num_high + demand.num_low
    every = [(total, high) for total in range(1, asked + 1) for high in range(min(total, demand.num_high) + 1)]
    fitting = [(total, high) for total, high in every if fits(demand, (high, total - high), budget)]
    return max(fitting, default=None)


@settings(max_examples=500, deadline=None)
@given(demand=demands(), budget=budgets)
def test_one_video_gets_the_most_frames_and_then_the_most_high_ones(demand, budget):
    fitted, wanted = fit_video(demand, budget), search(demand, budget)
    assert (fitted and (sum(fitted), fitted.num_high)) == wanted


@settings(max_examples=300, deadline=None)
@given(demand=demands(), budget=budgets, more=st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_a_larger_budget_never_gives_less(demand, budget, more):
    larger = Budget(
        *(limit if limit is None else limit + x for limit, x in zip((budget.tokens, budget.bytes), more, strict=True))
    )
    small, large = fit_video(demand, budget), fit_video(demand, larger)
    assert small is None or (sum(large), large.num_high) >= (sum(small), small.num_high)


@pytest.mark.parametrize(
    ("asked", "limit", "fitted"),
    [
        ((8, 32), 7144, (8, 32)),  # rows of Table 6 fit into their own tokens
        ((16, 16), 10784, (16, 16)),
        ((32, 0), 19232, (32, 0)),
        ((32, 0), 9616, (13, 19)),  # twice the frames of the row 16 + 0, in its tokens
        ((16, 16), 9616, (13, 19)),
        ((8, 32), 2920, (0, 40)),
        ((8, 32), 2919, (0, 39)),
        ((8, 32), 73, (0, 1)),
        ((8, 32), 72, None),
        ((8, 32), -5, None),
    ],
)
def test_table_6_in_fewer_tokens(asked, limit, fitted):
    demand = VideoDemand(*asked, HIGH, LOW, fixed_tokens=0)
    assert fit_video(demand, Budget(tokens=limit)) == fitted
    borders = VideoDemand(*asked, HIGH, LOW)
    assert fit_video(borders, Budget(tokens=limit + 2)) == fitted


def test_memory_limits_as_tokens_do():
    demand = VideoDemand(16, 16, HIGH, LOW)
    assert fit_video(demand, Budget(bytes=100 * 2**20)) == (16, 16)
    assert fit_video(demand, Budget(bytes=50 * 2**20)) == (6, 26)
    assert fit_video(demand, Budget(tokens=2 + 32 * 73, bytes=50 * 2**20)) == (0, 32)


def test_without_limits_all_that_is_asked_for_is_kept():
    assert fit_video(VideoDemand(16, 16, HIGH, LOW), Budget()) == (16, 16)


def test_frames_that_cost_nothing_do_not_fit_where_the_borders_do_not():
    demand = VideoDemand(1, 0, FrameCost(1, 1), FrameCost(0, 0), fixed_tokens=2)
    assert fit_video(demand, Budget(tokens=1)) is None
    assert fit_video(demand, Budget(tokens=2)) == (0, 1)


def test_frames_that_cost_the_same_stay_high():
    assert fit_video(VideoDemand(5, 3, LOW, LOW, 0), Budget(tokens=73 * 6)) == (5, 1)


@settings(max_examples=500, deadline=None)
@given(videos=st.lists(demands(), min_size=1, max_size=5), budget=budgets)
def test_several_videos_fit_together_and_leave_nothing_that_one_could_use(videos, budget):
    fitted = fit_videos(videos, budget)
    minimum = total_cost(videos, [(0, 1)] * len(videos))
    assert (fitted is None) == (not budget.allows(minimum))
    if fitted is None:
        return
    assert budget.allows(total_cost(videos, fitted))
    for place, (video, counts) in enumerate(zip(videos, fitted, strict=True)):
        assert sum(counts) >= 1 and min(counts) >= 0 and counts.num_high <= video.num_high
        assert sum(counts) <= video.num_high + video.num_low
        others = total_cost(videos[:place] + videos[place + 1 :], fitted[:place] + fitted[place + 1 :])
        assert search(video, budget.less(others)) == (sum(counts), counts.num_high)
    assert fit_videos(videos, budget) == fitted


@settings(max_examples=200, deadline=None)
@given(videos=st.lists(demands(), min_size=1, max_size=5), spare=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_all_that_is_asked_for_is_kept_where_it_fits(videos, spare):
    needed = total_cost(videos)
    budget = Budget(needed.tokens + spare[0], needed.bytes + spare[1])
    kept = fit_videos(videos, budget)
    wanted = [(video.num_high, video.num_low) for video in videos]
    assert kept == wanted == fit_videos(videos, Budget())


@settings(max_examples=200, deadline=None)
@given(demand=demands(), budget=budgets)
def test_a_video_alone_has_the_whole_budget(demand, budget):
    alone = fit_video(demand, budget)
    assert fit_videos([demand], budget) == (None if alone is None else [alone])


def test_equal_videos_get_equal_shares():
    demand = VideoDemand(16, 16, HIGH, LOW, fixed_tokens=0)
    each = 26 * LOW.tokens + 6 * HIGH.tokens
    assert fit_videos([demand, demand], Budget(tokens=2 * each)) == [(6, 26), (6, 26)]
    assert fit_videos([demand, demand], Budget(tokens=2 * each + 264)) == [(6, 26), (6, 26)]
    assert fit_videos([demand, demand], Budget(tokens=2 * each + 528)) == [(6, 26), (7, 25)]


def test_a_share_grows_with_what_is_asked_for():
    short, long = VideoDemand(0, 10, HIGH, LOW, 0), VideoDemand(0, 40, HIGH, LOW, 0)
    assert fit_videos([short, long], Budget(tokens=73 * 25)) == [(0, 5), (0, 20)]
    assert fit_videos([long, short], Budget(tokens=73 * 25)) == [(0, 19), (0, 6)]  # 20 of 25 frames, but for rounding


def test_what_a_video_leaves_passes_to_the_next_and_round_again():
    image, video = VideoDemand(1, 0, HIGH, LOW, 0), VideoDemand(0, 40, HIGH, LOW, 0)
    budget = Budget(tokens=2 * 73 + 600)  # 93 of the 600 are the image's share, too few to become a high one
    assert fit_videos([image, video], budget) == [(0, 1), (0, 9)]
    assert fit_videos([video, image], budget) == [(0, 9), (0, 1)]


def test_a_video_that_asks_for_its_minimum_takes_no_share():
    video, frame = VideoDemand(0, 10, HIGH, LOW, 0), VideoDemand(0, 1, HIGH, LOW, 0)
    assert fit_videos([video, frame, video], Budget(tokens=73 * 13)) == [(0, 6), (0, 1), (0, 6)]


def test_memory_that_a_later_video_gives_back_is_used():
    heavy = VideoDemand(3, 0, FrameCost(1, 7), FrameCost(1, 2), 0)  # one high frame, then three low ones
    light = VideoDemand(4, 2, FrameCost(4, 1), FrameCost(1, 1), 0)
    assert fit_videos([light, heavy], Budget(10, 12)) == [(0, 6), (0, 3)]


def test_no_videos_need_no_budget():
    assert fit_videos([], Budget(tokens=0)) == []
    assert fit_videos([], Budget(tokens=-1)) is None


def test_costs_add_up():
    demand = VideoDemand(2, 3, FrameCost(10, 100), FrameCost(4, 30))
    assert demand.cost((2, 3)) == (2 + 2 * 10 + 3 * 4, 2 * 100 + 3 * 30) == total_cost([demand])
    assert total_cost([demand, demand], [(0, 1), (1, 0)]) == (6 + 12, 130)
    assert Budget(100, None).less(FrameCost(30, 5)) == Budget(70, None)


@settings(max_examples=100, deadline=None)
@given(
    counts=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    high=st.tuples(st.integers(-2, 3), st.integers(-2, 3)),
    low=st.tuples(st.integers(-2, 3), st.integers(-2, 3)),
    fixed=st.integers(-1, 1),
)
def test_demands_that_make_no_sense_are_refused(counts, high, low, fixed):
    good = min(counts) >= 0 and any(counts) and min(*low, fixed) >= 0 and high[0] >= low[0] and high[1] >= low[1]
    assume(not good)
    with pytest.raises(ConfigurationError):
        VideoDemand(*counts, FrameCost(*high), FrameCost(*low), fixed)
