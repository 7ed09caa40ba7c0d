"""`elva eval`: held-out tables that anyone can print again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elva_hf.errors_elva import CheckpointError, ConfigurationError

BENCHMARKS = ("toy-world",)


def evaluate(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="What to score on: toy-world.")],
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoint folder; the shipped one if not given.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions for each task and column.")] = 500,
    split: Annotated[str, typer.Option(help="test to report, validation to choose.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 64,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the scores as JSON.")] = None,
) -> None:
    """Score a checkpoint on held-out videos.

    Prints exact match per task, from arrays and from mp4 files, beside the best answerer that never looks, and what
    falls short of the bars. Takes minutes.
    """
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoProcessor

    import elva_hf
    from elva_hf.data.toy_world import TASKS
    from elva_hf.evaluation import toy_world

    if benchmark not in BENCHMARKS:
        raise ConfigurationError(f"benchmark {benchmark!r} is not known; choose one of {', '.join(BENCHMARKS)}.")
    folder = model or elva_hf.tiny_checkpoint()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json.")
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    with tqdm(total=4 * questions * len(TASKS), desc="answering", leave=False, delay=2) as bar:
        scores = toy_world.evaluate(
            student, processor, num_questions=questions, split=split, batch_size=batch_size, tick=bar.update
        )
    print(toy_world.format_table(scores))
    for line in toy_world.missed_bars(scores):
        print(f"below the bar: {line}")
    if out is not None:
        toy_world.write_scores(scores, out, split=split)
