"""From a video file to the first token: decode, resize, patchify, embed, prefill.

    python benchmarks/end_to_end.py                           # CPU: decoder of Qwen2-0.5B's shape, 16 frames
    python benchmarks/end_to_end.py --device cuda --size 7b   # GPU: the paper's decoder, 32, 64 and 128 frames
    python benchmarks/end_to_end.py --size tiny --out /tmp    # seconds: does it run

ELVA's three rows of Table 5 on a real file (`numbered_clips.py`), through its own processor, in fresh processes, round
by round, with random weights.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from encoding import QUESTION, STAGES, byte_tokenizer, time_elva
from measuring import markdown_table, provenance, ratio, run_in_fresh_process, spread, write_results
from numbered_clips import ClipSpec, describe_clip, make_clip
from options import add_rounds, make_parser, usual_frames, usual_size
from peers import merge_schedule
from pipelines import ModelSetting, Row, Scale, make_scale
from random_elva import make_model
from table5_measuring import Stages
from torch import Tensor, nn

from elva_hf import ElvaConfig, ElvaProcessor
from elva_hf.ledger_elva import TABLE5_HIGH_SHARE
from elva_hf.modeling_elva import add_special_tokens

ROWS = ("elva", "elva+merge", "elva+merge+hybrid")
STAGE_NAMES = ("decode", "resize", "patchify", "rest", "embed", "prefill")


@dataclass(frozen=True)
class Setting(ModelSetting):
    """How every row of a run is measured."""

    merge_schedule: str

    @property
    def clip(self) -> ClipSpec:
        """A square clip, so that a frame has the tokens of Table 5."""
        return ClipSpec(seconds=2, height=72, width=72) if self.size == "tiny" else ClipSpec(height=720, width=720)


def frame_options(scale: Scale, frames: int, hybrid: bool) -> dict[str, Any]:
    """What the processor is asked for."""
    high = frames // TABLE5_HIGH_SHARE
    counts = {"num_high_res_frames": high, "num_low_res_frames": frames - high} if hybrid else {"num_frames": frames}
    edges = {"longest_edge": scale.side, "low_res_longest_edge": scale.size.low_grid[0] * scale.size.config.patch_size}
    return {**counts, **edges, "patch_size": scale.size.config.patch_size}


def make_both(setting: Setting, name: str) -> tuple[ElvaProcessor, nn.Module]:
    """A processor with a tokenizer of bytes, and a model with random weights that has its tokens."""
    scale = setting.make()
    processor = ElvaProcessor.from_tokenizer(byte_tokenizer())
    ids = add_special_tokens(processor.tokenizer)
    fields = scale.size.config.to_dict()
    fields["text_config"]["vocab_size"] = max(scale.text.vocab_size, len(processor.tokenizer))
    config = ElvaConfig(**{**fields, **ids})
    model = make_model(config, setting.device, getattr(torch, setting.dtype), setting.attention)
    model.set_merge_schedule(merge_schedule(setting.merge_schedule, scale.size) if name != "elva" else "none")
    return processor, model


@torch.no_grad()
def ask(setting: Setting, model: nn.Module, inputs: dict[str, Tensor]) -> Stages:
    """From the processor's outputs to the first token on the host, in two stages."""
    dtype = getattr(torch, setting.dtype)
    with Stages(setting.device, model.get_submodule("model.patch_embed")) as stages:
        pixels = inputs["pixel_values_videos"].to(dtype).to(setting.device, non_blocking=True)
        others = {name: inputs[name].to(setting.device) for name in ("input_ids", "attention_mask")}
        logits = model(**others, pixel_values_videos=pixels, use_cache=True, logits_to_keep=1).logits
        logits[:, -1].argmax(-1).tolist()
    return stages


def run_row(setting: Setting, name: str, frames: int, path: str) -> Row:
    """Measure one row once, after a run with four frames."""
    scale = setting.make()
    processor, model = make_both(setting, name)
    time_elva()
    now = STAGES.clock = time.perf_counter if setting.device == "cuda" else time.process_time

    def encode(count: int) -> Any:
        options = frame_options(scale, count, "hybrid" in name)
        return processor(text=f"<video>{QUESTION}", videos=[path], return_tensors="pt", **options)

    ask(setting, model, encode(4 if setting.device == "cpu" else frames))
    STAGES.clear()
    start = now()
    inputs = encode(frames)
    processing = now() - start
    stages = ask(setting, model, inputs).figures()
    seconds = {**STAGES.seconds, "rest": processing - sum(STAGES.seconds.values())}
    seconds |= {"embed": stages["front_end_seconds"], "prefill": stages["prefill_seconds"]}
    return {"seconds": sum(seconds.values()), "stages": seconds, "tokens": inputs["input_ids"].shape[1]}


