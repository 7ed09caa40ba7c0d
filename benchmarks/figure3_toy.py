"""Figure 3 at toy scale: accuracy against kept tokens, merging inside the decoder against pooling before it.

    python benchmarks/figure3_toy.py             # test split: both methods, what max_run and ratio_of do, the plot
    python benchmarks/figure3_toy.py --choose    # validation split: which schedule costs nothing
    python benchmarks/figure3_toy.py --model DIR --name NAME    # other weights

The checkpoint, as it is, answers questions about held-out scenes of the procedural world. Merging runs as
`merge_schedule` says. The baseline averages neighbouring tokens "directly after the patch embedding layer" (section
4.2): the same place of neighbouring frames, or 2x2 places of one frame, before layer 0. As in merging, a mean stands
at the position of its last member, and <FRAME> and <LINE> are kept unless the setting says otherwise.

Answers are greedy: a question counts as right if every token of its answer, the end included, is the most likely one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line_chart import Series, draw_chart
from measuring import RESULTS, Meter, markdown_table, provenance, write_results
from PIL import Image
from pooling import Pooling, embed, pooling_matrix
from torch import Tensor
from transformers import AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache

import elva_hf
from elva_hf.data.collator import IGNORED
from elva_hf.data.toy_world import TASKS, Question, render, sample_scene
from elva_hf.evaluation.toy_world import draw_questions
from elva_hf.geometry_elva import read_geometry
from elva_hf.training.toy import encode_turns, frames_to_patches

LONE_TASKS = ("pattern", "where", "digit", "motion", "moving")
"""Tasks that the checkpoint knows on scenes with one object only; asked about those and about mixed scenes."""
LONE = ", one object"
COLUMNS = (*TASKS, *(task + LONE for task in LONE_TASKS))
GRID = (4, 4)
Row = dict[str, Any]

TOLERANCE = 0.01
"""What a schedule may cost in any column to be chosen."""


@dataclass(frozen=True)
class Setting:
    """One point of the comparison: a schedule (a value of `merge_schedule`) or a pooling; a family shares a line."""

    name: str
    family: str = ""
    how: Any = "none"


def ratio_steps(*steps: tuple[int, float], **options: Any) -> dict[str, Any]:
    """A schedule of ratio steps, `(layer, ratio)` each."""
    return {"steps": [{"layer": layer, "target_ratio": ratio} for layer, ratio in steps], **options}


def thresholds(value: float, *layers: int, **options: Any) -> dict[str, Any]:
    """A schedule with one threshold at several layers."""
    return {"steps": [{"layer": layer, "similarity_threshold": value} for layer in layers], **options}


BASE = Setting("none", "none")
RATIOS = (0.75, 0.5, 0.25, 0.125)
TWO_STEPS = [*thresholds(0.6, 2)["steps"], *ratio_steps((3, 0.5))["steps"]]
FIGURE = (
    BASE,
    *(Setting(f"ratio {r} at layer {at}", f"merge {at}", ratio_steps((at, r))) for at in (1, 2, 3) for r in RATIOS),
    *(Setting(f"threshold 0.6 at layer {at}", "threshold", thresholds(0.6, at)) for at in (1, 2, 3)),
    Setting("preset paper", "preset", "paper"),
    Setting("preset table5", "preset", "table5"),
    Setting("threshold 0.6 at layer 2, ratio 0.5 at layer 3", "two steps", TWO_STEPS),
    *(Setting(f"pool to {n} of 8 frames", "pool", Pooling(n)) for n in (7, 6, 5, 4, 3, 2, 1)),
    *(Setting(f"pool to {n} of 8 frames, marks too", "pool marks", Pooling(n, marks=True)) for n in (6, 4, 2, 1)),
    Setting("pool 2x2 places", "pool 2x2", Pooling(side=2)),
)
OPTIONS = tuple(
    Setting(f"{name}, max_run {max_run}", "", {"steps": steps, "max_run": max_run, "ratio_of": of})
    for name, steps, of in (
        ("threshold 0.6 at layer 1", thresholds(0.6, 1)["steps"], "current"),
        ("ratio 0.25 at layer 1", ratio_steps((1, 0.25))["steps"], "current"),
        ("paper, ratio of current", "paper", "current"),
        ("paper, ratio of input", "paper", "input"),
        ("table5, ratio of current", "table5", "current"),
        ("table5, ratio of input", "table5", "input"),
    )
    for max_run in (None, 4, 2)
)
CANDIDATES = (
    BASE,
    *(Setting(f"ratio {r} at layer {at}", "", ratio_steps((at, r))) for at in (1, 2, 3) for r in (0.9, *RATIOS)),
    *(Setting(f"threshold 0.6 at layer {at}", "", thresholds(0.6, at)) for at in (1, 2, 3)),
    Setting("preset paper", "", "paper"),
    Setting("preset table5", "", "table5"),
    Setting("threshold 0.6 at layer 2, ratio 0.5 at layer 3", "", TWO_STEPS),
)


# Questions


@dataclass
class Batch:
    """Scenes with their questions, as token ids.

    Args:
        frames: Per scene `(T, 64, 64, 3)` uint8.
        prefix: `(N,)` ids up to the end of the video, the same for every scene.
        scene: `(Q,)` scene of each question.
        input_ids: `(Q, L)` question and answer, padded on the right.
        labels: `(Q, L)` the answers' ids, `IGNORED` elsewhere.
        columns: Column of each question.
    """

    frames: list[np.ndarray]
    prefix: Tensor
    scene: Tensor
    input_ids: Tensor
    labels: Tensor
    columns: list[str]


def draw_quiz(num_questions: int, split: str) -> dict[tuple[int, bool], list[Question]]:
    """Questions by scene, `(seed, single)`: so many for each task, and again on lone objects where that is a column."""
    quiz: dict[tuple[int, bool], list[Question]] = {}
    for single in (False, True):
        for asked in draw_questions(num_questions, single=single, split=split):
            if not single or asked.question.task in LONE_TASKS:
                quiz.setdefault((asked.seed, single), []).append(asked.question)
    return quiz


def batch_quiz(quiz: dict[tuple[int, bool], list[Question]], split: str, tokenizer: Any, size: int) -> list[Batch]:
    """Batches of `size` scenes; every question of a scene reads the same cached video."""
    scenes = list(quiz.items())
    return [_batch(scenes[start : start + size], split, tokenizer) for start in range(0, len(scenes), size)]


def _batch(scenes: Sequence[tuple[tuple[int, bool], list[Question]]], split: str, tokenizer: Any) -> Batch:
    frames, rows, owners, columns = [], [], [], []
    for number, ((seed, single), asked) in enumerate(scenes):
        frames.append(render(sample_scene(seed, split=split, single=single)))
        row = encode_turns(tokenizer, len(frames[-1]), GRID, [(q.text, q.answer) for q in asked])
        rows += row.turns
        owners += [number] * len(asked)
        columns += [q.task + LONE * single for q in asked]
    length = max(len(question) + len(answer) for question, answer in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (question, answer) in enumerate(rows):
        input_ids[i, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[i, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    return Batch(frames, torch.tensor(row.prefix), torch.tensor(owners), input_ids, labels, columns)


# Running


def read_videos(model: Any, batch: Batch, how: Any) -> tuple[Cache, list[float]]:
    """Run the videos of a batch; the filled cache, and the mean tokens entering each layer."""
    pixels = torch.cat([frames_to_patches(frames, model.config.patch_size) for frames in batch.frames])
    input_ids = batch.prefix.expand(len(batch.frames), -1)
    if not isinstance(how, Pooling):
        outputs = model.model(input_ids=input_ids, pixel_values_videos=pixels, merge_schedule=how, use_cache=True)
        return outputs.past_key_values, count_tokens(outputs.past_key_values)
    matrix, positions = pooling_matrix(read_geometry(model.model.token_kinds(input_ids[:1])), input_ids.shape[1], how)
    outputs = model.model.language_model(
        inputs_embeds=matrix @ embed(model, input_ids, pixels),
        position_ids=positions.expand(len(input_ids), -1),
        past_key_values=DynamicCache(),  # also tells transformers that gaps in the positions are no packed sequences
        use_cache=True,
    )
    return outputs.past_key_values, count_tokens(outputs.past_key_values)


def count_tokens(cache: Cache) -> list[float]:
    """Mean number of tokens of a sample that entered each layer, from its cache."""
    tokens = getattr(cache, "tokens_per_layer", None)
    if tokens is None:
        return [float(layer.keys.shape[-2]) for layer in cache.layers]
    return tokens.double().mean(1).tolist()


def grade(model: Any, batch: Batch, cache: Cache, how: Any) -> list[bool]:
    """Ask the questions of a batch on its cached videos; whether each answer is right."""
    cache.batch_select_indices(batch.scene)
    positions = len(batch.prefix) + torch.arange(batch.input_ids.shape[1])
    outputs = model(
        input_ids=batch.input_ids,
        position_ids=positions.expand_as(batch.input_ids),
        past_key_values=cache,
        merge_schedule="none" if isinstance(how, Pooling) else how,
    )
    logits, wanted = outputs.logits[:, :-1], batch.labels[:, 1:]
    logits[..., model.generation_config.suppress_tokens] = -torch.inf  # as generate() does
    return ((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1).tolist()


@dataclass
class Score:
    """What one setting reached.

    Args:
        setting: Which.
        tokens: Mean visual tokens entering each layer.
        right: Per column whether each question was answered right, in the order of the quiz.
    """

    setting: Setting
    tokens: list[float]
    right: dict[str, np.ndarray]

    def as_row(self, base: Score) -> Row:
        """The figures of a result file; `lost` is against another setting on the same questions."""
        gaps = [base.right[name].astype(float) - values for name, values in self.right.items()]
        variance = sum(gap.var(ddof=1) / len(gap) for gap in gaps)
        how = vars(self.setting.how) if isinstance(self.setting.how, Pooling) else self.setting.how
        return {
            "setting": self.setting.name,
            "family": self.setting.family,
            "how": how,
            "visual_tokens_per_layer": [round(count, 2) for count in self.tokens],
            "mean_tokens": round(float(np.mean(self.tokens)), 2),
            "mean_accuracy": round(float(np.mean([values.mean() for values in self.right.values()])), 5),
            "lost": round(float(np.mean([gap.mean() for gap in gaps])), 5),
            "lost_standard_error": round(math.sqrt(variance) / len(gaps), 5),
            "accuracy": {name: round(float(values.mean()), 5) for name, values in self.right.items()},
        }


@torch.inference_mode()
def run(model: Any, batches: Sequence[Batch], setting: Setting) -> Score:
    """Answer every question under one setting."""
    right: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    tokens = np.zeros(model.config.text_config.num_hidden_layers)
    for batch in batches:
        cache, per_layer = read_videos(model, batch, setting.how)
        text = len(batch.prefix) - visual_tokens(model, batch.prefix)
        tokens += (np.array(per_layer) - text) * len(batch.frames)
        for column, good in zip(batch.columns, grade(model, batch, cache, setting.how), strict=True):
            right[column].append(good)
    tokens /= sum(len(batch.frames) for batch in batches)
    shares = {name: np.array(values) for name, values in right.items() if values}
    return Score(setting, tokens.tolist(), shares)


def visual_tokens(model: Any, ids: Tensor) -> int:
    """Patches, `<FRAME>` and `<LINE>` of a row of ids; the borders of a video count as text."""
    config = model.config
    wanted = torch.tensor([config.video_token_id, config.frame_token_id, config.line_token_id])
    return int(torch.isin(ids, wanted).sum())


# Reporting, all of it from the rows of a result file


def pooling_rival(rows: Sequence[Row], row: Row) -> float | None:
    """What pooling in time reaches at the mean tokens of a merging, on the line between its nearest settings."""
    if row["family"].startswith(("none", "pool")):
        return None
    points = sorted((r["mean_tokens"], r["mean_accuracy"]) for r in rows if r["family"] in ("none", "pool"))
    counts, means = zip(*points, strict=True)
    inside = counts[0] <= row["mean_tokens"] <= counts[-1]
    return float(np.interp(row["mean_tokens"], counts, means)) if inside else None


def worst_column(row: Row, base: Row) -> tuple[str, float]:
    """The column that loses most against another setting, and how much."""
    gaps = {name: base["accuracy"][name] - share for name, share in row["accuracy"].items()}
    return max(gaps.items(), key=lambda item: item[1])


def choose(rows: Sequence[Row], tolerance: float = TOLERANCE) -> Row:
    """The setting with the fewest tokens of those that lose at most `tolerance` in every column."""
    fit = [row for row in rows if worst_column(row, rows[0])[1] <= tolerance + 1e-9]
    return min(fit, key=lambda row: row["mean_tokens"])


SUMMARY = ("setting", "tokens, mean of layers", "tokens, last layer", "mean accuracy", "lost")


def summary(row: Row) -> list[str]:
    """The cells under `SUMMARY`."""
    counts = (row["mean_tokens"], row["visual_tokens_per_layer"][-1])
    lost = f"{row['lost']:.3f} ± {row['lost_standard_error']:.3f}"
    return [row["setting"], *(f"{count:.1f}" for count in counts), f"{row['mean_accuracy']:.3f}", lost]


def figure_table(rows: Sequence[Row]) -> str:
    """Tokens and accuracy of every setting; for merging also what pooling reaches at equal tokens."""
    rivals = ["" if (rival := pooling_rival(rows, row)) is None else f"{rival:.3f}" for row in rows]
    table = [[*summary(row), rival] for row, rival in zip(rows, rivals, strict=True)]
    return markdown_table([*SUMMARY, "pooling, equal mean tokens"], table)


def worst_table(rows: Sequence[Row], base: Row) -> str:
    """Tokens and accuracy of every setting, and the column that loses most."""
    worst = [worst_column(row, base) for row in rows]
    table = [[*summary(row), f"{column}: {lost:.3f}"] for row, (column, lost) in zip(rows, worst, strict=True)]
    return markdown_table([*SUMMARY, "worst column, lost"], table)


def column_table(rows: Sequence[Row]) -> str:
    """Accuracy of every setting in every column."""
    table = [[row["setting"], *(f"{share:.3f}" for share in row["accuracy"].values())] for row in rows]
    return markdown_table(["setting", *rows[0]["accuracy"]], table)


def draw_figure(rows: Sequence[Row]) -> Image.Image:
    """Mean accuracy over tokens, mean of layers on the left and entering the last layer on the right."""
    names = {
        "merge 1": "merging, one ratio step at layer 1",
        "merge 2": "merging, one ratio step at layer 2",
        "merge 3": "merging, one ratio step at layer 3",
        "pool": "average pooling in time after the patch embedding",
        "pool marks": "the same, <FRAME> and <LINE> pooled too",
        "threshold": "merging, threshold 0.6 at layer 1, 2, 3",
        "preset": "merging, presets paper and table5",
        "two steps": "merging, threshold 0.6 at layer 2, ratio 0.5 at layer 3",
    }
    series = []
    for family, name in names.items():
        joined = family.startswith(("merge", "pool"))
        line = [row for row in rows if row["family"] in ((family, "none") if joined else (family,))]
        left = [(row["mean_tokens"], row["mean_accuracy"]) for row in line]
        right = [(row["visual_tokens_per_layer"][-1], row["mean_accuracy"]) for row in line]
        series.append(Series(name, [left, right], joined))
    labels = ("visual tokens, mean of the layers", "visual tokens entering the last layer")
    return draw_chart("Merging inside the decoder against pooling before it", "mean accuracy", labels, series)


FIGURE_TEXT = """# Merging against pooling on the toy world

