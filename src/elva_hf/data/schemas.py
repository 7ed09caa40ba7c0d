"""Records of other formats -> canonical rows: pure functions, one for each way to write a conversation.

A placeholder, `<video>` or `<image>`, stands for the next video or image of the record wherever it is in a user turn;
one line break beside it goes with it, for the chat template puts none there. Elsewhere such a spelling is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elva_hf.data.rows import MediaRoot, Origin, Row, RowError, check_row, kind_of, quote, read_media, refuse_unknown
from elva_hf.errors_elva import ElvaError

Record = Mapping[str, Any]

MEDIA_COLUMNS = ("video", "videos", "image", "images")
METADATA_KEYS = (
    "id",
    "__key__",
    "__url__",
    "data_source",
    "source",
    "dataset",
    "model",
    "task",
    "category",
    "metadata",
)
"""Keys that say where a record comes from; they are read past. Others must be named in `ignore_keys`."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_IGNORE = " Name it in ignore_keys to read past it."
_PLACEHOLDER = re.compile(r"\n?(<video>|<image>)\n?")


@dataclass(frozen=True)
class Conversion:
    """How records become rows.

    Args:
        schema: A name of `SCHEMAS`.
        root: Resolves the paths of media.
        ignore_keys: Keys of records that are read past.
        independent_turns: Says it of all rows; None leaves it to each row.
        caption_prompt: What a caption answers; by default nothing but the video or image stands before it.
        video: Options of a `VideoClip` for every video that has none of its own.
        columns: The keys of records that count, by the names that the schema has for them; None for all as they are.
        roles: Names of roles in the file -> those of messages.
        turn_keys: Keys of a turn for its role and its text; None for `from` and `value`, or `role` and `content`.
    """

    schema: str
    root: MediaRoot = field(default_factory=MediaRoot)
    ignore_keys: tuple[str, ...] = ()
    independent_turns: bool | None = None
    caption_prompt: str = ""
    video: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    turn_keys: tuple[str, str] | None = None

    def row(self, record: Any, origin: Origin, default_id: str) -> Row:
        """The canonical row of a record.

        Raises:
            RowError: It is none of the schema, or says what no row can.
        """
        row_id = default_id
        try:
            if not isinstance(record, Mapping):
                raise ElvaError(f"a record is a mapping; this is {kind_of(record)}.")
            record = {key: value for key, value in record.items() if value is not None and key not in self.ignore_keys}
            row_id = _read_id(record, default_id)
            if self.columns is not None:
                record = {name: record[key] for name, key in self.columns.items() if key in record}
            row = {"messages": SCHEMAS[self.schema](record, self), "id": row_id}
            independent = self.independent_turns
            if independent is None and self.schema == "messages":
                independent = record.get("independent_turns")
            return add_clip_options(check_row({**row, "independent_turns": independent}, origin, self.root), self.video)
        except RowError:
            raise
        except ElvaError as error:
            raise RowError(str(error), origin, row_id) from error


def add_clip_options(row: Row, options: Mapping[str, Any]) -> Row:
    """A checked row whose videos have these options, unless they have some of their own."""
    if not options:
        return row
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {**block, **options} if block["type"] == "video" and not _has_options(block) else block
                for block in content
            ]
        messages.append({**message, "content": content})
    return {**row, "messages": messages}


def detect_schema(records: Iterable[Any], where: str) -> str:
    """The schema of records, by their keys.

    Args:
        records: Some of a file's first.
        where: The file, for errors.

    Raises:
        ElvaError: They fit none, or several.
    """
    keys: set[str] = set()
    for record in records:
        if not isinstance(record, Mapping):
            raise ElvaError(f"{where}: a record is {kind_of(record)}; expected a mapping with messages or such.")
        keys |= {str(key) for key, value in record.items() if value is not None}
    media = keys & set(MEDIA_COLUMNS)
    fits = {
        "llava": "conversations" in keys,
        "swift": ("messages" in keys and bool(media)) or keys >= {"query", "response"},
        "messages": "messages" in keys and not media,
        "alpaca": keys >= {"instruction", "output"},
        "caption": "caption" in keys,
    }
    found = [name for name, fit in fits.items() if fit]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(sorted(keys)[:12]) or "none"
    what = f"fit several formats ({', '.join(found)})" if found else "fit no known format"
    raise ElvaError(f"{where}: the keys of its first records ({shown}) {what}; set format to {', '.join(SCHEMAS)}.")


