"""The stages of Mavors as recipes: what trains, at which rate, and that they run."""

import copy
import json
import math
import random
from dataclasses import replace

import datasets
import pytest
import torch
from clips_elva import write_counter
from mavors_models import film, mavors_model, sample_inputs, words
from transformers import TrainingArguments, set_seed

from elva_hf.data.collator import ElvaCollator
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import render, sample_scene, write_mp4
from elva_hf.errors_elva import ConfigurationError, ElvaError
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM
from elva_hf.siblings.mavors.rows_mavors import HEADER
from elva_hf.training.building import PART_MODULES, build_model, build_processor
from elva_hf.training.plan import plan_recipe
from elva_hf.training.preference import PairedCollator, PreferenceTrainer, dpo_loss
from elva_hf.training.recipe import read_recipe
from elva_hf.training.run import train
from elva_hf.training.toy import ToyDataset
from elva_hf.training.toy import build_model as build_toy_model
from elva_hf.training.toy import build_processor as build_toy_processor
from elva_hf.training.toy import collate as collate_toy
from elva_hf.training.toy_recipe import read_recipe as read_toy_recipe
from elva_hf.training.trainer import ElvaTrainer

STAGES = {  # sections 4 and 5.1: what trains, batch, samples, schedule
    "mavors_stage1": (["aggregator", "projector"], 6656, 127_000_000, "constant_with_warmup"),
    "mavors_stage1_5": (["image_tower", "aggregator", "projector"], 3328, 52_000_000, "constant_with_warmup"),
    "mavors_stage2": ("all", 1664, 19_000_000, "cosine_with_min_lr"),
}
TINY = [
    "model.preset=mavors-tiny",
    "model.image_tower=null",
    "video.fps=null",
    "video.num_frames=8",
    "model.gradient_checkpointing=false",
    "data.sources={toy: {format: toy_world, options: {num_videos: 4, num_frames: 8, questions_per_video: 1}}}",
    "data.num_workers=0",
    "data.group_by_length=false",
    "training.batch_size=2",
    "training.per_device_train_batch_size=2",
    "training.bf16=false",
    "training.use_cpu=true",
    "training.max_steps=2",
    "training.logging_steps=1",
    "training.warmup_ratio=0.0",
]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_the_values_of_the_paper(name):
    (stage,) = read_recipe(name).stages
    trainable, batch, samples, schedule = STAGES[name]
    assert stage.trainable == trainable
    assert stage.training.batch_size == batch
    assert sum(source.num_samples for source in stage.data.sources.values()) == samples
    assert stage.training.lr_scheduler_type == schedule
    assert stage.training.learning_rate == 1e-5
    assert set(stage.training.learning_rates.values()) == {1e-6}
    assert stage.video.sub_images == (name == "mavors_stage2")
    assert stage.video.max_chunks == 32
    (plan,) = plan_recipe(read_recipe(name), 416)
    assert plan.accumulation_steps * 416 * stage.training.per_device_train_batch_size == batch


def test_the_plan_counts_the_parts_of_the_paper_size():
    (plan,) = plan_recipe(read_recipe("mavors_stage1_5"), 416)
    assert plan.trained == {"image_tower": 423_147_888, "aggregator": 45_718_512, "projector": 16_980_992}
    (plan,) = plan_recipe(read_recipe("mavors_stage1"), 416)
    assert set(plan.trained) == {"aggregator", "projector"}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_on_the_toy_world_and_moves_what_it_trains_and_nothing_else(name, tmp_path):
    overrides = [*TINY, f"output_dir={tmp_path}", "training.learning_rate=1.0e-2"]
    folder = train(read_recipe(name, overrides))
    trained = MavorsForCausalLM.from_pretrained(folder)
    parts = STAGES[name][0]
    (stage,) = read_recipe(name, overrides).stages
    set_seed(stage.training.seed)
    fresh = build_model(stage, build_processor(stage), None)
    start = dict(fresh.named_parameters())
    moved = {key for key, value in trained.named_parameters() if not torch.equal(value, start[key])}
    assert moved
    if parts != "all":
        assert all(key.startswith(tuple(PART_MODULES[part] for part in parts)) for key in moved)
        assert {part for part in parts if any(key.startswith(PART_MODULES[part]) for key in moved)} == set(parts)


