"""What it costs to read some frames of a video file: our reader, transformers' own, PyAV loops, decord and torchcodec.

    python benchmarks/decoding.py --peer-python ../peers/bin/python   # everything; leave the machine alone
    python benchmarks/decoding.py --size tiny --rounds 1 --out /tmp   # seconds: does it run

The clips are made first and kept in `--clips`. Every reading is a process of its own, readers take turns, and every
frame is checked by the number painted in it. decord and torchcodec live in an environment of their own:

    python -m venv ../peers && ../peers/bin/pip install decord==0.6.0 av==18.1.0 numpy torch==2.13.0
    ../peers/bin/pip install --no-deps torchcodec==0.13.0   # the last without CUDA; `apt-get install ffmpeg` first

A reader that is not there is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measuring import RESULTS, markdown_table, provenance, ratio, spread, write_results
from numbered_clips import ClipSpec, describe_clip, make_clip
from reading import READERS

Row = dict[str, Any]

READING = Path(__file__).with_name("reading.py")
OURS = "elva-hf"
PEERS = ("decord", "torchcodec")
WHOLE = "PyAV, every frame decoded"
READ_TO_THE_END = ("transformers, pyav", WHOLE, "PyAV, every frame converted")
EVERYONE = tuple(name for name in READERS if not name.endswith("own resize"))
IN_PROCESS = tuple(name for name in EVERYONE if "isolated" not in name and "converted" not in name)
WARM_UP = ClipSpec(seconds=2, height=180, width=320, gop=24)
SMALL = (392, 672)  # 720p at longest edge 672: 14 x 24 patches of 28 pixels


@dataclass(frozen=True)
class Task:
    """Some frames of a clip.

    Args:
        name: Short.
        clip: The clip.
        num_frames: Frames to read, evenly spread.
        size: `(height, width)` to resize them to; None for the clip's own.
        readers: Who reads.
        rounds: At most so many; None for as many as asked for.
    """

    name: str
    clip: ClipSpec
    num_frames: int
    size: tuple[int, int] | None = None
    readers: tuple[str, ...] = EVERYONE
    rounds: int | None = None

    @property
    def indices(self) -> list[int]:
        """The middle frames of equal parts."""
        return [(2 * part + 1) * self.clip.num_frames // (2 * self.num_frames) for part in range(self.num_frames)]


def make_tasks(size: str) -> dict[str, Task]:
    """The tasks of a full run, or the same on clips of seconds and few pixels."""
    full = size == "full"
    minute = ClipSpec() if full else WARM_UP
    key_frames = replace(minute, gop=60 if full else 12)
    many, few = (64, 32) if full else (8, 4)
    small = SMALL if full else (112, 196)
    hour = replace(minute, repeats=60 if full else 3)
    tasks = [
        Task("minute, few", minute, few),
        Task("minute, many", minute, many),
        Task("short GOP", key_frames, few // 4),
        Task("no B-frames", replace(key_frames, b_frames=False), few),
        Task("hour", hour, many, rounds=3),
        Task("resized", minute, many, small, tuple(READERS)),
        *(
            Task(name, replace(minute, codec=codec, seconds=15 if full else 2), few // 2, readers=IN_PROCESS)
            for name, codec in {"HEVC": "hevc", "VP9": "vp9", "AV1": "av1"}.items()
        ),
    ]
    return {task.name: task for task in tasks}


@dataclass(frozen=True)
class Setting:
    """How a run measures."""

    size: str
    rounds: int
    full: bool
    tasks: tuple[str, ...]
    readers: tuple[str, ...]

    def chosen(self) -> list[Task]:
        """The tasks to run."""
        return [task for name, task in make_tasks(self.size).items() if name in self.tasks]

    def readers_of(self, task: Task) -> list[str]:
        """Who reads a task."""
        return [name for name in task.readers if name in self.readers]


def call_script(script: Path, python: str, argument: str) -> Row:
    """Run a script in a fresh process of some Python, and read the JSON it prints."""
    done = subprocess.run([python, str(script), argument], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": f"exit code {done.returncode}: {last[:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def python_of(reader: str, peer_python: str) -> str:
    """The Python that has a reader."""
    return peer_python if reader.startswith(PEERS) else sys.executable


def measure(task: Task, setting: Setting, clips: Path, peer_python: str) -> dict[str, list[Row]]:
    """Every reader's runs of one task, in rounds; a reader that cannot read is asked once."""
    path = make_clip(clips, task.clip)
    job = {
        "path": str(path),
        "warm_up": str(make_clip(clips, WARM_UP)),
        "indices": task.indices,
        "size": task.size,
        "num_encoded": task.clip.num_encoded,
        "fps": task.clip.fps,
    }
    readers = [name for name in setting.readers_of(task) if not is_derived(task, name, setting)]
    runs: dict[str, list[Row]] = {name: [] for name in readers}
    for number in range(min(setting.rounds, task.rounds or setting.rounds)):
        for name in readers:
            if runs[name] and "seconds" not in runs[name][0]:
                continue
            run = call_script(READING, python_of(name, peer_python), json.dumps({**job, "reader": name}))
            runs[name].append(run)
            print(f"{task.name}, round {number + 1}: {name}: {run.get('seconds', run)}", file=sys.stderr)
    return runs


