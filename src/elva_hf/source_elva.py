"""What a video source is, what is known of it before decoding, and what comes out of it.

Plain Python and numpy, no torch: the process that decodes files nobody trusts imports this. Letters: `H`, `W` pixels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

VideoSource = Any
"""A path (`str`, `pathlib.Path`), an https URL (`str`), `bytes`, PIL image(s), or numpy / torch array(s)."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a source before its frames are decoded.

    Args:
        source: The source as shown to people: no bytes, no credentials.
        height: Pixels, as shown (after rotation).
        width: Pixels, as shown.
        num_frames: Frames that can be had.
        duration: Seconds; None for arrays of unknown rate and for images.
        fps: Average frames per second; None where `duration` is.
        codec: Name of the codec; None for arrays.
        container: Name of the container format; None for arrays.
        rotation: Degrees counterclockwise that the stored frames are turned by to be shown: 0, 90, 180 or 270.
        is_image: True for a still image.
        times: Start of each frame in seconds from the first, never decreasing; frame numbers where `duration` is None.
    """

    source: str
    height: int
    width: int
    num_frames: int
    duration: float | None = None
    fps: float | None = None
    codec: str | None = None
    container: str | None = None
    rotation: int = 0
    is_image: bool = False
    times: tuple[float, ...] = field(default=(), repr=False)


class Frame(NamedTuple):
    """One decoded frame.

    Args:
        index: Frame number in the source.
        time: Seconds from the first frame, the frame's own presentation time; None where the source has none.
        pixels: `(H, W, 3)` uint8 RGB, upright.
    """

    index: int
    time: float | None
    pixels: np.ndarray


@dataclass(frozen=True)
class Damage:
    """What was wrong with a source where it was read, though not so wrong that reading failed.

    Args:
        num_bad_packets: Packets that the decoder refused.
        num_corrupt_frames: Frames returned in which the decoder concealed errors.
        notes: One line each on what a careful reader wants to know: a size that changes, interlacing, HDR.
    """

    num_bad_packets: int = 0
    num_corrupt_frames: int = 0
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.num_bad_packets or self.num_corrupt_frames or self.notes)


class Reader(Protocol):
    """A source that has been looked at and can be read; close it, or use it in a `with` statement."""

    info: VideoInfo

    @property
    def damage(self) -> Damage:
        """What was found wrong so far."""
        ...

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield the frames at strictly increasing `indices`, each decoded once; damaged ones are left out."""
        ...

    def close(self) -> None:
        """Release files and processes; reading is over."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def shown(path: str) -> str:
    """A path or URL as people may see it: quoted, at most 200 characters, no user name, password, query or data."""
    is_url = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path) or re.search("(?i)https?:|://", path)
    clean = _without_secrets(path) if is_url else path
    return repr(clean if len(clean) <= 200 else clean[:197] + "...")


def _without_secrets(url: str) -> str:
    """A URL, or what was meant as one, without what may be a user name, password, query, fragment or data."""
    if url[:5].lower() == "data:":
        return "data:..."
    found = re.fullmatch(r"(?s)([^:/?#]+://)(?:[^/?#]*@)?([^/?#@]*)([^?#]*)(?:[?#].*)?", url)
    if found is None:
        return "..." if "@" in url else re.sub(r"(?s)[?#].*", "", url)
    scheme, host, path = found.groups()
    return scheme + ("..." if "@" in path else host + path)  # "@": what looks like a path may end a password
