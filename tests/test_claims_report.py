"""benchmarks/claims/: tables and pages say what the runs say and where it comes from; the script runs every claim."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
STAMP = {"commit": "abc", "date": "2026-01-02", "device": "a CPU", "python": "3", "torch": "2", "transformers": "5"}
STAMP["command"] = "python it"


@pytest.fixture(scope="module")
def claims():
    """The modules of `benchmarks/claims/` that make tables, imported as their script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from claims import page, protocol, quotes, report, run, runs, tables, worlds

        yield SimpleNamespace(
            page=page,
            protocol=protocol,
            quotes=quotes,
            report=report,
            run=run,
            runs=runs,
            tables=tables,
            worlds=worlds,
        )


def make_claim(protocol, variants=None, **fields):
    variants = variants or (protocol.Variant("ours"), protocol.Variant("theirs"))
    budget = protocol.Budget(300, tuning_steps=200)
    return protocol.Claim("it", "A title", "Table 9", variants, (("ours", "theirs"),), ("a",), budget, **fields)


def make_result(claims, folder, curve, claim=None, seeds=5, blind=None):
    """The result of a claim whose runs end in `curve(variant name, seed)`."""
    claim = claim or make_claim(claims.protocol)

    def train(run, folder):
        return curve(run.variant.name, run.seed)

    lines = claims.runs.finish_runs(claims.runs.plan_runs(claim, seeds), folder / "it.jsonl", train, stamp=STAMP)
    lines[0]["commit"] = "def"
    return claims.report.summarise(claim, lines, blind or {"a": 0.25, "b": 0.1}, "20 scenes", "python it")


def curve_of(protocol, shares, test, **fields):
    steps = tuple(range(100, 100 * len(shares) + 1, 100))
    return protocol.Curve(steps, tuple(10 * s for s in steps), {"a": tuple(shares)}, {"a": test}, **fields)


def gap_curve(protocol, sign=1.0, seeds=3):
    """Curves of a first variant that is ahead by .1 and a little more with each seed."""

    def curve(name, seed):
        gap = 0.0 if name == "ours" else sign * (0.1 + seed / 100)
        return curve_of(protocol, [0.5, 0.95 - gap, 0.98 - gap], 0.97 - gap, parameters=len(name))

    return curve


@pytest.fixture
def result(claims, tmp_path):
    """Of two variants and three seeds, whose figures are easy to know."""
    return make_result(claims, tmp_path, gap_curve(claims.protocol), seeds=3)


# Result files


def test_a_result_holds_differences_within_seeds(result):
    (pair,) = result["comparisons"]
    assert pair["final accuracy"]["differences"] == pytest.approx([0.1, 0.11, 0.12])
    assert pair["accuracy at equal tokens"]["differences"] == pytest.approx([0.1, 0.11, 0.12])
    assert pair["steps saved"]["differences"] == [100, 100, 100]  # 200 against the whole budget
    assert pair["accuracy before tuning"] is None
    assert pair["final accuracy"]["verdict"] == "confirmed"
    ours, theirs = result["variants"]
    assert ours["steps_to_level"] == {"a": [200, 200, 200]} and theirs["steps_to_level"] == {"a": [None] * 3}
    assert ours["curve"]["mean"] == pytest.approx([0.5, 0.95, 0.98])
    assert theirs["curve"]["mean"] == pytest.approx([0.5, 0.84, 0.87])
    assert result["commit"] == "abc, def"


@pytest.fixture
def reduced(claims, tmp_path):
    """Of a base, merging and pooling that go on from it for 200 steps, and dropping that is only evaluated."""
    protocol = claims.protocol
    variants = (
        protocol.Variant("base"),
        protocol.Variant("ours", base="base", reduction=protocol.Reduction("merge", 0.5)),
        protocol.Variant("theirs", base="base", reduction=protocol.Reduction("pool", 0.5)),
        protocol.Variant("drop", base="base", tuned=False, reduction=protocol.Reduction("drop", 0.25)),
    )
    figures = {"base": 0.9, "ours": 0.8, "theirs": 0.7, "drop": 0.4}

    def curve(name, seed):
        share = figures[name] + seed / 100
        if name == "base":
            return curve_of(protocol, [0.2, 0.5, share], share, parameters=7)
        steps = (0,) if name == "drop" else (0, 100, 200)
        return protocol.Curve(
            steps=steps,
            tokens=steps,
            accuracy={"a": tuple(share for _ in steps)},
            test={"a": share},
            parameters=7,
            visual_share=0.25 if name == "drop" else 0.5,
            test_untuned={"a": share - (0.3 if name == "theirs" else 0.1)},
        )

    claim = replace(make_claim(protocol, variants), pairs=(("ours", "theirs"), ("ours", "drop"), ("base", "ours")))
    return make_result(claims, tmp_path, curve, claim)


