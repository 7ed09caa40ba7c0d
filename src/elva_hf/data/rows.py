"""The canonical row of training data, and its strict check; other formats are turned into it.

    {"id": "42", "messages": [
        {"role": "user", "content": [{"type": "video", "path": "42.mp4"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A red square."}]}

An optional `independent_turns: true` says that every question is asked about the media of the first turn, and none of
them knows of the others. A media block names its source by `path`, or holds it under its type (`bytes`, an array); the
options of a `VideoClip` may stand beside it. Text stays as written: it may spell special tokens, which encoding makes
harmless.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elva_hf.chat_elva import MEDIA_KEYS
from elva_hf.errors_elva import ElvaError
from elva_hf.frames_elva import FrameSampling
from elva_hf.options_elva import CLIP_FIELDS
from elva_hf.source_elva import shown

Row = dict[str, Any]

ROW_KEYS = ("messages", "id", "independent_turns")
_MESSAGE_KEYS = ("role", "content")
_WHOLE_FIELDS = ("num_high_res_frames", "num_low_res_frames", "num_frames")
_LONGEST_SHOWN = 60
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+://|data:|file:")


@dataclass(frozen=True)
class Origin:
    """Where a row comes from, as people find it again.

    Args:
        file: Name of the file, or of what else it comes from.
        line: Line of it, from 1.
        index: Row of it, from 0, where there are no lines.
    """

    file: str | None = None
    line: int | None = None
    index: int | None = None

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line is not None else None if self.index is None else f"row {self.index}"
        return " ".join(part for part in (self.file, place) if part) or "row"


class RowError(ElvaError):
    """A row that cannot be trained on.

    Args:
        message: What is wrong, naming the value, the expectation and the fix.
        origin: Where the row stands.
        row_id: Its id, where it has one.
    """

    def __init__(self, message: str, origin: Origin | None = None, row_id: str | None = None):
        origin = origin or Origin()
        super().__init__(f"{origin}{'' if row_id is None else f', id {quote(row_id)}'}: {message}")
        self.message = message
        self.file = origin.file
        self.line = origin.line
        self.index = origin.index
        self.row_id = row_id


@dataclass(frozen=True)
class MediaRoot:
    """Turns the paths that data files name into paths to open.

    Args:
        folder: What relative paths are relative to.
        confined: Whether absolute paths too must lie in it; relative ones always do.
        allow_urls: Whether https URLs are taken; the processor must allow them as well.
    """

    folder: str = ""
    confined: bool = False
    allow_urls: bool = False

    def resolve(self, text: str) -> str:
        """The path to open.

        Raises:
            ElvaError: It is a URL, leaves the folder, or is no path.
        """
        if not text.strip() or "\0" in text:
            raise ElvaError(f"the path {quote(text)} is none; name a file.")
        _check_text(text, "a path")
        if _URL.match(text):
            return self._url(text)
        if os.path.isabs(text) and not self.confined:
            return text
        folder = os.path.normpath(self.folder or ".")
        path = os.path.normpath(os.path.join(folder, text))
        outside = os.path.relpath(path, folder).split(os.sep)[0] == os.pardir
        if outside:
            raise ElvaError(
                f"the path {quote(text)} leaves the folder {quote(folder)}; set media_root to a folder that holds "
                "all media, or move the file."
            )
        return path

    def _url(self, text: str) -> str:
        if not self.allow_urls:
            raise ElvaError(f"{shown(text)} is a URL; download the file and name its path, or set allow_urls: true.")
        if not text.lower().startswith("https://"):
            raise ElvaError(f"{shown(text)} is no https URL; only those are fetched.")
        return text


def check_row(row: Any, origin: Origin | None = None, root: MediaRoot | None = None) -> Row:
    """Check a row strictly, and copy it without keys whose value is None.

    Args:
        row: What should be one.
        origin: Where it stands, for errors.
        root: Resolves the paths of its media; None leaves them as they are.

    Raises:
        RowError: It is no row: wrong roles or order, media outside user turns, an empty answer, an unknown key.
    """
    row_id = row.get("id") if isinstance(row, Mapping) else None
    try:
        return _check_row(row, root)
    except RowError:
        raise
    except ElvaError as error:
        raise RowError(str(error), origin, row_id if isinstance(row_id, str) else None) from error


def media_blocks(row: Row) -> list[dict[str, Any]]:
    """The media blocks of a checked row, in order."""
    blocks = (block for message in row["messages"] for block in content_blocks(message))
    return [block for block in blocks if block["type"] in MEDIA_KEYS]


def content_blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The content of a checked message as blocks."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _check_row(row: Any, root: MediaRoot | None) -> Row:
    if not isinstance(row, Mapping):
        raise ElvaError(f"a row is a mapping with {', '.join(ROW_KEYS)}; this is {kind_of(row)}.")
    row = {key: value for key, value in row.items() if value is not None}
    refuse_unknown(row, ROW_KEYS, "the row")
    row_id = row.get("id")
    if not isinstance(row_id, str) or not row_id:
        raise ElvaError(f"id is {quote(row_id)}; give text.")
    _check_text(row_id, "id")
    independent = row.get("independent_turns", False)
    if not isinstance(independent, bool):
        raise ElvaError(f"independent_turns is {quote(independent)}; give true or false.")
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise ElvaError(f"messages is {kind_of(messages)}; give a list of messages with role and content.")
    checked = [_check_message(message, f"message {i}", root) for i, message in enumerate(messages)]
    _check_order([message["role"] for message in checked])
    if independent:
        _check_independent(checked)
    return {"id": row_id, "messages": checked, **({"independent_turns": True} if independent else {})}


def _check_order(roles: list[str]) -> None:
    """An optional system message, then user and assistant in turn, the last word being the assistant's."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        raise ElvaError(f"the roles are {roles}: no assistant turn, so nothing to learn; add the answer.")
    for i, role in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            number = i + len(roles) - len(turns)
            raise ElvaError(
                f"message {number} has the role {role!r}, expected {wanted!r}: after an optional system message user "
                "and assistant take turns; join or remove messages."
            )
    if turns[-1] == "user":
        raise ElvaError("the last message is the user's, and no answer follows; add the answer or remove it.")


