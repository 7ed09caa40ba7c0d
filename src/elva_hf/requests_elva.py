"""What a caller asks: one video and a question, a chat, or many of them, in the forms the pipeline takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import BatchFeature
from transformers.utils.chat_template_utils import Chat, is_valid_message

from .errors_elva import ContextOverflowError, ElvaError, PlaceholderError
from .processing_elva import ElvaProcessor
from .video_processing_elva import is_frame_list

TEMPLATE_OPTIONS = frozenset({"chat_template", "tools", "documents"})
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


@dataclass(frozen=True)
class Room:
    """What a model has for a prompt and its answer.

    Args:
        num_positions: Of the model.
        max_new_tokens: Most tokens of the answer; 0 where the prompt counts towards its limit.

    Raises:
        ContextOverflowError: The answer leaves no room for a prompt.
    """

    num_positions: int
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.for_prompt < 1:
            raise ContextOverflowError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt: the model has {self.num_positions} "
                "positions. Take a smaller max_new_tokens.",
                budget="context_length",
                needed=self.max_new_tokens,
                limit=self.num_positions,
            )

    @property
    def for_prompt(self) -> int:
        """Tokens that a prompt may have."""
        return self.num_positions - self.max_new_tokens


def encode_request(
    processor: ElvaProcessor, request: Request, options: dict[str, Any], room: Room | None = None
) -> BatchFeature:
    """One request as model inputs; what a person typed stays text.

    Args:
        processor: Of the model.
        request: What to answer.
        options: Those of the processor and of its chat template.
        room: What the model has, if it has a limit; known to be enough before a video is decoded.

    Raises:
        ContextOverflowError: There is too little room, or a budget is too small.
        ElvaError: All that the processor raises.
    """
    visual = {name: value for name, value in options.items() if name not in TEMPLATE_OPTIONS}
    if room is not None:
        visual["context_length"] = min(visual.get("context_length") or room.for_prompt, room.for_prompt)
    try:
        return processor.apply_chat_template(
            request.messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not request.continues,
            continue_final_message=request.continues,
            sanitize_control_tokens=True,
            processor_kwargs=visual,
            **{name: value for name, value in options.items() if name in TEMPLATE_OPTIONS},
        )
    except ContextOverflowError as error:
        if room is None or (error.budget, error.limit) != ("context_length", room.for_prompt):
            raise
        raise ContextOverflowError(
            f"{error} The model has {room.num_positions} positions, and the answer may have {room.max_new_tokens}.",
            budget=error.budget,
            needed=error.needed,
            limit=error.limit,
            settings=error.settings,
        ) from error


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
