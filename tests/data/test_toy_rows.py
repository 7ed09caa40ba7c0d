"""What a training scene may be asked."""

import random

import pytest

from elva_hf.data.toy_rows import ToyRows, links_held_out_pair, named_by_shape, training_questions
from elva_hf.data.toy_world import COLORS, HELD_OUT_PAIRS, SHAPES, Question, questions, sample_scene

SCENES = [sample_scene(seed) for seed in range(300)]


def linked(asked, scene):
    """The pairs of colour and shape that colour and shape questions of a scene link."""
    pairs = set()
    for question in asked:
        for thing in scene.objects:
            words = question.text.rstrip("?").split()
            if question.task == "color" and thing.shape in words and question.answer == thing.color:
                pairs.add((thing.color, thing.shape))
            if question.task == "shape" and thing.color in words and question.answer == thing.shape:
                pairs.add((thing.color, thing.shape))
    return pairs


def test_each_color_is_held_out_with_one_shape():
    assert sorted(color for color, _ in HELD_OUT_PAIRS) == sorted(COLORS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)


def test_training_never_links_a_held_out_pair_but_shows_it_and_asks_other_things_about_it():
    shown, other = 0, 0
    for scene in SCENES:
        asked = training_questions(scene, random.Random(0))
        assert not linked(asked, scene) & HELD_OUT_PAIRS
        assert linked(questions(scene), scene) - HELD_OUT_PAIRS == linked(asked, scene)
        for thing in scene.objects:
            if (thing.color, thing.shape) in HELD_OUT_PAIRS:
                shown += 1
                other += any(thing.shape in q.text and q.task in ("where", "pattern", "motion") for q in asked)
    assert shown > 80 and other > 40


def test_only_questions_of_the_split_train_are_withheld():
    scene = next(
        scene
        for scene in (sample_scene(seed, split="validation") for seed in range(100))
        if any(links_held_out_pair(question, scene) for question in questions(scene))
    )
    assert training_questions(scene, random.Random(0), 1.0) == questions(scene)


def test_rows_for_training_withhold_too():
    rows = ToyRows(60, questions_per_video=40)
    for index in range(60):
        scene = sample_scene(index, single=random.Random(index).random() < rows.single_share)
        messages = rows[index]["messages"]
        asked = [
            Question(text.split()[1], text, answer["content"][0]["text"])
            for question, answer in zip(messages[::2], messages[1::2], strict=True)
            for text in [question["content"][-1]["text"]]
            if text.startswith(("What color is", "What shape is"))
        ]
        assert not any(links_held_out_pair(question, scene) for question in asked)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_objects_are_named_by_shape_as_often_as_asked(share):
    for scene in SCENES[:60]:
        for question in training_questions(scene, random.Random(0), share):
            renamed = named_by_shape(question, scene)
            assert renamed.answer == question.answer and renamed.task == question.task
            if share:
                assert renamed == question  # nothing is left to rename
            if any(f"the {thing.color} " in question.text for thing in scene.objects):
                assert not share and any(f"the {thing.shape}" in renamed.text for thing in scene.objects)
