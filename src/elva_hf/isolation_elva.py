"""A video file decoded in a process of its own that can do little else, for files that nobody vouches for.

The parent opens the file and passes on its descriptor; `isolated_worker` gives up its rights before it reads it. What
comes back may come from code that took the decoder over: every number is checked before it is used.
"""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from .errors_elva import REASONS, ConfigurationError, VideoError
from .files_elva import open_path
from .limits_elva import DecodingLimits
from .source_elva import Damage, Frame, VideoInfo

try:
    import fcntl
    import resource
except ImportError:
    resource = None

WORKER = Path(__file__).with_name("isolated_worker.py")
_LONGEST_LINE = 2**19  # bytes
_LONGEST_TEXT = 500  # characters
_MOST_NOTES = 64
_MOST_COUNT = 2**53
_PIPE_BYTES = 2**20
_SECONDS_TO_START = 60.0
_SECONDS_TO_END = 5.0
_GRACE = 0.5  # seconds: the decoder's own clock strikes first
_KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class IsolatedReader:
    """A video file that another process, with few rights and limited memory, holds open and decodes.

    One thread reads at a time, in the process that made the reader; a new `read` ends the one before.

    Args:
        file: Path of a local file, its bytes, or a seekable binary file, which stays open until `close`.
        shown: The source as people may see it.
        limits: What it may cost.

    Raises:
        VideoError: It is no video, holds no frame that can be decoded, is beyond a limit, or the decoder died.
        ConfigurationError: The platform cannot limit a process.
    """

    info: VideoInfo

    def __init__(self, file: str | bytes | BinaryIO, shown: str, limits: DecodingLimits | None = None):
        if resource is None:
            raise ConfigurationError(
                f"isolate=True needs a system that can limit a process (Linux, macOS), not {sys.platform}; decode "
                "without it, or in a container of its own."
            )
        self._shown, self._limits = shown, limits or DecodingLimits()
        self._damage = Damage()
        self._wanted: Iterator[int] = iter(())  # frames that may still come
        self._turn: object | None = None  # the `read` that may go on
        self._owed = False  # whether a frame was asked for that has not been fetched yet
        self._lock, self._owner = threading.RLock(), os.getpid()
        self._stop: weakref.finalize | None = None
        if isinstance(file, str):
            file = open_path(file)
        self._file = io.BytesIO(file) if isinstance(file, bytes) else file
        try:
            self._start_process()
            self._look()
        except BaseException:
            self.close()
            raise

    @property
    def damage(self) -> Damage:
        """What was found wrong so far."""
        return self._damage

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield the frames at strictly increasing `indices`; those that cannot be decoded are left out."""
        if not len(indices):
            return
        turn = self._begin([int(index) for index in indices])
        while (frame := self._next(turn)) is not None:
            yield frame

    def close(self) -> None:
        """End the process and close the file; reading is over."""
        self._file.close()
        if self._stop is None:
            return
        if os.getpid() != self._owner:  # a fork, whose locks may never open
            self._stop()
            return
        self._process.kill()  # whoever waits for an answer gets to know, and gives the lock back
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start_process(self) -> None:
        self._descriptor = _take_descriptor(self._file, self._limits)
        try:
            self._process = _start_worker(self._descriptor)
        except OSError as error:
            raise self._error(f"was not decoded: no process could be started ({error.strerror}).") from error
        finally:
            os.close(self._descriptor)
        self._stop = weakref.finalize(self, _stop, self._process)
        self._pipes = _Pipes(self._process.stdin.fileno(), self._process.stdout.fileno())

    def _look(self) -> None:
        """Wait until the process has given up its rights, then for what it finds in the file."""
        limits = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in vars(self._limits).items()}
        start = {
            "path": [os.path.abspath(place) for place in sys.path],
            "file": self._descriptor,
            "shown": self._shown,
            "limits": limits,
            # the kernel tells of the death of the thread that started the process
            "parent": self._owner if threading.current_thread() is threading.main_thread() else None,
        }
        self._left, self._ready = _SECONDS_TO_START, False
        with self._distrust():
            self._pipes.send(start)
            answer = self._pipes.receive()
            if "refused" in answer:
                raise ConfigurationError(f"isolate=True does not work here: {_text(answer['refused'])}.")
            _check(answer == {"ready": True}, "no sign of being ready")
        self._left, self._ready = self._limits.max_seconds + _GRACE, True
        with self._distrust():
            self.info = self._receive_info()

    def _begin(self, indices: Sequence[int]) -> object:
        with self._alone():
            if self._owed:  # to a `read` that was abandoned
                with suppress(VideoError):
                    self._receive()
                self._check_usable()
            self._wanted, self._turn = iter(indices), object()
            self._left = self._limits.max_seconds + _GRACE
            self._ask({"read": indices})
            return self._turn

    def _next(self, turn: object) -> Frame | None:
        """The next frame; the one after it is asked for already, to be decoded while this one is used."""
        with self._alone():
            if turn is not self._turn:
                raise self._error("is read a second time; the first read cannot go on.", "Open it twice.")
            frame = self._receive()
            if frame is not None:
                self._ask({"next": True})
            return frame

    def _ask(self, request: dict[str, Any]) -> None:
        with self._distrust():
            self._owed = True
            self._pipes.send(request)

    def _receive(self) -> Frame | None:
        with self._distrust():
            self._owed = False
            answer = self._answer()
            if "frame" not in answer:
                _check(answer.get("end") is True, "neither a frame nor an end")
                return None
            index, seconds, height, width = _list(answer["frame"], 4)
            _check(type(index) is int and index in self._wanted, "a frame that was not asked for")
            seconds = _real(seconds, -_MOST_COUNT)
            pixels = np.empty((*self._size(height, width), 3), np.uint8)
            self._pipes.fill(pixels)
            return Frame(index, seconds, pixels)

    def _receive_info(self) -> VideoInfo:
        facts = self._answer().get("info")
        _check(isinstance(facts, dict), "no facts")
        height, width = self._size(facts.get("height"), facts.get("width"))
        times = np.empty(_whole(facts.get("num_frames"), 1, self._limits.max_frames), np.float64)
        self._pipes.fill(times)
        _check(bool(np.isfinite(times).all() and (np.diff(times) >= 0).all()), "times that do not increase")
        _check(facts.get("rotation") in (0, 90, 180, 270), "a rotation that is none")
        return VideoInfo(
            source=self._shown,
            height=height,
            width=width,
            num_frames=len(times),
            duration=_real(facts.get("duration"), 0, self._limits.max_duration),
            fps=_real(facts.get("fps"), 0),
            codec=_text(facts.get("codec")),
            container=_text(facts.get("container")),
            rotation=int(facts["rotation"]),
            is_image=facts.get("is_image") is True,
            times=tuple(times.tolist()),
        )

    def _answer(self) -> dict[str, Any]:
        """The header of an answer, without what every answer may hold: damage, or an error, which is raised."""
        answer = self._pipes.receive()
        if answer.get("damage") is not None:
            packets, frames, notes = _list(answer["damage"], 3)
            _check(isinstance(notes, list) and len(notes) <= _MOST_NOTES, "too many notes")
            self._damage = Damage(_whole(packets), _whole(frames), tuple(_text(note) or "" for note in notes))
        error = answer.get("error")
        if error is not None:
            _check(isinstance(error, dict) and error.get("reason") in tuple(REASONS), "an error without a reason")
            message = _text(error.get("message")) or self._shown
            raise VideoError(message, reason=error["reason"], source=self._shown, hint=_text(error.get("hint")))
        return answer

    def _size(self, height: Any, width: Any) -> tuple[int, int]:
        most = self._limits.max_pixels
        _check(_whole(height, 1, most) * _whole(width, 1, most) <= most, "a frame larger than max_pixels")
        return height, width

    @contextmanager
    def _distrust(self) -> Iterator[None]:
        """Turn whatever may go wrong with the other process into a `VideoError`, and end it."""
        start = time.monotonic()
        self._pipes.deadline = start + self._left
        try:
            yield
        except (VideoError, ConfigurationError):
            raise
        except TimeoutError:
            self.close()
            raise self._timeout() from None
        except (EOFError, BrokenPipeError):
            raise self._obituary() from None
        except _Lie as lie:
            self.close()
            raise self._error(f"was not decoded: the isolated decoder answered with {lie}.") from None
        except BaseException:  # the pipes may stand in the middle of an answer
            self.close()
            raise
        finally:
            self._left -= time.monotonic() - start

    def _obituary(self) -> VideoError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        code = self._process.returncode
        self.close()
        if code == -signal.SIGXCPU:
            return self._timeout()
        if code is None or code >= 0:
            return self._error(f"was not decoded: the isolated decoder ended early (exit code {code}).")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return self._error(
            f"was not decoded: the isolated decoder was killed by {name};",
            "the file is damaged or hostile, or the machine ran out of memory.",
        )

    def _timeout(self) -> VideoError:
        if not self._ready:
            return self._error(f"was not decoded: the isolated decoder did not start in {_SECONDS_TO_START:g} s.")
        return VideoError(
            f"{self._shown} took longer to read than max_seconds={self._limits.max_seconds:g};",
            reason="timeout",
            source=self._shown,
            hint="take fewer frames, a shorter part of it, or raise DecodingLimits.max_seconds.",
        )

    def _error(self, message: str, hint: str | None = None) -> VideoError:
        return VideoError(f"{self._shown} {message}", reason="crashed", source=self._shown, hint=hint)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._check_usable()
        with self._lock:
            self._check_usable()
            yield

    def _check_usable(self) -> None:
        if os.getpid() != self._owner:
            raise self._error("was opened in another process;", "open it in the process that reads it.")
        if not self._stop.alive:
            raise self._error("cannot be read: its decoder has ended.", "Open it again.")


class _Lie(Exception):
    """An answer that the decoder never gives."""


def _check(truth: bool, lie: str) -> None:
    if not truth:
        raise _Lie(lie)


def _whole(value: Any, low: int = 0, high: float = _MOST_COUNT) -> int:
    _check(type(value) is int and low <= value <= high, "a count beyond the limits")
    return value


def _real(value: Any, low: float, high: float = _MOST_COUNT) -> float | None:
    _check(value is None or (type(value) in (int, float) and low <= value <= high), "a time beyond the limits")
    return value


def _text(value: Any) -> str | None:
    """One line that can be printed."""
    _check(value is None or isinstance(value, str), "a text that is none")
    return value and "".join(letter if letter.isprintable() else " " for letter in value[:_LONGEST_TEXT])


def _list(value: Any, length: int) -> list[Any]:
    _check(isinstance(value, list) and len(value) == length, "a list of another length")
    return value


class _Pipes:
    """Both ways to the other process; nothing waits beyond `deadline`, a time of `time.monotonic`."""

    def __init__(self, requests: int, answers: int):
        self._requests, self._answers = requests, answers
        self._received = bytearray()
        self.deadline = 0.0
        for descriptor in (requests, answers):
            os.set_blocking(descriptor, False)
        with suppress(OSError, AttributeError):  # a speed-up that some systems do not have, or do not grant
            fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def send(self, request: dict[str, Any]) -> None:
        left = memoryview(json.dumps(request).encode() + b"\n")
        while left:
            self._wait(self._requests, select.POLLOUT)
            with suppress(BlockingIOError):
                left = left[os.write(self._requests, left) :]

    def receive(self) -> dict[str, Any]:
        """The next line, which must be an object of JSON."""
        while (end := self._received.find(b"\n")) < 0:
            _check(len(self._received) < _LONGEST_LINE, "a line without end")
            self._wait(self._answers, select.POLLIN)
            data = os.read(self._answers, 2**16)
            if not data:
                raise EOFError
            self._received += data
        line, self._received = self._received[:end], self._received[end + 1 :]
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise _Lie("what is no JSON") from None
        _check(isinstance(answer, dict), "no object of JSON")
        return answer

    def fill(self, array: np.ndarray) -> None:
        """Fill an array with the bytes that come next."""
        left = memoryview(array).cast("B")
        ready = min(len(left), len(self._received))
        left[:ready] = self._received[:ready]
        del self._received[:ready]
        left = left[ready:]
        while left:
            self._wait(self._answers, select.POLLIN)
            count = os.readv(self._answers, [left])
            if not count:
                raise EOFError
            left = left[count:]

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left = self.deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * min(left, 1e6)):
            raise TimeoutError


def _start_worker(descriptor: int) -> subprocess.Popen:
    """Start the worker with nothing of ours but one descriptor; its search path follows as the first request."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(WORKER)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        cwd="/",
        env={**kept, **_THREADS},
    )


def _stop(process: subprocess.Popen) -> None:
    """End and reap a process; a fork of its parent only lets go of it, for `Popen` finds that it is no child."""
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    process.stdin.close()
    process.stdout.close()


def _take_descriptor(file: BinaryIO, limits: DecodingLimits) -> int:
    """A descriptor of a file's own, open to be read only, or of a copy."""
    raw = getattr(file, "raw", file)
    if isinstance(raw, io.FileIO):
        if not raw.writable():
            return os.dup(raw.fileno())
        file.flush()
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{raw.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    with _new_file() as copy:
        size = file.seek(0, os.SEEK_END)
        copy.truncate(size)
        if size <= limits.max_bytes:  # of what is too large, the size says enough
            file.seek(0)
            shutil.copyfileobj(file, copy)
            copy.flush()
        return os.dup(copy.fileno())


def _new_file() -> BinaryIO:
    """A file without a name, in memory where the system can."""
    return os.fdopen(os.memfd_create("video"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
