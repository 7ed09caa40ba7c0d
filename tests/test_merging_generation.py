"""generate() with merging: every way of generating gives what the samples give alone, without a cache, and the oracle.

All in float64, where a tie between two words does not happen by rounding.
"""

import copy

import flash_reference
import pytest
import torch
from generating import BEAMS, GREEDY, NEW, new_tokens
from merging_cases import (
    BUSY,
    LAYERS,
    MIXED,
    SCHEDULES,
    assert_exact,
    deep_model,
    double_model,
    movie,
    movies,
    moving_pixels,
    without,
)
from merging_oracle import Oracle
from tiny_elva import TEXT_TYPES, batch, video, with_pixels, words
from transformers import DynamicCache

from elva_hf.errors_elva import ConfigurationError
from elva_hf.modeling_elva import ElvaForCausalLM

UNCACHED = {**GREEDY, "use_cache": False}
COLD = {"do_sample": True, "temperature": 1e-5, "max_new_tokens": NEW}
WAYS = {"greedy": GREEDY, "beams": BEAMS, "uncached": UNCACHED}


def merging_model(schedule=MIXED, model_type="qwen2", **options):
    model = double_model(model_type, **options)
    model.set_merge_schedule(schedule)
    return model


@pytest.fixture(scope="module")
def model():
    """Merges by `MIXED`; shared, do not change it."""
    return merging_model()


def prompts(samples, side="left"):
    """What a user passes: no positions."""
    return without(movies(samples, side), "position_ids")


def prompt(sample):
    return without(movie(BUSY[sample], sample), "position_ids")


def alone(model, **options):
    """New tokens of every sample of BUSY, each in a batch of its own."""
    rows = []
    for i in range(len(BUSY)):
        inputs = prompt(i)
        rows += new_tokens(model.generate(**inputs, **options), inputs)
    return rows


def spell_out(oracle, schedule, suppressed, count=NEW):
    """The oracle's greedy words for every sample, the whole sequence again for each word."""
    rows = []
    for i, ids in enumerate(BUSY):
        grown = list(ids)
        for _ in range(count):
            logits = oracle.sample(grown, schedule, i, moving_pixels(ids, i)).logits[-1].clone()
            logits[suppressed] = -torch.inf
            grown.append(int(logits.argmax()))
        rows.append(grown[len(ids) :])
    return rows


@pytest.mark.parametrize("schedule", ["paper", "ratios", "of input", "max_run", "window", "first"])
def test_greedy_words_are_the_oracles(schedule):
    model = merging_model(SCHEDULES[schedule])
    with torch.no_grad():
        expected = spell_out(Oracle(model), SCHEDULES[schedule], model.config.special_token_ids)
    for side in ("left", "right"):
        inputs = prompts(BUSY, side)
        assert new_tokens(model.generate(**inputs, **GREEDY), inputs) == expected
    assert len(set(map(tuple, expected))) == len(expected)  # the rows are told apart


def test_merging_changes_what_is_said(model):
    """Otherwise the equalities of this file could hold of a model that ignores its schedule."""
    assert alone(model, **GREEDY, merge_schedule="none") != alone(model, **GREEDY)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_a_ragged_batch_generates_what_its_samples_do(model_type, way, side):
    model = merging_model(model_type=model_type)
    inputs = prompts(BUSY, side)
    assert new_tokens(model.generate(**inputs, **WAYS[way]), inputs) == alone(model, **WAYS[way])


def test_flash_attention_says_the_same(model, monkeypatch):
    flash_reference.install(monkeypatch)
    flash = copy.deepcopy(model)
    flash.set_attn_implementation(flash_reference.NAME)
    for side in ("left", "right"):
        inputs = prompts(BUSY, side)
        for options in WAYS.values():
            assert torch.equal(flash.generate(**inputs, **options), model.generate(**inputs, **options))
    assert {kind for kind, *_ in flash_reference.calls} == {"packed"}  # this batch never has rows of one length


def test_eager_attention_says_the_same(model):
    eager = deep_model(patch_embed_type="naive")
    eager.set_merge_schedule(MIXED)
    eager.set_attn_implementation("eager")
    inputs = without(movies(BUSY, dtype=torch.float32), "position_ids")
    assert new_tokens(eager.generate(**inputs, **GREEDY), inputs) == alone(model, **GREEDY)


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("schedule", ["ratios", "window and max_run", "first"])
def test_cached_words_are_the_uncached_ones(model, schedule, options):
    inputs = prompts(BUSY)
    options = {**options, "merge_schedule": SCHEDULES[schedule]}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


def test_a_cache_of_ones_own_is_filled(model):
    inputs = prompts(BUSY)
    expected = model.generate(**inputs, **GREEDY)
    for cache in (DynamicCache(), DynamicCache(config=model.config.text_config)):
        assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1


