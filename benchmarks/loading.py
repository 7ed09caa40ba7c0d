"""How many training samples a second come out of the data set, the collator and 0, 1 or 2 worker processes.

    python benchmarks/loading.py                                   # minutes; leave the machine alone
    python benchmarks/loading.py --size tiny --rounds 1 --out /tmp # seconds: does it run

The clips are made first and kept in `--clips`. Every figure comes from a process of its own, settings take turns, and
every batch is checked for its shape. What a GPU would need is derived from the measured CPU time, counted FLOPs and an
assumed speed of the GPU, and stands in a table of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from measuring import (
    RESULTS,
    Meter,
    markdown_table,
    provenance,
    run_in_fresh_process,
    spread,
    write_results,
)
from numbered_clips import ClipSpec, describe_clip, make_clip
from PIL import Image
from torch.utils.data import DataLoader

from elva_hf.configuration_elva import ElvaConfig
from elva_hf.data.collator import ElvaCollator
from elva_hf.data.datasets import ElvaDataset
from elva_hf.data.encoding import encode_row, plan_row
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.processing_elva import ElvaProcessor

Row = dict[str, Any]

ASSUMED_FLOPS = 4e14  # a second: two fifths of the 989e12 that an H100 or H200 is said to have in bfloat16
BACKWARD = 3  # a training step is three forward passes, without gradient checkpointing
BATCH_SIZE = 2  # of a device, as in the recipes


@dataclass(frozen=True)
class Task:
    """Samples of one stage.

    Args:
        name: Short.
        clip: The file.
        num_frames: Frames of a sample; 0 for a still image of the clip.
        longest_edge: Pixels.
        num_questions: Independent questions about it, packed into one row.
        num_samples: Samples that are timed.
    """

    name: str
    clip: ClipSpec
    num_frames: int
    longest_edge: int
    num_questions: int = 1
    num_samples: int = 16


def make_tasks(size: str) -> dict[str, Task]:
    """The tasks of a full run, or the same on short clips of few pixels."""
    web, hd = ClipSpec(seconds=15, height=360, width=640), ClipSpec(seconds=15)
    tasks = [
        Task("stage 1, images", web, 0, 448, num_samples=96),
        Task("stage 2, 360p", web, 16, 448),
        Task("stage 2, 360p, 8 questions", web, 16, 448, num_questions=8),
        Task("stage 2, 720p", hd, 16, 448),
        Task("stage 3, 720p", hd, 32, 672, num_samples=8),
    ]
    if size == "tiny":
        small = ClipSpec(seconds=2, height=180, width=320, gop=24)
        tasks = [replace(task, clip=small, num_frames=task.num_frames // 4, num_samples=4) for task in tasks]
    return {task.name: task for task in tasks}


def make_processor() -> ElvaProcessor:
    """A processor with the patches of the paper's models."""
    return ElvaProcessor.from_tokenizer(build_toy_tokenizer(max_length=10**9))


def make_row(task: Task, folder: Path) -> Row:
    """A row of a task; its file is made if it is not there."""
    path = make_clip(folder, task.clip)
    kind = "video"
    if not task.num_frames:
        path, kind = make_image(path), "image"
    messages: list[Row] = []
    for number in range(task.num_questions):
        content: list[Row] = [{"type": "text", "text": f"What happens in part {number} of it, and where is it seen?"}]
        if number == 0:
            content.insert(0, {"type": kind, "path": str(path)})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": "Three bright squares move over a rough ground. " * 2})
    return {"id": path.name, "messages": messages, "independent_turns": task.num_questions > 1}


def make_image(clip: Path) -> Path:
    """The first frame of a clip as JPEG."""
    path = clip.with_suffix(".jpg")
    if not path.exists():
        with av.open(str(clip)) as container:
            pixels = next(container.decode(video=0)).to_ndarray(format="rgb24")
        Image.fromarray(pixels).save(path, quality=92)
    return path


def options_of(task: Task) -> Row:
    """Options of the video processor."""
    return {"longest_edge": task.longest_edge, **({"num_frames": task.num_frames} if task.num_frames else {})}


