"""The guidance losses where they attach: any loop, plain `Trainer`, PEFT and TRL's `SFTTrainer`."""

import inspect
import math

import pytest
import torch
from guided_elva import (
    GUIDANCE,
    SAMPLES,
    WIDTH,
    DrawnTeacher,
    arguments,
    collate,
    collate_without_targets,
    guided_model,
    sft_trainer,
)
from peft import LoraConfig, get_peft_model
from tiny_elva import START, tiny_model
from torch import nn
from transformers import Trainer

from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import read_geometry
from elva_hf.modeling_elva import ElvaModel
from elva_hf.training import guidance
from elva_hf.training.guidance import BATCH_KEYS, GuidanceCallback, GuidanceHook, find_student
from elva_hf.training.losses import frame_contrastive_loss, tube_alignment_loss
from elva_hf.training.teacher import teacher_targets

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # PEFT, TRL

TEXT = [SAMPLES[2], SAMPLES[4]]
VIDEOS = [SAMPLES[0], SAMPLES[3], SAMPLES[5]]
MIXED = [SAMPLES[0], SAMPLES[2], SAMPLES[7]]


def bare(batch):
    return {name: value for name, value in batch.items() if name not in BATCH_KEYS}


def by_hand(model, batch):
    """Eq. 4 and its parts from the last hidden states, without hooks."""
    output = model(**bare(batch), output_hidden_states=True)
    hidden = output.hidden_states[-1].flatten(0, 1)
    geometry = read_geometry(model.model.token_kinds(batch["input_ids"]))
    weights, heads = model.config.guidance, model.guidance
    tubes = heads.tube_head(hidden[geometry.patch_index])
    frames = heads.frame_head(hidden[geometry.frame_index])
    mse = tube_alignment_loss(tubes, batch["teacher_tubes"], geometry)
    contrast = frame_contrastive_loss(frames, batch["teacher_frames"].to(frames), heads.scale)
    total = output.loss + weights["tube_weight"] * mse + weights["frame_weight"] * contrast
    return total, {"loss_gen": output.loss, "loss_mse": mse, "loss_con": contrast}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, **options):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **options, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("samples", [VIDEOS, MIXED])
def test_the_loss_is_eq_4_with_its_gradients(samples):
    model, batch = guided_model({"tube_weight": 2.0, "frame_weight": 0.5}), collate(samples)
    expected, parts = by_hand(model, batch)
    expected_gradients = gradients(model, expected)
    hook = GuidanceHook()
    hook.attach(model)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)
    assert_close(gradients(model, loss), expected_gradients)
    components = hook.take_components()
    assert components.pop("logit_scale") == pytest.approx(1 / 0.07, rel=1e-5)
    assert components == {name: pytest.approx(value.item(), rel=1e-5) for name, value in parts.items()}
    assert all(type(value) is float for value in components.values())
    assert hook.take_components() == {}


