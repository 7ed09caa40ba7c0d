"""Try the paper's claims at toy scale.

    python benchmarks/claims/run.py                             # every claim, on CPU: hours; goes on where it stopped
    python benchmarks/claims/run.py guidance --device cuda      # one claim, on a GPU
    python benchmarks/claims/run.py --quick                     # do the scripts work

Finished runs are lines of `runs/claims/<claim>.jsonl`; tables and plots are made of them in `benchmarks/results`, and
of these `docs/results.md`. A claim that fails does not stop the others. `--quick` works in one process and a temporary
folder, leaves nothing and gives no verdict.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measuring import RESULTS, provenance

from claims import (
    captioning,
    guidance,
    hurting,
    hybrid,
    merging,
    needle_grid,
    patch_embedding,
    stages,
    teacher_kind,
    teachers,
)
from claims.page import PAGE, write_page
from claims.protocol import SEEDS, Budget, Claim
from claims.report import summarise, write
from claims.runs import finish_runs, plan_runs
from claims.trainer import train
from claims.worlds import WORLDS

MODULES = (guidance, merging, hurting, captioning, patch_embedding, stages, hybrid, teacher_kind)
CLAIMS = {module.CLAIM.name: module.CLAIM for module in MODULES}
GRID = needle_grid.NAME
BLIND_SCENES = (20_000, 4_000)
QUICK_BLIND_SCENES = (200, 50)
QUICK_VARIANTS = 2


# Quick mode


def shorten_budget(budget: Budget) -> Budget:
    """Three steps of two videos, and eight scenes to evaluate on."""
    return replace(
        budget,
        steps=3,
        batch_size=2,
        evaluate_every=2,
        validation_scenes=8,
        test_scenes=8,
        warmup=1,
        tuning_steps=min(2, budget.tuning_steps),
    )


def shorten(claim: Claim) -> Claim:
    """The claim with the variants of one pair, their bases, three steps and eight scenes, to see whether it runs.

    Its columns are all that such runs can have in common; see `common_columns`.
    """
    names = (claim.pairs[0] if claim.pairs else tuple(v.name for v in claim.variants))[:QUICK_VARIANTS]
    wanted = {*names, *(variant.base for variant in claim.variants if variant.name in names)}
    own = tuple(variant for variant in claim.variants if variant.name in (wanted if claim.bases is None else names))
    bases = claim.bases
    if bases is not None:
        kept = tuple(variant for variant in bases.variants if variant.name in wanted)
        bases = replace(bases, variants=kept, pairs=(), budget=shorten_budget(bases.budget))
    pairs = tuple(pair for pair in claim.pairs if set(names).issuperset(pair))
    return replace(claim, variants=own, pairs=pairs, bases=bases, budget=shorten_budget(claim.budget))


def common_columns(lines: Sequence[dict[str, Any]], blind: dict[str, float], wanted: Sequence[str]) -> tuple[str, ...]:
    """Columns that every run happened to be asked, those of the claim first choice; few scenes do not have them all.

    Raises:
        ValueError: There is none.
    """
    found = set(blind)
    for line in lines:
        found &= line["curve"]["accuracy"].keys() & line["curve"]["test"].keys()
    if not found:
        raise ValueError(f"runs on eight scenes share no column with the blind shares {', '.join(sorted(blind))}.")
    return tuple(column for column in wanted if column in found) or tuple(sorted(found))


# A claim, and all of them


def try_claim(claim: Claim, folder: Path, out: Path, options: argparse.Namespace, stamp: dict[str, Any]) -> None:
    """Finish the runs of a claim and write its results.

    Args:
        claim: What is tried.
        folder: Of the finished runs.
        out: Of the results.
        options: `seeds`, `device`, `jobs` and `quick`.
        stamp: Commit, date, versions and device.
    """
    runs = plan_runs(claim, options.seeds, options.device)
    print(f"{claim.name}: {len(runs)} runs of {claim.budget.steps} steps", flush=True)
    prepare = partial(teachers.prepare, plan=teachers.QUICK_PLAN if options.quick else teachers.PLAN)
    path = folder / f"{claim.name}.jsonl"
    lines = finish_runs(runs, path, train, jobs=options.jobs, stamp=stamp, prepare=prepare)
    fitted, scored = QUICK_BLIND_SCENES if options.quick else BLIND_SCENES
    blind_scenes = f"{fitted:,} training scenes, scored on {scored:,} test scenes"
    blind = WORLDS[claim.budget.world].blind(claim.budget, fitted, scored)
    if options.quick:
        claim = replace(claim, columns=common_columns(lines, blind, claim.columns))
    write(summarise(claim, lines, blind, blind_scenes, stamp["command"]), out)
    print(f"{claim.name}: {out / f'claims-{claim.name}.md'}", flush=True)


def try_all(names: Sequence[str], folder: Path, out: Path, options: argparse.Namespace, stamp: dict[str, Any]) -> None:
    """Try each claim, whatever becomes of the others, and write the page after each.

    Args:
        names: Of the claims.
        folder: Of the finished runs.
        out: Of the results.
        options: Of the command line.
        stamp: Commit, date, versions and device.

    Raises:
        SystemExit: Some failed; what they raised is printed.
    """
    failed = []
    for name in names:
        try:
            _try_one(name, folder, out, options, stamp)
            write_page(out, options.page)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; finished runs are kept, the same command goes on.")


def _try_one(name: str, folder: Path, out: Path, options: argparse.Namespace, stamp: dict[str, Any]) -> None:
    if name == GRID:
        print(f"{GRID}: length by depth", flush=True)
        needle_grid.measure(folder, out, device=options.device, jobs=options.jobs, stamp=stamp, quick=options.quick)
        return
    try_claim(shorten(CLAIMS[name]) if options.quick else CLAIMS[name], folder, out, options, stamp)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the claims that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*CLAIMS, GRID]
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="file of the page that is made of them")
    parser.add_argument("--quick", action="store_true", help="one seed, two variants, three steps; keeps nothing")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.claims) - set(known)):
        parser.error(f"no claim is called {', '.join(unknown)}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    names = options.claims or known
    words = sys.argv[1:] if arguments is None else arguments
    stamp = {**provenance(options.device), "command": shlex.join(["python", "benchmarks/claims/run.py", *words])}
    if not options.quick:
        try_all(names, options.runs, options.out, options, stamp)
        return
    options.seeds, options.jobs = 1, 1
    with tempfile.TemporaryDirectory() as folder:
        options.page = Path(folder) / "results.md"
        try_all(names, Path(folder) / "runs", Path(folder) / "results", options, stamp)
        print("nothing is kept, and there is no verdict")


if __name__ == "__main__":
    main()
