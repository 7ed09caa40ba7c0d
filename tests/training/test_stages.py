"""The three stages of the paper, by their own recipe files, on the toy world: from a fresh model to answers."""

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import read_log, save_teacher, small, toy_source
from transformers import AutoModelForCausalLM

from elva_hf import ElvaProcessor
from elva_hf.data.toy_world import questions, render, sample_scene
from elva_hf.training.building import build_model, build_processor
from elva_hf.training.recipe import read_recipe
from elva_hf.training.run import train

STEPS = {"stage1_spatial": 40, "stage2_spatiotemporal": 30, "stage3_sft": 30}


def overrides(name, folder):
    teacher = f"guidance.teacher={folder / 'teacher'}"
    common = small(folder / name, max_steps=STEPS[name], save_steps=STEPS[name])
    toy = {"num_videos": 4096, "single_share": 1.0, "questions_per_video": 2}
    if name == "stage1_spatial":
        return [*common, "model.preset=tiny", teacher, toy_source(num_frames=1, **toy)]
    before = {"stage2_spatiotemporal": "stage1_spatial", "stage3_sft": "stage2_spatiotemporal"}[name]
    path = f"model.path={folder / before / 'model'}"
    return [*common, path, toy_source(num_frames=8, **toy), *([] if name == "stage3_sft" else [teacher])]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder in which the three stages have run, one after the other."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stages")
    save_teacher(folder / "teacher")
    for name in STEPS:
        assert train(read_recipe(name, overrides(name, folder))) == folder / name / "model"
    return folder


@pytest.mark.parametrize("name", STEPS)
def test_every_loss_of_a_stage_falls(world, name):
    log = read_log(world / name)
    assert log[-1]["step"] == STEPS[name]
    losses = {"loss_gen"} if name == "stage3_sft" else {"loss_gen", "loss_mse", "loss_con"}
    assert {key for key in log[0] if key.startswith("loss_")} == losses
    for key in losses:
        assert log[-1][key] < log[0][key], key


@pytest.mark.parametrize("name", ["stage2_spatiotemporal", "stage3_sft"])
def test_a_stage_starts_from_the_weights_of_the_last_one(world, name):
    (stage,) = read_recipe(name, overrides(name, world)).stages
    built = build_model(stage, build_processor(stage), 32 if stage.guidance else None).state_dict()
    before = load_file(f"{stage.model.path}/model.safetensors")
    kept = {key for key in before if stage.guidance or not key.startswith("guidance.")}
    assert {key for key in built if key in before} == kept
    assert all(torch.equal(built[key], before[key]) for key in kept)
    assert any(key.startswith("guidance.") for key in before)
    assert any(key.startswith("guidance.") for key in built) == (stage.guidance is not None)


@pytest.mark.parametrize("name", STEPS)
def test_every_part_of_the_model_has_learnt(world, name):
    (stage,) = read_recipe(name, overrides(name, world)).stages
    before = build_model(stage, build_processor(stage), 32 if stage.guidance else None).state_dict()
    after = load_file(world / name / "model" / "model.safetensors")
    for part in ("model.patch_embed.", "model.language_model.layers.", "model.language_model.embed_tokens."):
        keys = [key for key in after if key.startswith(part)]
        assert keys
        assert any(not torch.equal(before[key], after[key]) for key in keys), part


def test_the_last_stage_merges_and_has_no_heads(world):
    model = AutoModelForCausalLM.from_pretrained(world / "stage3_sft" / "model")
    assert model.config.merge_schedule == "paper"
    assert model.config.guidance is None
    assert model.guidance is None
    assert AutoModelForCausalLM.from_pretrained(world / "stage2_spatiotemporal" / "model").guidance is not None


def test_the_result_answers_in_the_world_s_words(world):
    folder = world / "stage3_sft" / "model"
    model, processor = AutoModelForCausalLM.from_pretrained(folder).eval(), ElvaProcessor.from_pretrained(folder)
    assert processor.video_processor.longest_edge == 64
    scene = sample_scene(3, split="test", single=True)
    asked = questions(scene)[0]
    content = [{"type": "video", "video": render(scene)}, {"type": "text", "text": asked.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        num_frames=8,
    )
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(ids, skip_special_tokens=True)
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert 1 <= len(answer.split()) <= 2


def test_a_finished_run_is_left_as_it_is(world):
    file = world / "stage3_sft" / "model" / "model.safetensors"
    written = file.stat().st_mtime_ns
    assert train(read_recipe("stage3_sft", overrides("stage3_sft", world))) == file.parent
    assert file.stat().st_mtime_ns == written
