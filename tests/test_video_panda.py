"""Video-Panda as a model: what holds for ELVA holds for it, in every variant of its block."""

import copy

import pytest
import torch
import transformers
from generating import BEAMS, GREEDY, new_tokens
from merging_cases import BUSY, LAYERS, SCHEDULES, assert_exact, gradients, moving_pixels, rows_of, without
from saved_elva import draw_frames, write_clip
from tiny_elva import RAGGED, TEXT_TYPES, VOCAB, pixels, video, words
from tiny_video_panda import VARIANTS, double_panda, shown, tiny_panda

from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.errors_elva import PlaceholderError
from elva_hf.modeling_elva import add_special_tokens
from elva_hf.siblings.video_panda.configuration_video_panda import ABLATIONS, VideoPandaConfig
from elva_hf.siblings.video_panda.modeling_video_panda import VideoPandaForCausalLM, VideoPandaModel
from elva_hf.siblings.video_panda.processing_video_panda import VideoPandaProcessor, VideoPandaVideoProcessor

DEEP = {"num_hidden_layers": LAYERS}
MERGING = {name: SCHEDULES[name] for name in ("paper", "ratios", "window", "first")}


@pytest.fixture(scope="module")
def model():
    """Shared: do not change it."""
    return tiny_panda()


@pytest.fixture(scope="module")
def deep():
    """In float64 with six layers; shared."""
    return double_panda(text=DEEP)


def alone(model, samples, draw, **options):
    """Logits of each sample in a batch of its own."""
    return [model(**shown(model, [ids], draw, seeds=[i]), **options).logits[0] for i, ids in enumerate(samples)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_a_padded_batch_is_its_sample_alone(variant, side):
    model = double_panda(variant)
    inputs = shown(model, RAGGED, pixels, side)
    out = model(**inputs).logits
    assert out.shape == (*inputs["input_ids"].shape, VOCAB)
    for row, expected in zip(rows_of(out, inputs), alone(model, RAGGED, pixels), strict=True):
        assert_exact(row, expected)


@torch.no_grad()
@pytest.mark.parametrize("schedule", MERGING)
@pytest.mark.parametrize("variant", ["paper", "without-row-tokens", "half-resolution"])
def test_merging_keeps_a_row_what_its_sample_is(deep, variant, schedule):
    model = deep if variant == "paper" else double_panda(variant, text=DEEP)
    options = {"merge_schedule": MERGING[schedule]}
    inputs = shown(model, BUSY, moving_pixels)
    out = model(**inputs, **options)
    for row, expected in zip(rows_of(out.logits, inputs), alone(model, BUSY, moving_pixels, **options), strict=True):
        assert_exact(row, expected)
    counts = out.past_key_values.tokens_per_layer
    assert (counts[-1] <= counts[0]).all() and (counts[-1] < counts[0]).any()
    plain = model(**inputs).logits
    changes = (out.logits - plain)[inputs["attention_mask"].bool()]
    assert changes.abs().max() > 1e-3


@torch.no_grad()
def test_a_schedule_that_merges_nothing_changes_nothing(deep):
    inputs = shown(deep, BUSY, moving_pixels)
    never = deep(**inputs, merge_schedule=SCHEDULES["never"]).logits
    for row, expected in zip(rows_of(never, inputs), rows_of(deep(**inputs).logits, inputs), strict=True):
        assert_exact(row, expected)


@torch.no_grad()
def test_the_order_of_samples_does_not_matter(deep):
    order = [3, 0, 4, 1, 2]
    first = shown(deep, BUSY, moving_pixels)
    second = shown(deep, [BUSY[i] for i in order], moving_pixels, seeds=order)
    rows = rows_of(deep(**first, merge_schedule=MERGING["paper"]).logits, first)
    for place, row in zip(order, rows_of(deep(**second, merge_schedule=MERGING["paper"]).logits, second), strict=True):
        assert_exact(row, rows[place])


@torch.no_grad()
@pytest.mark.parametrize("model_type", TEXT_TYPES)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 9])
def test_any_number_of_frames_on_any_decoder(model_type, num_frames):
    model = tiny_panda(model_type=model_type)
    ids = words(2) + video(*num_frames * [(2, 2)]) + words(3)
    inputs = shown(model, [ids], pixels)
    logits = model(**inputs).logits[0, -1]
    assert logits.isfinite().all()
    backwards = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    assert (model(**backwards).logits[0, -1] - logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["none", "paper"])
