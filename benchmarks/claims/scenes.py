"""The procedural world of `elva_hf.data.toy_world` as claims see it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from claims.protocol import Budget, Variant, frames_of_steps
from claims.world import Asked
from elva_hf.data.encoding import EncodedSample
from elva_hf.data.packing import IGNORED, PREFIX
from elva_hf.data.toy_rows import draw_questions
from elva_hf.data.toy_world import Question, Scene, blind_optimum, questions, render, sample_scene
from elva_hf.training.toy import encode_turns, frames_to_patches

SCENES_PER_SEED = 1_000_000_000
SCENES_PER_LENGTH = 10_000_000
FIRST_TUNING_SCENE = 5_000_000


def draw_scene(seed: int, num_frames: int, split: str, single_share: float) -> Scene:
    """The scene of a seed: with one object in `single_share` of all cases, else with one to three."""
    single = random.Random(seed).random() < single_share
    return sample_scene(seed, num_frames=num_frames, split=split, single=single)


def scene_seeds(budget: Budget, seed: int, step: int, variant: Variant) -> tuple[range, int]:
    """Seeds and frames of the scenes of a step, none of which another step or seed has.

    The `n`-th step of videos of some length has the same scenes whatever comes between: trainings that differ in the
    order of their steps see the same videos. Tuning sees none of its base.
    """
    frames = frames_of_steps(variant, budget)
    earlier = frames[:step].count(frames[step]) * budget.batch_size
    first = seed * SCENES_PER_SEED + frames[step] * SCENES_PER_LENGTH + earlier
    first += 0 if variant.base is None else FIRST_TUNING_SCENE
    return range(first, first + budget.batch_size), frames[step]


def encode(
    frames: np.ndarray, asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase, patch_size: int
) -> EncodedSample:
    """One row of a video and independent questions.

    Args:
        frames: `(T, H, W, 3)` uint8.
        asked: Questions with their answers.
        tokenizer: Of the toy model.
        patch_size: Side of a patch in pixels.
    """
    grid = (frames.shape[1] // patch_size, frames.shape[2] // patch_size)
    row = encode_turns(tokenizer, len(frames), grid, [(q.text, q.answer) for q in asked])
    ids, labels, segments = list(row.prefix), [IGNORED] * len(row.prefix), [PREFIX] * len(row.prefix)
    for turn, (question, answer) in enumerate(row.turns, start=1):
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
        segments += [turn] * (len(question) + len(answer))
    pixels, grids = frames_to_patches(frames, patch_size), ((grid,) * len(frames),)
    return EncodedSample(torch.tensor(ids), torch.tensor(labels), pixels, grids, torch.tensor(segments))


class Scenes:
    """Scenes of one to three objects; questions of every task."""

    def draw(self, budget: Budget, seed: int, step: int, variant: Variant) -> list[Scene]:
        """See `World`."""
        seeds, frames = scene_seeds(budget, seed, step, variant)
        return [draw_scene(number, frames, "train", budget.single_share) for number in seeds]

    def held_out(self, budget: Budget, split: str, number: int, variant: Variant) -> list[Scene]:
        """See `World`."""
        return [draw_scene(seed, max(budget.frames), split, budget.single_share) for seed in range(number)]

    def ask(
        self, scene: Scene, number: int, tokenizer: PreTrainedTokenizerBase, patch_size: int, variant: Variant
    ) -> Asked:
        """See `World`."""
        frames = render(scene)
        asked = draw_questions(questions(scene), number, random.Random(scene.seed), {})
        sample = encode(frames, asked, tokenizer, patch_size)
        return Asked(sample, tuple(q.task for q in asked), len(scene.objects), frames)

    def blind(self, budget: Budget, fitted: int, scored: int) -> dict[str, float]:
        """See `World`."""
        frames, share = max(budget.frames), budget.single_share
        known = [draw_scene(seed, frames, "train", share) for seed in range(fitted)]
        return blind_by_number(known, [draw_scene(seed, frames, "test", share) for seed in range(scored)])


def blind_by_number(known: Sequence[Scene], scenes: Iterable[Scene]) -> dict[str, float]:
    """`blind_optimum` per task, and per task and number of objects as `"where/2"`."""
    scenes = list(scenes)
    shares = blind_optimum(known, scenes)
    for count in sorted({len(scene.objects) for scene in scenes}):
        some = [scene for scene in scenes if len(scene.objects) == count]
        shares |= {f"{task}/{count}": value for task, value in blind_optimum(known, some).items()}
    return shares
