"""From a video file to model inputs: ELVA's processor and those of Qwen2.5-VL, Qwen3-VL and Gemma4Unified.

    python benchmarks/processors.py --peer-python ../peers/bin/python   # leave the machine alone
    python benchmarks/processors.py --size tiny --rounds 1 --out /tmp   # seconds: does it run

The processors of transformers need torchvision and torchcodec. With a torch for CPUs they run in an environment of
their own, made as `decoding.py` says and then:

    ../peers/bin/pip install transformers==5.23.0 pillow && ../peers/bin/pip install --no-deps torchvision==0.28.0

torchvision's compiled operators do not load beside such a torch; `encoding.py` declares the two that its Python code
asks for on import. What runs where is tried in every run and listed with the result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from decoding import WARM_UP as SHORT
from decoding import call_script, choose, named
from encoding import PROCESSORS, SIZE
from measuring import RESULTS, markdown_table, provenance, ratio, spread, write_results
from numbered_clips import ClipSpec, describe_clip, make_clip

Row = dict[str, Any]

ENCODING = Path(__file__).with_name("encoding.py")
OURS = "ELVA"
WARM_UP = replace(SHORT, seconds=4)  # more frames than anybody asks for: some refuse to take fewer
STAGES = ("decode", "resize", "patchify", "rest")


@dataclass(frozen=True)
class Task:
    """A number of frames, and how large.

    Args:
        name: Short.
        num_frames: Frames of a video.
        options: Of ELVA's processor.
        pixels: Of a frame as ELVA resizes it, in the mean; what the others come near to.
    """

    name: str
    num_frames: int
    options: dict[str, Any]
    pixels: int


TASKS = {
    task.name: task
    for task in (
        Task("32 frames at 448", 32, {"num_frames": 32, "longest_edge": 448}, 252 * 448),
        Task("64 frames, half at 672, half at 336", 64, {}, (392 * 672 + 196 * 336) // 2),
        Task("4 frames at 112", 4, {"num_frames": 4, "longest_edge": 112}, 56 * 112),  # for --size tiny
    )
}
TINY = ("4 frames at 112",)


@dataclass(frozen=True)
class Setting:
    """How a run measures."""

    size: str
    rounds: int
    processors: tuple[str, ...]

    @property
    def tasks(self) -> list[Task]:
        """The tasks to run."""
        return [task for name, task in TASKS.items() if (name in TINY) == (self.size == "tiny")]

    @property
    def clip(self) -> ClipSpec:
        """The clip that everybody reads."""
        return ClipSpec(seconds=2, gop=24) if self.size == "tiny" else ClipSpec()


def measure(task: Task, setting: Setting, clips: Path, peer_python: str) -> dict[str, list[Row]]:
    """Every processor's runs of one task, in rounds."""
    assert (setting.clip.height, setting.clip.width) == SIZE
    job = {
        "path": str(make_clip(clips, setting.clip)),
        "warm_up": str(make_clip(clips, WARM_UP)),
        "pixels": task.pixels,
    }
    runs: dict[str, list[Row]] = {name: [] for name in setting.processors}
    for number in range(setting.rounds):
        for name in runs:
            if runs[name] and "seconds" not in runs[name][0]:
                continue
            options = task.options if name == OURS else {"num_frames": task.num_frames}
            python = sys.executable if name == OURS else peer_python
            run = call_script(ENCODING, python, json.dumps({**job, "processor": name, "options": options}))
            runs[name].append(run)
            print(f"{task.name}, round {number + 1}: {name}: {run.get('seconds', run)}", file=sys.stderr)
    return runs


def summarise(task: Task, runs: dict[str, list[Row]]) -> list[Row]:
    """One row for each processor."""
    rows = []
    for name, encodings in runs.items():
        row = {"task": task.name, "processor": name}
        if "seconds" not in encodings[0]:
            rows.append({**row, **encodings[0]})
            continue
        columns = {key: [run.get(key) for run in encodings] for key in ("seconds", "wall_seconds", "peak_bytes")}
        ours = [run.get("seconds") for run in runs.get(OURS, [])]
        counted = ("num_frames", "num_pixels", "num_visual_tokens", "num_tokens")
        rows.append(
            {
                **row,
                "kind": "measured",
                "runs": len(encodings),
                **{key: spread(values) for key, values in columns.items()},
                "seconds_ratio": ratio(columns["seconds"], ours) if len(ours) == len(encodings) else None,
                "stages": {stage: spread([run["stages"][stage] for run in encodings]) for stage in STAGES},
                **{key: encodings[0][key] for key in counted},
            }
        )
    return rows