def is_derived(task: Task, reader: str, setting: Setting) -> bool:
    """Whether a reader that decodes all of a repeated clip is left at the figure of one repeat."""
    return task.clip.repeats > 1 and reader in READ_TO_THE_END and not setting.full


def summarise(task: Task, runs: dict[str, list[Row]]) -> list[Row]:
    """One row for each reader: spread of its figures, and CPU time as a ratio to ours, round by round."""
    rows = []
    for name, readings in runs.items():
        row = {"task": task.name, "reader": name}
        if "seconds" not in readings[0]:
            rows.append({**row, **readings[0]})
            continue
        columns = {key: [run.get(key) for run in readings] for key in ("seconds", "wall_seconds", "peak_bytes")}
        rows.append(
            {
                **row,
                "kind": "measured",
                "runs": len(readings),
                **{key: spread(values) for key, values in columns.items()},
                "seconds_ratio": _ratio_to_ours(columns["seconds"], runs),
                "num_frames": readings[0].get("num_frames"),
                "exact": all(run.get("exact") for run in readings),
            }
        )
    return rows


def _ratio_to_ours(seconds: list[float | None], runs: dict[str, list[Row]]) -> float | None:
    ours = [run.get("seconds") for run in runs.get(OURS, [])]
    return ratio(seconds, ours) if len(ours) == len(seconds) else None


def derive(task: Task, rows: list[Row], setting: Setting) -> list[Row]:
    """Rows of the readers that decode all of a repeated clip, from what one repeat cost them."""
    of_one = replace(task.clip, repeats=1)
    sources = [one.name for one in setting.chosen() if one.clip == of_one and one.size is None]
    ours = find(rows, task.name, OURS)
    derived = []
    for name in setting.readers_of(task):
        if not is_derived(task, name, setting) or not sources:
            continue
        for row in find(rows, sources[-1], name):
            seconds = {key: task.clip.repeats * value for key, value in row["seconds"].items()}
            derived.append(
                {
                    "task": task.name,
                    "reader": name,
                    "kind": "derived",
                    "basis": f"{task.clip.repeats} times '{row['task']}'",
                    "seconds": seconds,
                    "seconds_ratio": seconds["median"] / ours[0]["seconds"]["median"] if ours else None,
                }
            )
    return derived


# What the issue of this benchmark asks for.


