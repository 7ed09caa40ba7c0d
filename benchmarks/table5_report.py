"""What `table5_efficiency.py` writes from its figures: tables, and a chart of the times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from line_chart import COLORS, Series, draw_chart
from measuring import markdown_table
from peers import BASELINE, MATERIALISING
from pipelines import Row, make_scale
from table5_flops import PAPER, PAPER_FRAMES, PAPER_ROW, flops_table
from table5_targets import targets_table

ABOUT = (
    "Models with random weights on a decoder of Qwen2's form (hidden size {hidden}, {layers} layers, vocabulary "
    "{vocab}), {dtype}, {attention} attention, {threads} CPU thread(s), medians of {processes} fresh processes. Each "
    "sees the same number of {side}x{side} frames, as ready pixels, and {text} text tokens; what a processor must "
    "resize to get there is not in these times. Time is {clock}, from ids and pixels on the host to the first token "
    "on the host, after a warm-up. Ratios are to `{base}`, within a round. Nothing here says anything about quality."
)
NOT_HERE = (
    "The tower of `llava` and its like sees all frames of a clip in one batch, as transformers runs it: `front end` "
    "and `prefill` give the peaks of both stages. transformers keeps logits in {dtype}; the paper's baseline had a "
    "float32 copy too."
)
TIMES_TEXT = (
    "`front end`: until the embeddings of the video are there (tower and projector, or patch embedding, with the "
    "transfer to the device); `prefill`: from there to the first token. `floor`: FLOPs over {peak:.3g} TFLOP/s, the "
    "measured bf16 product of {matmul}x{matmul} matrices; `of the peak`: FLOPs of the prefill over its time and that. "
    "`left`: tokens in the last layer. `merging`: the merge steps' share of a prefill that waits for each of them."
)
MEMORY_TEXT = (
    "Megabytes. `peak` is above the weights{inputs}; `total` is weights and peak. `floor`: weights, KV cache and four "
    "buffers of the input's hidden states."
)
FLOPS_TEXT = (
    "Teraflops up to the first token, counted by the shapes and the tokens that each layer kept. `Table 5`: the "
    "paper's accounting (encoder, linear maps of the decoder, the head on every token that is left, no attention in "
    "the decoder)."
)
PAPER_TEXT = (
    "The paper's numbers are quoted (A100, its own code); in brackets the ratio to its encoder-based row, and ours to "
    "`{base}` for time and FLOPs, to `llava-all-logits` for memory. The paper's baseline is Vicuna-7B, ours has "
    "the decoder of the others."
)
RATES_TEXT = (
    "{tokens} new tokens, greedy, no early stop, every token fetched to the host. A request is the whole of it, with "
    "its front end and prefill; `llava-all-logits` generates as `llava` does."
)
GROWTH_TEXT = (
    "`time`: ratio to the first row at the same frames; `growth`: ratio to the same row at the line before it, so 2 is "
    "linear where frames double. `total`: teraflops."
)
TARGETS_TEXT = {
    True: "What the project has set itself. Ratios are medians of ratios within a round.",
    False: "Targets are stated for `--size 0.5b` on a CPU at 16 frames, for `--size 7b` on CUDA, and for `--scaling`.",
}


def as_markdown(result: Row) -> str:
    """The result as tables."""
    setting = result["setting"]
    parts = [
        "# Growth with frames" if result["scaling"] else "# Table 5 beside today's peers",
        f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}, "
        f"torch {result['torch']}, transformers {result['transformers']}.",
        about(setting, result["base"]),
    ]
    if not result["finished"]:
        parts.append("Unfinished: the run was stopped before every row had run as often as asked.")
    if result["chart"]:
        parts.append(f"![Seconds to the first token by frames]({result['chart']})")
    parts += ["## Targets", TARGETS_TEXT[bool(result["targets"])]]
    parts += [targets_table(result["targets"])] if result["targets"] else []
    parts += ["## Rows", row_notes(result["rows"])]
    if result["scaling"]:
        return "\n\n".join([*parts, "## By frames", GROWTH_TEXT, growth_table(result["rows"])]) + "\n"
    parts += ["## How to read the tables", reading(setting, result["matmul"])]
    for frames in sorted({row["frames"] for row in result["rows"]}):
        parts += frames_section(setting, [row for row in result["rows"] if row["frames"] == frames], frames)
    return "\n\n".join(parts) + "\n"


def about(setting: Row, base: str) -> str:
    """What the figures are of."""
    scale = make_scale(setting["size"])
    text = ABOUT.format(
        **{name: setting[name] for name in ("dtype", "attention", "threads", "processes")},
        hidden=scale.text.hidden_size,
        layers=scale.text.num_hidden_layers,
        vocab=scale.text.vocab_size,
        side=scale.side,
        text=scale.size.text_tokens,
        clock="wall time" if setting["device"] == "cuda" else "process CPU time",
        base=base,
    )
    return f"{text} {NOT_HERE.format(dtype=setting['dtype'])}" if base == BASELINE else text


def row_notes(rows: Iterable[Row]) -> str:
    """A line for each row: what it is."""
    notes = {row["pipeline"]: row["note"] for row in rows}
    return "\n".join(f"- `{name}`: {note}" for name, note in notes.items())


def reading(setting: Row, matmul: Row) -> str:
    """What the columns mean, once for all tables."""
    texts = {
        "Time": TIMES_TEXT.format(
            peak=matmul["flops_per_second"]["median"] / 1e12, matmul=make_scale(setting["size"]).matmul
        ),
        "Memory": MEMORY_TEXT.format(inputs="" if setting["device"] == "cuda" else " and the inputs"),
        "FLOPs": FLOPS_TEXT,
    }
    if setting["size"] == "7b":
        texts["Beside the paper"] = PAPER_TEXT.format(base=BASELINE)
    if setting["new_tokens"] > 1:
        texts["Decoding and requests"] = RATES_TEXT.format(tokens=setting["new_tokens"])
    return "\n".join(f"- {name}. {text}" for name, text in texts.items())


def frames_section(setting: Row, rows: Sequence[Row], frames: int) -> list[str]:
    """The tables of one number of frames."""
    ran = [row for row in rows if "failed" not in row]
    missing = [f"`{row['pipeline']}` ({row['failed']})" for row in rows if "failed" in row]
    parts = [f"## {frames} frames"]
    parts += [f"Not measured: {', '.join(missing)}."] if missing else []
    if not ran:
        return parts
    parts += ["### Time to the first token", times_table(ran), "### Memory", memory_table(ran)]
    parts += ["### FLOPs", flops_table([beside_the_paper(row, setting["size"]) for row in ran])]
    if frames in PAPER_FRAMES and setting["size"] == "7b":
        parts += ["### Beside the paper", paper_table(ran, frames)]
    if any(row["batches"] for row in ran):
        parts += ["### Decoding and requests", rates_table(ran)]
    return parts


def beside_the_paper(row: Row, size: str) -> Row:
    """What `flops_table` shows of a measured row; the paper's number only where the decoder is the paper's."""
    paper = row["paper_flops"] if size == "7b" and row["pipeline"] != MATERIALISING else None
    return {
        **row,
        "tokens": row["tokens_per_layer"][0],
        "tokens_left": row["tokens_per_layer"][-1],
        "paper_flops": None if paper is None else paper * 1e12,
        "off_by": None if paper is None else row["table5_flops"] / (paper * 1e12) - 1,
    }


def growth_table(rows: Sequence[Row]) -> str:
    """One line for each row and number of frames; ratios to the first row, and to the row's own fewer frames."""
    header = ["pipeline", "frames", "tokens", "left", "time", "time, s", "growth", "peak, MB", "KV cache", "total, T"]
    lines, before = [], {}
    for row in sorted(rows, key=lambda row: row["frames"]):
        if "failed" in row:
            lines.append([row["pipeline"], row["frames"], None, None, None, row["failed"], *4 * [None]])
            continue
        seconds, earlier = row["seconds"]["median"], before.get(row["pipeline"])
        before[row["pipeline"]] = seconds
        lines.append(
            [
                *(row["pipeline"], row["frames"], row["tokens_per_layer"][0], row["tokens_per_layer"][-1]),
                *(row.get("seconds_ratio"), _range(row["seconds"]), earlier and seconds / earlier),
                *(_megabytes(row["peak_bytes"]), _megabytes(row["kv_bytes"]), row["flops"]["total"] / 1e12),
            ]
        )
    return markdown_table(header, lines)


