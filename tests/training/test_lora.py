"""LoRA: where it acts, what trains, what is saved, and how an adapter comes back."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file
from saved_elva import QUESTION, draw_frames, save_checkpoint, write_clip
from tiny_elva import FIRST_WORD, RAGGED, TEXT_TYPES, batch_inputs, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from elva_hf.errors_elva import ConfigurationError
from elva_hf.modeling_elva import ElvaForCausalLM, ElvaModel
from elva_hf.peft_elva import LORA_TARGETS, register_lora_targets
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.training.lora import LoraOptions, add_lora, load_kwargs, lora_config, word_token_ids
from elva_hf.training.plan import plan_recipe
from elva_hf.training.recipe import read_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MERGING = [{"layer": 1, "target_ratio": 0.5}]
SMALL = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
GUIDANCE = {"teacher_width": 6}


def inputs(side="left"):
    """A ragged batch with labels on its words."""
    made = batch_inputs(RAGGED, side)
    labels = made["input_ids"].clone()
    labels[labels < FIRST_WORD] = -100
    return {**made, "labels": labels}


def adapted(seed=0, model=None, **overrides):
    """A model with an adapter that does something: B of LoRA is not zero, the front end has moved."""
    model = tiny_model() if model is None else model
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, lora_config(**{**SMALL, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return wrapped


@torch.no_grad()
def logits(model, **overrides):
    return model(**{name: value for name, value in inputs().items() if name != "labels"}, **overrides).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted(model=AutoModelForCausalLM.from_pretrained(base)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", draw_frames())


def prompt(base, clip):
    content = [{"type": "video", "path": str(clip)}, {"type": "text", "text": QUESTION}]
    return ElvaProcessor.from_pretrained(base).apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt"},
    )


# Where it acts


def test_a_bare_lora_config_works_however_late_peft_is_imported():
    program = """