def try_imports(setting: Setting, clip: Path, peer_python: str) -> list[Row]:
    """What runs where: the processors in our own Python, and torchvision in the peers', as it is."""
    tried = []
    for name in setting.processors:
        if name != OURS:
            job = {"processor": name, "options": {"num_frames": 4}, "pixels": 56 * 112, "path": str(clip)}
            run = call_script(ENCODING, sys.executable, json.dumps({**job, "warm_up": str(clip)}))
            tried.append({"what": f"{name}'s processor in the environment of elva-hf", "outcome": _outcome(run)})
    done = subprocess.run([peer_python, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["runs"])[-1] if done.returncode else "runs"
    return [*tried, {"what": "`import torchvision` in the environment of the peers, nothing declared", "outcome": last}]


def _outcome(run: Row) -> str:
    return run.get("unavailable") or run.get("failed") or "runs"


# What the result file shows.

ABOUT = (
    "CPU time of the whole process from a path and a question to the model's inputs, imports and a small warm-up clip "
    "left out; medians (least to most) of {rounds} fresh processes, processors taking turns. The clip is "
    "{seconds} s of H.264, {width}x{height}. Every processor is built from its class with the class's own defaults and "
    "decodes as it does by default (those of transformers: torchcodec). They take the frames that they choose "
    "themselves: the same number, at nearly the same places. Sizes are the nearest that each can have; `pixels` are "
    "those of all frames together. `decode` is opening, decoding and conversion to RGB; `patchify` is everything that "
    "turns resized frames into patches, normalising included; `rest` is text, checks and conversions."
)
FRAMES = "{frames} frames; ELVA makes {pixels} pixels of a frame, in the mean."


def as_markdown(result: Row) -> str:
    """The result as tables."""
    setting = Setting(**{**result["setting"], "processors": tuple(result["setting"]["processors"])})
    parts = [
        "# From a video file to model inputs",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}.",
        f"ELVA with {named(result['versions'])}; the others with {named(result['peer_versions'])}.",
        result["about"],
    ]
    for task in setting.tasks:
        rows = [row for row in result["rows"] if row["task"] == task.name]
        text = FRAMES.format(frames=task.num_frames, pixels=task.pixels)
        parts += [f"## {task.name}", text, costs_table(rows), "CPU time by stage, s:", stages_table(rows)]
    parts += [
        "## What runs where",
        markdown_table(["tried", ""], ((row["what"], row["outcome"]) for row in result["tried"])),
    ]
    return "\n\n".join(parts) + "\n"


def costs_table(rows: list[Row]) -> str:
    """What each processor costs, and what it makes."""
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append((row["processor"], *(["-"] * 6), _outcome(row)))
            continue
        seconds, peak = row["seconds"], row["peak_bytes"]
        lines.append(
            (
                *(row["processor"], row["seconds_ratio"]),
                f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f})",
                *(row["num_frames"] / seconds["median"], peak and f"{peak['median'] / 1e6:.0f}"),
                *(f"{row['num_pixels'] / 1e6:.2f}", row["num_visual_tokens"] / row["num_frames"], row["num_tokens"]),
            )
        )
    header = ["processor", "ratio", "CPU, s", "frames / CPU s", "peak, MB", "pixels, M", "tokens / frame", "tokens"]
    return markdown_table(header, lines)


def stages_table(rows: list[Row]) -> str:
    """Where each processor's time goes."""
    return markdown_table(
        ["processor", *STAGES],
        (
            (row["processor"], *(f"{row['stages'][stage]['median']:.3f}" for stage in STAGES))
            for row in rows
            if "stages" in row
        ),
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of the clip and the frames")
    parser.add_argument("--rounds", type=int, default=5, help="each processor in a fresh process")
    parser.add_argument("--processors", help="names, with + between them; default: all")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has torchvision and torchcodec")
    parser.add_argument(
        "--clips", type=Path, default=Path(tempfile.gettempdir()) / "elva-clips", help="where to keep it"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


def main() -> None:
    """Measure everything and write the result files."""
    arguments = parse_arguments()
    setting = Setting(arguments.size, arguments.rounds, choose(arguments.processors, PROCESSORS))
    clip = make_clip(arguments.clips, setting.clip)
    rows = []
    for task in setting.tasks:
        rows += summarise(task, measure(task, setting, arguments.clips, arguments.peer_python))
    result = {
        **provenance("cpu"),
        "about": ABOUT.format(rounds=setting.rounds, **asdict(setting.clip)),
        "setting": asdict(setting),
        "versions": call_script(ENCODING, sys.executable, "versions"),
        "peer_versions": call_script(ENCODING, arguments.peer_python, "versions"),
        "clip": describe_clip(clip, setting.clip),
        "rows": rows,
        "tried": try_imports(setting, make_clip(arguments.clips, WARM_UP), arguments.peer_python),
    }
    write_results(arguments.out, "processors", result, as_markdown(result))
    print(f"wrote {arguments.out / 'processors'}.json and .md")


if __name__ == "__main__":
    main()