def test_components_are_means_over_steps():
    model, hook = guided_model(), GuidanceHook()
    expected = [by_hand(model, collate(samples))[1]["loss_con"].item() for samples in (VIDEOS, MIXED)]
    hook.attach(model)
    for samples in (VIDEOS, MIXED):
        model(**collate(samples))
    assert hook.take_components()["loss_con"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert hook.components == {}
    model(**collate(MIXED))
    assert hook.take_components()["loss_con"] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("counted", [False, True])
def test_a_loop_of_ones_own_accumulates_by_dividing_the_loss(counted):
    model, batches = guided_model(), [collate(samples) for samples in (VIDEOS, MIXED)]
    parts = [by_hand(model, batch)[1] for batch in batches]
    videos = [int((batch["input_ids"] == START).sum()) for batch in batches]
    shares = [count / sum(videos) if counted else 0.5 for count in videos]
    words_and_frames = sum(part["loss_gen"] + part["loss_con"] for part in parts) / 2
    tubes = sum(share * part["loss_mse"] for share, part in zip(shares, parts, strict=True))
    expected = gradients(model, words_and_frames + tubes)
    hook = GuidanceHook(accumulation_steps=2)
    hook.attach(model)
    keys = {"num_videos_in_batch": torch.tensor(sum(videos))} if counted else {}
    losses = [model(**batch, **keys).loss / 2 for batch in batches]
    assert_close(gradients(model, sum(losses)), expected)
    torch.testing.assert_close(hook.components["loss_mse"], tubes.detach())


def test_evaluation_adds_nothing_and_needs_no_teacher():
    model = guided_model().eval()
    plain = model(**bare(collate(VIDEOS))).loss
    hook = GuidanceHook()
    hook.attach(model)
    assert torch.equal(model(**collate(VIDEOS)).loss, plain)
    assert torch.equal(model(**collate(VIDEOS, targets=False)).loss, plain)
    assert hook.components == {}


def test_a_forward_without_gradient_adds_nothing():
    model = guided_model()
    GuidanceHook().attach(model)
    with torch.no_grad():
        assert torch.isfinite(model(**collate(VIDEOS, targets=False)).loss)


def test_training_without_teacher_names_both_ways_to_give_one():
    model = guided_model()
    GuidanceHook().attach(model)
    with pytest.raises(ConfigurationError, match=r"teacher=VisualTeacher.*teacher_cache=TeacherCache"):
        model(**collate(VIDEOS, targets=False))


def test_a_teacher_of_another_width_is_refused_when_attached():
    with pytest.raises(ConfigurationError, match=r"9 wide.*teacher_width=6"):
        GuidanceHook(DrawnTeacher(width=9)).attach(guided_model())


@pytest.mark.parametrize("name", ["teacher_tubes", "teacher_frames"])
def test_features_of_another_width_are_refused(name):
    model, batch = guided_model(), collate(VIDEOS)
    GuidanceHook().attach(model)
    batch[name] = batch[name][..., :5]
    with pytest.raises(ConfigurationError, match=rf"{name} is 5 wide.*teacher_width=6"):
        model(**batch)


def test_a_teacher_sees_the_students_pixels():
    model, teacher = guided_model(), DrawnTeacher()
    batch = collate(VIDEOS, targets=False)
    options = {"image_mean": [0.25, 0.25, 0.25], "image_std": 0.25}
    batch["pixel_values_videos"] = batch["pixel_values_videos"] * 2 + 1  # as if normalised with these
    geometry = read_geometry(model.model.token_kinds(batch["input_ids"]))
    targets = teacher_targets(teacher, batch["pixel_values_videos"], geometry, patch_size=4, **options)
    cached = {**batch, "teacher_tubes": targets.tubes, "teacher_frames": targets.frames}
    expected, _ = by_hand(model, cached)
    GuidanceHook(teacher, **options).attach(model)
    torch.testing.assert_close(model(**batch).loss, expected)
    calls = teacher.calls
    torch.testing.assert_close(model(**cached).loss, expected)
    assert teacher.calls == calls  # what the batch brings is not computed again


def test_a_batch_of_text_gives_every_head_a_zero_gradient():
    model, batch = guided_model(), collate(TEXT)
    plain = model(**bare(batch)).loss
    GuidanceHook().attach(model)
    loss = model(**batch).loss
    assert torch.equal(loss, plain)
    found = gradients(model, loss)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(found[name].any() for name in found if name.startswith("guidance."))


@pytest.mark.parametrize(("off", "unused"), [("tube_weight", "teacher_tubes"), ("frame_weight", "teacher_frames")])
def test_a_loss_of_weight_0_needs_no_targets(off, unused):
    model, hook, batch = guided_model({off: 0}), GuidanceHook(), collate(VIDEOS)
    del batch[unused]
    hook.attach(model)
    loss = model(**batch).loss
    assert gradients(model, loss).keys() == dict(model.named_parameters()).keys()
    names = {"tube_weight": ["loss_con", "loss_gen", "logit_scale"], "frame_weight": ["loss_gen", "loss_mse"]}[off]
    assert sorted(hook.components) == sorted(names)


def test_frames_of_one_video_can_be_no_negatives():
    losses = []
    for mask in (False, True):
        model, hook = guided_model({"mask_same_video": mask}), GuidanceHook()
        hook.attach(model)
        model(**collate(VIDEOS))
        losses.append(hook.components["loss_con"].item())
    assert losses[1] < losses[0] - 0.01
    found = hook.collect(lambda: model(**collate(VIDEOS))).video_ids
    assert found.tolist() == [0, 0, 0, 1, 2, 3, 3, 4, 5, 5, 5, 5]  # the first and the last have two grids


def test_a_merged_patch_has_the_feature_of_its_survivor():
    model, batch = guided_model(text={"num_hidden_layers": 4}), collate(VIDEOS)
    model.set_merge_schedule([{"layer": 1, "target_ratio": 0.5}])
    merged, _ = by_hand(model, batch)
    GuidanceHook().attach(model)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, merged)
    model.set_merge_schedule("none")
    assert not torch.isclose(model(**batch).loss, loss, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing():
    model, batch = guided_model(), collate(MIXED)
    GuidanceHook().attach(model)
    expected = gradients(model, model(**batch).loss)
    model.activation_checkpointing_enable()
    assert_close(gradients(model, model(**batch).loss), expected)


def test_under_autocast_heads_run_in_bfloat16_and_losses_in_float32():
    model, batch = guided_model(), collate(VIDEOS)
    hook = GuidanceHook()
    hook.attach(model)
    seen = []
    model.guidance.register_forward_hook(lambda *args: seen.append([part.dtype for part in args[2]]))
    expected = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    assert seen[1] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert hook.components["loss_con"].dtype == torch.float32


def test_a_model_in_bfloat16_learns_from_targets_in_float32():
    model, batch = guided_model().bfloat16(), collate(VIDEOS)
    GuidanceHook().attach(model)
    assert gradients(model, model(**batch).loss).keys() == dict(model.named_parameters()).keys()


def test_inputs_may_be_embeddings():
    model, batch = guided_model(), collate(VIDEOS)
    GuidanceHook().attach(model)
    expected = model(**batch).loss
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(**batch, inputs_embeds=embeddings).loss, expected)


