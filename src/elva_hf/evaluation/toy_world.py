"""Held-out tables of a model on the procedural world: exact match per task, from arrays and from mp4 files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elva_hf.data.toy_world import TASKS, Question, blind_optimum, questions, render, sample_scene, write_mp4

SINGLE_TASKS = ("pattern", "motion", "digit", "where")
"""Tasks whose bar is on scenes with one object; the others are measured on scenes with one to three."""

BARS = {
    "color": 0.95,
    "shape": 0.95,
    "count": 0.95,
    "needle": 0.95,
    "when": 0.95,
    "pattern": 0.95,
    "motion": 0.90,
    "digit": 0.80,
    "where": 0.70,
    "order": 0.60,
}
"""What the shipped checkpoint must reach; the tasks that are missing are reported without a bar."""


@dataclass(frozen=True)
class TaskScore:
    """Exact match of one task, as shares; None where the task does not occur.

    Args:
        task: Name of the task.
        num_questions: Questions of each share.
        array: Scenes with one to three objects, frames given as arrays.
        mp4: The same scenes through encoded mp4 files.
        single: Scenes with one object, through mp4 files.
        swapped: The mixed questions, asked about the video of another scene.
        blind: The best constant answer per question, fitted on training scenes.
        single_blind: The same for scenes with one object.
    """

    task: str
    num_questions: int
    array: float
    mp4: float
    single: float | None
    swapped: float
    blind: float
    single_blind: float | None


@dataclass(frozen=True)
class _Asked:
    seed: int
    question: Question


def draw_questions(num_questions: int, *, single: bool, split: str) -> list[_Asked]:
    """Draw the same number of questions for each task, at most one per task and scene, seed by seed."""
    wanted = {task: num_questions for task in TASKS}
    asked, seed = [], 0
    while any(wanted.values()) and seed < 40 * num_questions:
        scene = sample_scene(seed, split=split, single=single)
        for task in dict.fromkeys(q.task for q in questions(scene)):
            if wanted[task]:
                pool = [q for q in questions(scene) if q.task == task]
                asked.append(_Asked(seed, pool[seed % len(pool)]))
                wanted[task] -= 1
        seed += 1
    return asked


def answer_all(
    model: Any, processor: Any, prompts: Sequence[tuple[Any, str]], batch_size: int, tick: Callable[[int], None]
) -> Iterator[str]:
    """Answer `(video, question)` prompts greedily through the processor's chat template and `generate`."""
    for start in range(0, len(prompts), batch_size):
        chats = [
            [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": text}]}]
            for video, text in prompts[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        ).to(model.device, model.dtype)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        for text in processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
            yield text.strip()
        tick(len(chats))


def evaluate(
    model: Any,
    processor: Any,
    *,
    num_questions: int = 500,
    split: str = "test",
    batch_size: int = 64,
    tick: Callable[[int], None] = lambda count: None,
) -> list[TaskScore]:
    """Score a model on every task of the world.

    Args:
        model: An `ElvaForCausalLM`, or any model that answers through `generate`.
        processor: Its processor.
        num_questions: Questions for each task and column.
        split: Split of the world; `"test"` is for reporting, `"validation"` for choosing.
        batch_size: Prompts generated at once.
        tick: Called with the number of prompts just answered.

    Returns:
        One score per task.
    """
    model.eval()
    mixed = draw_questions(num_questions, single=False, split=split)
    lone = draw_questions(num_questions, single=True, split=split)
    score = _Scorer(model, processor, split, batch_size, tick)
    with tempfile.TemporaryDirectory() as folder:
        columns = {
            "array": score(mixed, lambda asked: _frames(asked.seed, split)),
            "mp4": score(mixed, lambda asked: _mp4(asked.seed, split, Path(folder), single=False)),
            "single": score(lone, lambda asked: _mp4(asked.seed, split, Path(folder), single=True)),
            "swapped": score(mixed, lambda asked: _frames(asked.seed + 1_000_000, split)),
        }
    columns["blind"], columns["single_blind"] = (_blind(flag, split) for flag in (False, True))
    return [
        TaskScore(task, num_questions, **{name: column.get(task) for name, column in columns.items()}) for task in TASKS
    ]


@dataclass(frozen=True)
class _Scorer:
    model: Any
    processor: Any
    split: str
    batch_size: int
    tick: Callable[[int], None]

    def __call__(self, asked: Sequence[_Asked], video_of: Callable[[_Asked], Any]) -> dict[str, float]:
        right: dict[str, list[bool]] = {}
        prompts = _LazyPrompts(asked, video_of)
        answers = answer_all(self.model, self.processor, prompts, self.batch_size, self.tick)
        for item, answer in zip(asked, answers, strict=True):
            right.setdefault(item.question.task, []).append(answer == item.question.answer)
        return {task: float(np.mean(values)) for task, values in right.items()}


@dataclass(frozen=True)
class _LazyPrompts(Sequence):
    """Prompts whose videos are made when they are asked for."""

    asked: Sequence[_Asked]
    video_of: Callable[[_Asked], Any]

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: slice) -> list[tuple[Any, str]]:
        return [(self.video_of(item), item.question.text) for item in self.asked[index]]


def _frames(seed: int, split: str) -> np.ndarray:
    return render(sample_scene(seed, split=split))


def _mp4(seed: int, split: str, folder: Path, *, single: bool) -> str:
    path = folder / f"{'single' if single else 'mixed'}-{seed}.mp4"
    if not path.exists():
        write_mp4(render(sample_scene(seed, split=split, single=single)), path)
    return str(path)


def _blind(single: bool, split: str) -> dict[str, float]:
    train = (sample_scene(seed, single=single) for seed in range(20_000))
    return blind_optimum(train, (sample_scene(seed, split=split, single=single) for seed in range(4_000)))


def format_table(scores: Sequence[TaskScore]) -> str:
    """The scores as a Markdown table, with the bar of each task."""
    names = [
        "task",
        "n",
        "mixed, arrays",
        "mixed, mp4",
        "one object, mp4",
        "video swapped",
        "blind",
        "blind, one",
        "bar",
    ]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for score in scores:
        bar = (
            f"{BARS[score.task]:.2f} ({'one object' if score.task in SINGLE_TASKS else 'mixed'})"
            if (score.task in BARS)
            else "none"
        )
        values = [f"{value:.3f}" if value is not None else "" for value in list(asdict(score).values())[2:]]
        lines.append("| " + " | ".join([score.task, str(score.num_questions), *values, bar]) + " |")
    return "\n".join(lines)


def missed_bars(scores: Sequence[TaskScore], margin_over_blind: float = 0.10) -> list[str]:
    """What falls short: tasks under their bar, and tasks answered too well without the right video."""
    missed = []
    for score in scores:
        columns = (
            {"one object": score.single} if score.task in SINGLE_TASKS else {"arrays": score.array, "mp4": score.mp4}
        )
        missed += [
            f"{score.task} ({name}): {value:.3f} < {BARS[score.task]}"
            for name, value in columns.items()
            if score.task in BARS and value is not None and value < BARS[score.task]
        ]
        if score.task != "rel" and score.swapped > score.blind + margin_over_blind:
            missed.append(
                f"{score.task} (video swapped): {score.swapped:.3f} > {score.blind:.3f} + {margin_over_blind}"
            )
    return missed
