"""Clips with a detail that only full resolution shows, and an order of events that only many frames show.

One digit is written in half of the cells of 16 px, by several hands, and stands still; 3 or 4 large coloured squares
appear one after the other, for three frames of 60 each. Every pixel of an 8x8 digit is a block of 2x2, two lighter and
two darker by its ink: halved, the block is the grey around it, but for what the edges of a bicubic filter leave, and
that drowns in grain. Frames are chosen and resized by the package's own functions, and a video holds frames of both
grids, as its processor lays them out.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from claims.protocol import Budget, Variant
from claims.scenes import SCENES_PER_SEED
from claims.world import Asked
from elva_hf.data.encoding import EncodedSample
from elva_hf.data.packing import IGNORED, PREFIX
from elva_hf.data.toy_rows import draw_questions
from elva_hf.data.toy_world import (
    CELL_SIZE,
    COLORS,
    FRAME_SIZE,
    GRID_SIZE,
    SPLITS,
    Question,
    digit_images,
    digit_indices,
)
from elva_hf.decoding_elva import resize_frame
from elva_hf.frames_elva import FrameSampling, count_video_tokens, fit_grid
from elva_hf.training.toy import encode_text, encode_turns, frames_to_patches

NUM_FRAMES = 60
EVENT_FRAMES = 3
EVENT_COUNTS = (3, 4)
NUM_DIGITS = 8
LOW_SIZE = FRAME_SIZE // 2
GREY, INK, GRAIN = 128, 50, 20
"""Levels of the background, of full ink above and below it, and of the grain, which stands still."""


@dataclass(frozen=True)
class Event:
    """A coloured square: which quadrant it fills (row, column), and its first frame."""

    color: str
    start: int
    quadrant: tuple[int, int]


@dataclass(frozen=True)
class Clip:
    """Everything about one clip; `render` draws it and `ask_clip` asks about it.

    Args:
        seed: Of the clip in its split.
        split: `"train"`, `"validation"` or `"test"`.
        label: The digit.
        digits: Which of the scikit-learn images stand in which cells (row, column).
        events: In order of time.
    """

    seed: int
    split: str
    label: int
    digits: tuple[tuple[int, tuple[int, int]], ...]
    events: tuple[Event, ...]

    def event_at(self, frame: int) -> int | None:
        """Which event a frame shows, if any."""
        shown = (i for i, event in enumerate(self.events) if event.start <= frame < event.start + EVENT_FRAMES)
        return next(shown, None)


def draw_clip(seed: int, split: str) -> Clip:
    """The clip of a seed; each split has its own clips and digits.

    Args:
        seed: 0 or more.
        split: `"train"`, `"validation"` or `"test"`.
    """
    rng = random.Random(f"detail {split} {seed}")
    label = rng.randrange(10)
    cells = rng.sample([(row, column) for row in range(GRID_SIZE) for column in range(GRID_SIZE)], NUM_DIGITS)
    digits = tuple((rng.choice(digit_indices(split)[label]), cell) for cell in cells)
    count = rng.choice(EVENT_COUNTS)
    slot = NUM_FRAMES // count
    events = tuple(
        Event(color, number * slot + rng.randrange(slot - EVENT_FRAMES + 1), (rng.randrange(2), rng.randrange(2)))
        for number, color in enumerate(rng.sample(list(COLORS), count))
    )
    return Clip(seed, split, label, digits, events)


def read_sampling(sampling: str) -> tuple[int, int]:
    """High- and low-resolution frames of `"2+18"`.

    Raises:
        ValueError: It is no such pair.
    """
    parts = sampling.split("+")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f'sampling {sampling!r}: expected frames at high and at low resolution, such as "2+18".')
    return int(parts[0]), int(parts[1])


def choose_frames(sampling: str) -> list[tuple[int, bool]]:
    """Frames of a clip in order of time, each with whether it is shown at high resolution."""
    high, low = read_sampling(sampling)
    plan = FrameSampling(num_high_res_frames=high, num_low_res_frames=low).plan(range(NUM_FRAMES), None)
    return list(zip(plan.indices, plan.high, strict=True))


def count_tokens(sampling: str, patch_size: int = CELL_SIZE) -> int:
    """Visual tokens of a clip, `<FRAME>` and `<LINE>` included, its borders not."""
    sides = [FRAME_SIZE if high else LOW_SIZE for _, high in choose_frames(sampling)]
    grids = [fit_grid(FRAME_SIZE, FRAME_SIZE, patch_size=patch_size, longest_edge=side) for side in sides]
    return count_video_tokens(grids, borders=False)


def render(clip: Clip, chosen: Sequence[tuple[int, bool]]) -> list[np.ndarray]:
    """Draw the chosen frames, `(side, side, 3)` uint8 each, RGB.

    Args:
        clip: What is seen.
        chosen: Numbers of frames, and whether each is at high resolution.
    """
    still = _draw_still(clip)
    drawn: dict[tuple[int | None, bool], np.ndarray] = {}
    for frame, high in chosen:
        key = (clip.event_at(frame), high)
        if key not in drawn:
            drawn[key] = _shrink(_draw_event(still, clip, key[0]), high)
    return [drawn[clip.event_at(frame), high] for frame, high in chosen]


def _draw_still(clip: Clip) -> np.ndarray:
    noise = np.random.Generator(np.random.PCG64([SPLITS.index(clip.split), clip.seed]))
    luminance = GREY + noise.integers(-GRAIN, GRAIN + 1, (FRAME_SIZE, FRAME_SIZE))
    y, x = np.mgrid[:CELL_SIZE, :CELL_SIZE]
    for index, (row, column) in clip.digits:
        ink = digit_images()[0][index] / 255.0 * INK
        top, left = CELL_SIZE * row, CELL_SIZE * column
        area = luminance[top : top + CELL_SIZE, left : left + CELL_SIZE]
        area += np.rint(np.where((y + x) % 2, ink, -ink)).astype(int)
    return np.repeat(luminance[..., None], 3, axis=-1).astype(np.uint8)


def _draw_event(still: np.ndarray, clip: Clip, number: int | None) -> np.ndarray:
    if number is None:
        return still
    frame, event, side = still.copy(), clip.events[number], FRAME_SIZE // 2
    top, left = side * event.quadrant[0], side * event.quadrant[1]
    frame[top : top + side, left : left + side] = COLORS[event.color]
    return frame


def _shrink(frame: np.ndarray, high: bool) -> np.ndarray:
    if high:
        return frame
    return resize_frame(torch.from_numpy(frame), (LOW_SIZE, LOW_SIZE)).permute(1, 2, 0).numpy()


def ask_clip(clip: Clip) -> list[Question]:
    """One question about the detail, two about the order, and one whose answer needs both."""
    first, last, digit = clip.events[0].color, clip.events[-1].color, str(clip.label)
    return [
        Question("detail", "What digit is shown?", digit),
        Question("order", "What color appears first?", first),
        Question("order", "What color appears last?", last),
        Question("both", "What color appears first? What digit is shown?", f"{first} {digit}"),
    ]


def encode_frames(
    frames: Sequence[np.ndarray], asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase, patch_size: int
) -> EncodedSample:
    """One row of a video whose frames may differ in size, and independent questions.

    Args:
        frames: `(H, W, 3)` uint8 each, sides multiples of `patch_size`.
        asked: Questions with their answers.
        tokenizer: Of the toy model.
        patch_size: Side of a patch in pixels.
    """
    grids = tuple((len(frame) // patch_size, frame.shape[1] // patch_size) for frame in frames)
    video = "".join("<FRAME>" + ("<video>" * columns + "<LINE>") * rows for rows, columns in grids)
    row = encode_turns(tokenizer, 0, (1, 1), [(question.text, question.answer) for question in asked])
    ids = [*row.prefix[:-1], *encode_text(tokenizer, video), row.prefix[-1]]
    labels, segments = [IGNORED] * len(ids), [PREFIX] * len(ids)
    for turn, (question, answer) in enumerate(row.turns, start=1):
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
        segments += [turn] * (len(question) + len(answer))
    pixels = torch.cat([frames_to_patches(frame[None], patch_size) for frame in frames])
    return EncodedSample(torch.tensor(ids), torch.tensor(labels), pixels, (grids,), torch.tensor(segments))


class Detail:
    """Clips of `NUM_FRAMES` frames, of which the variant's `sampling` names how many are seen and how."""

    def draw(self, budget: Budget, seed: int, step: int, variant: Variant) -> list[Clip]:
        """See `World`."""
        first = seed * SCENES_PER_SEED + step * budget.batch_size
        return [draw_clip(first + i, "train") for i in range(budget.batch_size)]

    def held_out(self, budget: Budget, split: str, number: int, variant: Variant) -> list[Clip]:
        """See `World`."""
        return [draw_clip(seed, split) for seed in range(number)]

    def ask(
        self, scene: Clip, number: int, tokenizer: PreTrainedTokenizerBase, patch_size: int, variant: Variant
    ) -> Asked:
        """See `World`; `Asked.frames` are those at high resolution, or all where there is none."""
        frames = render(scene, choose_frames(variant.sampling))
        asked = draw_questions(ask_clip(scene), number, random.Random(scene.seed), {})
        sample = encode_frames(frames, asked, tokenizer, patch_size)
        largest = max(len(frame) for frame in frames)
        seen = np.stack([frame for frame in frames if len(frame) == largest])
        return Asked(sample, tuple(question.task for question in asked), len(scene.events), seen)

    def blind(self, budget: Budget, fitted: int, scored: int) -> dict[str, float]:
        """See `World`."""
        known = (ask_clip(draw_clip(seed, "train")) for seed in range(fitted))
        clips = [draw_clip(seed, "test") for seed in range(scored)]
        return blind_by_count(known, [(len(clip.events), ask_clip(clip)) for clip in clips])


