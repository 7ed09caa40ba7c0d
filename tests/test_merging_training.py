"""Training with merging on (stage 3): loss, gradients, checkpointing, LoRA, bfloat16 and the Trainer."""

import copy

import peft
import pytest
import torch
from merging_cases import (
    BUSY,
    MIXED,
    SCHEDULES,
    assert_exact,
    copy_of,
    deep_model,
    double_model,
    gradients,
    movie,
    movies,
    moving_pixels,
    without,
)
from merging_oracle import Oracle, cross_entropy
from tiny_elva import PAD, batch, with_pixels
from torch import nn
from transformers import Trainer, TrainingArguments

from elva_hf import modeling_elva
from elva_hf.modeling_elva import ElvaForCausalLM

SINGLE = {"rtol": 2e-6, "atol": 0}  # transformers' cross-entropy is in float32


def labels_of(inputs):
    """Every real token after the first is to be predicted, visual ones too; padding is not."""
    mask = inputs["attention_mask"]
    first = nn.functional.one_hot(mask.argmax(1), mask.shape[1])
    return inputs["input_ids"].masked_fill((mask == 0) | (first == 1), -100)


def answers_of(inputs, count=3):
    """Only the last tokens of each row are to be predicted, as in a conversation."""
    mask = inputs["attention_mask"]
    from_end = mask.sum(1, keepdim=True) - mask.cumsum(1)
    return inputs["input_ids"].masked_fill((mask == 0) | (from_end >= count), -100)


@pytest.fixture
def model():
    model = double_model().train()
    model.set_merge_schedule(MIXED)
    return model


def oracle_loss(oracle, schedule, labelled=labels_of):
    """Mean over the supervised tokens of all samples, each on its own."""
    parts = []
    for i, ids in enumerate(BUSY):
        labels = labelled(movie(ids, i))[0]
        parts.append(cross_entropy(oracle.sample(ids, schedule, i).logits, labels))
    return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [labels_of, answers_of])
@pytest.mark.parametrize("schedule", ["none", "paper", "ratios", "max_run"])
def test_the_loss_is_the_mean_over_supervised_tokens_of_the_oracle(model, schedule, labelled, side):
    inputs = movies(BUSY, side)
    out = model(**inputs, labels=labelled(inputs), merge_schedule=SCHEDULES[schedule])
    with torch.no_grad():
        expected = oracle_loss(Oracle(model), SCHEDULES[schedule], labelled)
    torch.testing.assert_close(out.loss.double(), expected, **SINGLE)


def test_logits_exist_in_evaluation_only(model):
    inputs = movies(BUSY)
    assert model(**inputs, labels=labels_of(inputs)).logits is None
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    out = model.eval()(**inputs, labels=labels_of(inputs))
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    torch.testing.assert_close(out.loss, model.train()(**inputs, labels=labels_of(inputs)).loss, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["paper", "ratios", "window", "first"])
def test_the_gradient_of_the_loss_is_the_oracles(model, schedule):
    oracle = Oracle(model)
    oracle_loss(oracle, SCHEDULES[schedule]).backward()
    inputs = movies(BUSY)
    model(**inputs, labels=labels_of(inputs), merge_schedule=SCHEDULES[schedule]).loss.backward()
    expected = oracle.gradients()
    for name, gradient in gradients(model).items():
        assert_exact(gradient, expected[name], 1e-6)  # the float32 of the cross-entropy is in it
        assert gradient.any() or "special_tokens" not in name


def test_a_number_of_items_divides_the_sum(model):
    inputs = movies(BUSY)
    labels = labels_of(inputs)
    count = int((labels[:, 1:] != -100).sum())
    mean = model(**inputs, labels=labels).loss
    for items in (2 * count, torch.tensor(2 * count)):
        half = model(**inputs, labels=labels, num_items_in_batch=items).loss
        torch.testing.assert_close(half, mean / 2, **SINGLE)


def test_micro_batches_add_up_to_the_batch(model):
    inputs = movies(BUSY, "right")
    count = int((labels_of(inputs)[:, 1:] != -100).sum())
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    whole = gradients(model)
    model.zero_grad()
    for part in ([0], [1, 2], [3, 4]):
        inputs = movies([BUSY[i] for i in part], seeds=part)
        model(**inputs, labels=labels_of(inputs), num_items_in_batch=count).loss.backward()
    for name, gradient in gradients(model).items():
        assert_exact(gradient, whole[name], 1e-6)


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_a_loss_in_pieces_is_the_loss(monkeypatch, model, rows):
    inputs = movies(BUSY)
    expected = model(**inputs, labels=labels_of(inputs)).loss
    expected.backward()
    whole = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(modeling_elva, "LOSS_ROWS", rows)
    loss = model(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, **SINGLE)
    for name, gradient in gradients(model).items():
        assert_exact(gradient, whole[name], 1e-6)


