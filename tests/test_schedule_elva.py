import dataclasses
import json
import math

import pytest

from elva_hf.errors_elva import ConfigurationError
from elva_hf.schedule_elva import PRESETS, MergeSchedule, MergeStep, plain_schedule

SHALLOW = {"layer": 1, "similarity_threshold": 0.6}
DEEP = {"layer": 3, "target_ratio": 0.5}


def layers(schedule):
    return [step.layer for step in schedule.steps]


@pytest.mark.parametrize(
    "num_layers, expected",
    [
        (4, [1, 2, 3]),
        (5, [1, 2, 3]),
        (6, [1, 2, 3]),
        (7, [1, 2, 3]),
        (8, [1, 3, 4]),
        (12, [1, 3, 6]),
        (24, [1, 3, 12]),
        (28, [1, 3, 14]),
        (80, [1, 3, 40]),
    ],
)
def test_presets_find_their_layers_at_any_depth(num_layers, expected):
    for name in ("paper", "table5"):
        assert layers(MergeSchedule.resolve(name, num_layers)) == expected


def test_the_paper_has_two_thresholds_and_a_ratio_and_table_5_three_ratios():
    paper, table5 = (MergeSchedule.resolve(name, 28, 0.7, 0.25) for name in ("paper", "table5"))
    assert [step.similarity_threshold for step in paper.steps] == [0.7, 0.7, None]
    assert [step.target_ratio for step in paper.steps] == [None, None, 0.25]
    assert [step.target_ratio for step in table5.steps] == [0.25, 0.25, 0.25]


def test_the_numbers_of_a_preset_are_those_of_section_3_1():
    steps = MergeSchedule.resolve("paper", 28).steps
    assert (steps[0].similarity_threshold, steps[2].target_ratio) == (0.6, 0.5)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["paper", "table5"])
def test_presets_refuse_a_decoder_too_shallow_for_three_merges(name, num_layers):
    with pytest.raises(ConfigurationError, match=rf"'{name}'.*at least 4; this one has {num_layers}.*list of steps"):
        MergeSchedule.resolve(name, num_layers)


@pytest.mark.parametrize("value", [None, "none", [], {}, {"steps": "none"}, {"steps": []}, MergeSchedule()])
@pytest.mark.parametrize("num_layers", [1, 28])
def test_no_steps_mean_no_merging(value, num_layers):
    schedule = MergeSchedule.resolve(value, num_layers)
    assert not schedule
    assert schedule == MergeSchedule()


@pytest.mark.parametrize(
    "value",
    [
        [SHALLOW, DEEP],
        (MergeStep(1, similarity_threshold=0.6), DEEP),
        {"steps": [SHALLOW, MergeStep(3, target_ratio=0.5)]},
        MergeSchedule(steps=(MergeStep(1, 0.6), MergeStep(3, None, 0.5))),
        MergeSchedule([SHALLOW, DEEP]),
    ],
)
def test_a_schedule_can_be_written_in_several_ways(value):
    schedule = MergeSchedule.resolve(value, 4)
    assert schedule
    assert schedule.steps == (MergeStep(1, similarity_threshold=0.6), MergeStep(3, target_ratio=0.5))
    assert hash(schedule) == hash(MergeSchedule.resolve([SHALLOW, DEEP], 4))


def test_a_dict_may_name_a_preset_and_change_how_it_merges():
    schedule = MergeSchedule.resolve(
        {"steps": "table5", "max_run": 8, "window": 16, "ratio_of": "input", "survivor": "first"}, 12
    )
    assert layers(schedule) == [1, 3, 6]
    assert (schedule.max_run, schedule.window, schedule.ratio_of, schedule.survivor) == (8, 16, "input", "first")


def test_what_is_not_said_is_as_in_the_paper():
    schedule = MergeSchedule.resolve([SHALLOW], 2)
    assert (schedule.max_run, schedule.window, schedule.ratio_of, schedule.survivor) == (None, None, "current", "last")


def test_a_step_is_found_by_its_layer():
    schedule = MergeSchedule.resolve("paper", 28)
    assert schedule.step_at(3) is schedule.steps[1]
    assert schedule.step_at(0) is schedule.step_at(2) is MergeSchedule().step_at(1) is None


@pytest.mark.parametrize(
    "value",
    ["none", *[{"steps": name, "max_run": 4} for name in PRESETS], [DEEP], {"steps": [SHALLOW], "window": 2}],
)
def test_a_schedule_survives_json(value):
    schedule = MergeSchedule.resolve(value, 6)
    assert MergeSchedule.resolve(json.loads(json.dumps(schedule.to_dict())), 6) == schedule


def test_a_schedule_as_json_leaves_out_the_policy_a_step_does_not_have():
    assert MergeSchedule.resolve([SHALLOW, DEEP], 4).to_dict() == {
        "steps": [SHALLOW, DEEP],
        "ratio_of": "current",
        "max_run": None,
        "window": None,
        "survivor": "last",
    }


