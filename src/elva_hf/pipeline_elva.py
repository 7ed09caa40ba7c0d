"""The task `"video-text-to-text"`: questions about videos and images, answered in text."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoModelForMultimodalLM, GenerationConfig, GenerationMixin
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .errors_elva import ContextOverflowError, ElvaError, PlaceholderError
from .video_processing_elva import HYBRID_FIELDS, SAMPLING_FIELDS, is_frame_list

TASK = "video-text-to-text"

GENERATION_FIELDS = frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))
GENERATE_ARGUMENTS = frozenset(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
MODEL_ARGUMENTS = frozenset({"merge_schedule"})
TEMPLATE_OPTIONS = frozenset({"chat_template", "tools", "documents"})
POSTPROCESS_OPTIONS = frozenset({"return_full_text", "skip_special_tokens"})
REQUEST_KEYS = ("video", "videos", "image", "images", "text")


@dataclass(frozen=True)
class Request:
    """One thing to answer: a chat, and how the caller wrote it.

    Args:
        messages: The chat, never changed.
        question: The caller's text if it was not written as a chat.
    """

    messages: list[dict[str, Any]]
    question: str | None = None

    @property
    def continues(self) -> bool:
        """Whether the last turn is the assistant's, to be continued rather than followed."""
        return self.messages[-1]["role"] == "assistant"


