"""How many frames, and how many of them at high resolution, a budget of tokens and bytes allows: coverage first.

Section 3.4 of the paper lets a model "selectively process some high-resolution frames while using low-resolution frames
for others" and leaves open how many of each. Table 6 says what counts most: 8 high with 32 low frames (7144 tokens)
answer better than 16 high ones alone (9616 tokens). So where a video does not fit, this rule chooses:

1. Of the frames asked for, as many as fit with all of them at low resolution: `T`. Frames asked for at high resolution
   count too, and then become low ones.
2. Of those, as many at high resolution as fit, up to the number asked for: `H`.

What is asked for and fits is kept. Several videos of one sample share its budget: each gets one low frame, the rest is
shared out in proportion to what each asks for beyond that, what one leaves passes to the next, and what all leave goes
round again until nobody can use it. Whole numbers throughout, so every machine chooses the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors_elva import ConfigurationError


class FrameCounts(NamedTuple):
    """High- and low-resolution frames of a video, as `FrameSampling.plan(counts=...)` takes them."""

    num_high: int
    num_low: int


class FrameCost(NamedTuple):
    """What a frame, or all that is asked for, takes.

    Args:
        tokens: Positions in the context.
        bytes: Memory of its pixels.
    """

    tokens: int
    bytes: int


ONE_LOW = FrameCounts(0, 1)


@dataclass(frozen=True)
class VideoDemand:
    """What is asked of a video, and what it costs.

    Args:
        num_high: High-resolution frames, 0 or more; any of them may become a low-resolution one.
        num_low: Low-resolution frames, 0 or more.
        high: Cost of a high-resolution frame; in neither unit less than that of a low one.
        low: Cost of a low-resolution frame, also where none is asked for.
        fixed_tokens: Tokens of the video whatever its frames: its two borders.
    """

    num_high: int
    num_low: int
    high: FrameCost
    low: FrameCost
    fixed_tokens: int = 2

    def __post_init__(self) -> None:
        counts = (self.num_high, self.num_low)
        if min(counts) < 0 or not sum(counts):
            raise ConfigurationError(f"{counts} frames are asked for (high, low); ask for at least one, none below 0.")
        if min(*self.low, self.fixed_tokens) < 0 or min(_difference(self.high, self.low)) < 0:
            raise ConfigurationError(
                f"a high-resolution frame costs {tuple(self.high)} (tokens, bytes) and a low one {tuple(self.low)}, a "
                f"video {self.fixed_tokens} tokens more; none may be below 0, nor a high frame cheaper than a low one."
            )

    @property
    def asked(self) -> FrameCounts:
        """The frames asked for."""
        return FrameCounts(self.num_high, self.num_low)

    def cost(self, counts: tuple[int, int]) -> FrameCost:
        """What the video costs with this many high- and low-resolution frames."""
        tokens, size = (counts[0] * high + counts[1] * low for high, low in zip(self.high, self.low, strict=True))
        return FrameCost(self.fixed_tokens + tokens, size)


@dataclass(frozen=True)
class Budget:
    """What all frames of a sample, and the borders of its videos, may take; None for no limit.

    Args:
        tokens: Positions in the context. A text that is too long already leaves fewer than 0.
        bytes: Memory of pixels.
    """

    tokens: int | None = None
    bytes: int | None = None

    def allows(self, cost: FrameCost) -> bool:
        """Whether this much fits."""
        return all(limit is None or used <= limit for used, limit in zip(cost, self._limits, strict=True))

    def less(self, cost: FrameCost) -> Budget:
        """What is left after spending this much."""
        return Budget(*(None if limit is None else limit - x for limit, x in zip(self._limits, cost, strict=True)))

    @property
    def _limits(self) -> tuple[int | None, int | None]:
        return self.tokens, self.bytes


def fit_video(demand: VideoDemand, budget: Budget) -> FrameCounts | None:
    """Frames of one video that fit: the most frames first, then the most high-resolution ones among them.

    Returns:
        How many of each, at most `num_high + num_low` in all and `num_high` high ones; None if not one low frame fits.

    Example:
        Table 6's frames of 601 and 73 tokens: 16 high ones take 9616.

        >>> demand = VideoDemand(16, 0, FrameCost(601, 0), FrameCost(73, 0), fixed_tokens=0)
        >>> fit_video(demand, Budget(tokens=9616)), fit_video(demand, Budget(tokens=5000))
        (FrameCounts(num_high=16, num_low=0), FrameCounts(num_high=7, num_low=9))
        >>> fit_video(demand, Budget(tokens=1000)), fit_video(demand, Budget(tokens=72))
        (FrameCounts(num_high=0, num_low=13), None)
    """
    count = _most(budget.less(demand.cost((0, 0))), demand.low, sum(demand.asked))
    if count < 1:
        return None
    extra = _difference(demand.high, demand.low)
    num_high = _most(budget.less(demand.cost((0, count))), extra, min(demand.num_high, count))
    return FrameCounts(num_high, count - num_high)


def fit_videos(demands: Sequence[VideoDemand], budget: Budget) -> list[FrameCounts] | None:
    """Frames of the videos of one sample that fit together; see the module for how they share.

    Returns:
        Per video how many of each; None if one low frame of each does not fit.

    Example:
        >>> demand = VideoDemand(16, 16, FrameCost(601, 0), FrameCost(73, 0), fixed_tokens=0)
        >>> fit_videos([demand, demand], Budget(tokens=5000))
        [FrameCounts(num_high=0, num_low=32), FrameCounts(num_high=0, num_low=32)]
        >>> fit_videos([demand, demand], Budget(tokens=145)) is None
        True
    """
    fitted = [ONE_LOW] * len(demands)
    left = budget.less(total_cost(demands, fitted))
    if not left.allows(FrameCost(0, 0)):
        return None
    wanted = [_difference(demand.cost(demand.asked), demand.cost(ONE_LOW)) for demand in demands]
    for place, demand in enumerate(demands):
        share = _share(left, wanted[place:])
        fitted[place], left = _refit(demand, fitted[place], share, left)
    settled = False
    while not settled:
        before = list(fitted)
        for place, demand in enumerate(demands):
            fitted[place], left = _refit(demand, fitted[place], left, left)
        settled = fitted == before
    return fitted


def total_cost(demands: Sequence[VideoDemand], counts: Sequence[tuple[int, int]] | None = None) -> FrameCost:
    """What videos cost together, with these counts of frames or with all that is asked for."""
    chosen = [demand.asked for demand in demands] if counts is None else counts
    costs = [demand.cost(pair) for demand, pair in zip(demands, chosen, strict=True)]
    return FrameCost(sum(cost.tokens for cost in costs), sum(cost.bytes for cost in costs))


def _most(left: Budget, each: FrameCost, ceiling: int) -> int:
    """How many of `each` fit, up to `ceiling`; below 0 where nothing is left."""
    most = ceiling
    for limit, cost in ((left.tokens, each.tokens), (left.bytes, each.bytes)):
        if limit is not None and limit < 0:
            return -1
        if limit is not None and cost:
            most = min(most, limit // cost)
    return most


def _share(left: Budget, wanted: Sequence[FrameCost]) -> Budget:
    """The first one's part of what is left, in proportion to what each still wants."""
    parts = []
    for unit, limit in enumerate((left.tokens, left.bytes)):
        total = sum(want[unit] for want in wanted)
        parts.append(limit if limit is None or not total else limit * wanted[0][unit] // total)
    return Budget(*parts)


def _refit(demand: VideoDemand, held: FrameCounts, share: Budget, left: Budget) -> tuple[FrameCounts, Budget]:
    """What a video takes with `share` on top of what it holds, and what is then left of `left`."""
    cost = demand.cost(held)
    own = share.less(FrameCost(-cost.tokens, -cost.bytes))
    fitted = fit_video(demand, own) or held
    return fitted, left.less(_difference(demand.cost(fitted), cost))


def _difference(one: FrameCost, other: FrameCost) -> FrameCost:
    return FrameCost(one.tokens - other.tokens, one.bytes - other.bytes)
