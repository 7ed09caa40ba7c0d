"""Table 5 side by side with today's peers: FLOPs, time to the first token, memory, decoding, requests by batch size.

    python benchmarks/table5_efficiency.py                            # CPU: decoder of Qwen2-0.5B's shape, 16 frames
    python benchmarks/table5_efficiency.py --device cuda --size 7b    # GPU: the paper's decoder, 32, 64 and 128 frames
    python benchmarks/table5_efficiency.py --scaling                  # ELVA alone, 8 to 256 frames
    python benchmarks/table5_efficiency.py --derived                  # seconds, no weights: FLOPs at the 7B shape
    python benchmarks/table5_efficiency.py --size tiny --out /tmp     # seconds: does it run

One call measures every row on the same work in fresh processes, round by round, with random weights: ELVA without
merging, with it, and with hybrid resolution; LLaVA-NeXT-Video as in the paper and at ELVA's tokens; Qwen2.5-VL,
VideoLLaMA3, and Gemma4Unified's front end, all on a decoder of the same size (`peers.py`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from measuring import provenance, ratio, run_in_fresh_process, spread, write_results
from options import USUAL_DTYPE, add_choice_of_rows, add_rounds, choose_rows, make_parser, usual_frames, usual_size
from peers import BASELINE
from pipelines import Row
from table5_flops import as_markdown as derived_markdown
from table5_flops import count_row, derived_result, paper_number, table5_accounting
from table5_measuring import Setting, run_pipeline
from table5_report import as_markdown, draw_times
from table5_targets import ELVA_ROWS, targets_of
from training_steps import run_matmul

Rounds = dict[tuple[str, int], list[Row]]

SCALING_FRAMES = (8, 16, 32, 64, 128, 256)
FIGURES = ("seconds", "wall_seconds", "front_end_seconds", "prefill_seconds", "merge_share")
BYTES = ("peak_bytes", "front_end_peak_bytes", "prefill_peak_bytes")
RATES = ("generate_seconds", "requests_per_second", "decode_tokens_per_second")


def measure_rounds(setting: Setting, names: Sequence[str], frames: Sequence[int]) -> Iterator[Rounds]:
    """Run every row once a round, and give all that can be compared so far: row by row, then round by round.

    On a CPU each number of frames has a fresh process, on CUDA one process runs a row at all of them.
    """
    groups = [list(frames)] if setting.device == "cuda" else [[count] for count in frames]
    rounds: Rounds = {}
    for number in range(setting.processes):
        for name, group in itertools.product(names, groups):
            for count, row in zip(group, run_guarded(setting, name, group), strict=True):
                rounds.setdefault((name, count), []).append(row)
                figure = row.get("failed") or f"{row['seconds']:.3f} s"
                print(f"round {number + 1} of {setting.processes}: {name}, {count} frames: {figure}", file=sys.stderr)
            if number == 0:
                yield rounds
        yield rounds


def run_guarded(setting: Setting, name: str, frames: list[int]) -> list[Row]:
    """Run a row in a fresh process; one that the system kills is named, not fatal."""
    try:
        return run_in_fresh_process(run_pipeline, setting, name, frames)
    except Exception as error:
        return [{"failed": f"the process died ({type(error).__name__}); out of memory?"} for _ in frames]


def summarise(rows: Sequence[Row], base: Sequence[Row]) -> Row:
    """Medians over the rounds, and ratios to the baseline within a round."""
    failures = sorted({row["failed"] for row in rows if "failed" in row})
    if failures:
        return {"failed": ", ".join(failures)}
    columns = {name: [row[name] for row in rows] for name in (*FIGURES, *BYTES)}
    ratios = {}
    if base and not any("failed" in row for row in base):
        for name in ("seconds", "peak_bytes"):
            ratios[f"{name}_ratio"] = ratio(columns[name], [row[name] for row in base])
    fixed = {name: value for name, value in rows[0].items() if name not in (*columns, "batches")}
    batches = [summarise_batch([row["batches"][index] for row in rows]) for index in range(len(rows[0]["batches"]))]
    return {**{name: spread(values) for name, values in columns.items()}, **ratios, **fixed, "batches": batches}


def summarise_batch(rows: Sequence[Row]) -> Row:
    """Medians of one batch size over the rounds."""
    failures = sorted({row["failed"] for row in rows if "failed" in row})
    figures = (
        {"failed": ", ".join(failures)} if failures else {name: spread([row[name] for row in rows]) for name in RATES}
    )
    return {"batch_size": rows[0]["batch_size"], **figures}


def add_derived(row: Row, setting: Setting, peak: float) -> Row:
    """FLOPs, floors and what of them was reached."""
    if "failed" in row:
        return row
    pipeline = setting.pipelines()[row["pipeline"]]
    shape, layers, frames = pipeline.scale.shape(), row["tokens_per_layer"], row["frames"]
    flops = count_row(pipeline, frames, layers)
    buffers = 4 * layers[0] * shape.hidden_size * shape.bytes_per_value
    return {
        **row,
        "flops": flops.to_dict(),
        "table5_flops": table5_accounting(pipeline, frames, layers),
        "paper_flops": paper_number(row["pipeline"], "flops", frames),
        "floor_seconds": flops.total / peak,
        "prefill_utilisation": flops.decoder / peak / row["prefill_seconds"]["median"],
        "floor_bytes": row["weight_bytes"] + row["kv_bytes"] + buffers,
    }


def summarise_rounds(setting: Setting, rounds: Rounds, base: str, peak: float) -> list[Row]:
    """Every row at every number of frames."""
    pipelines, rows = setting.pipelines(), []
    for (name, count), raw in rounds.items():
        row = {"pipeline": name, "note": pipelines[name].note, "frames": count}
        row.update(summarise(raw, rounds.get((base, count), [])))
        rows.append(add_derived(row, setting, peak))
    return rows


def measure(setting: Setting, names: Sequence[str], frames: Sequence[int], *, scaling: bool) -> Iterator[Row]:
    """Everything the result file holds, again after each step; the last is finished."""
    matmul = [run_in_fresh_process(run_matmul, setting) for _ in range(setting.processes)]
    matmul = {name: spread([row[name] for row in matmul]) for name in matmul[0]}
    base = BASELINE if BASELINE in names else names[0]
    result = {
        **provenance(setting.device),
        "scaling": scaling,
        "base": base,
        "setting": asdict(setting),
        "matmul": matmul,
    }
    for rounds in measure_rounds(setting, names, frames):
        rows = summarise_rounds(setting, rounds, base, matmul["flops_per_second"]["median"])
        targets = targets_of(asdict(setting), rounds, rows, scaling=scaling)
        done = len(rounds) == len(names) * len(frames) and len(rounds[names[0], frames[0]]) == setting.processes
        yield {**result, "finished": done, "rows": rows, "targets": targets}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_rounds(parser)
    add_choice_of_rows(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="of generation: 1 on a CPU, on CUDA 1 4 16")
    parser.add_argument(
        "--batch-frames", type=int, nargs="+", help="frames at which batches of more than one run: the fewest"
    )
    parser.add_argument("--new-tokens", type=int, default=120, help="generated tokens, as in the paper; 0 for none")
    parser.add_argument("--cache-implementation", choices=("static",), help="of generation, for every row")
    parser.add_argument("--scaling", action="store_true", help="ELVA's rows alone, 8 to 256 frames, no generation")
    parser.add_argument(
        "--derived", action="store_true", help="FLOPs from the shapes alone, of 7b by default; runs nothing"
    )
    return parser.parse_args()


def make_setting(arguments: argparse.Namespace, frames: Sequence[int]) -> Setting:
    """The setting that the options give."""
    on_gpu = arguments.device == "cuda"
    return Setting(
        size=arguments.size or usual_size(arguments.device),
        device=arguments.device,
        dtype=arguments.dtype,
        attention=arguments.attention,
        threads=arguments.threads,
        processes=arguments.processes,
        new_tokens=0 if arguments.scaling else arguments.new_tokens,
        batch_sizes=tuple(arguments.batch_sizes or ((1, 4, 16) if on_gpu else (1,))),
        batch_frames=tuple(arguments.batch_frames or [min(frames)]),
        merge_schedule=arguments.merge_schedule,
        cache_implementation=arguments.cache_implementation,
    )


def file_stem(setting: Setting, *, scaling: bool) -> str:
    """Name of the result files: what is not usual stands in it, so that no run replaces another kind of run."""
    words = ["table5", *(["scaling"] if scaling else []), setting.device]
    words += [setting.dtype] if setting.dtype != USUAL_DTYPE else []
    return "-".join([*words, *([setting.cache_implementation] if setting.cache_implementation else [])])


def main() -> int:
    """Measure or derive, and write the result files; 1 if a row failed for another reason than memory."""
    arguments = parse_arguments()
    if arguments.derived:
        origin: dict[str, Any] = {key: value for key, value in provenance("cpu").items() if key != "device"}
        result = derived_result(arguments.size or "7b", origin)
        write_results(arguments.out, "table5-flops", result, derived_markdown(result))
        print(f"wrote {arguments.out / 'table5-flops'}.json and .md")
        return 0
    scaling = arguments.scaling
    usual = SCALING_FRAMES if scaling else usual_frames(arguments.device)
    frames = sorted(set(arguments.frames or usual))
    setting = make_setting(arguments, frames)
    known = ELVA_ROWS if scaling else tuple(setting.pipelines())
    names = choose_rows(arguments.only, known)
    stem = file_stem(setting, scaling=scaling)
    for result in measure(setting, names, frames, scaling=scaling):
        result["chart"] = f"{stem}.png" if draw_times(result, arguments.out / f"{stem}.png") else None
        write_results(arguments.out, stem, result, as_markdown(result))
    print(f"wrote {arguments.out / stem}.json and .md")
    failed = [row for row in result["rows"] if row.get("failed", "out of memory") != "out of memory"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
