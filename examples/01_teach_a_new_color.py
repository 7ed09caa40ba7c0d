"""Teach the shipped checkpoint a colour it has no word for, and measure what it learned and what it forgot.

    python examples/01_teach_a_new_color.py --out runs/orange

The checkpoint knows six colours and a closed vocabulary. This makes short mp4 clips with a seventh colour and a JSON
file of questions and answers about them in LLaVA's form, runs `elva train lora` on it, and asks before and after: about
the new colour, about other things in the same clips, and about everything the checkpoint could do before. Fine-tuning
on the new clips alone makes it forget much of that; clips of what it knew (replay) in the mixture prevent it.
`--without-replay` shows both.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoModelForCausalLM, AutoProcessor

import elva_hf
from elva_hf.data.toy_world import COLORS, Question, Scene, questions, render, sample_scene, write_mp4
from elva_hf.evaluation.toy_world import answer_all

WORD, RGB = "orange", (245, 140, 30)
PALETTE = {**COLORS, WORD: RGB}
NEW_SCENES, OLD_SCENES = 5_000_000, 6_000_000  # first seeds; the checkpoint was trained on others

Ask = tuple[Scene, Question]


def recolor(scene: Scene) -> Scene:
    """The scene with one of its objects, drawn from the scene's seed, in the new colour."""
    chosen = Random(scene.seed).randrange(len(scene.objects))
    objects = tuple(replace(thing, color=WORD) if i == chosen else thing for i, thing in enumerate(scene.objects))
    return replace(scene, objects=objects)


def about_the_word(scene: Scene) -> list[Question]:
    """Which thing is orange, and what colour it has."""
    return [q for q in questions(scene) if q.task in ("color", "shape") and WORD in f"{q.text} {q.answer}"]


def beside_the_word(scene: Scene) -> list[Question]:
    """The same questions about the other things in the clip, without which all that is near orange becomes orange."""
    return [q for q in questions(scene) if q.task in ("color", "shape") and WORD not in f"{q.text} {q.answer}"]


def about_the_clip(scene: Scene) -> list[Question]:
    """Colour and shape of everything in it."""
    return about_the_word(scene) + beside_the_word(scene)


def write_data(folder: Path, scenes: Sequence[Scene], ask: Any) -> Path:
    """Write clips and a JSON file in LLaVA's form.

    Args:
        folder: Takes one mp4 a scene and `data.json`.
        scenes: What to draw.
        ask: Questions of a scene.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for scene in scenes:
        name = f"{scene.seed}.mp4"
        write_mp4(render(scene, PALETTE), folder / name)
        turns = [(q.text, q.answer) for q in ask(scene)]
        turns[0] = (f"<video>\n{turns[0][0]}", turns[0][1])
        said = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        rows.append({"id": str(scene.seed), "video": name, "conversations": said})
    path = folder / "data.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def some_questions(scene: Scene, count: int) -> list[Question]:
    """A few of a scene's questions."""
    asked = questions(scene)
    return Random(scene.seed).sample(asked, min(count, len(asked)))


def command(options: argparse.Namespace, out: Path, sources: dict[str, Path]) -> list[str]:
    """The `elva train` command line: the `lora` recipe, with what a model of one million parameters needs."""
    fields = {
        "model.path": elva_hf.tiny_checkpoint(),
        "model.gradient_checkpointing": "false",
        "lora.r": 16,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.0,
        "lora.new_words": f"[{WORD}]",
        "training.learning_rate": options.learning_rate,
        "training.max_steps": options.steps,
        "training.batch_size": options.batch_size,
        "training.per_device_train_batch_size": options.batch_size,
        "training.bf16": "false",
        "training.use_cpu": "true",
        "data.num_workers": 1,
    }
    for name, path in sources.items():
        fields |= {f"data.sources.{name}.path": path, f"data.sources.{name}.independent_turns": "true"}
    return ["train", "lora", "--out", str(out), *(f"{name}={value}" for name, value in fields.items())]


def draw_new(count: int, split: str, ask: Any) -> list[Ask]:
    """Held-out clips with the new colour: `count` questions of each task, no two of a task about one clip."""
    by_task: dict[str, list[Ask]] = {"color": [], "shape": []}
    for seed in range(4 * count):
        scene = recolor(sample_scene(seed, split=split))
        for task, chosen in by_task.items():
            chosen += [(scene, question) for question in ask(scene) if question.task == task][:1]
    return [asked for chosen in by_task.values() for asked in chosen[:count]]