def test_runs_that_go_on_from_a_base_are_compared_before_and_after_tuning(reduced):
    tuned, evaluated, against_base = reduced["comparisons"]
    assert tuned["final accuracy"]["mean"] == pytest.approx(0.1)
    assert tuned["accuracy before tuning"]["mean"] == pytest.approx(0.3)
    assert tuned["steps saved"] is not None
    assert evaluated["accuracy before tuning"]["mean"] == pytest.approx(0.4)
    assert evaluated["steps saved"] is None and evaluated["accuracy at equal tokens"] is None
    assert against_base["accuracy before tuning"] is None and against_base["steps saved"] is None
    assert [row["steps"] for row in reduced["variants"]] == [300, 200, 200, 0]
    assert reduced["variants"][1]["untuned"]["a"] == pytest.approx([0.7, 0.71, 0.72, 0.73, 0.74])


def test_a_table_says_what_is_kept_and_what_was_answered_before_tuning(claims, reduced):
    text = claims.report.render(reduced)
    assert "| ours | 7 | 200 | 200 | 0.50 | 0.72 | 0.82 | 0.80 to 0.84 |" in text
    assert "| base | 7 | 300 | 3000 | 1.00 | - | 0.92 |" in text
    assert "| ours over theirs | accuracy before tuning | +0.3 |" in text
    assert "- drop: starts from the weights of `base`, same seed; no teacher; patches reduced: kind drop" in text
    assert "not tuned" in text and "train 200 steps more" in text


def test_a_run_without_a_column_of_the_claim_is_named(claims, tmp_path):
    claim = replace(make_claim(claims.protocol), columns=("a", "b"))
    with pytest.raises(ValueError, match="it, ours, seed 0: no b among its columns"):
        make_result(claims, tmp_path, gap_curve(claims.protocol), claim)
    with pytest.raises(ValueError, match="blind shares lack a"):
        make_result(claims, tmp_path, gap_curve(claims.protocol), blind={"b": 0.1})


def test_whatever_makes_a_variant_is_in_its_description(claims):
    protocol = claims.protocol
    variant = claims.runs.asdict(
        protocol.Variant(
            "it",
            {"patch_embed_type": "naive"},
            {"tube_weight": 0.5},
            teacher="tower",
            phases=(protocol.Phase(0.25, (1,)), protocol.Phase(0.75, (8,))),
            share=0.4,
            sampling="8 high",
        )
    )
    said = claims.tables.describe({**variant, "new_field": 3})
    for part in (
        "patch_embed_type naive",
        "teacher `tower` with tube_weight 0.5",
        "25% of the steps on 1 frame, then 75% of the steps on 8 frames",
        "40% of the steps",
        "frames `8 high`",
        "new_field 3",
    ):
        assert part in said
    assert claims.tables.describe(claims.runs.asdict(protocol.Variant("it"))) == "no teacher"


# Tables and plots


def test_a_table_names_where_its_figures_come_from(claims, result, tmp_path):
    claims.report.write(result, tmp_path / "out")
    files = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in files.values()} == {f"claims-it{end}" for end in (".json", ".md", ".png")}
    text = files[".md"].read_text()
    assert json.loads(files[".json"].read_text()) == result
    assert claims.report.render(result) == text
    words = " ".join(text.split())
    for part in (
        "commit abc, def; 2026-01-02; a CPU",
        "3 seeds (0, 1, 2), 300 steps of 16 videos",
        "8 frames, world `scenes`, optimiser",
    ):
        assert part in words
    assert "| ours | 4 | 300 | 3000 | 0.97 | 0.97 to 0.97 | 200.0 | 3 of 3 |" in text
    assert "| blind | - | - | - | 0.25 |" in text
    assert "| ours over theirs | steps saved | +100 | +100 to +100 | +100 to +100 | - | confirmed |" in text
    assert "| a | 0.25 | 0.97 | 0.86 | +0.09 to +0.13 |" in text
    assert Image.open(files[".png"]).size[0] > 400


def test_answers_about_another_video_have_a_column_where_they_were_asked(claims, result):
    assert "other video" not in claims.report.render(result).lower()
    result["variants"][0]["swapped"] = {"a": [0.3, 0.2, 0.25]}
    assert "| ours | 4 | 300 | 3000 | 0.97 | 0.97 to 0.97 | 0.25 |" in claims.report.render(result)
    assert "| theirs | 6 | 300 | 3000 | 0.86 | 0.85 to 0.87 | - |" in claims.report.render(result)


