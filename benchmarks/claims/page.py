"""`docs/results.md`: each claim of the paper, what we tried, our figure and a verdict, from the result files alone.

python benchmarks/claims/page.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import RESULTS, markdown_table

from claims import quotes
from claims.protocol import CONFIDENCE, CONFIRMED, CONTRADICTED, NOT_SEEN, SEEDS
from claims.quotes import Quote
from claims.tables import Result, column_table, describe, told_outcomes, variant_table
from elva_hf.evaluation.toy_world import BARS, KEPT_BY_MERGING, OVER_BLIND, TaskScore, missed_bars

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "results.md"
CHECKPOINT = REPOSITORY / "src" / "elva_hf" / "checkpoints" / "tiny" / "held_out.json"

VERDICTS = {
    CONFIRMED: "confirmed at this scale",
    CONTRADICTED: "contradicted at this scale",
    NOT_SEEN: "not seen",
}
OUTCOME_WORDS = {
    "final accuracy": "Final accuracy",
    "accuracy before tuning": "Before tuning",
    "accuracy at equal tokens": "At equal tokens",
    "steps saved": "Steps to 90 % saved",
}
SCORE_WORDS = {
    "num_questions": "n",
    "array": "mixed, arrays",
    "mp4": "mixed, mp4",
    "single": "one object, mp4",
    "swapped": "other video",
    "single_blind": "blind, one object",
}

TEXT = """# Results: the paper's claims at toy scale

Written by `python benchmarks/claims/page.py` from the result files alone; a test writes it again and compares. `make
claims` runs what has no result yet, hours on two CPU cores, and goes on where it stopped. Paper's figures are quoted,
ours are measured: models of about a million parameters on clips of a procedural world. They say whether a mechanism
does there what the paper says of it, and nothing about 7B models on real video.

What counts was fixed before the runs (`benchmarks/claims/protocol.py`): variants of one seed see the same videos and
questions, differences are taken within a seed and are positive in the paper's direction, n is the number of seeds, and
intervals are {confidence:.0%}. Confirmed (or contradicted): bootstrap and Student's interval both lie above (below) 0
on the mean of columns that were named beforehand; else not seen, and "visible" is half the width of the wider interval,
the smallest difference that could have been seen. Fewer than {seeds} seeds give no verdict. The verdict of a claim is
that of its final accuracy on the test split; no interval is corrected for the number of comparisons.

{overview}

{claims}

## The needle grid

{needle}

## The shipped checkpoint

{checkpoint}
"""
BARS_TEXT = (
    f"Wanted, with one object and with several: {min(BARS.values()):.2f} to {max(BARS.values()):.2f} on every task "
    f"but relation; about another scene's video at most {OVER_BLIND:.2f} more than blind; merged at least "
    f"{KEPT_BY_MERGING} of what it is with nothing merged."
)
CHECKPOINT_TEXT = (
    "Test split, exact match (measured; the table that lies next to the weights). Mixed scenes have one to three "
    'objects; "other video" asks about another scene\'s video; "blind" is the best constant answer per question. '
)


def read_result(folder: Path, name: str) -> Result | None:
    """A result file; None if there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def render(results: Path, checkpoint: Path, link: str) -> str:
    """The page.

    Args:
        results: Folder of the result files.
        checkpoint: Table file of the shipped checkpoint.
        link: The folder of the results, as the page links to it.
    """
    found = {quote.claim: read_result(results, f"claims-{quote.claim}") for quote in quotes.CLAIMS}
    sections = [_claim_section(quote, found[quote.claim], link) for quote in quotes.CLAIMS]
    return TEXT.format(
        confidence=CONFIDENCE,
        seeds=SEEDS,
        overview=_overview(found),
        claims="\n\n".join(sections),
        needle=_needle_section(read_result(results, "needle-grid"), link),
        checkpoint=_checkpoint_section(checkpoint),
    )


# Claims


def _overview(found: Mapping[str, Result | None]) -> str:
    rows = []
    for quote in quotes.CLAIMS:
        result, source = found[quote.claim], f"{quote.letter}. {quote.source}"
        if result is None:
            rows.append([source, quote.title, None, None, None, "not run yet"])
            continue
        for pair in result["comparisons"]:
            final = pair["final accuracy"]
            figures = [_difference(final), _interval(final["t_interval"]), len(final["differences"])]
            rows.append([source, f"{pair['better']} over {pair['worse']}", *figures, _verdict(final)])
        if not result["comparisons"]:
            rows.append([source, quote.title, None, None, len(result["seeds"]), "no verdict"])
    return markdown_table(["paper", "claim", "difference", "t interval", "n", "verdict"], rows)