def draw_old(count: int, split: str) -> list[Ask]:
    """Held-out questions about what the checkpoint knew: `count` of each task."""
    by_task: dict[str, list[Ask]] = defaultdict(list)
    for seed in range(12 * count):
        scene = sample_scene(seed, split=split)
        for task in {q.task for q in questions(scene)}:
            pool = [q for q in questions(scene) if q.task == task]
            by_task[task].append((scene, pool[seed % len(pool)]))
    return [ask for task in sorted(by_task) for ask in by_task[task][:count]]


def score(model: Any, processor: Any, asked: Sequence[Ask], folder: Path) -> dict[str, float]:
    """Exact match of greedy answers about mp4 clips, for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = []
    for scene, question in asked:
        path = folder / f"{scene.split}-{scene.seed}-{WORD in {thing.color for thing in scene.objects}}.mp4"
        if not path.exists():
            write_mp4(render(scene, PALETTE), path)
        prompts.append((str(path), question.text))
    right = defaultdict(list)
    answers = answer_all(model.eval(), processor, prompts, 64, lambda count: None)
    for (_, question), answer in zip(asked, answers, strict=True):
        right[question.task].append(answer == question.answer)
    return {task: sum(values) / len(values) for task, values in right.items()}


def teach(options: argparse.Namespace, replay: bool) -> tuple[Path, str]:
    """Make the data, run `elva train`; the adapter's folder and what it took."""
    started, spent = time.monotonic(), sum(os.times()[:4])
    first = options.seed * 10_000
    new = [recolor(sample_scene(NEW_SCENES + first + i)) for i in range(options.clips)]
    sources = {"clips": write_data(options.out / "clips", new, about_the_clip)}
    if replay:
        old = [sample_scene(OLD_SCENES + first + i) for i in range(options.clips)]
        sources["replay"] = write_data(
            options.out / "replay", old, partial(some_questions, count=options.replay_questions)
        )
    run = options.out / ("adapter" if replay else "adapter_without_replay")
    line = command(options, run, sources)
    print("elva " + " ".join(line), flush=True)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a model this small gains nothing from more
    subprocess.run([sys.executable, "-m", "elva_hf.cli", *line], check=True, env=one_thread)
    return run / "model", f"{time.monotonic() - started:.0f} s, {sum(os.times()[:4]) - spent:.0f} s of CPU time"


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Score the checkpoint, teach it, score it again; prints a table and returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/orange"), help="folder for clips and adapters")
    parser.add_argument("--clips", type=int, default=300, help="clips of the new colour, and as many of old scenes")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=8, help="clips in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0, help="of the training clips")
    parser.add_argument("--split", default="test", help="where the questions come from; validation is for choosing")
    parser.add_argument("--replay-questions", type=int, default=6, help="questions about each old scene")
    parser.add_argument("--new-questions", type=int, default=200, help="held-out questions of each task on clips of it")
    parser.add_argument("--num-questions", type=int, default=100, help="held-out questions of each old task")
    parser.add_argument("--without-replay", action="store_true", help="train on the new clips alone as well")
    options = parser.parse_args(arguments)

    base = elva_hf.tiny_checkpoint()
    processor = AutoProcessor.from_pretrained(base)
    sheets = {
        WORD: draw_new(options.new_questions, options.split, about_the_word),
        f"beside {WORD}": draw_new(options.new_questions, options.split, beside_the_word),
        "known": draw_old(options.num_questions, options.split),
    }
    models = {"before": base}
    for name, replay in {"without replay": False, "with replay": True}.items():
        if replay or options.without_replay:
            models[name], took = teach(options, replay)
            print(f"{name}: {took} for data and training", flush=True)
    table = {}
    for column, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        marks = {name: score(model, processor, sheet, options.out / "held_out") for name, sheet in sheets.items()}
        table[column] = {f"{name}: {task}": value for name, tasks in marks.items() for task, value in tasks.items()}
        table[column]["known: mean"] = sum(marks["known"].values()) / len(marks["known"])
    print("| task | " + " | ".join(table) + " |\n|" + " --- |" * (1 + len(table)))
    for task in table["before"]:
        print(f"| {task} | " + " | ".join(f"{scores[task]:.3f}" for scores in table.values()) + " |")
    return table


if __name__ == "__main__":
    main()