def test_any_way_of_writing_a_schedule_becomes_json():
    step = MergeStep(3, target_ratio=0.5)
    assert plain_schedule([SHALLOW, step]) == plain_schedule((SHALLOW, step)) == [SHALLOW, DEEP]
    assert plain_schedule({"steps": [step], "max_run": 2}) == {"steps": [DEEP], "max_run": 2}
    assert plain_schedule(MergeSchedule([step]))["steps"] == [DEEP]
    assert plain_schedule("paper") == "paper"


def test_schedules_and_steps_cannot_be_changed_behind_a_model():
    schedule = MergeSchedule.resolve("paper", 28)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.max_run = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.steps[0].layer = 3


@pytest.mark.parametrize("threshold", [-0.99, 0, 1, 1.5, 2])
def test_any_threshold_above_minus_1_is_allowed(threshold):
    assert MergeStep(1, similarity_threshold=threshold).similarity_threshold == threshold


@pytest.mark.parametrize("ratio", [1e-9, 0.3, 1])
def test_any_ratio_up_to_1_is_allowed(ratio):
    assert MergeStep(1, target_ratio=ratio).target_ratio == ratio


@pytest.mark.parametrize(
    "value, words",
    [
        ("papers", r"'papers' is not known; choose one of none, paper, table5"),
        (0.5, r"steps=0\.5: expected a list of steps such as .*none, paper, table5"),
        ({"layer": 1, "target_ratio": 0.5}, r"merge schedule has no 'layer', 'target_ratio'; its keys are 'steps'"),
        ({"steps": [DEEP], "max_runs": 3}, r"no 'max_runs'; its keys are .*'max_run', 'window', 'survivor'"),
        ([0.6], r"merge step 0\.6: expected a dict such as"),
        ([{"similarity_threshold": 0.6}], r"merge step \{'similarity_threshold': 0\.6\}: expected a dict such as"),
        ([{**DEEP, "ratio": 1}], r"merge step has no 'ratio'; its keys are 'layer', 'similarity_threshold', 'target"),
        ([{"layer": 1}], r"layer 1: expected exactly one of similarity_threshold and target_ratio, got neither"),
        ([{**SHALLOW, **DEEP}], r"layer 3: expected exactly one of .*, got similarity_threshold and target_ratio"),
        ([{**DEEP, "layer": 0}], r"layer=0: expected an integer from 1; the input of layer 0"),
        ([{**DEEP, "layer": -1}], r"layer=-1"),
        ([{**DEEP, "layer": 1.0}], r"layer=1\.0"),
        ([{**DEEP, "layer": True}], r"layer=True"),
        ([{**DEEP, "layer": 6}], r"layer 6: the decoder has 6 layers, .* is 5"),
        ([{**SHALLOW, "similarity_threshold": -1}], r"similarity_threshold=-1: expected a number above -1"),
        ([{**SHALLOW, "similarity_threshold": math.nan}], r"similarity_threshold=nan"),
        ([{**SHALLOW, "similarity_threshold": math.inf}], r"similarity_threshold=inf"),
        ([{**SHALLOW, "similarity_threshold": "0.6"}], r"similarity_threshold='0\.6'"),
        ([{**SHALLOW, "similarity_threshold": True}], r"similarity_threshold=True"),
        ([{**DEEP, "target_ratio": 0}], r"target_ratio=0: expected kept / input tokens, above 0 and at most 1"),
        ([{**DEEP, "target_ratio": 1.01}], r"target_ratio=1\.01"),
        ([{**DEEP, "target_ratio": 50}], r"target_ratio=50"),
        ([{**DEEP, "target_ratio": [0.5]}], r"target_ratio=\[0\.5\]"),
        ([DEEP, DEEP], r"layers \[3, 3\]: expected strictly increasing layers"),
        ([DEEP, {**DEEP, "layer": 2}], r"layers \[3, 2\]: expected strictly increasing layers"),
        ([DEEP, {**SHALLOW, "layer": 4}], r"layer 4 has a similarity_threshold after the target_ratio at layer 3"),
        ({"ratio_of": "output"}, r"ratio_of='output': expected one of 'current', 'input'"),
        ({"survivor": "middle"}, r"survivor='middle': expected one of 'last', 'first'"),
        ({"max_run": 0}, r"max_run=0: expected a number of frames from 1, or None"),
        ({"max_run": 2.0}, r"max_run=2\.0"),
        ({"window": -4}, r"window=-4: expected a number of frames from 1, or None"),
        ({"window": False}, r"window=False"),
    ],
)
def test_what_is_no_schedule_is_refused_by_name(value, words):
    with pytest.raises(ConfigurationError, match=words):
        MergeSchedule.resolve(value, 6)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_outside_resolve_says_that_it_needs_the_depth(name):
    with pytest.raises(ConfigurationError, match=rf"steps='{name}'.*MergeSchedule\.resolve"):
        MergeSchedule(name)


def test_a_bad_number_for_a_preset_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"target_ratio=2"):
        MergeSchedule.resolve("paper", 6, target_ratio=2)
    with pytest.raises(ConfigurationError, match=r"similarity_threshold=-3"):
        MergeSchedule.resolve("paper", 6, similarity_threshold=-3)
