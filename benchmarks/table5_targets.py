"""What the project has set itself for `table5_efficiency.py`, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from measuring import markdown_table
from options import USUAL_DTYPE
from peers import BASELINE, MATERIALISING
from pipelines import Row

Rounds = Mapping[tuple[str, int], Sequence[Row]]
"""Raw rows of every round, by pipeline and frames."""

FULL = "elva+merge+hybrid"
ELVA_ROWS = ("elva", "elva+merge", FULL)


def judge(what: str, bound: float, measured: float | None, *, at_least: bool = False) -> Row:
    """A target with its figure: whether it is met, and else by how much it is missed, as a share of the bound."""
    met = None if measured is None else measured >= bound if at_least else measured <= bound
    return {
        "what": what,
        "bound": bound,
        "at_least": at_least,
        "measured": measured,
        "met": met,
        "missed_by": abs(measured / bound - 1) if met is False else None,
    }


def compare(rounds: Rounds, frames: int, name: str, base: str, figure: Callable[[Row], float | None]) -> float | None:
    """Median of the ratios of a figure, taken round by round; None where a row did not run."""
    pairs = list(zip(rounds.get((name, frames), []), rounds.get((base, frames), []), strict=False))
    values = [(figure(row), figure(other)) for row, other in pairs if "failed" not in row and "failed" not in other]
    if not values or any(None in pair for pair in values):
        return None
    return median(mine / other for mine, other in values)


def seconds(row: Row) -> float:
    """To the first token."""
    return row["seconds"]


def peak(row: Row) -> int | None:
    """Bytes above the weights."""
    return row["peak_bytes"]


def total_memory(row: Row) -> int | None:
    """Bytes with the weights."""
    return None if row["peak_bytes"] is None else row["weight_bytes"] + row["peak_bytes"]


def cpu_targets(rounds: Rounds) -> list[Row]:
    """At 16 frames with a decoder of Qwen2-0.5B's shape."""
    frames = 16
    pairs = [
        ("elva", BASELINE, 0.10),
        ("elva+merge", BASELINE, 0.025),
        (FULL, BASELINE, 0.013),
        (FULL, "llava-equal-tokens", 0.03),
        (FULL, "gemma4-front-end", 0.8),
    ]
    result = [
        judge(f"time, {name} / {base}", bound, compare(rounds, frames, name, base, seconds))
        for name, base, bound in pairs
    ]
    for name in ELVA_ROWS:
        others = sorted({other for other, count in rounds if count == frames and other not in ELVA_ROWS})
        ratios = {other: compare(rounds, frames, name, other, peak) for other in others}
        known = {other: ratio for other, ratio in ratios.items() if ratio is not None}
        closest = max(known, key=known.get) if known else "every baseline"
        result.append(judge(f"peak memory, {name} / {closest}, the closest", 1.0, known.get(closest)))
    return result


GPU_TIMES = {32: 0.06, 64: 0.05, 128: 0.045}
GPU_TOTALS = {32: 0.25, 64: 0.41, 128: 0.55}
GPU_PEAKS = {32: 0.25, 64: 0.2, 128: 0.2}
GPU_UTILISATION = {"elva": 0.5, "elva+merge": 0.4}
GPU_MERGING = 0.03


def gpu_targets(rounds: Rounds, rows: Sequence[Row]) -> list[Row]:
    """At the paper's 7B shape on a GPU."""
    result = []
    for frames, bound in GPU_TIMES.items():
        ratio = compare(rounds, frames, FULL, BASELINE, seconds)
        result.append(judge(f"{frames} frames: time, {FULL} / {BASELINE}", bound, ratio))
    for name, bound in GPU_UTILISATION.items():
        found = [row for row in rows if (row["pipeline"], row["frames"]) == (name, 128) and "failed" not in row]
        measured = found[0]["prefill_utilisation"] if found else None
        result.append(judge(f"128 frames: prefill over the matmul peak, {name}", bound, measured, at_least=True))
    for name in ELVA_ROWS[1:]:
        shares = [row["merge_share"] for row in rounds.get((name, 128), []) if "failed" not in row]
        measured = median(shares) if shares else None
        result.append(judge(f"128 frames: merge steps over prefill, {name}", GPU_MERGING, measured))
    for frames, bound in GPU_TOTALS.items():
        ratio = compare(rounds, frames, FULL, MATERIALISING, total_memory)
        saved = None if ratio is None else 1 - ratio
        result.append(
            judge(f"{frames} frames: total memory saved, {FULL}, {MATERIALISING}", bound, saved, at_least=True)
        )
    for frames, bound in GPU_PEAKS.items():
        ratio = compare(rounds, frames, FULL, BASELINE, peak)
        result.append(judge(f"{frames} frames: peak above the weights, {FULL} / {BASELINE}", bound, ratio))
    return result


def scaling_targets(rounds: Rounds) -> list[Row]:
    """From 8 to 256 frames, ELVA's rows alone."""
    counts = sorted({frames for _, frames in rounds})
    result = []
    for frames in counts:
        if frames >= 8:
            ratio = compare(rounds, frames, "elva+merge", "elva", seconds)
            result.append(judge(f"{frames} frames: time, elva+merge / elva", 1.0, ratio))
    for name in ELVA_ROWS:
        if (name, 32) in rounds and (name, 256) in rounds:
            result.append(judge(f"{name}: time at 256 frames / at 32", 8.0, growth(rounds, name, 32, 256)))
    return result


def growth(rounds: Rounds, name: str, few: int, many: int) -> float | None:
    """Time at many frames over time at few, round by round."""
    pairs = list(zip(rounds[name, many], rounds[name, few], strict=False))
    if any("failed" in row for pair in pairs for row in pair):
        return None
    return median(row["seconds"] / base["seconds"] for row, base in pairs)


def targets_of(setting: Row, rounds: Rounds, rows: Sequence[Row], *, scaling: bool = False) -> list[Row]:
    """The targets that are stated for a size, device and dtype; none for others. Growth is judged in any dtype."""
    place = (setting["size"], setting["device"], setting["dtype"])
    if setting["size"] == "tiny":
        return []
    if scaling:
        return scaling_targets(rounds)
    return (
        cpu_targets(rounds)
        if place == ("0.5b", "cpu", USUAL_DTYPE)
        else gpu_targets(rounds, rows)
        if place == ("7b", "cuda", USUAL_DTYPE)
        else []
    )


def targets_table(targets: Sequence[Row]) -> str:
    """One line for each target."""
    return markdown_table(
        ["target", "bound", "measured", "verdict"],
        (
            (
                row["what"],
                f"{'at least' if row['at_least'] else 'at most'} {row['bound']:g}",
                _figure(row),
                _verdict(row),
            )
            for row in targets
        ),
    )


def _figure(row: Row) -> Any:
    return None if row["measured"] is None else f"{row['measured']:.3f}"


def _verdict(row: Row) -> str:
    if row["met"] is None:
        return "not measured"
    return "met" if row["met"] else f"missed by {100 * row['missed_by']:.0f} %"
