"""Is a source small, short and quick enough? Each ceiling of `DecodingLimits` with its one message."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .errors_elva import VideoError
from .limits_elva import SHORTEST_SIDE, DecodingLimits


class Admission:
    """The checks of one source.

    Args:
        name: The source as people may see it.
        limits: Its ceilings.
    """

    def __init__(self, name: str, limits: DecodingLimits):
        self.name = name
        self.limits = limits
        self.start_clock()

    def error(self, message: str, reason: str, hint: str | None = None) -> VideoError:
        """An error that begins with the name of the source."""
        return VideoError(f"{self.name} {message}", reason=reason, source=self.name, hint=hint)

    def check_bytes(self, count: int) -> None:
        """Refuse a source of no bytes or too many."""
        if not count:
            raise self.error("is empty: 0 bytes;", "empty", "was it read or downloaded to its end?")
        if count > self.limits.max_bytes:
            raise self._too_much(f"has {count} bytes, more than", "max_bytes", "too_many_bytes", "cut it")

    def check_pixels(self, width: int, height: int) -> None:
        """Refuse frames that are too large or too small; 0 stands for a side that is not known yet."""
        if width * height > self.limits.max_pixels:
            raise self._too_much(
                f"has frames of {width}x{height} pixels, more than", "max_pixels", "too_many_pixels", "scale it down"
            )
        if 0 < width < SHORTEST_SIDE or 0 < height < SHORTEST_SIDE:
            raise self.error(
                f"has frames of {width}x{height} pixels; a side needs at least {SHORTEST_SIDE}.", "too_small"
            )

    def check_count(self, count: int, things: str = "frames") -> None:
        """Refuse too many frames, or packets."""
        if count > self.limits.max_frames:
            raise self._too_much(f"has {count} {things}, more than", "max_frames", "too_many_frames", "cut it")

    def check_duration(self, seconds: float) -> None:
        """Refuse a video that is too long."""
        if seconds > self.limits.max_duration:
            raise self._too_much(f"lasts {seconds:.4g} s, longer than", "max_duration", "too_long", "cut it")

    @contextmanager
    def memory(self) -> Iterator[None]:
        """Name the source where memory runs out."""
        try:
            yield
        except MemoryError as error:
            raise self.error(
                "needs more memory to be decoded than there is;",
                "out_of_memory",
                "it is damaged, or to be scaled down (isolate=True: or raise DecodingLimits.max_process_memory).",
            ) from error

    def start_clock(self) -> None:
        """Begin to count the seconds that reading may take."""
        self._deadline = time.monotonic() + self.limits.max_seconds

    def check_clock(self) -> None:
        """Raise when reading has taken too long."""
        if time.monotonic() > self._deadline:
            raise self._too_much("took longer to read than", "max_seconds", "timeout", "take a shorter part of it")

    def _too_much(self, message: str, limit: str, reason: str, remedy: str) -> VideoError:
        value = getattr(self.limits, limit)
        shown = f"{value:g}" if isinstance(value, float) else value
        return self.error(f"{message} {limit}={shown};", reason, f"{remedy}, or raise DecodingLimits.{limit}.")