def read_messages(record: Record, conversion: Conversion) -> Any:
    """`messages` in HF chat form; media are blocks of content, and placeholders are text."""
    media = [key for key in MEDIA_COLUMNS if _is_given(record.get(key))]
    if media:
        raise ElvaError(f"a row of messages holds {media[0]!r} beside them; set format: swift for lists of media.")
    refuse_unknown(record, ("messages", "independent_turns", *METADATA_KEYS), "the row", _IGNORE)
    messages = record.get("messages")
    if not conversion.ignore_keys or not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    return [_without(message, conversion.ignore_keys) for message in messages]


def read_llava(record: Record, conversion: Conversion) -> list[dict[str, Any]]:
    """`conversations` with from and value (LLaVA, ShareGPT), media in `image(s)` and `video(s)`.

    In a record that has videos and no images `<image>` stands for a video, as LLaVA-Video writes it.
    """
    refuse_unknown(record, ("conversations", "system", *MEDIA_COLUMNS, *METADATA_KEYS), "the record", _IGNORE)
    turns = [*_system(record), *_turns(record.get("conversations"), "conversations", conversion)]
    return _place_media(turns, record, any_kind=True)


def read_swift(record: Record, conversion: Conversion) -> list[dict[str, Any]]:
    """`messages`, or `query`, `response`, `history`, `system` (ms-swift), media in lists.

    Where the text has no placeholder of a kind, the media of that kind go first, as there. Content may be blocks too,
    of which a video or image without a source takes the next of its list, as TRL writes it.
    """
    known = ("messages", "query", "response", "history", "system", *MEDIA_COLUMNS, *METADATA_KEYS)
    refuse_unknown(record, known, "the record", _IGNORE)
    if "messages" in record:
        turns = [*_system(record), *_turns(record["messages"], "messages", conversion)]
    else:
        turns = _pairs(record, record.get("query"), record.get("response"), ("query", "response"))
    return _place_media(turns, record, prepend=True)


def read_alpaca(record: Record, conversion: Conversion) -> list[dict[str, Any]]:
    """`instruction`, `input`, `output`, `system`, `history` (LLaMA-Factory), media in lists."""
    known = ("instruction", "input", "output", "system", "history", *MEDIA_COLUMNS, *METADATA_KEYS)
    refuse_unknown(record, known, "the record", _IGNORE)
    asked = [_text(record.get(key, ""), key) for key in ("instruction", "input")]
    question = "\n".join(part for part in asked if part)
    return _place_media(_pairs(record, question, record.get("output"), ("instruction", "output")), record)


def read_caption(record: Record, conversion: Conversion) -> list[dict[str, Any]]:
    """`caption` of one video or image: the medium, `caption_prompt` if there is one, and the caption as the answer."""
    refuse_unknown(record, ("caption", *MEDIA_COLUMNS, *METADATA_KEYS), "the record", _IGNORE)
    media = _media(record)
    if not any(media.values()):
        raise ElvaError("a caption without a video or image; name it under 'video' or 'image'.")
    blocks = [{"type": kind, **source} for kind, sources in media.items() for source in sources]
    if conversion.caption_prompt:
        blocks.append({"type": "text", "text": conversion.caption_prompt})
    return [{"role": "user", "content": blocks}, _message("assistant", record.get("caption"), "caption")]


SCHEMAS: dict[str, Callable[[Record, Conversion], Any]] = {
    "messages": read_messages,
    "llava": read_llava,
    "swift": read_swift,
    "alpaca": read_alpaca,
    "caption": read_caption,
}


def _read_id(record: Record, default: str) -> str:
    for key in ("id", "__key__"):
        value = record.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value:
            return value
        if value not in (None, ""):
            raise ElvaError(f"id is {quote(value)}; give text or a whole number.")
    return default


def _turns(turns: Any, name: str, conversion: Conversion) -> Iterator[dict[str, Any]]:
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        raise ElvaError(f"{name} is {kind_of(turns)}; expected a list of turns.")
    for i, turn in enumerate(turns):
        where = f"turn {i} of {name}"
        if not isinstance(turn, Mapping):
            raise ElvaError(f"{where} is {kind_of(turn)}; expected a mapping with a role and a text.")
        turn = _without(turn, conversion.ignore_keys)
        pair = conversion.turn_keys or (("from", "value") if "from" in turn else ("role", "content"))
        refuse_unknown(turn, pair, where, _IGNORE)
        role = turn.get(pair[0])
        if not isinstance(role, str) or role not in conversion.roles:
            raise ElvaError(f"{where} is by {quote(role)}; expected {', '.join(conversion.roles)}.")
        content = turn.get(pair[1])
        if not isinstance(content, (str, list, tuple)):
            raise ElvaError(f"{where} holds {kind_of(content)}; expected text.")
        yield {"role": conversion.roles[role], "content": content}