def measure(task: Task, num_workers: int, folder: Path) -> Row:
    """Samples a second of one setting, and with no workers also the CPU time of a sample and of its parts."""
    torch.set_num_threads(1)  # as in a worker
    processor, row = make_processor(), make_row(task, folder)
    dataset = ElvaDataset(
        [row] * (task.num_samples + 2 * BATCH_SIZE * max(num_workers, 1)), processor, **options_of(task)
    )
    collator = ElvaCollator(processor, packing="shared_prefix")
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        collate_fn=collator,
        num_workers=num_workers,
        prefetch_factor=1 if num_workers else None,
    )
    batches = iter(loader)
    for _ in range(2 * max(num_workers, 1)):  # imports, page cache, and a full pipe
        batch = next(batches)
    count = 0
    with Meter("cpu", memory=False) as meter:
        for batch in batches:
            count += 1
            check(batch, task, processor)
    figures: Row = {"samples_per_second": count * BATCH_SIZE / meter.wall_seconds}
    if not num_workers:
        figures["cpu_seconds"] = meter.seconds / (count * BATCH_SIZE)
        figures |= measure_parts(row, processor, task)
    return figures


def check(batch: dict[str, torch.Tensor], task: Task, processor: ElvaProcessor) -> None:
    """Refuse a batch that is not what was asked for."""
    frames = int((batch["input_ids"] == processor.frame_token_id).sum())
    if frames != BATCH_SIZE * max(task.num_frames, 1):
        raise RuntimeError(f"{task.name}: a batch has {frames} frames")


def measure_parts(row: Row, processor: ElvaProcessor, task: Task, rounds: int = 4) -> Row:
    """CPU seconds of the parts of one sample: pixels, text, and putting a batch together; and of a plan."""
    options, collator = options_of(task), ElvaCollator(processor, packing="shared_prefix")
    (block,) = [block for block in row["messages"][0]["content"] if "path" in block]

    def seconds(function: Any) -> float:
        start = time.process_time()
        for _ in range(rounds):
            function()
        return (time.process_time() - start) / rounds

    samples = [encode_row(row, processor, **options)] * BATCH_SIZE
    pixels = seconds(lambda: processor.video_processor.encode([block["path"]], **options))
    return {
        "pixel_seconds": pixels,
        "text_seconds": max(seconds(lambda: encode_row(row, processor, **options)) - pixels, 0.0),
        "collate_seconds": seconds(lambda: collator(samples)) / BATCH_SIZE,
        "plan_seconds": seconds(lambda: plan_row(row, processor, **options)),
        "num_tokens": len(samples[0]),
        "num_bytes": samples[0].pixel_values_videos.nbytes,
    }


def summarise(task: Task, runs: dict[int, list[Row]]) -> Row:
    """One row for a task: the spread of every figure over the processes."""
    alone = runs[0]
    row: Row = {"task": task.name, "kind": "measured", "runs": len(alone)}
    row["samples_per_second"] = {
        str(workers): spread([run["samples_per_second"] for run in readings]) for workers, readings in runs.items()
    }
    for name in ("cpu_seconds", "pixel_seconds", "text_seconds", "collate_seconds", "plan_seconds"):
        row[name] = spread([run[name] for run in alone])
    return {**row, "num_tokens": alone[0]["num_tokens"], "num_bytes": alone[0]["num_bytes"]}


def derive(task: Task, row: Row, folder: Path) -> list[Row]:
    """What a GPU would take of these samples, per model size."""
    processor = make_processor()
    source = make_row(task, folder)["messages"][0]["content"][0]["path"]
    media = {"videos" if task.num_frames else "images": [source]}
    visual = processor.count_tokens(**media, **options_of(task)).num_visual_tokens
    derived = []
    for size in ("elva-1.5b", "elva-7b"):
        plan = processor.plan(
            **media,
            config=ElvaConfig.from_preset(size),
            merge_schedule="none",
            text_tokens=row["num_tokens"] - visual,
            **options_of(task),
        )
        wanted = ASSUMED_FLOPS / (BACKWARD * plan.flops.maximum.total)
        most = max(figure["median"] for figure in row["samples_per_second"].values())
        derived.append(
            {
                "task": task.name,
                "kind": "derived",
                "model": size,
                "gpu_samples_per_second": wanted,
                "gpu_steps_per_second": wanted / BATCH_SIZE,
                "cores_per_gpu": wanted * row["cpu_seconds"]["median"],
                "fed_steps_per_second": most / BATCH_SIZE,
                "fed_share": most / wanted,
            }
        )
    return derived


# What the result file shows.

ABOUT = (
    "Measured: samples a second of `DataLoader(ElvaDataset, 2, collate_fn=ElvaCollator)`, wall time, from files to "
    "batches in the main process, after two batches for each worker; one thread of torch in every process; medians "
    "(least to most) of {rounds} fresh processes. All samples of a task are one file, so it is read from memory, not "
    "from a disk. CPU seconds are user and system time of a sample without workers: pixels (decode, resize, cut), text "
    "(template and tokens, the difference of two measurements), and its share of a batch. A plan is what length "
    "grouping asks for: the tokens of a row without decoding."
)
DERIVED = (
    "Derived, not measured: a GPU is assumed to do {flops:.0f} TFLOP/s in training, a step is three times the counted "
    "forward FLOPs of a sample with its text (no merging, all logits at one position, no teacher, no recomputation), "
    "two samples a step. `cores` is CPU seconds of a sample times the samples such a GPU takes; `fed` is the share of "
    "it that this machine would keep busy with its best measured number of workers, and the steps a second that makes."
)


