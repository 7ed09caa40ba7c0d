"""What transformers' generation mixin covers, on ragged batches of videos; the mixin itself is not in its sdist."""

import copy

import pytest
import torch
from generating import BEAMS, GREEDY, NEW, new_tokens
from tiny_elva import (
    RAGGED,
    TEXT_TYPES,
    VOCAB,
    batch,
    batch_inputs,
    pixels,
    sample_inputs,
    tiny_model,
    video,
    with_pixels,
    words,
)
from transformers import StaticCache

from elva_hf.errors_elva import PlaceholderError


def alone(model, **options):
    """New tokens of every sample of RAGGED, each in a batch of its own."""
    rows = []
    for i, ids in enumerate(RAGGED):
        inputs = sample_inputs(ids, i)
        rows += new_tokens(model.generate(**inputs, **options), inputs)
    return rows


@pytest.fixture(scope="module", params=TEXT_TYPES)
def any_model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [GREEDY, BEAMS, {**GREEDY, "use_cache": False}], ids=["greedy", "beams", "uncached"]
)
def test_a_ragged_batch_generates_what_its_samples_do(any_model, options, side):
    inputs = batch_inputs(RAGGED, side)
    together = new_tokens(any_model.generate(**inputs, **options), inputs)
    assert together == alone(any_model, **options)
    assert len({tuple(row) for row in together}) == len(together)  # the rows are told apart


def test_prompts_come_back_left_padded(model):
    left, right = batch_inputs(RAGGED, "left"), batch_inputs(RAGGED, "right")
    out = model.generate(**right, **GREEDY)
    assert torch.equal(out[:, :-NEW], left["input_ids"])
    assert torch.equal(out, model.generate(right.pop("input_ids"), **right, **GREEDY))


def test_each_cached_step_equals_the_whole_sequence(any_model):
    """Teacher-forced: prefill, then one token or several at a time, against one forward without cache."""
    inputs = batch_inputs([ids + words(6, i) for i, ids in enumerate(RAGGED)], "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = any_model(**inputs, position_ids=positions, use_cache=False).logits
    length = ids.shape[1] - 6
    out = any_model(
        input_ids=ids[:, :length],
        attention_mask=mask[:, :length],
        position_ids=positions[:, :length],
        pixel_values_videos=inputs["pixel_values_videos"],
    )
    for step in (1, 1, 3, 1):
        end = length + step
        out = any_model(
            input_ids=ids[:, length:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, length:end],
            past_key_values=out.past_key_values,
        )
        torch.testing.assert_close(out.logits, whole[:, length:end], rtol=1e-4, atol=1e-4)
        length = end


def test_beams_without_cache_equal_beams_with(model):
    inputs = batch_inputs(RAGGED)
    assert torch.equal(model.generate(**inputs, **BEAMS), model.generate(**inputs, **BEAMS, use_cache=False))


def test_seeded_samples_repeat_and_do_not_depend_on_the_cache(model):
    inputs = batch_inputs(RAGGED)

    def draw(seed, **options):
        torch.manual_seed(seed)
        return model.generate(**inputs, do_sample=True, top_k=20, temperature=2.0, max_new_tokens=NEW, **options)

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(1, use_cache=False))
    assert not torch.equal(draw(1), draw(2))


def test_several_samples_of_one_prompt_see_its_own_videos(model):
    """Sampling at almost zero temperature is greedy, so every copy must equal its sample alone."""
    inputs = batch_inputs(RAGGED, "right")
    cold = {"do_sample": True, "temperature": 1e-5, "max_new_tokens": NEW}
    rows = new_tokens(model.generate(**inputs, **cold, num_return_sequences=3), inputs)
    assert rows == [row for row in alone(model, **GREEDY) for _ in range(3)]


def test_visual_tokens_are_never_generated(model):
    inputs = batch_inputs(RAGGED)
    torch.manual_seed(0)
    out = model.generate(**inputs, do_sample=True, temperature=100.0, max_new_tokens=30, num_return_sequences=4)
    visual = torch.tensor(model.config.special_token_ids)
    assert not torch.isin(out[:, -30:], visual).any()
    assert len(out[:, -30:].unique()) > VOCAB // 2  # otherwise nothing was tested


@pytest.mark.parametrize("which", ["itself", "shallower", "other front end", "other width"])
@pytest.mark.parametrize("sample", range(len(RAGGED)))
def test_an_assistant_changes_nothing(model, which, sample):
    assistants = {
        "itself": {},
        "shallower": {"seed": 3, "text": {"num_hidden_layers": 1}},
        "other front end": {"seed": 4, "patch_embed_dim": 8, "patch_embed_num_heads": 1},
        "other width": {"seed": 5, "text": {"hidden_size": 16, "intermediate_size": 16}, "patch_embed_type": "naive"},
    }
    assistant = tiny_model(**assistants[which])
    inputs = sample_inputs(RAGGED[sample], sample)
    options = {**GREEDY, "max_new_tokens": 12}
    out = model.generate(**inputs, **options, assistant_model=assistant)
    assert torch.equal(out, model.generate(**inputs, **options))