def test_a_schedule_per_call_and_one_in_the_config_agree():
    model = double_model()
    inputs = prompts(BUSY)
    given = model.generate(**inputs, **GREEDY, merge_schedule=MIXED)
    model.config.merge_schedule = MIXED
    assert torch.equal(model.generate(**inputs, **GREEDY), given)
    model.set_merge_schedule("none")
    assert torch.equal(model.generate(**inputs, **GREEDY, merge_schedule=MIXED), given)
    assert not torch.equal(model.generate(**inputs, **GREEDY), given)


def test_a_schedule_that_is_wrong_is_refused_before_anything_runs(model):
    with pytest.raises(ConfigurationError, match="paper"):
        model.generate(**prompts(BUSY), **GREEDY, merge_schedule="papers")
    with pytest.raises(ConfigurationError):
        model.generate(**prompts(BUSY), **GREEDY, merge_schedule=[{"layer": LAYERS, "target_ratio": 0.5}])


def test_seeded_samples_repeat_and_do_not_depend_on_the_cache(model):
    inputs = prompts(BUSY)

    def draw(seed, **options):
        torch.manual_seed(seed)
        return model.generate(**inputs, do_sample=True, top_k=20, temperature=2.0, max_new_tokens=NEW, **options)

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(1, use_cache=False))
    assert not torch.equal(draw(1), draw(2))


def test_several_samples_of_one_prompt_see_its_own_videos(model):
    inputs = prompts(BUSY, "right")
    rows = new_tokens(model.generate(**inputs, **COLD, num_return_sequences=3), inputs)
    assert rows == [row for row in alone(model, **GREEDY) for _ in range(3)]


@pytest.mark.parametrize("which", ["itself", "does not merge", "shallower", "other front end"])
def test_an_assistant_changes_nothing(model, which):
    assistants = {
        "itself": lambda: merging_model(),
        "does not merge": lambda: double_model(),
        "shallower": lambda: merging_model([{"layer": 1, "target_ratio": 0.5}], seed=3, text={"num_hidden_layers": 2}),
        "other front end": lambda: merging_model(SCHEDULES["ratios"], seed=4, patch_embed_dim=8),
    }
    assistant = assistants[which]()
    options = {**GREEDY, "max_new_tokens": 12}
    for sample in range(len(BUSY)):
        inputs = prompt(sample)
        out = model.generate(**inputs, **options, assistant_model=assistant)
        assert torch.equal(out, model.generate(**inputs, **options))


def test_an_assistant_that_is_the_model_is_always_right(model):
    """It merges by the same schedule, so nothing it proposes is refused."""
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**prompt(0), do_sample=False, max_new_tokens=12, assistant_model=assistant)
    handle.remove()
    assert len(calls) <= 3


@pytest.mark.parametrize("sample", range(len(BUSY)))
def test_prompt_lookup_changes_nothing(model, sample):
    """The prompt repeats its end, so something is proposed, and refused by a crop."""
    ids = BUSY[sample] + 2 * words(3, 70)
    inputs = without(movie(ids, sample), "position_ids")
    options = {**GREEDY, "max_new_tokens": 16}
    out = model.generate(**inputs, **options, prompt_lookup_num_tokens=4)
    assert torch.equal(out, model.generate(**inputs, **options))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("again", [False, True], ids=["ids only", "all pixels"])
def test_generation_continues_from_its_cache(model, again, side):
    inputs = prompts(BUSY, side)
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    first = model.generate(**inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    left = prompts(BUSY)
    mask = torch.cat([left["attention_mask"], torch.ones(len(BUSY), 3, dtype=torch.long)], 1)
    rest = model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        do_sample=False,
        max_new_tokens=5,
        **({"pixel_values_videos": inputs["pixel_values_videos"]} if again else {}),
    )
    assert torch.equal(rest, whole)


TURNS = {
    "text": [words(4, 21), words(2, 22), words(3, 23), words(4, 24), words(1, 25)],
    "video": [
        video(*3 * [(2, 2)]) + words(2, 25),
        words(3, 26),
        words(1, 27) + video(*4 * [(1, 2)]) + video((2, 1), (2, 1)) + words(1, 28),
        video((1, 1), (1, 1), (1, 1), marks=[words(2), words(1)]) + words(1),
        words(2, 29) + video(*3 * [(2, 1), (1, 2)]) + words(1, 30),
    ],
}


