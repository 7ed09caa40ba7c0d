"""The stages of Mavors as recipes: what trains, at which rate, and that they run."""

import pytest
import torch
from mavors_models import film, mavors_model, sample_inputs, words
from transformers import TrainingArguments, set_seed

from elva_hf.errors_elva import ConfigurationError
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM
from elva_hf.training.building import PART_MODULES, build_model, build_processor
from elva_hf.training.plan import plan_recipe
from elva_hf.training.recipe import read_recipe
from elva_hf.training.run import train
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
