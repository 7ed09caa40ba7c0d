import copy
import json

import pytest
import torch
from tiny_elva import (
    END,
    FRAME,
    IMAGE,
    LINE,
    PATCH,
    PIXELS,
    RAGGED,
    START,
    TEXT_TYPES,
    VOCAB,
    batch_inputs,
    embed_in_a_loop,
    pixels,
    sample_inputs,
    tiny_config,
    tiny_model,
    tiny_text_config,
    video,
    words,
)
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

from elva_hf.configuration_elva import SPECIAL_TOKENS, ElvaConfig
from elva_hf.errors_elva import CheckpointError, ConfigurationError, PlaceholderError
from elva_hf.generation_elva import turn_padding_left
from elva_hf.modeling_elva import (
    ElvaForCausalLM,
    ElvaModel,
    ElvaVideoFeatures,
    add_special_tokens,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def text_twin(model):
    """A plain causal language model of transformers with the weights of the decoder."""
    config = copy.deepcopy(model.config.text_config)
    twin = AutoModelForCausalLM.from_config(config).eval()
    twin.base_model.load_state_dict(model.model.language_model.state_dict())
    twin.lm_head.load_state_dict(model.lm_head.state_dict())
    return twin


def embeddings_in_a_loop(model, inputs):
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    twin = copy.deepcopy(model.model.patch_embed)
    parts = embed_in_a_loop(twin, inputs["pixel_values_videos"], ids, model.config)
    for token, part in zip((PATCH, FRAME, LINE), parts, strict=True):
        embeds[ids == token] = part.detach().to(embeds.dtype)
    return embeds


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "model_type, text", [*((name, {}) for name in TEXT_TYPES), ("mistral", {"sliding_window": 6})], ids=str
)
def test_forward_is_the_text_model_on_the_embeddings(model_type, text, side):
    model = tiny_model(model_type, text=text)
    inputs = batch_inputs(RAGGED, side)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=positions).logits
    plain = text_twin(model)(
        inputs_embeds=embeddings_in_a_loop(model, inputs),
        attention_mask=inputs["attention_mask"],
        position_ids=positions,
    ).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out[real], plain[real], **CLOSE)
    assert out.shape == (*inputs["input_ids"].shape, VOCAB)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_text_alone_is_the_text_model(model_type):
    model = tiny_model(model_type)
    inputs = batch_inputs([words(7), words(4, 1)], "right")
    assert torch.equal(model(**inputs).logits, text_twin(model)(**inputs).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_padded_batch_is_its_sample_alone(model, side):
    inputs = batch_inputs(RAGGED, side)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=positions).logits
    for i, ids in enumerate(RAGGED):
        alone = model(**sample_inputs(ids, i)).logits[0]
        torch.testing.assert_close(out[i][inputs["attention_mask"][i].bool()], alone, **CLOSE)


def test_eager_and_sdpa_agree():
    model = tiny_model()
    inputs = batch_inputs(RAGGED)
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "elva_eager"
    eager = model(**inputs, output_attentions=True)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(eager.logits[real], sdpa[real], **CLOSE)
    assert len(eager.attentions) == model.config.text_config.num_hidden_layers


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_other_kernels_are_left_to_transformers(kernel):
    """Asking for a kernel that is not there fails as it does for a text model; one that is there loads."""

    def outcome(build, config):
        try:
            build(config, attn_implementation=kernel)
        except ImportError as error:
            return str(error).split(",")[0]
        return "loaded"

    asked = outcome(ElvaForCausalLM._from_config, tiny_config())
    plain = outcome(AutoModelForCausalLM.from_config, tiny_config().text_config)
    assert asked == plain


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_kernels_agree_on_a_gpu(kernel):
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    model = tiny_model(text={"head_dim": 32, "hidden_size": 128}).to("cuda", torch.bfloat16)
    inputs = {name: tensor.cuda() for name, tensor in batch_inputs(RAGGED).items()}
    reference = model.float()(**inputs).logits
    model.to(torch.bfloat16).set_attn_implementation(kernel)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real].float(), reference[real], rtol=0.1, atol=0.3)


