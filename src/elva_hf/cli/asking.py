"""`elva ask`: answer questions about a video, and say what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import ContextOverflowError, ElvaError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.generation.streamers import BaseStreamer

    from elva_hf.pipeline_elva import ElvaPipeline
    from elva_hf.video_processing_elva import ElvaVideoProcessor, SampledVideo


def ask(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="Video or image file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="What you want to know; one or more.")],
    model: loading.Model = None,
    frames: loading.Frames = None,
    high: loading.High = None,
    low: loading.Low = None,
    fps: loading.Fps = None,
    longest_edge: loading.LongestEdge = None,
    low_res_longest_edge: loading.LowResLongestEdge = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.", min=1)] = 256,
    merge_schedule: loading.MergeSchedule = None,
    device: loading.Device = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print answers as they are written.")] = False,
) -> None:
    """Answer each QUESTION about VIDEO.

    The video is decoded once and the model loaded once; every question is asked on its own. Without --model the
    checkpoint that ships with the package answers: it knows a small drawn world, not real footage.
    """
    for question in questions:
        if not question.strip():
            raise ElvaError("a question is empty; write what you want to know about the video.")
    options = loading.frame_options(frames, high, low, fps, longest_edge, low_res_longest_edge)
    checkpoint = loading.find_checkpoint(model)
    config, processor = loading.load_config(checkpoint), loading.load_processor(checkpoint)
    schedule = config.resolve_merge_schedule(loading.read_merge_schedule(merge_schedule))
    decoded = processor.video_processor = DecodedOnce(processor.video_processor)
    started = time.perf_counter()
    with busy(f"decoding {video}"):
        sampled = decoded.read(video, **options)
    decode_seconds = time.perf_counter() - started
    check_room(sampled, config.get_text_config().max_position_embeddings)
    pipe = loading.build_pipeline(checkpoint, processor, device)
    generation = {"max_new_tokens": max_new_tokens, "merge_schedule": schedule}
    print(f"video     {sampled.info.source}, {sampled.num_frames} frames, decoded in {decode_seconds:.2f} s")
    print(f"model     {checkpoint} on {pipe.device}")
    for question in questions:
        _answer(pipe, {"video": video, "text": question}, options, generation, stream)


def demo() -> None:
    """Ask the shipped model about the shipped clip."""
    import json

    import elva_hf

    folder = elva_hf.tiny_checkpoint()
    shown = json.loads((folder / "demo.json").read_text())
    ask(folder / "demo.mp4", [question for question, _ in shown["questions"]])


class DecodedOnce:
    """A video processor that decodes a file once, however many questions are asked about it."""

    def __init__(self, video_processor: ElvaVideoProcessor):
        self._video_processor = video_processor
        self._encoded: dict[str, tuple[Tensor, list[SampledVideo]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._video_processor, name)

    def read(self, video: Path, **options: Any) -> SampledVideo:
        """Decode now; the same options are used for every question."""
        self._encoded[str(video)] = self._video_processor.encode([video], **options)
        return self._encoded[str(video)][1][0]

    def encode(self, sources: list[Path], **options: Any) -> tuple[Tensor, list[SampledVideo]]:
        """As `ElvaVideoProcessor.encode`, from memory."""
        (source,) = sources
        return self._encoded[str(source)]


class Stopwatch:
    """A streamer that notes when the first token comes, and passes tokens on.

    Args:
        inner: Another streamer, or None.
        on_first_token: Called before the first token is passed on.
    """

    def __init__(self, inner: BaseStreamer | None = None, on_first_token: Callable[[], None] = lambda: None):
        self.first_token: float | None = None
        self._inner = inner
        self._on_first_token = on_first_token
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each new token."""
        if self._prompt_seen and self.first_token is None:
            self.first_token = time.perf_counter()
            self._on_first_token()
        self._prompt_seen = True
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        """Take the end of the answer."""
        if self._inner is not None:
            self._inner.end()


def _answer(pipe: ElvaPipeline, request: dict[str, Any], options: dict, generation: dict, stream: bool) -> None:
    print(f"\nquestion  {request['text']}")
    with ExitStack() as waiting:
        waiting.enter_context(busy("answering"))
        watch = _streaming_watch(pipe, waiting) if stream else Stopwatch()
        started = time.perf_counter()
        inputs = pipe.preprocess(request, **options)
        outputs = pipe.forward(inputs, streamer=watch, **generation)
        (record,) = pipe.postprocess(outputs)
        seconds = time.perf_counter() - started
    if not stream:
        print(f"answer    {record['generated_text']}")
    prefill = (watch.first_token or time.perf_counter()) - started
    print(f"tokens    {', '.join(_token_counts(pipe, inputs, outputs))}")
    print(f"time      first token {prefill:.2f} s, total {seconds:.2f} s")


def _streaming_watch(pipe: ElvaPipeline, waiting: ExitStack) -> Stopwatch:
    """Print tokens as they come; the sign that work goes on leaves the terminal first."""
    from transformers import TextStreamer

    def begin() -> None:
        waiting.close()
        print("answer    ", end="", flush=True)

    return Stopwatch(TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True), begin)


def _token_counts(pipe: ElvaPipeline, inputs: dict[str, Any], outputs: dict[str, Any]) -> Iterator[str]:
    import torch

    ids, processor = inputs["input_ids"], pipe.processor
    kinds = (processor.video_token_id, processor.frame_token_id, processor.line_token_id)
    visual = int(torch.isin(ids, torch.tensor(kinds)).sum())
    yield f"{visual} visual"
    yield f"{ids.shape[1]} in the prompt"
    yield f"{outputs['generated'].shape[-1]} in the answer"


def check_room(sampled: SampledVideo, limit: int) -> None:
    """Refuse a video that leaves no room for text.

    Raises:
        ContextOverflowError: It takes all positions of the model, or more.
    """
    if sampled.num_tokens >= limit:
        raise ContextOverflowError(
            f"{sampled.num_frames} frames of {sampled.info.source} take {sampled.num_tokens} tokens, and the model has "
            f"{limit} positions; take fewer or smaller frames (--frames, --longest-edge). 'elva plan' shows the counts."
        )
