"""Runs of claims: two at a time, one thread each; a result is a line that is written when its run ends, or not at all.

A key names what was run: variant, budget, seed, device and version of the protocol. Runs whose key has a line are
skipped, so that a claim that was interrupted goes on where it stopped. One process at a time may write a claim's file.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from claims.protocol import VERSION, Budget, Claim, Curve, Variant

Train = Callable[[Variant, int, Budget, str], Curve]
"""Trains a variant with a seed within a budget on a device."""


@dataclass(frozen=True)
class Run:
    """One variant of a claim with one seed.

    Args:
        claim: Name of the claim.
        variant: What is trained.
        seed: Of initialisation and data.
        budget: Steps, videos and evaluations.
        device: `"cpu"` or `"cuda"`.
    """

    claim: str
    variant: Variant
    seed: int
    budget: Budget
    device: str = "cpu"

    @property
    def key(self) -> str:
        """16 hexadecimal digits that change with anything that could change the result, the code but for `VERSION`."""
        text = json.dumps({**asdict(self), "protocol": VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_runs(claim: Claim, seeds: int, device: str = "cpu") -> list[Run]:
    """Every variant with every seed, seed by seed: what is there when it stops can be compared."""
    return [Run(claim.name, variant, seed, claim.budget, device) for seed in range(seeds) for variant in claim.variants]


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by key; none if there is no file."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["key"]: line for line in lines}


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to a file that is replaced as a whole: readers see all of the line or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    partial = path.with_suffix(".partial")
    partial.write_text(f"{before}{json.dumps(line)}\n")
    os.replace(partial, path)


def finish_runs(
    runs: Sequence[Run], path: Path, train: Train, *, jobs: int = 1, stamp: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Train what has no line yet.

    Args:
        runs: Of one claim.
        path: Its lines.
        train: A function that other processes can import.
        jobs: Processes, each with one thread; 1 trains in this process.
        stamp: Commit, date, versions and device, for each line.

    Returns:
        The lines of `runs`, in their order.

    Raises:
        Exception: The first that a run raised, after those that had begun have ended and been written; nothing is
            written of a run that raised or was interrupted.
    """
    done = read_lines(path)
    for run, curve in _results([run for run in runs if run.key not in done], train, jobs):
        # the stamp says which device it is that the run calls "cpu" or "cuda"
        line = {"key": run.key, "protocol": VERSION, **asdict(run), **stamp, "curve": curve.to_dict()}
        add_line(path, line)
    done = read_lines(path)
    return [done[run.key] for run in runs]


def _results(runs: Sequence[Run], train: Train, jobs: int) -> Iterator[tuple[Run, Curve]]:
    if jobs == 1:
        yield from ((run, _call(train, run)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_use_one_thread) as pool:
        begun = {pool.submit(_call, train, run): run for run in runs}
        failed: list[BaseException] = []
        for future in as_completed(begun):
            error = None if future.cancelled() else future.exception()
            if error is not None:
                failed.append(error)
                _cancel(begun)
            elif not future.cancelled():
                yield begun[future], future.result()
    if failed:
        raise failed[0]


def _cancel(futures: Mapping[Future, Run]) -> None:
    for future in futures:
        future.cancel()  # those that run go on


def _call(train: Train, run: Run) -> Curve:
    return train(run.variant, run.seed, run.budget, run.device)


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