def test_a_batch_without_labels_gives_zero_and_zero_gradients(model):
    inputs = movies(BUSY)
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_recomputes_no_decision(monkeypatch, model, reentrant):
    """Merges stand between the layers: layers run twice, a merge once."""
    from elva_hf import decoder_elva

    steps, runs = [], []
    merge = decoder_elva.merge_step
    monkeypatch.setattr(decoder_elva, "merge_step", lambda *args: steps.append(1) or merge(*args))
    model.model.language_model.layers[2].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    inputs = movies(BUSY)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert (len(steps), len(runs)) == (3, 2)


def test_every_parameter_learns(model):
    inputs = movies(BUSY)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    silent = [name for name, gradient in gradients(model).items() if not gradient.any()]
    assert silent == []


# bfloat16


def steps_of(model, inputs, labels, count=8, **options):
    """Losses of a few steps of plain gradient descent on one batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels, **options).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_bfloat16_weights_train(checkpointing):
    model = deep_model().to(torch.bfloat16).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    inputs = movies(BUSY, dtype=torch.bfloat16)
    losses = steps_of(model, inputs, labels_of(inputs), merge_schedule=MIXED)
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_autocast_over_float32_weights_trains():
    model = deep_model().train()
    inputs = movies(BUSY, dtype=torch.float32)
    exact = float(model(**inputs, labels=labels_of(inputs), merge_schedule=SCHEDULES["ratios"]).loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        losses = steps_of(model, inputs, labels_of(inputs), 20, merge_schedule=SCHEDULES["ratios"])
    assert abs(losses[0] - exact) < 0.05 * exact
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# LoRA


SETTINGS = {
    "target_modules": r".*language_model\..*\.(q_proj|v_proj|down_proj)",
    "modules_to_save": ["patch_embed"],
    "task_type": "CAUSAL_LM",
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # read by PEFT
def test_lora_trains_saves_and_generates(tmp_path):
    base = deep_model()
    base.set_merge_schedule(MIXED)
    inputs = movies(BUSY, dtype=torch.float32)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**SETTINGS)).train()
    losses = steps_of(model, inputs, labels_of(inputs))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.allclose(expected, base(**inputs).logits, atol=1e-2)
        torch.testing.assert_close(again(**inputs).logits, expected)
        plain = again(**inputs, merge_schedule="none").logits
        assert not torch.allclose(plain, expected, atol=1e-2)  # the adapter still merges
    prompt = without(inputs, "position_ids")
    words = again.generate(**prompt, max_new_tokens=3, do_sample=False)
    merged = again.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, max_new_tokens=3, do_sample=False), words)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_lora_with_checkpointing_gets_the_same_gradients():
    base = double_model().train()
    base.set_merge_schedule(MIXED)
    model = peft.get_peft_model(base, peft.LoraConfig(**SETTINGS, init_lora_weights=False)).double().train()
    twin = copy_of(model)
    twin.enable_input_require_grads()
    twin.base_model.model.activation_checkpointing_enable()
    inputs = movies(BUSY)
    for net in (model, twin):
        net(**inputs, labels=labels_of(inputs)).loss.backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad.any(), name
            assert_exact(other.grad, one.grad)


# the Trainer


class Films(torch.utils.data.Dataset):
    """The samples of BUSY, one after another."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        sample = [0, 1, 3, 4][index]
        return {"ids": BUSY[sample], "pixels": moving_pixels(BUSY[sample], sample)}


def collate(rows):
    inputs = batch([row["ids"] for row in rows], "right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == PAD, -100)
    return with_pixels({**inputs, "labels": labels}, torch.cat([row["pixels"] for row in rows]))


def trainer_of(model, folder, **options):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "seed": 0,
        **options,
    }
    return Trainer(model, TrainingArguments(**arguments), data_collator=collate, train_dataset=Films())


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_trainer_trains_with_the_papers_schedule(tmp_path, checkpointing):
    model = deep_model(merge_schedule="paper")
    trainer = trainer_of(model, tmp_path, gradient_checkpointing=checkpointing, save_strategy="steps", save_steps=6)
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    loaded = ElvaForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert loaded.config.merge_schedule == "paper"
    assert loaded.config.resolve_merge_schedule() == model.config.resolve_merge_schedule("paper")
    inputs = movies(BUSY, dtype=torch.float32)
    expected = model.eval()(**inputs).logits
    torch.testing.assert_close(loaded.eval()(**inputs).logits, expected, rtol=1e-4, atol=1e-4)  # other alignment


@pytest.mark.filterwarnings("ignore")
def test_accumulated_micro_batches_train_as_one_batch(tmp_path):
    """Trainer counts the labels of the whole batch and hands the number to the model."""
    trained = []
    for size, parts in ((4, 1), (1, 4)):
        model = deep_model(merge_schedule=MIXED)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        trainer_of(model, tmp_path, **options, optim="sgd", learning_rate=0.1).train()
        trained.append(model.state_dict())
    before = deep_model().state_dict()
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained[0]["lm_head.weight"], before["lm_head.weight"], atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_evaluation_in_the_trainer_gives_logits_and_a_loss(tmp_path):
    model = deep_model(merge_schedule=MIXED)
    trainer = trainer_of(model, tmp_path)
    result = trainer.predict(Films())
    logits = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    assert logits.shape[0] == 4 and logits.shape[-1] == 99
    assert result.metrics["test_loss"] > 0
