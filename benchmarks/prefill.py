"""What merging inside the decoder saves before the first token, and what it costs.

    python benchmarks/prefill.py                          # CPU: hidden size 512, 12 layers, 128 frames of 336x336
    python benchmarks/prefill.py --device cuda --size 7b  # GPU: the paper's decoder

One call measures four things, each variant in fresh processes, round by round, with the same random weights:
time to first token, peak memory and KV cache under each merge schedule; a batch of unlike videos against the same
videos alone and against left padding; the share of prefill that the merge steps take; an MLP in chunks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import RESULTS, Meter, markdown_table, provenance, ratio, run_in_fresh_process, spread, write_results
from pipelines import ModelSetting, Row
from random_elva import SIZES, Clip, Size, make_inputs, make_model, make_size
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, Qwen2Config

from elva_hf import decoder_elva
from elva_hf.decoder_elva import merge_step
from elva_hf.frames_elva import count_frame_tokens
from elva_hf.mlp_elva import mlp_in_chunks, mlp_rows

Schedule = str | list[dict[str, Any]]

HEAD_DIM = 128  # of the single layer, as in Qwen2-1.5B
BATCH_SIMILARITY = {"static": (0.95, 1.0), "slow": (0.5, 1.0), "mixed": (0.2, 1.0), "busy": (0.0, 0.6)}
BATCH_TEXT = (1, 2 / 3, 1 / 3, 1 / 6)  # text of each clip, as a share of the usual


@dataclass(frozen=True)
class Setting(ModelSetting):
    """How every variant of a run is measured."""

    frames: int

    def model(self, size: Size) -> nn.Module:
        """The random model."""
        return make_model(size.config, self.device, getattr(torch, self.dtype), self.attention)

    def inputs(self, clips: list[Clip], size: Size) -> dict[str, Tensor]:
        """A batch of clips on the device."""
        return make_inputs(clips, size.config, self.device, getattr(torch, self.dtype))


def schedules(size: Size) -> dict[str, Schedule]:
    """The schedules to compare."""
    halvings = [{"layer": layer, "target_ratio": 0.5} for layer in size.halvings]
    return {"none": "none", "four halvings": halvings, "paper": "paper", "table5": "table5"}


# What one fresh process does.


@torch.no_grad()
def first_token(model: nn.Module, inputs: dict[str, Tensor], schedule: Schedule) -> Any:
    """Prefill, up to the first token on the host; returns the outputs."""
    outputs = model(**inputs, use_cache=True, logits_to_keep=1, merge_schedule=schedule)
    outputs.logits[:, -1].argmax(-1).tolist()
    return outputs


def cache_figures(outputs: Any, inputs: dict[str, Tensor]) -> Row:
    """Bytes of the KV cache, and how many tokens of each sample every layer keeps."""
    cache = outputs.past_key_values
    tokens = getattr(cache, "tokens_per_layer", None)  # a plain cache holds every token in every layer
    if tokens is None:
        tokens = inputs["attention_mask"].sum(1).expand(len(cache.layers), -1)
    return {
        "kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
        "tokens_per_layer": tokens.cpu(),
    }


def run_prefill(setting: Setting, schedule: Schedule, batches: list[list[Clip]]) -> Row:
    """Measure the first tokens of some batches, one after the other."""
    size = setting.make().size
    model = setting.model(size)
    inputs = [setting.inputs(clips, size) for clips in batches]
    warm_up(setting, size, model, inputs, schedule)
    figures = []
    with Meter(setting.device) as meter:
        for batch in inputs:
            figures.append(cache_figures(first_token(model, batch, schedule), batch))
    return {
        **meter.figures(),
        "input_tokens": sum(int(batch["attention_mask"].sum()) for batch in inputs),
        "kv_bytes": sum(figure["kv_bytes"] for figure in figures),
        "tokens_per_layer": torch.cat([figure["tokens_per_layer"] for figure in figures], 1).tolist(),
    }


def warm_up(
    setting: Setting, size: Size, model: nn.Module, inputs: list[dict[str, Tensor]], schedule: Schedule
) -> None:
    """Load kernels: on a GPU with the inputs themselves, on a CPU with a clip of two frames."""
    if setting.device != "cuda":
        inputs = [setting.inputs([Clip.of(size, 2)], size)]
    for batch in inputs:
        first_token(model, batch, schedule)


@torch.no_grad()
def run_left_padded(setting: Setting, schedule: Schedule, clips: list[Clip]) -> Row:
    """Measure what the same tokens cost in rows padded to the longest."""
    size = setting.make().size
    model = setting.model(size)
    inputs = setting.inputs(clips, size)
    tokens = cache_figures(first_token(model, inputs, schedule), inputs)["tokens_per_layer"].tolist()
    decoder = model.model.language_model
    decoder.set_attn_implementation("sdpa")
    embeddings = torch.randn(len(clips), max(tokens[0]), size.config.text_config.hidden_size)
    embeddings = embeddings.to(inputs["pixel_values_videos"])
    with Meter(setting.device) as meter:
        hidden, cache = left_padded_prefill(decoder, embeddings, tokens)
        model.lm_head(hidden[:, -1:]).argmax(-1).tolist()
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {**meter.figures(), "kv_bytes": kv_bytes, "tokens_per_layer": tokens}


@torch.no_grad()
def left_padded_prefill(decoder: nn.Module, hidden: Tensor, tokens: list[list[int]]) -> tuple[Tensor, DynamicCache]:
    """Run a stock decoder's layers over left-padded rows with a 4-D mask, at the lengths that merging left.

    Rows are cut, not merged: a left-padded run with merging would cost this and the merge. With equal lengths
    in all layers it is the stock decoder itself.

    Args:
        decoder: The text decoder.
        hidden: `(B, N, D)`.
        tokens: Tokens of each sample in every layer.

    Returns:
        `(B, n, D)` hidden states and the cache.
    """
    cache = DynamicCache()
    for index, layer in enumerate(decoder.layers):
        if index == 0 or tokens[index] != tokens[index - 1]:
            hidden = hidden[:, -max(tokens[index]) :]
            lengths = torch.tensor(tokens[index], device=hidden.device)
            mask = left_padding_mask(lengths, hidden.shape[1])
            columns = torch.arange(hidden.shape[1], device=hidden.device)
            rotations = decoder.rotary_emb(hidden, columns[None])  # rotary positions only count as differences
        hidden = layer(
            hidden, attention_mask=mask, past_key_values=cache, use_cache=True, position_embeddings=rotations
        )
    return decoder.norm(hidden), cache


def left_padding_mask(lengths: Tensor, width: int) -> Tensor:
    """Causal `(B, 1, width, width)` bool mask of left-padded rows; padding sees itself."""
    column = torch.arange(width, device=lengths.device)
    real = column >= width - lengths[:, None]
    causal = column <= column[:, None]
    return (causal & real[:, None, None]) | torch.eye(width, dtype=torch.bool, device=lengths.device)


@contextmanager
def metered_merge_steps(device: str) -> Iterator[list[Meter]]:
    """A meter for every merge step of the prefills under `with`."""
    steps: list[Meter] = []

    def measured_step(*args: Any) -> Any:
        with Meter(device, memory=False) as meter:
            tokens = merge_step(*args)
        steps.append(meter)
        return tokens

    with mock.patch.object(decoder_elva, "merge_step", measured_step):
        yield steps


def run_merge_share(setting: Setting, schedule: Schedule, clip: Clip) -> Row:
    """Measure how much of prefill the merge steps take: similarity, choice of pairs, means, compaction."""
    size = setting.make().size
    model = setting.model(size)
    inputs = setting.inputs([clip], size)
    warm_up(setting, size, model, [inputs], schedule)
    with metered_merge_steps(setting.device) as steps, Meter(setting.device) as whole:
        first_token(model, inputs, schedule)
    merging = sum(step.seconds for step in steps)
    return {"seconds": whole.seconds, "merge_seconds": merging, "share": merging / whole.seconds, "steps": len(steps)}


@torch.no_grad()
def run_layer(setting: Setting, chunked: bool) -> Row:
    """Measure one decoder layer over a long row, with its MLP in chunks or not."""
    hidden_size, intermediate_size, tokens = setting.make().size.mlp_shape
    config = Qwen2Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=2,
        vocab_size=16,
    )
    dtype = getattr(torch, setting.dtype)
    with torch.device(setting.device):
        decoder = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        hidden = torch.randn(1, tokens, hidden_size, dtype=dtype)
        rotations = decoder.rotary_emb(hidden, torch.arange(tokens)[None])
    layer = decoder.layers[0]
    layer(hidden[:, :8], position_embeddings=tuple(part[:, :8] for part in rotations))  # warm up
    with (
        mlp_in_chunks(decoder.layers, tokens if chunked else 0),
        Meter(setting.device) as meter,
    ):
        layer(hidden, position_embeddings=rotations)
    return meter.figures()


# What one call does with them.


def measure_rounds(variants: dict[str, tuple[Callable[..., Row], ...]], rounds: int) -> dict[str, list[Row]]:
    """Run every variant once a round, each time in a fresh process."""
    rows: dict[str, list[Row]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, (function, *args) in variants.items():
            rows[name].append(run_in_fresh_process(function, *args))
            print(f"round {number + 1} of {rounds}: {name}: {rows[name][-1]['seconds']:.2f} s", file=sys.stderr)
    return rows


def summarise(rows: list[Row], base: list[Row]) -> Row:
    """Medians over the processes, and ratios to the base."""
    measured = [name for name in ("seconds", "wall_seconds", "peak_bytes", "kv_bytes") if name in rows[0]]
    columns = {name: ([row[name] for row in rows], [row[name] for row in base]) for name in measured}
    fixed = {name: value for name, value in rows[0].items() if name not in measured}
    return {
        **{name: spread(values) for name, (values, _) in columns.items()},
        **{f"{name}_ratio": ratio(values, of_base) for name, (values, of_base) in columns.items()},
        **fixed,
    }


def compare_schedules(setting: Setting) -> list[Row]:
    """Each schedule with all frames high and with hybrid resolution, as ratios to no merging at high resolution."""
    size = setting.make().size
    variants, labels = {}, {}
    for hybrid in (False, True):
        clip = Clip.of(size, setting.frames, hybrid=hybrid)
        for schedule_name, schedule in schedules(size).items():
            name = f"{schedule_name}, {'hybrid' if hybrid else 'high'}"
            variants[name] = (run_prefill, setting, schedule, [[clip]])
            labels[name] = {"schedule": schedule_name, "resolution": "hybrid" if hybrid else "high"}
    rows = measure_rounds(variants, setting.processes)
    return [{**labels[name], **summarise(rows[name], rows["none, high"])} for name in variants]


def unlike_clips(size: Size) -> list[Clip]:
    """Four clips from static to busy, with different text."""
    return [
        Clip.of(size, size.batch_frames, similarity=similarity, text_tokens=int(share * size.text_tokens), seed=seed)
        for seed, (similarity, share) in enumerate(zip(BATCH_SIMILARITY.values(), BATCH_TEXT, strict=True))
    ]


def compare_batches(setting: Setting) -> list[Row]:
    """A batch of unlike clips, and left padding, as ratios to the clips one at a time under the same schedule."""
    clips = unlike_clips(setting.make().size)
    result = []
    for schedule in ("none", "paper"):
        rows = measure_rounds(
            {
                "alone": (run_prefill, setting, schedule, [[clip] for clip in clips]),
                "batch": (run_prefill, setting, schedule, [clips]),
                "left-padded": (run_left_padded, setting, schedule, clips),
            },
            setting.processes,
        )
        result += [{"schedule": schedule, "run": name, **summarise(rows[name], rows["alone"])} for name in rows]
    return result


def share_of_merging(setting: Setting) -> list[Row]:
    """The merge steps' share of prefill under each schedule."""
    size = setting.make().size
    clip = Clip.of(size, setting.frames)
    variants = {
        name: (run_merge_share, setting, schedule, clip) for name, schedule in schedules(size).items() if name != "none"
    }
    measured = ("seconds", "merge_seconds", "share")
    return [
        {"schedule": name, "steps": rows[0]["steps"], **{key: spread([row[key] for row in rows]) for key in measured}}
        for name, rows in measure_rounds(variants, setting.processes).items()
    ]