import sys
import elva_hf
assert "peft" not in sys.modules, "importing elva_hf imports peft"
config = elva_hf.ElvaConfig.from_preset("tiny")
model = elva_hf.ElvaForCausalLM(config)
assert "peft" not in sys.modules, "building a model imports peft"
from peft import LoraConfig, get_peft_model
print(*sorted(get_peft_model(model, LoraConfig()).base_model.targeted_module_names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4 * len(LINEARS)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_default_targets_are_all_linear_layers_of_attention_and_mlp(model_type):
    wrapped = get_peft_model(tiny_model(model_type), LoraConfig())
    expected = {
        f"model.language_model.layers.{layer}.{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}"
        for layer in range(2)
        for name in LINEARS
    }
    assert set(wrapped.base_model.targeted_module_names) == expected


def test_default_targets_hold_for_the_model_without_a_head():
    wrapped = get_peft_model(ElvaModel(tiny_config()), LoraConfig())
    assert len(wrapped.base_model.targeted_module_names) == 2 * len(LINEARS)


def test_all_linear_would_hit_the_patch_embedding():
    names = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")).base_model.targeted_module_names
    assert any("patch_embed" in name for name in names)


def test_the_users_own_default_targets_stay(monkeypatch):
    monkeypatch.setitem(PEFT_TARGETS, "elva", ["q_proj"])
    register_lora_targets()
    assert PEFT_TARGETS["elva"] == ["q_proj"]


# What trains


@pytest.mark.parametrize("merge_schedule", ["none", MERGING], ids=["plain", "merging"])
@pytest.mark.parametrize("guided", [False, True], ids=["student", "guided"])
def test_gradients_reach_the_adapter_and_the_front_end_and_nothing_else(guided, merge_schedule):
    model = tiny_model(guidance=GUIDANCE if guided else None)
    wrapped = add_lora(model, LoraOptions(**SMALL))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.train()
    wrapped(**inputs(), merge_schedule=merge_schedule).loss.backward()
    reached = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if "guidance" in name}
    assert reached | heads == trained
    assert bool(heads) == guided
    assert all(".lora_" in name or ".patch_embed.modules_to_save." in name for name in reached)
    assert sum(".lora_" in name for name in reached) == 2 * 2 * len(LINEARS)
    front_end = [name for name in reached if "patch_embed" in name]
    assert len(front_end) == len(list(tiny_model().model.patch_embed.parameters()))
    moving = [name for name, parameter in wrapped.named_parameters() if name in reached and parameter.grad.any()]
    still = reached - set(moving)
    assert all(name.endswith("k_proj.bias") for name in still), still  # a softmax does not see it


def test_the_front_end_stays_frozen_on_demand():
    wrapped = get_peft_model(tiny_model(), lora_config(**SMALL, modules_to_save=None))
    assert all(".lora_" in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        wrapped = adapted(model=tiny_model())
        if checkpointing:
            wrapped.enable_input_require_grads()
            wrapped.base_model.model.activation_checkpointing_enable()
        wrapped.train()
        wrapped(**inputs(), merge_schedule=MERGING).loss.backward()
        assert wrapped.base_model.model.is_activation_checkpointing == checkpointing
        gradients.append({name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_text_alone_trains_through_a_frozen_front_end_with_checkpointing():
    wrapped = get_peft_model(tiny_model(), lora_config(**SMALL, modules_to_save=None)).train()
    wrapped.base_model.model.activation_checkpointing_enable()
    text = torch.arange(FIRST_WORD, FIRST_WORD + 8)[None]
    wrapped(input_ids=text, labels=text).loss.backward()
    assert all(p.grad is not None for name, p in wrapped.named_parameters() if "lora_B" in name)


class Words:
    """A tokenizer that knows two new words."""

    ids = {"pink": FIRST_WORD + 1, "teal": FIRST_WORD + 5}

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.ids[text.strip()]]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_words_train_their_rows_and_no_others(tied):
    model = tiny_model(text={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = add_lora(model, LoraOptions(**SMALL, new_words=["pink", "teal"]), Words()).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    text = torch.arange(FIRST_WORD, FIRST_WORD + 8)[None]
    wrapped(input_ids=text, labels=text).loss.backward()
    optimizer.step()
    merged = wrapped.merge_and_unload()
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        moved = (merged.state_dict()[name] != before[name]).any(1).nonzero().flatten()
        assert moved.tolist() == sorted(Words.ids.values())
    assert torch.equal(merged.get_input_embeddings().weight, merged.lm_head.weight) == tied


def test_new_words_come_back_with_the_adapter(base, tmp_path):
    tokenizer = ElvaProcessor.from_pretrained(base).tokenizer
    wrapped = add_lora(AutoModelForCausalLM.from_pretrained(base), LoraOptions(**SMALL, new_words=["pink"]), tokenizer)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    wrapped.eval().save_pretrained(tmp_path)
    text = tokenizer("What color is pink?", return_tensors="pt")
    expected = wrapped(**text).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**text).logits, expected)
    assert torch.allclose(wrapped.merge_and_unload()(**text).logits, expected, atol=1e-5)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(**text).logits, expected, atol=0.1)


def test_word_token_ids_are_those_of_both_spellings(base):
    tokenizer = ElvaProcessor.from_pretrained(base).tokenizer
    ids = word_token_ids(tokenizer, ["pink"])
    assert tokenizer.convert_ids_to_tokens(ids) == sorted({"p", "i", "n", "k", "Ġp"}, key=tokenizer.get_vocab().get)
    assert word_token_ids(tokenizer, ["red"]) == sorted(tokenizer.convert_tokens_to_ids(["red", "Ġred"]))


# What is saved, and how it comes back


def test_an_adapter_holds_no_base_weights(adapter):
    names = load_file(adapter / "adapter_model.safetensors")
    assert all(".lora_" in name or ".patch_embed." in name for name in names)
    assert not any("modules_to_save" in name or "base_layer" in name for name in names)


def test_an_adapter_names_its_base_and_its_task(adapter, base):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (config["task_type"], config["modules_to_save"]) == ("CAUSAL_LM", ["patch_embed"])
    assert config["target_modules"] == LORA_TARGETS


@pytest.mark.parametrize(
    "load",
    [
        lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
        lambda base, adapter: ElvaForCausalLM.from_pretrained(adapter),
        lambda base, adapter: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    ],
    ids=["auto", "class", "peft"],
)
def test_an_adapter_comes_back_bit_for_bit(load, base, adapter, clip):
    trained = adapted(model=AutoModelForCausalLM.from_pretrained(base))
    question = prompt(base, clip)
    with torch.no_grad():
        expected, plain = trained(**question).logits, AutoModelForCausalLM.from_pretrained(base)(**question).logits
        assert torch.equal(load(base, adapter)(**question).logits, expected)
    assert not torch.allclose(plain, expected, atol=0.1)


def test_the_pipeline_answers_with_the_adapter(base, adapter, clip):
    answer = pipeline("video-text-to-text", model=str(adapter))(str(clip), QUESTION, max_new_tokens=5)
    trained = adapted(model=AutoModelForCausalLM.from_pretrained(base))
    question = prompt(base, clip)
    ids = trained.generate(**question, max_new_tokens=5, do_sample=False)[:, question["input_ids"].shape[1] :]
    expected = ElvaProcessor.from_pretrained(base).batch_decode(ids, skip_special_tokens=True)[0].strip()
    plain = pipeline("video-text-to-text", model=str(base))(str(clip), QUESTION, max_new_tokens=5)
    text = [found[0]["generated_text"] if isinstance(found, list) else found for found in (answer, plain)]
    assert text[0].strip() == expected != text[1].strip()


def test_a_guided_adapter_loads_on_an_exported_base(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.set_guidance(GUIDANCE)
    add_lora(model, LoraOptions(**SMALL)).save_pretrained(tmp_path)
    assert any("guidance" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert not any("teacher" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    AutoModelForCausalLM.from_pretrained(tmp_path)


# Merging an adapter into the weights, taking it off, and several of them


@pytest.mark.parametrize("merge_schedule", ["none", MERGING], ids=["plain", "merging"])
def test_merge_and_unload_answers_as_the_adapter_does(merge_schedule):
    wrapped = adapted(model=tiny_model().double())
    expected = logits(wrapped, merge_schedule=merge_schedule)
    merged = wrapped.merge_and_unload()
    assert type(merged) is ElvaForCausalLM
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, merge_schedule=merge_schedule), expected, rtol=0, atol=1e-10)


def test_unload_gives_the_base_back_bit_for_bit_once_its_adapter_is_deleted():
    wrapped = adapted()
    assert not torch.equal(logits(wrapped), logits(tiny_model()))
    wrapped.delete_adapter("default")
    plain, expected = wrapped.unload().state_dict(), tiny_model().state_dict()
    assert list(plain) == list(expected)
    assert all(torch.equal(plain[name], expected[name]) for name in expected)


def test_unload_alone_keeps_the_trained_front_end_as_peft_has_it():
    plain, expected = adapted().unload().state_dict(), tiny_model().state_dict()
    changed = {name for name in expected if not torch.equal(plain[name], expected[name])}
    assert changed == {name for name in expected if ".patch_embed." in name}


def test_adapters_are_added_chosen_and_disabled():
    first, second = logits(adapted(seed=1)), logits(adapted(seed=2))
    wrapped = adapted(seed=1)
    wrapped.add_adapter("other", lora_config(**SMALL))
    wrapped.load_state_dict(
        {name.replace(".default", ".other"): value for name, value in adapted(seed=2).state_dict().items()},
        strict=False,
    )
    assert torch.equal(logits(wrapped), first)
    wrapped.set_adapter("other")
    assert torch.equal(logits(wrapped), second)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(tiny_model()))
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)


def test_transformers_own_add_adapter_takes_the_defaults():
    model = tiny_model()
    model.add_adapter(LoraConfig())
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * len(LINEARS)
    assert not any("patch_embed" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("merge_schedule", ["none", MERGING], ids=["plain", "merging"])
def test_generation_with_an_adapter_equals_generation_with_merged_weights(merge_schedule):
    question = {name: value for name, value in inputs().items() if name != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "merge_schedule": merge_schedule}
    wrapped = adapted(model=tiny_model().double())
    answer = wrapped.generate(**question, **options)
    assert not torch.equal(answer, tiny_model().double().generate(**question, **options))
    assert torch.equal(answer, wrapped.merge_and_unload().generate(**question, **options))


# Training


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


def collate(indices):
    """The same two samples, with words that depend on the index."""
    made = inputs()
    made["labels"] = torch.where(made["labels"] >= 0, (made["labels"] + sum(indices)) % 90 + FIRST_WORD, -100)
    return made


def train(folder, steps, resume=None):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_model(), lora_config(**{**SMALL, "lora_dropout": 0.1}))
    trainer = Trainer(model=wrapped, args=arguments, train_dataset=Samples(), data_collator=collate)
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach() for name, p in wrapped.named_parameters() if p.requires_grad}


