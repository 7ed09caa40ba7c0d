"""`elva plan`: frames, grids and tokens of a video, before any weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import ConfigurationError

if TYPE_CHECKING:
    from elva_hf.configuration_elva import ElvaConfig
    from elva_hf.video_processing_elva import ElvaVideoProcessor, SampledVideo


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
) -> None:
    """Show the frames and tokens of VIDEO.

    Which frames a model would see, when, at which resolution, and what they take of its context. Reads the index of the
    file and decodes one frame; loads no weights.
    """
    options = loading.frame_options(frames, high, low, fps, longest_edge, low_res_longest_edge)
    config, processor, name = _geometry(model, preset)
    with busy(f"reading {video}"):
        sampled = processor.sample(video, **options)
    for line in describe(sampled, processor.resolve_options(**options).patch_size):
        print(line)
    limit = config.get_text_config().max_position_embeddings
    left = limit - sampled.num_tokens
    room = f"{left} left for text" if left > 0 else f"{-left} too many: take fewer or smaller frames"
    print(f"context   {limit} positions of {name}, {room}")


def describe(sampled: SampledVideo, patch_size: int) -> list[str]:
    """A table of frames, and their sum."""
    info = sampled.info
    length = "still image" if info.is_image else f"{info.num_frames} frames"
    if info.duration is not None:
        length += f", {info.duration:.2f} s, {info.fps:.4g} frames/s"
    kind = "".join(f", {part}" for part in (info.codec, info.container) if part)
    lines = [f"video     {info.source}: {info.width}x{info.height}, {length}{kind}", ""]
    lines.append(f"{'frame':>8} {'time':>9} {'resolution':>10} {'pixels':>10} {'patches':>8} {'tokens':>7}")
    times = sampled.times or (None,) * sampled.num_frames
    for index, time, is_high, (rows, cols), tokens in zip(
        sampled.indices, times, sampled.high, sampled.grids, sampled.tokens_per_frame, strict=True
    ):
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
