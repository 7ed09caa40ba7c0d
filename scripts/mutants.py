"""Plant faults one at a time, in merging, decoding and training, and show that the tests see each of them.

The planted faults of the design and some more (`planted_faults/`). Each is a small replacement of text in a copy of the
source; the tests that should see it run against that copy. A fault that stays green, or whose text is no longer there,
fails:

    python scripts/mutants.py [words of the names of some faults]
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
JOBS = 2
SECONDS = 600
"""After which the tests of a fault count as hung."""
PRINTED = "printed.txt"

os.environ["OMP_NUM_THREADS"] = "1"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "torch._dynamo", "transformers.trainer", "peft", "hypothesis", "pytest"])
"""Forks a process for each fault, so that the libraries are imported once."""

log = logging.getLogger("mutants")


def copy_tree(folder: Path) -> None:
    """Copy what the tests need: the package, the tests, the settings; no checkpoint's weights."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.mp4", "*.egg-info")
    for name in ("src", "tests", "docs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)


def run_tests(folder: Path, tests: Iterable[str], seconds: float = SECONDS) -> tuple[int | None, str]:
    """Run pytest on the package in `folder`, which comes before the installed one, up to the first failure.

    Returns:
        Its exit status, None if it took longer than `seconds`, and what it printed.
    """
    process = SERVER.Process(target=_run_pytest, args=(str(folder), tuple(tests)))
    process.start()
    process.join(seconds)
    hung = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what tests left running
    process.join()
    return None if hung else process.exitcode, (folder / PRINTED).read_text(errors="replace")


def _run_pytest(folder: str, tests: tuple[str, ...]) -> None:
    """In a process of its own, whose libraries are imported and whose `elva_hf` is not."""
    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # what tests start is started as without this server
    os.environ["PYTHONPATH"] = f"{folder}/src"
    sys.path[:] = [f"{folder}/src", *(path for path in sys.path if path != str(ROOT / "scripts"))]
    output = os.open(PRINTED, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    import pytest

    found = find_spec("elva_hf").origin
    if not found.startswith(str(Path(folder).resolve())):
        print(f"the copy is not what Python imports: {found}", flush=True)
        os._exit(pytest.ExitCode.USAGE_ERROR)
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=short", *tests])
    sys.stdout.flush()
    os._exit(int(status))


def count_places(fault: Fault) -> int:
    """How often the text of a fault stands in its file."""
    return (ROOT / "src" / "elva_hf" / fault.file).read_text().count(fault.old)


def plant(fault: Fault) -> tuple[str, float]:
    """Plant a fault and run its tests; `"red"` is what we want, everything else a complaint. And how long it took."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        file = folder / "src" / "elva_hf" / fault.file
        file.write_text(file.read_text().replace(fault.old, fault.new))
        status, printed = run_tests(folder, fault.tests)
    outcomes = {0: "GREEN", 1: "red", None: f"HUNG for {SECONDS} s"}
    outcome = outcomes.get(status, f"DID NOT RUN: {' '.join(printed.split()[-40:])}")
    return outcome, time.monotonic() - started


def check_unharmed(faults: Iterable[Fault]) -> bool:
    """Whether the tests of some faults pass without any; otherwise red would mean nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        for tests in _join_tests(faults):
            options = ["--numprocesses", str(JOBS), "--dist", "loadfile"]
            status, printed = run_tests(folder, [*options, *tests], 4 * SECONDS)
            if status != 0:
                log.error("the tests fail without any fault:\n%s", printed[-3000:])
                return False
    return True


def _join_tests(faults: Iterable[Fault]) -> list[list[str]]:
    """At most two calls of pytest that run all tests of some faults: whole files, and what `-k` chooses of others."""
    whole, chosen, words = set(), set(), set()
    for fault in faults:
        files = {argument for argument in fault.tests if argument.endswith(".py")}
        if "-k" in fault.tests:
            chosen |= files
            words.add(f"({fault.tests[fault.tests.index('-k') + 1]})")
        else:
            whole |= files
    calls = [sorted(whole), [*sorted(chosen - whole), "-k", " or ".join(sorted(words))]]
    return [call for call in calls if call and call[0] != "-k"]


def main(words: list[str]) -> int:
    """Plant the faults whose names hold all words; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    faults = [fault for fault in FAULTS if all(word in fault.name for word in words)]
    lost = [fault for fault in faults if count_places(fault) != 1]
    for fault in lost:
        log.error("%s: its text stands %d times in %s", fault.name, count_places(fault), fault.file)
    if not faults or lost or not check_unharmed(faults):
        return 1
    started, bad = time.monotonic(), 0
    with ThreadPoolExecutor(JOBS) as pool:
        for fault, (outcome, seconds) in zip(faults, pool.map(plant, faults), strict=True):
            log.info("%-84s %4.0f s  %s", fault.name, seconds, outcome)
            bad += outcome != "red"
    log.info("%d faults, %d unseen, %.0f s", len(faults), bad, time.monotonic() - started)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
