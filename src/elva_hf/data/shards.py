"""WebDataset shards: tar files in which the members of one sample stand together and share a name.

`000.mp4`, `000.json` and `000.txt` are one sample. Members are found by their headers and read from their place, so any
sample can be had without reading what stands before it; archives must not be compressed.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Sequence
from typing import Any

from elva_hf.data.records import parse_json
from elva_hf.data.rows import Origin, RowError, quote
from elva_hf.errors_elva import ElvaError

VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "avi", "mov", "m4v", "gif", "ts")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
TEXT_SUFFIXES = ("json", "txt")
_KINDS = {**dict.fromkeys(VIDEO_SUFFIXES, "video"), **dict.fromkeys(IMAGE_SUFFIXES, "image")}


class TarRecords:
    """Samples of one shard, by index: the fields of its `json`, a `txt` as `caption`, videos and images as `bytes`.

    Args:
        path: An uncompressed tar file.
        ignore: Suffixes of members that are passed over; any other that is unknown is refused.

    Raises:
        ElvaError: It is no such file, or holds members that are not read.
    """

    def __init__(self, path: str | os.PathLike[str], ignore: Sequence[str] = ()):
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        self._keys: list[str] = []
        self._first = array("q")  # per sample, its first member
        self._suffixes: list[str] = []
        self._starts, self._sizes = array("q"), array("q")
        try:
            self._index(frozenset(ignore))
        except ElvaError:
            raise
        except OSError as error:
            raise ElvaError(f"{self.path} cannot be read: {error.strerror}.") from error
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ElvaError(f"{self.path} is no plain tar file: {error}; unpack it if it is compressed.") from error
        self._first.append(len(self._starts))

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        record: dict[str, Any] = {}
        media: dict[str, list[bytes]] = {"video": [], "image": []}
        try:
            with open(self.path, "rb") as file:
                for member in range(self._first[index], self._first[index + 1]):
                    file.seek(self._starts[member])
                    data = file.read(self._sizes[member])
                    _add(record, media, self._suffixes[member], data)
            return _join(record, media, self._keys[index])
        except ElvaError as error:
            raise RowError(str(error), self.origin(index), self._keys[index]) from error

    def origin(self, index: int) -> Origin:
        """Where a sample stands."""
        return Origin(self.name, index=index)

    def _index(self, ignored: frozenset[str]) -> None:
        with tarfile.open(self.path, "r:") as archive:
            seen: set[str] = set()
            for member in archive:
                archive.members = []  # tarfile would keep them all
                if member.isdir():
                    continue
                if not member.isfile() or member.issparse():
                    raise ElvaError(f"{self.path}: {quote(member.name)} is a link or device; a shard holds files.")
                key, suffix = _split_name(member.name)
                if not suffix or suffix in ignored:
                    continue
                self._check_suffix(suffix, member.name)
                if not self._keys or key != self._keys[-1]:
                    if key in seen:
                        raise ElvaError(
                            f"{self.path}: the members of {quote(key)} do not stand together; sort the names."
                        )
                    seen.add(key)
                    self._keys.append(key)
                    self._first.append(len(self._starts))
                self._suffixes.append(_KNOWN[suffix.rsplit(".", 1)[-1]])
                self._starts.append(member.offset_data)
                self._sizes.append(member.size)

    def _check_suffix(self, suffix: str, name: str) -> None:
        if suffix.rsplit(".", 1)[-1] not in _KNOWN:
            raise ElvaError(
                f"{self.path}: the member {quote(name)} is not read (pickles never are); known are "
                f"{', '.join(_KNOWN)}; add {suffix!r} to ignore_keys to pass over such."
            )


_KNOWN = {suffix: suffix for suffix in (*TEXT_SUFFIXES, *VIDEO_SUFFIXES, *IMAGE_SUFFIXES)}


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member: the name is cut at the first dot after the last slash."""
    folder, _, base = name.rpartition("/")
    if base.startswith("."):
        return name, ""
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _add(record: dict[str, Any], media: dict[str, list[bytes]], suffix: str, data: bytes) -> None:
    if suffix == "json":
        fields = parse_json(data)
        if not isinstance(fields, dict):
            raise ElvaError("the json of the sample is no mapping; write the fields of a record.")
        record.update(fields)
    elif suffix == "txt":
        try:
            record["caption"] = data.decode()
        except UnicodeDecodeError as error:
            raise ElvaError(f"the txt of the sample is no UTF-8 at byte {error.start}.") from error
    else:
        media[_KINDS[suffix]].append(data)


def _join(record: dict[str, Any], media: dict[str, list[bytes]], key: str) -> dict[str, Any]:
    """A record whose media are the members; what its json calls them is only checked to be as many."""
    record.setdefault("__key__", key)
    for kind, members in media.items():
        for name in (kind, f"{kind}s"):
            named = record.pop(name, None)
            count = len(named) if isinstance(named, list) else int(named is not None and named != "")
            if count and count != len(members):
                raise ElvaError(f"its json names {count} {kind}s, and {len(members)} stand beside it in the shard.")
        if members:
            record[f"{kind}s"] = members
    return record