def test_parts_learn_at_their_own_rates(tmp_path):
    model = mavors_model()
    rates = {PART_MODULES["image_tower"]: 1e-6, PART_MODULES["patch_embed"]: 1e-3}
    trainer = ElvaTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-5, use_cpu=True, report_to="none"),
        learning_rates=rates,
    )
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, rate in found.items():
        expected = 1e-6 if ".encoder." in name.replace("encoder.encoder", "encoder") else 1e-3
        expected = expected if "patch_embed." in name and "language_model" not in name else 1e-5
        assert rate == expected, name


@pytest.mark.parametrize("rates", ["{eyes: 1.0e-6}", "{aggregator: 0.0}", "{aggregator: fast}"])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(ConfigurationError, match=r"training\.learning_rates"):
        read_recipe("mavors_stage1", [f"training.learning_rates={rates}"])


def test_training_learns_the_order_of_frames_inside_a_chunk():
    """Inflated kernels cannot see it; a few steps on the tower alone tell a chunk from its reversal."""
    model = mavors_model(filled=False, dtype=torch.float32)
    kernels = model.model.patch_embed.encoder.patch_embedding.weight
    with torch.no_grad():
        kernels.copy_(kernels[:, :, :1].expand_as(kernels))  # as inflation leaves them
    forth = sample_inputs([film(4), words(2)])
    back = {**forth, "pixel_values_videos": forth["pixel_values_videos"].clone()}
    tokens = back["pixel_values_videos"].unflatten(0, (-1, 4))
    tokens[:, :, :-6] = tokens[:, :, :-6].flip(1).clone()
    with torch.no_grad():
        first = model(**forth).logits[0, -1], model(**back).logits[0, -1]
        torch.testing.assert_close(first[0], first[1], atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.AdamW(model.model.patch_embed.parameters(), lr=1e-2)
    for _ in range(60):
        loss = 0.0
        for inputs, answer in ((forth, 11), (back, 12)):
            loss = loss - model(**inputs).logits[0, -1].log_softmax(-1)[answer]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert model(**forth).logits[0, -1].argmax() == 11
        assert model(**back).logits[0, -1].argmax() == 12


def pairs(count=3):
    rows = []
    for i in range(count):
        frames = render(sample_scene(i, num_frames=6))
        video = {"type": "video", "video": frames, "num_frames": 6}
        ask = {"type": "text", "text": "what happens?"}
        turns = [
            {"role": "user", "content": [video, ask]},
            {"role": "assistant", "content": "a red square moves"},
            {"role": "user", "content": [ask]},
            {"role": "assistant", "content": "nothing"},
        ]
        rows.append({"id": str(i), "messages": turns, "independent_turns": True})
    return rows


@pytest.fixture(scope="module")
def tiny():
    """A tiny model of the toy world and its processor."""
    (stage,) = read_recipe("mavors_stage2", TINY).stages
    processor = build_processor(stage)
    set_seed(0)
    return build_model(stage, processor, None).eval(), processor


def preference_trainer(model, processor, folder, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(folder), learning_rate=1e-3, use_cpu=True, report_to="none", remove_unused_columns=False,
        per_device_train_batch_size=3, max_steps=8, logging_steps=1, save_strategy="no", disable_tqdm=True,
        prediction_loss_only=True,
    )  # fmt: skip
    return PreferenceTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs(),
        data_collator=ElvaCollator(processor, packing="shared_prefix"),
        processing_class=processor,
        **kwargs,
    )


