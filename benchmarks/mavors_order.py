"""Does training teach Mavors the order of frames inside a chunk, to which inflated weights are blind?

    python benchmarks/mavors_order.py            # 3 seeds of some 5 minutes on a CPU core; goes on where it stopped
    python benchmarks/mavors_order.py --quick    # does the script work; keeps nothing

A tiny Mavors learns from single images. Its kernels are then made equal, the mean of what they were: for an image
nothing changes by that, and it is what inflating an image tower gives (section 3.3). Before and after it then learns
from clips, all of it training, it is asked about test clips twice: with the frames of each chunk in order, and with
those frames shuffled inside their chunk. A clip is one chunk: with two, which chunk a thing is in says where it moves.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims.protocol import Budget, Claim, Curve, Phase, Variant, compare
from claims.run import BLIND_SCENES, QUICK_BLIND_SCENES, shorten_budget
from claims.runs import Run, finish_runs, plan_runs, weights_path
from claims.siblings import DECODER, GUIDANCE
from claims.trainer import read_weights, save_weights, train
from claims.worlds import WORLDS
from claims.writing import shuffle_frames
from measuring import RESULTS, markdown_table, provenance, write_results
from torch import nn

NAME = "mavors-order"
SEEDS = 3
CHUNK_FRAMES = 8
"""Twice those of the `mavors-tiny` preset: shorter clips of this world stand still."""
COLUMNS = ("motion/1", "motion", "moving", "order", "when", "needle", "color")
TEACHER = "looks+place+time"
CLAIM = Claim(
    name=NAME,
    title="The order of frames inside a chunk",
    paper="",
    variants=(
        Variant(
            "images",
            {"preset": "mavors-tiny", "text_config": DECODER, "chunk_frames": CHUNK_FRAMES},
            guidance=GUIDANCE,
            teacher=TEACHER,
            phases=(Phase(1.0, (1,)),),
        ),
        Variant("clips", guidance=GUIDANCE, teacher=TEACHER, base="images"),
    ),
    pairs=(),
    columns=COLUMNS,
    budget=Budget(
        steps=150, frames=(CHUNK_FRAMES,), single_share=0.5, tuning_steps=500, tuning_rate=1.0, evaluate_every=250
    ),
)

STATES = {"images": "before", "clips": "after"}
"""What the weights of a variant are to the clips."""

TEXT = """# Mavors: the order of frames inside a chunk

A tiny Mavors learned from {steps} steps of images; its kernels were made equal, as inflation leaves them; then it
learned from {tuning_steps} steps of {batch_size} clips of {frames} frames, in chunks of {chunk_frames}, nothing frozen.
Before and after the clips: exact match on {test_scenes} test scenes with the frames of each chunk in order, and with
the same frames shuffled inside their chunk. {num_seeds} seeds, teacher `{teacher}` with L_MSE.

{table}

Means of seeds; the last column is what shuffling costs after training, in order less shuffled within a seed, with
Student's 95 % interval. "Blind" is the best answerer that never looks. `motion/1` is scenes with one object. A clip is
one chunk, so what `when`, `order` and `motion` ask for lies in the order of its frames alone, except that the axis of a
motion is seen without it, which leaves two ways to guess from. `moving` (does it move), `needle` and `color` need no
order and should not fall. Before the clips most words of these answers were never taught.

