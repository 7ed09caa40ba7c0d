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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from claims.protocol import VERSION, Budget, Claim, Curve, Variant

WEIGHTS = "weights"


@dataclass(frozen=True)
class Run:
    """One variant of a claim with one seed.

    Args:
        claim: Name of the claim.
        variant: What is trained.
        seed: Of initialisation and data.
        budget: Steps, videos and evaluations.
        device: `"cpu"` or `"cuda"`.
        base: The run whose last weights it begins with.
        keeps_weights: Whether its own last weights are kept; no part of the key.
    """

    claim: str
    variant: Variant
    seed: int
    budget: Budget
    device: str = "cpu"
    base: Run | None = None
    keeps_weights: bool = field(default=False, compare=False)

    @property
    def key(self) -> str:
        """16 hexadecimal digits that change with anything that could change the result, the code but for `VERSION`."""
        fields = asdict(self)
        del fields["keeps_weights"]
        fields["base"] = None if self.base is None else self.base.key
        text = json.dumps({**fields, "protocol": VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


Train = Callable[[Run, Path], Curve]
"""Makes a run; its second argument is the folder of the finished runs."""

Prepare = Callable[[Sequence[str], Path, str], object]


def plan_runs(claim: Claim, seeds: int, device: str = "cpu") -> list[Run]:
    """Every variant with every seed, seed by seed: what is there when it stops can be compared."""
    return [plan_run(claim, variant, seed, device) for seed in range(seeds) for variant in claim.variants]


def plan_run(claim: Claim, variant: Variant, seed: int, device: str = "cpu") -> Run:
    """One variant with one seed, on its base, whose fields of the configuration it takes over."""
    if variant.base is None:
        is_base = any(other.base == variant.name for other in claim.variants if claim.bases is None)
        return Run(claim.name, variant, seed, claim.budget, device, keeps_weights=is_base)
    base = replace(plan_run(claim.bases or claim, claim.base_of(variant), seed, device), keeps_weights=True)
    variant = replace(variant, config={**base.variant.config, **variant.config})
    return Run(claim.name, variant, seed, claim.budget, device, base)


def weights_path(folder: Path, run: Run) -> Path:
    """Where the last weights of a run are kept, if another begins with them."""
    return folder / WEIGHTS / f"{run.key}.safetensors"


def teachers_folder(folder: Path) -> Path:
    """Where the towers of a folder of runs are."""
    return folder / "teachers"


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


def find_same(run: Run, own: Path, device: str) -> dict[str, Any] | None:
    """The line of another claim whose run was the same in all but its names: what two claims share is trained once.

    Args:
        run: One that has no line yet.
        own: Lines of the run's claim, beside those of the others.
        device: What the stamp of `run` says.
    """
    if run.base is not None:
        return None
    wanted = _what_runs(asdict(run), device)
    for path in sorted(set(own.parent.glob("*.jsonl")) - {own}):
        for line in read_lines(path).values():
            if line["base"] is None and line["protocol"] == VERSION and _what_runs(line, line["device"]) == wanted:
                return line
    return None


def _what_runs(line: Mapping[str, Any], device: str) -> dict[str, Any]:
    """All that decides a result, without names, and without a teacher whom nobody asks."""
    variant = {name: value for name, value in line["variant"].items() if name != "name"}
    if variant["guidance"] is None:
        del variant["teacher"]
    what = {"variant": variant, "seed": line["seed"], "budget": line["budget"], "device": device}
    return json.loads(json.dumps(what))


def finish_runs(
    runs: Sequence[Run],
    path: Path,
    train: Train,
    *,
    jobs: int = 1,
    stamp: Mapping[str, Any],
    prepare: Prepare | None = None,
) -> list[dict[str, Any]]:
    """Train what has no line yet, bases first; a run that another claim has made is taken from there.

    Args:
        runs: Of one claim.
        path: Its lines.
        train: A function that other processes can import.
        jobs: Processes, each with one thread; 1 trains in this process.
        stamp: Commit, date, versions and device, for each line.
        prepare: Makes teachers, by their names, in a folder on a device where they are missing; as `claims.teachers`
            does if None.

    Returns:
        The lines of `runs`, in their order.

    Raises:
        Exception: The first that a run raised, after those that had begun have ended and been written; nothing is
            written of a run that raised or was interrupted.
    """
    done, folder = read_lines(path), path.parent
    for run in runs:
        if run.key not in done and (same := find_same(run, path, stamp["device"])) is not None:
            add_line(path, {**same, **asdict(run), "key": run.key, "device": same["device"], "made_for": same["claim"]})
    done = read_lines(path)
    missing = [run for run in runs if run.key not in done]
    names = {run.variant.teacher for run in with_bases(missing) if run.variant.guidance is not None}
    if names:
        (prepare or _prepare_teachers)(sorted(names), teachers_folder(folder), runs[0].device)
    bases = {run.base.key: run.base for run in missing if run.base is not None}
    bases = {key: run for key, run in bases.items() if not weights_path(folder, run).exists()}
    first = bases | {run.key: bases.get(run.key, run) for run in missing if run.base is None}
    for wave in (list(first.values()), [run for run in missing if run.base is not None]):
        for run, curve in _results(wave, train, folder, jobs):
            if run in missing:
                # the stamp says which device it is that the run calls "cpu" or "cuda"
                line = {"key": run.key, "protocol": VERSION, **asdict(run), **stamp, "curve": curve.to_dict()}
                add_line(path, line)
    done = read_lines(path)
    return [done[run.key] for run in runs]


def _prepare_teachers(names: Sequence[str], folder: Path, device: str) -> None:
    from claims import teachers  # not at the top: other processes import this file, and it is heavy

    teachers.prepare(names, folder, device)


def with_bases(runs: Sequence[Run]) -> list[Run]:
    """Runs, and those that they begin with."""
    return [*runs, *(run.base for run in runs if run.base is not None)]


def _results(runs: Sequence[Run], train: Train, folder: Path, jobs: int) -> Iterator[tuple[Run, Curve]]:
    if jobs == 1 or not runs:
        yield from ((run, train(run, folder)) for run in runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_use_one_thread) as pool:
        begun = {pool.submit(train, run, folder): run for run in runs}
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


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)