def test_a_run_with_an_adapter_resumes_bit_for_bit(tmp_path):
    straight = train(tmp_path / "straight", 4)
    train(tmp_path / "broken", 2)
    saved = tmp_path / "broken" / "checkpoint-2"
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()
    resumed = train(tmp_path / "broken", 4, resume=str(saved))
    halfway = load_file(saved / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    moved = [name for name in halfway if not np.array_equal(halfway[name], straight[with_adapter_name(name)])]
    assert len(moved) > len(halfway) / 2


def with_adapter_name(name):
    """Name of a saved parameter in a `PeftModel`."""
    if ".patch_embed." in name:
        return name.replace(".patch_embed.", ".patch_embed.modules_to_save.default.")
    return name.replace(".weight", ".default.weight")


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_a_recipe_is_planned_with_its_model(name, base):
    (plan,) = plan_recipe(read_recipe(name, [f"model.path={base}", "training.max_steps=1"]))
    assert list(plan.trained) == ["lora", "patch_embed"]
    assert plan.trained["lora"] == sum(
        p.numel()
        for key, p in add_lora(AutoModelForCausalLM.from_pretrained(base), LoraOptions()).named_parameters()
        if ".lora_" in key
    )


# Options that cannot be


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "lora.r=0"),
        ({"lora_alpha": 0}, "lora.lora_alpha=0"),
        ({"lora_dropout": 1.0}, "lora.lora_dropout=1.0"),
        ({"quantization": "int8"}, "expected null or 'nf4'"),
    ],
)
def test_impossible_options_are_refused(fields, words):
    with pytest.raises(ConfigurationError, match=words):
        LoraOptions(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"new_words": ["pink"]}, "need the model's tokenizer"),
        ({"quantization": "nf4"}, "are not in 4 bits"),
        ({"modules_to_save": ["vision_tower"]}, "'vision_tower' is no module"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(fields, words):
    with pytest.raises(ConfigurationError, match=words):
        add_lora(tiny_model(), LoraOptions(**fields))


def test_options_reach_peft(base):
    tokenizer = ElvaProcessor.from_pretrained(base).tokenizer
    options = LoraOptions(r=2, lora_alpha=6, use_rslora=True, target_modules=["q_proj"], new_words=["red"])
    config = add_lora(AutoModelForCausalLM.from_pretrained(base), options, tokenizer).peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.target_modules) == (2, 6, True, {"q_proj"})
    assert config.trainable_token_indices == {"embed_tokens": word_token_ids(tokenizer, ["red"])}
    assert load_kwargs(options) == {}