def make_claims(setting: Setting, rows: list[Row]) -> list[Row]:
    """What should hold, the figure that tells, and whether it does; from the least CPU time of each reader."""

    def faster(text: str, task: str, readers: Sequence[str], wanted: float) -> Row:
        theirs = min((best for name in readers if (best := least_seconds(rows, task, name))), default=None)
        own = least_seconds(rows, task, OURS)
        return claim(text, f"at least {wanted:g}", theirs / own if theirs and own else None, lambda x: x >= wanted)

    claims = [
        faster("CPU of transformers' pyav reader / ours, minute, few", "minute, few", ["transformers, pyav"], 1.5),
        faster("CPU of decoding the hour whole / ours", "hour", [WHOLE], 15),
    ]
    for task in setting.chosen():
        for peer in PEERS:
            ways = [name for name in task.readers if name.startswith(peer)]
            claims.append(faster(f"CPU of {peer} / ours, {task.name}", task.name, ways, 1))
    peaks = [row["peak_bytes"]["max"] / 1e6 for row in find(rows, "resized", OURS) if row["peak_bytes"]]
    wrong = sum(not row["exact"] for row in rows if "exact" in row and row["reader"].startswith(OURS))
    return [
        *claims,
        claim("peak memory of ours, resized, MB", "below 150", peaks[0] if peaks else None, lambda x: x < 150),
        claim("rows of ours with a wrong frame", "0", wrong, lambda x: x == 0),
    ]


def claim(text: str, wanted: str, figure: float | None, holds: Callable[[float], bool]) -> Row:
    """One line of what should hold; `holds` is None where there is no figure."""
    held = None if figure is None else holds(figure)
    return {"claim": text, "wanted": wanted, "figure": figure, "kind": "derived", "holds": held}


def find(rows: list[Row], task: str, reader: str) -> list[Row]:
    """The row of a reader that read a task, or none."""
    return [row for row in rows if (row["task"], row["reader"]) == (task, reader) and "seconds" in row]


def least_seconds(rows: list[Row], task: str, reader: str) -> float | None:
    """Least CPU time of a reader that returned the right frames."""
    return next((row["seconds"]["min"] for row in find(rows, task, reader) if row.get("exact", True)), None)


# What the result file shows.

ABOUT = (
    "CPU time is user and system time of the reading process and its children, from opening the file to all frames as "
    "uint8 RGB, imports and a small warm-up clip left out; medians (least to most) of up to {rounds} fresh processes, "
    "readers taking turns. `ratio` is a reader's CPU time to ours of the same round. Peak memory is above what was "
    "held after the warm-up, the returned frames included. `exact`: every returned frame carries the painted number of "
    "the frame asked for (in the hour numbers start again every minute), and its time where the reader gives times. "
    "Frames asked for are the middles of equal parts. Threads are each library's own choice (decord: all cores; "
    "torchcodec: one) unless a row says otherwise."
)
CLAIMS = (
    "From the least CPU time of each reader that returned the right frames; of a peer's variants, the one that costs "
    "it least. The 1.5 and the 15 are what was set out to reach; against decord and torchcodec, to be no slower."
)
RESIZED = (
    "Peers hand over whole frames, which are then resized one by one as the processors of transformers do "
    "(uint8, bicubic, antialiased); `its own resize` lets the library resize while it decodes, with other pixels."
)


def as_markdown(result: Row) -> str:
    """The result as tables."""
    setting = Setting(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in result["setting"].items()}
    )
    parts = [
        "# Reading frames of a video file",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}.",
        f"Ours with {named(result['versions'])}; decord and torchcodec with {named(result['peer_versions'])}.",
        result["about"],
        "## What should hold",
        CLAIMS,
        claims_table(result["claims"]),
        *(part for task in setting.chosen() for part in task_parts(task, result)),
        "## The clips",
        clips_table(result["clips"]),
    ]
    return "\n\n".join(parts) + "\n"


