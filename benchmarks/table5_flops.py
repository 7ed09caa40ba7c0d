"""FLOPs of the rows of `table5_efficiency.py`, all by one counter, and what Table 5 of the paper prints.

Two operations for each multiplication with addition, products of matrices only. A test holds every row against
`torch.utils.flop_counter` on a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from measuring import markdown_table
from peers import MATERIALISING, SCHEDULES, Llava, make_pipelines
from pipelines import Pipeline, Row, Scale, make_scale
from random_elva import Size

from elva_hf import ElvaConfig

PAPER_FRAMES = (32, 64, 128)

PAPER = {
    "encoder-based": {"memory": (20.7, 27.6, 41.4), "flops": (260, 517, 1030), "seconds": (2.59, 5.92, 15.18)},
    "elva": {"memory": (20.0, 25.4, 39.6), "flops": (75, 146, 289), "seconds": (0.51, 1.11, 2.14)},
    "elva+merge": {"memory": (16.4, 18.0, 22.5), "flops": (25, 47, 104), "seconds": (0.26, 0.46, 0.97)},
    "elva+merge+hybrid": {"memory": (15.5, 16.3, 18.5), "flops": (14, 24, 44), "seconds": (0.22, 0.27, 0.56)},
}
"""Table 5: GB, teraflops and seconds to the first token on an A100, by `PAPER_FRAMES`."""

PAPER_ROW = {MATERIALISING: "encoder-based", **{name: name for name in PAPER if name != "encoder-based"}}
"""The row of Table 5 beside each of ours that has one."""

VICUNA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""Vicuna-7B: the decoder whose numbers the encoder-based rows of Table 5 are."""


@dataclass(frozen=True)
class RowFlops:
    """FLOPs up to the first token.

    Args:
        encoder_linear: Linear maps and convolutions from pixels to embeddings.
        encoder_attention: Attention of the tower.
        linear: Projections and MLPs of the decoder.
        attention: Of the decoder.
        lm_head: Hidden states to logits.
    """

    encoder_linear: int
    encoder_attention: int
    linear: int
    attention: int
    lm_head: int

    @property
    def encoder(self) -> int:
        """All of the front end."""
        return self.encoder_linear + self.encoder_attention

    @property
    def decoder(self) -> int:
        """All after the front end."""
        return self.linear + self.attention + self.lm_head

    @property
    def total(self) -> int:
        """Their sum."""
        return self.encoder + self.decoder

    def to_dict(self) -> dict[str, int]:
        """Parts and sums."""
        return {**asdict(self), "encoder": self.encoder, "decoder": self.decoder, "total": self.total}


def count_flops(
    pipeline: Pipeline,
    frames: int,
    layers: Sequence[int] | None = None,
    num_logits: int | None = 1,
    attention: str = "causal",
) -> RowFlops:
    """Count one clip.

    Args:
        pipeline: The row.
        frames: Of the clip.
        layers: Tokens that entered each decoder layer; by the row's own plan if None.
        num_logits: Positions the language-model head is applied to; None for every token that is left.
        attention: `"causal"`, or `"full"` as `torch` counts it.
    """
    layers = pipeline.layers(frames) if layers is None else layers
    shape, encoder = pipeline.scale.shape(), pipeline.encoder_flops(frames)
    return RowFlops(
        encoder.linear,
        encoder.attention,
        shape.linear_flops(layers),
        pipeline.attention_flops(frames, layers, attention),
        shape.lm_head_flops(layers[-1] if num_logits is None else num_logits),
    )


def count_row(pipeline: Pipeline, frames: int, layers: Sequence[int] | None = None) -> RowFlops:
    """What the row does: the head on one position, or on all where it makes all logits."""
    return count_flops(pipeline, frames, layers, None if getattr(pipeline, "all_logits", False) else 1)


def table5_accounting(pipeline: Pipeline, frames: int, layers: Sequence[int] | None = None) -> int:
    """FLOPs as Table 5 counts: the head on every token that is left, no attention in the decoder.

    Derived: so the encoder-based rows are Vicuna-7B behind the whole tower, and the encoder-free rows come out to the
    digit.
    """
    flops = count_flops(pipeline, frames, layers, num_logits=None)
    return flops.total - flops.attention


def paper_baseline() -> Llava:
    """The encoder-based model of Table 5: LLaVA-NeXT-Video on Vicuna-7B, 576 tokens a frame."""
    scale = make_scale("7b")
    size = Size(ElvaConfig(text_config=VICUNA), scale.size.halvings)
    return Llava(Scale(size), "LLaVA-NeXT-Video on Vicuna-7B, as in Table 5")


def paper_number(name: str, what: str, frames: int) -> float | None:
    """What Table 5 prints for one of our rows; None where it has none."""
    row = PAPER_ROW.get(name)
    return PAPER[row][what][PAPER_FRAMES.index(frames)] if row and frames in PAPER_FRAMES else None


def derive_row(name: str, pipeline: Pipeline, frames: int, paper: float | None) -> Row:
    """A row of the derived table."""
    layers = pipeline.layers(frames)
    counted = table5_accounting(pipeline, frames)
    return {
        "pipeline": name,
        "note": pipeline.note,
        "frames": frames,
        "tokens": layers[0],
        "tokens_left": layers[-1],
        "kv_bytes": pipeline.kv_bytes(frames),
        "flops": count_row(pipeline, frames).to_dict(),
        "table5_flops": counted,
        "paper_flops": None if paper is None else paper * 1e12,
        "off_by": None if paper is None else counted / (paper * 1e12) - 1,
    }


