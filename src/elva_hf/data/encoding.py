"""Rows of chat messages -> the token ids that inference sees, with labels on the assistant's tokens only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.chat_template_utils import mark_control_tokens, render_jinja_template

from elva_hf.chat_elva import check_conversation, take_media
from elva_hf.data.packing import IGNORED, restart_positions, share_prefix, split_turns, unpack_turns
from elva_hf.errors_elva import ConfigurationError, ElvaError
from elva_hf.frames_elva import Grid
from elva_hf.placeholders_elva import PerSample
from elva_hf.processing_elva import ElvaProcessor

_SEAM = mark_control_tokens("x", re.compile("x"))[-1]  # alone, it breaks a text for the tokenizer and leaves no token
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class EncodedSample:
    """A row as model inputs, before it meets others in a batch.

    Args:
        input_ids: `(N,)` int64.
        labels: `(N,)` int64: the id where the assistant speaks, -100 elsewhere.
        pixel_values_videos: `(num_patches, 3 * patch_size**2)`; None for a row of text.
        grids: Per video or image, in order, rows and columns of patches of each frame.
        segment_ids: `(N,)` 0 for what all questions share, 1, 2, ... for the questions; None for one conversation.
        sample_id: `id` of the row.
        index: Place of the row in its dataset; -1 if unknown.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values_videos: Tensor | None = None
    grids: tuple[tuple[Grid, ...], ...] = ()
    segment_ids: Tensor | None = None
    sample_id: str = ""
    index: int = -1

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def position_ids(self) -> Tensor:
        """`(N,)`; every question goes on where the shared part ends."""
        return torch.arange(len(self)) if self.segment_ids is None else restart_positions(self.segment_ids)

    @property
    def patches_per_video(self) -> list[int]:
        """Rows of `pixel_values_videos` of each video."""
        return [sum(rows * cols for rows, cols in video) for video in self.grids]

    def unpack(self) -> list[EncodedSample]:
        """Its questions as single-turn conversations, which share the pixels."""
        if self.segment_ids is None:
            return [self]
        own = [{"input_ids": self.input_ids[i], "labels": self.labels[i]} for i in unpack_turns(self.segment_ids)]
        return [replace(self, **fields, segment_ids=None) for fields in own]


@dataclass(frozen=True)
class _Conversation:
    """A chat as text.

    Args:
        opening: Up to the assistant's first word.
        turns: Per turn of the assistant what it says, and what stands between that and its next turn.
    """

    opening: str
    turns: list[tuple[str, str]]


@dataclass(frozen=True)
class _Tokens:
    """A conversation as tokens, each video or image no more than its two borders.

    Args:
        text: What they are the tokens of, with its seams.
        ids: Token ids.
        labels: The same where the assistant speaks, -100 elsewhere.
    """

    text: str
    ids: list[int]
    labels: list[int]