def test_an_output_may_be_a_tuple():
    model, batch = guided_model(), collate(VIDEOS)
    GuidanceHook().attach(model)
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).loss)


def lora(model, *saved):
    return get_peft_model(model, LoraConfig(target_modules=["v_proj"], modules_to_save=list(saved)))


def test_under_peft_the_loss_is_the_same_and_the_saved_copies_learn():
    batch = collate(MIXED)
    expected, _ = by_hand(guided_model(), batch)
    model = lora(guided_model(), "patch_embed", "guidance").train()
    GuidanceHook().attach(model)
    loss = model(**batch).loss
    torch.testing.assert_close(loss, expected)  # a fresh adapter adds nothing
    found = gradients(model, loss)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == trainable
    assert any("guidance.modules_to_save.default.logit_scale" in name for name in trainable)


def test_frozen_heads_are_warned_of(monkeypatch):
    warnings = []
    monkeypatch.setattr(guidance.logger, "warning", warnings.append)
    GuidanceHook().attach(lora(guided_model(), "guidance"))
    assert not warnings
    GuidanceHook().attach(lora(guided_model()))
    assert "modules_to_save" in warnings[0]


def test_a_model_is_found_inside_its_wrappers():
    inner = guided_model()
    assert find_student(nn.Sequential(inner)) == (inner, inner)
    wrapped = lora(inner, "guidance")
    assert find_student(nn.Sequential(wrapped)) == (inner, wrapped)
    with pytest.raises(ConfigurationError, match="Linear holds no ElvaForCausalLM"):
        GuidanceHook().attach(nn.Linear(1, 1))


def test_the_model_never_sees_the_keys_of_guidance():
    model, batch, seen = guided_model(), collate(VIDEOS), []
    GuidanceHook().attach(model)
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.extend(kwargs), with_kwargs=True)
    model(**batch, num_videos_in_batch=torch.tensor(5))
    assert "input_ids" in seen
    assert set(seen) <= inspect.signature(ElvaModel.forward).parameters.keys()


@pytest.mark.parametrize(("features", "expected"), [("bfloat16", "float32"), ("float64", "float64")])
def test_targets_are_never_rounded_to_half_precision(features, expected):
    targets = torch.full((1,), 1.001)
    assert guidance.like(targets, torch.zeros(1, dtype=getattr(torch, features))).dtype == getattr(torch, expected)


def test_hooks_are_attached_once_and_removed():
    model, batch, hook = guided_model(), collate(VIDEOS), GuidanceHook()
    plain = model(**bare(batch)).loss
    hook.attach(model)
    guided = model(**batch).loss
    handle = hook.attach(model)
    assert torch.equal(model(**batch).loss, guided)
    handle.remove()
    handle.remove()
    assert torch.equal(model(**bare(batch)).loss, plain)


def test_without_guidance_only_the_keys_are_taken_out():
    model, hook, batch = tiny_model().train(), GuidanceHook(), collate(VIDEOS)
    expected = model(**bare(batch)).loss
    hook.attach(model)
    assert torch.equal(model(**batch).loss, expected)
    assert hook.take_components() == {"loss_gen": pytest.approx(expected.item())}


def test_a_call_of_the_inner_model_alone_is_none_of_the_hooks_business():
    model, batch = guided_model(), collate(VIDEOS, targets=False)
    GuidanceHook().attach(model)
    del batch["labels"], batch["sample_ids"]
    assert torch.isfinite(model.model(**batch).last_hidden_state).all()


