"""Records of JSON and JSON lines by index, read when they are asked for: no more than offsets stay in memory."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from elva_hf.data.rows import Origin, RowError, kind_of
from elva_hf.errors_elva import ElvaError

_CHUNK_BYTES = 1 << 24
_BLANK = b" \t\r\n"


class Records(Protocol):
    """What a file holds, by index; an origin tells people where to find it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def origin(self, index: int) -> Origin:
        """Where a record stands."""
        ...


class RecordList:
    """Records that are in memory already.

    Args:
        items: Anything with `__len__` and `__getitem__`.
        name: What errors call it.
    """

    def __init__(self, items: Sequence[Any], name: str):
        self.items, self.name = items, name

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def origin(self, index: int) -> Origin:
        """Where a record stands."""
        return Origin(self.name, index=index)


class JsonRecords:
    """Records of a JSON array or of JSON lines; 16 bytes of each stay in memory, and no open file.

    Lines are found by reading the file once; an array is parsed once, whole, which takes some times its size in memory
    for that moment. A file that is larger than that should be lines.

    Args:
        path: A file in UTF-8.
        lines: Whether it holds lines.

    Raises:
        ElvaError: It cannot be read, or is no JSON array.
    """

    def __init__(self, path: str | os.PathLike[str], *, lines: bool):
        self.path, self.lines = os.fspath(path), lines
        self.name = os.path.basename(self.path)
        try:
            self._starts, self._ends, self._is_dense = _find_lines(self.path) if lines else _find_items(self.path)
        except OSError as error:
            raise ElvaError(f"{self.path} cannot be read: {error.strerror}.") from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        try:
            with open(self.path, "rb") as file:
                file.seek(self._starts[index])
                data = file.read(self._ends[index] - self._starts[index])
            return parse_json(data)
        except ElvaError as error:
            raise RowError(str(error), self.origin(index)) from error

    def origin(self, index: int) -> Origin:
        """Where a record stands; where lines are blank, the file is read to count them, so only errors should ask."""
        if not self.lines:
            return Origin(self.name, index=index)
        if self._is_dense:
            return Origin(self.name, line=index + 1)
        before, left = 0, self._starts[index]
        with open(self.path, "rb") as file:
            while left:
                data = file.read(min(left, _CHUNK_BYTES))
                before, left = before + data.count(b"\n"), (left - len(data)) if data else 0
        return Origin(self.name, line=before + 1)


class JoinedRecords:
    """Records of several files, one after another."""

    def __init__(self, parts: Sequence[Records]):
        self.parts = list(parts)
        self._ends = []
        for part in self.parts:
            self._ends.append(len(part) + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        part, index = self._find(index)
        return part[index]

    def origin(self, index: int) -> Origin:
        """Where a record stands."""
        part, index = self._find(index)
        return part.origin(index)

    def _find(self, index: int) -> tuple[Records, int]:
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def parse_json(data: bytes) -> Any:
    """Parse JSON.

    Raises:
        ElvaError: It is none, or not in UTF-8.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ElvaError(f"no UTF-8 at byte {error.start}; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ElvaError(
            f"no JSON: {error.msg.removesuffix(' at')} at character {error.pos}; one record must be whole and valid."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ElvaError(f"no JSON that can be read: {error}.") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a small JSON file.

    Raises:
        ElvaError: It cannot be read.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as error:
        raise ElvaError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error
    except ElvaError as error:
        raise ElvaError(f"{os.fspath(path)}: {error}") from error


def starts_as(path: str | os.PathLike[str]) -> str:
    """The first character of a file that is not blank; empty if there is none."""
    with open(path, "rb") as file:
        head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip(_BLANK)
    return head[:1].decode("latin-1")


def _find_lines(path: str) -> tuple[array, array, bool]:
    """Where each line that is not blank starts and ends, in bytes, and whether none is blank."""
    starts, ends, count = array("q"), array("q"), 0
    with open(path, "rb") as file:
        at = 0
        for line in file:
            if line.strip(_BLANK):
                starts.append(at)
                ends.append(at + len(line))
            at, count = at + len(line), count + 1
    return starts, ends, count == len(starts)


def _find_items(path: str) -> tuple[array, array, bool]:
    """Where each item of a JSON array starts and ends, in bytes, and that none is missing."""
    with open(path, "rb") as file:
        data = file.read()
    offset = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        text = data[offset:].decode()
    except UnicodeDecodeError as error:
        raise ElvaError(f"{path}: no UTF-8 at byte {error.start}; save the file as UTF-8.") from error
    del data
    starts, ends = array("q"), array("q")
    at = 0
    for start, end in _spans(text, path):
        offset += _num_bytes(text, at, start)
        starts.append(offset)
        offset += _num_bytes(text, start, end)
        ends.append(offset)
        at = end
    return starts, ends, True


def _num_bytes(text: str, start: int, end: int) -> int:
    return end - start if text.isascii() else len(text[start:end].encode())


def _spans(text: str, path: str) -> Iterator[tuple[int, int]]:
    """Where the items of a JSON array stand in its text."""
    decoder = json.JSONDecoder()
    at = _after_blank(text, 0)
    if text[at : at + 1] != "[":
        raise ElvaError(
            f"{path} is no JSON array: it starts with {kind_of(text[at : at + 20])}; give a list of records."
        )
    at = _after_blank(text, at + 1)
    first = True
    while text[at : at + 1] != "]":
        if not first:
            if text[at : at + 1] != ",":
                raise ElvaError(f"{path}: no JSON: expected ',' or ']' at character {at}; is the file cut?")
            at = _after_blank(text, at + 1)
        first = False
        try:
            _, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ElvaError(
                f"{path}: no JSON: {error.msg.removesuffix(' at')} at character {error.pos}; is the file cut?"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ElvaError(f"{path}: no JSON that can be read at character {at}: {error}.") from error
        yield at, end
        at = _after_blank(text, end)
    if text[at + 1 :].strip():
        raise ElvaError(f"{path}: no JSON: more text after the array, at character {at + 1}.")


def _after_blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        ElvaError: It is none.
    """
    if not isinstance(value, Mapping):
        raise ElvaError(f"{where} is {kind_of(value)}; expected a mapping.")
    return value