def as_markdown(result: Row) -> str:
    """The result as tables."""
    workers = result["setting"]["workers"]
    speed = [
        (
            *(row["task"], row["num_tokens"], f"{row['num_bytes'] / 1e6:.1f}"),
            *(_spread(row["samples_per_second"][str(count)]) for count in workers),
        )
        for row in result["rows"]
    ]
    cost = [
        (
            row["task"],
            *(1e3 * row[name]["median"] for name in ("cpu_seconds", "pixel_seconds", "text_seconds")),
            *(1e3 * row[name]["median"] for name in ("collate_seconds", "plan_seconds")),
        )
        for row in result["rows"]
    ]
    need = [
        (
            *(row["task"], row["model"], row["gpu_steps_per_second"], row["cores_per_gpu"]),
            *(row["fed_steps_per_second"], f"{100 * min(row['fed_share'], 1):.0f} %"),
        )
        for row in result["derived"]
    ]
    parts = [
        "# Loading training samples",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}, torch "
        f"{result['torch']}, av {result['versions']['av']}.",
        result["about"],
        "## Samples a second",
        markdown_table(["task", "tokens", "pixels, MB", *(f"{count} workers" for count in workers)], speed),
        "## CPU of a sample, ms",
        markdown_table(["task", "whole", "pixels", "text", "batch", "plan"], cost),
        "## What a GPU would take",
        result["about_derived"],
        markdown_table(["task", "model", "GPU, steps/s", "cores for a GPU", "fed, steps/s", "fed"], need),
        "## The clips",
        markdown_table(
            ["clip", "size", "frames", "key frames", "Mbit/s"],
            (
                (
                    *(clip["name"], f"{clip['width']}x{clip['height']}", clip["num_frames"]),
                    *(clip["num_key_frames"], clip["megabits_per_second"]),
                )
                for clip in result["clips"]
            ),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _spread(figure: Row) -> str:
    return f"{figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of the clips")
    parser.add_argument("--rounds", type=int, default=3, help="each setting in a fresh process")
    parser.add_argument("--workers", default="0+1+2", help="worker processes, with + between them; 0 must be there")
    parser.add_argument("--tasks", help="names, with + between them; default: all")
    parser.add_argument(
        "--clips", type=Path, default=Path(tempfile.gettempdir()) / "elva-clips", help="where to keep them"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


def main() -> None:
    """Measure everything and write the result files."""
    arguments = parse_arguments()
    known = make_tasks(arguments.size)
    names = arguments.tasks.split("+") if arguments.tasks else list(known)
    workers = [int(count) for count in arguments.workers.split("+")]
    if unknown := set(names) - set(known):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    if 0 not in workers:
        raise SystemExit("--workers must name 0: the CPU time of a sample is measured without workers")
    tasks = [known[name] for name in names]
    for task in tasks:
        make_row(task, arguments.clips)
    runs: dict[str, dict[int, list[Row]]] = {name: {count: [] for count in workers} for name in names}
    for number in range(arguments.rounds):
        for task in tasks:
            for count in workers:
                figures = run_in_fresh_process(measure, task, count, arguments.clips)
                runs[task.name][count].append(figures)
                print(f"{task.name}, round {number + 1}, {count} workers: {figures['samples_per_second']:.2f} a second")
    rows = [summarise(task, runs[task.name]) for task in tasks]
    specs = dict.fromkeys(task.clip for task in tasks)
    result = {
        **provenance("cpu"),
        "about": ABOUT.format(rounds=arguments.rounds),
        "about_derived": DERIVED.format(flops=ASSUMED_FLOPS / 1e12),
        "setting": {"size": arguments.size, "rounds": arguments.rounds, "workers": workers, "batch_size": BATCH_SIZE},
        "tasks": [asdict(task) for task in tasks],
        "versions": {"av": av.__version__, "numpy": np.__version__},
        "rows": rows,
        "derived": [line for task, row in zip(tasks, rows, strict=True) for line in derive(task, row, arguments.clips)],
        "clips": [describe_clip(make_clip(arguments.clips, spec), spec) for spec in specs],
    }
    write_results(arguments.out, "loading", result, as_markdown(result))
    print(f"wrote {arguments.out / 'loading'}.json and .md")


if __name__ == "__main__":
    main()