def test_reductions_are_plotted_over_what_they_keep(claims, result, reduced, monkeypatch):
    drawn = []
    monkeypatch.setattr(claims.tables, "draw_chart", lambda *words: drawn.append(words))
    claims.tables.draw(result)
    claims.tables.draw(reduced)
    (_, _, labels, series), (_, _, both, kinds) = drawn
    assert labels == ["steps"] and [line.name for line in series] == ["ours", "theirs", "blind"]
    assert series[0].points[0] == [(100, 0.5), (200, 0.95), (300, 0.98)]
    assert len(both) == 2
    points = {line.name: line.points for line in kinds}
    assert points.keys() == {"no reduction", "merge", "pool", "drop", "blind"}
    np.testing.assert_allclose(points["pool"], [[(0.5, 0.42)], [(0.5, 0.72)]])
    assert points["no reduction"][1] == []  # nothing of it was tuned
    np.testing.assert_allclose(points["no reduction"][0], [(1, 0.92)])


def test_conditions_have_a_panel_each(claims, reduced, monkeypatch):
    drawn = []
    monkeypatch.setattr(claims.tables, "draw_chart", lambda *words: drawn.append(words))
    columns = ["motion, easy", "where, easy", "motion, fast", "where, fast"]
    for row in reduced["variants"]:
        row["final"] = {column: [row["visual_share"] / (1 + number)] for number, column in enumerate(columns)}
    claims.tables.draw({**reduced, "columns": columns})
    ((_, _, labels, series),) = drawn
    assert [label.split("; ")[1] for label in labels] == ["easy", "fast"]
    assert [line.name for line in series] == ["motion", "where"]
    assert series[1].points == [[(x, x / 2) for x in (1, 0.5, 0.5, 0.25)], [(x, x / 4) for x in (1, 0.5, 0.5, 0.25)]]


def test_published_tables_are_made_from_their_numbers(claims):
    for path in (BENCHMARKS / "results").glob("claims-*.json"):
        result = json.loads(path.read_text())
        assert claims.report.render(result) == path.with_suffix(".md").read_text()
        assert path.with_suffix(".png").exists()
        assert result["kind"] == "measured" and len(result["seeds"]) >= 5


# The page


def test_the_page_is_made_from_the_result_files(claims):
    page = claims.page
    assert page.PAGE.read_text() == page.render(page.RESULTS, page.CHECKPOINT, "../benchmarks/results"), (
        "run: python benchmarks/claims/page.py"
    )


def render_page(claims, folder, result=None, scores=None):
    """The page of a folder with one result, that of `guidance`."""
    if result is not None:
        (folder / "claims-guidance.json").write_text(json.dumps({**result, "name": "guidance"}))
    if scores is not None:
        (folder / "held_out.json").write_text(json.dumps(scores))
    return claims.page.render(folder, folder / "held_out.json", "there")


@pytest.mark.parametrize(
    ("sign", "seeds", "verdict"),
    [
        (1, 5, "confirmed at this scale"),
        (-1, 5, "contradicted at this scale"),
        (0, 5, "not seen"),
        (1, 4, "no verdict, 4 seeds of 5"),
    ],
)
def test_the_page_gives_the_verdict_of_the_protocol(claims, tmp_path, sign, seeds, verdict):
    result = make_result(claims, tmp_path, gap_curve(claims.protocol, sign), seeds=seeds)
    text = render_page(claims, tmp_path, result)
    assert f"**ours over theirs: {verdict}.** Final accuracy {sign * (0.1 + (seeds - 1) / 200):+.3g}" in text
    assert text.count("\nNot run yet: ") == len(claims.quotes.CLAIMS)  # all but one, and the needle grid
    assert f"n = {seeds}" in text and "Measured: `python it`, a CPU, commit abc, def, 2026-01-02." in text
    assert "](there/claims-guidance.md)" in text and "](there/claims-guidance.png)" in text
    row = next(line for line in text.splitlines() if line.startswith("| b1."))
    assert "ours over theirs" in row and row.endswith(f"| {seeds} | {verdict} |")


def test_the_page_says_how_small_a_difference_would_have_been_seen(claims, tmp_path):
    result = make_result(claims, tmp_path, gap_curve(claims.protocol))
    visible = result["comparisons"][0]["final accuracy"]["visible"]
    assert f"n = 5; visible {visible:.3g}" in render_page(claims, tmp_path, result)


def test_the_page_names_columns_only_where_there_are_several(claims, tmp_path):
    protocol = claims.protocol
    claim = replace(make_claim(protocol), columns=("a", "b"))

    def curve(name, seed):
        ahead = 0.2 + seed / 50 if name == "ours" else 0.0
        shares = {"a": (0.5 + ahead,), "b": (0.5 + seed / 90 * (-1) ** seed * (name == "ours"),)}
        return protocol.Curve((100,), (10,), shares, {name: value[0] for name, value in shares.items()}, 7)

    text = render_page(claims, tmp_path, make_result(claims, tmp_path, curve, claim))
    assert "Columns whose own t interval excludes 0: a +0.24 (" in text and "b +" not in text.split("excludes 0:")[1]


