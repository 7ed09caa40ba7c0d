"""The options that the scripts over models with random weights have in common, and what they are by default."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from measuring import RESULTS
from peers import SCHEDULES
from random_elva import SIZES

USUAL_DTYPE = "bfloat16"
"""The dtype that the targets are stated for."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="the decoder: 0.5b on a CPU, 7b on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--frames", type=int, nargs="+", help="frames of a clip: 16 on a CPU, on CUDA 32 64 128")
    parser.add_argument("--merge-schedule", choices=SCHEDULES, default=SCHEDULES[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the model")
    parser.add_argument("--dtype", default=USUAL_DTYPE)
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Add `--processes`, for scripts that measure in rounds."""
    parser.add_argument("--processes", type=int, default=3, help="rounds, each row in a fresh process")


def add_choice_of_rows(parser: argparse.ArgumentParser) -> None:
    """Add `--only`, to be read by `choose_rows`."""
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to run; all by default")


def usual_size(device: str) -> str:
    """The decoder that the targets are stated for on a device."""
    return "7b" if device == "cuda" else "0.5b"


def usual_frames(device: str) -> tuple[int, ...]:
    """The numbers of frames that the targets are stated for on a device."""
    return (32, 64, 128) if device == "cuda" else (16,)


def choose_rows(wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The rows to run, in their usual order.

    Raises:
        SystemExit: A name is not known.
    """
    unknown = sorted(set(wanted or ()) - set(known))
    if unknown:
        raise SystemExit(f"--only {' '.join(unknown)}: not known here; choose from {' '.join(known)}.")
    return [name for name in known if not wanted or name in wanted]
