"""Mavors as a model: batches, times, causality, merging, generation, training, saving."""

import pytest
import torch
from generating import BEAMS, GREEDY, new_tokens
from mavors_models import (
    CHUNK,
    SAMPLES,
    Clip,
    batch_inputs,
    film,
    ids_of,
    mavors_config,
    mavors_model,
    picture,
    rows_of_sample,
    sample_inputs,
)
from merging_cases import assert_exact, in_double
from tiny_elva import batch, with_pixels, words
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from elva_hf.decoder_elva import PackedTokens, drop_merged
from elva_hf.errors_elva import ConfigurationError, PlaceholderError
from elva_hf.merging_elva import InputMerge, Tubes
from elva_hf.packing_elva import BatchLayout
from elva_hf.siblings.mavors import vision_mavors
from elva_hf.siblings.mavors.chunks_mavors import POSITION_UNIT
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM, MavorsModel
from elva_hf.siblings.mavors.rows_mavors import DIGITS, HEADER, header, read_positions

LAYERS = {"num_hidden_layers": 4}
RATIO = [{"layer": 1, "target_ratio": 0.5}]
WALK = 0.6  # so that a threshold merges some neighbours and not all
THRESHOLD = 0.97


@pytest.fixture(scope="module")
def model():
    return in_double(mavors_model(text=LAYERS))


@pytest.fixture(scope="module")
def compressing():
    return in_double(mavors_model(text=LAYERS, chunk_similarity_threshold=THRESHOLD))


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def alone(sample, seed=0, change=1.0):
    return double(sample_inputs(sample, seed, change))


def together(samples=SAMPLES, side="left", change=1.0):
    return double(batch_inputs(samples, side, change))


def visual(model, sample, seed=0):
    """Embeddings of the visual tokens of a sample, as the decoder gets them."""
    inputs = alone(sample, seed)
    features = model.model.patch_embed.encode_pixels(inputs["pixel_values_videos"])
    geometry = model.model._geometry(inputs["input_ids"], None, None, features)
    return model.model.patch_embed(features, geometry)[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["none", RATIO])
@torch.no_grad()
def test_a_sample_alone_equals_its_row_in_a_batch(model, side, schedule):
    inputs = together(side=side)
    logits = model(**inputs, merge_schedule=schedule).logits
    for i, sample in enumerate(SAMPLES):
        row = logits[i][inputs["attention_mask"][i].bool()]
        assert_exact(row, model(**alone(sample, i), merge_schedule=schedule).logits[0])


@torch.no_grad()
def test_the_order_of_samples_does_not_matter(model):
    order = [2, 0, 3, 1]
    rows = [rows_of_sample(SAMPLES[i], i) for i in order]
    inputs = with_pixels(batch([ids_of(SAMPLES[i]) for i in order]), torch.cat([r for r in rows if r is not None]))
    assert_exact(model(**double(inputs)).logits, model(**together()).logits[order])


@torch.no_grad()
def test_shifting_chunk_times_changes_nothing_and_stretching_them_does(model):
    def embed(positions):
        clip = film(4, 4, 2, positions=[round(position * POSITION_UNIT) for position in positions])
        return visual(model, [clip])

    expected = embed([0, 1, 2])
    assert float((embed([0, 2, 4]) - expected).abs().max()) > 1e-4
    encoder = model.model.patch_embed
    inputs = alone([film(4, 4, 2)])
    features = encoder.encode_pixels(inputs["pixel_values_videos"])
    geometry = model.model._geometry(inputs["input_ids"], None, None, features)
    moved = vision_mavors.Sequences(
        geometry.sequences.grids, geometry.sequences.positions + 86_400 * POSITION_UNIT, geometry.sequences.first
    )
    assert_exact(encoder.encode_chunks(features, moved)[0], expected)


def test_positions_survive_every_dtype():
    for position in (0, 1, 255, 256, 10_800 * POSITION_UNIT + 123_457):
        row = torch.tensor([header(3, position)])
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert read_positions(row.to(dtype)).tolist() == [position]
    assert HEADER == DIGITS + 1


