"""Plant faults one at a time, in merging, decoding and training, and show that the tests see each of them.

The planted faults of the design and some more (`planted_faults/`). Each is a small replacement of text in a copy of the
source; the tests that should see it run against that copy. A fault that stays green, or whose text is no longer there,
fails:

    python scripts/mutants.py [words of the names of some faults]
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
JOBS = 2
SECONDS = 600
"""After which the tests of a fault count as hung."""
LIBRARIES = ("torch._dynamo", "transformers.trainer", "peft", "hypothesis", "pytest")
"""Imported once, before a process is forked for each fault."""
PRINTED = "printed.txt"
NO_TESTS = 5  # exit status of pytest

log = logging.getLogger("mutants")


def copy_tree(folder: Path) -> None:
    """Copy what the tests need: the package, the tests, the settings; no checkpoint's weights."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.mp4", "*.egg-info")
    for name in ("src", "tests", "docs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)


def count_places(fault: Fault) -> int:
    """How often the text of a fault stands in its file."""
    return (ROOT / "src" / "elva_hf" / fault.file).read_text().count(fault.old)


@dataclass
class Run:
    """Tests that run on a copy with a fault, or with none."""

    fault: Fault | None
    tests: Iterable[str]
    folder: Path
    started: float = field(default_factory=time.monotonic)
    pid: int = 0

    def start(self) -> None:
        """Copy, plant, and fork a process in which pytest runs up to the first failure."""
        copy_tree(self.folder)
        if self.fault is not None:
            file = self.folder / "src" / "elva_hf" / self.fault.file
            file.write_text(file.read_text().replace(self.fault.old, self.fault.new))
        self.pid = os.fork()
        if not self.pid:
            try:
                _run_pytest(self.folder, self.tests)
            finally:
                os._exit(3)

    def poll(self) -> str | None:
        """What became of it: `"red"` or `"GREEN"`, or a complaint; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self.started < SECONDS:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # with what tests left running
        if not pid:
            os.waitpid(self.pid, 0)
            return f"HUNG for {SECONDS} s"
        printed = (self.folder / PRINTED).read_text(errors="replace")
        outcomes = {0: "GREEN", 1: "red"}
        if self.fault is None:  # words of a fault with several files need not be in each of them
            outcomes |= {1: f"red\n{printed[-3000:]}", NO_TESTS: "GREEN"}
        code = os.waitstatus_to_exitcode(status)
        return outcomes.get(code, f"DID NOT RUN ({code}): {' '.join(printed.split()[-40:])}")


def _run_pytest(folder: Path, tests: Iterable[str]) -> NoReturn:
    """In a process of its own, whose libraries are imported and whose `elva_hf` is not."""
    os.setsid()
    os.chdir(folder)
    os.environ["PYTHONPATH"] = f"{folder}/src"
    sys.path[:] = [str(folder), f"{folder}/src", *(path for path in sys.path if path != str(ROOT / "scripts"))]
    sys.modules["__main__"] = types.ModuleType("__main__")  # processes that tests start would run this script again
    output = os.open(PRINTED, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    import pytest

    found = find_spec("elva_hf").origin
    if not found.startswith(str(folder.resolve())):
        print(f"the copy is not what Python imports: {found}", flush=True)
        os._exit(pytest.ExitCode.USAGE_ERROR)
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests])
    sys.stdout.flush()
    os._exit(int(status))


def run_all(wanted: list[tuple[Fault | None, Iterable[str]]], outcome: str) -> int:
    """Run tests, `JOBS` at a time, and print what became of each; returns how many came out otherwise."""
    waiting, running, bad = list(wanted), [], 0
    with tempfile.TemporaryDirectory() as name:
        while waiting or running:
            while waiting and len(running) < JOBS:
                fault, tests = waiting.pop(0)
                running.append(Run(fault, tests, Path(name, str(len(waiting)))))
                running[-1].start()
            time.sleep(0.05)
            for run in list(running):
                found = run.poll()
                if found is not None:
                    running.remove(run)
                    shutil.rmtree(run.folder, ignore_errors=True)
                    title = next(iter(run.tests)) if run.fault is None else run.fault.name
                    log.info("%-84s %4.0f s  %s", title, time.monotonic() - run.started, found)
                    bad += found != outcome
    return bad


def join_tests(faults: Iterable[Fault]) -> list[list[str]]:
    """All tests that some faults need, file by file."""
    words: dict[str, set[str]] = {}
    for fault in faults:
        chosen = f"({fault.tests[fault.tests.index('-k') + 1]})" if "-k" in fault.tests else ""
        for file in (argument for argument in fault.tests if argument.endswith(".py")):
            words.setdefault(file, set()).add(chosen)
    return [[file] if "" in chosen else [file, "-k", " or ".join(sorted(chosen))] for file, chosen in words.items()]


def main(words: list[str]) -> int:
    """Plant the faults whose names hold all words; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    faults = [fault for fault in FAULTS if all(word in fault.name for word in words)]
    lost = [fault for fault in faults if count_places(fault) != 1]
    for fault in lost:
        log.error("%s: its text stands %d times in %s", fault.name, count_places(fault), fault.file)
    if not faults:
        log.error("no fault's name holds all of: %s", " ".join(words))
    if not faults or lost:
        return 1
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in LIBRARIES:
        importlib.import_module(library)
    started = time.monotonic()
    bad = run_all([(None, tests) for tests in join_tests(faults)], "GREEN")  # otherwise red would mean nothing
    if bad:
        log.error("%d files of tests fail without any fault", bad)
        return 1
    log.info("%.0f s without any fault", time.monotonic() - started)
    bad = run_all([(fault, fault.tests) for fault in faults], "red")
    log.info("%d faults, %d unseen, %.0f s", len(faults), bad, time.monotonic() - started)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