Measured: `{command}`, {device}, commit {commit}, {date}, {seconds:.0f} s of CPU time.
{questions} questions for each of the {columns} columns of the second table, {split} split. {weights}

Tokens are visual ones: 8 frames of 16 patches, 4 `<LINE>` and 1 `<FRAME>` make 168. Neither merging nor pooling touches
the 40 marks, unless the setting says so; they are 24% of the tokens here and 4% of the paper's. `lost` is what the mean
of the columns loses against no merging on the same questions, with its standard error. The last column is what pooling
in time, marks kept, reaches at as many tokens in the mean of the layers, read from the line through its settings:
merging is ahead in {ahead} of {compared} settings.

![accuracy over tokens]({name}.png)

{figure}

Accuracy by task, on scenes with one to three objects and, where said, with one:

{by_task}

## What max_run and ratio_of do

`max_run` caps how many frames a token stands for. It forbids pairs, so a ratio that wants more than are left merges
them all, alike or not. `ratio_of` says of what a ratio step after other steps takes its share.

{options}
"""

CHOICE_TEXT = """# Which schedule costs nothing on the toy world

Measured: `{command}`, {device}, commit {commit}, {date}, {seconds:.0f} s of CPU time.
{questions} questions for each of the {columns} columns of the second table, {split} split. {weights}