def compare_mlp(setting: Setting) -> list[Row]:
    """One decoder layer with its MLP whole and in chunks, as ratios to the whole."""
    shape = dict(zip(("hidden_size", "intermediate_size", "tokens"), setting.make().size.mlp_shape, strict=True))
    rows = measure_rounds(
        {"whole": (run_layer, setting, False), "in chunks": (run_layer, setting, True)}, setting.processes
    )
    at_a_time = {"whole": shape["tokens"], "in chunks": mlp_rows(torch.device(setting.device))}
    return [
        {"run": name, "rows_at_a_time": at_a_time[name], **shape, **summarise(rows[name], rows["whole"])}
        for name in rows
    ]


# What the result file shows.

ABOUT = (
    "A Qwen2-shaped ELVA with random weights (hidden size {hidden}, {layers} layers, {dtype}), {attention} attention, "
    "{threads} CPU thread(s), medians of {processes} fresh processes. Time is {clock}, from token ids and pixels to "
    "the first token on the host; peak memory is above weights and inputs. Clips are random pixels: each place draws "
    "its similarity to the next frame uniformly from 0.2 to 1, so half of its links pass the paper's threshold of 0.6, "
    "and how much a threshold merges is a property of these clips. Nothing here says anything about quality."
)
SCHEDULES_TEXT = (
    "Ratios to no merging at high resolution. `high`: {high} tokens a frame; `hybrid`: a quarter of the frames at "
    "{high}, the others at {low}. `four halvings`: target_ratio 0.5 at layers {halvings}."
)
BATCHES_TEXT = (
    "{frames} frames each, from static to busy, with {words} text tokens; ratios to the same clips one at a time under "
    "the same schedule. `left-padded` is the stock decoder with a 4-D mask; under a schedule its rows are cut to the "
    "lengths that merging left, and the merge itself costs it nothing. The peak of `alone` is that of "
    "one clip at a time."
)
SHARE_TEXT = (
    "`merge_step` (similarity, choice, means, compaction) as a share of the time to first token, high resolution."
)
MLP_TEXT = "{tokens} tokens, hidden size {hidden_size}, intermediate size {intermediate_size}; ratios to the whole."


