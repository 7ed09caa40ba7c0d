"""Placeholders in a text: which video or image stands where, and the tokens that stand for its frames."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils.chat_template_utils import mark_control_tokens

from .errors_elva import ElvaError, PlaceholderError, VideoError
from .frames_elva import FULL_LAYOUT
from .layout_elva import FrameLayout
from .sampled_elva import SampledVideo
from .video_processing_elva import is_frame_list

Slot = tuple[str, tuple[int, int]]
"""Kind of a placeholder, `"video"` or `"image"`, and its span in the text."""

_MARK = mark_control_tokens("x", re.compile("x"))[0]  # stands before tokens that a person typed, when sanitising


class PerSample(list):
    """Media grouped by sample; a plain list may also mean one video."""


@dataclass(frozen=True)
class VisualTokens:
    """The special tokens as they stand in a text; fields as in `ElvaProcessor`, without `_token`.

    Args:
        layout: How a frame is written with them.
    """

    video: str
    image: str
    frame: str
    line: str
    video_start: str
    video_end: str
    layout: FrameLayout = FULL_LAYOUT

    @property
    def written(self) -> list[str]:
        """All of them."""
        return [self.video, self.image, self.frame, self.line, self.video_start, self.video_end]

    def find(self, text: str) -> list[Slot]:
        """Kind and span of each placeholder."""
        pattern = "|".join(f"(?P<{kind}>(?<!{_MARK}){re.escape(getattr(self, kind))})" for kind in ("video", "image"))
        return [(match.lastgroup or "", match.span()) for match in re.finditer(pattern, text)]

    def expand(self, grids: Sequence[tuple[int, int]], marks: Sequence[str] | None = None) -> str:
        """The text that stands for a video with frames of these `(rows, cols)`, each after its time mark."""
        written = list(zip(marks or [""] * len(grids), grids, strict=True))[:: self.layout.chunk_size]
        frames = (mark + self.layout.write(grid, self.frame, self.line, self.video) for mark, grid in written)
        return self.video_start + "".join(frames) + self.video_end

    def count(self, videos: Sequence[SampledVideo]) -> Counter[str]:
        """How many of each token stand for these videos."""
        counts: Counter[str] = Counter()
        for video in videos:
            counts[self.video_start] += 1
            counts[self.video_end] += 1
            frames = video.grids[:: self.layout.chunk_size]
            marked = 0 if self.layout.frame_token else len(frames)  # patches that stand under the id of a frame
            lines = sum(rows for rows, _ in frames) - (0 if self.layout.line_token else marked)
            counts[self.frame] += len(frames)
            counts[self.line] += lines
            counts[self.video] += video.num_patches - marked - (0 if self.layout.line_token else lines)
        return counts


@dataclass(frozen=True)
class Prompt:
    """A text and the places of its videos and images.

    Args:
        text: With a placeholder for each.
        slots: The placeholders.
        tokens: What they are replaced with.
        timestamps: Whether the time of each frame is written before it.
    """

    text: str
    slots: list[Slot]
    tokens: VisualTokens
    timestamps: bool = False

    def expand(self, videos: Sequence[SampledVideo]) -> tuple[str, list[dict[str, Any]]]:
        """The text with all frames, and where each placeholder went, as `ProcessorMixin` wants it.

        Raises:
            VideoError: Times are to be written, and a video has none.
        """
        parts, moved, last, length = [], [], 0, 0
        for (kind, (start, end)), video in zip(self.slots, videos, strict=True):
            replacement = self.tokens.expand(video.grids, time_marks(video) if self.timestamps else None)
            parts += [self.text[last:start], replacement]
            new_start = length + start - last
            length, last = new_start + len(replacement), end
            moved.append(
                {
                    "type": kind,
                    "span": (start, end),
                    "new_span": (new_start, length),
                    "text": self.text[start:end],
                    "replacement": replacement,
                }
            )
        return "".join([*parts, self.text[last:]]), moved

    def visual_part(self, *, from_start: bool) -> Prompt:
        """What must not be cut: the text up to the last video, or else from the first video on."""
        if not self.slots:
            return replace(self, text="")
        if from_start:
            return replace(self, text=self.text[: self.slots[-1][1][1]])
        first = self.slots[0][1][0]
        slots = [(kind, (start - first, end - first)) for kind, (start, end) in self.slots]
        return replace(self, text=self.text[first:], slots=slots)


def time_marks(video: SampledVideo) -> list[str]:
    """The time of each frame as text, `"0.5s"`: tenths of a second, or up to 3 digits where they tell frames apart.

    A still image has no time, and no mark.

    Raises:
        VideoError: A video without times.
    """
    if video.info.is_image:
        return [""] * len(video.grids)
    if video.times is None:
        raise VideoError(
            f"timestamps=True needs a video with known times, and {video.info.source} has none;",
            hint='give video_metadata={"fps": ...} with it.',
            reason="bad_time",
            source=video.info.source,
        )
    marks: list[str] = []
    for digits in (1, 2, 3):
        marks = [f"{time:.{digits}f}s" for time in video.times]
        if len(set(marks)) == len(marks):
            break
    return marks


def distribute(media: Mapping[str, Any], prompts: Sequence[Prompt]) -> Iterator[tuple[Any, bool]]:
    """Videos and images in the order of their placeholders, each with whether it must be a still image.

    Args:
        media: What the caller gave, per kind.
        prompts: The samples.

    Raises:
        PlaceholderError: There are more or fewer than placeholders, in all or in a sample.
    """
    kinds = [[kind for kind, _ in prompt.slots] for prompt in prompts]
    queues = {}
    for kind, given in media.items():
        token = getattr(prompts[0].tokens, kind)
        queues[kind] = iter(_distribute_kind(given, [sample.count(kind) for sample in kinds], kind, token))
    return ((next(queues[kind]), kind == "image") for sample in kinds for kind in sample)


def _distribute_kind(media: Any, counts: list[int], kind: str, token: str) -> list[Any]:
    """Media of one kind in the order of placeholders, checked against the `counts` of each sample."""
    groups = _group(media, kind)
    if groups is None:
        items = flatten(media, kind)
        if len(items) == sum(counts):
            return items
        if len(counts) > 1:
            raise PlaceholderError(
                f"the {len(counts)} texts hold {counts} {token} placeholders, {sum(counts)} in all, but "
                f"{len(items)} {kind}s were given. Write one {token} for each {kind}, or give one list of {kind}s "
                "per text."
            )
        groups = [items]
    if len(groups) != len(counts):
        raise PlaceholderError(
            f"{kind}s are given for {len(groups)} texts, but there are {len(counts)}; give one list per text."
        )
    for sample, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if len(group) != count:
            fix = f"Remove a {token}" if count > len(group) else f"Write a {token} where each {kind} belongs"
            raise PlaceholderError(
                f"sample {sample}: the text holds {count} {token} placeholders, but {len(group)} {kind}s were "
                f"given. {fix}, give as many {kind}s, or use apply_chat_template, which writes the placeholders."
            )
    return [item for group in groups for item in group]


def flatten(media: Any, kind: str) -> list[Any]:
    """Media as one list."""
    if media is None:
        return []
    groups = _group(media, kind)
    if groups is not None:
        return [item for group in groups for item in group]
    if not isinstance(media, (list, tuple)):
        return [media]
    return [media] if kind == "video" and is_frame_list(media) else list(media)


def check_texts(text: Any) -> list[str]:
    """A text or several as a list.

    Raises:
        ElvaError: It is neither.
    """
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else None
    if not texts or not all(isinstance(sample, str) for sample in texts):
        raise ElvaError(f"text is {type(text).__name__} of {text!r:.60}; expected a str or a list of at least one str.")
    return texts


def check_not_empty(prompts: Sequence[Prompt]) -> None:
    """Refuse a sample with neither words nor pictures.

    Raises:
        ElvaError: There is one.
    """
    for number, prompt in enumerate(prompts):
        if not prompt.slots and not prompt.text.strip():
            raise ElvaError(f"sample {number} is empty: no text and no video; ask something.")


def _group(media: Any, kind: str) -> list[list[Any]] | None:
    """Media as one list per sample, or None if they are not grouped."""
    if isinstance(media, PerSample):
        return list(media)
    if not isinstance(media, (list, tuple)) or not media:
        return None
    inner = [
        item for item in media if isinstance(item, (list, tuple)) and not (kind == "video" and is_frame_list(item))
    ]
    if not inner:
        return None
    return [list(item) if isinstance(item, (list, tuple)) else [item] for item in media]