def test_guidance_without_heads_is_refused():
    model = tiny_model()
    model.config.guidance = GUIDANCE
    with pytest.raises(ConfigurationError, match="set_guidance"):
        GuidanceHook().attach(model)


def test_a_batch_without_labels_is_refused():
    model, batch = guided_model(), collate(VIDEOS)
    GuidanceHook().attach(model)
    del batch["labels"]
    with pytest.raises(ConfigurationError, match="give the batch labels"):
        model(**batch)


def train(folder, trainer=Trainer, hook=None, model=None, collator=collate, **options):
    model = guided_model().double() if model is None else model
    callbacks = [GuidanceCallback(hook or GuidanceHook())]
    args = arguments(folder, **options)
    trainer = trainer(model=model, args=args, train_dataset=SAMPLES, data_collator=collator, callbacks=callbacks)
    trainer.train()
    return trainer


def logged(trainer, *names):
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def test_a_plain_trainer_logs_the_components_beside_the_loss(tmp_path):
    model = guided_model().double()
    batch = collate(SAMPLES[:4])
    expected, parts = by_hand(model, batch)
    trainer = train(tmp_path, model=model, per_device_train_batch_size=4)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for name, value in parts.items():
        assert type(entry[name]) is float
        assert entry[name] == pytest.approx(value.item(), rel=1e-6)
    assert entry["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-6)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_a_plain_trainer_averages_over_micro_batches(tmp_path):
    model = guided_model().double()
    parts = [by_hand(model, collate(samples))[1] for samples in (SAMPLES[:2], SAMPLES[2:4])]
    trainer = train(tmp_path, model=model, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    entry = trainer.state.log_history[0]
    for name in ("loss_mse", "loss_con"):
        assert entry[name] == pytest.approx(sum(part[name].item() for part in parts) / 2, rel=1e-6)
    assert entry["loss"] == pytest.approx(entry["loss_gen"] + entry["loss_mse"] + entry["loss_con"], rel=1e-6)


def test_a_plain_trainer_runs_a_teacher_and_never_saves_it(tmp_path):
    teacher = DrawnTeacher()
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = train(tmp_path, hook=GuidanceHook(teacher), collator=collate_without_targets, **options)
    assert teacher.calls > 0
    assert math.isfinite(trainer.state.log_history[0]["loss_con"])
    found = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")
    assert len(found["param_groups"][0]["params"]) + len(found["param_groups"][1]["params"]) == len(
        list(trainer.model.parameters())
    )


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="label_smoothing_factor"):
        train(tmp_path, per_device_train_batch_size=4, label_smoothing_factor=0.1)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ConfigurationError, match="torchrun"):
        GuidanceCallback(GuidanceHook()).on_train_begin(args, None, None, model=guided_model())


def sft(folder, steps, use_lora=False):
    pytest.importorskip("trl")
    hook = GuidanceHook()
    args = arguments(folder, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps)
    peft_config = LoraConfig(target_modules=["v_proj"], modules_to_save=["patch_embed", "guidance"])
    options = {"peft_config": peft_config} if use_lora else {}
    return sft_trainer(guided_model().double(), args, hook, **options), hook


@pytest.mark.parametrize("steps", [1, 2])
def test_trl_learns_what_a_plain_trainer_does(steps, tmp_path):
    trainer, _ = sft(tmp_path, steps)
    trainer.train()
    plain = train(tmp_path, per_device_train_batch_size=4 // steps, gradient_accumulation_steps=steps)
    assert_close(trainer.model.state_dict(), plain.model.state_dict(), rtol=0, atol=2e-6)
    names = "loss", "loss_gen", "loss_mse", "loss_con", "logit_scale"
    for found, expected in zip(logged(trainer, *names), logged(plain, *names), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert all(type(value) is float for value in found)


def test_trl_with_lora_trains_the_heads(tmp_path):
    trainer, _ = sft(tmp_path, 1, use_lora=True)
    heads = {name: p for name, p in trainer.model.named_parameters() if "guidance.modules_to_save" in name}
    before = {name: parameter.detach().clone() for name, parameter in heads.items()}
    trainer.train()
    assert len(before) == 2 * 4 + 1
    assert all(not torch.equal(heads[name], value) for name, value in before.items())


def test_trl_with_loss_scaling_is_refused(tmp_path):
    trainer, hook = sft(tmp_path, 1)
    trainer.args.fp16 = True
    with pytest.raises(ConfigurationError, match="bf16"):
        trainer.train()
    assert hook.uses_loss_scaling


def test_the_teachers_width_is_that_of_the_samples():
    assert GUIDANCE["teacher_width"] == WIDTH == SAMPLES[0]["tubes"].shape[-1]
