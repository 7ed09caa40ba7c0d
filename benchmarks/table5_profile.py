"""Where the time to the first token goes, part by part, for the rows of Table 5; and the floor of each part.

    python benchmarks/table5_profile.py                            # CPU: decoder of Qwen2-0.5B's shape, 16 frames
    python benchmarks/table5_profile.py --device cuda --size 7b    # GPU: the paper's decoder, 32, 64 and 128 frames
    python benchmarks/table5_profile.py --only elva elva+merge     # some rows
    python benchmarks/table5_profile.py --size tiny --out /tmp     # seconds: does it run

The rows are those of `table5_efficiency.py`, each profiled over one prefill in a fresh process (`profiling.py`), and
timed without the profiler in another. A floor is FLOPs over the matmul peak, measured in the same call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bar_chart import Bar, draw_bars
from measuring import Meter, markdown_table, provenance, run_in_fresh_process, write_results
from options import add_choice_of_rows, choose_rows, make_parser, usual_frames, usual_size
from peers import make_pipelines
from pipelines import ModelSetting, Pipeline, Row, make_scale
from profiling import (
    ATTENTION,
    ELEMENTWISE,
    FRONT_ATTENTION,
    FRONT_LINEAR,
    FRONT_REST,
    HOST,
    LM_HEAD,
    MERGING,
    MLP,
    OTHER,
    PARTS,
    PROJECTIONS,
    WAITING,
    profile_call,
)
from table5_flops import count_row
from table5_measuring import cache_figures, failure, first_tokens, pinned
from torch import Tensor, nn
from training_steps import run_matmul

COLORS = {
    FRONT_LINEAR: (214, 96, 0),
    FRONT_ATTENTION: (240, 160, 60),
    FRONT_REST: (250, 210, 160),
    PROJECTIONS: (0, 95, 204),
    ATTENTION: (0, 150, 136),
    MLP: (20, 50, 120),
    ELEMENTWISE: (150, 110, 210),
    MERGING: (190, 30, 60),
    HOST: (125, 125, 125),
    LM_HEAD: (110, 180, 240),
    OTHER: (200, 200, 200),
    WAITING: (235, 235, 215),
}
"""Of every part, in the order of the bars."""


@dataclass(frozen=True)
class Setting(ModelSetting):
    """How every row is profiled."""

    merge_schedule: str

    def pipelines(self) -> dict[str, Pipeline]:
        """Every row by its name."""
        return make_pipelines(self.make(), self.merge_schedule)


# What one process does.


def prepare(setting: Setting, name: str, frames: int) -> tuple[Pipeline, nn.Module, dict[str, Tensor]]:
    """A row's model and inputs after a warm-up: with two frames on a CPU, the same clip on CUDA."""
    device, dtype = setting.device, getattr(torch, setting.dtype)
    pipeline = setting.pipelines()[name]
    model = pipeline.build(device, dtype, setting.attention)
    inputs = pinned(pipeline.inputs(frames, 1, dtype), device)
    first_tokens(pipeline, model, inputs if device == "cuda" else pipeline.inputs(2, 1, dtype), device)
    return pipeline, model, inputs


@torch.no_grad()
def time_row(setting: Setting, name: str, frames: int) -> Row:
    """One prefill without the profiler."""
    try:
        pipeline, model, inputs = prepare(setting, name, frames)
        with Meter(setting.device, memory=False) as meter:
            first_tokens(pipeline, model, inputs, setting.device)
    except Exception as error:
        return {"failed": failure(error)}
    return {"unprofiled": {"seconds": meter.seconds, "wall_seconds": meter.wall_seconds}}


@torch.no_grad()
def profile_row(setting: Setting, name: str, frames: int) -> Row:
    """One prefill under the profiler: seconds by part, and the tokens that each layer kept."""
    kept: list[Any] = []
    try:
        pipeline, model, inputs = prepare(setting, name, frames)
        if setting.device == "cuda":
            torch.cuda.synchronize()
        parts = profile_call(
            lambda: kept.append(first_tokens(pipeline, model, inputs, setting.device)[1]), model, setting.device
        )
    except Exception as error:
        return {"failed": failure(error)}
    tokens = cache_figures(kept[0], inputs)["tokens_per_layer"]
    return {"seconds": sum(parts.values()), "tokens_per_layer": tokens, "part_seconds": parts}


# What one call does with them.


def part_flops(pipeline: Pipeline, frames: int, layers: Sequence[int]) -> dict[str, int]:
    """FLOPs of the parts that have any, up to the first token."""
    flops, shape = count_row(pipeline, frames, layers), pipeline.scale.shape()
    mlp = 2 * 3 * shape.hidden_size * shape.intermediate_size * sum(layers)
    parts = {
        FRONT_LINEAR: flops.encoder_linear,
        FRONT_ATTENTION: flops.encoder_attention,
        PROJECTIONS: flops.linear - mlp,
        ATTENTION: flops.attention,
        MLP: mlp,
        LM_HEAD: flops.lm_head,
    }
    return {part: count for part, count in parts.items() if count}


