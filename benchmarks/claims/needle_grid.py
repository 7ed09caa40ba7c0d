"""Length by depth: does a model that was trained on short videos find one frame among many, and what does merging cost?

    python benchmarks/claims/needle_grid.py                  # trains 3 seeds, then fills the grid: 15 minutes on CPU
    python benchmarks/claims/needle_grid.py --model mavors   # the same on Mavors: chunks by depth
    python benchmarks/claims/needle_grid.py --quick          # does the script work

The picture is that of Mavors' needle test: frames of the video against depth of the needle in it. Nothing was tuned to
the ways of reading: the same weights read with all patches, or with half of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from line_chart import FAINT, INK, PAPER
from measuring import RESULTS, markdown_table, provenance, write_results
from PIL import Image, ImageDraw, ImageFont

from claims.needle import QUESTION, draw_haystack, encode_haystack
from claims.protocol import Budget, Reduction, Variant
from claims.runs import Run, finish_runs
from claims.siblings import GUIDANCE
from claims.trainer import Training, evaluate, read_weights, train
from elva_hf.data.toy_world import COLORS

NAME = "needle-grid"
"""Of ELVA's grid."""

LENGTHS = (8, 16, 32, 64)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS, VIDEOS = 3, 50
BUDGET = Budget(steps=200, frames=(8, 16), questions=1, world="needle", validation_scenes=100, test_scenes=300)
WAYS: dict[str, Reduction | None] = {
    "all patches": None,
    "merged to 1/2": Reduction("merge", 0.5),
    "pooled to 1/2": Reduction("pool", 0.5),
    "half of the frames": Reduction("drop", 0.5),
}
FRAMES_AT_ONCE = 400
MAVORS_CHUNK = 4
"""Frames of a chunk of the `mavors-tiny` preset."""


@dataclass(frozen=True)
class Grid:
    """A grid of one model.

    Args:
        name: Of its files.
        title: Of its page.
        variant: What is trained.
        ways: How its weights are read, by name; those that a model of chunks can have.
        chunk_frames: Frames that the model takes as one.
        steps: Of training.
    """

    name: str
    title: str
    variant: Variant
    ways: Mapping[str, Reduction | None]
    chunk_frames: int = 1
    steps: int = BUDGET.steps


GRIDS = {
    "elva": Grid(NAME, "Needle in a haystack: length by depth", Variant("haystack"), WAYS),
    "mavors": Grid(
        f"{NAME}-mavors",
        "Needle in a haystack: Mavors, chunks by depth",
        # without a teacher it is at chance after 200 steps and at .4 after 300 (docs/LOG.md)
        Variant("mavors", {"preset": "mavors-tiny"}, guidance=GUIDANCE, teacher="looks"),
        {name: WAYS[name] for name in ("all patches", "merged to 1/2")},
        MAVORS_CHUNK,
        steps=400,
    ),
}

_FINE = 2  # drawn so many times larger, then averaged down
_CELL, _LEFT, _TOP, _GAP, _FOOT = (62, 46), 84, 104, 40, 64
_BAD, _GOOD = (214, 96, 0), (0, 95, 204)


def plan(seeds: int, device: str, quick: bool, grid: Grid = GRIDS["elva"]) -> list[Run]:
    """One training for each seed, whose weights are kept."""
    budget = replace(BUDGET, steps=grid.steps)
    if quick:
        few = {"steps": 2, "batch_size": 2, "evaluate_every": 2, "validation_scenes": 2, "test_scenes": 2, "warmup": 1}
        budget = replace(BUDGET, **few)
    return [Run(grid.name, grid.variant, seed, budget, device, keeps_weights=True) for seed in range(seeds)]


def fill(
    run: Run, folder: Path, lengths: Sequence[int], videos: int, ways: Mapping[str, Reduction | None] = WAYS
) -> dict[str, list[list[float]]]:
    """What the weights of a run answer on the test split.

    Args:
        run: A training of `plan`; it is made if its weights are not there.
        folder: Of the finished runs.
        lengths: Frames of the videos.
        videos: Of a cell; at every depth and length the same haystacks.
        ways: Of reading.

    Returns:
        Per way of reading, per length and per depth the share of right answers.
    """
    model = read_weights(run, folder)
    return {
        way: [[_score(model, length, depth, videos, reduction) for depth in DEPTHS] for length in lengths]
        for way, reduction in ways.items()
    }