def blind_by_count(
    known: Iterable[Sequence[Question]], scored: Sequence[tuple[int, Sequence[Question]]]
) -> dict[str, float]:
    """Share right of the commonest answer to each question string, per column, and per column and count as `"order/3"`.

    Args:
        known: Questions of each scene the answers are counted on.
        scored: Of each scene it is scored on the number of objects, and the questions.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for asked in known:
        for question in asked:
            counts[question.text][question.answer] += 1
    constant = {text: answers.most_common(1)[0][0] for text, answers in counts.items()}
    right: dict[str, list[bool]] = defaultdict(list)
    for count, asked in scored:
        for question in asked:
            for column in (question.task, f"{question.task}/{count}"):
                right[column].append(constant.get(question.text) == question.answer)
    return {column: float(np.mean(right[column])) for column in sorted(right)}


# What the pixels allow


def probe_detail(high: bool, num_clips: int = 1500, seed: int = 0) -> float:
    """Share of test clips whose digit a support vector machine reads, by the majority of the cells with digits.

    It is told which cells those are, and sees 4 px around each; a model is not told.

    Args:
        high: Whether it sees the full resolution.
        num_clips: Training clips; there are a quarter as many test clips.
        seed: Of the first training clip.
    """
    from sklearn.svm import SVC

    def view(clip: Clip) -> list[np.ndarray]:
        margin, scale = 4, 1 if high else FRAME_SIZE // LOW_SIZE
        frame = render(replace(clip, events=()), [(0, high)])[0][..., 0]
        frame = np.pad(frame, margin // scale, mode="edge").astype(np.float32) / 127.5 - 1
        corners = [(CELL_SIZE * row // scale, CELL_SIZE * column // scale) for _, (row, column) in clip.digits]
        side = (CELL_SIZE + 2 * margin) // scale
        return [frame[top : top + side, left : left + side].ravel() for top, left in corners]

    known = [draw_clip(seed + number, "train") for number in range(num_clips)]
    pixels = np.concatenate([view(clip)[:2] for clip in known])
    reader = SVC(C=3.0).fit(pixels, np.repeat([clip.label for clip in known], 2))
    clips = [draw_clip(number, "test") for number in range(num_clips // 4)]
    votes = reader.predict(np.concatenate([view(clip) for clip in clips])).reshape(len(clips), NUM_DIGITS)
    guesses = [Counter(own.tolist()).most_common(1)[0][0] for own in votes]
    return float(np.mean([guess == clip.label for guess, clip in zip(guesses, clips, strict=True)]))


def order_ceiling(sampling: str, clips: Sequence[Clip]) -> float:
    """Most that an answerer of the order can expect who sees every event that a chosen frame shows.

    It names an event that it sees; of one that it missed it guesses a colour that it has not seen.
    """
    frames = [frame for frame, _ in choose_frames(sampling)]
    shares = []
    for clip in clips:
        seen = {clip.event_at(frame) for frame in frames} - {None}
        shares += [1.0 if number in seen else 1 / (len(COLORS) - len(seen)) for number in (0, len(clip.events) - 1)]
    return float(np.mean(shares))