@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("variant", ["paper", "without-row-tokens"])
def test_a_ragged_batch_generates_what_its_samples_do_with_cache_and_without(variant, options, schedule):
    model = tiny_panda(variant, text=DEEP)
    options = {**options, "merge_schedule": SCHEDULES[schedule]}
    inputs = without(shown(model, BUSY, moving_pixels, "right"), "position_ids")
    together = new_tokens(model.generate(**inputs, **options), inputs)
    single = []
    for i, ids in enumerate(BUSY):
        one = without(shown(model, [ids], moving_pixels, seeds=[i]), "position_ids")
        single += new_tokens(model.generate(**one, **options), one)
    assert together == single
    assert new_tokens(model.generate(**inputs, **options, use_cache=False), inputs) == together
    assert len({tuple(row) for row in together}) > len(BUSY) // 2


@torch.no_grad()
def test_a_second_video_on_a_filled_cache(deep):
    first, second = words(2) + video((2, 2), (2, 2)), words(1) + video(*3 * [(1, 2)]) + words(2)
    one, two = shown(deep, [first], moving_pixels), shown(deep, [second], moving_pixels, seeds=[1])
    cache = deep(**without(one, "position_ids")).past_key_values
    continued = deep(
        input_ids=two["input_ids"], pixel_values_videos=two["pixel_values_videos"], past_key_values=cache
    ).logits[0]
    together = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1),
        "pixel_values_videos": torch.cat([one["pixel_values_videos"], two["pixel_values_videos"]]),
    }
    assert_exact(continued, deep(**together).logits[0, len(first) :])


@pytest.mark.parametrize("variant", ["paper", "without-row-tokens"])
def test_embeddings_instead_of_ids_and_features_instead_of_pixels(variant):
    model = tiny_panda(variant)
    inputs = shown(model, RAGGED, pixels)
    expected = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(inputs_embeds=embeds, **without(inputs, "input_ids")).logits, expected)
    encoded = {"video": model.get_video_features(inputs["pixel_values_videos"])}
    assert torch.equal(model(**without(inputs, "pixel_values_videos"), mm_encoder_outputs=encoded).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = double_panda().train()
    inputs = shown(model, RAGGED, pixels)
    learn = {**inputs, "labels": inputs["input_ids"], "use_cache": False}
    model(**learn).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model(**learn).loss.backward()
    checkpointed = gradients(model)
    for name, gradient in plain.items():
        assert_exact(checkpointed[name], gradient)
    assert plain["model.patch_embed.patch_proj.weight"].any()


@pytest.mark.parametrize("variant", ["paper", "without-row-tokens"])
def test_text_alone_gives_every_parameter_a_gradient(variant):
    """As DDP wants it."""
    model = tiny_panda(variant).train()
    inputs = shown(model, [words(5), words(3)], pixels)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.model.patch_embed.parameters())


@pytest.mark.parametrize("variant", ["paper", "perceiver"])
def test_saving_and_loading_changes_nothing(tmp_path, variant):
    model = tiny_panda(variant)
    model.save_pretrained(tmp_path)
    inputs = shown(model, RAGGED, pixels)
    expected = model(**inputs).logits
    for head in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        loaded, info = getattr(transformers, head).from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is VideoPandaForCausalLM and not any(info.values())
    assert torch.equal(loaded.eval()(**inputs).logits, expected)
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is VideoPandaModel
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is VideoPandaConfig


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # read by PEFT
def test_lora_goes_to_the_decoder_by_default(tmp_path):
    peft = pytest.importorskip("peft")
    base = double_panda()
    inputs = shown(base, RAGGED, pixels)
    settings = peft.LoraConfig(modules_to_save=["patch_embed"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), settings).train()
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted and all("language_model.layers" in name for name in adapted)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    expected = model(**inputs).logits
    assert not torch.allclose(expected, base(**inputs).logits)
    trained, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert_exact(again(**inputs).logits, expected)


def test_pixels_of_another_model_are_refused(model):
    ids = torch.tensor([video((2, 2))])
    with pytest.raises(PlaceholderError, match=r"expected floating point, \(num_patches, 48\) for patch_size=4"):
        model(input_ids=ids, pixel_values_videos=torch.zeros(4, 27))
    with pytest.raises(PlaceholderError, match="4 patch tokens in the input but pixels for 3"):
        model(input_ids=ids, pixel_values_videos=torch.zeros(3, 48))