def changed(model):
    """Another model near by, as training would leave it."""
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return twin


def test_dpo_is_its_formula():
    policy = torch.tensor([[-3.0, -5.0], [-2.0, -1.0]]).double()
    reference = torch.tensor([[-4.0, -4.0], [-2.0, -2.5]]).double()
    loss, rewards = dpo_loss(policy, reference, 0.1)
    margins = 0.1 * torch.tensor([(-3 + 4) - (-5 + 4), (-2 + 2) - (-1 + 2.5)]).double()
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-margins)).mean())
    torch.testing.assert_close(rewards[:, 0] - rewards[:, 1], margins)
    assert float(dpo_loss(policy, policy, 0.1).loss) == pytest.approx(math.log(2))


def test_pairs_in_one_row_are_the_pairs_apart(tiny, tmp_path):
    """The shared prefix reads each video once and gives what two rows would."""
    model, processor = tiny
    trainer = preference_trainer(model, processor, tmp_path)
    together = trainer._answers(model, trainer.data_collator(pairs()))
    apart = PairedCollator(processor)(pairs())
    labels = apart["input_ids"].masked_fill(apart.pop("completion_mask") == 0, -100)[:, 1:]
    with torch.no_grad():
        scores = model(**apart).logits[:, :-1].log_softmax(-1)
    each = scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(together, each.sum(1).view(2, -1).T, atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own arguments
def test_the_loss_is_that_of_trl(tiny, tmp_path):
    """On video and text alike: TRL's trainer with the paired collator, against ours."""
    trl = pytest.importorskip("trl")
    model, processor = tiny
    policy = changed(model)
    ours = preference_trainer(policy, processor, tmp_path, reference=model)
    expected = ours.compute_loss(policy, ours.data_collator(pairs()))

    text = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}  # its trainer wants a dataset it can tokenise
    theirs = trl.DPOTrainer(
        model=policy,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, beta=0.1,
                           remove_unused_columns=False, gradient_checkpointing=False),
        train_dataset=datasets.Dataset.from_dict(text),
        data_collator=PairedCollator(processor),
        processing_class=processor.tokenizer,
    )  # fmt: skip
    actual = theirs.compute_loss(theirs.model.eval(), PairedCollator(processor)(pairs()))
    torch.testing.assert_close(expected.detach(), actual.detach(), atol=1e-5, rtol=1e-4)
    assert abs(float(actual.detach()) - math.log(2)) > 1e-4


def test_preferences_are_learnt_on_video(tiny, tmp_path):
    model, processor = tiny
    model = copy.deepcopy(model).train()
    trainer = preference_trainer(model, processor, tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.05
    assert logs[-1]["reward_accuracy"] == 1.0


def test_with_lora_the_reference_is_the_model_without_it(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = tiny
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, init_lora_weights=False))
    trainer = preference_trainer(adapted, processor, tmp_path)
    assert trainer.reference is None
    batch = trainer.data_collator(pairs())
    plain = preference_trainer(copy.deepcopy(adapted).merge_and_unload(), processor, tmp_path, reference=model)
    expected = plain.compute_loss(plain.model, batch)
    torch.testing.assert_close(trainer.compute_loss(adapted, batch), expected, atol=1e-5, rtol=1e-4)


def test_rows_that_are_no_pairs_are_refused(tiny, tmp_path):
    model, processor = tiny
    trainer = preference_trainer(model, processor, tmp_path)
    single = [{**row, "messages": row["messages"][:2], "independent_turns": False} for row in pairs()]
    with pytest.raises(ConfigurationError, match="one question twice"):
        trainer.compute_loss(model, trainer.data_collator(single))
    with pytest.raises(ElvaError, match="has 1"):
        PairedCollator(processor)(single)


