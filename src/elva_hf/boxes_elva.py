"""The index of an mp4 or mov file: when each sample of a track is shown, from its boxes alone (ISO/IEC 14496-12).

FFmpeg tells when samples are decoded; the offset from there to when they are shown stands in the `ctts` box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

ReadAt = Callable[[int, int], bytes]
"""`(offset, length)` -> bytes of the file; fewer at its end."""

_MOST_BOXES = 10_000
_LARGEST_INDEX = 256 * 2**20  # bytes of a moov box that are read; 100 hours of video stay far below


def find_index(read_at: ReadAt, size: int) -> bytes | None:
    """The content of the `moov` box of a file of `size` bytes; None if it has none, or it is cut."""
    offset = 0
    for _ in range(_MOST_BOXES):
        header = read_at(offset, 16)
        if len(header) < 8:
            return None
        length, start = _box_length(header, size - offset)
        if length < start or offset + length > size:
            return None
        if header[4:8] == b"moov":
            return read_at(offset + start, length - start) if length <= _LARGEST_INDEX else None
        offset += length
    return None


def composition_offsets(moov: bytes, num_samples: int) -> np.ndarray | None:
    """From decoding to showing, for each sample of the video track, in units of the track.

    Args:
        moov: Content of the `moov` box.
        num_samples: Samples of the track, as another reader counted them.

    Returns:
        `(num_samples,)` int64, zeros where the track has no `ctts`; None if there is not exactly one video track of so
        many samples, or its boxes contradict each other.
    """
    tracks = [content for kind, content in _boxes(moov) if kind == b"trak"]
    tables = [table for table in map(_video_table, tracks) if table is not None]
    if len(tables) != 1:
        return None
    table = tables[0]
    sizes = table.get(b"stsz", b"")
    if len(sizes) < 12 or int.from_bytes(sizes[8:12], "big") != num_samples:
        return None
    runs = table.get(b"ctts")
    if runs is None:
        return np.zeros(num_samples, np.int64)
    count = int.from_bytes(runs[4:8], "big")
    if len(runs) < 8 + 8 * count:
        return None
    entries = np.frombuffer(runs, ">u4", 2 * count, 8).reshape(count, 2)
    if int(entries[:, 0].sum(dtype=np.uint64)) != num_samples:
        return None
    return np.repeat(entries[:, 1].astype(np.int32).astype(np.int64), entries[:, 0].astype(np.int64))


def _video_table(track: bytes) -> dict[bytes, bytes] | None:
    media = _child(track, b"mdia")
    handler = _child(media, b"hdlr")
    if handler[8:12] != b"vide":
        return None
    return dict(_boxes(_child(_child(media, b"minf"), b"stbl")))


def _child(content: bytes, kind: bytes) -> bytes:
    return next((inner for name, inner in _boxes(content) if name == kind), b"")


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    offset = 0
    while offset + 8 <= len(content):
        length, start = _box_length(content[offset : offset + 16], len(content) - offset)
        if length < start or offset + length > len(content):
            return
        yield content[offset + 4 : offset + 8], content[offset + start : offset + length]
        offset += length


def _box_length(header: bytes, left: int) -> tuple[int, int]:
    """Length of a box and where its content starts; 0 stands for the rest, 1 for a length of 64 bits."""
    length = int.from_bytes(header[:4], "big")
    if length == 1:
        return (int.from_bytes(header[8:16], "big"), 16) if len(header) == 16 else (0, 16)
    return (length or left), 8
