"""A needle in a haystack: one frame of many shows a coloured square, at some depth of the video.

The rest is still: grain, and grey handwritten digits in some cells. A large square of one colour lights up for a single
frame, and the one question is its colour. Depth 0 is the first frame, 1 the last.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from claims.detail import blind_by_count
from claims.protocol import Budget, Variant
from claims.scenes import encode, scene_seeds
from claims.world import Asked
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

QUESTION = "What color is the flash?"
MAX_DIGITS = 4


@dataclass(frozen=True)
class Haystack:
    """Everything about one video.

    Args:
        seed: Of the scene in its split.
        split: `"train"`, `"validation"` or `"test"`.
        num_frames: Of the video.
        needle_frame: The frame that shows the needle.
        color: Of the needle.
        quadrant: Of the needle, row and column.
        digits: Index and cell of each of the digits.
    """

    seed: int
    split: str
    num_frames: int
    needle_frame: int
    color: str
    quadrant: tuple[int, int]
    digits: tuple[tuple[int, tuple[int, int]], ...]


def draw_haystack(seed: int, num_frames: int, split: str, depth: float | None = None) -> Haystack:
    """The video of a seed.

    Args:
        seed: 0 or more; each split has its own videos and digits.
        num_frames: Of the video.
        split: `"train"`, `"validation"` or `"test"`.
        depth: Of the needle, 0 to 1; drawn if None. Half of the seeds have it one frame nearer the middle, so that no
            depth falls on even or odd frames alone. Videos of a seed are otherwise the same at every depth.

    Raises:
        ValueError: The depth is outside 0 to 1, or there is no frame.
    """
    if num_frames < 1 or (depth is not None and not 0 <= depth <= 1):
        raise ValueError(f"num_frames={num_frames}, depth={depth}; expected at least one frame and a depth of 0 to 1.")
    rng = random.Random(f"needle {split} {seed}")
    place = rng.random()
    shift = rng.randrange(2)
    if depth is None:
        frame = int(place * num_frames)
    else:
        frame = round(depth * (num_frames - 1)) + (shift if depth < 0.5 else -shift)
        frame = min(max(frame, 0), num_frames - 1)
    cells = rng.sample([(row, column) for row in range(GRID_SIZE) for column in range(GRID_SIZE)], MAX_DIGITS)
    pool = digit_indices(split)
    digits = tuple((rng.choice(rng.choice(pool)), cell) for cell in cells[: rng.randrange(MAX_DIGITS + 1)])
    quadrant = (rng.randrange(2), rng.randrange(2))
    return Haystack(seed, split, num_frames, frame, rng.choice(list(COLORS)), quadrant, digits)


def render(hay: Haystack) -> np.ndarray:
    """Draw it as `(T, 64, 64, 3)` uint8 frames, RGB."""
    noise = np.random.Generator(np.random.PCG64([SPLITS.index(hay.split), hay.seed]))
    still = 20 + noise.integers(0, 7, (FRAME_SIZE, FRAME_SIZE), dtype=np.uint8)
    for index, (row, column) in hay.digits:
        area = (slice(CELL_SIZE * row, CELL_SIZE * (row + 1)), slice(CELL_SIZE * column, CELL_SIZE * (column + 1)))
        still[area] = np.maximum(still[area], digit_images()[0][index])
    luminance = still + noise.integers(0, 4, (hay.num_frames, FRAME_SIZE, FRAME_SIZE), dtype=np.uint8).clip(
        max=255 - still
    )
    frames = np.repeat(luminance[..., None], 3, axis=-1)
    side = FRAME_SIZE // 2
    top, left = side * hay.quadrant[0], side * hay.quadrant[1]
    frames[hay.needle_frame, top : top + side, left : left + side] = COLORS[hay.color]
    return frames


def ask_needle(hay: Haystack) -> list[Question]:
    """The one question."""
    return [Question("needle", QUESTION, hay.color)]


def encode_haystack(hay: Haystack, tokenizer: PreTrainedTokenizerBase, patch_size: int) -> Asked:
    """The video with its question; its objects are the digits that lie in it."""
    frames = render(hay)
    sample = encode(frames, ask_needle(hay), tokenizer, patch_size)
    return Asked(sample, ("needle",), len(hay.digits), frames)


class Needle:
    """Haystacks of the budget's lengths, the needle anywhere; held-out ones have the largest."""

    def draw(self, budget: Budget, seed: int, step: int, variant: Variant) -> list[Haystack]:
        """See `World`."""
        seeds, frames = scene_seeds(budget, seed, step, variant)
        return [draw_haystack(number, frames, "train") for number in seeds]

    def held_out(self, budget: Budget, split: str, number: int, variant: Variant) -> list[Haystack]:
        """See `World`."""
        return [draw_haystack(seed, max(budget.frames), split) for seed in range(number)]

    def ask(
        self, scene: Haystack, number: int, tokenizer: PreTrainedTokenizerBase, patch_size: int, variant: Variant
    ) -> Asked:
        """See `World`."""
        return encode_haystack(scene, tokenizer, patch_size)

    def blind(self, budget: Budget, fitted: int, scored: int) -> dict[str, float]:
        """See `World`."""
        frames = max(budget.frames)
        known = (ask_needle(draw_haystack(seed, frames, "train")) for seed in range(fitted))
        hays = [draw_haystack(seed, frames, "test") for seed in range(scored)]
        return blind_by_count(known, [(len(hay.digits), ask_needle(hay)) for hay in hays])