The rule, fixed beforehand: of the schedules that lose at most {tolerance} in every column, the one with the fewest
tokens. It chooses **{chosen}**.

{candidates}

{by_task}
"""


def render_figure(result: dict[str, Any]) -> str:
    """The Markdown of a comparison."""
    rows = result["figure"]
    rivals = [(row["mean_accuracy"], rival) for row in rows if (rival := pooling_rival(rows, row)) is not None]
    return FIGURE_TEXT.format(
        **{**result, "figure": figure_table(rows), "options": worst_table(result["options"], rows[0])},
        weights=describe_weights(result["trained_with"]),
        ahead=sum(own > rival for own, rival in rivals),
        compared=len(rivals),
        by_task=column_table(rows),
    )


def render_choice(result: dict[str, Any]) -> str:
    """The Markdown of a choice."""
    rows = result["candidates"]
    return CHOICE_TEXT.format(
        **{**result, "candidates": worst_table(rows, rows[0])},
        weights=describe_weights(result["trained_with"]),
        by_task=column_table(rows),
    )


def describe_weights(schedule: str | list | dict) -> str:
    """What the weights were trained with, and so which method they favour."""
    if schedule == "none":
        return "The weights were trained with neither merging nor pooling."
    return f"The weights were last trained with merging on (`{schedule}`), which favours merging."


def main() -> None:
    """Run one of the two studies and write its files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose", action="store_true", help="compare schedules on the validation split")
    parser.add_argument("--model", type=Path, default=elva_hf.tiny_checkpoint())
    parser.add_argument("--questions", type=int, help="for each column (200; 500 to choose)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the files (figure3-toy; tiny-schedule to choose)")
    options = parser.parse_args()
    split = "validation" if options.choose else "test"
    questions = options.questions or (500 if options.choose else 200)
    torch.set_num_threads(1)
    model = elva_hf.ElvaForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with Meter("cpu", memory=False) as meter:
        batches = batch_quiz(draw_quiz(questions, split), split, tokenizer, size=32)
        scores = [run(model, batches, setting) for setting in (CANDIDATES if options.choose else (*FIGURE, *OPTIONS))]
    rows = [score.as_row(scores[0]) for score in scores]
    result = {
        **provenance("cpu"),
        "seconds": round(meter.seconds, 1),
        "trained_with": model.config.merge_schedule,
        "split": split,
        "questions": questions,
        "columns": len(COLUMNS),
    }
    if options.choose:
        result |= {"tolerance": TOLERANCE, "chosen": choose(rows)["setting"], "candidates": rows}
        write_results(options.out, options.name or "tiny-schedule", result, render_choice(result))
        return
    result |= {"name": options.name or "figure3-toy", "figure": rows[: len(FIGURE)], "options": rows[len(FIGURE) :]}
    write_results(options.out, result["name"], result, render_figure(result))
    draw_figure(result["figure"]).save(options.out / f"{result['name']}.png", optimize=True)


if __name__ == "__main__":
    main()
