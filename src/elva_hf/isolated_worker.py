"""The process that decodes for `isolation_elva.IsolatedReader`: it gives up every right it can, then reads the file.

Runs as a script and imports no torch. What it is told comes as lines of JSON on standard input; every answer on
standard output is a line of JSON, after which the bytes of an array follow:

    {"path", "file", "shown", "limits", "parent"} -> {"ready"}, and {"info", "damage"} with the times of all frames
    {"read": indices} or {"next"}                 -> {"frame", "damage"} with its pixels, or {"end", "damage"}

`{"error", "damage"}` takes the place of any answer, and `{"refused"}` that of the first.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

    from elva_hf.limits_elva import DecodingLimits
    from elva_hf.source_elva import Frame, Reader

LONGEST_MESSAGE = 500  # characters
MOST_NOTES = 60
_LAZY = (  # what PyAV, numpy and Pillow would import only when no file can be opened any more
    "av.subtitles.codeccontext",
    "av.subtitles.stream",
    "numpy.ma",
    *(f"PIL.{kind}ImagePlugin" for kind in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP")),
)
_CPU_MARGIN = 10  # seconds: the clocks that give better messages strike first
_MOST = 2**62  # of any limit
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CAPABILITY_VERSION = 0x20080522
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # numbers of the system calls
_LANDLOCK_FILE_RIGHTS = (13, 14, 15, 15, 16)  # how many there are, by version of the interface


def restrict(memory: int, seconds: float, parent: int | None = None) -> None:
    """Give up for good whatever decoding does not need. Everything must be imported, and no other thread may run.

    From here on no file or socket can be opened and nothing can be written to a file. On Linux no privilege is left
    that could undo it, not even root's. Where the kernel has Landlock, no file can be removed, renamed or run either,
    and, since Linux 6.12, no other process be signalled.

    Args:
        memory: Bytes of address space.
        seconds: Seconds of processor time for opening and for reading; a margin is added.
        parent: Process with which to die (Linux).

    Raises:
        OSError: The system refuses.
    """
    if sys.platform == "linux":
        _restrict_linux(ctypes.CDLL(None, use_errno=True), parent)
    processor = math.ceil(min(2 * seconds, 1e9)) + _CPU_MARGIN
    _lower(resource.RLIMIT_AS, int(memory))
    _lower(resource.RLIMIT_CPU, processor, processor + 1)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NPROC, 0)
    _lower(resource.RLIMIT_NOFILE, 0)


def _lower(limit: int, soft: int, hard: int | None = None) -> None:
    highest = resource.getrlimit(limit)[1]
    highest = _MOST if highest == resource.RLIM_INFINITY else highest
    resource.setrlimit(limit, (min(soft, highest), min(soft if hard is None else hard, highest)))


def _restrict_linux(libc: Any, parent: int | None) -> None:
    _checked(libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()))
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    _landlock(libc)
    if parent is not None:
        _checked(libc.prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0))))
        if os.getppid() != parent:
            os._exit(0)


def _landlock(libc: Any) -> None:
    """Deny every right that Landlock knows, where the kernel has it."""
    call = libc.syscall
    call.restype = ctypes.c_long
    version = call(*map(ctypes.c_long, (_LANDLOCK_CREATE_RULESET, 0, 0, 1)))
    if version < 1:
        return
    files = 2 ** _LANDLOCK_FILE_RIGHTS[min(version, 5) - 1] - 1
    denied = (ctypes.c_uint64 * 3)(files, 0b11, 0b11)  # files; TCP: bind, connect; beyond: abstract sockets, signals
    size = 8 * (1 + (version >= 4) + (version >= 6))
    rules = _checked(call(ctypes.c_long(_LANDLOCK_CREATE_RULESET), denied, ctypes.c_long(size), ctypes.c_long(0)))
    _checked(call(*map(ctypes.c_long, (_LANDLOCK_RESTRICT_SELF, rules, 0))))
    os.close(rules)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class _File(io.RawIOBase):
    """A file that was opened elsewhere, read without moving the place that the descriptor shares with others."""

    def __init__(self, descriptor: int):
        self._descriptor, self._place = descriptor, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self._descriptor, len(buffer), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._place, os.fstat(self._descriptor).st_size)[whence]
        self._place = max(0, base + offset)
        return self._place


class _Answers:
    """The way back to the parent."""

    def __init__(self, file: BinaryIO, shown: str, memory: int):
        self._file, self._shown = file, shown
        self._out_of_memory = {  # made now, while there is memory
            "reason": "out_of_memory",
            "message": f"{shown} needs more memory than max_process_memory={memory} to be decoded;",
            "hint": "scale it down, or raise DecodingLimits.max_process_memory.",
        }

    def send(self, header: dict[str, Any], array: np.ndarray | None = None) -> None:
        self._file.write(json.dumps(header).encode() + b"\n")
        if array is not None:
            self._file.write(memoryview(array).cast("B"))
        self._file.flush()

    def send_error(self, error: Exception, damage: list[Any] | None = None) -> None:
        self.send({"error": self._describe(error), "damage": damage})

    def _describe(self, error: Exception) -> dict[str, Any]:
        if isinstance(error, MemoryError):
            return self._out_of_memory
        from elva_hf.errors_elva import VideoError

        if not isinstance(error, VideoError):
            message = f"{self._shown} could not be decoded ({type(error).__name__}: {error})."
            return {"reason": "crashed", "message": message[:LONGEST_MESSAGE], "hint": None}
        message = str(error).removesuffix(f" {error.hint}")[:LONGEST_MESSAGE]
        return {"reason": error.reason, "message": message, "hint": error.hint and error.hint[:LONGEST_MESSAGE]}


def main() -> None:
    """Decode one file for the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    start = json.loads(sys.stdin.buffer.readline())
    answers = _Answers(_take_output(), start["shown"], start["limits"]["max_process_memory"])
    try:
        open_file, limits = _load(start)
        restrict(limits.max_process_memory, limits.max_seconds, start["parent"])
    except Exception as error:
        answers.send({"refused": f"{type(error).__name__}: {error}"[:LONGEST_MESSAGE]})
        return
    answers.send({"ready": True})
    try:
        reader = open_file(_File(start["file"]), start["shown"], limits, 1)
        _send_info(reader, answers)
    except Exception as error:
        answers.send_error(error)
        return
    _serve(reader, answers)