def test_an_assistant_that_is_the_model_is_always_right(model):
    """It sees the same video: with pixels of its own encoding nothing it proposes is refused."""
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**sample_inputs(RAGGED[0]), do_sample=False, max_new_tokens=12, assistant_model=assistant)
    handle.remove()
    assert len(calls) <= 3


@pytest.mark.parametrize(
    "how, turn, which_pixels",  # an assistant has no cache yet, so it needs all pixels
    [
        ("assistant", words(3), "all"),
        ("assistant", video((2, 1)) + words(2), "all"),
        ("prompt lookup", words(3), "none"),
        ("prompt lookup", video((2, 1)) + words(2), "new"),
    ],
)
def test_candidates_on_a_filled_cache_change_nothing(model, how, turn, which_pixels):
    """Transformers 5.23 feeds a text model its whole prompt again here, and answers something else."""
    assistant = tiny_model(seed=4, patch_embed_dim=8, patch_embed_num_heads=1)
    extra = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    helped, dialogue = second_turn(model, sample_inputs(RAGGED[0]), [turn], which_pixels, **GREEDY, **extra)
    assert torch.equal(helped, model.generate(**dialogue, **GREEDY))


@pytest.mark.parametrize("sample", range(len(RAGGED)))
def test_prompt_lookup_changes_nothing(model, sample):
    """The prompt repeats its end, and holds visual tokens that must not be proposed."""
    ids = RAGGED[sample] + RAGGED[sample][-3:]
    inputs = sample_inputs(ids, sample)
    options = {**GREEDY, "max_new_tokens": 16}
    out = model.generate(**inputs, **options, prompt_lookup_num_tokens=4)
    assert torch.equal(out, model.generate(**inputs, **options))


@pytest.mark.parametrize("options", [{}, {"pixels_again": True}], ids=["ids only", "all pixels"])
def test_generation_continues_from_its_cache(any_model, options):
    inputs = batch_inputs(RAGGED)
    whole = any_model.generate(**inputs, do_sample=False, max_new_tokens=8)
    first = any_model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(RAGGED), 3, dtype=torch.long)], 1)
    again = {"pixel_values_videos": inputs["pixel_values_videos"]} if options else {}
    rest = any_model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        do_sample=False,
        max_new_tokens=5,
        **again,
    )
    assert torch.equal(rest, whole)


