"""`elva plan`: frames and tokens of a video, and what it costs a model, before any weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import ConfigurationError

if TYPE_CHECKING:
    from elva_hf.configuration_elva import VideoDecoderConfig
    from elva_hf.ledger_elva import Bounds, TokenPlan
    from elva_hf.sampled_elva import SampledVideo
    from elva_hf.schedule_elva import MergeSchedule, MergeStep
    from elva_hf.video_processing_elva import ElvaVideoProcessor

BAR_WIDTH = 18
TEXT_ROOM = 512
"""Tokens that `--fit` leaves for a question and its answer."""


@loading.takes_frame_options
def plan(
    video: loading.Video,
    options: dict[str, Any],
    model: loading.Model = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Geometry of a model of the paper: elva-1.5b, elva-7b, elva-7b-hd."),
    ] = None,
    merge_schedule: loading.MergeSchedule = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show the frames and tokens of VIDEO, and what they cost.

    Which frames a model would see, when, at which resolution, and what they take of its context; then the tokens of its
    layers, FLOPs up to the first token of an answer, and bytes of keys and values, with merging and without. Where that
    is too much, what --fit would take instead. Reads the index of the file and decodes one frame; loads no weights.
    """
    from elva_hf.ledger_elva import plan_tokens

    config, processor, tokenizer, name = _geometry(model, preset)
    schedule = loading.read_merge_schedule(merge_schedule)
    limit = config.get_text_config().max_position_embeddings
    with busy(f"reading {video}"):
        choice = choose(video, processor, tokenizer, options, limit)
    sampled = choice.fitted if choice.fitted is not None and options.get("overflow") == "fit" else choice.asked
    marks = choice.count_marks(sampled)
    planned = plan_tokens([sampled.grids], config, schedule, marks)
    if as_json:
        facts = to_json(sampled, planned, name, limit)
        print(json.dumps({"video": video, **facts, "num_mark_tokens": marks, "fit": choice.to_json()}, indent=2))
        return
    chosen = processor.resolve_options(**options)
    for line in describe(sampled, chosen.patch_size, choice.asked.num_frames):
        print(line)
    if chosen.high_res_selection == "scenes" and 0 < sum(sampled.high) < sampled.num_frames:
        print("scenes    as many high-resolution frames as shown; which ones is known once they are decoded")
    if marks:
        print(f"times     {marks} tokens of text")
    left = limit - planned.num_tokens
    room = f"{left} left for text" if left > 0 else f"{-left} too many: take fewer or smaller frames"
    print(f"context   {limit} positions of {name}, {room}")
    if sampled is choice.asked:
        for line in choice.describe():
            print(line)
    print()
    for line in describe_costs(planned, _schedule_name(config.merge_schedule if schedule is None else schedule)):
        print(line)


@dataclass(frozen=True)
class Choice:
    """What is asked for of a video, and what would fit.

    Args:
        asked: By the options, whatever it costs.
        fitted: Within the budgets; None if nothing fits.
        excess: The first budget that does not suffice for what is asked for, in words; None if all do.
        count_marks: Counts the tokens of time marks.
    """

    asked: SampledVideo
    fitted: SampledVideo | None
    excess: str | None
    count_marks: Callable[[SampledVideo], int]

    def describe(self) -> Iterator[str]:
        """What does not fit, and what would."""
        if self.excess is None:
            return
        yield f"budget    {self.excess}"
        if self.fitted is None:
            yield "fit       nothing: not even one low-resolution frame"
            return
        high, tokens = sum(self.fitted.high), self.fitted.num_visual_tokens
        yield f"fit       {high} high and {self.fitted.num_frames - high} low frames, {tokens} tokens: add --fit"

    def to_json(self) -> dict[str, int] | None:
        """The counts that fit."""
        if self.fitted is None:
            return None
        high = sum(self.fitted.high)
        return {
            "num_high_res_frames": high,
            "num_low_res_frames": self.fitted.num_frames - high,
            "num_visual_tokens": self.fitted.num_visual_tokens,
        }


