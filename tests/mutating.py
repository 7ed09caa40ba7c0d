"""Damaged clips, read one after the other in a child process that may hang or die.

A mutant is made by two numbers, its own and a seed. To read one again, here and with its whole traceback:

    python tests/mutating.py NUMBER [--seed SEED] [--data SAVED_FILE]
"""

import argparse
import faulthandler
import gc
import json
import math
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from damaged_clips import Mutant, make_clips, make_mutant

from elva_hf.decoding_elva import probe, read_video
from elva_hf.errors_elva import REASONS, VideoError
from elva_hf.frames_elva import FramePlan

SECONDS = 5.0  # a mutant that takes longer hangs
MEMORY = 4 * 2**30  # bytes of address space that a child may add to what its parent has
MANY = 500  # frames of the longest read
PIXELS = 2**26  # of one read, so that a picture that claims to be large is not the work of minutes


class WrongForm(AssertionError):
    """A result that no reader may return."""


def read_mutant(run, mutant):
    """Read as bytes or as a file, some frames or all: `"read"`, or the reason of the one error that may be raised."""
    rng = random.Random(f"{run.seed}/{mutant.number}/read")
    source = mutant.data
    if rng.random() < 0.3:
        source = Path(run.folder, f"mutant{Path(mutant.clip).suffix}")
        source.write_bytes(mutant.data)
    asked = {}
    plan, size = make_plan(rng, asked), make_size(rng)
    try:
        if rng.random() < 0.1:
            check_info(run.look(source))
            return "looked at"
        check_video(run.reader(source, plan, size), asked["plan"], size)
    except VideoError as error:
        check_error(error)
        return error.reason
    return "read"