def _take_output() -> BinaryIO:
    """Standard output, out of the reach of whatever prints."""
    output = os.dup(1)
    os.dup2(2, 1)
    return open(output, "wb")


def _load(start: dict[str, Any]) -> tuple[Callable[..., Reader], DecodingLimits]:
    """Import the decoder, without the package's `__init__` and all that it pulls in."""
    sys.path[:] = start["path"]
    package = ModuleType("elva_hf")
    package.__path__ = [os.path.dirname(os.path.abspath(__file__))]
    sys.modules["elva_hf"] = package
    for name in _LAZY:
        import_module(name)
    from elva_hf.files_elva import open_file
    from elva_hf.limits_elva import DecodingLimits

    return open_file, DecodingLimits(**start["limits"])


def _send_info(reader: Reader, answers: _Answers) -> None:
    import numpy as np

    facts = dict(vars(reader.info))
    times = np.array(facts.pop("times"), np.float64)
    answers.send({"info": facts, "damage": _damage(reader)}, times)


def _serve(reader: Reader, answers: _Answers) -> None:
    """Answer until the parent hangs up."""
    frames: Iterator[Frame] = iter(())
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "read" in request:
                frames = reader.read(request["read"])
            frame = next(frames, None)
            if frame is None:
                answers.send({"end": True, "damage": _damage(reader)})
            else:
                _send_frame(frame, reader, answers)
        except BrokenPipeError:
            return
        except Exception as error:
            answers.send_error(error, _damage(reader))
            if isinstance(error, MemoryError):
                return


def _send_frame(frame: Frame, reader: Reader, answers: _Answers) -> None:
    import numpy as np

    height, width = frame.pixels.shape[:2]
    facts = [int(frame.index), frame.time, height, width]
    answers.send({"frame": facts, "damage": _damage(reader)}, np.ascontiguousarray(frame.pixels))


def _damage(reader: Reader) -> list[Any]:
    damage = reader.damage
    notes = [note[:LONGEST_MESSAGE] for note in damage.notes[:MOST_NOTES]]
    if len(damage.notes) > MOST_NOTES:
        notes.append(f"and {len(damage.notes) - MOST_NOTES} notes more")
    return [damage.num_bad_packets, damage.num_corrupt_frames, notes]


if __name__ == "__main__":
    main()
