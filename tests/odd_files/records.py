"""One odd input: how it is made, and what must come out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COUNT, RATE = 32, 25


def every(seconds, count=COUNT):
    """Times of `count` frames, one each `seconds`."""
    return tuple(i * seconds for i in range(count))


@dataclass(frozen=True)
class Place:
    """Where an input is made: an empty folder of its own, and a loopback port that is listened on (TCP and UDP)."""

    folder: Path
    port: int

    def __truediv__(self, name):
        return self.folder / name


@dataclass(frozen=True)
class Shows:
    """The frames that must come out.

    `frames` are the numbers painted into the pixels, in the order of showing, `times` their seconds from the first.
    Positions in `gone` cannot be decoded: they must be left out, and said to be. Those in `hit` are damaged: they may
    be left out or shown in any state, in a wrong one only if the reader says so, unless the damage is `silent`: there
    is no checksum that would tell. `facts` are fields of `VideoInfo`. Each of `notes` is a pattern that a note of the
    reader must match, `remarks` one for notes that it may make; a clip of which nothing is expected must be called
    sound. `colours` is how many levels a colour may be off, None where there are none.
    """

    frames: tuple[int, ...] = tuple(range(COUNT))
    times: tuple[float, ...] | None = every(1 / RATE)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    remarks: str | None = None
    gone: frozenset[int] = frozenset()
    hit: frozenset[int] = frozenset()
    silent: bool = False
    colours: float | None = 16


@dataclass(frozen=True)
class Fails:
    """The one error that must come out: its `reason`, a pattern its message matches."""

    reason: str
    says: str = ""


@dataclass(frozen=True)
class Case:
    """An odd input: its name, what it is, how it is made, what must come out, under which `DecodingLimits`."""

    name: str
    what: str
    build: Callable[[Place], Any]
    expect: Shows | Fails
    limits: Mapping[str, Any] = field(default_factory=dict)


def shows(numbers=range(COUNT), times=None, step=1 / RATE, **rest):
    """`Shows`, with one frame each `step` seconds unless `times` are given."""
    frames = tuple(numbers)
    return Shows(frames=frames, times=tuple(times) if times is not None else every(step, len(frames)), **rest)
