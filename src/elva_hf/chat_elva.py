"""Chats: the template, the videos and images in their messages, and what a message may look like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from .errors_elva import ConfigurationError, ElvaError, PlaceholderError
from .options_elva import CLIP_FIELDS, VideoClip, meant

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{%- macro write(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for block in content -%}
      {%- if block.type == 'video' -%}{{ '<video>' }}
      {%- elif block.type == 'image' -%}{{ '<image>' }}
      {%- elif block.type == 'text' -%}{{ block.text }}
      {%- else -%}{{ raise_exception('content of type ' ~ block.type ~ ': expected text, video or image') }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{ write(message.content or '') }}{{ '<|im_end|>' }}{%- endgeneration -%}
  {%- else -%}
    {{- write(message.content or '') ~ '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""ChatML, as Qwen2 writes it, with no default system prompt; the end of an assistant's turn is part of the turn."""

MEDIA_KEYS = {"video": ("video", "url", "path"), "image": ("image", "url", "path")}
_BLOCK_OPTIONS: dict[str, tuple[str, ...]] = {"video": CLIP_FIELDS, "image": ()}


def check_conversation(conversation: Any, *, join_texts: bool = False) -> list[Any]:
    """Check the form of a chat, or of a list of chats, and copy it, without keys whose value is None.

    Args:
        conversation: Messages with `role` and `content`, or several lists of them.
        join_texts: Whether neighbouring blocks of text become one: two of them may spell a special token together,
            which nobody would find in either.

    Raises:
        ElvaError: It is no chat.
        ConfigurationError: A block of content has a key that is unknown.
        PlaceholderError: A block of content has several sources.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)):
        raise ElvaError(f"a {type(conversation).__name__} is no chat; give a list of messages with role and content.")
    if not conversation:
        raise ElvaError("the chat has no messages; give at least one user message.")
    if isinstance(conversation[0], Mapping):
        return _check_chat(conversation, "", join_texts)
    chats = [getattr(chat, "messages", chat) for chat in conversation]
    for number, chat in enumerate(chats):
        if not isinstance(chat, (list, tuple)):
            raise ElvaError(f"chat {number} is a {type(chat).__name__}; a chat is a list of messages.")
    return [_check_chat(chat, f"chat {number}, ", join_texts) for number, chat in enumerate(chats)]


def check_continuation(conversation: Any) -> None:
    """Check that the last message of each chat has a text to continue.

    Raises:
        ElvaError: One has none.
    """
    for chat in [conversation] if isinstance(conversation[0], Mapping) else conversation:
        content = chat[-1].get("content") if chat else None
        if not isinstance(content, str) and not any(block["type"] == "text" for block in content or ()):
            raise ElvaError("the last message has no text that could be continued; use add_generation_prompt=True.")


def take_media(conversations: Sequence[list[dict[str, Any]]]) -> dict[str, list[list[Any]]]:
    """Videos and images of chats, in order, per chat; their blocks keep nothing but the type.

    Raises:
        ElvaError: A chat is empty.
    """
    taken: dict[str, list[list[Any]]] = {kind: [] for kind in MEDIA_KEYS}
    for number, conversation in enumerate(conversations):
        found: dict[str, list[Any]] = {kind: [] for kind in MEDIA_KEYS}
        has_text = False
        for message in conversation:
            content = message.get("content") or []
            if isinstance(content, str):
                has_text = has_text or bool(content.strip())
                continue
            for block in content:
                if block["type"] in found:
                    found[block["type"]].extend(_media_of(block))
                has_text = has_text or bool(block.get("text", "").strip())
            message["content"] = [_without_media(block) for block in content]
        if not has_text and not any(found.values()):
            raise ElvaError(f"chat {number} is empty: no text, no video, no image; ask something.")
        for kind, items in found.items():
            taken[kind].append(items)
    return taken


def _check_chat(chat: Sequence[Any], where: str, join_texts: bool) -> list[dict[str, Any]]:
    return [_check_message(message, f"{where}message {number}", join_texts) for number, message in enumerate(chat)]


def _check_message(message: Any, where: str, join_texts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ElvaError(f"{where} is a {type(message).__name__}; a message is a dictionary with role and content.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ElvaError(f"{where} has the role {role!r:.60}; give 'system', 'user' or 'assistant'.")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, (list, tuple)):
        raise ElvaError(
            f"the content of {where} is a {type(content).__name__}; give a string or a list of blocks of text, video "
            "and image."
        )
    blocks: Any = [_check_block(block, where) for block in content]
    return {**message, "content": list(_joined(blocks) if join_texts else blocks)}


def _check_block(block: Any, where: str) -> dict[str, Any]:
    """A block of content without keys whose value is None, as rows of a dataset have them."""
    if not isinstance(block, Mapping):
        raise ElvaError(
            f"a block of content in {where} is a {type(block).__name__}; write "
            '{"type": "text", "text": ...} or {"type": "video", "video": ...}.'
        )
    block = _plain_url({key: value for key, value in block.items() if value is not None})
    kind = block.get("type")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise ElvaError(f"a block of text in {where} holds a {type(block.get('text')).__name__}; give a string.")
    elif isinstance(kind, str) and kind in MEDIA_KEYS:
        _check_media(block, where)
    else:
        raise ElvaError(f"{where} has content of type {kind!r:.60}; expected text, video or image.")
    return block


def _plain_url(block: dict[str, Any]) -> dict[str, Any]:
    """A block as transformers writes it, from one with `image_url` or `video_url` as OpenAI writes it."""
    for kind in MEDIA_KEYS:
        given = block.get(f"{kind}_url")
        if block.get("type") == f"{kind}_url" and given is not None:
            return {"type": kind, "url": given.get("url") if isinstance(given, Mapping) else given}
    return block


def _check_media(block: dict[str, Any], where: str) -> None:
    kind = block["type"]
    sources = [key for key in MEDIA_KEYS[kind] if key in block]
    if len(sources) > 1:
        raise PlaceholderError(f"a {kind} block in {where} has several sources, {', '.join(sources)}; give one.")
    known = (*MEDIA_KEYS[kind], *_BLOCK_OPTIONS[kind])
    for key in block:
        if key != "type" and key not in known:
            raise ConfigurationError(f"a {kind} block in {where} has the key {key!r};{meant(str(key), known)}")


def _joined(blocks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for is_text, run in groupby(blocks, key=lambda block: block["type"] == "text"):
        if is_text:
            yield {"type": "text", "text": "".join(block["text"] for block in run)}
        else:
            yield from run


def _media_of(block: dict[str, Any]) -> list[Any]:
    """The source in a block of content, with the options beside it; none if it is given elsewhere."""
    kind = block["type"]
    options = {name: block[name] for name in _BLOCK_OPTIONS[kind] if name in block}
    sources = [block[key] for key in MEDIA_KEYS[kind] if key in block]
    return [VideoClip(source, **options) if options else source for source in sources]


def _without_media(block: dict[str, Any]) -> dict[str, Any]:
    return {"type": block["type"]} if block["type"] in MEDIA_KEYS else block