def choose(video: str, processor: ElvaVideoProcessor, tokenizer: Any, options: dict[str, Any], limit: int) -> Choice:
    """What the options ask of a video, and what of it fits their budgets and a model.

    Args:
        video: The source.
        processor: Of the model.
        tokenizer: Of the model, if it has one.
        options: Of the video processor.
        limit: Positions of the model.

    Raises:
        ConfigurationError: Times are to be written, and there is no tokenizer to count their tokens.
        ContextOverflowError: Nothing fits, and `overflow="fit"` is asked for.
    """
    from elva_hf.errors_elva import ContextOverflowError
    from elva_hf.fitting_elva import Sample, choose_frames
    from elva_hf.prompts_elva import count_mark_tokens

    timestamps = processor.resolve_options(**options).timestamps
    if timestamps and tokenizer is None:
        raise ConfigurationError("--timestamps needs a tokenizer to count tokens: name a checkpoint with --model.")

    def count_marks(sampled: SampledVideo) -> int:
        return count_mark_tokens(tokenizer, [sampled]) if timestamps else 0

    def count(chosen: Sequence[SampledVideo]) -> int:
        return TEXT_ROOM + sum(video.num_tokens + count_marks(video) for video in chosen)

    budgets = replace(processor.resolve_budgets(**options), context_length=limit)
    with processor.open([video], **options) as (opened,):
        sample = Sample([opened], count, count)
        excess = fitted = None
        try:
            choose_frames(sample, replace(budgets, overflow="error"))
        except ContextOverflowError as error:
            excess = str(error).split(";")[0]
            if error.budget == "context_length":
                excess = f"less than {TEXT_ROOM} of {limit} positions are left for a question and its answer"
        try:
            fitted = choose_frames(sample, replace(budgets, overflow="fit"))[0]
        except ContextOverflowError:
            if budgets.overflow == "fit":
                raise
        return Choice(opened.sample(), fitted, excess, count_marks)


def describe(sampled: SampledVideo, patch_size: int, num_asked: int) -> list[str]:
    """A table of frames, and their sum.

    Args:
        sampled: What is taken.
        patch_size: Side of a patch in pixels.
        num_asked: Frames that the source has of those asked for; more than are taken where no more fit.
    """
    info = sampled.info
    length = "still image" if info.is_image else f"{info.num_frames} frames"
    if info.duration is not None:
        length += f", {info.duration:.2f} s, {info.fps:.4g} frames/s"
    kind = "".join(f", {part}" for part in (info.codec, info.container) if part)
    lines = [f"video     {info.source}: {info.width}x{info.height}, {length}{kind}", ""]
    lines.append(f"{'frame':>8} {'time':>9} {'resolution':>10} {'pixels':>10} {'patches':>8} {'tokens':>7}")
    for index, time, is_high, (rows, cols), tokens in _frames(sampled):
        shown = "" if time is None else f"{time:.3f} s"
        pixels, patches = f"{cols * patch_size}x{rows * patch_size}", f"{cols}x{rows}"
        lines.append(f"{index:>8} {shown:>9} {'high' if is_high else 'low':>10} {pixels:>10} {patches:>8} {tokens:>7}")
    lines.append("")
    lines.append(
        f"frames    {sampled.num_frames}, {sum(sampled.high)} high and {sampled.num_frames - sum(sampled.high)} low"
    )
    if sampled.num_frames < sampled.num_asked:
        why = "no more fit" if sampled.num_frames < num_asked else "the source has no more"
        lines[-1] += f" ({sampled.num_asked} asked for; {why})"
    others = sampled.num_visual_tokens - sampled.num_patches
    lines.append(f"tokens    {sampled.num_visual_tokens}: {sampled.num_patches} patches, {others} <FRAME> and <LINE>")
    return lines


def describe_costs(planned: TokenPlan, name: str) -> list[str]:
    """Tables of what enters each stage of the decoder, and of FLOPs and bytes with merging and without."""
    size = planned.shape.bytes_per_value
    note = f"FLOPs up to the first token of an answer; keys and values at {size} bytes a number."
    if not planned.schedule:
        lines = [f"merging   none: {len(planned.layers)} layers of {planned.layers[0].maximum} tokens", ""]
        return [*lines, *(f"{label:<17} {shown(cost):>10}" for label, shown, cost in _costs(planned)), "", note]
    lines = [f"merging   {name}{_limits(planned.schedule)}", ""]
    actions = ["", *(_action(step, planned.schedule) for step in planned.schedule.steps)]
    width = max(map(len, ("at its input", *actions)))
    lines.append(f"layers  {'at its input':<{width}}  {'tokens':>11}  {'of all':>8}")
    for action, (layers, tokens, share, bar) in zip(actions, _stages(planned), strict=True):
        lines.append(f"{layers:<7} {action:<{width}}  {tokens:>11}  {share:>8}  {bar}")
    lines += ["", f"{'':<17} {'none':>10} {name:>15} {'ratio':>12}"]
    for (label, shown, before), (*_, after) in zip(_costs(planned.without_merging()), _costs(planned), strict=True):
        share = _span(after, lambda value, whole=before.maximum: f"{value / whole:.3f}")
        lines.append(f"{label:<17} {shown(before):>10} {shown(after):>15} {share:>12}")
    lines += ["", note]
    if not all(layer.is_exact for layer in planned.layers):
        lines.append("A threshold depends on the pixels: two figures are the least and the most.")
    return lines