def _claim_section(quote: Quote, result: Result | None, link: str) -> str:
    parts = [f"## {quote.letter}. {quote.title}", _quotation(quote)]
    if result is None:
        return "\n\n".join([*parts, f"Not run yet: `python benchmarks/claims/run.py {quote.claim}`."])
    name = f"claims-{quote.claim}"
    made = "\n".join(f"- {row['variant']}: {describe(row['made'])}." for row in result["variants"])
    tried = f"What we tried: {_budget(result)} {result['notes']}".rstrip()
    verdicts = "\n".join(_pair_lines(pair) for pair in result["comparisons"])
    return "\n\n".join(
        [
            *parts,
            tried,
            made,
            variant_table(result),
            verdicts or "No verdict: nothing is compared over seeds.",
            *([] if any(row["steps"] for row in result["variants"]) else [column_table(result)]),
            f"{_source(result)} [All figures]({link}/{name}.md).",
            f"![accuracy of the variants]({link}/{name}.png)",
        ]
    )


def _quotation(quote: Quote) -> str:
    words = " [...] ".join(f'"{part}"' for part in quote.words)
    said = f"{quote.source} (quoted): {words}." if words else f"{quote.source}."
    table = [markdown_table(quote.header, quote.rows)] if quote.rows else []
    return "\n\n".join([said, *table, *([quote.remark] if quote.remark else [])])


def _budget(result: Result) -> str:
    budget = result["budget"]
    frames = " and ".join(map(str, budget["frames"]))
    steps = f"{budget['steps']} steps of {budget['batch_size']} videos"
    if any(row["untuned"] for row in result["variants"]):
        steps += f", tuning {budget['tuning_steps']} steps"
    if not any(row["steps"] for row in result["variants"]):
        steps = "nothing trained"
    return (
        f"{len(result['seeds'])} seeds, {steps}, {frames} frames, world `{budget['world']}`, {budget['optimizer']}; "
        f"columns {'; '.join(result['columns'])}; {budget['test_scenes']} test scenes."
    )


def _pair_lines(pair: Result) -> str:
    said = [_outcome(outcome, pair[outcome]) for outcome in told_outcomes(pair)]
    columns = [
        f"{column} {_difference(found)} ({_interval(found['t_interval'])})"
        for column, found in pair["by_column"].items()
        if found["visible"] is not None and (found["t_interval"][0] > 0 or found["t_interval"][1] < 0)
    ]
    if columns and len(pair["by_column"]) > 1:
        said.append(f"Columns whose own t interval excludes 0: {', '.join(columns)}.")
    return f"- **{pair['better']} over {pair['worse']}: {_verdict(pair['final accuracy'])}.** {' '.join(said)}"


def _outcome(name: str, found: Result) -> str:
    intervals = f"bootstrap {_interval(found['bootstrap'])}; t {_interval(found['t_interval'])}"
    visible = "" if found["visible"] is None else f"; visible {found['visible']:.3g}"
    verdict = "" if name == "final accuracy" else f": {_verdict(found)}"
    n = len(found["differences"])
    return f"{OUTCOME_WORDS[name]} {_difference(found)} ({intervals}; n = {n}{visible}){verdict}."


def _verdict(found: Result) -> str:
    n = len(found["differences"])
    return VERDICTS[found["verdict"]] if n >= SEEDS else f"no verdict, {n} seeds of {SEEDS}"


def _difference(found: Result) -> str:
    return f"{found['mean']:+.3g}"


def _interval(ends: Sequence[float]) -> str:
    return "{:+.3g} to {:+.3g}".format(*ends)


def _source(result: Result) -> str:
    return f"Measured: `{result['command']}`, {result['device']}, commit {result['commit']}, {result['date']}."


# What is not a claim of Claim's shape


def _needle_section(result: Result | None, link: str) -> str:
    quoted = _quotation(quotes.NEEDLE)
    if result is None:
        return f"{quoted}\n\nNot run yet: `python benchmarks/claims/run.py {quotes.NEEDLE.claim}`."
    source = f"{_source(result)} [All figures]({link}/needle-grid.md)."
    seeds = f"{len(result['seeds'])} seeds, {result['videos']} videos in a cell; no verdict."
    return "\n\n".join(
        [quoted, f"{result['summary']} {seeds}", source, f"![accuracy by length and depth]({link}/needle-grid.png)"]
    )


def _checkpoint_section(path: Path) -> str:
    if not path.is_file():
        return "No table file lies next to the checkpoint: not measured."
    file = json.loads(path.read_text())
    scores, source = file["scores"], f"{_source(file)} `make eval` measures it again."
    columns = [name for name in scores[0] if name != "task"]
    table = markdown_table(
        ["task", *(SCORE_WORDS.get(name, name.replace("_", " ")) for name in columns)],
        [[score["task"], *(_share(score[name]) for name in columns)] for score in scores],
    )
    return "\n\n".join(
        [
            CHECKPOINT_TEXT + source,
            table,
            _bars(scores),
        ]
    )


def _share(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else value


def _bars(scores: Sequence[Result]) -> str:
    missed = missed_bars([TaskScore(**score) for score in scores])
    listed = "Missed: " + "; ".join(missed) if missed else "All are reached"
    return f"{BARS_TEXT} {listed}."


def write_page(results: Path = RESULTS, page: Path = PAGE, checkpoint: Path = CHECKPOINT) -> None:
    """Write the page, with links to the results as seen from beside `docs`."""
    page.write_text(render(results, checkpoint, "../benchmarks/results"))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    write_page(options.results, options.page)


if __name__ == "__main__":
    main()