Measured: `{command}`, {device}, commit {commit}, {date}.
"""


@torch.no_grad()
def inflate(model: nn.Module) -> None:
    """Give every frame of a chunk the mean of the kernels: images are seen as before, and no order inside a chunk."""
    weight = model.model.patch_embed.encoder.patch_embedding.weight
    weight.copy_(weight.mean(2, keepdim=True).expand_as(weight))


def train_inflated(run: Run, folder: Path) -> Curve:
    """Train as claims do; the weights that images leave are kept inflated."""
    curve = train(run, folder)
    if run.base is None:
        model = read_weights(run, folder).model
        inflate(model)
        save_weights(model, weights_path(folder, run))
    return curve


def ask_twice(run: Run, folder: Path) -> dict[str, dict[str, float]]:
    """Test shares of the kept weights of a run by column: `"in order"` and `"shuffled"`."""
    reader = read_weights(run, folder)
    rows = reader.held_out("test", run.budget.test_scenes)
    shuffled = shuffle_frames(rows, reader.model.config.chunk_frames, run.seed)
    return {"in order": reader.score(rows).shares, "shuffled": reader.score(shuffled).shares}


def measure(folder: Path, options: argparse.Namespace, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Train what is missing and ask all weights twice.

    Args:
        folder: Of the finished runs.
        options: `seeds`, `device`, `jobs` and `quick`.
        stamp: Commit, date, versions, device and command.
    """
    claim = replace(CLAIM, budget=shorten_budget(CLAIM.budget)) if options.quick else CLAIM
    runs = [replace(run, keeps_weights=True) for run in plan_runs(claim, options.seeds, options.device)]
    finish_runs(runs, folder / f"{NAME}.jsonl", train_inflated, jobs=options.jobs, stamp=stamp)
    answers: dict[str, list[dict[str, dict[str, float]]]] = {state: [] for state in STATES.values()}
    for run in runs:
        answers[STATES[run.variant.name]].append(ask_twice(run, folder))
    found = set.intersection(*(set(way) for seeds in answers.values() for ways in seeds for way in ways.values()))
    columns = [column for column in COLUMNS if column in found]  # the few scenes of --quick do not have them all
    blind = WORLDS[claim.budget.world].blind(claim.budget, *(QUICK_BLIND_SCENES if options.quick else BLIND_SCENES))
    return {
        **stamp,
        "budget": asdict(claim.budget),
        "teacher": TEACHER,
        "chunk_frames": read_weights(runs[0], folder).model.config.chunk_frames,
        "seeds": list(range(options.seeds)),
        "columns": columns,
        "blind": {column: blind[column] for column in columns},
        **{
            state: {way: {column: [s[way][column] for s in seeds] for column in columns} for way in seeds[0]}
            for state, seeds in answers.items()
        },
    }


def make_page(result: Mapping[str, Any]) -> str:
    """The page, from the figures alone."""
    header = ["column", "blind"]
    header += [f"{state}, {way}" for state in STATES.values() for way in ("in order", "shuffled")]
    rows = []
    for column in result["columns"]:
        shares = [result[state][way][column] for state in STATES.values() for way in ("in order", "shuffled")]
        means = [f"{np.mean(values):.2f}" for values in shares]
        rows.append([column, f"{result['blind'][column]:.2f}", *means, _cost(shares[2], shares[3])])
    return TEXT.format(
        **{**result, **result["budget"], "frames": " and ".join(map(str, result["budget"]["frames"]))},
        num_seeds=len(result["seeds"]),
        table=markdown_table([*header, "shuffling costs"], rows),
    )


def _cost(ordered: Sequence[float], shuffled: Sequence[float]) -> str:
    differences = [one - other for one, other in zip(ordered, shuffled, strict=True)]
    if len(differences) == 1:
        return f"{differences[0]:+.2f}"
    low, high = compare(differences).t_interval
    return f"{np.mean(differences):+.2f} ({low:+.2f} to {high:+.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="processes that train, one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps; keeps nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    stamp = {**provenance(options.device), "command": shlex.join(["python", "benchmarks/mavors_order.py", *words])}
    if not options.quick:
        result = measure(options.runs, options, stamp)
        write_results(options.out, NAME, result, make_page(result))
        return
    options.seeds, options.jobs = 1, 1
    with tempfile.TemporaryDirectory() as folder:
        print(make_page(measure(Path(folder), options, stamp)))
        print("nothing is kept")


if __name__ == "__main__":
    main()