class ElvaPipeline(Pipeline):
    """Answers questions about videos: decode, insert tokens, generate, decode.

    Accepts `pipe(video, question)`, `pipe({"video": video, "text": question})`, `pipe(videos=..., text=...)`, images in
    the same way, one chat, and lists, generators or datasets of chats or dictionaries. A text is what a person typed: a
    special token written in it stays text. Keywords, at construction and at each call: every field of
    `GenerationConfig` and argument of `generate`, every option of the video processor (`num_frames`, `fps`,
    `num_high_res_frames`, `longest_edge`, ...), `return_full_text`, `batch_size`.

    Unless the model's generation config says otherwise, answers have at most 256 new tokens.
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
            ContextOverflowError: Prompt and answer need more positions than the model has.
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

    def preprocess(self, inputs: Any, **options: Any) -> dict[str, Any]:
        """One request -> token ids and patches.

        Returns:
            `input_ids` and `attention_mask` `(1, N)`, `pixel_values_videos` `(P, 3 * patch_size**2)` if there are
            any, and `requests`, a list of one.
        """
        request = read_request(inputs)
        template = {name: options.pop(name) for name in TEMPLATE_OPTIONS & options.keys()}
        encoded = self.processor.apply_chat_template(
            request.messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not request.continues,
            continue_final_message=request.continues,
            sanitize_control_tokens=True,
            processor_kwargs=dict(options),
            **template,
        )
        return {**encoded.to(dtype=self.dtype), "requests": [request]}

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
        sized = hasattr(inputs, "__len__")
        source = (PipelineDataset if sized else PipelineIterator)(inputs, self.preprocess, preprocess_params)
        workers = num_workers if sized else min(num_workers, 1)  # each worker would read all of a stream
        loader = DataLoader(source, num_workers=workers, batch_size=batch_size, collate_fn=self._collate)
        for batch in loader:
            outputs = self.forward(batch, **forward_params)
            for request, generated in zip(outputs["requests"], outputs["generated"], strict=True):
                single = {"requests": [request], "generated": generated[None]}
                yield self.postprocess(single, **postprocess_params)

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

    def _check_context(self, inputs: dict[str, Tensor], settings: dict[str, Any]) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
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


def read_requests(videos: Any, text: Any, images: Any) -> Request | list[Request] | Iterator[Request] | Dataset:
    """Turn the arguments of a pipeline call into one request, a list of them, or a stream.

    Raises:
        ElvaError: No question, chat and videos both given, or lists of different lengths.
    """
    if text is None:
        if images is not None:
            raise ElvaError('an image without a question; call pipe(images=image, text="What is this?").')
        return _read_many(videos)
    if isinstance(text, str):
        return _question(text, _sources(videos, _is_video_list), _sources(images, _is_list))
    if not _is_list(text):
        return _read_many(_no_visuals(text, videos, images))
    if not text or not isinstance(text[0], str):
        return _read_many(_no_visuals(text, videos, images))
    columns = [_column(videos, len(text), _is_video_list, "videos"), _column(images, len(text), _is_list, "images")]
    return [_question(*row) for row in zip(text, *columns, strict=True)]


def read_request(item: Any) -> Request:
    """Turn one item of a list, generator or dataset into a request.

    Raises:
        ElvaError: The item is neither a chat nor a dictionary with `text`.
    """
    if isinstance(item, Request):
        return item
    if isinstance(item, Chat):
        item = item.messages
    if _is_chat(item):
        return _chat(item)
    if not isinstance(item, dict):
        raise ElvaError(
            f"cannot read a request from {_describe(item)}; expected a chat (a list of messages with 'role' and "
            '\'content\') or {"video": ..., "text": ...}. For one video call pipe(video, "question").'
        )
    unknown = [str(key) for key in item if key not in REQUEST_KEYS]
    if unknown:
        raise ElvaError(f"a request has the keys {', '.join(REQUEST_KEYS)}; got also {', '.join(unknown)}.")
    videos = [*_sources(item.get("video"), _never), *_sources(item.get("videos"), _is_video_list)]
    images = [*_sources(item.get("image"), _never), *_sources(item.get("images"), _is_list)]
    return _question(item.get("text"), videos, images)


def _read_many(inputs: Any) -> Request | list[Request] | Iterator[Request] | Dataset:
    if inputs is None:
        raise ElvaError('nothing to answer; call pipe(video, "question"), or pass a chat.')
    if _is_chat(inputs) or isinstance(inputs, (dict, Chat)):
        return read_request(inputs)
    if isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
        return inputs
    if _is_list(inputs):
        return [read_request(item) for item in inputs]
    if isinstance(inputs, (str, bytes, os.PathLike, Tensor)) or hasattr(inputs, "__array__"):
        raise ElvaError(f'{_describe(inputs)} without a question; call pipe(video, "What happens?").')
    if isinstance(inputs, Iterable):
        return _stream(iter(inputs))
    return read_request(inputs)


def _stream(items: Iterator[Any]) -> Request | Iterator[Request]:
    """A generator of messages is one chat; of anything else, one request each, read when its turn comes."""
    first = next(items, None)
    if first is None:
        return (item for item in ())
    if is_valid_message(first):
        return _chat([first, *items])
    return (read_request(item) for part in ((first,), items) for item in part)


def _chat(messages: Iterable[dict[str, Any]]) -> Request:
    messages = list(messages)
    content = messages[-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    texts = [str(part.get("text", "")) for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not parts or (texts and not any(map(str.strip, texts))):
        raise ElvaError(f"the last message (role {messages[-1]['role']!r}) has no text; write what you want to know.")
    return Request(messages)


def _question(text: Any, videos: Iterable[Any] = (), images: Iterable[Any] = ()) -> Request:
    if not isinstance(text, str):
        raise ElvaError(f"the question must be a string, got {_describe(text)}.")
    if not text.strip():
        raise ElvaError("the question is empty; write what you want to know about the video.")
    content = [
        *({"type": "video", "video": video} for video in videos),
        *({"type": "image", "image": image} for image in images),
        {"type": "text", "text": text},
    ]
    return Request([{"role": "user", "content": content}], question=text)


def _no_visuals(chat: Any, videos: Any, images: Any) -> Any:
    if videos is not None or images is not None:
        raise PlaceholderError(
            "a chat holds its videos and images itself: put {'type': 'video', 'video': ...} into a message's content "
            "instead of passing videos= or images=."
        )
    return chat


def _sources(value: Any, is_several: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if is_several(value) else [value]


def _column(value: Any, length: int, is_several: Any, name: str) -> list[list[Any]]:
    """One list of sources for each question: a single source serves all questions, several go one to one."""
    if value is None or not is_several(value):
        return [_sources(value, is_several)] * length
    if len(value) != length:
        raise ElvaError(f"{len(value)} {name} for {length} questions; give one for each question, or one for all.")
    return [_sources(item, is_several) for item in value]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _never(value: Any) -> bool:
    return False


def _is_video_list(value: Any) -> bool:
    """Whether a list holds videos; a list of images or of `(H, W, C)` arrays is one video, frame by frame."""
    return _is_list(value) and bool(value) and not is_frame_list(value)


def _is_chat(value: Any) -> bool:
    return _is_list(value) and bool(value) and all(map(is_valid_message, value))


def _describe(value: Any) -> str:
    shown = repr(value) if isinstance(value, (str, os.PathLike, int, float, type(None))) else type(value).__name__
    return shown if len(shown) <= 80 else shown[:77] + "..."


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