def encode_row(row: Mapping[str, Any], processor: ElvaProcessor, *, index: int = -1, **options: Any) -> EncodedSample:
    """Encode a row exactly as inference sees it; each video is decoded once.

    Tokens are those of `processor.apply_chat_template(messages, sanitize_control_tokens=True)`: what people typed stays
    text. The tokens before an answer are those of the prompt with `add_generation_prompt=True`, and the answer begins
    with a token of its own, as generation does. Labels are the tokens between the template's `{% generation %}` marks:
    the assistant's words and the end of its turn.

    With `independent_turns` each question is a conversation with the videos and images of the first user message
    followed by the question's own text, written once before all questions (`segment_ids`). `context_length` holds for
    each of these conversations.

    Args:
        row: `messages` as `apply_chat_template` takes them; `id`; `independent_turns`.
        processor: Of the model.
        index: Place of the row in its dataset.
        **options: Of the video processor: `num_frames`, `longest_edge`, `context_length`, `overflow`, ...; nothing is
            ever truncated.

    Raises:
        ContextOverflowError: The row is beyond a budget, and `overflow` is not `"fit"`.
        VideoError: A video or image that cannot be used.
        ConfigurationError: The template does not mark the assistant's turns, or an unknown option.
        ElvaError: The row is no chat, or the assistant says nothing in it.
    """
    chats = _read_row(row)
    conversations = [_tokenize(_render(chat, processor), processor) for chat in chats]
    media = take_media(chats[:1])
    longest = max(range(len(conversations)), key=lambda i: len(conversations[i].ids))
    whole = processor(
        text=conversations[longest].text,
        images=PerSample(media["image"]) if media["image"][0] else None,
        videos=PerSample(media["video"]) if media["video"][0] else None,
        sanitize_control_tokens=True,
        return_metadata=True,
        **_special_tokens_option(conversations[longest].text, processor),
        **options,
    )
    ids = whole["input_ids"][0]
    videos = list(_visual_runs(ids, processor))
    encoded = [_insert_videos(conversation, videos, processor) for conversation in conversations]
    if encoded[longest][0] != ids:
        raise ElvaError(
            f"{type(processor.tokenizer).__name__} writes this row otherwise in parts than as a whole, so labels are "
            "unknown; take a tokenizer that adds no token at the end of a text, as those of decoders do."
        )
    segments = None
    if len(encoded) > 1:
        input_ids, labels, segments = share_prefix(encoded, processor.video_end_token_id)
    else:
        input_ids, labels = map(torch.tensor, encoded[0])
    pixels = whole.get("pixel_values_videos")
    grids = tuple(tuple(video.grids) for video in whole["video_metadata"]) if pixels is not None else ()
    return EncodedSample(input_ids, labels, pixels, grids, segments, str(row.get("id", "")), index)


def plan_row(row: Mapping[str, Any], processor: ElvaProcessor, **options: Any) -> int:
    """Tokens of a row as `encode_row` would write it, known without decoding a video.

    Args:
        row: As in `encode_row`.
        processor: Likewise.
        **options: Likewise.

    Raises:
        ElvaError: All that `encode_row` raises before it decodes.
    """
    chats = _read_row(row)
    conversations = [_tokenize(_render(chat, processor), processor) for chat in chats]
    media = {kind: items for kind, (items,) in take_media(chats[:1]).items()}
    num_borders = 2 * sum(map(len, media.values()))
    longest = max(len(conversation.ids) for conversation in conversations)
    around = longest - num_borders
    plan = processor.plan(media["video"] or None, media["image"] or None, text_tokens=around, **options)
    num_tokens = len(conversations[0].ids)
    if len(conversations) > 1:
        parts = [(conversation.ids, conversation.labels) for conversation in conversations]
        num_tokens = len(share_prefix(parts, processor.video_end_token_id)[0])
    return num_tokens + plan.num_tokens - longest


def check_template(processor: ElvaProcessor) -> str:
    """The chat template of a processor, checked to mark what the assistant says.

    Raises:
        ConfigurationError: It has no template, or one without marks.
    """
    template = processor.chat_template
    template = template.get("default") if isinstance(template, Mapping) else template
    if not template or not _GENERATION.search(template):
        raise ConfigurationError(
            f"the chat template {'does not mark what the assistant says' if template else 'is missing'}; write "
            "{% generation %} and {% endgeneration %} around the assistant's content and the end of its turn, so that "
            "labels can be made."
        )
    return template


