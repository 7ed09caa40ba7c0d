"""`elva show`: a film or a sheet of what merged into what inside the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import ConfigurationError, ElvaError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from elva_hf.merging_elva import MergeMap
    from elva_hf.pipeline_elva import ElvaPipeline
    from elva_hf.processing_elva import ElvaProcessor
    from elva_hf.sampled_elva import SampledVideo
    from elva_hf.schedule_elva import MergeSchedule, MergeStep
    from elva_hf.viz.merging import MergeView

FRAMES_PER_SECOND = 2
UNASKED = "What happens?"  # merging comes before the question, so any will do


@loading.takes_frame_options
def show(
    video: loading.Video,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Film (.mp4) or sheet of all frames (.png) to write.")],
    model: loading.Model = None,
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Ask this as well, and write its answer above the frames.")
    ] = None,
    merge_schedule: loading.MergeSchedule = None,
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Merge step to show, from 1; 0 is what merged before the decoder. The last if not given."
        ),
    ] = None,
    *,
    options: dict[str, Any],
    device: loading.Device = None,
) -> None:
    """Draw what merges into what inside the model.

    Shows the frames as the model sees them. A patch that still has its token is drawn in full, one that merged away is
    dimmed; the colour of its outline says how many frames its token stands for. The tokens of each layer stand beside.
    """
    check_out(out, Path(video))
    if question is not None and not question.strip():
        raise ElvaError("--question is empty; write what you want to know about the video.")
    checkpoint = loading.find_checkpoint(model)
    config, processor = loading.load_config(checkpoint), loading.load_processor(checkpoint)
    given = config.merge_schedule if merge_schedule is None else loading.read_merge_schedule(merge_schedule)
    schedule = config.resolve_merge_schedule(given)
    steps = _describe_steps(config.input_similarity_threshold, schedule)
    layer = _check_step(step, list(steps))
    with busy(f"decoding {video}"):
        inputs = encode(processor, video, question, options, config.get_text_config().max_position_embeddings)
    frames, (sampled,) = inputs.pop("frames"), inputs["video_metadata"]
    pipe = loading.build_pipeline(checkpoint, processor, device)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(pipe.dtype)
    with busy("merging"):
        merge_map, layer_tokens = trace(pipe, inputs, schedule)
        answer = None if question is None else _answer(pipe, inputs, schedule)
    name = given if isinstance(given, str) else f"of {len(schedule.steps)} step{'s'[: len(schedule.steps) > 1]}"
    head = (f"{Path(video).name} · merge schedule {name}", *(() if answer is None else (f'"{question}" - "{answer}"',)))
    view = build_view(frames, sampled, merge_map, layer_tokens, steps, layer, head)
    with busy(f"writing {out}"):
        write(view, out)
    asked = [] if answer is None else [f"question  {question}", f"answer    {answer}"]
    lines = [
        f"video     {sampled.info.source}, {sampled.num_frames} frames",
        f"model     {checkpoint} on {pipe.device}",
    ]
    print(*lines, *asked, *describe(view), f"wrote     {out}", sep="\n")


def encode(
    processor: ElvaProcessor, video: str, question: str | None, options: dict[str, Any], limit: int
) -> dict[str, Any]:
    """What the pipeline is given for a video and a question, if any; and `frames`, as the model sees them.

    Raises:
        ContextOverflowError: It takes more than the `limit` positions of the model.
        VideoError: The video cannot be used.
    """
    from elva_hf.requests_elva import Room, encode_request, read_request
    from elva_hf.viz.merging import restore_frames

    request = read_request({"video": video, "text": UNASKED if question is None else question})
    room = Room(limit, 0 if question is None else loading.MAX_NEW_TOKENS)
    encoded = encode_request(processor, request, {**options, "return_metadata": True}, room)
    (sampled,), values = encoded["video_metadata"], processor.video_processor.resolve_options(**options)
    pixels = processor.video_processor.pixels_of_tokens(encoded["pixel_values_videos"])
    frames = restore_frames(pixels, shown_grids(sampled), values.image_mean, values.image_std)
    return {**encoded, "requests": [request], "frames": frames}


def check_out(out: Path, video: Path) -> None:
    """Refuse, before any work is done, a file that could not be written.

    Raises:
        ElvaError: Another suffix, no such folder, or the video itself.
    """
    if out.suffix.lower() not in (".mp4", ".png"):
        raise ElvaError(f"--out {out}: expected a name that ends in .mp4 (a film) or .png (all frames on one sheet).")
    if not out.parent.is_dir():
        raise ElvaError(f"--out {out}: there is no folder {out.parent}; make it first.")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ElvaError(f"--out {out}: cannot write there; choose another file.")
    if out.exists() and video.exists() and out.samefile(video):
        raise ElvaError(f"--out {out} is the video itself; choose another name.")


def trace(pipe: ElvaPipeline, inputs: dict[str, Any], schedule: MergeSchedule) -> tuple[MergeMap, list[int]]:
    """Run the prompt through the model once: who merged into whom, and the tokens of each layer."""
    import torch

    tensors = {name: value.to(pipe.device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.inference_mode():
        outputs = pipe.model(
            **tensors, merge_schedule=schedule, output_merge_map=True, use_cache=True, logits_to_keep=1
        )
    return outputs.merge_map, outputs.past_key_values.tokens_per_layer[:, 0].tolist()


def build_view(
    frames: list[np.ndarray],
    sampled: SampledVideo,
    merge_map: MergeMap,
    layer_tokens: list[int],
    steps: dict[int, str],
    layer: int,
    head: tuple[str, ...],
) -> MergeView:
    """Put together what a picture shows of the merge at a layer of `steps`; 0 for before the decoder."""
    from elva_hf.viz.merging import MergeView, read_fates

    step = merge_map.layers.index(layer)
    return MergeView(
        frames=frames,
        fates=read_fates(merge_map, shown_grids(sampled), step, layout=sampled.layout),
        captions=_captions(sampled),
        layer_tokens=layer_tokens,
        steps=steps,
        layer=layer,
        title=head[0],
        notes=head[1:],
        merged_before=merge_map.survivors[step].shape[1] - layer_tokens[0],
    )


def describe(view: MergeView) -> Iterator[str]:
    """What each step did, and what is shown."""
    tokens = view.layer_tokens
    for number, (layer, what) in enumerate(view.steps.items(), start=0 if 0 in view.steps else 1):
        where, before = (f"at layer {layer}", tokens[layer - 1]) if layer else ("before layer 0", view.input_tokens)
        yield f"{f'step {number}':<10}{where}, {what}: {before} -> {tokens[layer]} tokens"
    yield f"shown     {view.summary}"


def write(view: MergeView, out: Path) -> None:
    """Write a film or a sheet, as the suffix says."""
    from elva_hf.viz.merging import draw_page, draw_sheet

    if out.suffix.lower() == ".png":
        draw_sheet(view).save(out)
    else:
        write_film((draw_page(view, number) for number in range(len(view.frames))), out)


def write_film(pages: Iterable[Image], out: Path) -> None:
    """Write pictures of one even size as a film that browsers play, if FFmpeg was built with that encoder."""
    import av

    h264 = "libx264" in av.codecs_available
    with av.open(str(out), "w") as container:
        stream = None
        for page in pages:
            if stream is None:
                stream = container.add_stream("libx264" if h264 else "mpeg4", rate=FRAMES_PER_SECOND)
                stream.width, stream.height, stream.pix_fmt = page.width, page.height, "yuv420p"
                stream.options = {"crf": "16"} if h264 else {"qscale": "2"}
            container.mux(stream.encode(av.VideoFrame.from_image(page)))
        container.mux(stream.encode())


def _check_step(step: int | None, layers: list[int]) -> int:
    """Layer before which the merge to show was; 0 is none of the schedule's."""
    from elva_hf.schedule_elva import PRESETS

    if not layers:
        names = ", ".join(name for name in PRESETS if name != "none")
        raise ConfigurationError(
            "with this merge schedule (none) no tokens merge, so there is nothing to show; "
            f"choose one with --merge-schedule: {names}, or steps as JSON."
        )
    numbered = dict(enumerate(layers, start=0 if layers[0] == 0 else 1))
    if step is not None and step not in numbered:
        first, last = min(numbered), max(numbered)
        what = "the merge schedule has steps" if first else "this model and its merge schedule have steps"
        raise ConfigurationError(f"--step {step}: {what} {first} to {last}.")
    return layers[-1] if step is None else numbered[step]


