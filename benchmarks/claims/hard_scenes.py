"""Scenes that merging may find hard, each beside itself made easy: the same objects, the same questions.

Where something moves it is one object, so that what is lost is lost by the condition and not by a crowd.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from claims.protocol import Budget, Variant
from claims.scenes import Scenes, draw_scene, encode, scene_seeds
from claims.world import Asked
from elva_hf.data.toy_rows import draw_questions
from elva_hf.data.toy_world import (
    CELL_SIZE,
    COLORS,
    OBJECT_SIZE,
    Scene,
    SceneObject,
    blind_optimum,
    questions,
    render,
    sample_scene,
)

CONDITIONS = ("easy", "fast", "small", "drift")
"""Two frames a cell; one frame a cell; 5 px instead of 13; changing light and a trembling camera."""

HARD_TASKS = ("color", "where", "motion")
SMALL = 5
SLOW_INTERVAL, FAST_INTERVAL = 2, 1
HARD_EVERY = 3
DRIFT = 0.15
"""Deviation of the change of brightness from frame to frame."""


@dataclass(frozen=True)
class HardScene:
    """A scene and what is done to it."""

    scene: Scene
    condition: str


def pace(thing: SceneObject, interval: int, num_frames: int) -> SceneObject:
    """The same way at so many frames a cell; it begins after the second frame and ends before the last."""
    path = list(dict.fromkeys(thing.cells))
    start = (num_frames - interval * (len(path) - 2)) // 2 if len(path) > 1 else num_frames
    done = [min(max((frame - start) // interval + 1, 0), len(path) - 1) for frame in range(num_frames)]
    return replace(thing, cells=tuple(path[count] for count in done))


def hard_scene(seed: int, num_frames: int, split: str, condition: str) -> HardScene:
    """The scene of a seed under a condition, without a flash."""
    scene = sample_scene(seed, num_frames=num_frames, split=split, single=True)
    interval = FAST_INTERVAL if condition == "fast" else SLOW_INTERVAL
    things = tuple(pace(thing, interval, num_frames) for thing in scene.objects)
    return HardScene(replace(scene, objects=things, flash_frame=None), condition)


def draw_hard(hard: HardScene) -> np.ndarray:
    """`(T, 64, 64, 3)` uint8 frames."""
    if hard.condition == "small":
        return _draw_small(hard.scene)
    frames = render(hard.scene)
    return _let_drift(frames, hard.scene.seed) if hard.condition == "drift" else frames


def _draw_small(scene: Scene) -> np.ndarray:
    frames = render(replace(scene, objects=()))
    y, x = np.mgrid[:SMALL, :SMALL] - SMALL // 2
    radius = np.hypot(y, x)
    masks = {
        "circle": radius < 2.5,
        "square": radius < SMALL,
        "triangle": abs(x) <= (y + 2) / 2,
        "cross": np.minimum(abs(y), abs(x)) == 0,
        "ring": (radius < 2.5) & (radius > 0),
    }
    margin = 1 + (OBJECT_SIZE - SMALL) // 2
    for thing in scene.objects:
        color = (thing.brightness * np.array(COLORS[thing.color])).astype(np.uint8)
        for frame in range(thing.entry, len(frames)):
            top, left = (
                CELL_SIZE * place + margin + offset
                for place, offset in zip(thing.cells[frame], thing.jitter, strict=True)
            )
            frames[frame, top : top + SMALL, left : left + SMALL][masks[thing.shape]] = color
    return frames


def _let_drift(frames: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    light = np.exp(rng.normal(0, DRIFT, len(frames)).cumsum())
    shifts = rng.integers(-1, 2, (len(frames), 2))
    moved = [np.roll(frame, tuple(shift), (0, 1)) for frame, shift in zip(frames, shifts, strict=True)]
    return np.clip(np.stack(moved) * light[:, None, None, None], 0, 255).astype(np.uint8)


def _is_asked(task: str, scene: HardScene) -> bool:
    if scene.scene.split != "train":
        return task in HARD_TASKS
    return scene.condition != "small" or task not in ("shape", "pattern")  # 5 px do not show them


class MixedScenes(Scenes):
    """Trained on `Scenes` of which every third is a hard one, in turn of each condition; evaluated on `Scenes`."""

    def draw(self, budget: Budget, seed: int, step: int, variant: Variant) -> list[Scene | HardScene]:
        """See `World`."""
        seeds, frames = scene_seeds(budget, seed, step, variant)
        return [
            draw_scene(number, frames, "train", budget.single_share)
            if number % HARD_EVERY
            else hard_scene(number, frames, "train", CONDITIONS[number // HARD_EVERY % len(CONDITIONS)])
            for number in seeds
        ]

    def ask(
        self,
        scene: Scene | HardScene,
        number: int,
        tokenizer: PreTrainedTokenizerBase,
        patch_size: int,
        variant: Variant,
    ) -> Asked:
        """See `World`."""
        if isinstance(scene, Scene):
            return super().ask(scene, number, tokenizer, patch_size, variant)
        frames = draw_hard(scene)
        known = [question for question in questions(scene.scene) if _is_asked(question.task, scene)]
        asked = draw_questions(known, number, random.Random(scene.scene.seed), {})
        sample = encode(frames, asked, tokenizer, patch_size)
        columns = tuple(f"{question.task}, {scene.condition}" for question in asked)
        return Asked(sample, columns, len(scene.scene.objects), frames)


class HardScenes(MixedScenes):
    """As `MixedScenes`, evaluated under each of `CONDITIONS`; columns are `"motion, fast"`."""

    def held_out(self, budget: Budget, split: str, number: int, variant: Variant) -> list[HardScene]:
        """So many scenes under each condition, the same ones."""
        frames = max(budget.frames)
        return [hard_scene(seed, frames, split, condition) for condition in CONDITIONS for seed in range(number)]

    def blind(self, budget: Budget, fitted: int, scored: int) -> dict[str, float]:
        """The same under every condition, which the questions do not say."""
        frames = max(budget.frames)
        known, scenes = (_still_asked(frames, split, number) for split, number in (("train", fitted), ("test", scored)))
        shares = blind_optimum(known, scenes)
        return {f"{task}, {condition}": shares[task] for task in HARD_TASKS for condition in CONDITIONS}


def _still_asked(num_frames: int, split: str, number: int) -> Sequence[Scene]:
    return [hard_scene(seed, num_frames, split, CONDITIONS[0]).scene for seed in range(number)]