def _score(reader: Training, length: int, depth: float, videos: int, reduction: Reduction | None) -> float:
    patch_size = reader.model.config.patch_size
    hays = [draw_haystack(seed, length, "test", depth) for seed in range(videos)]
    rows = reader.write([encode_haystack(hay, reader.tokenizer, patch_size) for hay in hays])
    variant = replace(reader.run.variant, reduction=reduction, guidance=None)
    at_once = max(1, FRAMES_AT_ONCE // length)
    score = evaluate(reader.model, rows, reader.tokenizer.pad_token_id, variant, reader.run.device, at_once)
    return score.shares["needle"]


def measure(
    folder: Path,
    out: Path,
    *,
    device: str,
    jobs: int,
    stamp: Mapping[str, Any],
    quick: bool = False,
    grid: Grid = GRIDS["elva"],
) -> dict[str, Any]:
    """Train, fill the grid, and write its `.json`, `.md` and `.png`.

    Args:
        folder: Of the finished runs; those that are there are not made again.
        out: Of the results.
        device: `"cpu"` or `"cuda"`.
        jobs: Processes that train.
        stamp: Commit, date, versions, device and command.
        quick: One seed, two steps, two short lengths: figures without meaning.
        grid: Of which model.
    """
    runs = plan(1 if quick else SEEDS, device, quick, grid)
    lengths, videos = (LENGTHS[:2], 2) if quick else (LENGTHS, VIDEOS)
    lines = finish_runs(runs, folder / f"{grid.name}.jsonl", train, jobs=1 if quick else jobs, stamp=stamp)
    grids = [fill(run, folder, lengths, videos, grid.ways) for run in runs]
    result = {
        **stamp,
        "name": grid.name,
        "title": grid.title,
        "chunk_frames": grid.chunk_frames,
        "lengths": lengths,
        "depths": DEPTHS,
        "trained_frames": BUDGET.frames,
        "steps": runs[0].budget.steps,
        "teacher": grid.variant.teacher if grid.variant.guidance else None,
        "seeds": [run.seed for run in runs],
        "videos": videos,
        "question": QUESTION,
        "chance": 1 / len(COLORS),
        "test": [line["curve"]["test"]["needle"] for line in lines],
        "per_seed": {way: [shares[way] for shares in grids] for way in grid.ways},
        "mean": {way: np.mean([shares[way] for shares in grids], 0).tolist() for way in grid.ways},
    }
    result["summary"] = summarise(result)
    write_results(out, grid.name, result, make_page(result))
    draw_grid(result).save(out / f"{grid.name}.png")
    return result


def summarise(result: Mapping[str, Any]) -> str:
    """The main figures in two sentences."""
    shares = {way: np.array(grid) for way, grid in result["mean"].items()}
    longest, known = result["lengths"][-1], max(result["trained_frames"])
    at_known = result["lengths"].index(known)
    seen = ", ".join(f"{grid[at_known].mean():.2f} {way}" for way, grid in shares.items())
    beyond = ", ".join(f"{grid[-1].mean():.2f} {way}" for way, grid in shares.items())
    first = (
        f"Mean over depths at {known} frames, the longest it was trained on: {seen} (chance {result['chance']:.2f})."
    )
    return first if longest == known else f"{first} At {longest} frames: {beyond}."


def make_page(result: Mapping[str, Any]) -> str:
    """The page, from the figures alone."""
    header = ["reading", "frames", *(f"depth {depth:g}" for depth in result["depths"])]
    rows = [
        [way, _length(length, result), *map(float, shares)]
        for way, grid in result["mean"].items()
        for length, shares in zip(result["lengths"], grid, strict=True)
    ]
    trained = " and ".join(map(str, result["trained_frames"]))
    text = [
        f"# {result['title']}",
        "",
        f'One frame of a video shows a coloured square; the question is "{result["question"]}". Trained on videos of '
        f"{trained} frames for {result['steps']} steps{_guidance(result)}; {len(result['seeds'])} seed(s), "
        f"{result['videos']} test videos in a cell, the same ones in every cell. Patches are left out in "
        "evaluation only, without tuning: what dropping loses is what it does not see.",
        "",
        result["summary"],
        "",
        f"![length by depth]({result['name']}.png)",
        "",
        markdown_table(header, rows),
        "",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}.",
    ]
    return "\n".join(text) + "\n"


