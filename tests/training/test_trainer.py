"""ElvaTrainer: what it learns does not depend on how a step is split; logs, checkpoints, GradCache."""

import json
import math

import pytest
import torch
from guided_elva import (
    GUIDANCE,
    SAMPLES,
    DrawnTeacher,
    arguments,
    collate,
    collate_without_targets,
    guided_model,
)
from peft import LoraConfig, get_peft_model
from tiny_elva import tiny_model
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import read_geometry
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.training.grad_cache import FrameFeatures, contrast_gradients
from elva_hf.training.guidance import BATCH_KEYS, GuidanceCallback, GuidanceHook
from elva_hf.training.losses import VisualTargets, frame_contrastive_loss
from elva_hf.training.trainer import ElvaTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked by PEFT

SPLITS = [(4, 1), (2, 2), (1, 4)]
TOLERANCE = {"rtol": 0, "atol": 2e-6}  # norms and cross-entropy are in float32, whatever the weights are


def build(folder, guidance=None, model=None, samples=SAMPLES, collator=collate, split=(4, 1), **options):
    own = {name: options.pop(name) for name in ("grad_cache", "teacher", "train_sampler") if name in options}
    own |= {name: options.pop(name) for name in ("processing_class", "callbacks", "eval_dataset") if name in options}
    model = guided_model(guidance).double() if model is None else model
    size, steps = split
    args = arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options)
    return ElvaTrainer(model=model, args=args, train_dataset=samples, data_collator=collator, **own)


def trained(folder, *args, **options):
    trainer = build(folder, *args, **options)
    trainer.train()
    return trainer


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(found, expected):
    expected = dict(expected.model.named_parameters())
    for name, value in found.model.named_parameters():
        torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_logs(found, expected):
    names = {"loss", "loss_gen", "loss_mse", "loss_con", "logit_scale", "grad_norm"}
    for one, other in zip(entries(found), entries(expected), strict=True):
        assert one.keys() == other.keys()
        for name in names & one.keys():
            assert type(one[name]) is float
            assert one[name] == pytest.approx(other[name], rel=2e-6), name


@pytest.mark.parametrize("split", SPLITS[1:])
def test_words_and_tubes_do_not_depend_on_the_split(split, tmp_path):
    whole = trained(tmp_path, {"frame_weight": 0})
    parts = trained(tmp_path, {"frame_weight": 0}, split=split)
    assert_same(parts, whole)
    assert_same_logs(parts, whole)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mask", [False, True])
def test_with_grad_cache_nothing_depends_on_the_split(split, mask, tmp_path):
    whole = trained(tmp_path, {"mask_same_video": mask})
    parts = trained(tmp_path, {"mask_same_video": mask}, split=split, grad_cache=True)
    assert_same(parts, whole)
    assert_same_logs(parts, whole)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_lora_and_grad_cache_do_not_depend_on_the_split_either(split, tmp_path):
    config = LoraConfig(target_modules=["v_proj"], modules_to_save=["patch_embed", "guidance"])
    models = [get_peft_model(guided_model(), config).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole = trained(tmp_path, model=models[0])
    parts = trained(tmp_path, model=models[1], split=split, grad_cache=True)
    assert_same(parts, whole)
    assert_same_logs(parts, whole)


def features_of(model, samples):
    batch = collate(samples)
    output = model(**{k: v for k, v in batch.items() if k not in BATCH_KEYS}, output_hidden_states=True)
    geometry = read_geometry(model.model.token_kinds(batch["input_ids"]))
    if geometry is None:
        return None
    frames = model.guidance.frame_head(output.hidden_states[-1].flatten(0, 1)[geometry.frame_index])
    return frames, batch["teacher_frames"].to(frames)


@pytest.mark.parametrize("split", SPLITS)
def test_contrast_is_a_mean_over_the_pairs_of_a_micro_batch_and_over_micro_batches(split, tmp_path):
    model = guided_model().double()
    losses = []
    for at in range(0, 4, split[0]):
        pair = features_of(model, SAMPLES[at : at + split[0]])
        if pair is None:
            losses.append(0.0)
            continue
        student, teacher = (nn.functional.normalize(side.detach(), dim=-1) for side in pair)
        scores = model.guidance.scale.detach() * student @ teacher.T
        each = [-(scores[i].log_softmax(0)[i] + scores[:, i].log_softmax(0)[i]) / 2 for i in range(len(scores))]
        losses.append(float(sum(each) / len(each)))
    trainer = trained(tmp_path, model=model, split=split)
    assert entries(trainer)[0]["loss_con"] == pytest.approx(sum(losses) / split[1], rel=1e-6)


def test_the_last_shorter_accumulation_of_an_epoch_counts_as_a_whole_step(tmp_path):
    options = {"samples": SAMPLES[:6], "max_steps": -1, "num_train_epochs": 1}
    parts = trained(tmp_path, split=(1, 4), **options)  # 4 and 2 micro-batches
    assert parts.state.global_step == 2
    whole = trained(tmp_path, split=(4, 1), grad_cache=True, **options)
    tubes = [entry["loss_mse"] for entry in entries(parts)]
    assert tubes[0] == pytest.approx(entries(whole)[0]["loss_mse"], rel=2e-6)
    cached = trained(tmp_path, split=(1, 4), grad_cache=True, **options)
    assert_same(cached, whole)
    assert_same_logs(cached, whole)
    last = entries(parts)[1]
    assert last["loss"] == pytest.approx(last["loss_gen"] + last["loss_mse"] + last["loss_con"], rel=2e-6)


def test_a_step_of_text_alone_is_trained(tmp_path):
    text = [SAMPLES[2], SAMPLES[4]]
    whole = trained(tmp_path, samples=text, split=(2, 1), max_steps=1, grad_cache=True)
    parts = trained(tmp_path, samples=text, split=(1, 2), max_steps=1)
    assert_same(parts, whole)
    assert (entries(parts)[0]["loss_mse"], entries(parts)[0]["loss_con"]) == (0.0, 0.0)


def test_grad_cache_draws_the_same_dropout_twice(tmp_path, monkeypatch):
    seen = []
    collect = ElvaTrainer._cache_frame_gradients

    def spy(trainer):
        handle = trainer.model.guidance.register_forward_hook(lambda *args: seen.append(args[2][1].detach()))
        trainer.handles.append(handle)
        collect(trainer)

    monkeypatch.setattr(ElvaTrainer, "_cache_frame_gradients", spy)
    model = guided_model(text={"attention_dropout": 0.5}).double()
    trainer = build(tmp_path, model=model, split=(2, 2), grad_cache=True, max_steps=1)
    trainer.handles = []
    trainer.train()
    first, second = seen[:2], seen[2:]
    assert len(first) == len(second) == 2
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two)
    model.eval()
    assert not torch.allclose(features_of(model, SAMPLES[:2])[0], first[0])


