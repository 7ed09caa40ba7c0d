"""Rows of the procedural world, made as they are read: `format: toy_world` of a data source."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elva_hf.data.toy_world import (
    HELD_OUT_LOOKS,
    Question,
    Scene,
    questions,
    render,
    sample_scene,
    through_codec,
)
from elva_hf.errors_elva import ConfigurationError


@dataclass(frozen=True)
class ToyRows(Sequence):
    """Videos of the world with their questions; row `i` depends on the fields and `i` alone.

    Args:
        num_videos: Rows.
        num_frames: Frames of a video; 1 for images.
        split: Split of the world.
        first_seed: Scene of the first row.
        questions_per_video: Questions of a row, each independent of the others.
        single_share: Share of scenes with one object.
        codec_share: Share of videos that pass through H.264 on their way.
        focus: Tasks asked more often than the others, and how many times as often.
    """

    num_videos: int
    num_frames: int = 8
    split: str = "train"
    first_seed: int = 0
    questions_per_video: int = 1
    single_share: float = 0.5
    codec_share: float = 0.0
    focus: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_videos", "num_frames", "questions_per_video"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"toy_world: {name}={getattr(self, name)}: expected 1 or more.")

    def __len__(self) -> int:
        return self.num_videos

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        rng = random.Random(self.first_seed * 1_000_003 + index)
        single = rng.random() < self.single_share
        scene = sample_scene(self.first_seed + index, num_frames=self.num_frames, split=self.split, single=single)
        frames = render(scene)
        if rng.random() < self.codec_share:
            frames = through_codec(frames)
        asked = draw_questions(questions(scene), self.questions_per_video, rng, self.focus)
        messages: list[dict[str, Any]] = []
        for i, question in enumerate(asked):
            content = [{"type": "video", "video": frames}] if i == 0 else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        return {"messages": messages, "id": f"toy-{self.split}-{scene.seed}", "independent_turns": True}


def draw_questions(
    asked: Sequence[Question], number: int, rng: random.Random, focus: Mapping[str, float]
) -> list[Question]:
    """Draw questions without repetition: first a task, by weight, then one of its questions."""
    by_task: dict[str, list[Question]] = {}
    for question in asked:
        by_task.setdefault(question.task, []).append(question)
    for pool in by_task.values():
        rng.shuffle(pool)
    drawn = []
    while by_task and len(drawn) < number:
        tasks = sorted(by_task)
        task = rng.choices(tasks, [focus.get(name, 1.0) for name in tasks])[0]
        drawn.append(by_task[task].pop())
        if not by_task[task]:
            del by_task[task]
    return drawn


def open_toy_rows(**options: Any) -> ToyRows:
    """Rows of the world from the options of a data source.

    Raises:
        ConfigurationError: An option is unknown, or a value is none it can have.
    """
    known = ToyRows.__dataclass_fields__
    if unknown := options.keys() - known.keys():
        raise ConfigurationError(f"toy_world: unknown options {sorted(unknown)}; known are {', '.join(known)}.")
    return ToyRows(**options)


def asks_of_held_out_look(question: Question, scene: Scene) -> bool:
    """Whether a question names an object whose colour, shape and pattern are never seen together in training."""
    words = question.text.rstrip("?").split()
    return any(
        (thing.color, thing.shape, thing.pattern) in HELD_OUT_LOOKS and (thing.shape in words or thing.color in words)
        for thing in scene.objects
    )


def named_by_shape(question: Question, scene: Scene) -> Question:
    """The question with its object named by the shape alone, if it was named by the colour."""
    for thing in scene.objects:
        for name in (f"the {thing.color} shape", f"the {thing.color} {thing.shape}"):
            if name in question.text:
                return replace(question, text=question.text.replace(name, f"the {thing.shape}"))
    return question


def name_some_by_shape(asked: Sequence[Question], scene: Scene, rng: random.Random, share: float) -> list[Question]:
    """The questions, `share` of which name their object by its shape alone, whatever they said."""
    if not share:
        return list(asked)
    return [named_by_shape(question, scene) if rng.random() < share else question for question in asked]
