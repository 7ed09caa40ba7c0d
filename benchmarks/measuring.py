"""How the benchmarks measure: fresh processes, clocks, peak memory, and result files that say where they come from."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"

_CLEAR_REFS = Path("/proc/self/clear_refs")


def run_in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, so that its memory peak and its warm state are its own.

    The process is forked from a server that has imported the libraries and computed nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["elva_hf.modeling_elva", "transformers.models.qwen2.modeling_qwen2"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


class Meter:
    """Measures the block under `with`: `wall_seconds`, `seconds` and `peak_bytes` above `held_bytes` before it.

    `seconds` is the process's CPU time on a CPU, which a busy machine disturbs less, and wall time on CUDA.
    `peak_bytes` is the resident peak on a CPU (None where the system does not tell) and the allocator's on CUDA;
    None with `memory=False`, which disturbs nothing and can stand inside another meter.
    """

    def __init__(self, device: str, *, memory: bool = True):
        self.cuda, self.memory = device == "cuda", memory

    def __enter__(self) -> Meter:
        if self.cuda:
            torch.cuda.synchronize()
        self.held_bytes = self._reset_peak() if self.memory else None
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.wall_seconds = time.perf_counter() - self._wall
        self.seconds = self.wall_seconds if self.cuda else time.process_time() - self._cpu
        self.peak_bytes = None if self.held_bytes is None else self._read_peak() - self.held_bytes

    def figures(self) -> dict[str, float | int | None]:
        """What was measured, for a result file."""
        return {"seconds": self.seconds, "wall_seconds": self.wall_seconds, "peak_bytes": self.peak_bytes}

    def _reset_peak(self) -> int | None:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if not _CLEAR_REFS.exists():
            return None
        ctypes.CDLL(None).malloc_trim(0)  # freed memory of the warm-up must not count as held
        _CLEAR_REFS.write_text("5")  # VmHWM starts again from VmRSS
        return _resident("VmRSS")

    def _read_peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def describe_device(device: str) -> str:
    """The kind of device, without the name of a machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    from elva_hf.training.precision import cpu_multiplies_bfloat16  # peers import this module without ours

    kind = {"x86_64": "x86", "AMD64": "x86", "aarch64": "Arm", "arm64": "Arm"}.get(platform.machine(), "")
    lacks = "" if cpu_multiplies_bfloat16() else " without bfloat16"
    return f"{os.cpu_count()}-core {kind} CPU".replace("  ", " ") + lacks


def command_line(words: Sequence[str]) -> str:
    """The command as others would give it: without `--out`, the folder that its results went to."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    return shlex.join(["python", *parser.parse_known_args(words)[1]])


def provenance(device: str) -> dict[str, Any]:
    """What every result file carries: that it is measured, and with what."""
    return {
        "kind": "measured",
        "command": command_line(sys.argv),
        "device": run_in_fresh_process(describe_device, device),
        "commit": _commit(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with local changes" if changed else "")


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, minimum and maximum of one figure over the processes; None where it could not be measured."""
    if None in values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(values: Sequence[float | None], base: Sequence[float | None]) -> float | None:
    """Median of the ratios taken round by round, so that a drift of the machine's speed cancels."""
    if None in values or None in base:
        return None
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; a float gets two significant digits or more, None a dash."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
    return str(value)


def write_results(folder: Path, name: str, result: dict[str, Any], markdown: str) -> None:
    """Write `name.json`, and `name.md` made from it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown)
