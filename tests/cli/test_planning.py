"""`elva plan` with merging: what its tables say is what the ledger counts, and its JSON is the same."""

import json
import re

import pytest
from command_line import fails, succeeds
from saved_elva import save_checkpoint

from elva_hf.cli.planning import describe_costs
from elva_hf.configuration_elva import ElvaConfig
from elva_hf.ledger_elva import plan_table5, plan_tokens

GRIDS = [8 * [(4, 4)]]  # what the checkpoint of saved_elva sees of the clip


def table(text, first, last):
    """The lines between two headings, cut where two blanks stand."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first)) + 1
    end = next(i for i, line in enumerate(lines) if i >= start and line.startswith(last))
    return [re.split(r"  +", line.strip()) for line in lines[start:end] if line.strip()]


def costs(text):
    """Each row of the table of costs by its label."""
    rows = {}
    for row in table(text, "layers" if "\nlayers " in text else "merging", "FLOPs up to"):
        rows.setdefault(row[0], row[1:])
    return rows


def test_stages_are_shown_with_their_merge_and_tokens(folder, clip):
    text = succeeds("plan", clip, "--model", folder, "--merge-schedule", "table5")
    assert "\nmerging   table5\n" in text
    stages = table(text, "layers", "  ")
    assert [row[:-1] for row in stages] == [
        ["0", "170", "100 %"],
        ["1", "keep 50 % of the patches", "106", "62 %"],
        ["2", "keep 50 % of the patches", "74", "44 %"],
        ["3", "keep 50 % of the patches", "58", "34 %"],
    ]
    assert [len(row[-1]) for row in stages] == [18, 11, 8, 6]
    assert set("".join(row[-1] for row in stages)) == {"#"}


def test_layers_between_two_merges_are_one_line(clip):
    text = succeeds("plan", clip, "--preset", "elva-7b", "--merge-schedule", "table5")
    assert [row[0] for row in table(text, "layers", "  ")] == ["0", "1-2", "3-13", "14-27"]


def test_costs_are_those_of_the_ledger_with_merging_and_without(folder, clip):
    rows = costs(succeeds("plan", clip, "--model", folder, "--merge-schedule", "table5"))
    config = ElvaConfig.from_pretrained(folder)
    after, before = (plan_tokens(GRIDS, config, name) for name in ("table5", "none"))
    for label, part in {"FLOPs": "total", "linear": "linear", "attention": "attention", "lm_head": "lm_head"}.items():
        whole, merged = getattr(before.flops.maximum, part), getattr(after.flops.maximum, part)
        assert [_value(cell) for cell in rows[label][:2]] == [pytest.approx(n, rel=6e-3) for n in (whole, merged)]
        assert float(rows[label][2]) == pytest.approx(merged / whole, abs=6e-4)
    assert _value(rows["patch embedding"][0]) == pytest.approx(before.flops.maximum.patch_embed, rel=6e-3)
    bytes_kept = _value(rows["keys and values"][1].removesuffix("B"))
    assert bytes_kept == pytest.approx(after.kv_cache_bytes.maximum, rel=6e-3)


def test_large_numbers_keep_their_size():
    plan = plan_table5(ElvaConfig.from_preset("elva-7b"), 64, "table5")
    rows = costs("\n".join(describe_costs(plan, "table5")))
    assert _value(rows["FLOPs"][1]) == pytest.approx(plan.flops.maximum.total, rel=6e-3)
    assert _value(rows["patch embedding"][1]) == pytest.approx(plan.flops.maximum.patch_embed, rel=6e-3)
    assert rows["FLOPs"] == ["157 T", "45.4 T", "0.290"] and rows["lm_head"][0] == "1.09 G"
    assert rows["keys and values"] == ["593 MB", "187 MB", "0.315"]


def _value(cell):
    number, _, prefix = cell.partition(" ")
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[prefix]


def test_thresholds_show_the_least_and_the_most(folder, clip):
    text = succeeds("plan", clip, "--model", folder, "--merge-schedule", "paper")
    stages = table(text, "layers", "  ")
    assert stages[1] == ["1", "merge above similarity 0.6", "58-170", "34-100 %", 6 * "#" + 12 * "-"]
    assert stages[3][1:4] == ["keep 50 % of the patches", "58-106", "34-62 %"]
    assert re.fullmatch(r"[\d.]+-[\d.]+ [kMGT]", costs(text)["linear"][1])
    assert text.endswith("the least and the most.\n")
    assert "the least and the most" not in succeeds("plan", clip, "--model", folder, "--merge-schedule", "table5")


def test_the_schedule_is_the_models_own_if_none_is_given(clip, tmp_path):
    folder = save_checkpoint(tmp_path)
    plain = succeeds("plan", clip, "--model", folder)
    assert "merging   none: 4 layers of 170 tokens\n" in plain and "\nlayers " not in plain
    assert set(costs(plain)) >= {"FLOPs", "keys and values"} and len(costs(plain)["FLOPs"]) == 1
    config = ElvaConfig.from_pretrained(folder)
    config.merge_schedule = {"steps": "table5", "max_run": 2, "window": 6}
    config.save_pretrained(folder)
    text = succeeds("plan", clip, "--model", folder)
    assert "merging   table5, at most 2 frames in a token, never across a border every 6 frames\n" in text
    assert succeeds("plan", clip, "--model", folder, "--merge-schedule", "none") == plain


def test_a_schedule_can_be_written_as_json(folder, clip):
    steps = '[{"layer": 2, "target_ratio": 0.125}]'
    text = succeeds("plan", clip, "--model", folder, "--merge-schedule", steps)
    assert "merging   custom\n" in text
    assert [row[0] for row in table(text, "layers", "  ")] == ["0-1", "2-3"]
    text = succeeds(
        "plan",
        clip,
        "--model",
        folder,
        "--merge-schedule",
        '{"steps": "table5", "ratio_of": "input", "survivor": "first"}',
    )
    assert "keep 50 % of input patches" in text and "merging   table5, the first of a run stays\n" in text


def test_json_holds_what_the_tables_show(folder, clip):
    options = ("--model", folder, "--merge-schedule", "paper", "--frames", 5)
    fields = json.loads(succeeds("plan", clip, *options, "--json"))
    plan = plan_tokens([5 * [(4, 4)]], ElvaConfig.from_pretrained(folder), "paper")
    assert {key: fields[key] for key in plan.to_dict()} == json.loads(json.dumps(plan.to_dict()))
    assert fields["unmerged"]["flops"]["maximum"]["total"] == plan.without_merging().flops.maximum.total
    assert fields["video"] == str(clip) and fields["source"]["codec"] == "h264" and fields["num_asked"] == 5
    assert fields["model"] == str(folder) and fields["max_position_embeddings"] == 2048
    assert [frame["index"] for frame in fields["frames"]] == [0, 2, 4, 5, 7]
    first = {"index": 0, "time": 0.0, "resolution": "high", "rows": 4, "columns": 4, "tokens": 21}
    assert fields["frames"][0] == first


def test_unknown_schedules_are_one_line_with_the_choices(folder, clip):
    for given, told in (("tabel5", "none, paper, table5"), ("[{", "JSON"), ('[{"layer": 9, "target_ratio": 1}]', "9")):
        assert told in fails("plan", clip, "--model", folder, "--merge-schedule", given)


def test_no_line_is_wider_than_a_terminal():
    config = ElvaConfig.from_preset("elva-7b", similarity_threshold=0.125, target_ratio=0.125)
    for schedule in ("none", "paper", "table5"):
        lines = describe_costs(plan_table5(config, 128, schedule), schedule)
        assert max(map(len, lines)) <= 80
        assert all(line == line.rstrip() and line.isascii() for line in lines)
