"""`elva data check`: whether training data can be trained on, and how many tokens they are, before a GPU is rented."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import ConfigurationError

if TYPE_CHECKING:
    from elva_hf.configuration_elva import VideoDecoderConfig
    from elva_hf.data.checking import CheckOptions, CheckReport
    from elva_hf.data.mixtures import DataSource
    from elva_hf.processing_elva import ElvaProcessor
    from elva_hf.video_processing_elva import ElvaVideoProcessor

WRONG = 2
"""Exit code where anything is wrong with the data."""

DEFAULT_PRESET = "elva-7b"
"""Whose tokens are counted where no model is named."""

data_app = typer.Typer(rich_markup_mode=None, help="Check training data.", no_args_is_help=True)


@data_app.callback()
def data() -> None:
    """Check training data before a GPU is rented."""


@dataclass(frozen=True)
class Task:
    """A data set to check.

    Args:
        source: What is read, and how.
        stage: Of the recipe it belongs to; None for a file.
        video: Options of the video processor that the stage has.
    """

    source: DataSource
    stage: str | None
    video: dict[str, Any]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.source.path if self.stage is None else f"{self.stage}/{self.source.name}"


@loading.takes_frame_options
def check(
    file: Annotated[str, typer.Argument(metavar="FILE|RECIPE", help="Data file, folder or pattern; or a recipe.")],
    options: dict[str, Any],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Of a recipe: fields to change.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR", help="Checkpoint whose processor counts the tokens.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Or the geometry of a model of the paper, which counts no text: elva-7b."),
    ] = None,
    data_format: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Format of FILE; found out if not given.")
    ] = None,
    media_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the media; FILE's own if not given.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="NAME", help="Entry of a dataset_info.json.")] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Split of a saved data set.")] = None,
    ignore_key: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Key of records that is read past; may be repeated.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens a row may have; the model's positions if not given.", min=1)
    ] = None,
    num_rows: Annotated[
        int | None, typer.Option("--rows", metavar="N", help="Check N rows only, spread over the file.", min=1)
    ] = None,
    decode: Annotated[int, typer.Option(metavar="N", help="Decode the media of N rows, drawn at random.", min=0)] = 0,
    errors: Annotated[int, typer.Option(metavar="N", help="Show the first N errors; all are counted.", min=0)] = 10,
    workers: Annotated[int, typer.Option(metavar="N", help="Processes that read.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Check training data, and count their tokens.

    Reads every row of FILE, or of all data sources of RECIPE, opens the header of every video and image, and counts the
    tokens that --model would get (without it the visual ones of elva-7b); decodes nothing but what --decode asks for.
    Exits with 2 if anything is wrong.
    """
    from elva_hf.data.checking import CheckOptions

    config, video_processor, processor, name = _geometry(model, preset)
    limit = context_length or config.get_text_config().max_position_embeddings
    given = {
        "format": data_format,
        "media_root": media_root,
        "split": split,
        "options": {} if dataset is None else {"dataset": dataset},
        "ignore_keys": tuple(ignore_key or ()),
        "allow_urls": bool(options.get("allow_urls")),
    }
    base = CheckOptions(video_processor, processor, options, limit, decode, num_rows, workers)
    reports = []
    for task in _tasks(file, overrides or [], given):
        with busy(f"reading {task.name}"):
            report = _run(task, base, errors)
        reports.append((task.name, report))
        if not as_json:
            print(*([""] if len(reports) > 1 else []), *describe(task, report, name, limit), sep="\n")
    if as_json:
        found = [{"name": task_name, **report.to_dict()} for task_name, report in reports]
        print(json.dumps({"model": name, "context_length": limit, "data": found}, indent=2))
    if any(report.num_bad for _, report in reports):
        raise typer.Exit(WRONG)


data_app.command("check")(check)