def second_turn(model, samples, seeds, turn, first_schedule=MIXED, second_schedule=MIXED, **options):
    """Generate, append a turn to each row, generate again on the cache; the second answer and the full dialogue."""
    inputs = without(movies(samples, seeds=seeds), "position_ids")
    rows = len(samples)
    first = model.generate(
        **inputs, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, merge_schedule=first_schedule
    )
    added = batch(turn)
    ids = torch.cat([first.sequences, added["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(rows, 3, dtype=torch.long), added["attention_mask"]], 1)
    old = [moving_pixels(sample, seed) for sample, seed in zip(samples, seeds, strict=True)]
    new = [moving_pixels(ids, 100 + seed) for ids, seed in zip(turn, seeds, strict=True)]
    dialogue = {"input_ids": ids, "attention_mask": mask}
    cache = first.past_key_values
    if options.get("num_beams", 1) > 1:
        cache.batch_repeat_interleave(options["num_beams"])  # what transformers asks of whoever brings a cache
    answer = model.generate(
        **with_pixels(dialogue, join(new)), past_key_values=cache, merge_schedule=second_schedule, **options
    )
    return answer, with_pixels(dialogue, join(part for pair in zip(old, new, strict=True) for part in pair))


def join(parts):
    parts = [part for part in parts if part is not None]
    return torch.cat(parts).double() if parts else None


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_second_turn_on_a_filled_cache_equals_the_dialogue_from_scratch(model, turn, options):
    cached, dialogue = second_turn(model, BUSY, range(len(BUSY)), TURNS[turn], **options)
    assert torch.equal(cached, model.generate(**dialogue, **options))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("schedules", [("paper", "ratios"), ("none", "paper"), ("paper", "none")], ids=" then ".join)
def test_a_second_turn_of_a_batch_equals_that_of_its_samples(model, turn, schedules):
    """Also when the turns merge by schedules of their own."""
    given = [SCHEDULES[name] for name in schedules]
    together, _ = second_turn(model, BUSY, range(len(BUSY)), TURNS[turn], *given, **GREEDY)
    for i, ids in enumerate(BUSY):
        single, _ = second_turn(model, [ids], [i], [TURNS[turn][i]], *given, **GREEDY)
        assert together[i, -NEW:].tolist() == single[0, -NEW:].tolist()


@pytest.mark.parametrize("turn", TURNS)
def test_prompt_lookup_on_a_filled_cache_changes_nothing(model, turn):
    for i, ids in enumerate(BUSY):
        helped, dialogue = second_turn(model, [ids], [i], [TURNS[turn][i]], **GREEDY, prompt_lookup_num_tokens=3)
        assert torch.equal(helped, model.generate(**dialogue, **GREEDY))


def test_a_crop_takes_tokens_back(model):
    for side in ("left", "right"):
        inputs = prompts(BUSY, side)
        first = model.generate(**inputs, do_sample=False, max_new_tokens=6, return_dict_in_generate=True)
        first.past_key_values.crop(-3)
        mask = torch.cat([prompts(BUSY)["attention_mask"], torch.ones(len(BUSY), 3, dtype=torch.long)], 1)
        again = model.generate(
            first.sequences[:, :-3], attention_mask=mask, past_key_values=first.past_key_values, **GREEDY
        )
        assert torch.equal(again[:, : first.sequences.shape[1]], first.sequences)


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_embeddings_instead_of_ids(model, options):
    inputs = prompts(BUSY)
    expected = new_tokens(model.generate(**inputs, **options), inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert model.generate(inputs_embeds=embeds, **without(inputs, "input_ids"), **options).tolist() == expected


def test_features_instead_of_pixels(model):
    inputs = prompts(BUSY)
    encoded = {"video": model.get_video_features(inputs["pixel_values_videos"])}
    rest = without(inputs, "pixel_values_videos")
    for options in (GREEDY, BEAMS):
        assert torch.equal(
            model.generate(**rest, mm_encoder_outputs=dict(encoded), **options), model.generate(**inputs, **options)
        )


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_dict_outputs_hold_what_was_asked(model, options):
    inputs = prompts(BUSY)
    rows, length = len(BUSY) * options.get("num_beams", 1), inputs["input_ids"].shape[1]
    out = model.generate(
        **inputs,
        **options,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    assert [state.shape[:2] for state in out.hidden_states[0]] == (LAYERS + 1) * [(rows, length)]
    assert [state.shape[:2] for state in out.hidden_states[1]] == (LAYERS + 1) * [(rows, 1)]
    assert out.past_key_values.get_seq_length() == length + NEW - 1


def test_the_cache_says_what_merged_and_what_each_layer_keeps(model):
    """generate() drops extra fields of the output, so the cache carries them."""
    inputs = prompts(BUSY, "right")
    asked = {**GREEDY, "return_dict_in_generate": True}
    cache = model.generate(**inputs, **asked, output_merge_map=True).past_key_values
    oracle = Oracle(model)
    with torch.no_grad():
        runs = [oracle.sample(ids, MIXED, i) for i, ids in enumerate(BUSY)]
    grown = torch.tensor([run.tokens_per_layer for run in runs]).T + NEW - 1  # the last word is never fed
    assert torch.equal(cache.tokens_per_layer, grown)
    mask = prompts(BUSY)["attention_mask"].bool()  # generate() turned the padding left
    length = mask.shape[1]
    for step, survivors in enumerate(cache.merge_map.survivors):
        assert survivors.shape == (len(BUSY), length + NEW - 1)
        assert (survivors[:, length:] == torch.arange(length, length + NEW - 1)).all()
        for i, run in enumerate(runs):
            offset = int(mask[i].int().argmax())
            assert (survivors[i, :length][mask[i]] - offset).tolist() == run.survivors[step]
    assert model.generate(**inputs, **asked).past_key_values.merge_map is None


def test_the_merge_map_grows_by_each_turn(model):
    """A second video is recorded behind the first, its frames counted on."""
    ids, turn = BUSY[0], video(*4 * [(2, 2)]) + words(2, 30)
    first = model(**movie(ids), use_cache=True, output_merge_map=True)
    later = movie(turn, 9)
    later["position_ids"] += len(ids)
    later["attention_mask"] = torch.ones(1, len(ids) + len(turn), dtype=torch.long)
    out = model(**later, past_key_values=first.past_key_values, output_merge_map=True)
    oracle = Oracle(model)
    one, two = (
        oracle.sample(ids, MIXED, 0),
        oracle.run(
            oracle.embed(ids + turn, join([moving_pixels(ids), moving_pixels(turn, 9)])),
            [(ids, oracle.resolve(MIXED)), (turn, oracle.resolve(MIXED))],
        ),
    )
    assert first.merge_map.survivors[-1][0].tolist() == one.survivors[-1]
    cached = out.past_key_values.merge_map
    assert cached.survivors[-1][0].tolist() == two.survivors[-1]
    assert int(cached.frame_index.max()) == 6 + 4 - 1
    assert (out.merge_map.survivors[-1][0] + len(ids)).tolist() == two.survivors[-1][len(ids) :]


@pytest.mark.gpu
def test_an_offloaded_cache_says_the_same(model):
    """transformers offloads to the host from an accelerator only."""
    model = copy.deepcopy(model).cuda()
    inputs = {name: value.cuda() for name, value in prompts(BUSY).items()}
    out = model.generate(**inputs, **GREEDY, cache_implementation="offloaded")
    assert torch.equal(out, model.generate(**inputs, **GREEDY))


def test_text_alone_generates_as_without_a_schedule(model):
    inputs = batch([words(5), words(3)], "right")
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, merge_schedule="none"))


def test_a_video_after_text_on_a_cache_that_never_merged(model):
    """The first turn is text only and leaves a plain cache, padding and all; the second brings the video."""
    samples, turn = [words(5, 1), words(2, 2)], [video(*4 * [(2, 2)]) + words(2, 3), words(3) + video(*5 * [(1, 2)])]
    for options in (GREEDY, BEAMS):
        cached, dialogue = second_turn(model, samples, range(2), turn, **options)
        assert torch.equal(cached, model.generate(**dialogue, **options))


def test_a_saved_model_keeps_its_schedule(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ElvaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.resolve_merge_schedule() == model.config.resolve_merge_schedule()
    other = ElvaForCausalLM.from_pretrained(tmp_path, merge_schedule="table5")
    assert other.config.resolve_merge_schedule() == model.config.resolve_merge_schedule("table5")
    assert ElvaForCausalLM.from_pretrained(tmp_path, merge_schedule="none").config.resolve_merge_schedule().steps == ()


def test_a_deep_copy_keeps_its_schedule_and_its_words(model):
    twin = copy.deepcopy(model)
    inputs = prompts(BUSY)
    assert torch.equal(twin.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    twin.set_merge_schedule("none")
    assert model.config.resolve_merge_schedule().steps


def test_generation_leaves_its_inputs_alone(model):
    inputs = prompts(BUSY, "right")
    before = {name: value.clone() for name, value in inputs.items()}
    model.generate(**inputs, **BEAMS)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_a_batch_that_ends_at_different_times_pads(model):
    inputs = prompts(BUSY)
    rows = alone(model, **GREEDY)
    end = rows[0][1]
    out = new_tokens(model.generate(**inputs, **GREEDY, eos_token_id=end, pad_token_id=0), inputs)
    for row, free in zip(out, rows, strict=True):
        expected = free[: free.index(end) + 1] if end in free else free
        assert row == expected + (len(row) - len(expected)) * [0]


def test_logits_of_each_step_are_those_without_a_cache(model):
    inputs = prompts(BUSY)
    asked = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    cached, whole = model.generate(**inputs, **asked), model.generate(**inputs, **asked, use_cache=False)
    for one, other in zip(cached.logits, whole.logits, strict=True):
        assert_exact(one, other)
