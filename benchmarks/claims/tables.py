"""The Markdown and the plot of a claim, from its result file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from line_chart import Series, draw_chart
from measuring import markdown_table
from PIL import Image

from claims.protocol import CONFIDENCE, FLOOR, LEVEL, RESAMPLES

Result = dict[str, Any]

OPTIMIZERS = {
    "adamw": "AdamW",
    "muon": "Muon for the matrices of the layers, where the paper has AdamW, and AdamW for the rest",
}
OUTCOMES = ("final accuracy", "accuracy before tuning", "accuracy at equal tokens", "steps saved")

TEXT = """# {title}

{paper}. Measured: commit {commit}; {date}; {device}; Python {python}, torch {torch}, transformers {transformers}. Made
by `{command}` from {num_runs} runs: {num_seeds} seeds ({seeds}), {trained}, {questions}
questions a video, {frames} frames, world `{world}`, optimiser {optimizer}. {notes}

{made}

A run's final accuracy is on {test_scenes} test scenes, asked once; steps to {level:.0%} are the first evaluation (every
{evaluate_every} steps, {validation_scenes} validation scenes) at {level:.0%} or above that none under {floor:.0%}
follows, runs that never get there counted with all their steps. Answers are exact matches, given the tokens before
them. Columns: {columns}; `task/2` is scenes with two objects.{tuning}

{variants}

{verdicts}

Differences are within a seed, over the mean of the columns, and positive where the paper's variant is better; n is the
number of seeds. {confidence:.0%} intervals: bootstrap over seeds ({resamples:,} resamples), and Student's t. Confirmed
(or contradicted): both intervals lie above (below) 0; otherwise not seen, and "visible" is the smallest difference that
could have been seen. At equal tokens both are read from the validation curves where the run with fewer tokens ended.

![curves](claims-{name}.png)

{by_column}

Single columns have no verdict, and no interval is corrected for the number of comparisons. "Blind" is the best answerer
that never looks: the commonest answer to each question, counted on {blind_scenes}.{swapped}
"""
TUNING = """

Runs that start from another's weights train {steps} steps more, or none, with tokens counted from there. "Before
tuning" is the test split answered with the weights they start from."""
SWAPPED = """ "Other video" asks the trained model each test question about another scene's video."""


def render(result: Result) -> str:
    """The Markdown of a result."""
    budget = result["budget"]
    lists = {"columns": "; ".join(result["columns"]), "seeds": ", ".join(map(str, result["seeds"]))}
    trained = f"{budget['steps']} steps of {budget['batch_size']} videos each"
    if not any(row["steps"] for row in result["variants"]):
        trained = "nothing trained"
    tuned = any(row["untuned"] for row in result["variants"])
    return TEXT.format(
        **{
            **budget,
            **result,
            **lists,
            "frames": " and ".join(map(str, budget["frames"])),
            "optimizer": OPTIMIZERS[budget["optimizer"]],
            "variants": variant_table(result),
        },
        trained=trained,
        made="\n".join(f"- {row['variant']}: {describe(row['made'])}." for row in result["variants"]),
        tuning=TUNING.format(steps=budget["tuning_steps"]) if tuned else "",
        swapped=SWAPPED if any(row["swapped"] for row in result["variants"]) else "",
        num_seeds=len(result["seeds"]),
        num_runs=len(result["seeds"]) * len(result["variants"]),
        level=LEVEL,
        floor=FLOOR,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        verdicts=_verdict_table(result),
        by_column=column_table(result),
    )


def describe(variant: Mapping[str, Any]) -> str:
    """How a variant was made, in words; whatever a variant may have is named."""
    said = []
    if variant.get("base"):
        said.append(f"starts from the weights of `{variant['base']}`, same seed")
    if variant.get("config"):
        said.append("config " + _fields(variant["config"]))
    if variant.get("guidance") is None:
        said.append("no teacher")
    else:
        said.append(f"teacher `{variant.get('teacher', 'looks')}` with {_fields(variant['guidance'])}")
    if variant.get("phases"):
        parts = [f"{phase['share']:.0%} of the steps on {_counts(phase['frames'])}" for phase in variant["phases"]]
        said.append(", then ".join(parts))
    if variant.get("reduction"):
        said.append("patches reduced: " + _fields(_meant(variant["reduction"])))
    if variant.get("sampling"):
        said.append(f"frames `{variant['sampling']}`")
    if not variant.get("tuned", True):
        said.append("not tuned")
    if variant.get("share", 1.0) != 1.0:
        said.append(f"{variant['share']:.0%} of the steps")
    known = {"name", "share", "tuned", "base", "config", "guidance", "teacher", "phases", "reduction", "sampling"}
    rest = {name: value for name, value in variant.items() if name not in known and value}
    return "; ".join([*said, _fields(rest)] if rest else said)