# With its processor -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a tiny random model and its processor, 8 frames of at most 64 pixels."""
    folder = tmp_path_factory.mktemp("panda")
    tokenizer = build_toy_tokenizer()
    torch.manual_seed(0)
    config = VideoPandaConfig.from_preset("video-panda-tiny", **add_special_tokens(tokenizer))
    config.initializer_range = config.text_config.initializer_range = 0.2
    config.text_config.vocab_size = len(tokenizer)
    model = VideoPandaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    fields = {name: getattr(config, name) for name in ("patch_size", "longest_edge", "low_res_longest_edge")}
    VideoPandaProcessor.from_tokenizer(tokenizer, **fields).save_pretrained(folder)
    return folder


def test_the_processor_takes_8_frames_of_448_pixels_or_as_many_as_are_asked_for():
    processor = VideoPandaVideoProcessor()
    grids = processor(20 * [draw_frames(num_frames=1, height=600, width=600)[0]])["video_grids"]
    assert grids == [8 * [(16, 16)]]
    assert processor(3 * [draw_frames(num_frames=1)[0]], num_frames=2)["video_grids"] == [2 * [(2, 2)]]
    assert VideoPandaVideoProcessor(num_frames=3).num_frames == 3
    sampled = processor.sample(draw_frames(num_frames=80, height=30, width=30))
    assert sampled.indices == (5, 15, 25, 35, 45, 55, 65, 75)  # the middles of 8 equal parts


@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
def test_a_configuration_tells_its_processor_what_it_must_know(ablation):
    config = VideoPandaConfig.from_preset("video-panda-7b", ablation)
    processor = VideoPandaVideoProcessor(**config.video_options)
    assert processor.layout == config.frame_layout and processor.patch_size == config.patch_size
    assert processor.longest_edge == config.longest_edge and processor.num_high_res_frames == 8


@pytest.mark.parametrize("row_tokens", [True, False])
def test_the_processor_writes_what_the_model_reads(tmp_path, row_tokens):
    tokenizer = build_toy_tokenizer()
    processor = VideoPandaProcessor.from_tokenizer(
        tokenizer, patch_size=16, longest_edge=64, low_res_longest_edge=32, row_tokens=row_tokens
    )
    processor.save_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is VideoPandaProcessor and type(processor.video_processor) is VideoPandaVideoProcessor
    frames = draw_frames(num_frames=8, height=64, width=48)
    config = VideoPandaConfig.from_preset("video-panda-tiny", **add_special_tokens(tokenizer), row_tokens=row_tokens)
    inputs = processor(text="what is it? <video>", videos=[frames], return_tensors="pt")
    geometry = VideoPandaModel(config).read_geometry(inputs["input_ids"])
    assert (geometry.num_frames, geometry.frame_rows.tolist(), geometry.frame_columns.tolist()) == (8, 8 * [4], 8 * [3])
    assert geometry.num_patches == len(inputs["pixel_values_videos"]) == 96
    counted = processor.count_tokens(videos=[frames])
    assert counted.num_visual_tokens == 8 * (1 + 4 * (3 + row_tokens))
    plan = processor.plan(videos=[frames], config=config)
    assert plan.num_visual_tokens == counted.num_visual_tokens and plan.layers[0].maximum == counted.num_tokens
    assert plan.flops.maximum.patch_embed == config.patch_embed_flops([8 * [(4, 3)]])
    assert processor._get_num_multimodal_tokens(video_sizes=[(8, 64, 48)]).num_video_tokens == [counted.num_tokens]


def test_the_pipeline_answers_as_processor_and_generate_do(checkpoint, tmp_path):
    pipe = transformers.pipeline("video-text-to-text", model=str(checkpoint), device="cpu", max_new_tokens=5)
    assert type(pipe.model) is VideoPandaForCausalLM and type(pipe.processor) is VideoPandaProcessor
    clips = [write_clip(tmp_path / f"{i}.mp4", draw_frames(i, num_frames=9 + i)) for i in range(2)]
    asked = [{"video": str(clip), "text": "What color is the square?"} for clip in clips]
    batched = pipe(asked, batch_size=2)
    assert batched == [pipe(one) for one in asked]
    chat = [
        {
            "role": "user",
            "content": [{"type": "video", "video": str(clips[0])}, {"type": "text", "text": asked[0]["text"]}],
        }
    ]
    inputs = pipe.processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert int((inputs["input_ids"] == pipe.model.config.frame_token_id).sum()) == 8
    out = pipe.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    by_hand = pipe.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert batched[0][0]["generated_text"] == by_hand[0]
