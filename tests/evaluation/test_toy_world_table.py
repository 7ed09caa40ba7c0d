import json
from dataclasses import replace

import pytest

from elva_hf.data.toy_world import HELD_OUT_LOOKS, TASKS, questions, sample_scene
from elva_hf.evaluation.toy_world import (
    BARS,
    HELD_OUT,
    TaskScore,
    draw_questions,
    format_table,
    missed_bars,
    read_scores,
    write_scores,
)

GOOD = TaskScore("color", 500, array=0.97, mp4=0.96, single=0.99, swapped=0.2, blind=0.15, single_blind=0.15)


def test_a_good_score_misses_nothing():
    assert missed_bars([GOOD]) == []


@pytest.mark.parametrize("column", ["array", "mp4", "single"])
def test_a_task_must_pass_from_arrays_from_files_and_with_one_object(column):
    assert len(missed_bars([replace(GOOD, **{column: 0.949})])) == 1


def test_merging_must_leave_97_hundredths_of_every_task():
    assert missed_bars([replace(GOOD, unmerged=0.99)]) == []
    assert len(missed_bars([replace(GOOD, unmerged=1.0, array=0.969)])) == 1
    assert missed_bars([replace(GOOD, task="rel", unmerged=1.0, array=0.5)]) == []


def test_answering_without_the_right_video_is_a_miss():
    assert len(missed_bars([replace(GOOD, swapped=0.26)])) == 1
    assert missed_bars([replace(GOOD, task="rel", array=0.5, mp4=0.5, swapped=0.9)]) == []


def test_every_bar_is_of_a_task_of_the_world():
    assert set(BARS) == set(TASKS) - {"rel"} and min(BARS.values()) >= 0.9


@pytest.mark.parametrize("single", [False, True])
def test_each_task_gets_its_number_of_questions_from_different_scenes(single):
    asked = draw_questions(5, single=single, split="test")
    for row in {item.row for item in asked}:
        seeds = [item.seed for item in asked if item.row == row]
        assert len(seeds) == len(set(seeds)) == 5
    for item in asked:
        assert item.question in questions(sample_scene(item.seed, split="test", single=single))


def test_the_table_has_a_row_for_each_score():
    lines = format_table([GOOD, replace(GOOD, task="rel", single=None, single_blind=None)]).splitlines()
    assert lines[2] == "| color | 500 | 0.970 | 0.960 | 0.990 | 0.200 | 0.150 | 0.150 |  | 0.95 |"
    assert lines[3].endswith("| none |") and len(lines) == 4


def test_held_out_rows_ask_of_held_out_looks_only():
    asked = [item for item in draw_questions(20, single=False, split="test") if item.row.endswith(HELD_OUT)]
    assert len(asked) == 60
    for item in asked:
        words = item.question.text.rstrip("?").split()
        named = [o for o in sample_scene(item.seed, split="test").objects if o.shape in words or o.color in words]
        assert [(o.color, o.shape, o.pattern) in HELD_OUT_LOOKS for o in named] == [True]
        assert item.question.answer == getattr(named[0], item.row.removesuffix(HELD_OUT))
    assert not any(item.row.endswith(HELD_OUT) for item in draw_questions(5, single=True, split="test"))


def test_scores_are_read_as_they_were_written(tmp_path):
    scores = [GOOD, replace(GOOD, task="rel", single=None, unmerged=0.5)]
    write_scores(scores, tmp_path / "scores.json", commit="abc")
    assert read_scores(tmp_path / "scores.json") == scores
    assert json.loads((tmp_path / "scores.json").read_text())["commit"] == "abc"
