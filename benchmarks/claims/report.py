"""Finished runs of a claim -> `results/claims-<name>.json`, and the page and the plot that `tables.py` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from measuring import write_results

from claims.protocol import (
    Claim,
    Curve,
    compare,
    paired_differences,
    restricted_mean,
    shares_at_equal_tokens,
    steps_to_level,
)
from claims.tables import draw, render

Result = dict[str, Any]
Line = Mapping[str, Any]
Curves = Mapping[str, Mapping[int, Curve]]
"""Per variant the curve of each seed."""

STAMP = ("commit", "date", "device", "python", "torch", "transformers")


def gather(lines: Sequence[Line]) -> dict[str, dict[int, Curve]]:
    """Curves of finished runs by variant and seed."""
    curves: dict[str, dict[int, Curve]] = {}
    for line in lines:
        curves.setdefault(line["variant"]["name"], {})[line["seed"]] = Curve.from_dict(line["curve"])
    return curves


def summarise(
    claim: Claim, lines: Sequence[Line], blind: Mapping[str, float], blind_scenes: str, command: str
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
        ValueError: The seeds of two variants that are compared differ, or a run lacks a column of the claim.
    """
    curves = gather(lines)
    _check_columns(claim, curves, blind)
    made = {line["variant"]["name"]: line["variant"] for line in lines}
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
        "variants": [_describe(made[name], curves[name], claim.columns) for name in curves],
        "comparisons": [
            {"better": better, "worse": worse, **_compare_pair(curves[better], curves[worse], claim.columns)}
            for better, worse in claim.pairs
            if len(lines) > len(curves)
        ],
    }
    return json.loads(json.dumps(result))


def _check_columns(claim: Claim, curves: Curves, blind: Mapping[str, float]) -> None:
    for name, seeds in curves.items():
        for seed, curve in seeds.items():
            if missing := sorted(set(claim.columns) - (curve.accuracy.keys() & curve.test.keys())):
                raise ValueError(
                    f"{claim.name}, {name}, seed {seed}: no {', '.join(missing)} among its columns; name columns that "
                    "the world asks, or evaluate on more scenes."
                )
    if missing := sorted(set(claim.columns) - blind.keys()):
        raise ValueError(f"{claim.name}: the world's blind shares lack {', '.join(missing)}; it must answer them too.")


def _describe(variant: Mapping[str, Any], curves: Mapping[int, Curve], columns: Sequence[str]) -> Result:
    seeds = sorted(curves)
    first = curves[seeds[0]]
    steps = {column: [_steps(curves[seed], column) for seed in seeds] for column in columns}
    return {
        "variant": variant["name"],
        "made": variant,
        "parameters": first.parameters,
        "steps": first.steps[-1],
        "tokens": [curves[seed].tokens[-1] for seed in seeds],
        "visual_share": round(float(np.mean([curves[seed].visual_share for seed in seeds])), 4),
        "final": {column: [curves[seed].test[column] for seed in seeds] for column in columns},
        "swapped": {
            column: [curves[seed].swapped[column] for seed in seeds]
            for column in columns
            if all(column in curves[seed].swapped for seed in seeds)
        },
        "untuned": {column: [curves[seed].test_untuned[column] for seed in seeds] for column in columns}
        if first.test_untuned
        else None,
        "steps_to_level": steps,
        "restricted_steps": {column: restricted_mean(values, first.steps[-1]) for column, values in steps.items()},
        "curve": {
            "steps": first.steps,
            "tokens": np.mean([curves[seed].tokens for seed in seeds], 0).round().tolist(),
            "mean": np.mean([_mean_curve(curves[seed], columns) for seed in seeds], 0).round(4).tolist(),
        },
    }


def _steps(curve: Curve, column: str) -> int | None:
    return steps_to_level(curve.steps, curve.accuracy[column])


def _mean_curve(curve: Curve, columns: Sequence[str]) -> np.ndarray:
    return np.mean([curve.accuracy[column] for column in columns], 0)


Measure = Callable[[Curve, str], float]


def _compare_pair(better: Mapping[int, Curve], worse: Mapping[int, Curve], columns: Sequence[str]) -> Result:
    both = (better, worse)

    def over_seeds(measure: Measure, columns: Sequence[str]) -> Result:
        means = [
            {seed: float(np.mean([measure(curve, column) for column in columns])) for seed, curve in curves.items()}
            for curves in both
        ]
        return asdict(compare(paired_differences(*means)))

    def final(curve: Curve, column: str) -> float:
        return curve.test[column]

    def untuned(curve: Curve, column: str) -> float:
        return curve.test_untuned[column]

    def steps_spared(curve: Curve, column: str) -> float:
        return -restricted_mean([_steps(curve, column)], curve.steps[-1])

    every = [curve for curves in both for curve in curves.values()]
    last = {curve.steps[-1] for curve in every}
    equal_tokens = _equal_tokens(better, worse, columns)
    return {
        "final accuracy": over_seeds(final, columns),
        "accuracy before tuning": over_seeds(untuned, columns) if all(curve.test_untuned for curve in every) else None,
        "steps saved": over_seeds(steps_spared, columns) if len(last) == 1 and last != {0} else None,
        "accuracy at equal tokens": None if equal_tokens is None else asdict(compare(equal_tokens)),
        "by_column": {column: over_seeds(final, [column]) for column in columns},
    }


def _equal_tokens(
    better: Mapping[int, Curve], worse: Mapping[int, Curve], columns: Sequence[str]
) -> list[float] | None:
    """Differences within each seed; None where a curve does not reach back that far, or nothing was trained."""
    differences = []
    for seed in sorted(better):
        one, other = better[seed], worse[seed]
        if not min(one.tokens[-1], other.tokens[-1]):
            return None
        pairs = [shares_at_equal_tokens(one, other, column) for column in columns]
        if any(None in pair for pair in pairs):
            return None
        differences.append(float(np.mean([first - second for first, second in pairs])))
    return differences


def write(result: Result, folder: Path) -> None:
    """Write `claims-<name>.json`, `.md` and `.png`."""
    name = f"claims-{result['name']}"
    write_results(folder, name, result, render(result))
    draw(result).save(folder / f"{name}.png", optimize=True)