def describe(task: Task, report: CheckReport, name: str, limit: int) -> Iterator[str]:
    """What was found, for people.

    Args:
        task: What was checked.
        report: What was found.
        name: Of the model that counted.
        limit: Tokens that a row may have.
    """
    part = "" if report.num_checked == report.num_rows else f", {report.num_checked} of them checked"
    yield f"data      {task.name}: {report.num_rows} rows{part}{_expectation(task, report)}"
    why = f": {_listed(report.problems)}" if report.problems else ""
    yield f"rows      {report.num_checked - report.num_bad} good, {report.num_bad} bad{why}"
    yield f"media     {_listed(report.media) or 'none'}; {report.num_without_media} rows without"
    if report.durations:
        mean = sum(report.durations) / len(report.durations)
        yield f"length    {mean:.1f} s on average, {max(report.durations):.1f} s at most"
    if report.sizes:
        shown = _listed(dict(report.sizes.most_common(4)), "{kind} ({count})")
        yield f"pixels    {shown}{', ...' * (len(report.sizes) > 4)}; {report.num_bytes / 1e6:.1f} MB of files"
    if report.num_decoded:
        yield f"decoded   the media of {report.num_decoded} rows"
    if report.num_double_ids or report.num_double_rows:
        yield f"doubles   {report.num_double_ids} ids and {report.num_double_rows} contents that another row has too"
    yield ""
    yield from _describe_tokens(report)
    yield f"context  {limit} of {name}: {report.num_beyond} rows are beyond it"
    if report.errors:
        yield ""
        yield from report.errors
        if report.num_bad > len(report.errors):
            yield f"... and {report.num_bad - len(report.errors)} more; --errors {report.num_bad} shows all"


def _describe_tokens(report: CheckReport) -> Iterator[str]:
    from elva_hf.data.checking import COUNTS

    yield f"{'tokens':<8} {'mean':>10} {'median':>8} {'95 %':>8} {'most':>8} {'sum':>14}"
    for kind in COUNTS:
        spread = report.distribution(kind)
        if spread is not None:
            cells = f"{spread['mean']:>10.1f} {spread['p50']:>8} {spread['p95']:>8} {spread['max']:>8}"
            yield f"{kind:<8} {cells} {sum(report.tokens[kind]):>14}"
    if "text" not in report.tokens:
        yield "text is not counted: a preset has no tokenizer; name a checkpoint with --model"


def _run(task: Task, base: CheckOptions, num_errors: int) -> CheckReport:
    from elva_hf.data.checking import check_rows
    from elva_hf.data.mixtures import open_source
    from elva_hf.options_elva import SAMPLING_FIELDS

    taken = {} if set(base.video) & set(SAMPLING_FIELDS) else task.video  # one way to count frames replaces another
    kept = {name: value for name, value in task.video.items() if name not in SAMPLING_FIELDS}
    options = replace(base, video={**kept, **taken, **base.video})
    return check_rows(open_source(task.source), options, num_errors=num_errors)


def _tasks(file: str, overrides: list[str], given: dict[str, Any]) -> list[Task]:
    """The data sets of a file or a recipe.

    Raises:
        ConfigurationError: Options of the one given for the other, or a source without a path.
    """
    from elva_hf.data.sources import DataSource, check_filled

    if not _is_recipe(file):
        if overrides:
            raise ConfigurationError(f"{overrides[0]!r}: only a recipe has fields to change; give {file} alone.")
        return [Task(DataSource(Path(file).name or file, file, **given), None, {})]
    wrong = [name for name, value in given.items() if value and name != "allow_urls"]
    if wrong:
        raise ConfigurationError(f"{', '.join(wrong)}: a recipe says it for each of its sources; change its fields.")
    from elva_hf.training.recipe import read_kind, read_recipe

    if (kind := read_kind(file)) != "stages":
        raise ConfigurationError(f"{file} is a recipe of kind {kind!r} and names no data sources; give a data file.")
    tasks = []
    for stage in read_recipe(file, overrides).stages:
        check_filled(stage.data.sources.values())
        video = {name: value for name, value in vars(stage.video).items() if value is not None}
        tasks += [Task(source, stage.name, video) for source in stage.data.sources.values()]
    return tasks


def _is_recipe(file: str) -> bool:
    if file.endswith((".yaml", ".yml")):
        return True
    if Path(file).exists():
        return False
    from elva_hf.training.recipe import list_recipes

    return file in list_recipes()


def _geometry(
    model: str | None, preset: str | None
) -> tuple[VideoDecoderConfig, ElvaVideoProcessor, ElvaProcessor | None, str]:
    """Configuration, video processor, processor if text can be counted, and name of what counts."""
    from elva_hf.architectures_elva import read_preset

    if model is not None and preset is not None:
        raise ConfigurationError("--model and --preset both count the tokens; give one of them.")
    if model is None:
        preset = preset or DEFAULT_PRESET
        system, config = read_preset(preset)
        return config, system.video_processor(**config.video_options), None, preset
    checkpoint = loading.find_checkpoint(model)
    processor = loading.load_processor(checkpoint)
    return loading.load_config(checkpoint), processor.video_processor, processor, checkpoint


def _expectation(task: Task, report: CheckReport) -> str:
    expected = task.source.num_samples
    return "" if expected in (None, report.num_rows) else f" ({expected} expected)"


def _listed(counts: Any, form: str = "{count} {kind}") -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(form.format(kind=kind, count=count) for kind, count in ordered)
