"""QLoRA: what is held in 4 bits and what is not, and, where bitsandbytes is installed, training for real on a CPU."""

from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from saved_elva import save_checkpoint
from tiny_elva import tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training import lora
from elva_hf.training.lora import LoraOptions, add_lora, load_kwargs, lora_config, quantization_config

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install --no-deps bitsandbytes"
)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

OPTIONS = LoraOptions(r=4, lora_alpha=8, lora_dropout=0.0, quantization="nf4")
DECODER = "model.language_model.layers."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"))


def load(base, **options):
    return AutoModelForCausalLM.from_pretrained(base, **(options or load_kwargs(OPTIONS)))


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def batch(model):
    """A frame of 2 x 2 patches, a question and an answer."""
    config = model.config
    start, patch, frame, line, end = (
        getattr(config, f"{name}_token_id") for name in ("video_start", "video", "frame", "line", "video_end")
    )
    ids = torch.tensor([[start, frame, patch, patch, line, patch, patch, line, end, 5, 6, 7, 8]])
    labels = torch.where(torch.arange(ids.shape[1]) >= 11, ids, -100)
    return {"input_ids": ids, "pixel_values_videos": torch.randn(4, 3 * config.patch_size**2), "labels": labels}


def test_the_quantisation_is_that_of_qlora():
    config = quantization_config()
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_the_decoder_is_quantised_and_nothing_else():
    skipped = quantization_config().llm_int8_skip_modules
    model = tiny_model(guidance={"teacher_width": 6})
    assert {name for name in linears(model) if should_convert_module(name, skipped)} == {
        name for name in linears(model) if name.startswith(DECODER)
    }
    headless = linears(model.model)
    assert not any(should_convert_module(name, skipped) for name in headless if name.startswith("patch_embed"))


def test_a_bare_name_would_not_protect_the_front_end():
    assert should_convert_module("model.patch_embed.pixel_proj", ["patch_embed"])


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(lora, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigurationError, match="pip install bitsandbytes"):
        load_kwargs(OPTIONS)


@needs_bitsandbytes
def test_a_loaded_model_holds_4_bits_in_its_decoder_alone(base):
    from bitsandbytes.nn import Linear4bit

    model, plain = load(base), load(base, dtype=torch.float32)
    quantised = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert quantised == {name for name in linears(plain) if name.startswith(DECODER)}
    kept, expected = model.state_dict(), plain.state_dict()
    assert all(torch.equal(kept[name], expected[name]) for name in expected if "patch_embed" in name)


@needs_bitsandbytes
def test_preparing_leaves_the_front_end_trainable_in_float32(base):
    model = add_lora(load(base, dtype=torch.bfloat16, **load_kwargs(OPTIONS)), OPTIONS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in trained if ".lora_" not in name} == {"patch_embed"}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not model.base_model.model.is_activation_checkpointing


@needs_bitsandbytes
def test_training_on_a_cpu_lowers_the_loss_and_leaves_the_weights_alone(base):
    torch.manual_seed(0)
    model = add_lora(load(base), OPTIONS).train()
    given = batch(model.base_model.model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**given, merge_schedule=[{"layer": 1, "target_ratio": 0.5}]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


@needs_bitsandbytes
def test_the_adapter_of_a_quantised_model_comes_back_on_one(base, tmp_path):
    model = add_lora(load(base), OPTIONS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    given = batch(model.base_model.model)
    with torch.no_grad():
        expected = model.train()(**given).loss  # in eval mode a CPU packs the weights once more, for inference
        again = PeftModel.from_pretrained(load(base), tmp_path).train()
        assert torch.equal(again(**given).loss, expected)
        rounded = AutoModelForCausalLM.from_pretrained(tmp_path, **load_kwargs(OPTIONS)).train()  # LoRA in bfloat16
        torch.testing.assert_close(rounded(**given).loss, expected, rtol=0.02, atol=0)
        assert abs(load(base).train()(**given).loss - expected) > 0.02 * expected


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("load_options", "lora_options", "words"),
    [
        ({"dtype": torch.float32}, OPTIONS, "are not in 4 bits"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, OPTIONS, "'patch_embed' is quantised"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, LoraOptions(), "weights are in 4 bits"),
    ],
    ids=["not quantised", "front end quantised", "not asked for"],
)
def test_a_model_loaded_otherwise_is_refused(base, load_options, lora_options, words):
    with pytest.raises(ConfigurationError, match=words):
        add_lora(load(base, **load_options), lora_options)


@needs_bitsandbytes
def test_pefts_own_preparation_works_too(base):
    model = prepare_model_for_kbit_training(load(base), use_gradient_checkpointing=False)
    wrapped = get_peft_model(model, lora_config(r=4)).train()
    wrapped(**batch(model)).loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