def _read_row(row: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The conversations of a row, checked: one, or one for each independent question."""
    if not isinstance(row, Mapping) or "messages" not in row:
        raise ElvaError(f'a row is a dictionary with "messages"; got {type(row).__name__} {row!s:.60}.')
    chat = check_conversation(row["messages"], join_texts=True)
    if not isinstance(chat[0], Mapping):
        raise ElvaError("the messages of a row are several chats; give one, a list of messages.")
    for number, message in enumerate(chat):
        content = message.get("content")
        if message["role"] == "assistant" and not isinstance(content, (str, type(None))):
            kind = next((block["type"] for block in content if block["type"] != "text"), None)
            if kind:
                raise ElvaError(f"message {number} is the assistant's and holds a {kind}, which is no text to learn.")
    return split_turns(chat) if row.get("independent_turns") else [chat]


def _render(chat: Sequence[Mapping[str, Any]], processor: ElvaProcessor) -> _Conversation:
    """Write a chat by the processor's template; what people typed is marked as text."""
    template, tokenizer = check_template(processor), processor.tokenizer
    chat = [dict(message) for message in chat]
    plain = [{**message, "content": _without_sources(message.get("content"))} for message in chat]
    marked, *_ = tokenizer._mark_chat_inputs(template, [plain], None, None, {}, True, False)
    (text,), (spans,) = render_jinja_template(
        conversations=marked,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if not spans:
        raise ElvaError("the assistant says nothing in this row; there is nothing to learn from it.")
    nexts = [start for start, _ in spans[1:]] + [len(text)]
    turns = [(text[start:end], text[end:after]) for (start, end), after in zip(spans, nexts, strict=True)]
    return _Conversation(text[: spans[0][0]], turns)


def _without_sources(content: Any) -> Any:
    if isinstance(content, str) or content is None:
        return content
    return [block if block["type"] == "text" else {"type": block["type"]} for block in content]


def _special_tokens_option(text: str, processor: ElvaProcessor) -> dict[str, bool]:
    """As `ProcessorMixin.apply_chat_template` has it: a template that writes the first token wants no second one."""
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}


def _tokenize(conversation: _Conversation, processor: ElvaProcessor) -> _Tokens:
    """Ids and labels of a conversation.

    An answer begins at a seam, and ends at one if it would merge with what comes after it.
    """
    opening = conversation.opening
    special = _special_tokens_option(opening, processor)

    def encode(texts: list[str]) -> list[list[int]]:
        bordered = [_only_borders(text, processor) for text in texts]
        return processor.tokenizer(bordered, sanitize_control_tokens=True, return_attention_mask=False, **special)[
            "input_ids"
        ]

    answers = [_SEAM + answer for answer, _ in conversation.turns]
    turns = [_SEAM + answer + rest for answer, rest in conversation.turns]
    encoded = encode([opening, *answers, *turns])
    text, ids, labels = opening, list(encoded[0]), [IGNORED] * len(encoded[0])
    for turn, (_, rest), spoken, joined in zip(
        turns, conversation.turns, encoded[1 : 1 + len(turns)], encoded[1 + len(turns) :], strict=True
    ):
        if joined[: len(spoken)] == spoken:
            text, new = text + turn, joined
        else:
            text, new = text + turn.removesuffix(rest) + _SEAM + rest, spoken + encode([_SEAM + rest])[0]
        ids += new
        labels += spoken + [IGNORED] * (len(new) - len(spoken))
    return _Tokens(text, ids, labels)


def _only_borders(text: str, processor: ElvaProcessor) -> str:
    """A text with the borders of a video in the place of every placeholder."""
    tokens = processor.visual_tokens
    parts, last = [], 0
    for _, (start, end) in tokens.find(text):
        parts += [text[last:start], tokens.video_start + tokens.video_end]
        last = end
    return "".join([*parts, text[last:]])


def _visual_runs(ids: Sequence[int], processor: ElvaProcessor) -> Iterator[list[int]]:
    """What stands between the borders of each video."""
    start = None
    for place, token in enumerate(ids):
        if token == processor.video_start_token_id:
            start = place + 1
        elif token == processor.video_end_token_id and start is not None:
            yield list(ids[start:place])
            start = None


def _insert_videos(
    tokens: _Tokens, videos: Sequence[Sequence[int]], processor: ElvaProcessor
) -> tuple[list[int], list[int]]:
    """Put the tokens of each video between its borders."""
    left = iter(videos)
    all_ids: list[int] = []
    all_labels: list[int] = []
    for token, label in zip(tokens.ids, tokens.labels, strict=True):
        all_ids.append(token)
        all_labels.append(label)
        if token == processor.video_start_token_id:
            video = next(left)
            all_ids += video
            all_labels += [IGNORED] * len(video)
    return all_ids, all_labels