def test_the_page_names_the_bars_that_the_checkpoint_misses(claims, tmp_path):
    good = {"task": "color", "num_questions": 500, "array": 0.95, "mp4": 0.95, "single": None}
    good |= {"swapped": 0.2, "blind": 0.15, "single_blind": None}
    scores = [good, {**good, "task": "where", "array": 0.7, "swapped": 0.5}, {**good, "task": "rel", "array": 0.5}]
    text = render_page(claims, tmp_path, scores={**STAMP, "scores": scores})
    assert "Missed: where (arrays): 0.700 < 0.9; where (video swapped): 0.500 > 0.150 + 0.1." in text
    assert "| color | 500 | 0.950 | 0.950 | - | 0.200 | 0.150 | - |" in text
    text = render_page(claims, tmp_path, scores={**STAMP, "scores": [good]})
    assert "All are reached." in text and "Measured: `python it`, a CPU, commit abc, 2026-01-02." in text
    (tmp_path / "held_out.json").unlink()
    assert "No table file" in render_page(claims, tmp_path)


def test_the_page_shows_the_needle_grid(claims, tmp_path):
    assert "run.py needle-grid`" in render_page(claims, tmp_path)
    (tmp_path / "needle-grid.json").write_text(
        json.dumps({**STAMP, "seeds": [0, 1], "videos": 50, "summary": "It is found."})
    )
    text = render_page(claims, tmp_path)
    assert (
        "It is found. 2 seeds, 50 videos in a cell; no verdict." in text
        and "](there/needle-grid.png)" in text
        and "commit abc" in text
    )


def test_every_claim_has_a_quotation_with_whole_rows(claims):
    assert {quote.claim for quote in claims.quotes.CLAIMS} == claims.run.CLAIMS.keys()
    assert claims.quotes.NEEDLE.claim == claims.run.GRID
    for quote in (*claims.quotes.CLAIMS, claims.quotes.NEEDLE):
        assert quote.words and {len(row) for row in quote.rows} <= {len(quote.header)}


# The script


def test_quick_runs_every_claim_and_leaves_nothing(claims, tmp_path, monkeypatch, capsys):
    written, pages = {}, []
    write, write_page = claims.run.write, claims.run.write_page

    def watch(result, folder):
        write(result, folder)
        written[result["name"]] = (result, (folder / f"claims-{result['name']}.md").read_text())
        assert (folder / f"claims-{result['name']}.png").exists()

    def watch_page(results, page):
        write_page(results, page)
        pages.append(page.read_text())

    monkeypatch.setattr(claims.run, "write", watch)
    monkeypatch.setattr(claims.run, "write_page", watch_page)
    monkeypatch.setattr(claims.run, "provenance", lambda device: {**STAMP, "kind": "measured"})
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (*(BENCHMARKS / "results").iterdir(), claims.page.PAGE)}
    claims.run.main(["--quick"])
    assert written.keys() == claims.run.CLAIMS.keys()
    for result, text in written.values():
        assert result["budget"]["steps"] == 3 and result["seeds"] == [0] and not result["comparisons"]
        assert "no verdict" in text and not any(f"| {word} |" in text for word in ("confirmed", "contradicted"))
    assert {row["steps"] for result, _ in written.values() for row in result["variants"]} >= {3}
    assert "Not run yet" not in pages[-1] and "at this scale:" not in pages[-1]
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "nothing is kept" in capsys.readouterr().out


def test_a_claim_that_fails_does_not_stop_the_others(claims, tmp_path, monkeypatch, capsys):
    tried = []

    def fail_once(claim, *rest):
        tried.append(claim.name)
        if claim.name == "guidance":
            raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(claims.run, "try_claim", fail_once)
    options = SimpleNamespace(quick=False, page=tmp_path / "results.md")
    with pytest.raises(SystemExit, match="failed: guidance;"):
        claims.run.try_all(["guidance", "patch_embedding"], tmp_path, tmp_path, options, STAMP)
    assert tried == ["guidance", "patch_embedding"] and options.page.exists()
    assert "the loss is nan" in capsys.readouterr().err


def test_an_unknown_claim_is_named(claims, capsys):
    with pytest.raises(SystemExit):
        claims.run.main(["figure_9"])
    assert "no claim is called figure_9" in capsys.readouterr().err


def test_columns_of_a_claim_are_columns_of_the_world(claims):
    for claim in claims.run.CLAIMS.values():
        known = claims.worlds.WORLDS[claim.budget.world].blind(claim.budget, 50, 50).keys()
        assert known >= set(claim.columns), claim.name
        assert {variant.name for variant in claim.variants} >= set(sum(claim.pairs, ()))