def describe_parts(seconds: Mapping[str, float], flops: Mapping[str, int], peak: float) -> list[Row]:
    """A line for each part: its time, share, FLOPs, floor, and the time as a multiple of the floor."""
    total, rows = sum(seconds.values()), []
    for part in PARTS:
        if part not in seconds and part not in flops:
            continue
        spent, floor = seconds.get(part, 0.0), flops[part] / peak if part in flops else None
        rows.append(
            {
                "part": part,
                "seconds": spent,
                "share": spent / total,
                "flops": flops.get(part),
                "floor_seconds": floor,
                "times_floor": None if floor is None else spent / floor,
            }
        )
    return rows


def measure_row(setting: Setting, name: str, frames: int, peak: float) -> Row:
    """Everything the result file holds of one row at one number of frames."""
    pipeline = setting.pipelines()[name]
    row: Row = {"pipeline": name, "note": pipeline.note, "frames": frames}
    for function in (time_row, profile_row):
        row.update(run_guarded(function, setting, name, frames))
        if "failed" in row:
            return row
    flops = part_flops(pipeline, frames, row["tokens_per_layer"])
    total = sum(flops.values())
    row["parts"] = describe_parts(row.pop("part_seconds"), flops, peak)
    return {**row, "flops": total, "floor_seconds": total / peak, "times_floor": row["seconds"] * peak / total}


def run_guarded(function: Any, setting: Setting, name: str, frames: int) -> Row:
    """Run in a fresh process; one that the system kills is named, not fatal."""
    try:
        return run_in_fresh_process(function, setting, name, frames)
    except Exception as error:
        return {"failed": f"the process died ({type(error).__name__}); out of memory?"}


def measure(setting: Setting, names: Sequence[str], frames: Sequence[int]) -> Iterator[Row]:
    """Everything the result file holds, again after each row; the last is finished."""
    matmul = run_in_fresh_process(run_matmul, setting)
    result = {**provenance(setting.device), "setting": asdict(setting), "matmul": matmul}
    rows: list[Row] = []
    for count in frames:
        for name in names:
            rows.append(measure_row(setting, name, count, matmul["flops_per_second"]))
            figure = rows[-1].get("failed") or f"{rows[-1]['seconds']:.3f} s"
            print(f"{name}, {count} frames: {figure}", file=sys.stderr)
            yield {**result, "finished": len(rows) == len(names) * len(frames), "rows": list(rows)}


# What is written.

ABOUT = (
    "The rows of `table5_efficiency.py`: models with random weights on a decoder of Qwen2's form (hidden size "
    "{hidden}, {layers} layers, vocabulary {vocab}), {dtype}, {attention} attention, {threads} CPU thread(s), "
    "merging: {merge_schedule}. Each row is one prefill under torch's profiler, after the usual warm-up, in a fresh "
    "process, from pixels and ids on the host to the first token on the host; one run, so expect some noise. `time`: "
    "wall time of the same prefill without the profiler, in another process; `profiled`: with it, which is what the "
    "parts share out. `floor`: FLOPs over {peak:.3g} TFLOP/s, the measured bf16 product of {matmul}x{matmul} "
    "matrices, in the same call."
)
CPU_TEXT = (
    "An operation counts with its own time, without what it called; the time between operations (Python, the "
    "profiler's own ranges) goes to the module in which it passed."
)
CUDA_TEXT = (
    "A kernel counts for the operation that launched it. `device waits` is the profiled wall time without any kernel: "
    "the device waits for the host, which the profiler slows; compare `profiled` with `time`."
)
PARTS_TEXT = (
    "`front end`: vision tower and projector, or patch embedding; its matrix products and convolutions, its "
    "attention, the rest. Then the decoder: `projections` are queries, keys, values and output; `attention` is the "
    "kernel alone; `elementwise` is norms, rotary positions, residual additions and the cache; `merging` is "
    "similarity, choice of pairs, means, compaction, and the restored length at the end; `masks, packing, host` is "
    "what model and decoder do outside of layers (reading the geometry, placing embeddings, masks) and Python inside "
    "them; `other` is the transfer to the device, the token embedding and fetching the token. FLOPs are counted by "
    "`table5_flops.py`, causal; a part without products of matrices has no floor."
)


