"""When each frame of a stream is shown, in the order of showing, from the times of its packets."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

_GUESSED_RATE = 25.0  # FFmpeg's own guess for streams without times
_LONG_AGO = -(2**62)  # a decoding time that nothing precedes
_LONGEST_SPAN = 2**52  # units of time that a float of seconds can tell apart


@dataclass(frozen=True)
class Index:
    """Every frame of a stream in the order it is shown.

    Args:
        pts: Presentation times in units of the stream; None where packets carry none.
        times: Seconds from the first frame.
        key_pts: Sorted times of key frames to which a seek may go, in units of the stream.
        duration: Seconds from the first frame to the end of the last.
        in_order: Whether `pts` increases strictly; otherwise frames are told apart by their order as well.
    """

    pts: np.ndarray | None
    times: np.ndarray
    key_pts: np.ndarray
    duration: float
    in_order: bool

    def __len__(self) -> int:
        return len(self.times)

    def keyframe_before(self, pts: int) -> int | None:
        """Time of the last key frame at or before a time."""
        place = int(np.searchsorted(self.key_pts, pts, side="right"))
        return int(self.key_pts[place - 1]) if place else None

    def frames_between(self, start: int, end: int) -> int:
        """Frames after one time and before another."""
        return int(np.searchsorted(self.pts, end, side="left") - np.searchsorted(self.pts, start, side="right"))


def build_index(
    pts: np.ndarray,
    durations: np.ndarray,
    keys: np.ndarray,
    dts: np.ndarray,
    *,
    base: float,
    rate: float,
    seekable: bool,
) -> Index:
    """Sort frames into the order they are shown; where decoding times start again, a new part of the video begins.

    Args:
        pts: `(N,)` int64, when each packet is shown, in the order of the file.
        durations: `(N,)` int64, how long; 0 where the file does not say.
        keys: `(N,)` bool, where decoding can start.
        dts: `(N,)` int64, when each packet is decoded.
        base: Seconds of a unit of time.
        rate: Frames per second as the file says, 0 if it does not; only for the last frame of a part.
        seekable: Whether the file can be entered at a key frame.
    """
    rate = rate or _GUESSED_RATE
    part = np.concatenate(([0], np.cumsum(np.diff(dts) < 0)))
    order = np.lexsort((pts, part))
    pts, part, durations = pts[order], part[order], durations[order]
    seconds = (pts - pts[0]) * base
    gap = (seconds[-1] - seconds[0]) / (len(pts) - 1) if len(pts) > 1 and not part[-1] else 1 / rate
    for start in np.flatnonzero(np.diff(part)) + 1:
        seconds[start:] += seconds[start - 1] + (durations[start - 1] * base or gap) - seconds[start]
    reordered = bool((np.diff(order) < 0).any())  # then packets last as long as the next takes to be decoded
    last = (0 if reordered else float(durations[-1])) * base or gap
    in_order = bool((np.diff(pts) > 0).all())
    key_pts = np.unique(pts[keys[order]]) if seekable and in_order else np.empty(0, np.int64)
    return Index(pts, seconds, key_pts, float(seconds[-1] + last), in_order)


class PacketTimes:
    """The times of the packets of a stream, in the order of the file."""

    def __init__(self):
        self._pts, self._dts, self._durations, self._keys = array("q"), array("q"), array("q"), array("b")
        self.complete = True  # whether every packet has a time at which it is shown

    def __len__(self) -> int:
        return len(self._pts)

    def add(self, packet: Any) -> None:
        """Take note of a packet of PyAV's."""
        self.complete &= packet.pts is not None
        earlier = self._dts[-1] if self._dts else _LONG_AGO
        self._pts.append(packet.pts or 0)
        self._dts.append(earlier if packet.dts is None else packet.dts)
        self._durations.append(packet.duration or 0)
        self._keys.append(bool(packet.is_keyframe))

    def span(self, base: float) -> float:
        """Seconds from the first frame to the last; infinite if seconds could not tell neighbours apart."""
        span = max(self._pts) - min(self._pts)
        return span * base if span < _LONGEST_SPAN else float("inf")

    def before_first_key(self) -> int:
        """Packets that stand before the first key frame; 0 if there is none."""
        return self._keys.index(1) if 1 in self._keys else 0

    def index(self, base: float, rate: float, *, seekable: bool) -> Index:
        """See `build_index`."""
        columns = (np.array(self._pts), np.array(self._durations), np.array(self._keys, bool), np.array(self._dts))
        return build_index(*columns, base=base, rate=rate, seekable=seekable)

    def order(self, start: int, base: float, rate: float, *, made_up: bool) -> Index:
        """An index of frames found by their number, from packet `start`.

        Their times are those of decoding, or, where these are made up as well, evenly spaced.
        """
        gap, count = 1 / (rate or _GUESSED_RATE), len(self) - start
        dts = np.sort(np.array(self._dts)[start:])
        times = np.arange(count) * gap if made_up or dts[0] == _LONG_AGO else (dts - dts[0]) * base
        return Index(None, times, np.empty(0, np.int64), float(times[-1] + gap), True)