@torch.no_grad()
def test_a_model_in_bfloat16_reads_the_same_positions(monkeypatch):
    seen = []
    rotary_table = vision_mavors.MavorsAggregator.forward

    def spy(self, hidden, positions, layout):
        seen.append(positions)
        return rotary_table(self, hidden, positions, layout)

    monkeypatch.setattr(vision_mavors.MavorsAggregator, "forward", spy)
    inputs = sample_inputs(SAMPLES[3])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    mavors_model(dtype=torch.bfloat16)(**inputs)
    assert seen[0].dtype == torch.float64
    assert seen[0].unique().tolist() == [0.0, 3.0, 7.5]


@pytest.mark.parametrize("causality", ["token", "chunk"])
@torch.no_grad()
def test_changing_a_chunk_leaves_earlier_chunks_unchanged(causality):
    model = mavors_model(dtype=torch.float64, ifa_causality=causality)
    inputs = alone([film(4, 4, 4)])
    changed = dict(inputs, pixel_values_videos=inputs["pixel_values_videos"].clone())
    rows = 2 * 3 * CHUNK
    changed["pixel_values_videos"][-rows:, :-HEADER] += torch.randn(rows, 3 * 64).double()
    states = [model.model(**part).last_hidden_state[0] for part in (inputs, changed)]
    first = 1 + 2 * 6  # the border and two chunks
    assert torch.equal(states[0][:first], states[1][:first])
    assert bool((states[0][first : first + 6] != states[1][first : first + 6]).any(1).all())


@torch.no_grad()
def test_sub_images_do_not_see_each_other(model):
    sample = [picture((1, 2), (2, 2), (2, 2))]
    expected = visual(model, sample)
    rows = rows_of_sample(sample).double()
    rows[2:6, :-HEADER] += torch.randn(4, 3 * 64).double()
    features = model.model.patch_embed.encode_pixels(rows)
    ids = torch.tensor([ids_of(sample)])
    actual = model.model.patch_embed(features, model.model._geometry(ids, None, None, features))[0]
    assert_exact(actual[[0, 1, *range(6, 10)]], expected[[0, 1, *range(6, 10)]])
    assert bool((actual[2:6] != expected[2:6]).any(1).all())


@torch.no_grad()
def test_sub_images_never_merge_in_the_decoder(model):
    """Sub-images of one grid would be tubes if they were frames."""
    all_that_may = [{"layer": 1, "similarity_threshold": -0.999}]
    for positions, kept in (([0] * 4, 21), ([0, 1, 2, 3], 9)):
        sample = [Clip([(1, 2, 2)] * 4, positions), words(3)]
        cache = model(**alone(sample), merge_schedule=all_that_may, use_cache=True).past_key_values
        assert cache.tokens_per_layer.flatten().tolist() == [21, kept, kept, kept]


@torch.no_grad()
def test_an_image_equals_a_video_of_its_copies(model):
    once, copies = Clip([(1, 2, 2)]), Clip([(CHUNK, 2, 2)])
    rows = once.rows().double()
    repeated = rows.repeat_interleave(CHUNK, 0)
    repeated[:, -HEADER] = torch.arange(CHUNK).repeat(4)
    expected = model(**with_pixels(batch([once.ids]), rows)).logits
    assert_exact(model(**with_pixels(batch([copies.ids]), repeated)).logits, expected)


@torch.no_grad()
def test_the_aggregator_starts_as_if_it_were_not_there():
    fresh = mavors_model(filled=False, dtype=torch.float64)
    none = mavors_model(filled=False, dtype=torch.float64, ifa_num_layers=0)
    none.load_state_dict(fresh.state_dict(), strict=False)
    inputs = alone(SAMPLES[0])
    assert_exact(fresh(**inputs).logits, none(**inputs).logits)


@torch.no_grad()
def test_standard_rotary_positions_differ_from_those_of_chunks():
    inputs = alone(SAMPLES[0])
    by_chunk, by_token = (mavors_model(dtype=torch.float64, ifa_rope=rope) for rope in ("chunk", "token"))
    by_token.load_state_dict(by_chunk.state_dict())
    assert float((by_token(**inputs).logits - by_chunk(**inputs).logits).abs().max()) > 1e-4


@pytest.mark.parametrize("schedule", ["none", RATIO])
@torch.no_grad()
def test_compression_is_exact_in_batches(compressing, schedule):
    inputs = together(change=WALK)
    outputs = compressing(**inputs, merge_schedule=schedule, use_cache=True)
    kept = outputs.past_key_values.tokens_per_layer[0]
    full = inputs["attention_mask"].sum(1)
    assert 0 < int((kept < full).sum()) < len(SAMPLES)  # text and images keep all
    assert outputs.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    for i, sample in enumerate(SAMPLES):
        row = outputs.logits[i][inputs["attention_mask"][i].bool()]
        assert_exact(row, compressing(**alone(sample, i, WALK), merge_schedule=schedule).logits[0])