def make_plan(rng, asked):
    """A `plan` for a reader, that keeps what it asked for."""
    kind = rng.choice(("first", "last", "some", "some", "all", "all"))
    share = rng.random()

    def plan(info):
        check_info(info)
        last = info.num_frames - 1
        affordable = max(1, min(info.num_frames, PIXELS // (info.height * info.width)))
        count = min(affordable, {"some": 1 + int(share * 8), "all": MANY}.get(kind, 1))
        indices = {"first": [0], "last": [last], "all": range(count)}.get(kind) or spread(rng, last, count)
        high = tuple(rng.random() < 0.5 for _ in indices)
        asked["plan"] = FramePlan(tuple(indices), high, len(indices) + rng.choice((0, 3)))
        return asked["plan"]

    return plan


def spread(rng, last, count):
    return sorted({rng.randint(0, last) for _ in range(count)})


def make_size(rng):
    keep, high, low = rng.random() < 0.3, (40, 56), (16, 24)

    def size(height, width, is_high):
        return (height, width) if keep and height * width <= 2**20 else high if is_high else low

    return size


def need(condition, *shown):
    if not condition:
        raise WrongForm(" ".join(map(str, shown))[:300])


def check_info(info):
    need(info.num_frames >= 1 and info.height >= 1 and info.width >= 1, "sides or frames below 1:", info)
    need(len(info.times) == info.num_frames, len(info.times), "times of", info.num_frames, "frames")
    need(info.times[0] == 0, "the first frame at", info.times[0])
    check_times(info.times)
    for name in ("duration", "fps"):
        value = getattr(info, name)
        need(value is None or (value > 0 and math.isfinite(value)), name, value)
    need(info.duration is None or info.duration >= info.times[-1], info.duration, "s, last frame at", info.times[-1])
    need(info.rotation in (0, 90, 180, 270), "rotation", info.rotation)
    need("\n" not in info.source and len(info.source) < 300, "source", info.source)


def check_times(times):
    need(all(type(time) is float and math.isfinite(time) for time in times), "times that are no numbers:", times)
    need(all(a <= b for a, b in pairwise(times)), "times that go back:", times)


def check_video(video, plan, size):
    check_info(video.info)
    need(video.indices and all(a < b for a, b in pairwise(video.indices)), "indices", video.indices)
    need(set(video.indices) <= set(plan.indices), "indices", video.indices, "of", plan.indices)
    need(len(video.frames) == len(video.indices) == len(video.high), len(video.frames), "frames of", video.indices)
    roles = dict(zip(plan.indices, plan.high, strict=True))
    need(list(video.high) == [roles[index] for index in video.indices], "roles", video.high)
    need(video.num_asked == plan.num_asked, video.num_asked, "asked, not", plan.num_asked)
    if hasattr(video, "missing"):
        both = sorted((*video.indices, *video.missing))
        need(both == list(plan.indices), "missing", video.missing, "of", plan.indices)
    if video.times is not None:
        need(len(video.times) == len(video.indices), len(video.times), "times of", len(video.indices), "frames")
        check_times(video.times)
    for frame, high in zip(video.frames, video.high, strict=True):
        expected = (3, *size(video.info.height, video.info.width, high))
        need(tuple(frame.shape) == expected, "shape", tuple(frame.shape), "not", expected)
        need(str(frame.dtype).endswith("uint8"), "dtype", frame.dtype)
        frame.sum()  # reads every byte


def check_error(error):
    message = str(error)
    need(type(error) is VideoError, type(error))
    need(error.reason in REASONS, "reason", error.reason)
    need(message and "\n" not in message and len(message) < 400, "message", repr(message))


@dataclass
class Failure:
    """A mutant that broke the reader, and where its bytes are kept."""

    mutant: Mutant
    problem: str
    path: Path


@dataclass
class Report:
    """What became of many mutants.

    Args:
        outcomes: Counts of what `read_mutant` returned.
        failures: Mutants that broke the reader.
        slowest: Seconds, and the number of the mutant.
        memory: Bytes that a child grew by at most.
        seconds: Of the whole run.
    """

    outcomes: Counter = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    memory: int = 0
    seconds: float = 0.0

    @property
    def num_mutants(self):
        return sum(self.outcomes.values()) + len(self.failures)

    def __str__(self):
        slow, number = self.slowest
        head = (
            f"{self.num_mutants} mutants in {self.seconds:.0f} s, {len(self.failures)} failures; slowest {slow:.2f} s "
            f"(mutant {number}); the child grew by {self.memory / 2**20:.0f} MiB; {dict(self.outcomes.most_common())}"
        )
        return "\n".join([head, *(f"{fail.mutant}: {fail.problem} [{fail.path}]" for fail in self.failures)])


@dataclass(frozen=True)
class Run:
    """How mutants are read.

    Args:
        clips: Name -> bytes.
        folder: Where mutants that fail, and what the child says, are kept.
        seed: Of the mutations.
        reader: Called as `read_video`.
        look: Called as `probe`.
        seconds: That a mutant may take.
        memory: Bytes of address space that a child may add.
    """

    clips: dict
    folder: Path
    seed: int = 0
    reader: object = read_video
    look: object = probe
    seconds: float = SECONDS
    memory: int = MEMORY


def run_mutants(run, numbers, most_failures=20):
    """Read mutants in a child process, and in a new one after each that died or was killed."""
    report, left, started = Report(), list(numbers), time.perf_counter()
    while left and len(report.failures) < most_failures:
        left = left[run_child(run, left, report, most_failures) :]
    report.seconds = time.perf_counter() - started
    return report


def run_child(run, numbers, report, most_failures):
    """Listen to a child that reads `numbers`, as long as it lives and has not failed too often; how many it came to."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(run, numbers, theirs), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; the child uses none of them
        child.start()
    theirs.close()
    try:
        for done, number in enumerate(numbers, 1):
            told = hear(ours, child, run.seconds)
            report.slowest = max(report.slowest, (told["seconds"], number))
            report.memory = max(report.memory, told["memory"])
            if told["problem"]:
                report.failures.append(keep(run, number, told["problem"]))
            else:
                report.outcomes[told["outcome"]] += 1
            if told["dead"] or len(report.failures) == most_failures:
                return done
        return len(numbers)
    finally:
        child.kill()
        child.join()
        ours.close()


def hear(pipe, child, seconds):
    """What the child tells of its next mutant, or what is seen of it from outside."""
    try:
        if pipe.poll(2 * seconds):
            return json.loads(pipe.recv_bytes())
        return verdict(f"hang: no result after {seconds} s", seconds=seconds, dead=True)
    except EOFError:
        child.join()
        return verdict(f"crash: the process ended with {child.exitcode}", dead=True)


def verdict(problem, outcome=None, seconds=0.0, memory=0, dead=False):
    return {"problem": problem, "outcome": outcome, "seconds": seconds, "memory": memory, "dead": dead}


def keep(run, number, problem):
    mutant = make_mutant(run.clips, number, run.seed)
    path = Path(run.folder, f"{number}-{mutant.clip}")
    path.write_bytes(mutant.data)
    return Failure(mutant, problem, path)


def work(run, numbers, pipe):
    """In the child: read each mutant, tell what became of it."""
    with open(Path(run.folder, "child.log"), "ab") as log:
        os.dup2(log.fileno(), 2)
    faulthandler.enable(file=2)
    gc.freeze()  # garbage of the parent may wait for threads that are not here
    limit_memory(run.memory)
    before = peak_memory()
    for number in numbers:
        faulthandler.dump_traceback_later(run.seconds, file=2)
        told = try_mutant(run, make_mutant(run.clips, number, run.seed))
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(json.dumps({**told, "memory": peak_memory() - before}).encode())


def try_mutant(run, mutant):
    problem = outcome = None
    before, started = held(), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = read_mutant(run, mutant)
    except WrongForm as error:
        problem = f"wrong form: {error}"
    except BaseException as error:  # whatever it is, it was not to be raised
        problem = f"stray {type(error).__name__}: {str(error)[:200]!r} at {place_of(error)}"
    seconds = time.perf_counter() - started
    if problem is None and held() != before:
        gc.collect()
        if any(now > then for now, then in zip(held(), before, strict=True)):
            problem = f"leak: {before} -> {held()} descriptors, threads, children"
    if problem is None and seconds > run.seconds:
        problem = f"slow: {seconds:.1f} s"
    return verdict(problem, outcome, seconds)


def place_of(error):
    """`file:line`s of the innermost calls."""
    calls = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{Path(call.filename).name}:{call.lineno}" for call in reversed(calls))


def held():
    """Open descriptors, threads and child processes of this process, where the system tells."""
    lists = (os.listdir(path) for path in ("/proc/self/fd", "/proc/self/task") if os.path.isdir(path))
    children = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
    return (*map(len, lists), sum(map(len, children)))


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(more):
    """At most `more` bytes of address space beside what the process has."""
    if os.path.exists("/proc/self/statm"):
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main():
    """Read one mutant again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="bytes saved by a failed test, in place of those made here")
    options = parser.parse_args()
    faulthandler.enable()
    run = Run(make_clips(), Path(tempfile.gettempdir()), options.seed)
    mutant = make_mutant(run.clips, options.number, options.seed)
    if options.data:
        mutant = replace(mutant, data=options.data.read_bytes())
    print(mutant, f"{len(mutant.data)} bytes")
    started = time.perf_counter()
    print(read_mutant(run, mutant), f"{time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