def to_json(sampled: SampledVideo, planned: TokenPlan, name: str, limit: int) -> dict[str, Any]:
    """All that the tables show, as JSON."""
    unmerged = planned.without_merging().to_dict()
    source = ("width", "height", "num_frames", "duration", "fps", "codec", "container")
    return {
        "source": {field: getattr(sampled.info, field) for field in source},
        "frames": [
            {
                "index": index,
                "time": time,
                "resolution": "high" if is_high else "low",
                "rows": rows,
                "columns": cols,
                "tokens": tokens,
            }
            for index, time, is_high, (rows, cols), tokens in _frames(sampled)
        ],
        "num_asked": sampled.num_asked,
        "model": name,
        "max_position_embeddings": limit,
        **planned.to_dict(),
        "unmerged": {key: unmerged[key] for key in ("tokens_per_layer", "flops", "kv_cache_bytes")},
    }


def _frames(sampled: SampledVideo) -> Iterator[tuple]:
    """Each frame; of chunks the first, and of an image cut into parts the image for each."""
    frames = list(zip(sampled.indices, sampled.times or (None,) * sampled.num_frames, sampled.high, strict=True))
    grids, tokens = sampled.grids[:: sampled.layout.chunk_size], sampled.tokens_per_frame
    frames = frames * len(grids) if sampled.info.is_image else frames[:: sampled.layout.chunk_size]
    return ((*frame, *shape) for frame, *shape in zip(frames, grids, tokens, strict=True))


def _stages(planned: TokenPlan) -> Iterator[tuple[str, str, str, str]]:
    """Layers between two merges: which, their tokens, as a share of the input, as a bar."""
    total = planned.layers[0].maximum
    starts = [0, *(step.layer for step in planned.schedule.steps)]
    for start, end in zip(starts, [*starts[1:], len(planned.layers)], strict=True):
        tokens = planned.layers[start]
        least, most = (round(BAR_WIDTH * bound / total) for bound in (tokens.minimum, tokens.maximum))
        layers = str(start) if end == start + 1 else f"{start}-{end - 1}"
        share = _span(tokens, lambda value: f"{100 * value / total:.0f}")
        yield layers, _span(tokens, str), f"{share} %", "#" * least + "-" * (most - least)


def _action(step: MergeStep, schedule: MergeSchedule) -> str:
    if step.target_ratio is None:
        return f"merge above similarity {step.similarity_threshold:g}"
    whole = "the patches" if schedule.ratio_of == "current" else "input patches"
    return f"keep {100 * step.target_ratio:g} % of {whole}"


def _schedule_name(given: str | list | dict) -> str:
    steps = given.get("steps") if isinstance(given, dict) else given
    return steps if isinstance(steps, str) else "custom"


def _limits(schedule: MergeSchedule) -> str:
    limits = (
        schedule.max_run and f"at most {schedule.max_run} frames in a token",
        schedule.window and f"never across a border every {schedule.window} frames",
        schedule.survivor == "first" and "the first of a run stays",
    )
    return "".join(f", {limit}" for limit in limits if limit)


def _costs(planned: TokenPlan) -> Iterator[tuple[str, Callable[[Bounds[int]], str], Bounds[int]]]:
    """Label, way to write it, and value of each cost."""
    from elva_hf.ledger_elva import Bounds

    flops = planned.flops
    parts = {
        "FLOPs": "total",
        "  patch embedding": "patch_embed",
        "  linear": "linear",
        "  attention": "attention",
        "  lm_head": "lm_head",
    }
    for label, part in parts.items():
        yield label, _scaled, Bounds(getattr(flops.minimum, part), getattr(flops.maximum, part))
    yield "keys and values", lambda bounds: f"{_scaled(bounds)}B", planned.kv_cache_bytes


def _scaled(bounds: Bounds[int]) -> str:
    """Three digits and a prefix: `1.18 T`, `75.1 M`; both ends of a range have the prefix of the larger."""
    powers = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")]
    unit, prefix = next((unit, prefix) for unit, prefix in powers if bounds.maximum >= unit or unit == 1)
    return f"{_span(bounds, lambda value: f'{value / unit:.3g}')} {prefix}"


def _span(bounds: Bounds[int], shown: Callable[[int], str]) -> str:
    """One value, or two with a dash where the bounds differ."""
    return "-".join(dict.fromkeys((shown(bounds.minimum), shown(bounds.maximum))))


def _geometry(model: str | None, preset: str | None) -> tuple[VideoDecoderConfig, ElvaVideoProcessor, Any, str]:
    """Configuration, video processor, tokenizer if there is one, and name of a model."""
    from elva_hf.architectures_elva import read_preset

    if preset is not None:
        if model is not None:
            raise ConfigurationError("--model and --preset exclude each other; keep one.")
        system, config = read_preset(preset)
        return config, system.video_processor(**config.video_options), None, preset
    checkpoint = loading.find_checkpoint(model)
    config, processor = loading.load_config(checkpoint), loading.load_processor(checkpoint)
    return config, processor.video_processor, processor.tokenizer, checkpoint