def as_markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    size = make_size(result["setting"]["size"])
    frame_tokens = {"high": count_frame_tokens(size.high_grid), "low": count_frame_tokens(size.low_grid)}
    words = ", ".join(str(clip.text_tokens) for clip in unlike_clips(size))
    parts = [
        "# Prefill with merging inside the decoder",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}, "
        f"torch {result['torch']}, transformers {result['transformers']}.",
        result["about"],
        f"## Time to first token, {result['setting']['frames']} frames",
        SCHEDULES_TEXT.format(**frame_tokens, halvings=", ".join(map(str, size.halvings))),
        schedules_table(result["schedules"]),
        "## Four unlike clips",
        BATCHES_TEXT.format(frames=size.batch_frames, words=words),
        batches_table(result["batches"]),
        "## The merge steps' share of prefill",
        SHARE_TEXT,
        markdown_table(
            ["schedule", "steps", "share"],
            ((row["schedule"], row["steps"], f"{100 * row['share']['median']:.2f} %") for row in result["merge_share"]),
        ),
        "## One decoder layer with its MLP in chunks",
        MLP_TEXT.format(**result["mlp"][0]),
        mlp_table(result["mlp"]),
    ]
    return "\n\n".join(parts) + "\n"


def schedules_table(rows: list[Row]) -> str:
    """One line for each schedule and resolution."""
    return markdown_table(
        [
            "schedule",
            "resolution",
            "tokens",
            "left in the last layer",
            "KV cache",
            "time",
            "peak",
            "time, s",
            "peak, MB",
        ],
        (
            (
                *(row["schedule"], row["resolution"], row["input_tokens"], row["tokens_per_layer"][-1][0]),
                *(row["kv_bytes_ratio"], row["seconds_ratio"], row["peak_bytes_ratio"]),
                *(_seconds(row), _megabytes(row)),
            )
            for row in rows
        ),
    )


