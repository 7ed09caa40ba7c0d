"""The task `"video-text-to-text"`: questions about videos and images, answered in text."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForMultimodalLM, GenerationConfig, GenerationMixin
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .errors_elva import ContextOverflowError
from .options_elva import HYBRID_FIELDS, SAMPLING_FIELDS
from .requests_elva import TEMPLATE_OPTIONS, Request, Room, encode_request, read_request, read_requests

TASK = "video-text-to-text"

GENERATION_FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
GENERATE_ARGUMENTS = frozenset(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
MODEL_ARGUMENTS = frozenset({"merge_schedule"})
POSTPROCESS_OPTIONS = frozenset({"return_full_text", "skip_special_tokens"})


class ElvaPipeline(Pipeline):
    """Answers questions about videos: decode, insert tokens, generate, decode.

    Accepts `pipe(video, question)`, `pipe({"video": video, "text": question})`, `pipe(videos=..., text=...)`, images in
    the same way, one chat, and lists, generators or datasets of chats or dictionaries. A text is what a person typed: a
    special token written in it stays text. Keywords, at construction and at each call: every field of
    `GenerationConfig` and argument of `generate`, every option of the video processor (`num_frames`, `fps`,
    `num_high_res_frames`, `longest_edge`, `video_start`, `timestamps`, ...), `return_full_text`, `batch_size`.

    Unless the model's generation config says otherwise, answers have at most 256 new tokens. Prompt and answer must
    fit the positions of the model, which is known before a video is decoded; with `overflow="fit"` fewer frames are
    taken where they do not.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.tokenizer.pad_token_id is not None:  # the base looks before it takes the tokenizer from the processor
            self._generation_defaults["pad_token_id"] = self.tokenizer.pad_token_id

    def __call__(self, videos: Any = None, text: Any = None, images: Any = None, **kwargs: Any) -> Any:
        """Answer one request, or many.

        Args:
            videos: A video (path, bytes, frames, array) or several; or, without `text`, a chat, a dictionary with
                `video` and `text`, or a list, generator or dataset of such.
            text: A question, a list of questions, or a chat or list of chats.
            images: An image or several.
            **kwargs: Options, see the class.

        Returns:
            For one request a list with one `{"generated_text": ...}` for each returned sequence; for a list of requests
            a list of such lists; for a generator or dataset an iterator over them. A question is answered with the
            answer's text; a chat with the chat and the assistant's turn, unless `return_full_text=False`.

        Raises:
            ElvaError: No question, or an input of no known form.
            VideoError: A video that cannot be read.
            ContextOverflowError: Prompt and answer need more positions than the model has, or a budget is too small.
            TypeError: A keyword that nothing here knows.
        """
        requests = read_requests(videos, text, images)
        if isinstance(requests, list) and not requests:
            return []
        return super().__call__(requests, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model and processor; the folder loads with `pipeline("video-text-to-text", model=folder)`."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self,
        generate_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        stop_sequence: str | list[str] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Sort flat keywords into those of the processor, of generate and of the output."""
        if stop_sequence is not None:
            options = _merge_options(options, {"stop_strings": stop_sequence}, "stop_sequence")
        options = _merge_options(options, generate_kwargs or {}, "generate_kwargs")
        options = _merge_options(options, processor_kwargs or {}, "processor_kwargs")
        generation = GENERATION_FIELDS | GENERATE_ARGUMENTS | MODEL_ARGUMENTS
        visual = self._visual_options()
        preprocess, forward, postprocess = {}, {}, {}
        for name, value in options.items():
            if name in POSTPROCESS_OPTIONS:
                postprocess[name] = value
            elif name in visual or name in TEMPLATE_OPTIONS or name in (processor_kwargs or {}):
                preprocess[name] = value
            elif name in generation or name in (generate_kwargs or {}):
                forward[name] = value
            else:
                known = sorted(generation | visual | TEMPLATE_OPTIONS | POSTPROCESS_OPTIONS | {"batch_size"})
                raise TypeError(_unknown_keyword(name, known))
        return {**_replaced_sampling(preprocess), **preprocess}, forward, postprocess

    def _visual_options(self) -> frozenset[str]:
        return frozenset(self.processor.video_processor.valid_kwargs.__annotations__)

    def preprocess(self, inputs: Any, room: Room | None = None, **options: Any) -> dict[str, Any]:
        """One request -> token ids and patches.

        Returns:
            `input_ids` and `attention_mask` `(1, N)`, `pixel_values_videos` `(P, 3 * patch_size**2)` if there are
            any, and `requests`, a list of one.
        """
        request = read_request(inputs)
        return {**encode_request(self.processor, request, options, room).to(dtype=self.dtype), "requests": [request]}

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Answer one request."""
        preprocess_params = self._with_room(preprocess_params, forward_params)
        return super().run_single(inputs, preprocess_params, forward_params, postprocess_params)

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Join requests into one batch, padded on the left; patches are concatenated in order.

        transformers' own collation wants the same keys in every item; text-only requests have no patches.
        """
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": _pad_left([item["input_ids"][0] for item in items], 0 if pad is None else pad),
            "attention_mask": _pad_left([item["attention_mask"][0] for item in items], 0),
            "requests": [request for item in items for request in item["requests"]],
        }
        pixels = [item["pixel_values_videos"] for item in items if "pixel_values_videos" in item]
        return {**batch, "pixel_values_videos": torch.cat(pixels)} if pixels else batch

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[list[dict[str, Any]]]:
        """Answer many requests, `batch_size` at a time, in order."""
        preprocess_params = self._with_room(preprocess_params, forward_params)
        sized = hasattr(inputs, "__len__")
        source = (PipelineDataset if sized else PipelineIterator)(inputs, self.preprocess, preprocess_params)
        workers = num_workers if sized else min(num_workers, 1)  # each worker would read all of a stream
        # pinned by a thread while the device is busy; without workers it would only be one copy more
        pinned = workers > 0 and self.device.type == "cuda"
        loader = DataLoader(
            source, num_workers=workers, batch_size=batch_size, collate_fn=self._collate, pin_memory=pinned
        )
        for batch in loader:
            outputs = self.forward(batch, **forward_params)
            for request, generated in zip(outputs["requests"], outputs["generated"], strict=True):
                single = {"requests": [request], "generated": generated[None]}
                yield self.postprocess(single, **postprocess_params)

    def _ensure_tensor_on_device(self, inputs: Any, device: torch.device) -> Any:
        """As transformers'; the host does not wait for what is pinned."""
        if isinstance(inputs, Tensor):
            return inputs.to(device, non_blocking=inputs.is_pinned())
        return super()._ensure_tensor_on_device(inputs, device)

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Generate; returns the new tokens only, `(B, num_return_sequences, M)`."""
        inputs = {name: value for name, value in model_inputs.items() if isinstance(value, Tensor)}
        options = self._prepare_generate_kwargs(options, return_dict_in_generate=False)
        settings = self._get_set_generation_params(options)
        self._check_context(inputs, settings)
        if settings.get("stop_strings") is not None:
            options.setdefault("tokenizer", self.tokenizer)
        sequences = self.model.generate(**inputs, **options)
        num_requests, prompt_length = inputs["input_ids"].shape
        generated = sequences[:, prompt_length:].unflatten(0, (num_requests, -1))
        return {"requests": model_inputs["requests"], "generated": generated}

    def _with_room(self, preprocess_params: dict[str, Any], forward_params: dict[str, Any]) -> dict[str, Any]:
        """What `preprocess` is given, with what the model has, so that a prompt is checked before decoding."""
        limit = self._num_positions()
        if limit is None:
            return preprocess_params
        settings = self._get_set_generation_params(self._prepare_generate_kwargs(forward_params))
        return {**preprocess_params, "room": Room(limit, settings.get("max_new_tokens") or 0)}

    def _num_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_context(self, inputs: dict[str, Tensor], settings: dict[str, Any]) -> None:
        limit = self._num_positions()
        if limit is None:
            return
        lengths = inputs["attention_mask"].sum(1)
        prompt, row = int(lengths.max()), int(lengths.argmax())
        visual = int((inputs["input_ids"][row] == self.model.config.video_token_id).sum())
        answer = settings.get("max_new_tokens") or max((settings.get("max_length") or 0) - prompt, 0)
        if prompt + answer > limit:
            raise ContextOverflowError(
                f"the prompt has {prompt} tokens ({visual} of them patches) and the answer may have {answer}, together "
                f"{prompt + answer}; the model has {limit} positions. Take fewer or smaller frames (num_frames=..., "
                "longest_edge=...), a shorter text, or a smaller max_new_tokens."
            )

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_full_text: bool | None = None,
        skip_special_tokens: bool = True,
    ) -> list[dict[str, Any]]:
        """New tokens of one request -> one record for each returned sequence.

        Args:
            model_outputs: What `_forward` returns, for one request.
            return_full_text: Whether the answer comes with the prompt; by default only when that was a chat.
            skip_special_tokens: Whether special tokens are left out of the text.
        """
        request = model_outputs["requests"][0]
        answers = self.tokenizer.batch_decode(model_outputs["generated"][0], skip_special_tokens=skip_special_tokens)
        full = request.question is None if return_full_text is None else return_full_text
        return [{"generated_text": _with_prompt(request, answer) if full else answer} for answer in answers]


def register_pipeline() -> None:
    """Make `pipeline("video-text-to-text")` known to transformers; calling it again changes nothing."""
    known = PIPELINE_REGISTRY.supported_tasks.get(TASK)
    if known is not None and known["impl"] is ElvaPipeline:
        return
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=ElvaPipeline, pt_model=AutoModelForMultimodalLM, type="multimodal"
    )
    # With this mark, saving would write `custom_pipelines` into the config, and loading would then ask for remote code.
    del ElvaPipeline._registered_impl


def _with_prompt(request: Request, answer: str) -> str | list[dict[str, Any]]:
    if request.question is not None:
        return request.question + answer
    if not request.continues:
        return [*request.messages, {"role": "assistant", "content": answer}]
    *before, last = request.messages
    content = last["content"]
    if isinstance(content, str):
        return [*before, {**last, "content": content + answer}]
    *parts, final = content
    if final.get("type") == "text":
        return [*before, {**last, "content": [*parts, {**final, "text": final["text"] + answer}]}]
    return [*before, {**last, "content": [*content, {"type": "text", "text": answer}]}]


def _merge_options(options: dict[str, Any], extra: dict[str, Any], source: str) -> dict[str, Any]:
    twice = sorted(options.keys() & extra.keys())
    if twice:
        raise TypeError(f"{', '.join(twice)} given twice: as a keyword and in {source}; keep one.")
    return {**options, **extra}


def _replaced_sampling(options: dict[str, Any]) -> dict[str, None]:
    """A way to count frames given at a call replaces another way given at construction."""
    if not any(options.get(name) is not None for name in SAMPLING_FIELDS):
        return {}
    pair = any(options.get(name) is not None for name in HYBRID_FIELDS)
    return dict.fromkeys(name for name in SAMPLING_FIELDS if not (pair and name in HYBRID_FIELDS))


def _unknown_keyword(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown keyword {name!r}: no option of the pipeline, the video processor or generate has this name.{meant}"


def _pad_left(rows: list[Tensor], value: int) -> Tensor:
    """`(N_i,)` rows -> `(B, max N)`."""
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
