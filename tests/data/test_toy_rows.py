"""What of a scene is asked, and what no training scene shows."""

import random

import pytest

from elva_hf.data.toy_rows import asks_of_held_out_look, name_some_by_shape, named_by_shape
from elva_hf.data.toy_world import COLORS, HELD_OUT_LOOKS, PATTERNS, SHAPES, questions, sample_scene


def looks(scene):
    return {(thing.color, thing.shape, thing.pattern) for thing in scene.objects}


def test_of_each_colored_shape_one_pattern_is_held_out():
    assert sorted((color, shape) for color, shape, _ in HELD_OUT_LOOKS) == sorted(
        (color, shape) for color in COLORS for shape in SHAPES
    )
    for pattern in PATTERNS:
        assert 7 <= sum(pattern == held for _, _, held in HELD_OUT_LOOKS) <= 8


def test_training_shows_every_other_look_and_every_pair_but_none_that_is_held_out():
    shown = set.union(*(looks(sample_scene(seed)) for seed in range(3000)))
    assert not shown & HELD_OUT_LOOKS
    assert len(shown) == len(COLORS) * len(SHAPES) * len(PATTERNS) - len(HELD_OUT_LOOKS)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert {(look[first], look[second]) for look in HELD_OUT_LOOKS} <= {(x[first], x[second]) for x in shown}


def test_in_training_the_pattern_is_as_open_as_before():
    """Given the colour or the shape alone no pattern is rare: what a question's words say rules nothing out."""
    things = [thing for seed in range(3000) for thing in sample_scene(seed).objects]
    for kind in ("color", "shape"):
        for value in {getattr(thing, kind) for thing in things}:
            of_it = [thing.pattern for thing in things if getattr(thing, kind) == value]
            assert min(of_it.count(pattern) for pattern in PATTERNS) / len(of_it) > 0.1


@pytest.mark.parametrize("split", ["validation", "test", "demo"])
def test_other_splits_show_them_at_their_natural_rate(split):
    scenes = [sample_scene(seed, split=split) for seed in range(400)]
    things = [thing for scene in scenes for thing in scene.objects]
    held = sum((thing.color, thing.shape, thing.pattern) in HELD_OUT_LOOKS for thing in things)
    assert 0.2 < held / len(things) < 0.3


def test_a_question_of_a_held_out_look_is_known_by_the_thing_it_names():
    seen = set()
    for seed in range(200):
        scene = sample_scene(seed, split="validation")
        for question in questions(scene):
            words = question.text.rstrip("?").split()
            named = [thing for thing in scene.objects if {thing.color, thing.shape} & set(words)]
            wanted = any((thing.color, thing.shape, thing.pattern) in HELD_OUT_LOOKS for thing in named)
            assert asks_of_held_out_look(question, scene) == wanted
            seen.add((question.task, wanted))
    assert {("color", True), ("color", False), ("pattern", True), ("where", True), ("count", False)} <= seen
    assert ("count", True) not in seen


def test_the_share_named_by_shape_is_as_asked():
    for scene in map(sample_scene, range(60)):
        asked = questions(scene)
        assert name_some_by_shape(asked, scene, random.Random(0), 0.0) == asked
        renamed = name_some_by_shape(asked, scene, random.Random(0), 1.0)
        assert [(q.task, q.answer) for q in renamed] == [(q.task, q.answer) for q in asked]
        for before, after in zip(asked, renamed, strict=True):
            assert named_by_shape(after, scene) == after
            if any(f"the {thing.color} " in before.text for thing in scene.objects):
                assert any(f"the {thing.shape}" in after.text for thing in scene.objects)
                assert not any(thing.color in after.text.split() for thing in scene.objects)
