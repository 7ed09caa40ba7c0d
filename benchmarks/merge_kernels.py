"""What the Triton kernels of a merge save against the pure functions, in one run.

    python benchmarks/merge_kernels.py --device cuda    # 128 frames of 157 tokens, 16 of text, width 3584, bfloat16
    python benchmarks/merge_kernels.py                  # CPU: the pure functions alone, 8 frames, width 512
    python benchmarks/merge_kernels.py --size tiny --out /tmp

Reference and kernels take turns, round by round. Beside the two fused parts a whole step is timed (links, similarity,
the choice of half of the links, survivors, means), and a copy of all tokens, which is the floor of anything that reads
and writes each once. `decided differently` counts the links on which the two disagree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Meter, markdown_table, provenance, ratio, run_in_fresh_process, spread, write_results
from torch import Tensor

from elva_hf import fusion_elva
from elva_hf.merging_elva import TubeLinks, find_survivors, link_tubes, merge_above, merge_most_similar

Row = dict[str, Any]

THRESHOLD = 0.6
PLACES, OTHERS, TEXT = 144, 13, 16  # 12 x 12 patches, <FRAME> and 12 <LINE> a frame; N = 20112 at 128 frames
SIZES = {"table5": (128, 3584), "small": (8, 512), "tiny": (2, 48)}
"""Frames and width."""


@dataclass(frozen=True)
class Setting:
    """What is merged, and how often."""

    device: str
    dtype: str
    frames: int
    width: int
    rounds: int
    calls: int


@dataclass(frozen=True)
class Tokens:
    """A packed row with a merge of half of its links already decided."""

    hidden: Tensor
    tubes: Tensor
    sizes: Tensor
    groups: Tensor
    removals: Tensor
    links: TubeLinks
    survivors: Tensor
    num_kept: int

    @classmethod
    def make(cls, setting: Setting) -> Tokens:
        """Frames in which each place resembles itself in the frame before, more or less."""
        torch.manual_seed(0)
        here = torch.device(setting.device)
        frame = torch.randn(PLACES, setting.width)
        rows, tubes = [torch.randn(TEXT, setting.width)], [-1 - torch.arange(TEXT)]
        for i in range(setting.frames):
            share = torch.rand(PLACES, 1)
            frame = share * frame + (1 - share**2).sqrt() * torch.randn(PLACES, setting.width)
            rows += [frame, torch.randn(OTHERS, setting.width)]
            tubes += [torch.arange(PLACES), -1 - TEXT - OTHERS * i - torch.arange(OTHERS)]
        hidden, ids = torch.cat(rows).to(here, getattr(torch, setting.dtype)), torch.cat(tubes).to(here)
        groups, removals = torch.where(ids < 0, -1, 0), (setting.frames - 1) * PLACES // 2
        links, budget = link_tubes(ids), torch.tensor([removals], device=here)
        with fusion_elva.reference_merging():
            similarity = fusion_elva.similarity_to_next(hidden, links)
        survivors = find_survivors(merge_most_similar(similarity, groups[links.order], budget), links)
        sizes = torch.ones(len(ids), device=here)
        return cls(hidden, ids, sizes, groups, budget, links, survivors, len(ids) - removals)


def similarity(tokens: Tokens) -> Tensor:
    """Cosine of each token with the next of its tube."""
    return fusion_elva.similarity_to_next(tokens.hidden, tokens.links)


def means(tokens: Tokens) -> Tensor:
    """Means and compaction."""
    merged = fusion_elva.merge_tokens(tokens.hidden, tokens.sizes, tokens.survivors, tokens.num_kept, tokens.links)
    return merged[0]


def step(tokens: Tokens) -> Tensor:
    """All of a ratio step."""
    links = link_tubes(tokens.tubes)
    close = fusion_elva.similarity_to_next(tokens.hidden, links)
    merge = merge_most_similar(close, tokens.groups[links.order], tokens.removals)
    survivors = find_survivors(merge, links)
    return fusion_elva.merge_tokens(tokens.hidden, tokens.sizes, survivors, tokens.num_kept, links)[0]


def copy(tokens: Tokens) -> Tensor:
    """Read and write every token once."""
    return tokens.hidden.clone()


PARTS: dict[str, Callable[[Tokens], Tensor]] = {"similarity": similarity, "means": means, "step": step, "copy": copy}


def implementations(setting: Setting, part: str) -> Iterator[tuple[str, Any]]:
    """Names, and the context under which each runs."""
    yield "reference", fusion_elva.reference_merging
    if setting.device == "cuda" and part != "copy":
        yield "kernels", nullcontext


@torch.no_grad()
def measure(setting: Setting) -> dict[str, Any]:
    """Time every part, the implementations in turn."""
    tokens = Tokens.make(setting)
    if setting.device == "cuda" and not fusion_elva.fuses(tokens.hidden):
        raise SystemExit(f"no kernels for {setting.dtype} on this device: Triton is missing or the GPU is too old.")
    figures: dict[tuple[str, str], list[Row]] = {}
    for turn in range(setting.rounds + 1):  # the first compiles
        for part, run in PARTS.items():
            for name, context in implementations(setting, part):
                with context(), Meter(setting.device) as meter:
                    for _ in range(setting.calls):
                        run(tokens)
                if turn:
                    figures.setdefault((part, name), []).append(meter.figures())
    return {"tokens": len(tokens.tubes), "figures": list(figures.items()), "agreement": agreement(setting, tokens)}


def agreement(setting: Setting, tokens: Tokens) -> Row | None:
    """How far the two are apart, where there are two."""
    if setting.device != "cuda":
        return None
    with fusion_elva.reference_merging():
        expected, mean = similarity(tokens), means(tokens)
    found, linked = similarity(tokens), tokens.links.has_next
    groups = tokens.groups[tokens.links.order]
    chosen = [merge_most_similar(close, groups, tokens.removals) for close in (found, expected)]
    above = [merge_above(close, THRESHOLD) for close in (found, expected)]
    return {
        "links": int(linked.sum()),
        "largest_similarity_difference": float((found - expected)[linked].abs().max()),
        "decided_differently_by_ratio": int((chosen[0] != chosen[1]).sum()),
        "decided_differently_by_threshold": int((above[0] != above[1]).sum()),
        "largest_mean_difference": float((means(tokens).float() - mean.float()).abs().max()),
    }


def rows_of(setting: Setting, measured: dict[str, Any]) -> list[Row]:
    """One row for each part and implementation; ratios to the reference, round by round."""
    figures, rows = dict(measured["figures"]), []
    for (part, name), runs in figures.items():
        seconds = [run["seconds"] / setting.calls for run in runs]
        base = [run["seconds"] / setting.calls for run in figures[part, "reference"]]
        rows.append(
            {
                "part": part,
                "implementation": name,
                "seconds": spread(seconds),
                "seconds_ratio": ratio(seconds, base),
                "peak_bytes": spread([run["peak_bytes"] for run in runs]),
            }
        )
    return rows


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    setting = result["setting"]
    parts = [
        "# Kernels of the merge",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}, "
        f"torch {result['torch']}.",
        f"{result['tokens']} tokens ({setting['frames']} frames), width {setting['width']}, {setting['dtype']}; "
        f"{setting['calls']} calls a round, {setting['rounds']} rounds, implementations in turn.",
        markdown_table(
            ["part", "by", "time, ms", "to the reference", "peak, MB"],
            (
                (row["part"], row["implementation"], 1e3 * row["seconds"]["median"], row["seconds_ratio"],
                 None if row["peak_bytes"] is None else row["peak_bytes"]["median"] / 1e6)
                for row in result["rows"]
            ),
        ),
    ]  # fmt: skip
    agreed = result["agreement"]
    if agreed is not None:
        parts.append(
            f"Of {agreed['links']} links {agreed['decided_differently_by_ratio']} are decided differently by ratio and "
            f"{agreed['decided_differently_by_threshold']} by a threshold of {THRESHOLD}; similarities differ by up to "
            f"{agreed['largest_similarity_difference']:.1e}, means by {agreed['largest_mean_difference']:.1e}."
        )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="table5 on CUDA, small on a CPU")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10, help="calls timed together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    arguments = vars(parser.parse_args())
    out, size = arguments.pop("out"), arguments.pop("size")
    frames, width = SIZES[size or ("table5" if arguments["device"] == "cuda" else "small")]
    setting = Setting(frames=frames, width=width, **arguments)
    measured = run_in_fresh_process(measure, setting)
    result = {
        **provenance(setting.device),
        "setting": asdict(setting),
        "tokens": measured["tokens"],
        "rows": rows_of(setting, measured),
        "agreement": measured["agreement"],
    }
    write_results(out, f"merge-kernels-{setting.device}", result, as_markdown(result))
    print(f"wrote {out / f'merge-kernels-{setting.device}'}.json and .md")


if __name__ == "__main__":
    main()