def _pairs(record: Record, question: Any, answer: Any, names: tuple[str, str]) -> list[dict[str, Any]]:
    """Messages of a question and its answer, after those of `system` and `history`."""
    history = record.get("history") or []
    if not isinstance(history, Sequence) or isinstance(history, (str, bytes)):
        raise ElvaError(f"history is {kind_of(history)}; expected a list of [question, answer].")
    pairs = []
    for i, pair in enumerate(history):
        if not isinstance(pair, Sequence) or isinstance(pair, (str, bytes)) or len(pair) != 2:
            raise ElvaError(f"history {i} is {kind_of(pair)}; expected [question, answer].")
        pairs.append((pair, (f"history {i}", f"history {i}")))
    turns = list(_system(record))
    for texts, where in [*pairs, ((question, answer), names)]:
        turns += [_message(role, *part) for role, *part in zip(("user", "assistant"), texts, where, strict=True)]
    return turns


def _system(record: Record) -> Iterator[dict[str, Any]]:
    if record.get("system"):
        yield _message("system", record["system"], "system")


def _message(role: str, text: Any, where: str) -> dict[str, Any]:
    return {"role": role, "content": _text(text, where)}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ElvaError(f"{where} is {kind_of(value)}; expected text.")
    return value


def _without(mapping: Any, keys: Sequence[str]) -> Any:
    if not isinstance(mapping, Mapping):
        return mapping
    return {key: value for key, value in mapping.items() if key not in keys and value is not None}


def _media(record: Record) -> dict[str, list[dict[str, Any]]]:
    """Videos and images of a record, as blocks hold them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind in ("video", "image"):
        given = [key for key in (kind, f"{kind}s") if _is_given(record.get(key))]
        if len(given) > 1:
            raise ElvaError(f"both {given[0]!r} and {given[1]!r} are given; keep one.")
        value = record[given[0]] if given else []
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        found[kind] = [read_media(item, kind) for item in items]
    return found


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple)) and len(value) == 0)


def _place_media(
    turns: list[dict[str, Any]], record: Record, *, any_kind: bool = False, prepend: bool = False
) -> list[dict[str, Any]]:
    """Put media in the place of their placeholders in user turns.

    Raises:
        ElvaError: There are more or fewer placeholders than media.
    """
    media = _media(record)
    written = [kind for turn in turns if turn["role"] == "user" for kind in _slots(turn["content"])]
    only_videos = any_kind and bool(media["video"]) and not media["image"]
    if only_videos:
        written = ["video"] * len(written)
    first = []
    for kind, sources in media.items():
        if prepend and kind not in written:
            first += [{"type": kind, **source} for source in sources]
        elif written.count(kind) != len(sources):
            raise ElvaError(
                f"{written.count(kind)} <{kind}> in the user turns for {len(sources)} {kind}s"
                f"{_listed(sources)}; write one for each, or correct the list."
            )
    left = {kind: iter(sources) for kind, sources in media.items()}
    placed = []
    for turn in turns:
        if turn["role"] == "user" and any(media.values()):
            turn = {**turn, "content": [*first, *_blocks(turn["content"], left, only_videos)]}
            first = []
        placed.append(turn)
    return placed


def _slots(content: Any) -> list[str]:
    """Kinds of the media that are missing in a content, in order."""
    if isinstance(content, str):
        return [name[1:-1] for name in _PLACEHOLDER.findall(content)]
    return [block["type"] for block in content if _is_slot(block)]


def _is_slot(block: Any) -> bool:
    return isinstance(block, Mapping) and block.get("type") in ("video", "image") and not _without(block, ("type",))


def _blocks(content: Any, left: Mapping[str, Iterator[dict[str, Any]]], only_videos: bool) -> Iterator[Any]:
    """A content as blocks, its missing media taken from those that are left."""
    if not isinstance(content, str):
        for block in content:
            yield {"type": block["type"], **next(left[block["type"]])} if _is_slot(block) else block
        return
    for i, part in enumerate(_PLACEHOLDER.split(content)):
        if i % 2:
            kind = "video" if only_videos else part[1:-1]
            yield {"type": kind, **next(left[kind])}
        elif part:
            yield {"type": "text", "text": part}


def _listed(sources: Sequence[Mapping[str, Any]]) -> str:
    names = [quote(source["path"]) for source in sources if "path" in source]
    return f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else ""


def _has_options(block: Mapping[str, Any]) -> bool:
    return any(key not in ("type", "path", "video") for key in block)