def measure_rounds(setting: Setting, frames: Sequence[int], path: str) -> dict[tuple[str, int], list[Row]]:
    """Run every row once a round, each time in a fresh process."""
    rounds: dict[tuple[str, int], list[Row]] = {}
    for number in range(setting.processes):
        for count, name in itertools.product(frames, ROWS):
            row = run_in_fresh_process(run_row, setting, name, count, path)
            rounds.setdefault((name, count), []).append(row)
            print(
                f"round {number + 1} of {setting.processes}: {name}, {count} frames: {row['seconds']:.3f} s",
                file=sys.stderr,
            )
    return rounds


def summarise(rounds: dict[tuple[str, int], list[Row]]) -> list[Row]:
    """Medians over the rounds, and ratios to no merging within a round."""
    return [
        {
            "pipeline": name,
            "frames": frames,
            "tokens": rows[0]["tokens"],
            "seconds": spread([row["seconds"] for row in rows]),
            "seconds_ratio": ratio(
                [row["seconds"] for row in rows], [row["seconds"] for row in rounds[ROWS[0], frames]]
            ),
            "stages": {stage: spread([row["stages"][stage] for row in rows]) for stage in STAGE_NAMES},
        }
        for (name, frames), rows in rounds.items()
    ]


ABOUT = (
    "An ELVA with random weights on a decoder of Qwen2's form (hidden size {hidden}, {layers} layers, {dtype}), "
    "{attention} attention, {threads} CPU thread(s), merging: {merge_schedule}; medians of {processes} fresh "
    "processes. The clip is {seconds} s of H.264, {width}x{height}, {fps} frames a second, read from a file that the "
    "system has in memory. Time is {clock} from the path and a question of {question} bytes to the first token on the "
    "host, after a warm-up. Nothing here says anything about quality."
)
STAGES_TEXT = (
    "Seconds. `decode`: opening, decoding, conversion to RGB; `resize`; `patchify`: normalising and cutting; `rest` of "
    "the processor: text, checks; `embed`: to the decoder's embeddings, transfer to the device included; `prefill`: to "
    "the first token. `before the model`: the first four as a share."
)


def as_markdown(result: Row) -> str:
    """The result as tables."""
    parts = [
        "# From a file to the first token",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}, "
        f"torch {result['torch']}, transformers {result['transformers']}.",
        result["about"],
        STAGES_TEXT,
    ]
    for frames in sorted({row["frames"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["frames"] == frames]
        parts += [f"## {frames} frames", stages_table(rows)]
    return "\n\n".join(parts) + "\n"


def stages_table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    lines = []
    for row in rows:
        medians = [row["stages"][stage]["median"] for stage in STAGE_NAMES]
        share = sum(medians[:4]) / sum(medians)
        lines.append(
            [
                row["pipeline"],
                row["tokens"],
                row["seconds_ratio"],
                row["seconds"]["median"],
                *medians,
                f"{100 * share:.0f} %",
            ]
        )
    return markdown_table(["pipeline", "tokens", "time", "time, s", *STAGE_NAMES, "before the model"], lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; decoding has threads of its own."""
    parser = make_parser(__doc__)
    add_rounds(parser)
    parser.add_argument(
        "--clips", type=Path, default=Path(tempfile.gettempdir()) / "elva-clips", help="where to keep the clip"
    )
    return parser.parse_args()


def main() -> None:
    """Measure everything and write the result files."""
    arguments = vars(parse_arguments())
    out, clips, frames = (arguments.pop(name) for name in ("out", "clips", "frames"))
    setting = Setting(**{**arguments, "size": arguments["size"] or usual_size(arguments["device"])})
    frames = sorted(set(frames or usual_frames(setting.device)))
    scale, path = make_scale(setting.size), make_clip(clips, setting.clip)
    about = ABOUT.format(
        **{**asdict(setting.clip), **asdict(setting)},
        hidden=scale.text.hidden_size,
        layers=scale.text.num_hidden_layers,
        clock="wall time" if setting.device == "cuda" else "process CPU time",
        question=len(QUESTION),
    )
    result = {
        **provenance(setting.device),
        "about": about,
        "setting": asdict(setting),
        "clip": describe_clip(path, setting.clip),
        "rows": summarise(measure_rounds(setting, frames, str(path))),
    }
    write_results(out, f"end-to-end-{setting.device}", result, as_markdown(result))
    print(f"wrote {out / f'end-to-end-{setting.device}'}.json and .md")


if __name__ == "__main__":
    main()