def as_markdown(result: Row) -> str:
    """The result as tables."""
    setting = result["setting"]
    scale = make_scale(setting["size"])
    about = ABOUT.format(
        **{name: setting[name] for name in ("dtype", "attention", "threads", "merge_schedule")},
        hidden=scale.text.hidden_size,
        layers=scale.text.num_hidden_layers,
        vocab=scale.text.vocab_size,
        peak=result["matmul"]["flops_per_second"] / 1e12,
        matmul=scale.matmul,
    )
    parts = [
        "# Where the time to the first token goes",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}, "
        f"torch {result['torch']}, transformers {result['transformers']}.",
        *(about, CUDA_TEXT if setting["device"] == "cuda" else CPU_TEXT, PARTS_TEXT),
    ]
    if not result["finished"]:
        parts.append("Unfinished: the run was stopped before every row had run.")
    if result["chart"]:
        parts.append(f"![Seconds and shares by part, with the floor of each row]({result['chart']})")
    for frames in sorted({row["frames"] for row in result["rows"]}):
        parts += frames_section([row for row in result["rows"] if row["frames"] == frames], frames)
    return "\n\n".join(parts) + "\n"


def frames_section(rows: Sequence[Row], frames: int) -> list[str]:
    """The tables of one number of frames."""
    ran = [row for row in rows if "failed" not in row]
    missing = [f"`{row['pipeline']}` ({row['failed']})" for row in rows if "failed" in row]
    parts = [f"## {frames} frames"]
    parts += [f"Not measured: {', '.join(missing)}."] if missing else []
    parts += [overview_table(ran), "Shares of the profiled time:", shares_table(ran)] if ran else []
    for row in ran:
        parts += [f"### {row['pipeline']}, {frames} frames", f"{row['note']}.", parts_table(row["parts"])]
    return parts


def overview_table(rows: Sequence[Row]) -> str:
    """One line for each row: times and floor."""
    header = ["pipeline", "tokens", "left", "time, s", "profiled, s", "TFLOPs", "floor, s", "profiled / floor"]
    return markdown_table(
        header,
        (
            (
                *(row["pipeline"], row["tokens_per_layer"][0], row["tokens_per_layer"][-1]),
                *(row["unprofiled"]["wall_seconds"], row["seconds"], row["flops"] / 1e12),
                *(row["floor_seconds"], row["times_floor"]),
            )
            for row in rows
        ),
    )


def shares_table(rows: Sequence[Row]) -> str:
    """One line for each row: the share of each part that any row has."""
    shares = [{part["part"]: part["share"] for part in row["parts"]} for row in rows]
    names = [part for part in PARTS if any(part in line for line in shares)]
    lines = [
        [row["pipeline"], *(f"{100 * line[part]:.1f} %" if part in line else None for part in names)]
        for row, line in zip(rows, shares, strict=True)
    ]
    return markdown_table(["pipeline", *names], lines)


def parts_table(parts: Sequence[Row]) -> str:
    """One line for each part."""
    return markdown_table(
        ["part", "time, s", "share", "TFLOPs", "floor, s", "time / floor"],
        (
            (
                *(part["part"], part["seconds"], f"{100 * part['share']:.1f} %"),
                *(part["flops"] and part["flops"] / 1e12, part["floor_seconds"], part["times_floor"]),
            )
            for part in parts
        ),
    )


def draw_parts(result: Row) -> str | None:
    """The picture as SVG: a bar for each row; None if no row ran."""
    rows = [row for row in result["rows"] if "failed" not in row]
    bars = [
        Bar(
            f"{row['pipeline']}, {row['frames']} frames",
            {part["part"]: part["seconds"] for part in row["parts"]},
            row["floor_seconds"],
        )
        for row in rows
    ]
    return draw_bars("Where the time to the first token goes", "seconds", "floor", bars, COLORS) if bars else None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_choice_of_rows(parser)
    return parser.parse_args()


def main() -> int:
    """Profile and write the result files; 1 if a row failed for another reason than memory."""
    arguments = vars(parse_arguments())
    out, frames, only = (arguments.pop(name) for name in ("out", "frames", "only"))
    device = arguments["device"]
    setting = Setting(**{**arguments, "size": arguments["size"] or usual_size(device)}, processes=1)
    frames = sorted(set(frames or usual_frames(device)))
    names = choose_rows(only, tuple(setting.pipelines()))
    stem = f"table5-profile-{setting.device}"
    for result in measure(setting, names, frames):
        picture = draw_parts(result)
        result["chart"] = f"{stem}.svg" if picture else None
        write_results(out, stem, result, as_markdown(result))
        if picture:
            (out / f"{stem}.svg").write_text(picture)
    print(f"wrote {out / stem}.json, .md and .svg")
    failed = [row for row in result["rows"] if row.get("failed", "out of memory") != "out of memory"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
