"""`elva plan`: frames and tokens of a video, and what it costs a model, before any weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import ConfigurationError

if TYPE_CHECKING:
    from elva_hf.configuration_elva import ElvaConfig
    from elva_hf.ledger_elva import Bounds, TokenPlan
    from elva_hf.schedule_elva import MergeSchedule, MergeStep
    from elva_hf.video_processing_elva import ElvaVideoProcessor, SampledVideo

BAR_WIDTH = 18


def plan(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="Video or image file.")],
    model: loading.Model = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Geometry of a model of the paper: elva-1.5b, elva-7b, elva-7b-hd."),
    ] = None,
    frames: loading.Frames = None,
    high: loading.High = None,
    low: loading.Low = None,
    fps: loading.Fps = None,
    longest_edge: loading.LongestEdge = None,
    low_res_longest_edge: loading.LowResLongestEdge = None,
    merge_schedule: loading.MergeSchedule = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show the frames and tokens of VIDEO, and what they cost.

    Which frames a model would see, when, at which resolution, and what they take of its context; then the tokens of its
    layers, FLOPs up to the first token of an answer, and bytes of keys and values, with merging and without. Reads the
    index of the file and decodes one frame; loads no weights.
    """
    from elva_hf.ledger_elva import plan_tokens

    options = loading.frame_options(frames, high, low, fps, longest_edge, low_res_longest_edge)
    config, processor, name = _geometry(model, preset)
    schedule = loading.read_merge_schedule(merge_schedule)
    with busy(f"reading {video}"):
        sampled = processor.sample(video, **options)
    planned = plan_tokens([sampled.grids], config, schedule)
    limit = config.get_text_config().max_position_embeddings
    if as_json:
        print(json.dumps({"video": str(video), **to_json(sampled, planned, name, limit)}, indent=2))
        return
    for line in describe(sampled, processor.resolve_options(**options).patch_size):
        print(line)
    left = limit - planned.num_tokens
    room = f"{left} left for text" if left > 0 else f"{-left} too many: take fewer or smaller frames"
    print(f"context   {limit} positions of {name}, {room}")
    print()
    for line in describe_costs(planned, _schedule_name(config.merge_schedule if schedule is None else schedule)):
        print(line)


def describe(sampled: SampledVideo, patch_size: int) -> list[str]:
    """A table of frames, and their sum."""
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
        lines[-1] += f" ({sampled.num_asked} asked for; the source has no more)"
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
    times = sampled.times or (None,) * sampled.num_frames
    return zip(sampled.indices, times, sampled.high, sampled.grids, sampled.tokens_per_frame, strict=True)


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


def _geometry(model: str | None, preset: str | None) -> tuple[ElvaConfig, ElvaVideoProcessor, str]:
    from elva_hf.configuration_elva import ElvaConfig
    from elva_hf.video_processing_elva import ElvaVideoProcessor

    if preset is not None:
        if model is not None:
            raise ConfigurationError("--model and --preset exclude each other; keep one.")
        config = ElvaConfig.from_preset(preset)
        return config, ElvaVideoProcessor(**{field: getattr(config, field) for field in loading.VIDEO_FIELDS}), preset
    checkpoint = loading.find_checkpoint(model)
    config = loading.load_config(checkpoint)
    return config, loading.load_processor(checkpoint).video_processor, checkpoint