def _check_independent(messages: list[dict[str, Any]]) -> None:
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    for i, message in enumerate(messages[first + 1 :], start=first + 1):
        if any(block["type"] in MEDIA_KEYS for block in content_blocks(message)):
            raise ElvaError(
                f"message {i} holds media, but with independent_turns all questions are about the media of the first; "
                "move it there, or write independent_turns: false."
            )


def _check_message(message: Any, where: str, root: MediaRoot | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ElvaError(f"{where} is {kind_of(message)}; a message is a mapping with role and content.")
    message = {key: value for key, value in message.items() if value is not None}
    refuse_unknown(message, _MESSAGE_KEYS, where)
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ElvaError(f"{where} has the role {quote(role)}; give 'system', 'user' or 'assistant'.")
    if isinstance(content, str):
        _check_text(content, where)
        blocks = [{"type": "text", "text": content}]
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        content = blocks = [_check_block(block, role, where, root) for block in content]
    else:
        raise ElvaError(f"the content of {where} is {kind_of(content)}; give text or a list of blocks.")
    if not any(block["type"] in MEDIA_KEYS or block["text"].strip() for block in blocks):
        what = "an empty answer" if role == "assistant" else "empty"
        raise ElvaError(f"{where} ({role}) is {what}; give it text, or remove it with its turn.")
    return {"role": role, "content": content}


def _check_block(block: Any, role: str, where: str, root: MediaRoot | None) -> dict[str, Any]:
    if not isinstance(block, Mapping):
        raise ElvaError(f'a block of {where} is {kind_of(block)}; write {{"type": "text", "text": ...}} or such.')
    block = {key: value for key, value in block.items() if value is not None}
    kind = block.get("type")
    if kind == "text":
        refuse_unknown(block, ("type", "text"), f"a text block of {where}")
        if not isinstance(block.get("text"), str):
            raise ElvaError(f"a text block of {where} holds {kind_of(block.get('text'))}; give text.")
        _check_text(block["text"], where)
        return block
    if not isinstance(kind, str) or kind not in MEDIA_KEYS:
        raise ElvaError(f"a block of {where} has the type {quote(kind)}; expected text, video or image.")
    if role != "user":
        raise ElvaError(f"{where} is the {role}'s and holds a {kind}; media stand in user turns only.")
    return _check_media(block, kind, where, root)


def _check_media(block: dict[str, Any], kind: str, where: str, root: MediaRoot | None) -> dict[str, Any]:
    options = CLIP_FIELDS if kind == "video" else ()
    refuse_unknown(block, ("type", *MEDIA_KEYS[kind], *options), f"a {kind} block of {where}")
    given = [key for key in MEDIA_KEYS[kind] if key in block]
    if len(given) != 1:
        found = f"several sources, {', '.join(given)}" if given else "no source"
        raise ElvaError(f'a {kind} block of {where} has {found}; write {{"type": "{kind}", "path": ...}}.')
    source = read_media(block[given[0]], kind, root)
    clip = {name: block[name] for name in options if name in block}
    check_clip(clip)
    return {"type": kind, **source, **clip}


def read_media(value: Any, kind: str, root: MediaRoot | None = None) -> dict[str, Any]:
    """A source as a block holds it: `{"path": ...}`, or the thing itself under its type.

    Args:
        value: A path, `bytes`, an array, or `{"path": ..., "bytes": ...}` as `datasets` gives what it does not decode.
        kind: `"video"` or `"image"`.
        root: Resolves a path.

    Raises:
        ElvaError: It is none of these.
    """
    if isinstance(value, Mapping):
        refuse_unknown(value, ("path", "bytes"), f"a {kind}")
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return {"path": value if root is None else root.resolve(value)}
    if isinstance(value, (bytes, bytearray, memoryview)) or hasattr(value, "__array__") or hasattr(value, "getbands"):
        return {kind: value}
    raise ElvaError(f"a {kind} is {kind_of(value)}; give a path.")


def check_clip(options: Mapping[str, Any]) -> None:
    """Check the options of a `VideoClip`, as data files hold them.

    Raises:
        ElvaError: A value of the wrong kind, or options that exclude each other.
    """
    refuse_unknown(options, CLIP_FIELDS, "a video")
    for name, value in options.items():
        if name == "high_res_selection":
            fine, wanted = isinstance(value, str) and value in ("uniform", "scenes"), "'uniform' or 'scenes'"
        elif name == "frame_times":
            fine, wanted = isinstance(value, (list, tuple)) and all(map(_is_time, value)), "a list of seconds"
        elif name in _WHOLE_FIELDS:
            fine, wanted = type(value) is int and value >= 0, "a whole number"
        else:
            fine, wanted = _is_time(value), "a number, 0 or more"
        if not fine:
            raise ElvaError(f"{name} of a video is {quote(value)}; give {wanted}.")
    FrameSampling(**{name: value for name, value in options.items() if name != "high_res_selection"})


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str, fix: str = "") -> None:
    """Refuse a key that is not known and whose value is not None.

    Raises:
        ElvaError: There is one.
    """
    for key, value in given.items():
        if key not in known and value is not None:
            close = difflib.get_close_matches(str(key)[:_LONGEST_SHOWN], known, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
            raise ElvaError(f"{where} has the unknown key {quote(key)}; {hint}{fix}")


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ElvaError(
            f"{where} has half a surrogate pair at character {error.start}; repair the text's encoding."
        ) from None


def quote(value: Any) -> str:
    """A value as errors show it: at most 60 characters, on one line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def kind_of(value: Any) -> str:
    """A value and its type, as errors show what should have been something else."""
    return "missing" if value is None else f"{quote(value)} ({type(value).__name__})"