def _meant(reduction: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schedule stands instead of ratio and layer."""
    if reduction.get("schedule") is None:
        return reduction
    return {name: value for name, value in reduction.items() if name not in ("ratio", "layer")}


def _fields(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _counts(frames: Sequence[int]) -> str:
    return " and ".join(map(str, frames)) + (" frame" if tuple(frames) == (1,) else " frames")


# Tables


def mean_of_columns(shares: Mapping[str, Sequence[float]]) -> float:
    """Mean over columns and seeds."""
    return float(np.mean(list(shares.values())))


def variant_table(result: Result) -> str:
    """Size, cost and accuracy of each variant; columns without figures are left out."""
    rows = result["variants"]
    table = {
        "variant": [row["variant"] for row in rows] + ["blind"],
        "parameters": [row["parameters"] for row in rows],
        "steps": [row["steps"] for row in rows],
        "tokens": [round(float(np.mean(row["tokens"]))) for row in rows],
        "patches kept": [f"{row['visual_share']:.2f}" for row in rows],
        "before tuning": [mean_of_columns(row["untuned"]) if row["untuned"] and row["steps"] else None for row in rows],
        "accuracy": [mean_of_columns(row["final"]) for row in rows] + [float(np.mean(list(result["blind"].values())))],
        "over seeds": [_range(np.mean(list(row["final"].values()), 0)) for row in rows],
        "other video": [mean_of_columns(row["swapped"]) if row["swapped"] else None for row in rows],
        f"steps to {LEVEL:.0%}": [float(np.mean(list(row["restricted_steps"].values()))) for row in rows],
        "reached": [f"{_reached(row)} of {len(result['columns']) * len(result['seeds'])}" for row in rows],
    }
    if all(row["visual_share"] == 1 for row in rows):
        del table["patches kept"]
    table = {name: cells for name, cells in table.items() if any(cell is not None for cell in cells)}
    cells = [values + [None] * (len(rows) + 1 - len(values)) for values in table.values()]
    return markdown_table(list(table), zip(*cells, strict=True))


def _reached(row: Result) -> int:
    return sum(value is not None for values in row["steps_to_level"].values() for value in values)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def told_outcomes(pair: Result) -> list[str]:
    """The outcomes that a pair has; of runs that train no further, before tuning and final are one."""
    told = [outcome for outcome in OUTCOMES if pair[outcome] is not None]
    return [name for name in told if name != "accuracy before tuning" or pair[name] != pair["final accuracy"]]


def _verdict_table(result: Result) -> str:
    rows = [
        [f"{pair['better']} over {pair['worse']}", outcome, *_figures(pair[outcome]), pair[outcome]["verdict"]]
        for pair in result["comparisons"]
        for outcome in told_outcomes(pair)
    ]
    if not rows:
        return "One seed has no intervals and no verdict." if len(result["seeds"]) == 1 else "Nothing is compared."
    return markdown_table(["comparison", "outcome", "difference", "bootstrap", "t", "visible", "verdict"], rows)


def _figures(outcome: Result) -> list[Any]:
    ends = [f"{low:+.3g} to {high:+.3g}" for low, high in (outcome["bootstrap"], outcome["t_interval"])]
    visible = outcome["visible"]
    return [f"{outcome['mean']:+.3g}", *ends, None if visible is None else f"{visible:.3g}"]


def column_table(result: Result) -> str:
    """Accuracy of each variant and the intervals of each pair, column by column."""
    variants = result["variants"]
    pairs = result["comparisons"]
    header = ["column", "blind", *(row["variant"] for row in variants)]
    header += [f"{pair['better']} over {pair['worse']}, t" for pair in pairs]
    rows = [
        [
            column,
            f"{result['blind'][column]:.2f}",
            *(f"{np.mean(row['final'][column]):.2f}" for row in variants),
            *("{:+.2f} to {:+.2f}".format(*pair["by_column"][column]["t_interval"]) for pair in pairs),
        ]
        for column in result["columns"]
    ]
    return markdown_table(header, rows)


# The plot


def draw(result: Result) -> Image.Image:
    """Mean accuracy of the columns over patches where variants differ in them, else over steps."""
    if all(", " in column for column in result["columns"]):
        return _draw_conditions(result)
    if any(row["made"].get("reduction") for row in result["variants"]):
        return _draw_shares(result)
    blind = float(np.mean(list(result["blind"].values())))
    series = [
        Series(row["variant"], [list(zip(row["curve"]["steps"], row["curve"]["mean"], strict=True))])
        for row in result["variants"]
    ]
    last = max(row["steps"] for row in result["variants"])
    series.append(Series("blind", [[(0, blind), (last, blind)]]))
    return draw_chart(result["title"], "validation accuracy, mean of columns and seeds", ["steps"], series)


def _draw_shares(result: Result) -> Image.Image:
    points: dict[str, list[list[tuple[float, float]]]] = {}
    for row in result["variants"]:
        kind = (row["made"].get("reduction") or {"kind": "no reduction"})["kind"]
        before, after = points.setdefault(kind, [[], []])
        before.append((row["visual_share"], mean_of_columns(row["untuned"] or row["final"])))
        if row["untuned"] and row["steps"]:
            after.append((row["visual_share"], mean_of_columns(row["final"])))
    blind = float(np.mean(list(result["blind"].values())))
    series = [Series(kind, panels) for kind, panels in points.items()]
    series.append(Series("blind", [[(0, blind), (1, blind)]] * 2))
    labels = ["share of patches, mean of layers, before tuning", "share of patches, mean of layers, after tuning"]
    return draw_chart(result["title"], "test accuracy, mean of columns and seeds", labels, series)


def _draw_conditions(result: Result) -> Image.Image:
    """Columns `task, condition`: a panel for each condition, a line for each task over the patches that are left."""
    tasks, conditions = (list(dict.fromkeys(c.split(", ")[part] for c in result["columns"])) for part in (0, 1))

    def points(task: str, condition: str) -> list[tuple[float, float]]:
        column = f"{task}, {condition}"
        known = [row for row in result["variants"] if column in row["final"]]
        return [(row["visual_share"], float(np.mean(row["final"][column]))) for row in known]

    series = [Series(task, [points(task, condition) for condition in conditions]) for task in tasks]
    labels = [f"share of patches, mean of layers; {condition}" for condition in conditions]
    return draw_chart(result["title"], "test accuracy, mean of seeds", labels, series)
