"""The frames of a sample within its budgets: checked, fitted, or refused with the numbers and a setting that would fit.

All of it happens before anything but the first frame of a video is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from .budget_elva import Budget, FrameCounts, fit_videos
from .errors_elva import ContextOverflowError
from .frames_elva import check_edge
from .options_elva import Budgets
from .sampled_elva import OpenVideo, SampledVideo

Count = Callable[[Sequence[SampledVideo]], int]
"""All tokens of a sample, for these frames of its videos."""

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Sample:
    """The videos and images of one sample.

    Args:
        videos: Open, in order.
        measure: Counts its tokens exactly.
        estimate: Counts them fast, to a few.
        label: Opens messages, for example `"sample 1: "`.
        name: What is counted, in messages.
    """

    videos: Sequence[OpenVideo]
    measure: Count
    estimate: Count
    label: str = ""
    name: str = "the prompt"

    def take(self, settings: Mapping[str, Any]) -> list[SampledVideo]:
        """The frames, had the call been given these options."""
        return [video.changed(settings).sample() for video in self.videos]


class Excess(NamedTuple):
    """A budget that does not suffice."""

    budget: str
    needed: int
    limit: int


def choose_frames(sample: Sample, budgets: Budgets) -> list[SampledVideo]:
    """What is taken of each video of a sample: what is asked for if it fits, else fewer frames if that is allowed.

    Raises:
        ContextOverflowError: It does not fit.
        VideoError: A time that a video does not have, or a video where an image is wanted.
        ConfigurationError: Options that a video cannot have.
    """
    asked = [video.sample() for video in sample.videos]
    excess = _find_excess(sample, asked, budgets, sample.measure)
    if excess is None:
        return asked
    fitted = fit_frames(sample, budgets) if budgets.overflow == "fit" else None
    if fitted is not None:
        return fitted
    settings = find_settings(sample, budgets)
    raise ContextOverflowError(
        f"{sample.label}{_describe(sample, asked, excess)}; {_advise(sample, budgets, settings, excess)}",
        budget=excess.budget,
        needed=excess.needed,
        limit=excess.limit,
        settings=settings,
    )


def fit_frames(sample: Sample, budgets: Budgets) -> list[SampledVideo] | None:
    """Fewer frames, or fewer at high resolution, that fit by the rule of `budget_elva`; None if none do."""
    if not sample.videos:
        return None
    for video in sample.videos:
        check_edge(video.options.low_res_longest_edge, video.options.patch_size, name="low_res_longest_edge")
    demands = [video.demand() for video in sample.videos]

    def take(counts: Sequence[FrameCounts]) -> list[SampledVideo]:
        return [video.sample(pair) for video, pair in zip(sample.videos, counts, strict=True)]

    def find(budgets: Budgets) -> list[FrameCounts] | None:
        def within(tokens: int | None) -> list[FrameCounts] | None:
            return fit_videos(demands, Budget(tokens, budgets.max_memory))

        def fits(tokens: int) -> bool:
            counts = within(tokens)
            return counts is None or _find_excess(sample, take(counts), budgets, sample.estimate) is None

        limits = [limit for limit in (budgets.max_visual_tokens, budgets.context_length) if limit is not None]
        return within(_largest(0, min(limits), fits) if limits else None)

    counts = _verified(sample, budgets, find, take)
    return None if counts is None else take(counts)


def find_settings(sample: Sample, budgets: Budgets) -> dict[str, Any] | None:
    """Options of a call with which the sample would fit; None if there are none."""
    found = _verified(sample, budgets, lambda budgets: _find_settings(sample, budgets), sample.take)
    if found is not None:
        return found
    if _may_fit(sample, budgets) and fit_frames(sample, budgets) is not None:
        return {"overflow": "fit"}
    return None


def _find_excess(sample: Sample, chosen: Sequence[SampledVideo], budgets: Budgets, count: Count) -> Excess | None:
    """The first budget that these frames exceed."""
    if budgets.max_visual_tokens is not None:
        visual = sum(video.num_visual_tokens for video in chosen)
        if visual > budgets.max_visual_tokens:
            return Excess("max_visual_tokens", visual, budgets.max_visual_tokens)
    if budgets.max_memory is not None:
        memory = sum(video.memory(taken) for video, taken in zip(sample.videos, chosen, strict=True))
        if memory > budgets.max_memory:
            return Excess("max_memory", memory, budgets.max_memory)
    if budgets.context_length is not None:
        tokens = count(chosen)
        if tokens > budgets.context_length:
            return Excess(budgets.context_name, tokens, budgets.context_length)
    return None


def _verified(
    sample: Sample,
    budgets: Budgets,
    find: Callable[[Budgets], Choice | None],
    take: Callable[[Choice], list[SampledVideo]],
) -> Choice | None:
    """A choice that fits by the exact count: where the estimate was too low, look again with that much less room."""
    room = budgets.context_length
    while (choice := find(budgets)) is not None:
        if room is None:
            return choice
        excess = sample.measure(take(choice)) - room
        if excess <= 0:
            return choice
        if budgets.context_length <= excess:
            return None
        budgets = replace(budgets, context_length=budgets.context_length - excess)
    return None


def _find_settings(sample: Sample, budgets: Budgets) -> dict[str, int] | None:
    """The most frames, then the most high ones, of every video alike; where one is too many, smaller frames."""

    def fits(settings: Mapping[str, Any]) -> bool:
        return _find_excess(sample, sample.take(settings), budgets, sample.estimate) is None

    if not sample.videos:
        return None
    has_low = all(video.options.has_low for video in sample.videos)
    counted = [v.sample() for v in sample.videos if not (v.counts_itself or v.reader.info.is_image)]
    if counted:
        most = _largest(
            0, max(v.num_frames for v in counted), lambda count: fits(_pair(0 if has_low else count, count))
        )
        most_high = min(most, max(sum(v.high) for v in counted))
        if most:
            return _pair(_largest(0, most_high, lambda high: fits(_pair(high, most))) if has_low else most, most)
    smallest = _pair(0 if has_low else 1, 1) if counted else {}
    options = sample.videos[0].options
    edges = range(0, options.longest_edge, options.patch_size)
    edge = edges[_largest(0, len(edges) - 1, lambda place: fits({**smallest, "longest_edge": edges[place]}))]
    return {**smallest, "longest_edge": edge} if edge else None


def _pair(num_high: int, num_frames: int) -> dict[str, int]:
    return {"num_high_res_frames": num_high, "num_low_res_frames": num_frames - num_high}


def _describe(sample: Sample, asked: Sequence[SampledVideo], excess: Excess) -> str:
    budget, needed, limit = excess
    visual = sum(video.num_visual_tokens for video in asked)
    subject = "the video gives" if len(asked) == 1 else f"the {len(asked)} videos give"
    if budget == "max_visual_tokens":
        return f"{subject} {needed} visual tokens, {budget} is {limit}"
    if budget == "max_memory":
        return f"{subject} {needed} bytes of pixel_values_videos, {budget} is {limit}"
    return f"{sample.name} has {needed} tokens ({visual} of them visual), {budget} is {limit}"


def _advise(sample: Sample, budgets: Budgets, settings: Mapping[str, Any] | None, excess: Excess) -> str:
    in_context = excess.budget in ("context_length", "max_length")
    if settings is None:
        shorten = "shorten the text, or " if in_context else ""
        small = "not even one small frame of each video fits: " if sample.videos else ""
        return f"{small}{shorten}raise {excess.budget}."
    if "overflow" in settings:
        return 'take fewer frames, or let overflow="fit" choose them.'
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    other = '; or let overflow="fit" choose' if _may_fit(sample, budgets) else ""
    return f"this would fit: {shown}{other}."


def _may_fit(sample: Sample, budgets: Budgets) -> bool:
    """Whether `overflow="fit"` is still to be tried, and can be."""
    return budgets.overflow == "error" and all(video.options.has_low for video in sample.videos)


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number in `[low, high]` for which a test holds that, once it fails, fails for all larger ones.

    `low` is taken to hold.
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