def test_a_ready_four_dimensional_mask_equals_the_two_dimensional_one(model):
    inputs = batch_inputs(RAGGED)
    mask = inputs["attention_mask"].bool()
    length = mask.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None, :]
    allowed = allowed | torch.eye(length, dtype=torch.bool)  # padding sees itself
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = model(**inputs).logits[mask]
    for ready in (allowed, additive):
        torch.testing.assert_close(model(**{**inputs, "attention_mask": ready}).logits[mask], expected, **CLOSE)


def test_embeddings_instead_of_ids(model):
    inputs = batch_inputs(RAGGED)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs).logits
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(model(inputs_embeds=embeds, **rest).logits, expected)


def test_features_instead_of_pixels(model):
    inputs = batch_inputs(RAGGED)
    encoded = model.get_video_features(inputs["pixel_values_videos"])
    rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    assert torch.equal(model(**rest, mm_encoder_outputs={"video": encoded}).logits, model(**inputs).logits)


def test_features_may_come_in_pieces(model):
    """So a caller who decodes frame by frame can embed while decoding; products of fewer rows round differently."""
    inputs = batch_inputs(RAGGED)
    patches, expected = inputs["pixel_values_videos"], model(**inputs).logits
    rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    cut = model.get_video_features(patches).last_hidden_state.split(4)
    encoded = [model.get_video_features(piece).last_hidden_state for piece in patches.split(4)]
    assert len(cut) == len(encoded) > 1
    whole, apart = (
        model(**rest, mm_encoder_outputs={"video": ElvaVideoFeatures(pooler_output=tuple(pieces))}).logits
        for pieces in (cut, encoded)
    )
    assert torch.equal(whole, expected)
    torch.testing.assert_close(apart, expected, **CLOSE)


def test_video_features_come_apart_by_video(model):
    patches = pixels(RAGGED[1])
    apart = model.get_video_features(patches, patches_per_video=[3, 4, 2])
    assert [len(part) for part in apart.pooler_output] == [3, 4, 2]
    assert torch.equal(torch.cat(list(apart.pooler_output)), model.get_video_features(patches).last_hidden_state)
    assert isinstance(model.get_video_features(patches, return_dict=False), tuple)


def test_what_the_pixels_show_reaches_the_answer(model):
    inputs = sample_inputs(words(2) + video((2, 2), (2, 2)) + words(3))
    logits = model(**inputs).logits[0, -1]
    other = {**inputs, "pixel_values_videos": pixels(inputs["input_ids"][0], seed=7)}
    swapped = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].roll(4, 0)}  # frames in other order
    for changed in (other, swapped):
        assert (model(**changed).logits[0, -1] - logits).abs().max() > 1e-2


@pytest.mark.parametrize("patch_embed_type", ["video", "naive"])
def test_two_images_and_one_video_of_two_frames_differ(patch_embed_type):
    model = tiny_model(patch_embed_type=patch_embed_type)
    one = sample_inputs(video((2, 2), (2, 2)) + words(3))
    two = sample_inputs(video((2, 2)) + video((2, 2)) + words(3))
    assert torch.equal(one["pixel_values_videos"], two["pixel_values_videos"])
    assert (model(**one).logits[0, -1] - model(**two).logits[0, -1]).abs().max() > 1e-2


def test_outputs_come_as_asked(model):
    inputs = batch_inputs(RAGGED)
    full = model(**inputs, output_hidden_states=True)
    assert len(full.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert all(state.shape[:2] == inputs["input_ids"].shape for state in full.hidden_states)
    assert isinstance(full.past_key_values, DynamicCache)
    assert model(**inputs, use_cache=False).past_key_values is None
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], full.logits)
    bare = model.model(**inputs, return_dict=False)
    assert isinstance(bare, tuple) and torch.equal(bare[0], full.hidden_states[-1])