def test_cached_gradients_are_those_of_the_joined_batch():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([9.0], dtype=torch.float64)
    videos = torch.tensor([0, 0, 1, 1, 1, 0, 0])  # numbered anew in each of the three micro-batches
    parts = []
    for part in (slice(0, 5), slice(5, 5), slice(5, 7)):
        targets = VisualTargets(None, teacher[part]) if part.stop > part.start else None
        parts.append(FrameFeatures(student[part], targets, videos[part], scale))
    found = contrast_gradients(parts, mask_same_video=True)
    whole, tau = student.clone().requires_grad_(), scale.clone().requires_grad_()
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    loss = frame_contrastive_loss(whole, teacher, tau, video_ids=ids, mask_same_video=True)
    loss.backward()
    assert torch.allclose(torch.cat([part["frame_gradients"] for part in found]), whole.grad)
    for part in found:
        assert torch.allclose(part["logit_scale_gradient"], tau.grad)
        assert torch.allclose(part["frame_loss"], loss)


@pytest.mark.parametrize("guidance", [None, {**GUIDANCE, "frame_weight": 0}])
def test_grad_cache_without_contrast_is_refused(guidance, tmp_path):
    model = tiny_model(guidance=guidance)
    with pytest.raises(ConfigurationError, match="grad_cache=True"):
        build(tmp_path, model=model, grad_cache=True)


def test_a_second_callback_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="GuidanceCallback"):
        build(tmp_path, callbacks=[GuidanceCallback(GuidanceHook())])


def test_grad_cache_asks_the_teacher_once(tmp_path):
    teachers = [DrawnTeacher(), DrawnTeacher()]
    for teacher, grad_cache in zip(teachers, (False, True), strict=True):
        trained(tmp_path, teacher=teacher, collator=collate_without_targets, grad_cache=grad_cache)
    assert teachers[0].calls == teachers[1].calls > 0


def test_the_teachers_pixels_come_from_the_processor(tmp_path):
    processor = ElvaProcessor.from_tokenizer(build_toy_tokenizer(), patch_size=4)
    processor.video_processor.image_mean = [0.25, 0.25, 0.25]
    trainer = build(tmp_path, processing_class=processor, teacher=DrawnTeacher())
    assert trainer.guidance_hook.image_mean == [0.25, 0.25, 0.25]
    assert trainer.guidance_hook.image_std == processor.video_processor.image_std


