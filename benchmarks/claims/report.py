"""Finished runs of a claim -> `results/claims-<name>.json`, and the page and the plot made from that file alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from line_chart import Series, draw_chart
from measuring import markdown_table, write_results
from PIL import Image

from claims.protocol import (
    CONFIDENCE,
    FLOOR,
    LEVEL,
    RESAMPLES,
    Claim,
    Curve,
    compare,
    paired_differences,
    restricted_mean,
    shares_at_equal_tokens,
    steps_to_level,
)

Result = dict[str, Any]
Curves = Mapping[str, Mapping[int, Curve]]
"""Per variant the curve of each seed."""

OPTIMIZERS = {
    "adamw": "AdamW",
    "muon": "Muon for the matrices of the layers, where the paper has AdamW, and AdamW for the rest",
}
STAMP = ("commit", "date", "device", "python", "torch", "transformers")

TEXT = """# {title}

{paper}. Commit {commit}; {date}; {device}; Python {python}, torch {torch}, transformers {transformers}. Made by
`{command}` from {num_runs} runs: {num_seeds} seeds ({seeds}), {steps} steps of {batch_size} videos each, {questions}
questions a video, {frames} frames, optimiser {optimizer}. {notes}

A run's final accuracy is on {test_scenes} test scenes, asked once; steps to {level:.0%} are the first evaluation (every
{evaluate_every} steps, {validation_scenes} validation scenes) at {level:.0%} or above that none under {floor:.0%}
follows, runs that never get there counted with all their steps. Answers are exact matches, given the tokens before
them. Columns: {columns}; `task/2` is scenes with two objects.

{variants}

{verdicts}

Differences are within a seed, over the mean of the columns, and positive where the paper's variant is better; n is the
number of seeds. {confidence:.0%} intervals: bootstrap over seeds ({resamples:,} resamples), and Student's t. Confirmed
(or contradicted): both intervals lie above (below) 0; otherwise not seen, and "visible" is the smallest difference that
could have been seen. At equal tokens both are read from the validation curves where the run with fewer tokens ended.

{by_column}

