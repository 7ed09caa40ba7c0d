"""Try the paper's claims at toy scale.

    python benchmarks/claims/run.py                             # every claim, on CPU: hours; goes on where it stopped
    python benchmarks/claims/run.py guidance --device cuda      # one claim, on a GPU
    python benchmarks/claims/run.py --quick                     # do the scripts work

Finished runs are lines of `runs/claims/<claim>.jsonl`; tables and plots are made of them in `benchmarks/results`.
`--quick` works in one process and a temporary folder, leaves nothing and gives no verdict.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measuring import RESULTS, provenance

from claims import guidance, patch_embedding
from claims.protocol import SEEDS, Claim
from claims.report import summarise, write
from claims.runs import finish_runs, plan_runs
from claims.trainer import blind_shares, train

CLAIMS = {claim.name: claim for claim in (patch_embedding.CLAIM, guidance.CLAIM)}
BLIND_SCENES = (20_000, 4_000)
QUICK_BLIND_SCENES = (200, 50)
QUICK_COLUMNS = ("color", "needle")


def shorten(claim: Claim) -> Claim:
    """The claim with two variants, three steps and eight scenes, to see whether it runs."""
    variants = claim.variants[:2]
    names = {variant.name for variant in variants}
    budget = replace(
        claim.budget, steps=3, batch_size=2, evaluate_every=2, validation_scenes=8, test_scenes=8, warmup=1
    )
    pairs = tuple(pair for pair in claim.pairs if names.issuperset(pair))
    return replace(claim, variants=variants, pairs=pairs, columns=QUICK_COLUMNS, budget=budget)


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
    lines = finish_runs(runs, folder / f"{claim.name}.jsonl", train, jobs=options.jobs, stamp=stamp)
    fitted, scored = QUICK_BLIND_SCENES if options.quick else BLIND_SCENES
    blind_scenes = f"{fitted:,} training scenes, scored on {scored:,} test scenes"
    blind = blind_shares(claim.budget, fitted, scored)
    write(summarise(claim, lines, blind, blind_scenes, stamp["command"]), out)
    print(f"{claim.name}: {out / f'claims-{claim.name}.md'}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Try the claims that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"of {', '.join(CLAIMS)}; all if none is named")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one seed, two variants, three steps; keeps nothing")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.claims) - CLAIMS.keys()):
        parser.error(f"no claim is called {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    torch.set_num_threads(1)
    claims = [CLAIMS[name] for name in options.claims or CLAIMS]
    words = sys.argv[1:] if arguments is None else arguments
    stamp = {**provenance(options.device), "command": shlex.join(["python", "benchmarks/claims/run.py", *words])}
    if not options.quick:
        for claim in claims:
            try_claim(claim, options.runs, options.out, options, stamp)
        return
    options.seeds, options.jobs = 1, 1
    with tempfile.TemporaryDirectory() as folder:
        for claim in claims:
            try_claim(shorten(claim), Path(folder) / "runs", Path(folder) / "results", options, stamp)


if __name__ == "__main__":
    main()