class Watch(TrainerCallback):
    """Notes what trainers tell callbacks."""

    def __init__(self):
        self.logs, self.ids, self.trainer = [], [], None

    def set_trainer(self, trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        self.ids.append(list(self.trainer.last_sample_ids))


def test_callbacks_see_components_sample_ids_and_the_trainer(tmp_path):
    watch = Watch()
    trainer = trained(tmp_path, split=(2, 2), callbacks=[watch])
    assert watch.ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert {"loss_gen", "loss_mse", "loss_con", "logit_scale"} <= watch.logs[0].keys()
    assert trainer.last_grad_norm == pytest.approx(entries(trainer)[-1]["grad_norm"])
    late = Watch()
    trainer.add_callback(late)
    assert late.trainer is trainer


class Kept(Watch, ExportableState):
    """Made anew from a checkpoint, where a trainer is asked to."""

    def state(self):
        return {"args": {}, "attributes": {}}


def test_callbacks_that_a_resume_makes_anew_are_given_the_trainer_too(tmp_path):
    checkpointed(tmp_path, callbacks=[Kept()], max_steps=1).train()
    options = {"callbacks": [Kept()], "restore_callback_states_from_checkpoint": True}
    resumed = checkpointed(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    (kept,) = [callback for callback in resumed.callback_handler.callbacks if isinstance(callback, Kept)]
    assert kept is not options["callbacks"][0]
    assert kept.trainer is resumed
    assert kept.ids == [[4, 5, 6, 7]]


def test_log_history_can_be_written_as_json(tmp_path):
    trainer = trained(tmp_path)
    assert json.loads(json.dumps(trainer.state.log_history)) == trainer.state.log_history


def test_without_guidance_words_alone_are_learned_and_logged(tmp_path):
    whole = trained(tmp_path, model=tiny_model().double().train())
    parts = trained(tmp_path, model=tiny_model().double().train(), split=(1, 4))
    assert_same(parts, whole)
    assert entries(parts)[0]["loss_gen"] == pytest.approx(entries(parts)[0]["loss"], rel=1e-6)
    assert "loss_mse" not in entries(parts)[0]


def test_evaluation_is_of_words_alone_inside_and_outside_of_training(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "prediction_loss_only": True}
    trainer = trained(tmp_path, eval_dataset=SAMPLES[:4], per_device_eval_batch_size=4, **options)
    inside = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    seen = set()
    handle = trainer.model.register_forward_pre_hook(lambda *call: seen.update(call[2]), with_kwargs=True)
    outside = trainer.evaluate()["eval_loss"]
    handle.remove()
    assert "input_ids" in seen
    assert not seen & set(BATCH_KEYS)
    batch = collate(SAMPLES[:4])
    with torch.no_grad():
        words = trainer.model.eval()(**{name: batch[name] for name in batch if name not in BATCH_KEYS}).loss
    assert inside == pytest.approx(words.item(), rel=1e-6)
    assert outside == pytest.approx(words.item(), rel=1e-6)


def test_a_sampler_of_ones_own_gives_the_order(tmp_path):
    backwards = list(reversed(SAMPLES))
    watch = Watch()
    trained(tmp_path, train_sampler=SequentialSampler(backwards), callbacks=[watch], train_sampling_strategy="random")
    assert watch.ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert build(tmp_path, train_sampling_strategy="random")._get_train_sampler().__class__.__name__ == "RandomSampler"


def checkpointed(folder, teacher=None, **options):
    fields = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3, **options}
    return build(folder, teacher=teacher, collator=collate_without_targets if teacher else collate, **fields)


def test_a_checkpoint_holds_the_heads_and_never_the_teacher(tmp_path):
    class Tower(DrawnTeacher):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(123, 45)

    trainer = checkpointed(tmp_path, Tower())
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    loaded = ElvaForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.state_dict().keys() == trainer.model.state_dict().keys()
    for name, value in trainer.model.guidance.state_dict().items():
        assert torch.equal(loaded.guidance.state_dict()[name], value)
    optimizer = torch.load(folder / "optimizer.pt")
    assert len(optimizer["state"]) == len(list(trainer.model.parameters()))
    shapes = {tuple(entry["exp_avg"].shape) for entry in optimizer["state"].values()}
    assert (45, 123) not in shapes
    assert "Tower" not in (folder / "trainer_state.json").read_text()
    assert b"Tower" not in (folder / "training_args.bin").read_bytes()


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_resumed_run_ends_as_an_uninterrupted_one(logging_steps, tmp_path):
    options = {"max_steps": 4, "logging_steps": logging_steps, "split": (1, 2), "grad_cache": True}

    def begin(folder, seed=0):
        model = guided_model(seed=seed, text={"attention_dropout": 0.5}).double()
        return checkpointed(tmp_path / folder, model=model, **options)

    straight = begin("one")
    straight.train()
    stopped = begin("two")
    stopped.add_callback(StopAfter(1))
    stopped.train()
    resumed = begin("two", seed=5)
    resumed.train(resume_from_checkpoint=True)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert entries(resumed) == entries(straight)


class StopAfter(TrainerCallback):
    """Ends a run early."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_merging_checkpointing_and_bfloat16_go_together(tmp_path):
    model = guided_model(text={"num_hidden_layers": 4})
    model.set_merge_schedule([{"layer": 1, "target_ratio": 0.5}])
    options = {"bf16": True, "activation_checkpointing": True, "grad_cache": True, "teacher": DrawnTeacher()}
    trainer = trained(tmp_path, model=model, split=(2, 2), collator=collate_without_targets, **options)
    for entry in entries(trainer):
        assert all(math.isfinite(entry[name]) for name in ("loss_gen", "loss_mse", "loss_con", "logit_scale"))