def derive(size: str = "7b") -> list[Row]:
    """Every row at 32, 64 and 128 frames, the merged ones under each schedule that geometry decides alone."""
    scale = make_scale(size)
    pipelines: dict[str, Pipeline] = {"Vicuna-7B": paper_baseline()} if size == "7b" else {}
    for schedule in SCHEDULES:
        for name, pipeline in make_pipelines(scale, schedule).items():
            merges = "+merge" in name
            if schedule == SCHEDULES[0] or (merges and schedule != "paper"):  # that one has a threshold
                pipelines[f"{name}, {schedule}" if merges else name] = pipeline
    rows = []
    for frames in PAPER_FRAMES:
        for name, pipeline in pipelines.items():
            ours = name.partition(",")[0]
            paper = PAPER["encoder-based"]["flops"][PAPER_FRAMES.index(frames)] if name == "Vicuna-7B" else None
            if ours != MATERIALISING and size == "7b":
                paper = paper or paper_number(ours, "flops", frames)
            rows.append(derive_row(name, pipeline, frames, paper))
    return rows


ABOUT = (
    "Derived, not measured: exact arithmetic over the shapes, two operations for each multiplication with addition, "
    "products of matrices only; a test holds every row against torch's counter on a small model. The decoder has the "
    "shape of Qwen2 ({size}); `Vicuna-7B` is the encoder-based model of the paper. {text} text tokens; frames of "
    "{side}x{side} pixels, low-resolution frames of half the side. Columns from encoder to total: teraflops up to the "
    "first token, causal attention, the head on one position (on all for `llava-all-logits`). `Table 5`: the paper's "
    "accounting, which counts the encoder, the decoder's linear maps and the head on every token that is left, and no "
    "attention in the decoder."
)
FINDINGS = (
    "So counted the encoder-based rows of Table 5 are Vicuna-7B with its tower: {per_frame:.2f} teraflops a frame, "
    "{encoder_share:.0f} % of them in the tower. Of the saving by leaving the encoder out, most is {elva_tokens} "
    "tokens a frame instead of {llava_tokens}: at equal tokens (`llava-equal-tokens`) the encoder costs "
    "{equal:.0f} % on top of ELVA without merging. 104 T with merging at 128 frames lies on no fixed schedule ({off}); "
    "the other figures of `table5` are off by {rest} or less."
)


def as_markdown(result: Row) -> str:
    """The derived result as tables."""
    parts = ["# FLOPs of Table 5", f"Derived: `{result['command']}`, commit {result['commit']}, {result['date']}."]
    parts += [result["about"], *filter(None, [result["findings"]])]
    for frames in PAPER_FRAMES:
        parts += [f"## {frames} frames", flops_table([row for row in result["rows"] if row["frames"] == frames])]
    return "\n\n".join(parts) + "\n"


def flops_table(rows: Sequence[Row]) -> str:
    """One line for each row: teraflops; with the paper's where there are any."""
    header = ["pipeline", "tokens", "left", "encoder", "linear", "attention", "head", "total", "Table 5"]
    quoted = any(row["paper_flops"] is not None for row in rows)
    lines = []
    for row in rows:
        parts = (_tera(row["flops"][part]) for part in ("encoder", "linear", "attention", "lm_head", "total"))
        line = [row["pipeline"], row["tokens"], row["tokens_left"], *parts, _tera(row["table5_flops"])]
        off_by = None if row["off_by"] is None else _percent(row["off_by"], "+")
        lines.append([*line, _tera(row["paper_flops"]), off_by] if quoted else line)
    return markdown_table([*header, "the paper", "off by"] if quoted else header, lines)


def _tera(flops: float | None) -> float | None:
    return None if flops is None else flops / 1e12


def _percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f} %"


def derived_result(size: str, origin: Row) -> dict[str, Any]:
    """Rows and texts for `results/table5-flops.json`."""
    scale, rows = make_scale(size), derive(size)
    findings = None
    if size == "7b":
        baseline, by_name = paper_baseline(), {row["pipeline"]: row for row in rows if row["frames"] == 32}
        per_frame = (table5_accounting(baseline, 64) - table5_accounting(baseline, 32)) / 32
        misfits = sorted((row["off_by"] for row in rows if row["pipeline"].endswith(", table5")), key=abs)
        equal, elva = (by_name[name]["flops"]["total"] for name in ("llava-equal-tokens", "elva"))
        findings = FINDINGS.format(
            per_frame=per_frame / 1e12,
            encoder_share=100 * count_flops(baseline, 1).encoder / per_frame,
            elva_tokens=157,
            llava_tokens=baseline.frame_tokens,
            equal=100 * (equal / elva - 1),
            off=_percent(misfits[-1], "+"),
            rest=_percent(max(map(abs, misfits[:-1]))),
        )
    about = ABOUT.format(size=size, text=scale.size.text_tokens, side=scale.side)
    return {**origin, "kind": "derived", "about": about, "findings": findings, "rows": rows}
