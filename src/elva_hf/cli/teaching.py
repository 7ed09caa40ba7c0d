"""`elva teach`: run a teacher over a data set once, so that training need not run it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva_hf.cli import loading
from elva_hf.errors_elva import ConfigurationError

if TYPE_CHECKING:
    from elva_hf.data.mixtures import DataSource
    from elva_hf.processing_elva import ElvaProcessor
    from elva_hf.training.teacher import VisualTeacher

PENULTIMATE = -2


@dataclass(frozen=True)
class Lesson:
    """Rows to teach, and by whom.

    Args:
        sources: Of the rows.
        processor: Of the student.
        options: Of its video processor.
        teacher: Folder or Hub id.
        revision: On the Hub.
        layer: Hidden state.
        teacher_dtype: To compute in; as saved if None.
        cache: Folder.
        max_bad_fraction: Share of rows that may be unreadable.
        seed: Of a part that is taken of a source.
    """

    sources: list[DataSource]
    processor: ElvaProcessor
    options: dict[str, Any]
    teacher: str | None
    revision: str | None
    layer: int
    teacher_dtype: str | None
    cache: str | None
    max_bad_fraction: float
    seed: int = 0


@loading.takes_frame_options
def teach(
    options: dict[str, Any],
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Name or YAML file of a recipe.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the recipe to change.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Rows to teach, instead of a recipe's sources.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR", help="Checkpoint of the student, for its processor.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="PATH", help="Vision encoder; the recipe's if not given.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Hidden state; the recipe's or -2 if not given.")] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Cache folder; guidance.cache if not given.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Number of this process; RANK if not given.")] = None,
    world: Annotated[int | None, typer.Option(min=1, help="Processes in all; WORLD_SIZE if not given.")] = None,
    device: loading.Device = None,
    teacher_dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32, bfloat16 or float16; the recipe's or as saved.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Of the cache: float16 or bfloat16.")] = "float16",
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 0,
) -> None:
    """Write a teacher's features of all videos of a data set to a folder.

    Takes a RECIPE whose stages have guidance, or --data FILE with --model DIR and --teacher PATH. Training reads the
    folder with guidance.cache=DIR. Started again, it adds what is missing; with --rank and --world, or under torchrun,
    each process does its share of the rows. Needs the frame options of the training that will read it.
    """
    lessons = list(_lessons(recipe, overrides or [], data, model, options))
    chosen = {"teacher": teacher, "layer": layer, "cache": out, "teacher_dtype": teacher_dtype}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    rank, world = read_rank(rank, world)
    device = device or _own_device()
    known: dict[tuple, VisualTeacher] = {}
    for lesson in lessons:
        lesson = replace(lesson, **chosen)
        _check_named(lesson)
        _run(lesson, known, rank=rank, world=world, device=device, dtype=dtype, workers=workers)


def read_rank(rank: int | None, world: int | None) -> tuple[int, int]:
    """Number of this process and of all, as given or as a launcher says.

    Raises:
        ConfigurationError: One without the other, or a rank that is none of them.
    """
    if (rank is None) != (world is None):
        raise ConfigurationError("--rank and --world go together; give both or neither.")
    if rank is None:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ConfigurationError(f"rank {rank} is none of {world} processes; ranks go from 0 to {world - 1}.")
    return rank, world


def _lessons(
    recipe: str | None, overrides: list[str], data: str | None, model: str | None, options: dict[str, Any]
) -> Iterator[Lesson]:
    if (recipe is None) == (data is None):
        raise ConfigurationError("name a RECIPE, or rows with --data FILE; one of them.")
    if data is not None:
        yield _lesson_of_file(data, model, options)
        return
    from elva_hf.training.building import build_processor
    from elva_hf.training.recipe import read_recipe

    read = read_recipe(recipe, overrides)
    guided = [stage for stage in read.stages if stage.guidance is not None]
    if not guided:
        raise ConfigurationError(f"recipe {recipe} has no stage with guidance: there is nothing to teach.")
    for stage in guided:
        guidance = stage.guidance
        yield Lesson(
            sources=list(stage.data.sources.values()),
            processor=loading.load_processor(loading.find_checkpoint(model)) if model else build_processor(stage),
            options={**stage.video.options, **options},
            teacher=guidance.teacher,
            revision=guidance.revision,
            layer=guidance.layer,
            teacher_dtype="float32" if stage.training.use_cpu else guidance.teacher_dtype,
            cache=guidance.cache,
            max_bad_fraction=stage.data.max_bad_fraction,
            seed=stage.training.seed,
        )


def _lesson_of_file(data: str, model: str | None, options: dict[str, Any]) -> Lesson:
    from elva_hf.data.mixtures import DataSource

    if model is None:
        raise ConfigurationError("--data needs --model DIR: its processor decides which pixels the teacher sees.")
    return Lesson(
        sources=[DataSource(name=Path(data).name, path=data)],
        processor=loading.load_processor(loading.find_checkpoint(model)),
        options=options,
        teacher=None,
        revision=None,
        layer=PENULTIMATE,
        teacher_dtype=None,
        cache=None,
        max_bad_fraction=0.01,
    )


def _check_named(lesson: Lesson) -> None:
    if lesson.teacher is None:
        raise ConfigurationError("no teacher: give --teacher PATH, or guidance.teacher=PATH with a recipe.")
    if lesson.cache is None:
        raise ConfigurationError("no folder for the features: give --out DIR, or guidance.cache=DIR with a recipe.")


def _own_device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _run(
    lesson: Lesson, known: dict[tuple, VisualTeacher], *, rank: int, world: int, device: str, dtype: str, workers: int
) -> None:
    from tqdm import tqdm

    from elva_hf.data.datasets import BadSamples
    from elva_hf.data.mixtures import Mixture
    from elva_hf.training.teacher import VisualTeacher
    from elva_hf.training.teacher_cache import TeacherCacheWriter
    from elva_hf.training.teaching import RowsToTeach, teach

    rows = Mixture([replace(source, weight=None, repeat=1.0) for source in lesson.sources], lesson.seed, shuffle=False)
    named = (lesson.teacher, lesson.revision, lesson.layer, lesson.teacher_dtype)
    if named not in known:
        with loading.explained(lesson.teacher):
            known[named] = VisualTeacher.from_pretrained(
                lesson.teacher, lesson.layer, lesson.teacher_dtype, device, revision=lesson.revision
            )
    spec, folder = known[named].spec, Path(lesson.cache)
    clip = spec.grid[0] * spec.grid[1] * spec.width * 2
    print(f"teacher   {spec.path}, layer {spec.layer}: {spec.grid[0]}x{spec.grid[1]} places of {spec.width} features")
    print(f"rows      {len(rows)}, of which process {rank} of {world} takes every {world}th; {_size(clip)} a clip")
    bad = folder / f"bad_samples-{rank:05d}.jsonl"
    own = RowsToTeach(
        rows,
        range(rank, len(rows), world),
        lesson.processor,
        BadSamples(bad, lesson.max_bad_fraction, min_samples=100),
        **lesson.options,
    )
    patch_size = lesson.processor.video_processor.patch_size
    with (
        TeacherCacheWriter(folder, spec, patch_size, rank=rank, dtype=dtype) as writer,
        tqdm(total=len(own), desc="teaching", unit="row", leave=False, delay=2) as bar,
    ):
        taught = teach(own, known[named], writer, num_workers=workers, tick=bar.update)
    there = taught.videos - taught.added
    print(f"videos    {taught.videos}: {taught.added} taught, {there} there already; {_size(taught.num_bytes)} written")
    if taught.bad_rows:
        print(f"bad       {taught.bad_rows} of {taught.rows} rows: see {bad}")
    print(f"cache     {folder}: {len(writer)} videos. Train with guidance.cache={folder}")


def _size(num_bytes: float) -> str:
    """`1.7 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