def task_parts(task: Task, result: Row) -> list[str]:
    """Heading and table of one task."""
    clip = task.clip
    size = "" if task.size is None else f", each resized to {task.size[1]}x{task.size[0]}"
    text = (
        f"{task.num_frames} of {clip.num_frames} frames{size}: {clip.codec}, {clip.width}x{clip.height}, "
        f"{clip.fps} frames a second, a key frame every {clip.gop} or fewer."
    )
    rows = [row for row in result["rows"] if row["task"] == task.name]
    return [f"## {task.name}", text, *([RESIZED] if task.size else []), rows_table(rows)]


def rows_table(rows: list[Row]) -> str:
    """One line for each reader."""
    lines = []
    for row in rows:
        if "seconds" not in row:
            lines.append((row["reader"], *(["-"] * 4), row.get("unavailable") or row["failed"]))
            continue
        wall, peak = row.get("wall_seconds"), row.get("peak_bytes")
        lines.append(
            (
                *(row["reader"], row["seconds_ratio"], _seconds(row["seconds"])),
                *(wall and wall["median"], peak and f"{peak['median'] / 1e6:.0f}"),
                row.get("basis") or ("exact" if row["exact"] else "WRONG FRAMES"),
            )
        )
    return markdown_table(["reader", "ratio", "CPU, s", "wall, s", "peak, MB", ""], lines)


def claims_table(claims: list[Row]) -> str:
    """One line for each claim."""
    words = {True: "yes", False: "no", None: "not measured"}
    return markdown_table(
        ["claim", "wanted", "figure", "holds"],
        ((row["claim"], row["wanted"], row["figure"], words[row["holds"]]) for row in claims),
    )


def clips_table(clips: list[Row]) -> str:
    """One line for each clip."""
    return markdown_table(
        ["clip", "frames", "key frames", "Mbit/s", "frames no other refers to"],
        (
            (
                *(clip["name"], clip["num_frames"], clip["num_key_frames"], clip["megabits_per_second"]),
                None if clip["unreferenced_share"] is None else f"{100 * clip['unreferenced_share']:.0f} %",
            )
            for clip in clips
        ),
    )


def _seconds(figure: Row) -> str:
    return f"{figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})"


def named(versions: Row) -> str:
    """Versions of libraries in a line."""
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "none"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of the clips")
    parser.add_argument("--rounds", type=int, default=5, help="each reader in a fresh process")
    parser.add_argument("--full", action="store_true", help="measure decoding the hour whole instead of deriving it")
    parser.add_argument("--tasks", help="names, with + between them; default: all")
    parser.add_argument("--readers", help="names, with + between them; default: all")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has decord and torchcodec")
    parser.add_argument(
        "--clips", type=Path, default=Path(tempfile.gettempdir()) / "elva-clips", help="where to keep them"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


def choose(names: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """Names with + between them, or all."""
    chosen = tuple(names.split("+")) if names else tuple(known)
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return chosen


def main() -> None:
    """Measure everything and write the result files."""
    arguments = parse_arguments()
    tasks = choose(arguments.tasks, make_tasks(arguments.size))
    readers = choose(arguments.readers, READERS)
    setting = Setting(arguments.size, arguments.rounds, arguments.full, tasks, readers)
    rows: list[Row] = []
    for task in setting.chosen():
        rows += summarise(task, measure(task, setting, arguments.clips, arguments.peer_python))
        rows += derive(task, rows, setting)
    specs = dict.fromkeys(task.clip for task in setting.chosen())
    result = {
        **provenance("cpu"),
        "about": ABOUT.format(rounds=setting.rounds),
        "setting": asdict(setting),
        "versions": call_script(READING, sys.executable, "versions"),
        "peer_versions": call_script(READING, arguments.peer_python, "versions"),
        "claims": make_claims(setting, rows),
        "rows": rows,
        "clips": [describe_clip(make_clip(arguments.clips, spec), spec) for spec in specs],
    }
    write_results(arguments.out, "decoding", result, as_markdown(result))
    print(f"wrote {arguments.out / 'decoding'}.json and .md")


if __name__ == "__main__":
    main()