def _answer(pipe: ElvaPipeline, inputs: dict[str, Any], schedule: MergeSchedule) -> str:
    outputs = pipe.forward(inputs, merge_schedule=schedule, max_new_tokens=loading.MAX_NEW_TOKENS)
    (record,) = pipe.postprocess(outputs)
    return record["generated_text"]


def shown_grids(sampled: SampledVideo) -> tuple[tuple[int, int], ...]:
    """Rows and columns of tokens of each picture: of a frame, or of a chunk of frames."""
    return sampled.grids[:: sampled.layout.chunk_size]


def _captions(sampled: SampledVideo) -> list[str]:
    """Time of each picture, of a chunk that of its first frame."""
    count, times = len(shown_grids(sampled)), (sampled.times or ())[:: sampled.layout.chunk_size]
    return [f"{time:.2f} s" for time in times] if len(times) == count else [""] * count


def _describe_steps(input_threshold: float | None, schedule: MergeSchedule) -> dict[int, str]:
    """What each merge does, by the layer before which it is; 0 for what merges before the decoder."""
    before = {} if input_threshold is None else {0: f"similarity > {input_threshold:g}"}
    return before | {step.layer: _describe(step, schedule) for step in schedule.steps}


def _describe(step: MergeStep, schedule: MergeSchedule) -> str:
    if step.similarity_threshold is not None:
        return f"similarity > {step.similarity_threshold:g}"
    return f"keep {100 * step.target_ratio:g} %" + (" of the input" if schedule.ratio_of == "input" else "")