Single columns have no verdict, and no interval is corrected for the number of comparisons. "Blind" is the best answerer
that never looks: the commonest answer to each question, counted on {blind_scenes}.
"""


def gather(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Curve]]:
    """Curves of finished runs by variant and seed."""
    curves: dict[str, dict[int, Curve]] = {}
    for line in lines:
        curves.setdefault(line["variant"]["name"], {})[line["seed"]] = Curve.from_dict(line["curve"])
    return curves


def summarise(
    claim: Claim, lines: Sequence[Mapping[str, Any]], blind: Mapping[str, float], blind_scenes: str, command: str
) -> Result:
    """Everything a page says about a claim.

    Args:
        claim: What was tried.
        lines: Finished runs of every variant with the same seeds.
        blind: Per column what can be reached without looking.
        blind_scenes: What that was counted and scored on.
        command: What made the runs.

    Returns:
        As JSON gives it back. Commit, date, device and versions name every one that a run has.

    Raises:
        ValueError: The seeds of two variants that are compared differ.
    """
    curves = gather(lines)
    result = {
        "kind": "measured",
        "name": claim.name,
        "title": claim.title,
        "paper": claim.paper,
        "notes": claim.notes,
        "command": command,
        **{name: ", ".join(sorted({line[name] for line in lines})) for name in STAMP},
        "seeds": sorted(next(iter(curves.values()))),
        "columns": list(claim.columns),
        "budget": asdict(claim.budget),
        "blind_scenes": blind_scenes,
        "blind": {column: round(blind[column], 4) for column in claim.columns},
        "variants": [_describe(name, curves[name], claim) for name in curves],
        "comparisons": [
            {"better": better, "worse": worse, **_compare_pair(curves, better, worse, claim)}
            for better, worse in claim.pairs
            if len(lines) > len(curves)
        ],
    }
    return json.loads(json.dumps(result))


def mean_share(shares: Mapping[str, float], columns: Sequence[str]) -> float:
    """Mean accuracy of columns, each of which counts alike."""
    return float(np.mean([shares[column] for column in columns]))


def _describe(name: str, curves: Mapping[int, Curve], claim: Claim) -> Result:
    seeds, budget = sorted(curves), claim.budget.steps
    steps = {column: [_steps(curves[seed], column) for seed in seeds] for column in claim.columns}
    return {
        "variant": name,
        "parameters": curves[seeds[0]].parameters,
        "steps": budget,
        "tokens": [curves[seed].tokens[-1] for seed in seeds],
        "final": {column: [curves[seed].test[column] for seed in seeds] for column in claim.columns},
        "steps_to_level": steps,
        "restricted_steps": {column: restricted_mean(values, budget) for column, values in steps.items()},
        "curve": {
            "steps": curves[seeds[0]].steps,
            "tokens": np.mean([curves[seed].tokens for seed in seeds], 0).round().tolist(),
            "mean": np.mean([_mean_curve(curves[seed], claim.columns) for seed in seeds], 0).round(4).tolist(),
        },
    }


def _steps(curve: Curve, column: str) -> int | None:
    return steps_to_level(curve.steps, curve.accuracy[column])


def _mean_curve(curve: Curve, columns: Sequence[str]) -> np.ndarray:
    return np.mean([curve.accuracy[column] for column in columns], 0)


def _compare_pair(curves: Curves, better: str, worse: str, claim: Claim) -> Result:
    budget = claim.budget.steps

    def over_seeds(measure: Callable[[Curve, str], float], columns: Sequence[str], sign: int = 1) -> Result:
        means = [
            {seed: sign * float(np.mean([measure(curve, c) for c in columns])) for seed, curve in curves[name].items()}
            for name in (better, worse)
        ]
        return asdict(compare(paired_differences(*means)))

    def final(curve: Curve, column: str) -> float:
        return curve.test[column]

    def restricted(curve: Curve, column: str) -> float:
        return restricted_mean([_steps(curve, column)], budget)

    equal_tokens = _equal_tokens(curves[better], curves[worse], claim.columns)
    return {
        "final accuracy": over_seeds(final, claim.columns),
        "steps saved": over_seeds(restricted, claim.columns, -1),
        "accuracy at equal tokens": None if equal_tokens is None else asdict(compare(equal_tokens)),
        "by_column": {column: over_seeds(final, [column]) for column in claim.columns},
    }


def _equal_tokens(
    better: Mapping[int, Curve], worse: Mapping[int, Curve], columns: Sequence[str]
) -> list[float] | None:
    """Differences within each seed; None where a curve does not reach back that far."""
    differences = []
    for seed in sorted(better):
        pairs = [shares_at_equal_tokens(better[seed], worse[seed], column) for column in columns]
        if any(None in pair for pair in pairs):
            return None
        differences.append(float(np.mean([one - other for one, other in pairs])))
    return differences


# The page and the plot, both from a result file


def render(result: Result) -> str:
    """The Markdown of a result."""
    budget = result["budget"]
    lists = {name: ", ".join(map(str, result[name])) for name in ("columns", "seeds")}
    return TEXT.format(
        **{
            **budget,
            **result,
            **lists,
            "frames": " and ".join(map(str, budget["frames"])),
            "optimizer": OPTIMIZERS[budget["optimizer"]],
            "variants": _variant_table(result),
        },
        num_seeds=len(result["seeds"]),
        num_runs=len(result["seeds"]) * len(result["variants"]),
        level=LEVEL,
        floor=FLOOR,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        verdicts=_verdict_table(result),
        by_column=_column_table(result),
    )


def _variant_table(result: Result) -> str:
    rows = [
        [
            row["variant"],
            row["parameters"],
            row["steps"],
            round(float(np.mean(row["tokens"]))),
            float(np.mean(list(row["final"].values()))),
            _range([float(np.mean(values)) for values in zip(*row["final"].values(), strict=True)]),
            float(np.mean(list(row["restricted_steps"].values()))),
            f"{_reached(row)} of {len(result['columns']) * len(result['seeds'])}",
        ]
        for row in result["variants"]
    ]
    blind = float(np.mean(list(result["blind"].values())))
    header = ["variant", "parameters", "steps", "tokens", "accuracy", "over seeds", f"steps to {LEVEL:.0%}", "reached"]
    return markdown_table(header, [*rows, ["blind", None, None, None, blind, None, None, None]])


def _reached(row: Result) -> int:
    return sum(value is not None for values in row["steps_to_level"].values() for value in values)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _verdict_table(result: Result) -> str:
    rows = [
        [f"{pair['better']} over {pair['worse']}", outcome, *_figures(pair[outcome]), _verdict(pair[outcome])]
        for pair in result["comparisons"]
        for outcome in ("final accuracy", "accuracy at equal tokens", "steps saved")
    ]
    if not rows:
        return "One seed has no intervals and no verdict."
    return markdown_table(["comparison", "outcome", "difference", "bootstrap", "t", "visible", "verdict"], rows)


def _figures(outcome: Result | None) -> list[Any]:
    if outcome is None:
        return [None] * 4
    ends = [f"{low:+.3g} to {high:+.3g}" for low, high in (outcome["bootstrap"], outcome["t_interval"])]
    visible = outcome["visible"]
    return [f"{outcome['mean']:+.3g}", *ends, None if visible is None else f"{visible:.3g}"]


def _verdict(outcome: Result | None) -> str | None:
    return None if outcome is None else outcome["verdict"]


def _column_table(result: Result) -> str:
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


def draw(result: Result) -> Image.Image:
    """Mean accuracy of the columns over steps, a line for each variant, and what needs no looking."""
    blind = float(np.mean(list(result["blind"].values())))
    series = [
        Series(row["variant"], [list(zip(row["curve"]["steps"], row["curve"]["mean"], strict=True))])
        for row in result["variants"]
    ]
    last = result["variants"][0]["curve"]["steps"][-1]
    series.append(Series("blind", [[(0, blind), (last, blind)]]))
    return draw_chart(result["title"], "validation accuracy, mean of columns and seeds", ["steps"], series)


def write(result: Result, folder: Path) -> None:
    """Write `claims-<name>.json`, `.md` and `.png`."""
    name = f"claims-{result['name']}"
    write_results(folder, name, result, render(result))
    draw(result).save(folder / f"{name}.png", optimize=True)
