"""ELVA, Video-Panda and Mavors side by side: one decoder, equal steps, equal frames, several seeds.

    python benchmarks/siblings.py            # 5 seeds: 15 runs of some 4 minutes on a CPU core; resumes what is there
    python benchmarks/siblings.py --quick    # does the script work; keeps nothing

Accuracy is that of `claims/siblings.py`, trained and kept as the claims are. Tokens and FLOPs are derived from the
shapes, for one clip and one question; time to the first token is measured, and does not depend on training.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import teachers
from claims.protocol import SEEDS, Claim, Variant
from claims.report import summarise
from claims.run import BLIND_SCENES, QUICK_BLIND_SCENES, common_columns, shorten_budget
from claims.runs import finish_runs, plan_runs
from claims.siblings import CLAIM
from claims.tables import Result, describe, mean_of_columns
from claims.trainer import build_model, count_parameters, train
from claims.worlds import WORLDS
from measuring import RESULTS, Meter, markdown_table, provenance, ratio, run_in_fresh_process, spread, write_results
from transformers import BatchFeature

from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import FRAME_SIZE, questions, render, sample_scene
from elva_hf.ledger_elva import plan_tokens
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.training.toy import build_processor

NAME = "siblings"
REPEATS, ROUNDS = 20, 5
VISION = "patch_embed."

TEXT = """# ELVA, Video-Panda and Mavors at an equal decoder

No paper compares the three; nothing here confirms or contradicts one. {num_seeds} seeds, {steps} steps of {batch_size}
clips of {frames} frames of 64x64 pixels, {questions} questions a clip, on the procedural world. {notes}

{made}

{costs}

Accuracy: exact match on {test_scenes} test scenes, mean of the columns below and of seeds; "other video" asks each
question about another scene's video. Parameters: vision is all that stands before the decoder. Tokens: of one clip,
without text. FLOPs (derived): from pixels to the logits of the last position, {text_tokens} text tokens; two for each
multiplication with addition, products of matrices only, causal attention counted as causal; "vision" is everything
before the decoder. First token (measured): {clock} from ready pixels to the first token on the host, one clip, batch of
1, {repeats} repetitions in each of {rounds} fresh processes a row, one thread, median with minimum and maximum; "of
ELVA's" is the median of the ratios within a round.

{by_column}

"Blind" is the best answerer that never looks: the commonest answer to each question, counted on {blind_scenes}.
Intervals are Student's, 95 %, of differences within a seed; positive: the first one is better. None is corrected for
the number of comparisons, and there is no verdict.

Measured: `{command}`, {device}, commit {commit}, {date}.
"""


# What a clip costs


def show_clip(model: ElvaForCausalLM, num_frames: int) -> BatchFeature:
    """One clip of the world and a question about it, as the model's own processor writes them."""
    processor = build_processor(build_toy_tokenizer(), model.config)
    scene = sample_scene(0, num_frames=num_frames, split="test")
    content = [{"type": "video", "video": render(scene)}, {"type": "text", "text": questions(scene)[0].text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"num_frames": num_frames, "return_tensors": "pt"},
    )


def count_costs(variant: Variant, num_frames: int) -> dict[str, Any]:
    """Parameters, tokens and FLOPs of a variant for one clip and one question."""
    model = build_model(variant, 0, build_toy_tokenizer())
    side = FRAME_SIZE // model.config.patch_size
    video = [[(side, side)] * num_frames]
    others = show_clip(model, num_frames)["input_ids"].shape[1] - plan_tokens(video, model.config).num_tokens
    plan = plan_tokens(video, model.config, text_tokens=others)
    flops = plan.flops.maximum  # nothing merges
    sizes = {name: weight.numel() for name, weight in model.model.named_parameters()}
    return {
        "vision_parameters": sum(size for name, size in sizes.items() if name.startswith(VISION)),
        "parameters": count_parameters(model),
        "visual_tokens": plan.num_visual_tokens,
        "text_tokens": plan.text_tokens,
        "flops": {**asdict(flops), "total": flops.total},
    }


@torch.no_grad()
def time_first_token(variant: Variant, num_frames: int, device: str, repeats: int) -> dict[str, Any]:
    """Seconds from ready pixels to the first token, mean of some repetitions in this process after one more."""
    torch.set_num_threads(1)
    model = build_model(variant, 0, build_toy_tokenizer()).to(device).eval()
    inputs = show_clip(model, num_frames).to(device)

    def first_token() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    first_token()
    with Meter(device, memory=False) as meter:
        for _ in range(repeats):
            first_token()
    return {"seconds": meter.seconds / repeats, "wall_seconds": meter.wall_seconds / repeats}


Call = Callable[..., Any]


def measure_costs(
    variants: Sequence[Variant], num_frames: int, device: str, *, repeats: int, rounds: int, call: Call
) -> dict[str, Any]:
    """Costs of each variant; times in rounds, all variants one after another.

    Args:
        variants: The first is what the others are compared with.
        num_frames: Of the clip.
        device: `"cpu"` or `"cuda"`.
        repeats: First tokens in a process.
        rounds: Processes of each variant.
        call: Calls a function with arguments, in a process of its own.
    """
    costs = {variant.name: count_costs(variant, num_frames) for variant in variants}
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            times[variant.name].append(call(time_first_token, variant, num_frames, device, repeats)["seconds"])
    base = times[variants[0].name]
    for name, cost in costs.items():
        cost["first_token"] = {"seconds": spread(times[name]), "of_first": ratio(times[name], base)}
    return costs


# The page