def test_the_preference_stage_runs_from_its_recipe(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    clip = write_counter(tmp_path / "clip.mp4", 60, rate=10)
    rows = []
    for row in pairs():
        block = {"type": "video", "path": clip.name}
        first = {"role": "user", "content": [block, {"type": "text", "text": "what happens?"}]}
        rows.append({**row, "messages": [first, *row["messages"][1:]]})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    overrides = [
        option for option in TINY if not option.startswith(("model.preset", "model.image", "data.sources", "video"))
    ]
    recipe = read_recipe(
        "mavors_dpo",
        [*overrides, f"model.path={tmp_path / 'start'}", f"output_dir={tmp_path / 'run'}",
         f"data.sources={{pairs: {{path: {tmp_path / 'pairs.json'}}}}}"],
    )  # fmt: skip
    lines = []
    folder = train(recipe, lines.append)
    assert any("DPO, beta 0.1" in line for line in lines)
    assert type(MavorsForCausalLM.from_pretrained(folder)) is MavorsForCausalLM


@pytest.mark.parametrize("override", ["data.packing=none", "preference.beta=0.0"])
def test_a_preference_stage_that_cannot_be_is_refused(override):
    with pytest.raises(ConfigurationError, match="preference"):
        read_recipe("mavors_dpo", [override])


def toy_batch(num_frames=8):
    recipe, stages = read_toy_recipe("mavors_tiny")
    tokenizer = build_toy_tokenizer()
    set_seed(0)
    model = build_toy_model(recipe, tokenizer)
    data = ToyDataset(
        replace(stages[1], num_frames=num_frames, codec_share=0.0), tokenizer, length=2, seed=0, split="train",
        num_questions=2, patch_size=model.config.patch_size, aspects=recipe["teacher"],
    )  # fmt: skip
    data.layout, data.arrange = model.config.frame_layout, model.config.arrange_pixels
    return model, tokenizer, data, collate_toy([data[0], data[1]], tokenizer.pad_token_id)


@pytest.mark.parametrize("num_frames", [1, 6, 8])
def test_the_toy_world_writes_what_the_processor_writes(num_frames):
    model, tokenizer, data, batch = toy_batch(num_frames)
    processor = build_toy_processor(tokenizer, model.config)
    scene = sample_scene(0, num_frames=num_frames, split="train", staggered_share=data.stage.staggered_share,
                         single=random.Random(0).random() < data.stage.single_share)  # fmt: skip
    out = processor(text="<video>", videos=render(scene), num_frames=num_frames, return_tensors="pt")
    rows = out["pixel_values_videos"]
    torch.testing.assert_close(batch["pixel_values_videos"][: len(rows)], rows, atol=1e-6, rtol=0)
    ids = out["input_ids"][0].tolist()
    assert data[0]["row"].prefix[-len(ids) :] == ids


def test_a_file_of_the_toy_world_is_read_as_its_frames_are(tmp_path):
    model, tokenizer, _, _ = toy_batch()
    processor = build_toy_processor(tokenizer, model.config)
    frames = render(sample_scene(0))
    write_mp4(frames, tmp_path / "clip.mp4")
    array, file = (processor(text="<video>", videos=video, return_tensors="pt")
                   for video in (frames, str(tmp_path / "clip.mp4")))  # fmt: skip
    assert torch.equal(array["input_ids"], file["input_ids"])
    array, file = array["pixel_values_videos"], file["pixel_values_videos"]
    assert len(array) == 8 * 16
    assert torch.equal(array[:, -HEADER:], file[:, -HEADER:])  # the same frames of the same chunks at the same times
    assert (array[:, :-HEADER] - file[:, :-HEADER]).abs().mean() < 0.05


def test_a_step_on_the_toy_world_learns_from_words_and_teacher():
    model, _, _, batch = toy_batch()
    teacher = batch.pop("teacher_features")
    geometry = model.model.read_geometry(batch["input_ids"])
    assert len(teacher) == geometry.num_patches == 2 * 2 * 16  # two videos of two chunks
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