def batches_table(rows: list[Row]) -> str:
    """One line for each schedule and way to run the clips."""
    return markdown_table(
        ["schedule", "run", "left in the last layer", "time", "peak", "time, s", "peak, MB"],
        (
            (
                *(row["schedule"], row["run"], ", ".join(map(str, row["tokens_per_layer"][-1]))),
                *(row["seconds_ratio"], row["peak_bytes_ratio"], _seconds(row), _megabytes(row)),
            )
            for row in rows
        ),
    )


def mlp_table(rows: list[Row]) -> str:
    """One line for the whole MLP, one for chunks."""
    return markdown_table(
        ["MLP", "rows at a time", "peak", "time", "peak, MB", "time, s"],
        (
            (
                *(row["run"], row["rows_at_a_time"], row["peak_bytes_ratio"], row["seconds_ratio"]),
                *(_megabytes(row), _seconds(row)),
            )
            for row in rows
        ),
    )


def _seconds(row: Row) -> str:
    figure = row["seconds"]
    return f"{figure['median']:.2f} ({figure['min']:.2f} to {figure['max']:.2f})"


def _megabytes(row: Row) -> str | None:
    return None if row["peak_bytes"] is None else f"{row['peak_bytes']['median'] / 1e6:.0f}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="model and clips")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--frames", type=int, help="frames of a clip; 128, or 8 with --size tiny")
    parser.add_argument("--processes", type=int, default=3, help="rounds, each variant in a fresh process")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args()


def main() -> None:
    """Measure everything and write the result files."""
    arguments = vars(parse_arguments())
    out = arguments.pop("out")
    size = make_size(arguments["size"])
    setting = Setting(**{**arguments, "frames": arguments["frames"] or size.frames})
    about = ABOUT.format(
        **asdict(setting),
        hidden=size.config.text_config.hidden_size,
        layers=size.config.text_config.num_hidden_layers,
        clock="wall time" if setting.device == "cuda" else "process CPU time",
    )
    result = {
        **provenance(setting.device),
        "about": about,
        "setting": asdict(setting),
        "schedules": compare_schedules(setting),
        "batches": compare_batches(setting),
        "merge_share": share_of_merging(setting),
        "mlp": compare_mlp(setting),
    }
    write_results(out, f"prefill-{setting.device}", result, as_markdown(result))
    print(f"wrote {out / f'prefill-{setting.device}'}.json and .md")


if __name__ == "__main__":
    main()