def second_turn(model, inputs, turn, which_pixels, **options):
    """Generate, append a turn to each row, generate again on the cache; the second answer and the full dialogue."""
    rows = len(inputs["input_ids"])
    first = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    added = batch(turn)
    ids = torch.cat([first.sequences, added["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 3, dtype=torch.long), added["attention_mask"]], 1)
    fresh = [pixels(ids, 100 + i) for i, ids in enumerate(turn)]
    counts = [int((row == 5).sum()) for row in inputs["input_ids"]]
    old = inputs.get("pixel_values_videos", torch.empty(0, 48)).split(counts)
    both = [torch.cat([a] + ([b] if b is not None else [])) for a, b in zip(old, fresh, strict=True)]
    new = [part for part in fresh if part is not None]
    given = {"new": torch.cat(new) if new else None, "all": torch.cat(both), "none": None}[which_pixels]
    cache = first.past_key_values
    repeats = options.get("num_beams", 1)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)  # what transformers asks of whoever brings a cache to a beam search
    dialogue = {"input_ids": ids, "attention_mask": mask}
    answer = model.generate(**with_pixels(dialogue, given), past_key_values=cache, **options)
    return answer, with_pixels(dialogue, torch.cat(both))


TURNS = {
    "text": ([words(4, 21), words(2, 22), words(3, 23), words(4, 24)], ("none", "all")),
    "video": (
        [
            video((2, 2), (1, 1)) + words(2, 25),
            words(3, 26),
            words(1, 27) + video((1, 2)) + video((3, 1)) + words(1, 28),
            video((1, 1), (1, 1), marks=[words(2), words(1)]) + words(1),
        ],
        ("new", "all"),
    ),
}
CASES = [(name, which) for name, (_, ways) in TURNS.items() for which in ways]


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("turn, which_pixels", CASES, ids=map(" ".join, CASES))
def test_a_second_turn_on_a_filled_cache_equals_the_dialogue_from_scratch(model, turn, which_pixels, options):
    inputs = batch_inputs(RAGGED)
    cached, dialogue = second_turn(model, inputs, TURNS[turn][0], which_pixels, **options)
    assert torch.equal(cached, model.generate(**dialogue, **options))


@pytest.mark.parametrize("turn, which_pixels", CASES, ids=map(" ".join, CASES))
def test_a_second_turn_of_a_batch_equals_that_of_its_samples(any_model, turn, which_pixels):
    added = TURNS[turn][0]
    together, _ = second_turn(any_model, batch_inputs(RAGGED), added, which_pixels, **GREEDY)
    for i, ids in enumerate(RAGGED):
        inputs = sample_inputs(ids, i)
        first = any_model.generate(**inputs, do_sample=False, max_new_tokens=3)
        new = pixels(added[i], 100 + i)
        parts = [part for part in (inputs.get("pixel_values_videos"), new) if part is not None]
        dialogue = batch([first[0].tolist() + added[i]])  # with its mask: an answer may hold the padding token
        dialogue = with_pixels(dialogue, torch.cat(parts) if parts else None)
        assert together[i, -NEW:].tolist() == new_tokens(any_model.generate(**dialogue, **GREEDY), dialogue)[0]


def test_a_crop_takes_tokens_back(model):
    inputs = sample_inputs(RAGGED[0])
    first = model.generate(**inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
    first.past_key_values.crop(-3)
    again = model.generate(first.sequences[:, :-3], past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(again[:, : first.sequences.shape[1]], first.sequences)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_static_cache_changes_nothing(any_model, options, side):
    static = {"cache_implementation": "static", "disable_compile": True}
    inputs = batch_inputs(RAGGED, side)
    assert torch.equal(any_model.generate(**inputs, **options, **static), any_model.generate(**inputs, **options))
    one = sample_inputs(RAGGED[1])
    assert torch.equal(any_model.generate(**one, **options, **static), any_model.generate(**one, **options))


def test_a_static_cache_of_ones_own_changes_nothing(model):
    inputs = batch_inputs(RAGGED)
    cache = StaticCache(config=model.config.text_config, max_cache_len=inputs["input_ids"].shape[1] + NEW)
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_dict_outputs_hold_what_was_asked(options):
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = batch_inputs(RAGGED)
    rows = len(RAGGED) * options.get("num_beams", 1)
    out = model.generate(
        **inputs,
        **options,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    layers, length = model.config.text_config.num_hidden_layers, inputs["input_ids"].shape[1]
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == len(out.attentions) == NEW
    assert out.scores[0].shape == (rows, VOCAB)
    assert [state.shape[:2] for state in out.hidden_states[0]] == (layers + 1) * [(rows, length)]
    assert [attention.shape[-2:] for attention in out.attentions[1]] == layers * [(1, length + 1)]
    assert out.past_key_values.get_seq_length() == length + NEW - 1
    if options is GREEDY:
        assert torch.equal(torch.stack(out.scores, 1).argmax(-1), out.sequences[:, -NEW:])


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_embeddings_instead_of_ids(any_model, options):
    inputs = batch_inputs(RAGGED)
    expected = new_tokens(any_model.generate(**inputs, **options), inputs)
    embeds = any_model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert any_model.generate(inputs_embeds=embeds, **rest, **options).tolist() == expected


def test_features_instead_of_pixels(model):
    inputs = batch_inputs(RAGGED)
    encoded = {"video": model.get_video_features(inputs["pixel_values_videos"])}
    rest = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    for options in (GREEDY, BEAMS):
        assert torch.equal(
            model.generate(**rest, mm_encoder_outputs=dict(encoded), **options), model.generate(**inputs, **options)
        )


def test_other_pixels_give_other_words(model):
    inputs = batch_inputs(RAGGED)
    out = model.generate(**inputs, **GREEDY)
    other = model.generate(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}, **GREEDY)
    differs = (out != other).any(1).tolist()
    assert differs == [True, True, False, True]  # the third row is text


def test_text_alone_needs_no_pixels(model):
    inputs = batch([words(5), words(3)], "right")
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, pixel_values_videos=None, **GREEDY))


def test_ids_may_come_first_and_without_a_mask(model):
    inputs = sample_inputs(RAGGED[0])
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(
        model.generate(inputs["input_ids"], pixel_values_videos=inputs["pixel_values_videos"], **GREEDY), expected
    )


def test_a_batch_that_ends_at_different_times_pads(model):
    """With an end token, a finished row is padded and the others go on."""
    inputs = batch_inputs(RAGGED)
    rows = alone(model, **GREEDY)
    end = rows[0][1]
    out = new_tokens(model.generate(**inputs, **GREEDY, eos_token_id=end, pad_token_id=0), inputs)
    for row, free in zip(out, rows, strict=True):
        expected = free[: free.index(end) + 1] if end in free else free
        assert row == expected + (len(row) - len(expected)) * [0]


def test_generation_leaves_its_inputs_alone(model):
    inputs = batch_inputs(RAGGED, "right")
    before = {name: value.clone() for name, value in inputs.items()}
    model.generate(**inputs, **BEAMS)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_pixels_that_fit_neither_the_prompt_nor_its_end_are_refused(model):
    inputs = sample_inputs(RAGGED[0])
    first = model.generate(**inputs, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([video((2, 1))])], 1)
    with pytest.raises(PlaceholderError, match="pixels for 3 patches, but the prompt has 11 patch tokens, 2 of them"):
        model.generate(ids, pixel_values_videos=torch.zeros(3, 48), past_key_values=first.past_key_values)
