"""What is in a data set, found out before a GPU is rented: every row checked, every medium opened, tokens counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from elva_hf.data.encoding import encode_row
from elva_hf.data.packing import IGNORED
from elva_hf.data.readers import Rows
from elva_hf.data.rows import Row, RowError, content_blocks, media_blocks
from elva_hf.data.shuffling import pick_spread
from elva_hf.errors_elva import ElvaError
from elva_hf.frames_elva import count_video_tokens
from elva_hf.options_elva import CLIP_FIELDS, VideoClip
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.prompts_elva import count_mark_tokens
from elva_hf.sampled_elva import SampledVideo
from elva_hf.video_processing_elva import ElvaVideoProcessor

_MOST_REMEMBERED = 100_000
COUNTS = ("visual", "text", "answer", "total")


@dataclass(frozen=True)
class CheckOptions:
    """How a data set is checked.

    Args:
        video_processor: Says which frames are taken and how large.
        processor: Counts text; None if no tokenizer is known.
        video: Options of a call of the video processor.
        context_length: Tokens that a row may have; None for no limit.
        num_decoded: Rows whose media are decoded, drawn at random.
        num_rows: Rows that are checked, drawn at random; None for all.
        num_workers: Processes; 0 for none but this.
        seed: Of what is drawn.
    """

    video_processor: ElvaVideoProcessor
    processor: ElvaProcessor | None = None
    video: Mapping[str, Any] = field(default_factory=dict)
    context_length: int | None = None
    num_decoded: int = 0
    num_rows: int | None = None
    num_workers: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Medium:
    """What is known of a video or image.

    Args:
        kind: `"video"` or `"image"`.
        codec: Of its frames; None for arrays.
        size: `(height, width)` in pixels.
        num_frames: Frames that are taken.
        duration: Seconds, if known.
        num_bytes: Of its file, if it is one.
        num_visual_tokens: Of its frames.
        num_tokens: With its borders.
        num_mark_tokens: Of the times written before its frames.
    """

    kind: str
    codec: str | None
    size: tuple[int, int]
    num_frames: int
    duration: float | None
    num_bytes: int | None
    num_visual_tokens: int
    num_tokens: int
    num_mark_tokens: int = 0


@dataclass
class RowFacts:
    """What was found out about a row.

    Args:
        index: Of the row.
        problem: What is wrong with it; None if nothing.
        kind: Of the problem: a `VideoError.reason`, or `"row"`, `"tokens"`, `"context"`.
        row_id: Its id.
        digest: Of its messages.
        media: Of its videos and images.
        tokens: Of the kinds of `COUNTS` that could be counted.
        is_beyond: Whether it has more tokens than a row may have.
        is_decoded: Whether its media were decoded.
    """

    index: int
    problem: str | None = None
    kind: str | None = None
    row_id: str | None = None
    digest: bytes | None = None
    media: list[Medium] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    is_beyond: bool = False
    is_decoded: bool = False


@dataclass
class CheckReport:
    """What is in a data set.

    Args:
        num_rows: Rows in it.
        num_checked: Rows that were looked at.
        num_decoded: Rows whose media were decoded.
        num_beyond: Rows with more tokens than a row may have; no problem with `overflow="fit"`, which takes less of it.
        problems: How many rows have a problem, by kind.
        errors: The first of them, each in one line.
        tokens: By kind the numbers of all rows that are good, or only too long.
        media: Kind and codec -> how many.
        sizes: Height and width -> how many.
        durations: Seconds of the videos.
        num_bytes: Of the media files.
        num_without_media: Rows of text alone.
        num_double_ids: Rows whose id another row had before.
        num_double_rows: Rows whose messages another row had before.
    """

    num_rows: int = 0
    num_checked: int = 0
    num_decoded: int = 0
    num_beyond: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    media: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    durations: list[float] = field(default_factory=list)
    num_bytes: int = 0
    num_without_media: int = 0
    num_double_ids: int = 0
    num_double_rows: int = 0

    @property
    def num_bad(self) -> int:
        """Rows with a problem."""
        return sum(self.problems.values())

    def distribution(self, kind: str) -> dict[str, float] | None:
        """Mean, median, 95th percentile and maximum of a kind of tokens; None if none were counted."""
        values = self.tokens.get(kind)
        if not values:
            return None
        p50, p95 = np.percentile(values, (50, 95), method="higher")
        return {"mean": float(np.mean(values)), "p50": int(p50), "p95": int(p95), "max": max(values)}

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {
            "num_rows": self.num_rows,
            "num_checked": self.num_checked,
            "num_decoded": self.num_decoded,
            "num_bad": self.num_bad,
            "num_beyond": self.num_beyond,
            "problems": dict(self.problems),
            "errors": self.errors,
            "tokens": {kind: self.distribution(kind) for kind in COUNTS},
            "media": dict(self.media),
            "sizes": dict(self.sizes.most_common()),
            "seconds": {"total": sum(self.durations), "max": max(self.durations, default=0.0)},
            "num_bytes": self.num_bytes,
            "num_without_media": self.num_without_media,
            "num_double_ids": self.num_double_ids,
            "num_double_rows": self.num_double_rows,
        }


def check_rows(rows: Rows, options: CheckOptions, *, num_errors: int = 10) -> CheckReport:
    """Check the rows of a data set.

    Args:
        rows: From `read_rows`.
        options: How.
        num_errors: Errors that are kept in words; all are counted.
    """
    report = CheckReport(num_rows=len(rows))
    ids: set[int] = set()
    contents: set[int] = set()
    for facts in _look(rows, options):
        report.num_checked += 1
        _add(report, facts, ids, contents)
        if facts.problem is not None and len(report.errors) < num_errors:
            report.errors.append(_in_words(facts, rows))
    return report


def chosen_rows(num_rows: int, count: int | None, seed: int) -> list[int] | range:
    """The rows that are looked at: all, or `count` of them, spread over the file."""
    if count is None or count >= num_rows:
        return range(num_rows)
    return [pick_spread(i, count, num_rows, "check", seed) for i in range(count)]


class RowInspector(Dataset):
    """Facts about rows, by index: what a worker finds out.

    Args:
        rows: Of a data set.
        options: How they are checked.
    """

    def __init__(self, rows: Rows, options: CheckOptions):
        self.rows, self.options = rows, options
        self.indices = chosen_rows(len(rows), options.num_rows, options.seed)
        number = min(options.num_decoded, len(self.indices))
        self.decoded = set(chosen_rows(len(self.indices), number, options.seed + 1)) if number else set()
        self._budgets = options.video_processor.resolve_budgets(**options.video)
        self._known: dict[Any, Medium] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> RowFacts:
        facts = RowFacts(self.indices[place])
        try:
            row = self.rows[facts.index]
            facts.row_id = row["id"]
            facts.digest = digest_messages(row)
            self._inspect(row, facts, decode=place in self.decoded)
        except (ElvaError, OSError) as error:
            facts.problem = error.message if isinstance(error, RowError) else str(error)
            facts.row_id = error.row_id if isinstance(error, RowError) else facts.row_id
            facts.kind = facts.kind or getattr(error, "reason", "row")
        return facts

    def _inspect(self, row: Row, facts: RowFacts, *, decode: bool) -> None:
        facts.media = [self._medium(block) for block in media_blocks(row)]
        visual = sum(medium.num_visual_tokens for medium in facts.media)
        tokens = {"visual": visual}
        longest = sum(medium.num_tokens for medium in facts.media)
        if self.options.processor is not None:
            facts.kind = "tokens"
            text = count_text(row, self.options.processor)
            marks = sum(medium.num_mark_tokens for medium in facts.media)
            tokens.update(text=text.total + marks, answer=text.answer, total=text.total + marks + visual)
            longest = text.longest + marks + visual
        facts.tokens = tokens
        limit = self.options.context_length
        facts.is_beyond = limit is not None and longest > limit
        if facts.is_beyond and self._budgets.overflow == "error":
            facts.kind = "context"
            raise ElvaError(f"{longest} tokens, and the context has {limit}; take fewer or smaller frames.")
        facts.kind = None
        if decode and facts.media:
            blocks = media_blocks(row)
            images = [block["type"] == "image" for block in blocks]
            self.options.video_processor.encode(list(map(_source, blocks)), images=images, **self.options.video)
            facts.is_decoded = True

    def _medium(self, block: Mapping[str, Any]) -> Medium:
        key = tuple((name, str(value)) for name, value in sorted(block.items())) if "path" in block else None
        if key is not None and key in self._known:
            return self._known[key]
        is_image = block["type"] == "image"
        sampled = self.options.video_processor.sample(_source(block), image=is_image, **self.options.video)
        info = sampled.info
        medium = Medium(
            kind=block["type"],
            codec=info.codec,
            size=(info.height, info.width),
            num_frames=sampled.num_frames,
            duration=info.duration,
            num_bytes=_num_bytes(block),
            num_visual_tokens=sampled.num_visual_tokens,
            num_tokens=sampled.num_tokens,
            num_mark_tokens=self._count_marks(sampled),
        )
        if key is not None and len(self._known) < _MOST_REMEMBERED:
            self._known[key] = medium
        return medium

    def _count_marks(self, sampled: SampledVideo) -> int:
        processor, options = self.options.processor, self.options
        if processor is None or not options.video_processor.resolve_options(**options.video).timestamps:
            return 0
        return count_mark_tokens(processor.tokenizer, [sampled])


@dataclass(frozen=True)
class TextCount:
    """Tokens of a row without its frames, borders of videos included.

    Args:
        total: Of the row as it is written.
        answer: Of what the assistant says.
        longest: Of its longest conversation: of the row, or with independent turns of one of its questions.
    """

    total: int
    answer: int
    longest: int


def count_text(row: Row, processor: ElvaProcessor) -> TextCount:
    """Count the text of a row as training writes it; its media are not opened, a single patch stands for each.

    Raises:
        ElvaError: The row cannot be encoded.
    """
    side = processor.video_processor.patch_size
    stubs = {"video": np.zeros((1, side, side, 3), np.uint8), "image": np.zeros((side, side, 3), np.uint8)}
    messages = [
        {"role": message["role"], "content": [_stub(block, stubs) for block in content_blocks(message)]}
        for message in row["messages"]
    ]
    sample = encode_row({**row, "messages": messages}, processor, num_frames=1, timestamps=False)
    frames = count_video_tokens([(1, 1)], borders=False) * len(media_blocks(row))
    return TextCount(
        total=len(sample) - frames,
        answer=int((sample.labels != IGNORED).sum()),
        longest=max(map(len, sample.unpack())) - frames,
    )


def _stub(block: dict[str, Any], stubs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    kind = block["type"]
    return {"type": kind, kind: stubs[kind]} if kind in stubs else block


def digest_messages(row: Row) -> bytes:
    """The same for rows that say the same of the same media."""
    digest = blake2b(digest_size=8)
    for message in row["messages"]:
        digest.update(message["role"].encode())
        for block in content_blocks(message):
            for name, value in sorted(block.items()):
                held = value if isinstance(value, (bytes, bytearray)) else _array_bytes(value)
                digest.update(f"\0{name}\0".encode() + (held if held is not None else str(value).encode()))
    return digest.digest()


def _look(rows: Rows, options: CheckOptions) -> Iterator[RowFacts]:
    inspector = RowInspector(rows, options)
    if not options.num_workers:
        yield from (inspector[place] for place in range(len(inspector)))
        return
    yield from DataLoader(inspector, batch_size=None, num_workers=options.num_workers)  # in order


def _add(report: CheckReport, facts: RowFacts, ids: set[int], contents: set[int]) -> None:
    for value, seen, name in ((facts.row_id, ids, "num_double_ids"), (facts.digest, contents, "num_double_rows")):
        if value is not None:
            data = value.encode() if isinstance(value, str) else value
            number = int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
            setattr(report, name, getattr(report, name) + (number in seen))
            seen.add(number)
    if facts.problem is not None:
        report.problems[facts.kind or "row"] += 1
        if facts.kind != "context":
            return
    report.num_without_media += not facts.media
    report.num_decoded += facts.is_decoded
    report.num_beyond += facts.is_beyond
    for kind, number in facts.tokens.items():
        report.tokens.setdefault(kind, []).append(number)
    for medium in facts.media:
        report.media[f"{medium.kind} {medium.codec or 'array'}"] += 1
        report.sizes[f"{medium.size[1]}x{medium.size[0]}"] += 1
        report.num_bytes += medium.num_bytes or 0
        if medium.duration is not None:
            report.durations.append(medium.duration)


def _in_words(facts: RowFacts, rows: Rows) -> str:
    return str(RowError(facts.problem or "", rows.records.origin(facts.index), facts.row_id))


def _source(block: Mapping[str, Any]) -> VideoClip:
    held = block["path"] if "path" in block else block[block["type"]]
    return VideoClip(held, **{name: block[name] for name in CLIP_FIELDS if name in block})


def _num_bytes(block: Mapping[str, Any]) -> int | None:
    if "path" in block:
        return os.path.getsize(block["path"]) if os.path.exists(block["path"]) else None
    held = block[block["type"]]
    return len(held) if isinstance(held, (bytes, bytearray, memoryview)) else None


def _array_bytes(value: Any) -> bytes | None:
    return np.ascontiguousarray(value).tobytes() if hasattr(value, "__array__") else None
