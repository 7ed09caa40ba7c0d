"""What a training step costs: time, memory and MFU, by attention, guidance, checkpointing, optimiser and merging.

    python benchmarks/training.py                            # CPU: hidden size 512, 12 layers, two short clips
    python benchmarks/training.py --device cuda --size 1.5b  # GPU: the paper's 1.5B in the shape of stage 2
    python benchmarks/training.py --size tiny --out /tmp     # seconds: does it run

One call measures everything it compares, each variant in fresh processes, round by round, with random weights and
random pixels: whole optimiser steps; logits where labels are against logits everywhere; eight questions in one row that
shares its video against eight rows. What cannot run here (FlashAttention-2, DeepSpeed) is named, not left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, markdown_table, provenance, ratio, run_in_fresh_process, spread, write_results
from random_elva import make_model
from training_steps import (
    NUM_QUESTIONS,
    SIZES,
    Scale,
    Setting,
    Variant,
    make_scale,
    run_matmul,
    run_steps,
    save_teacher,
)

from elva_hf.frames_elva import count_frame_tokens
from elva_hf.ledger_elva import plan_tokens

Row = dict[str, Any]

QWEN2_VOCAB = 151936  # of the paper's decoders
BACKWARD = 2  # the backward pass costs two forward passes; recomputed activations do not count as useful


STEPS = {
    "plain": Variant(),
    "gradient checkpointing": Variant(checkpointing=True),
    "AdamW not fused": Variant(optimizer="foreach"),
    "ZeRO-2, bf16 weights": Variant(optimizer="zero2"),
    "guidance, cached targets": Variant(guidance="cached"),
    "guidance, teacher on the fly": Variant(guidance="teacher"),
    "merging (table5)": Variant(merge_schedule="table5"),
    "flash_attention_2": Variant(attention="flash_attention_2"),
    "flash_attention_2, merging (table5)": Variant(attention="flash_attention_2", merge_schedule="table5"),
}
LOGITS = {
    "where labels are": Variant(vocab_size=QWEN2_VOCAB),
    "everywhere": Variant(vocab_size=QWEN2_VOCAB, logits="all"),
}
PACKING = {
    "one row": Variant(rows="one", checkpointing=True),
    "eight rows": Variant(rows="eight", checkpointing=True),
}


def step_flops(scale: Scale, variant: Variant) -> int:
    """FLOPs a step needs: three forward passes of the student, logits where labels are; no teacher."""
    text = scale.question + scale.caption
    plan = plan_tokens([scale.frames * (scale.grid,)], scale.config, variant.merge_schedule, text)
    flops = plan.count_flops(num_logits=scale.caption)
    if not flops.is_exact:
        raise ValueError(
            f"what {variant.merge_schedule!r} keeps depends on the pixels; benchmark a schedule of ratios."
        )
    return scale.batch_size * (1 + BACKWARD) * flops.maximum.total


def measure_rounds(variants: dict[str, tuple[Callable[..., Row], ...]], rounds: int) -> dict[str, list[Row]]:
    """Run every variant once a round, each time in a fresh process."""
    rows: dict[str, list[Row]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, (function, *args) in variants.items():
            row = run_in_fresh_process(function, *args)
            rows[name].append(row)
            figure = row.get("failed") or f"{row['seconds']:.3f} s"
            print(f"round {number + 1} of {rounds}: {name}: {figure}", file=sys.stderr)
    return rows


def summarise(rows: list[Row], base: list[Row]) -> Row:
    """Medians over the processes, and ratios to the base."""
    failures = {row["failed"] for row in rows if "failed" in row}
    if failures:
        return {"failed": ", ".join(sorted(failures))}
    measured = ("seconds", "wall_seconds", "held_bytes", "peak_bytes")
    columns = {name: [row[name] for row in rows] for name in measured}
    compared = {} if any("failed" in row for row in base) else {name: [row[name] for row in base] for name in measured}
    return {
        **{name: spread(values) for name, values in columns.items()},
        **{f"{name}_ratio": ratio(columns[name], values) for name, values in compared.items()},
        **{name: value for name, value in rows[0].items() if name not in measured},
    }


def compare(setting: Setting, variants: dict[str, Variant], base: str, teacher: str = "") -> list[Row]:
    """Each variant that can run here, as ratios to one of them; with the reason why the others cannot."""
    obstacles = {name: variant.obstacle(setting.device) for name, variant in variants.items()}
    runs = {
        name: (run_steps, setting, variant, teacher) for name, variant in variants.items() if obstacles[name] is None
    }
    rows = measure_rounds(runs, setting.processes)
    return [
        {"run": name, **(summarise(rows[name], rows[base]) if name in rows else {"failed": obstacles[name]})}
        for name in variants
    ]


def compare_steps(setting: Setting, matmul: list[Row]) -> list[Row]:
    """Every way to take a step, with throughput and MFU."""
    scale = setting.make()
    with tempfile.TemporaryDirectory() as teacher:
        run_in_fresh_process(save_teacher, setting, teacher)
        rows = compare(setting, STEPS, "plain", teacher)
    peak = spread([row["flops_per_second"] for row in matmul])["median"]
    for row in rows:
        if "failed" in row:
            continue
        seconds, flops = row["seconds"]["median"], step_flops(scale, STEPS[row["run"]])
        row.update(
            tokens_per_second=row["tokens"] / seconds,
            samples_per_second=row["samples"] / seconds,
            flops=flops,
            mfu=flops / seconds / peak,
        )
    return rows


ABOUT = (
    "A Qwen2-shaped ELVA with random weights ({parameters} M parameters, hidden size {hidden}, {layers} layers, "
    "vocabulary {vocab}), {threads} CPU thread(s), medians of {processes} fresh processes with {steps} steps each "
    "after {warmup}. A step is forward, backward, clipping and AdamW, from a batch on the host; float32 weights under "
    "bf16 autocast if nothing else is said. Time is {clock}. `held` is weights and optimiser state between steps, "
    "`peak` what a step needs on top: gradients and activations. Nothing here says anything about quality."
)
STEPS_TEXT = (
    "{batch} clips of {frames} frames of {rows}x{columns} patches ({frame_tokens} tokens each), {question} tokens of "
    "question and {caption} of caption: {tokens} tokens a step. Ratios to `plain`: sdpa, no guidance, no merging, no "
    "checkpointing, fused AdamW. The teacher is a SigLIP tower of {teacher_layers} layers and width {teacher_width} at "
    "{image_size} pixels. MFU counts three forward passes of the student (token ledger: causal attention, logits where "
    "labels are), neither the teacher nor recomputed activations, against {peak:.3g} TFLOP/s: the measured bf16 "
    "product of {matmul}x{matmul} matrices."
)
LOGITS_TEXT = (
    "The same step as `plain`, with the {vocab} tokens of Qwen2; {supervised} of {tokens} positions have a label. "
    "Ratios to logits everywhere."
)
PACKING_TEXT = (
    "{questions} questions of {question} tokens with answers of {answer} about one clip: one row, in which every "
    "question sees the clip and itself, against a row for each. Same supervision ({supervised} tokens), gradient "
    "checkpointing in both. Ratios to eight rows."
)


def describe(setting: Setting) -> Row:
    """What the texts name."""
    scale = make_scale(setting.size)
    text = scale.config.text_config
    with torch.device("meta"):
        parameters = sum(
            weight.numel() for weight in make_model(scale.config, "meta", torch.float32, "sdpa").parameters()
        )
    return {
        "about": ABOUT.format(
            **asdict(setting),
            parameters=round(parameters / 1e6),
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            vocab=text.vocab_size,
            clock="wall time" if setting.device == "cuda" else "process CPU time",
        )
    }


def as_markdown(result: Row) -> str:
    """The result as tables."""
    scale = make_scale(result["setting"]["size"])
    plain, packed = result["steps"][0], result["packing"][0]
    steps_text = STEPS_TEXT.format(
        batch=result["setting"]["batch_size"],
        frames=scale.frames,
        rows=scale.grid[0],
        columns=scale.grid[1],
        frame_tokens=count_frame_tokens(scale.grid),
        question=scale.question,
        caption=scale.caption,
        tokens=plain.get("tokens"),
        teacher_layers=scale.teacher["num_hidden_layers"],
        teacher_width=scale.teacher["hidden_size"],
        image_size=scale.teacher["image_size"],
        peak=result["matmul"]["flops_per_second"]["median"] / 1e12,
        matmul=scale.matmul,
    )
    labels = result["logits"][0]
    logits_text = LOGITS_TEXT.format(
        supervised=labels.get("supervised"), tokens=labels.get("tokens"), vocab=QWEN2_VOCAB
    )
    packing_text = PACKING_TEXT.format(
        questions=NUM_QUESTIONS, question=scale.question, answer=scale.answer, supervised=packed.get("supervised")
    )
    parts = [
        "# Training steps",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}, "
        f"torch {result['torch']}, transformers {result['transformers']}.",
        result["about"],
        "## Ways to take a step",
        steps_text,
        steps_table(result["steps"]),
        *not_run(result["steps"]),
        "## Logits where labels are",
        logits_text,
        ratio_table(result["logits"], "logits"),
        *not_run(result["logits"]),
        "## Many questions about one clip",
        packing_text,
        ratio_table(result["packing"], "questions in"),
        *not_run(result["packing"]),
    ]
    return "\n\n".join(parts) + "\n"


def steps_table(rows: list[Row]) -> str:
    """One line for each way that ran."""
    header = ["step", "time", "peak", "time, s", "tokens/s", "samples/s", "MFU", "held, MB", "peak, MB"]
    return markdown_table(
        header,
        (
            (
                *(row["run"], row.get("seconds_ratio"), row.get("peak_bytes_ratio"), _seconds(row)),
                *(f"{row['tokens_per_second']:.0f}", row["samples_per_second"], f"{100 * row['mfu']:.1f} %"),
                *(_megabytes(row, "held_bytes"), _megabytes(row, "peak_bytes")),
            )
            for row in rows
            if "failed" not in row
        ),
    )


def ratio_table(rows: list[Row], what: str) -> str:
    """One line for each side of a comparison."""
    header = [what, "tokens", "time", "peak", "time, s", "peak, MB"]
    return markdown_table(
        header,
        (
            (
                *(row["run"], row["tokens"], row.get("seconds_ratio"), row.get("peak_bytes_ratio")),
                *(_seconds(row), _megabytes(row, "peak_bytes")),
            )
            for row in rows
            if "failed" not in row
        ),
    )


def not_run(rows: list[Row]) -> list[str]:
    """A line that names what is missing from a table, and why."""
    missing = [f"`{row['run']}` ({row['failed']})" for row in rows if "failed" in row]
    return [f"Not measured: {', '.join(missing)}."] if missing else []


def _seconds(row: Row) -> str:
    figure = row["seconds"]
    return f"{figure['median']:.3f} ({figure['min']:.3f} to {figure['max']:.3f})"


def _megabytes(row: Row, name: str) -> str | None:
    return None if row[name] is None else f"{row[name]['median'] / 1e6:.0f}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="model, teacher and clips")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, help="clips in a step; the size's own by default")
    parser.add_argument("--warmup", type=int, help="steps before the clock starts: 1, on CUDA 3")
    parser.add_argument("--steps", type=int, help="steps that are measured: 3, on CUDA 10")
    parser.add_argument("--processes", type=int, default=3, help="rounds, each variant in a fresh process")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


def main() -> None:
    """Measure everything and write the result files."""
    arguments = vars(parse_arguments())
    out = arguments.pop("out")
    warmup, steps = (3, 10) if arguments["device"] == "cuda" else (1, 3)
    defaults = {"batch_size": make_scale(arguments["size"]).batch_size, "warmup": warmup, "steps": steps}
    setting = Setting(**{**arguments, **{name: arguments[name] or value for name, value in defaults.items()}})
    matmul = measure_rounds({"matmul": (run_matmul, setting)}, setting.processes)["matmul"]
    result = {
        **provenance(setting.device),
        **describe(setting),
        "setting": asdict(setting),
        "matmul": {name: spread([row[name] for row in matmul]) for name in matmul[0]},
        "steps": compare_steps(setting, matmul),
        "logits": compare(setting, LOGITS, "everywhere"),
        "packing": compare(setting, PACKING, "eight rows"),
    }
    write_results(out, f"training-{setting.device}", result, as_markdown(result))
    print(f"wrote {out / f'training-{setting.device}'}.json and .md")


if __name__ == "__main__":
    main()