def times_table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    header = [
        "pipeline",
        "tokens",
        "left",
        "time",
        "time, s",
        "front end, s",
        "prefill, s",
        "floor, s",
        "of the peak",
        "merging",
    ]
    return markdown_table(
        header,
        (
            (
                *(row["pipeline"], row["tokens_per_layer"][0], row["tokens_per_layer"][-1], row.get("seconds_ratio")),
                *(_range(row["seconds"]), row["front_end_seconds"]["median"], row["prefill_seconds"]["median"]),
                *(row["floor_seconds"], f"{100 * row['prefill_utilisation']:.0f} %"),
                row["merge_share"] and f"{100 * row['merge_share']['median']:.1f} %",
            )
            for row in rows
        ),
    )


def memory_table(rows: Sequence[Row]) -> str:
    """One line for each row."""
    header = ["pipeline", "peak", "peak, MB", "front end", "prefill", "KV cache", "weights", "total", "floor"]
    return markdown_table(
        header,
        (
            (
                *(row["pipeline"], row.get("peak_bytes_ratio"), _megabytes(row["peak_bytes"])),
                *(_megabytes(row["front_end_peak_bytes"]), _megabytes(row["prefill_peak_bytes"])),
                *(_megabytes(row["kv_bytes"]), _megabytes(row["weight_bytes"]), _megabytes(_total(row))),
                _megabytes(row["floor_bytes"]),
            )
            for row in rows
        ),
    )


