"""benchmarks/claims/teachers.py and teacher_kind.py: what towers are taught, that they are taught, what they see."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from elva_hf.data.toy_teacher import toy_teacher_features
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import Scene, SceneDigit, SceneObject, render, sample_scene
from elva_hf.training.recipe import read_body
from elva_hf.training.video_teacher import VideoTeacherRecipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STEPS = 2


@pytest.fixture(scope="module")
def claims():
    """The modules of `benchmarks/claims/`, imported as its script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from claims import teacher_kind, teachers

        yield SimpleNamespace(teachers=teachers, claim=teacher_kind.CLAIM)


@pytest.fixture(scope="module")
def teachers(claims):
    return claims.teachers


@pytest.fixture(scope="module")
def plan(teachers):
    phases = {name: replace(phase, steps=min(phase.steps, STEPS)) for name, phase in teachers.PLAN.phases.items()}
    return teachers.TowerPlan(phases, num_scenes=6, seed=3)


@pytest.fixture(scope="module")
def towers(teachers, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    teachers.prepare(["looks", "image tower", "video tower"], folder, "cpu", plan)
    return folder


def clip(seed=0, num_frames=3):
    return render(sample_scene(seed, num_frames=num_frames))


def weights(folder, name):
    return load_file(folder / name / "model" / "model.safetensors")


# Captions


def scene_of(*things, digit=None, flash=None):
    frames = len(things[0].cells)
    return Scene(1, "train", frames, len(things) == 1, things, digit, flash, 20)


def test_a_caption_of_an_image_says_what_is_where(teachers):
    ring = SceneObject("ring", "red", "checks", "still", ((3, 0),))
    cross = SceneObject("cross", "blue", "plain", "still", ((0, 2),))
    digit = SceneDigit(7, 0, (2, 3))
    said = "blue plain cross top right, red checks ring bottom left, digit 7 bottom right"
    assert teachers.describe(scene_of(ring, cross, digit=digit)) == said


def test_a_caption_of_a_clip_says_what_happens(teachers):
    moving = SceneObject("ring", "red", "checks", "left", ((3, 2),) * 4 + ((3, 1),) * 4)
    still = SceneObject("cross", "blue", "plain", "still", ((0, 0),) * 8)
    said = "blue plain cross still top left, red checks ring move left start bottom right end bottom left, flash late"
    assert teachers.describe(scene_of(moving, still, flash=6)) == said
    assert teachers.describe(scene_of(moving, still, flash=0)).endswith("flash early")


def test_a_caption_of_a_clip_says_what_appears_first(teachers):
    entries = (4, 0, 2)
    things = [
        SceneObject("ring", color, "plain", "still", ((0, column),) * 8, entry)
        for column, (color, entry) in enumerate(zip(("red", "green", "blue"), entries, strict=True))
    ]
    said = teachers.describe(scene_of(*things)).split(", ")
    assert [clause.split()[0] for clause in said] == ["green", "blue", "red"]
    assert [clause.split(" appears")[1] for clause in said] == [" first", "", " last"]


def test_captions_fit_the_text_tower_and_spell_no_word(teachers):
    """Every word of a caption is one token, so that the text tower learns words."""
    tokenizer = build_toy_tokenizer()
    recipe, _ = read_body(VideoTeacherRecipe, str(teachers.RECIPE), ["model=x", "data.sources.scenes.path=y"])
    for number in range(60):
        caption = teachers.describe(teachers.caption_scene(number, 1 if number % 3 else 8))
        ids = tokenizer(caption)["input_ids"]
        assert len(ids) == len(caption.replace(",", " ,").split()) <= recipe.max_text_length


def test_towers_learn_from_scenes_that_no_student_sees(teachers):
    from claims.scenes import SCENES_PER_SEED

    assert teachers.caption_scene(0, 8).seed >= 200 * SCENES_PER_SEED
    assert {len(teachers.caption_scene(n, 8).objects) for n in range(0, 40, 2)} == {1}
    assert {len(teachers.caption_scene(n, 8).objects) for n in range(1, 40, 2)} == {1, 2, 3}


# Towers


def test_the_towers_are_trained_by_the_recipe(teachers, towers, plan):
    for name, frames in (("base", 1), ("image_tower", 1), ("video_tower", 8)):
        record = json.loads((towers / name / "recipe.json").read_text())
        assert record["num_frames"] == frames and record["training"]["max_steps"] == STEPS
        assert record["training"]["seed"] == 3
        rows = Path(record["data"]["sources"]["scenes"]["path"]).read_text().splitlines()
        captions = [json.loads(row)["messages"][1]["content"] for row in rows]
        assert captions == [teachers.describe(teachers.caption_scene(n, frames)) for n in range(6)]
    assert [teachers.PLAN.phases[name].steps for name in ("image tower", "video tower")] == [200, 200]


def test_both_towers_go_on_from_the_same_weights(towers):
    base, image, video = (weights(towers, name) for name in ("base", "image_tower", "video_tower"))
    first = weights(towers, "untrained_tower")
    name = "vision_model.embeddings.patch_embedding.weight"
    assert base.keys() == image.keys() == video.keys()
    assert not torch.equal(first[name], base[name])
    for tower in (image, video):
        moved = (tower[name] - base[name]).abs().max()
        assert 0 < moved < 1e-2 < (base[name] - torch.zeros(())).abs().max()
    assert not torch.equal(image[name], video[name])
    assert json.loads((towers / "video_tower" / "recipe.json").read_text())["model"] == str(towers / "base" / "model")


def test_nothing_is_pickled_and_nothing_is_left_half_done(towers):
    inside = [path.name for path in towers.rglob("model/*")]
    assert not [name for name in inside if name.endswith((".bin", ".pt", ".pkl"))]
    assert not [path.name for path in towers.rglob("_*")]


def test_a_tower_that_is_there_is_not_trained_again(teachers, towers, plan, monkeypatch):
    module = sys.modules["elva_hf.training.video_teacher"]
    monkeypatch.setattr(module, "train_video_teacher", lambda *_: pytest.fail("trained again"))
    teachers.prepare(["video tower"], towers, "cuda", plan)
    with pytest.raises(ValueError, match=r"video_tower holds a tower of other fields \(training.learning_rate\); rem"):
        phases = {**plan.phases, "video tower": replace(plan.phases["video tower"], learning_rate=0.1)}
        teachers.prepare(["video tower"], towers, "cpu", replace(plan, phases=phases))
    with pytest.raises(ValueError, match=r"num_samples, training.seed"):
        teachers.prepare(["base"], towers, "cpu", replace(plan, num_scenes=7, seed=4))


def test_hand_made_teachers_need_no_folder(teachers, tmp_path):
    teachers.prepare(["looks", "looks+place"], tmp_path / "none", "cpu")
    assert not (tmp_path / "none").exists()


# Features


def test_looks_are_those_of_the_hand_made_teacher(teachers):
    frames = clip()
    np.testing.assert_array_equal(teachers.features("looks", frames, 16, None), toy_teacher_features(frames, 16))
    for name in teachers.HAND_MADE:
        assert teachers.features(name, frames, 16, None).shape == (3, 4, 4, teachers.width(name))
    assert teachers.width("looks") < teachers.width("looks+place") < teachers.width("looks+place+time")


def test_a_towers_features_are_its_states_before_the_last_layer_standardised(teachers, towers):
    from elva_hf.training.teacher import VisualTeacher

    frames = clip(5)
    seen = teachers.features("video tower", frames, 16, towers)
    assert seen.shape == (3, 4, 4, teachers.width("video tower")) and seen.dtype == np.float32
    teacher = VisualTeacher.from_pretrained(towers / "video_tower" / "model", layer=2)  # of states 0 to 3
    raw = teacher.features(torch.from_numpy(frames).permute(0, 3, 1, 2)).numpy()
    scale = seen.reshape(-1, 128).std(0) / raw.reshape(-1, 128).std(0)
    shift = seen - raw * scale
    np.testing.assert_allclose(shift.reshape(-1, 128).std(0), 0, atol=1e-3)
    every = np.concatenate([teachers.features("video tower", clip(s, 8), 16, towers) for s in range(100)])
    np.testing.assert_allclose(every.reshape(-1, 128).mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(every.reshape(-1, 128).std(0), 1, atol=0.05)


def test_what_a_tower_says_of_a_frame_depends_on_that_frame_alone(teachers, towers):
    frames = clip(7, 8)
    whole = teachers.features("video tower", frames, 16, towers)
    np.testing.assert_allclose(teachers.features("video tower", frames[5:6], 16, towers), whole[5:6], atol=1e-4)


def test_towers_differ(teachers, towers):
    names = ("untrained tower", "image tower", "video tower")
    seen = [teachers.features(name, clip(), 16, towers) for name in names]
    assert min(np.abs(a - b).max() for a, b in ((seen[0], seen[1]), (seen[1], seen[2]))) > 1e-3
    assert len(set(teachers.tower_fingerprints(["looks", *names], towers).values())) == 3


def test_teachers_that_cannot_be_asked_say_so(teachers, towers, tmp_path):
    with pytest.raises(ValueError, match=r"teacher 'wise': expected one of looks, looks\+place"):
        teachers.width("wise")
    with pytest.raises(ValueError, match="teacher 'wise'"):
        teachers.prepare(["wise"], tmp_path)
    with pytest.raises(ValueError, match="frames of 128x128 with patches of 16: the image tower sees 64x64"):
        teachers.features("image tower", np.zeros((1, 128, 128, 3), np.uint8), 16, towers)
    with pytest.raises(FileNotFoundError, match=r"no image tower in .*; train it first"):
        teachers.features("image tower", clip(), 16, tmp_path)


# The claim


def test_the_claim_compares_teachers_and_nothing_else(claims, teachers):
    by_name = {variant.name: variant for variant in claims.claim.variants}
    assert by_name.pop("gen").guidance is None
    assert all(variant.teacher == name for name, variant in by_name.items())
    assert len({json.dumps(variant.guidance) for variant in by_name.values()}) == 1
    assert not any(variant.config or variant.base for variant in by_name.values())
    assert len({variant.phases for variant in claims.claim.variants}) == 1
    assert claims.claim.pairs[0] == ("video tower", "image tower")
    assert set(by_name) <= set(teachers.TOWERS)