def test_logits_to_keep_selects_positions(model):
    inputs = sample_inputs(RAGGED[0])
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, full[:, -2:])
    chosen = torch.tensor([1, 4])
    torch.testing.assert_close(model(**inputs, logits_to_keep=chosen).logits, full[:, chosen])


def test_the_loss_is_the_cross_entropy_of_the_next_token(model):
    inputs = batch_inputs(RAGGED)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 9, -100)
    out = model(**inputs, labels=labels)
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=2 * count).loss, expected / 2)


def gradients(model, inputs, labels):
    model.zero_grad()
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = tiny_model().train()
    inputs = batch_inputs(RAGGED)
    labels = inputs["input_ids"]
    plain = gradients(model, inputs, labels)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_activation_checkpointing
    checkpointed = gradients(model, inputs, labels)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
    trained = {name for name in plain if "patch_embed" in name and plain[name].any()}
    assert {"model.patch_embed.pixel_proj.weight", "model.patch_embed.special_tokens"} <= trained


def test_gradients_of_a_batch_are_those_of_its_samples():
    """Padding, and the other samples, add nothing."""
    model = tiny_model()
    inputs = batch_inputs(RAGGED, "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    together = {}
    model(**inputs, labels=labels, num_items_in_batch=count).loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, ids in enumerate(RAGGED):
        one = sample_inputs(ids, i)
        model(**one, labels=one["input_ids"], num_items_in_batch=count).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(together[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_no_gradient(side):
    model = tiny_model()
    inputs = batch_inputs(RAGGED, side)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    real = inputs["attention_mask"].bool()
    learnt = real & real.roll(1, 1)  # the first real token is predicted by padding: nothing to learn
    model(inputs_embeds=embeds, **rest, labels=inputs["input_ids"].masked_fill(~learnt, -100)).loss.backward()
    assert not embeds.grad[~real].any()
    visual = torch.isin(inputs["input_ids"], torch.tensor([PATCH, FRAME, LINE]))
    assert not embeds.grad[visual].any()  # their rows are replaced
    text = real & ~visual
    last = inputs["attention_mask"].cumsum(1).argmax(1)
    text[torch.arange(len(last)), last] = False  # predicts nothing
    assert embeds.grad[text].any(-1).all()


def test_frozen_embeddings_with_checkpointing_still_train_the_front_end():
    """The usual LoRA set-up: everything frozen, inputs made to require gradients."""
    model = tiny_model().train()
    model.requires_grad_(False)
    model.model.patch_embed.requires_grad_(True)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    inputs = batch_inputs(RAGGED)
    model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert model.model.patch_embed.pixel_proj.weight.grad.any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["10MB", "8KB"])
def test_saving_and_loading_changes_nothing(tmp_path, tied, shard):
    model = tiny_model(text={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "10MB"
    loaded, info = ElvaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    inputs = batch_inputs(RAGGED)
    torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    assert loaded.generation_config.suppress_tokens == model.config.special_token_ids
    base = ElvaModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_the_base_model_round_trips_into_the_head(tmp_path, model):
    model.model.save_pretrained(tmp_path)
    loaded = ElvaForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_a_checkpoint_loads_in_bfloat16(tmp_path, model_type):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    loaded = ElvaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    inputs = batch_inputs(RAGGED)
    out, real = loaded(**inputs).logits, inputs["attention_mask"].bool()
    assert out.dtype == torch.bfloat16
    similarity = nn.functional.cosine_similarity(out[real].float(), model(**inputs).logits[real], dim=-1)
    assert similarity.mean() > 0.99


def test_auto_classes_load_a_folder_once_registered(tmp_path, model):
    import transformers

    model.save_pretrained(tmp_path)
    for head in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert type(getattr(transformers, head).from_pretrained(tmp_path)) is ElvaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is ElvaModel


def test_weights_are_initialised_with_the_configured_spread():
    model = tiny_model(initializer_range=0.02, patch_embed_dim=64, patch_embed_positions=8)
    embedding = model.model.patch_embed
    for weight in (embedding.pixel_proj.weight, embedding.special_tokens, embedding.positions):
        assert 0.01 < weight.std() < 0.03
    assert not embedding.out_proj.bias.any()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # read by PEFT
def test_lora_trains_and_saves(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    inputs = batch_inputs(RAGGED)
    settings = peft.LoraConfig(
        target_modules=r".*language_model\..*\.(q_proj|v_proj)", modules_to_save=["patch_embed"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(copy.deepcopy(base), settings).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    assert any("lora_B" in name and p.any() for name, p in trained.items())
    assert any("patch_embed" in name and p.grad.any() for name, p in trained.items())
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expected = model(**inputs).logits
    assert not torch.allclose(expected, base(**inputs).logits)
    torch.testing.assert_close(again(**inputs).logits, expected)
    torch.testing.assert_close(again.merge_and_unload()(**inputs).logits, expected, **CLOSE)
    generated = again.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 2


# From a text model ------------------------------------------------------------------------------------------------


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def small_text_model(model_type, vocab_size=12, **text):
    fields = {**tiny_text_config(model_type, vocab_size=vocab_size, eos_token_id=2), **text}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()


SMALL = {"patch_size": 4, "patch_embed_dim": 16, "patch_embed_num_heads": 2}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_a_text_model_gets_eyes_and_keeps_its_words(tmp_path, model_type, tied):
    text = small_text_model(model_type, tie_word_embeddings=tied)
    ids = torch.randint(4, 12, (2, 6))
    expected = text(ids).logits
    text.save_pretrained(tmp_path)
    tokenizer = small_tokenizer()
    model = ElvaForCausalLM.from_text_model(tmp_path, tokenizer, **SMALL).eval()
    torch.testing.assert_close(model(ids).logits[..., :12], expected)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values())) == model.config.special_token_ids
    assert model.config.text_config.vocab_size == len(tokenizer) == 18
    assert model.generation_config.eos_token_id == 2
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied

    prompt = tokenizer("a <|vision_start|> <FRAME> <video> <video> <LINE> <|vision_end|> b", return_tensors="pt")
    prompt.pop("token_type_ids", None)
    out = model.generate(**prompt, pixel_values_videos=torch.randn(2, PIXELS), max_new_tokens=3, do_sample=False)
    assert not torch.isin(out[0, -3:], torch.tensor(model.config.special_token_ids)).any()
    model.save_pretrained(tmp_path / "elva")
    again = ElvaForCausalLM.from_pretrained(tmp_path / "elva").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_a_text_model_in_memory_is_left_as_it_was():
    text = small_text_model("qwen2")
    before = {name: weight.clone() for name, weight in text.state_dict().items()}
    ids = torch.randint(4, 12, (1, 5))
    expected = text(ids).logits
    model = ElvaForCausalLM.from_text_model(text, small_tokenizer(), **SMALL).eval()
    with torch.no_grad():
        model.model.language_model.norm.weight.zero_()
    assert text.config.vocab_size == 12 and torch.equal(text(ids).logits, expected)
    assert before.keys() == text.state_dict().keys()
    assert all(torch.equal(text.state_dict()[name], weight) for name, weight in before.items())


def test_room_in_the_vocabulary_is_used_before_it_grows():
    text = small_text_model("llama", vocab_size=32)
    model = ElvaForCausalLM.from_text_model(text, small_tokenizer(), **SMALL)
    assert model.config.text_config.vocab_size == 32
    assert max(model.config.special_token_ids) == 17


def test_special_tokens_are_added_once():
    tokenizer = small_tokenizer()
    first = add_special_tokens(tokenizer)
    size = len(tokenizer)
    assert add_special_tokens(tokenizer) == first and len(tokenizer) == size
    assert tokenizer("<FRAME>", add_special_tokens=False)["input_ids"] == [first["frame_token_id"]]


def test_a_text_model_keeps_its_dtype():
    text = small_text_model("qwen2").to(torch.bfloat16)
    model = ElvaForCausalLM.from_text_model(text, small_tokenizer(), **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_text_model_without_tokenizer_or_ids_is_refused():
    with pytest.raises(ConfigurationError, match="video_token_id"):
        ElvaForCausalLM.from_text_model(small_text_model("qwen2"), **SMALL)


def test_a_model_without_a_head_is_refused():
    text = AutoModel.from_config(small_text_model("qwen2").config)
    with pytest.raises(CheckpointError, match="Qwen2Model"):
        ElvaForCausalLM.from_text_model(text, small_tokenizer(), **SMALL)


# Bad input --------------------------------------------------------------------------------------------------------

GOOD = words(2) + video((2, 2)) + words(2)


@pytest.mark.parametrize("run", ["forward", "generate"])
@pytest.mark.parametrize(
    "ids, patches, words_of_error",
    [
        (GOOD, None, "4 patch tokens in the input but pixels for 0"),
        (words(4), torch.zeros(4, PIXELS), "pixels for 4"),
        (GOOD, torch.zeros(5, PIXELS), "pixels for 5"),
        (GOOD, torch.zeros(4, PIXELS - 1), r"shape \(4, 47\).*expected floating point,? \(num_patches, 48\)"),
        (GOOD, torch.zeros(4, 3, 4, 4), r"shape \(4, 3, 4, 4\)"),
        (GOOD, torch.zeros(4, PIXELS, dtype=torch.uint8), "uint8"),
        ([START, FRAME, PATCH, PATCH, LINE, PATCH, END], torch.zeros(3, PIXELS), "sample 0, token 1: a visual token"),
        ([START, FRAME, PATCH, PATCH], torch.zeros(2, PIXELS), "sample 0, token 1: a visual token"),
    ],
    ids=["no pixels", "no placeholders", "too many", "width", "rank", "dtype", "ragged", "cut"],
)
def test_inputs_that_do_not_match_are_refused(model, run, ids, patches, words_of_error):
    call = model if run == "forward" else lambda **inputs: model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(PlaceholderError, match=words_of_error):
        call(input_ids=torch.tensor([ids]), pixel_values_videos=patches)


def test_ids_and_embeddings_together_are_refused(model):
    ids = torch.tensor([words(3)])
    embeds = model.get_input_embeddings()(ids)
    for inputs in ({"input_ids": ids, "inputs_embeds": embeds}, {}):
        with pytest.raises(PlaceholderError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_pixels_and_features_together_are_refused(model):
    inputs = sample_inputs(GOOD)
    encoded = model.get_video_features(inputs["pixel_values_videos"])
    with pytest.raises(PlaceholderError, match="not both"):
        model(**inputs, mm_encoder_outputs={"video": encoded})


def test_merge_schedules_are_refused_until_they_exist(model):
    inputs = sample_inputs(GOOD)
    assert torch.equal(model(**inputs, merge_schedule="none").logits, model(**inputs).logits)
    with pytest.raises(ConfigurationError, match="merge_schedule='paper'"):
        model(**inputs, merge_schedule="paper")
    with pytest.raises(ConfigurationError, match="merge_schedule='paper'"):
        model.generate(**inputs, merge_schedule="paper", max_new_tokens=1)


def test_right_padding_turns_left_and_left_padding_stays():
    ids = torch.tensor([[1, 2, 3, 0, 0], [0, 0, 4, 5, 6], [7, 0, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
    turned, turned_mask = turn_padding_left(ids, mask)
    assert turned.tolist() == [[0, 0, 1, 2, 3], [0, 0, 4, 5, 6], [0, 7, 0, 8, 9]]
    assert turned_mask.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 0, 1, 1]]


def test_the_saved_config_names_every_token(tmp_path, model):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "elva" and saved["architectures"] == ["ElvaForCausalLM"]
    assert saved["image_token_id"] == IMAGE
    assert ElvaConfig.from_pretrained(tmp_path).to_dict().keys() == model.config.to_dict().keys()