def test_what_merged_before_the_decoder_is_counted_as_if_it_had_merged_in_it():
    """Two rows, the second padded: tokens 1 to 3 of the first are a tube of which the last two stand for themselves."""
    valid = torch.tensor([[True, True, True, True], [False, True, True, True]])
    layout = BatchLayout.read(valid, 0, torch.device("cpu"))
    packed = torch.arange(7)
    tokens = PackedTokens(
        hidden=torch.randn(7, 2), rotary=(torch.randn(1, 7, 2), torch.randn(1, 7, 2)),
        tubes=torch.tensor([-1, 0, 0, 0, -2, 1, 1]), groups=torch.tensor([-1, 0, 0, 0, -1, 1, 1]),
        sizes=torch.ones(7), origins=packed, now=packed, lengths=[4, 3], patches=[3, 2],
    )  # fmt: skip
    survivors = torch.tensor([[0, 1, 1, 3], [4, 5, 6, 6]])
    tubes = Tubes(torch.zeros(2, 4), torch.zeros(2, 4), [0, 1], [3, 2], [1, 1], 0)
    left = drop_merged(tokens, InputMerge(survivors, 0), layout, tubes)
    assert left.origins.tolist() == [0, 1, 3, 4, 5]
    assert left.now.tolist() == [0, 1, 1, 2, 3, 4, 4]
    assert left.sizes.tolist() == [1, 2, 1, 1, 2]
    assert (left.lengths, left.patches) == ([3, 2], [2, 1])
    assert left.groups.tolist() == [-1, 0, 0, -1, 1]
    assert torch.equal(left.hidden, tokens.hidden[left.origins])
    assert torch.equal(left.rotary[0], tokens.rotary[0][:, left.origins])