def _guidance(result: Mapping[str, Any]) -> str:
    """The teacher, where there was one."""
    return f" with L_MSE from a teacher of {result['teacher']}" if result["teacher"] else ""


def _length(frames: int, result: Mapping[str, Any]) -> Any:
    """Frames, and the chunks that they are where a model takes several as one."""
    size = result["chunk_frames"]
    return frames if size == 1 else f"{frames} ({-(-frames // size)} chunks)"


def draw_grid(result: Mapping[str, Any]) -> Image.Image:
    """A heat map for each way of reading, side by side: frames across, depth downwards."""
    lengths, depths, ways = result["lengths"], result["depths"], list(result["mean"])
    panel = _CELL[0] * len(lengths)
    title = "Needle in a haystack: share right by length of the video and depth of the needle"
    written = ImageFont.load_default(_FINE * 20).getlength(title) / _FINE
    width = max(_LEFT + len(ways) * panel + (len(ways) - 1) * _GAP, round(24 + written)) + 24
    height = _TOP + _CELL[1] * len(depths) + _FOOT
    image = Image.new("RGB", (_FINE * width, _FINE * height), PAPER)
    draw = ImageDraw.Draw(image)

    def write(x: float, y: float, text: str, size: int, color: tuple[int, ...], anchor: str) -> None:
        font = ImageFont.load_default(_FINE * size)
        draw.text((_FINE * x, _FINE * y), text, font=font, fill=color, anchor=anchor)

    write(24, 16, title, 20, INK, "la")
    write(24, 50, "depth", 15, FAINT, "la")
    for row, depth in enumerate(depths):
        write(_LEFT - 12, _TOP + _CELL[1] * (row + 0.5), f"{depth:g}", 15, FAINT, "rm")
    for number, way in enumerate(ways):
        left = _LEFT + number * (panel + _GAP)
        write(left, _TOP - 14, way, 15, INK, "ls")
        for column, length in enumerate(lengths):
            x = left + _CELL[0] * column
            mark = "" if length <= max(result["trained_frames"]) else "*"
            write(x + _CELL[0] / 2, _TOP + _CELL[1] * len(depths) + 8, f"{length}{mark}", 15, FAINT, "ma")
            for row in range(len(depths)):
                share, y = result["mean"][way][column][row], _TOP + _CELL[1] * row
                box = [_FINE * (x + 1), _FINE * (y + 1), _FINE * (x + _CELL[0] - 1), _FINE * (y + _CELL[1] - 1)]
                draw.rectangle(box, fill=_shade(share, result["chance"]))
                write(x + _CELL[0] / 2, y + _CELL[1] / 2, f"{share:.2f}", 14, PAPER, "mm")
    foot = "frames of the video; * longer than any it was trained on"
    write(_LEFT, _TOP + _CELL[1] * len(depths) + 34, foot, 15, INK, "la")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _shade(share: float, chance: float) -> tuple[int, int, int]:
    """From one colour at chance or below to the other at 1; white ink can be read on all of them."""
    part = min(max((share - chance) / (1 - chance), 0.0), 1.0)
    red, green, blue = (round(bad + part * (good - bad)) for bad, good in zip(_BAD, _GOOD, strict=True))
    return red, green, blue


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the grid."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=GRIDS, default="elva")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one seed, two steps; keeps nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    stamp = {
        **provenance(options.device),
        "command": shlex.join(["python", "benchmarks/claims/needle_grid.py", *words]),
    }
    with tempfile.TemporaryDirectory() as folder:
        runs, out = (Path(folder), Path(folder)) if options.quick else (options.runs, options.out)
        measure(
            runs,
            out,
            device=options.device,
            jobs=options.jobs,
            stamp=stamp,
            quick=options.quick,
            grid=GRIDS[options.model],
        )


if __name__ == "__main__":
    main()
