"""`elva ask`: answer questions about a video, and say what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import ElvaError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchFeature
    from transformers.generation.streamers import BaseStreamer

    from elva_hf.pipeline_elva import ElvaPipeline
    from elva_hf.requests_elva import Request
    from elva_hf.sampled_elva import OpenVideo, SampledVideo
    from elva_hf.video_processing_elva import ElvaVideoProcessor


@loading.takes_frame_options
def ask(
    video: loading.Video,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="What you want to know; one or more.")],
    options: dict[str, Any],
    model: loading.Model = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of an answer.", min=1)
    ] = loading.MAX_NEW_TOKENS,
    merge_schedule: loading.MergeSchedule = None,
    device: loading.Device = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print answers as they are written.")] = False,
) -> None:
    """Answer each QUESTION about VIDEO.

    The video is decoded once and the model loaded once; every question is asked on its own. Without --model the
    checkpoint that ships with the package answers: it knows a small drawn world, not real footage.
    """
    from elva_hf.requests_elva import Room, encode_request, read_request

    for question in questions:
        if not question.strip():
            raise ElvaError("a question is empty; write what you want to know about the video.")
    checkpoint = loading.find_checkpoint(model)
    config, processor = loading.load_config(checkpoint), loading.load_processor(checkpoint)
    schedule = config.resolve_merge_schedule(loading.read_merge_schedule(merge_schedule))
    room = Room(config.get_text_config().max_position_embeddings, max_new_tokens)
    requests = [read_request({"video": video, "text": question}) for question in questions]
    started = time.perf_counter()
    with DecodedOnce(processor.video_processor) as decoded, busy(f"decoding {video}"):
        processor.video_processor = decoded
        encoded = [
            encode_request(processor, request, {**options, "return_metadata": True}, room) for request in requests
        ]
    decode_seconds = time.perf_counter() - started
    pipe = loading.build_pipeline(checkpoint, processor, device)
    generation = {"max_new_tokens": max_new_tokens, "merge_schedule": schedule}
    (sampled,) = encoded[0]["video_metadata"]
    print(f"video     {sampled.info.source}, {sampled.num_frames} frames, decoded in {decode_seconds:.2f} s")
    print(f"model     {checkpoint} on {pipe.device}")
    for request, inputs in zip(requests, encoded, strict=True):
        _answer(pipe, request, inputs, generation, stream)


def demo() -> None:
    """Ask the shipped model about the shipped clip."""
    import json

    import elva_hf

    folder = elva_hf.tiny_checkpoint()
    shown = json.loads((folder / "demo.json").read_text())
    ask(video=str(folder / "demo.mp4"), questions=[question for question, _ in shown["questions"]])


class DecodedOnce:
    """A video processor that opens a file once and decodes the same frames once, however many questions are asked.

    Used in a `with` statement, at whose end the file is closed.
    """

    def __init__(self, video_processor: ElvaVideoProcessor):
        self._video_processor = video_processor
        self._files = ExitStack()
        self._opened: list[OpenVideo] | None = None
        self._decoded: dict[tuple, tuple[Tensor, list[SampledVideo]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._video_processor, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    @contextmanager
    def open(self, sources: Sequence[str], **options: Any) -> Iterator[list[OpenVideo]]:
        """As `ElvaVideoProcessor.open`; the sources and their options are those of the first call."""
        if self._opened is None:
            self._opened = self._files.enter_context(self._video_processor.open(sources, **options))
        yield self._opened

    def decode(self, videos: Sequence[OpenVideo], planned: Sequence[SampledVideo]) -> tuple[Tensor, list[SampledVideo]]:
        """As `ElvaVideoProcessor.decode`, from memory where the same frames were asked for before."""
        frames = tuple((video.indices, video.high) for video in planned)
        if frames not in self._decoded:
            self._decoded[frames] = self._video_processor.decode(videos, planned)
        return self._decoded[frames]


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


def _answer(pipe: ElvaPipeline, request: Request, encoded: BatchFeature, generation: dict, stream: bool) -> None:
    print(f"\nquestion  {request.question}")
    with ExitStack() as waiting:
        waiting.enter_context(busy("answering"))
        watch = _streaming_watch(pipe, waiting) if stream else Stopwatch()
        started = time.perf_counter()
        inputs = {**encoded.to(dtype=pipe.dtype), "requests": [request]}
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