def paper_table(rows: Sequence[Row], frames: int) -> str:
    """Table 5 beside what was measured, with ratios to the encoder-based row of each."""
    by_name = {row["pipeline"]: row for row in rows}
    place, lines = PAPER_FRAMES.index(frames), []
    materialising, base = by_name.get(MATERIALISING), by_name.get(BASELINE)
    for ours, paper in PAPER_ROW.items():
        row = by_name.get(ours)
        line: list[Any] = [paper, ours]
        for what, unit, figure, other in (
            ("memory", 1e9, _total, materialising),
            ("flops", 1e12, lambda row: row["table5_flops"], base),
            ("seconds", 1, lambda row: row["seconds"]["median"], base),
        ):
            quoted, baseline = PAPER[paper][what][place], PAPER["encoder-based"][what][place]
            line += [f"{quoted:g} ({quoted / baseline:.2f})", _beside(row, other, unit, figure)]
        lines.append(line)
    header = ["Table 5", "ours", "MEM, GB", "ours", "FLOPs, T", "ours", "TTFT, s", "ours"]
    return markdown_table(header, lines)


def _beside(row: Row | None, other: Row | None, unit: float, figure: Any) -> str | None:
    if row is None or figure(row) is None:
        return None
    value = f"{figure(row) / unit:.3g}"
    return value if other is None else f"{value} ({figure(row) / figure(other):.2f})"


def rates_table(rows: Sequence[Row]) -> str:
    """One line for each row: tokens and requests a second by batch size."""
    sizes = sorted({batch["batch_size"] for row in rows for batch in row["batches"]})
    header = ["pipeline", *(f"tokens/s, batch {size}" for size in sizes)]
    header += [f"requests/s, batch {size}" for size in sizes]
    lines = []
    for row in rows:
        batches = {batch["batch_size"]: batch for batch in row["batches"]}
        if batches:
            rates = ("decode_tokens_per_second", "requests_per_second")
            lines.append([row["pipeline"], *(_rate(batches[size], rate) for rate in rates for size in sizes)])
    return markdown_table(header, lines)


def _rate(batch: Row, name: str) -> Any:
    return batch["failed"] if "failed" in batch else batch[name]["median"]


def _total(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["weight_bytes"] + row["peak_bytes"]["median"]


def _range(figure: Row) -> str:
    digits = 2 if figure["median"] >= 1 else 4
    return f"{figure['median']:.{digits}f} ({figure['min']:.{digits}f} to {figure['max']:.{digits}f})"


def _megabytes(figure: Any) -> str | None:
    value = figure["median"] if isinstance(figure, dict) else figure
    return None if value is None else f"{value / 1e6:.0f}" if value >= 1e7 else f"{value / 1e6:.2f}"


CHART_ROWS = (
    BASELINE,
    "llava-equal-tokens",
    "videollama3",
    "qwen2.5-vl",
    "gemma4-front-end",
    "elva",
    "elva+merge",
    "elva+merge+hybrid",
)
"""What the chart shows, if it ran: as many as there are colours."""


def draw_times(result: Row, path: Path) -> bool:
    """Draw seconds to the first token by frames; False if there are fewer than two numbers of frames to join."""
    times: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if "failed" not in row and row["pipeline"] in CHART_ROWS:
            times.setdefault(row["pipeline"], []).append((row["frames"], row["seconds"]["median"]))
    if max(map(len, times.values()), default=0) < 2:
        return False
    series = [Series(name, [times[name]]) for name in CHART_ROWS[: len(COLORS)] if name in times]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_chart("Time to the first token", "seconds", ["frames"], series).save(path)
    return True