@torch.no_grad()
def test_a_ratio_in_the_decoder_is_of_what_compression_left(compressing):
    inputs = alone(SAMPLES[0], change=WALK)
    cache = compressing(**inputs, merge_schedule=RATIO, use_cache=True).past_key_values
    before, after = (int(cache.tokens_per_layer[layer]) - 9 for layer in (0, 1))  # 9 tokens are words and borders
    assert 6 < before < 18
    assert after == max(6, -(-before // 2))


@torch.no_grad()
def test_compressed_tokens_are_those_of_a_prompt_without_the_merged_ones(compressing):
    """The decoder sees the survivors at their own positions, and nothing else."""
    inputs = alone(SAMPLES[0], change=WALK)
    outputs = compressing(**inputs, output_merge_map=True)
    survivors = outputs.merge_map.survivors[0][0]
    assert outputs.merge_map.layers == (0,)
    features = compressing.model.patch_embed.encode_pixels(inputs["pixel_values_videos"])
    geometry = compressing.model._geometry(inputs["input_ids"], None, None, features)
    embeds = compressing.get_input_embeddings()(inputs["input_ids"])
    embeds, _ = compressing.model._place_visual_embeddings(embeds, features, geometry)
    kept = (survivors == torch.arange(len(survivors))).nonzero().squeeze(1)
    assert len(kept) < len(survivors)
    plain = compressing.model.language_model(
        inputs_embeds=embeds[:, kept], position_ids=kept[None], attention_mask=torch.ones(1, len(kept))
    )
    logits = compressing.lm_head(plain.last_hidden_state)
    assert_exact(outputs.logits[:, kept], logits)
    assert torch.equal(outputs.logits[0], outputs.logits[0, survivors])


@torch.no_grad()
def test_a_threshold_that_nothing_passes_changes_nothing(model):
    inputs = together()
    expected = model(**inputs).logits
    never = in_double(mavors_model(text=LAYERS, chunk_similarity_threshold=1.5))
    assert_exact(never(**inputs).logits, expected)


@torch.no_grad()
def test_with_compression_later_chunks_do_reach_earlier_ones(compressing):
    """What the paper's rule costs: it keeps the earlier position and the mean of both."""
    inputs = alone([film(4, 4, 4)], change=0.1)
    changed = dict(inputs, pixel_values_videos=inputs["pixel_values_videos"].clone())
    changed["pixel_values_videos"][-24:, :-HEADER] *= 1.05
    states = [compressing.model(**part).last_hidden_state[0] for part in (inputs, changed)]
    assert bool((states[0][1:7] != states[1][1:7]).any())


@pytest.mark.parametrize("options", [GREEDY, BEAMS])
@pytest.mark.parametrize("threshold", [None, THRESHOLD])
def test_generation_in_a_batch_equals_generation_alone_and_without_cache(options, threshold):
    model = in_double(mavors_model(text=LAYERS, chunk_similarity_threshold=threshold))
    inputs = together(change=WALK)
    cached = new_tokens(model.generate(**inputs, **options), inputs)
    assert cached == new_tokens(model.generate(**inputs, **options, use_cache=False), inputs)
    each = [alone(sample, i, WALK) for i, sample in enumerate(SAMPLES)]
    assert cached == [row for single in each for row in new_tokens(model.generate(**single, **options), single)]


def test_a_second_video_on_a_filled_cache(compressing):
    first, second = SAMPLES[0], [words(2, 3), film(4, 4, grid=(1, 2)), words(2, 4)]
    one = alone(first, 0, WALK)
    rows = torch.cat([one["pixel_values_videos"], rows_of_sample(second, 5, WALK).double()])
    both = with_pixels(batch([ids_of(first) + ids_of(second)]), rows)
    expected = compressing.generate(**both, **GREEDY)
    cache = compressing(**one, use_cache=True).past_key_values
    continued = compressing.generate(
        **{**both, "pixel_values_videos": rows[len(one["pixel_values_videos"]) :]}, past_key_values=cache, **GREEDY
    )
    assert continued.tolist() == expected.tolist()


@pytest.mark.parametrize("threshold", [None, THRESHOLD])
def test_every_weight_learns_with_and_without_gradient_checkpointing(threshold):
    gradients = []
    for checkpointing in (False, True):
        model = mavors_model(dtype=torch.float64, chunk_similarity_threshold=threshold).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        inputs = together(change=WALK)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(grad is not None for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        assert_exact(gradients[1][name], grad)


def test_a_batch_of_text_leaves_a_gradient_of_zero_at_every_weight():
    model = mavors_model().train()
    inputs = batch([words(5)])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = mavors_model(chunk_similarity_threshold=0.9, max_sub_images=None)
    model.save_pretrained(tmp_path)
    for head in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is MavorsForCausalLM and not any(info.values())
    assert loaded.config.max_sub_images is None
    inputs = batch_inputs(SAMPLES)
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is MavorsModel
    assert torch.equal(base(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_the_attention_of_the_tower_is_the_one_asked_for():
    model = mavors_model()
    assert model.config.vision_config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    layer = model.model.patch_embed.encoder.encoder.layers[0]
    assert layer.self_attn.config._attn_implementation == "eager"


def test_rows_that_are_cut_or_shuffled_are_refused(model):
    inputs = alone(SAMPLES[0])
    rows = inputs["pixel_values_videos"]
    for broken in (rows.flip(0), rows[1:], torch.cat([rows[:1], rows])):
        with pytest.raises(PlaceholderError):
            model(**{**inputs, "pixel_values_videos": broken})
    with pytest.raises(PlaceholderError, match="shape"):
        model(**{**inputs, "pixel_values_videos": rows[:, 1:]})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 10}, "it must be 8"),
        ({"ifa_rope": "none"}, "'chunk' or 'token'"),
        ({"ifa_num_attention_heads": 3}, "even width"),
        ({"ifa_num_attention_heads": 16}, "even width"),
        ({"chunk_frames": 257}, "at most 256"),
        ({"chunk_similarity_threshold": -2}, "above -1"),
        ({"max_sub_images": 0}, "1 or more"),
        ({"fps": 0}, "fps=0"),
    ],
)
def test_values_no_model_can_have_are_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        mavors_config(**fields)


def test_paper_sizes():
    config = MavorsConfig.from_preset("mavors-7b")
    with torch.device("meta"):
        encoder = vision_mavors.MavorsVisionEncoder(config, config.text_config.hidden_size)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in encoder.named_children()}
    assert parts == {"encoder": 423_147_888, "aggregator": 45_718_512, "projector": 16_980_992}
    assert round(sum(parts.values()) / 1e6, 1) == 485.8