def make_page(result: Result) -> str:
    """The page, from the figures alone."""
    budget = result["budget"]
    return TEXT.format(
        **{**budget, **result, "frames": " and ".join(map(str, budget["frames"]))},
        num_seeds=len(result["seeds"]),
        made="\n".join(f"- {row['variant']}: {describe(row['made'])}." for row in result["variants"]),
        costs=_cost_table(result),
        by_column=_column_table(result),
        clock="CPU time" if result["on"] == "cpu" else "wall time",
        text_tokens=next(iter(result["cost"].values()))["text_tokens"],
    )


def _cost_table(result: Result) -> str:
    rows = []
    for row in result["variants"]:
        cost = result["cost"][row["variant"]]
        flops, seconds = cost["flops"], cost["first_token"]["seconds"]
        final, other = np.mean(list(row["final"].values()), 0), row["swapped"]
        rows.append(
            [
                row["variant"],
                f"{cost['vision_parameters']:,}",
                f"{cost['parameters']:,}",
                cost["visual_tokens"],
                f"{flops['patch_embed'] / 1e6:.1f}",
                f"{flops['total'] / 1e6:.1f}",
                "{median:.1f} ({min:.1f} to {max:.1f})".format(**{key: 1e3 * value for key, value in seconds.items()}),
                f"{cost['first_token']['of_first']:.2f}",
                f"{final.mean():.3f}",
                f"{min(final):.2f} to {max(final):.2f}",
                f"{mean_of_columns(other):.2f}" if other else None,
            ]
        )
    blind = float(np.mean(list(result["blind"].values())))
    rows.append(["blind", *[None] * 7, f"{blind:.3f}", None, None])
    header = ["model", "vision parameters", "all parameters", "visual tokens", "vision MFLOPs", "MFLOPs"]
    header += ["first token, ms", "of ELVA's", "accuracy", "over seeds", "other video"]
    return markdown_table(header, rows)


def _column_table(result: Result) -> str:
    pairs = result["comparisons"]
    rows = [
        [
            column,
            f"{result['blind'][column]:.2f}",
            *(f"{np.mean(row['final'][column]):.2f}" for row in result["variants"]),
            *(_interval(pair["by_column"][column]) for pair in pairs),
        ]
        for column in result["columns"]
    ]
    means = [f"{mean_of_columns(row['final']):.2f}" for row in result["variants"]]
    blind = f"{np.mean(list(result['blind'].values())):.2f}"
    rows.append(["mean", blind, *means, *(_interval(pair["final accuracy"]) for pair in pairs)])
    header = ["column", "blind", *(row["variant"] for row in result["variants"])]
    return markdown_table([*header, *(f"{pair['better']} less {pair['worse']}" for pair in pairs)], rows)


def _interval(found: Mapping[str, Any]) -> str:
    low, high = found["t_interval"]
    return f"{found['mean']:+.2f} ({low:+.2f} to {high:+.2f})"


def without_verdicts(result: Result) -> Result:
    """The result, in which differences are told and nothing is judged."""
    kept = ("final accuracy", "by_column")
    pairs = [
        {"better": pair["better"], "worse": pair["worse"], **{name: _unjudged(pair[name]) for name in kept}}
        for pair in result["comparisons"]
    ]
    return {**result, "comparisons": pairs}


def _unjudged(found: Any) -> Any:
    if "verdict" not in found:
        return {name: _unjudged(value) for name, value in found.items()}
    return {name: value for name, value in found.items() if name != "verdict"}


# The script


def compare_siblings(
    claim: Claim, folder: Path, options: argparse.Namespace, stamp: Mapping[str, Any], call: Call
) -> Result:
    """Finish the runs, count and time.

    Args:
        claim: What is trained.
        folder: Of the finished runs.
        options: `seeds`, `device`, `jobs` and `quick`.
        stamp: Commit, date, versions, device and command.
        call: See `measure_costs`.
    """
    runs = plan_runs(claim, options.seeds, options.device)
    prepare = partial(teachers.prepare, plan=teachers.QUICK_PLAN if options.quick else teachers.PLAN)
    lines = finish_runs(runs, folder / f"{NAME}.jsonl", train, jobs=options.jobs, stamp=stamp, prepare=prepare)
    fitted, scored = QUICK_BLIND_SCENES if options.quick else BLIND_SCENES
    blind = WORLDS[claim.budget.world].blind(claim.budget, fitted, scored)
    if options.quick:
        claim = replace(claim, columns=common_columns(lines, blind, claim.columns))
    blind_scenes = f"{fitted:,} training scenes, scored on {scored:,} test scenes"
    result = without_verdicts(summarise(claim, lines, blind, blind_scenes, stamp["command"]))
    repeats, rounds = (1, 1) if options.quick else (REPEATS, ROUNDS)
    frames = max(claim.budget.frames)
    cost = measure_costs(claim.variants, frames, options.device, repeats=repeats, rounds=rounds, call=call)
    return {**result, "on": options.device, "repeats": repeats, "rounds": rounds, "cost": cost}


def main(arguments: Sequence[str] | None = None, call: Call = run_in_fresh_process) -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="processes that train, one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="folder of the finished runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one seed, three steps; keeps nothing")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    stamp = {**provenance(options.device), "command": shlex.join(["python", "benchmarks/siblings.py", *words])}
    if not options.quick:
        result = compare_siblings(CLAIM, options.runs, options, stamp, call)
        write_results(options.out, NAME, result, make_page(result))
        return
    options.seeds, options.jobs = 1, 1
    claim = replace(CLAIM, budget=shorten_budget(CLAIM.budget))
    with tempfile.TemporaryDirectory() as folder:
        print(make_page(compare_siblings(claim, Path(folder), options, stamp, call)))
        print("nothing is kept")


if __name__ == "__main__":
    main()
