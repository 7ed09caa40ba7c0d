from dataclasses import replace

import pytest

from elva_hf.data.toy_world import TASKS, questions, sample_scene
from elva_hf.evaluation.toy_world import BARS, SINGLE_TASKS, TaskScore, draw_questions, format_table, missed_bars

GOOD = TaskScore("color", 500, array=0.97, mp4=0.96, single=0.99, swapped=0.2, blind=0.15, single_blind=0.15)


def test_a_good_score_misses_nothing():
    assert missed_bars([GOOD]) == []


@pytest.mark.parametrize("column", ["array", "mp4"])
def test_a_mixed_task_must_pass_from_arrays_and_from_files(column):
    assert len(missed_bars([replace(GOOD, **{column: 0.949})])) == 1


def test_a_task_of_one_object_is_judged_on_one_object():
    where = replace(GOOD, task="where", array=0.1, mp4=0.1, single=0.71)
    assert missed_bars([where]) == []
    assert len(missed_bars([replace(where, single=0.69)])) == 1


def test_answering_without_the_right_video_is_a_miss():
    assert len(missed_bars([replace(GOOD, swapped=0.26)])) == 1
    assert missed_bars([replace(GOOD, task="rel", array=0.5, mp4=0.5, swapped=0.9)]) == []


def test_every_bar_is_of_a_task_of_the_world():
    assert set(BARS) <= set(TASKS) and set(SINGLE_TASKS) <= set(BARS)


@pytest.mark.parametrize("single", [False, True])
def test_each_task_gets_its_number_of_questions_from_different_scenes(single):
    asked = draw_questions(5, single=single, split="test")
    for task in {item.question.task for item in asked}:
        seeds = [item.seed for item in asked if item.question.task == task]
        assert len(seeds) == len(set(seeds)) == 5
    for item in asked:
        assert item.question in questions(sample_scene(item.seed, split="test", single=single))


def test_the_table_has_a_row_for_each_score():
    lines = format_table([GOOD, replace(GOOD, task="rel", single=None, single_blind=None)]).splitlines()
    assert lines[2] == "| color | 500 | 0.970 | 0.960 | 0.990 | 0.200 | 0.150 | 0.150 | 0.95 (mixed) |"
    assert lines[3].endswith("| none |") and len(lines) == 4
