"""The cache whose layers differ in length: what it holds, and that every operation on it keeps a run exact."""

import copy

import pytest
import torch
from merging_cases import (
    BUSY,
    LAYERS,
    MIXED,
    SCHEDULES,
    assert_exact,
    double_model,
    movie,
    movies,
    moving_pixels,
    positions,
    rows_of,
    without,
)
from merging_oracle import Oracle
from tiny_elva import LINE, PATCH, batch, video, words
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticSlidingWindowLayer,
)

from elva_hf.cache_elva import ElvaCache, ElvaDynamicLayer, adopt_cache
from elva_hf.errors_elva import ConfigurationError

EXTRA = [words(4, 50 + i) for i in range(len(BUSY))]
SIDES = ("left", "right")


@pytest.fixture(scope="module")
def model():
    model = double_model()
    model.set_merge_schedule(MIXED)
    return model


@pytest.fixture(scope="module")
def runs(model):
    """The oracle of every sample and the four words after it."""
    oracle = Oracle(model)
    with torch.no_grad():
        return [oracle.sample(ids + more, MIXED, i) for i, (ids, more) in enumerate(zip(BUSY, EXTRA, strict=True))]


@torch.no_grad()
def prefill(model, side="left", cache=None, **options):
    """The cache after BUSY, and its mask."""
    inputs = movies(BUSY, side)
    out = model(**inputs, past_key_values=cache, use_cache=True, **options)
    return out.past_key_values, inputs["attention_mask"]


@torch.no_grad()
def go_on(model, cache, mask, rows, done=0, count=1):
    """Feed the next words of these rows of BUSY; the logits and the longer mask."""
    mask = torch.cat([mask, torch.ones(len(mask), count, dtype=torch.long)], 1)
    out = model(
        input_ids=torch.tensor([EXTRA[row][done : done + count] for row in rows]),
        attention_mask=mask,
        position_ids=positions(mask)[:, -count:],
        past_key_values=cache,
    )
    return out.logits, mask


def assert_next(logits, runs, rows, done=0):
    """The logits of words `done...` after each row."""
    for row, sample in zip(logits, rows, strict=True):
        start = len(BUSY[sample]) + done
        assert_exact(row, runs[sample].logits[start : start + len(row)])


def last_column(inputs, token):
    """The last column of a batch in which a sample has this token."""
    return int((inputs["input_ids"] == token).any(0).nonzero().max())


ALL = list(range(len(BUSY)))


@pytest.mark.parametrize("side", SIDES)
def test_layers_are_logically_equal_and_physically_shorter(model, runs, side):
    cache, mask = prefill(model, side)
    assert isinstance(cache, ElvaCache) and isinstance(cache, Cache)
    length = mask.shape[1]
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == LAYERS * [length]
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held[0] == length and held == sorted(held, reverse=True) and held[-1] < 0.85 * length
    for layer, columns in zip(cache.layers, held, strict=True):
        assert layer.values.shape == layer.keys.shape
        assert layer.get_mask_sizes(1) == (columns + 1, length - columns)


def test_tokens_per_layer_counts_real_tokens(model, runs):
    expected = torch.tensor([run.tokens_per_layer for run in runs]).T - 4
    for side in SIDES:
        cache, mask = prefill(model, side)
        assert torch.equal(cache.tokens_per_layer, expected)
        _, mask = go_on(model, cache, mask, ALL, count=3)
        assert torch.equal(cache.tokens_per_layer, expected + 3)


def test_only_the_first_layer_of_a_stage_carries_its_key_mask(model):
    cache, _ = prefill(model)
    begins = [0, *(step.layer for step in model.config.resolve_merge_schedule().steps)]
    assert [i for i, layer in enumerate(cache.layers) if layer.key_mask is not None] == begins
    for i in begins:
        layer = cache.layers[i]
        assert layer.key_mask.shape == (len(BUSY), layer.keys.shape[-2])


def test_a_stage_without_holes_has_no_key_mask(model):
    with torch.no_grad():
        cache = model(**movie(BUSY[0]), use_cache=True).past_key_values
    assert all(layer.key_mask is None for layer in cache.layers)


def test_merged_keys_take_no_memory(model):
    """Half of the patches gone from layer 2 on are gone from the tensors, not only masked."""
    ids = video(*8 * [(2, 2)]) + words(2)
    with torch.no_grad():
        halved = model(**movie(ids), use_cache=True, merge_schedule=[{"layer": 2, "target_ratio": 0.5}]).past_key_values
    assert [layer.keys.shape[-2] for layer in halved.layers] == 2 * [len(ids)] + 4 * [len(ids) - 16]


@pytest.mark.parametrize("side", SIDES)
def test_a_cache_of_the_users_own_serves_every_later_step(model, runs, side):
    """The object that was passed in, not only the one that comes back."""
    for cache in (DynamicCache(), DynamicCache(config=model.config.text_config)):
        _, mask = prefill(model, side, cache)
        for done in range(4):
            logits, mask = go_on(model, cache, mask, ALL, done)
            assert_next(logits, runs, ALL, done)
        assert cache.get_seq_length() == mask.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_a_cache_of_the_users_own_takes_a_second_video(model, side):
    cache, turn = DynamicCache(), [video(*4 * [(1, 2)]) + words(2, i) for i in ALL]
    _, mask = prefill(model, side, cache)
    later = movies(turn, seeds=[100 + i for i in ALL])
    mask = torch.cat([mask, later["attention_mask"]], 1)
    given = {**later, "attention_mask": mask, "position_ids": positions(mask)[:, -len(turn[0]) :]}
    logits = model(**given, past_key_values=cache).logits
    oracle = Oracle(model)
    for i, ids in enumerate(BUSY):
        patches = [part for part in (moving_pixels(ids, i), moving_pixels(turn[i], 100 + i)) if part is not None]
        run = oracle.turns([(ids, MIXED), (turn[i], MIXED)], torch.cat(patches))
        assert_exact(logits[i], run.logits[len(ids) :])


@pytest.mark.parametrize("side", SIDES)
def test_rows_can_be_reordered(model, runs, side):
    cache, mask = prefill(model, side, output_merge_map=True)
    order = [3, 0, 0, 4, 2]
    before = cache.merge_map.survivors[-1].clone()
    cache.reorder_cache(torch.tensor(order))
    logits, _ = go_on(model, cache, mask[order], order, count=2)
    assert_next(logits, runs, order)
    assert torch.equal(cache.merge_map.survivors[-1][:, : mask.shape[1]], before[order])


@pytest.mark.parametrize("side", SIDES)
def test_rows_can_be_repeated(model, runs, side):
    cache, mask = prefill(model, side)
    cache.batch_repeat_interleave(2)
    rows = [row for row in ALL for _ in range(2)]
    logits, _ = go_on(model, cache, mask.repeat_interleave(2, 0), rows, count=2)
    assert_next(logits, runs, rows)


@pytest.mark.parametrize("side", SIDES)
def test_rows_can_be_selected(model, runs, side):
    cache, mask = prefill(model, side, output_merge_map=True)
    rows = [4, 1]
    cache.batch_select_indices(torch.tensor(rows))
    logits, _ = go_on(model, cache, mask[rows], rows, count=2)
    assert_next(logits, runs, rows)
    assert len(cache.merge_map.survivors[0]) == cache.tokens_per_layer.shape[1] == 2


@pytest.mark.parametrize("side", SIDES)
def test_the_tail_can_be_cropped_and_fed_again(model, runs, side):
    cache, mask = prefill(model, side, output_merge_map=True)
    _, longer = go_on(model, cache, mask, ALL, count=4)
    cache.crop(-3)
    assert cache.get_seq_length() == mask.shape[1] + 1
    assert cache.merge_map.survivors[-1].shape[1] == mask.shape[1] + 1
    logits, _ = go_on(model, cache, longer[:, :-3], ALL, done=1, count=3)
    assert_next(logits, runs, ALL, 1)


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_words_of_the_prompt_behind_the_last_video_can_be_cropped(model, side):
    """Every column behind the last patch of the batch is tail, padding too."""
    samples = [BUSY[0] + words(5, 60), BUSY[1] + words(3, 61), words(4)]
    inputs = movies(samples, side)
    length = inputs["input_ids"].shape[1]
    tail = length - 1 - last_column(inputs, LINE)  # half a frame cannot be fed again
    assert tail >= 5
    whole = model(**inputs, use_cache=True)
    cache, expected = whole.past_key_values, whole.logits[:, -tail:]
    cache.crop(-tail)
    assert {cache.get_seq_length(i) for i in range(LAYERS)} == {length - tail}
    again = model(
        input_ids=inputs["input_ids"][:, -tail:],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"][:, -tail:],
        past_key_values=cache,
    )
    real = inputs["attention_mask"][:, -tail:].bool()
    assert_exact(again.logits[real], expected[real])


@torch.no_grad()
def test_cropped_padding_is_forgotten(model):
    """Where a row had padding it may have a word now, and the other way round."""
    samples = [BUSY[0] + words(5, 60), BUSY[1] + words(3, 61), words(4)]
    inputs = movies(samples, "right")
    length = inputs["input_ids"].shape[1]
    tail = length - 1 - last_column(inputs, LINE)
    whole = model(**inputs, use_cache=True)
    whole.past_key_values.crop(-tail)
    before = inputs["attention_mask"][:, :-tail]
    left = [ids[int(count) :] for ids, count in zip(samples, before.sum(1), strict=True)]
    again = batch([*left, words(tail)])  # the same words, padded left and to the full width
    mask = torch.cat([before, again["attention_mask"][:-1]], 1)
    out = model(
        input_ids=again["input_ids"][:-1],
        attention_mask=mask,
        position_ids=positions(mask)[:, -tail:],
        past_key_values=whole.past_key_values,
    )
    assert not torch.equal(mask, inputs["attention_mask"])
    for row, ids, expected in zip(out.logits, left, rows_of(whole.logits, inputs), strict=True):
        assert_exact(row[tail - len(ids) :], expected[len(expected) - len(ids) :])


@torch.no_grad()
def test_a_crop_into_the_merged_region_is_refused_and_changes_nothing(model, runs):
    for side in SIDES:
        cache, mask = prefill(model, side)
        held = [layer.keys.shape[-2] for layer in cache.layers]
        tail = mask.shape[1] - 1 - last_column(movies(BUSY, side), PATCH)
        with pytest.raises(ConfigurationError, match=f"cannot crop {tail + 1} tokens: only the last {tail}"):
            cache.crop(-(tail + 1))
        assert [layer.keys.shape[-2] for layer in cache.layers] == held
        logits, _ = go_on(model, cache, mask, ALL)
        assert_next(logits, runs, ALL)


@torch.no_grad()
def test_text_after_a_second_video_can_be_cropped_but_not_the_video(model):
    ids, turn = BUSY[0], video(*4 * [(1, 2)]) + words(3, 30)
    cache = model(**movie(ids), use_cache=True).past_key_values
    later = movie(turn, 9)
    later["position_ids"] += len(ids)
    later["attention_mask"] = torch.ones(1, len(ids) + len(turn), dtype=torch.long)
    whole = model(**later, past_key_values=cache).logits
    cache.crop(-3)
    at = torch.arange(len(ids) + len(turn) - 3, len(ids) + len(turn))[None]
    again = model(input_ids=torch.tensor([turn[-3:]]), position_ids=at, past_key_values=cache).logits
    assert_exact(again, whole[:, -3:])
    with pytest.raises(ConfigurationError, match="cannot crop 6 tokens: only the last 5"):
        cache.crop(-6)  # three words, the end of the video and a <LINE>; the sixth is a patch


def test_a_reset_cache_is_a_new_one(model, runs):
    cache, _ = prefill(model, output_merge_map=True)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.merge_map is None
    again, mask = prefill(model, "right", cache)
    assert again.get_seq_length() == mask.shape[1] and again.merge_map is None
    logits, _ = go_on(model, again, mask, ALL, count=2)
    assert_next(logits, runs, ALL)


def test_a_reset_cache_forgets_its_stages(model):
    """Another schedule merges elsewhere; what the first left behind must not mask anything."""
    cache, _ = prefill(model)
    cache.reset()
    oracle = Oracle(model)
    _, mask = prefill(model, "left", cache, merge_schedule=SCHEDULES["ratios"])
    logits, _ = go_on(model, cache, mask, ALL)
    with torch.no_grad():
        for i, ids in enumerate(BUSY):
            run = oracle.sample(ids + EXTRA[i][:1], SCHEDULES["ratios"], i)
            assert_exact(logits[i], run.logits[-1:])


def test_an_offloaded_layer_comes_back_whole(model, runs):
    """Both ways on one device: what moves must be all of it. An accelerator is needed for more."""
    cache, mask = prefill(model)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    logits, _ = go_on(model, cache, mask, ALL)
    assert_next(logits, runs, ALL)


def test_an_offloaded_layer_moves_all_its_tensors(monkeypatch, model):
    cache, _ = prefill(model, output_merge_map=True)
    layer, moved = cache.layers[1], []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: moved.append(tensor) or tensor)
    layer.offload()
    assert {id(tensor) for tensor in moved} == {
        id(layer.keys), id(layer.values), id(layer.key_mask), id(layer.survivors)
    }  # fmt: skip


def test_a_deep_copy_goes_its_own_way(model, runs):
    cache, mask = prefill(model)
    twin = copy.deepcopy(cache)
    go_on(model, cache, mask, ALL[::-1])
    logits, _ = go_on(model, twin, mask, ALL)
    assert_next(logits, runs, ALL)


# adoption


def filled_layer(kind=DynamicLayer, length=3, **options):
    layer = kind(**options)
    layer.update(torch.zeros(1, 2, length, 8), torch.zeros(1, 2, length, 8))
    return layer


def test_adopting_a_fresh_cache_gives_layers_that_both_share():
    cache = DynamicCache()
    adopted = adopt_cache(cache, 3)
    assert [type(layer) for layer in adopted.layers] == 3 * [ElvaDynamicLayer]
    assert cache.layers is adopted.layers
    assert adopt_cache(adopted, 3) is adopted


def test_adopting_a_filled_cache_keeps_what_it_holds():
    cache = Cache(layers=[filled_layer(), filled_layer()])
    keys = cache.layers[1].keys
    adopted = adopt_cache(cache, 2, torch.tensor([[0, 1, 1]]))
    assert adopted.layers[1].keys is keys
    assert [adopted.get_seq_length(i) for i in range(2)] == [3, 3]
    assert adopted.tokens_per_layer.tolist() == [[2], [2]]


def test_no_cache_at_all_becomes_an_empty_one():
    adopted = adopt_cache(None, 4)
    assert len(adopted.layers) == 4 and adopted.get_seq_length() == 0
    assert adopted.tokens_per_layer.shape == (4, 0) and adopted.merge_map is None


class Quantized(QuantizedLayer):
    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def unmergeable():
    return {
        "StaticSlidingWindowLayer": Cache(layers=[StaticSlidingWindowLayer(max_cache_len=9, sliding_window=4)]),
        "Quantized": Cache(layers=[Quantized()]),
        "DynamicSlidingWindowLayer": Cache(layers=[filled_layer(DynamicSlidingWindowLayer, 6, sliding_window=4)]),
    }


@pytest.mark.parametrize("kind", unmergeable())
def test_a_cache_that_cannot_hold_merged_tokens_is_refused(kind):
    cache = unmergeable()[kind]
    before = list(cache.layers)
    with pytest.raises(ConfigurationError, match=rf"{kind} layers cannot hold merged tokens.*merge_schedule='none'"):
        adopt_cache(cache, LAYERS)
    assert cache.layers == before  # refused whole


def test_a_window_that_is_not_full_yet_is_adopted():
    adopted = adopt_cache(Cache(layers=[filled_layer(DynamicSlidingWindowLayer, 3, sliding_window=4)]), 1)
    assert adopted.get_seq_length() == 3


@torch.no_grad()
def test_a_plain_cache_that_holds_text_is_adopted_with_its_padding(model):
    """Text first, on the plain path; then a video, which merges; then words."""
    text, films = [words(5, 1), words(2, 2)], [video(*4 * [(2, 2)]) + words(2, 3), video(*6 * [(1, 2)]) + words(4, 4)]
    oracle = Oracle(model)
    for side in SIDES:
        first = movies(text, side)
        out = model(**first, use_cache=True)
        assert not isinstance(out.past_key_values, ElvaCache)
        second = movies(films, "left")
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        width = second["input_ids"].shape[1]
        given = {**second, "attention_mask": mask, "position_ids": positions(mask)[:, -width:]}
        out = model(**given, past_key_values=out.past_key_values)
        mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
        step = torch.tensor([[10, 11], [12, 13]])
        end = model(
            input_ids=step,
            attention_mask=mask,
            position_ids=positions(mask)[:, -2:],
            past_key_values=out.past_key_values,
        )
        for i in range(2):
            turns = [(text[i], MIXED), (films[i], MIXED), (step[i].tolist(), MIXED)]
            run = oracle.turns(turns, moving_pixels(films[i], i))
            real = second["attention_mask"][i].bool()
            assert_exact(out.logits[i][real], run.logits[len(text[i]) : -2])
            assert_exact(end.logits[i], run.logits[-2:])


@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt(model, runs):
    """Text in chunks before and after the video, as an assistant or a server may feed it."""
    ids = BUSY[0]  # 3 words, 44 visual tokens, 4 words
    inputs, cache = movie(ids), None
    for start, end in ((0, 2), (2, 3), (3, 48), (48, 51)):
        out = model(
            input_ids=torch.tensor([ids[start:end]]),
            position_ids=inputs["position_ids"][:, start:end],
            past_key_values=cache,
            use_cache=True,
            **({"pixel_values_videos": inputs["pixel_values_videos"]} if start == 3 else {}),
        )
        cache = out.past_key_values
        assert_exact(out.logits[0], runs[0].logits[start:end])


@torch.no_grad()
def test_a_static_cache_is_left_alone_without_merging(model):
    inputs = movie(BUSY[0])
    cache = StaticCache(config=model.config.text_config, max_cache_len=80)
    out = model(**inputs, past_key_values=cache, merge_schedule="none")
    assert out.past_key_values is cache
    assert_exact(out.logits, model(**inputs, merge_schedule="none").logits)
    later = model(input_ids=torch.tensor([[9, 10]]), past_key_values=cache, position_ids=torch.tensor([[51, 52]]))
    grown = movie(BUSY[0] + [9, 10])
    grown["pixel_values_videos"] = inputs["pixel_values_videos"]
    assert_exact(later.logits, model(**grown, merge_schedule="none").logits[:, -2:])


@torch.no_grad()
def test_no_cache_is_made_when_none_is_wanted(model):
    assert model(**movie(BUSY[0]), use_cache=False).past_key_values is None
    assert model(**without(movie(BUSY[0]), "attention_mask")).past_key_values is not None


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_a_static_cache_takes_a_second_video_without_merging(model, rows):
    """Its layers hand back more columns than are filled."""
    ids, turn = BUSY[0], video(*3 * [(2, 2)]) + words(2)
    run = Oracle(model).turns([(ids, "none"), (turn, "none")], torch.cat([moving_pixels(ids), moving_pixels(turn, 9)]))
    cache = StaticCache(config=model.config.text_config, max_cache_len=150)
    model(**movies(rows * [ids], seeds=rows * [0]), past_key_values=cache, merge_schedule="none")
    later = without(movies(rows * [turn], seeds=rows * [9]), "attention_mask")
    later["position_ids"] += len(ids)
    out = model(**later, past_key_values=cache, merge_schedule="none")
    for row in out.logits:
        assert_exact(row, run.logits[len(ids) :])


def second_turn(model, cache, ids, turn, **options):
    """A batch of one: feed a turn with video behind `ids`."""
    later = without(movie(turn, 9), "attention_mask")
    later["position_ids"] += len(ids)
    return model(**later, past_key_values=cache, **options)


@torch.no_grad()
@pytest.mark.parametrize("schedules", [("paper", "ratios"), ("ratios", "paper"), ("threshold", "ratio")], ids=str)
def test_the_merge_map_agrees_with_the_layers_when_turns_differ(model, schedules):
    """Each turn merged at layers of its own; a step of the map counts all merges up to its layer, of both."""
    ids, turn = BUSY[3], video(*5 * [(2, 2)]) + words(2)
    one, two = (SCHEDULES[name] for name in schedules)
    cache = model(**movie(ids, 3), merge_schedule=one, use_cache=True, output_merge_map=True).past_key_values
    cache = second_turn(model, cache, ids, turn, merge_schedule=two, output_merge_map=True).past_key_values
    merge_map, held = cache.merge_map, cache.tokens_per_layer[:, 0].tolist()
    assert [int(merge_map.kept(i).sum()) for i in range(len(merge_map.layers))] == [held[i] for i in merge_map.layers]


@torch.no_grad()
def test_a_video_after_a_crop(model):
    """What was cropped leaves no trace in keys, masks or map."""
    ids, turn = BUSY[3], video(*3 * [(2, 2)]) + words(2)
    cache = model(**movie(ids, 3), use_cache=True, output_merge_map=True).past_key_values
    cache = model(input_ids=torch.tensor([words(3, 5)]), past_key_values=cache).past_key_values
    cache.crop(-3)
    out = second_turn(model, cache, ids, turn, output_merge_map=True)
    pixels = torch.cat([moving_pixels(ids, 3), moving_pixels(turn, 9)])
    run = Oracle(model).turns([(ids, MIXED), (turn, MIXED)], pixels)
    assert_exact(out.logits[0], run.logits[len(ids) :])
    assert out.past_key_values.merge_map.survivors[-1][0].tolist() == run.survivors[-1]


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_rows_may_have_nothing_new(model, side):
    """A turn in which some samples are all padding, and words for everyone after it."""
    oracle, more = Oracle(model), words(2, 33)
    turns = [video(*3 * [(2, 2)]) + words(2), [], words(2, 7), [], video(*3 * [(1, 2)])]
    cache, mask = prefill(model, side)
    later = movies(turns, seeds=range(100, 105))
    width = later["input_ids"].shape[1]
    mask = torch.cat([mask, later["attention_mask"]], 1)
    later = {**later, "attention_mask": mask, "position_ids": positions(mask)[:, -width:]}
    out = model(**later, past_key_values=cache)
    mask = torch.cat([mask, torch.ones(5, 2, dtype=torch.long)], 1)
    end = model(
        input_ids=torch.tensor(5 * [more]),
        attention_mask=mask,
        position_ids=positions(mask)[:, -2:],
        past_key_values=out.past_key_values,
    )
    for i, (ids, turn) in enumerate(zip(BUSY, turns, strict=True)):
        pixels = [part for part in (moving_pixels(ids, i), moving_pixels(turn, 100 + i)) if part is not None]
        run = oracle.turns([(ids, MIXED), (turn, MIXED), (more, MIXED)], torch.cat(pixels) if pixels else None)
        assert_exact(out.logits[i][len(out.logits[i]) - len(turn) :], run.logits[len(ids) : len(ids) + len(turn)])
        assert_exact(end.logits[i], run.logits[-2:])


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_a_step_may_bring_the_whole_mask_or_its_own_part_and_no_positions(model, runs, side):
    cache, mask = prefill(model, side)
    step = torch.tensor([more[:3] for more in EXTRA])
    longer = torch.cat([mask, torch.ones(len(BUSY), 3, dtype=torch.long)], 1)
    own = {"attention_mask": longer[:, -3:], "position_ids": positions(longer)[:, -3:]}
    for given in ({"attention_mask": longer}, {"attention_mask": longer.bool()}, own):
        out = model(input_ids=step, past_key_values=copy.deepcopy(cache), **given)
        assert_next(out.logits, runs, ALL)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["paper", "none"])
def test_a_mask_of_the_new_tokens_says_nothing_of_the_past(model, schedule):
    """Five words without padding, then padded videos longer than that, with a mask of their own."""
    text, films = [words(5, 1), words(5, 2)], [video(*4 * [(2, 2)]) + words(2, 3), video(*6 * [(1, 2)]) + words(4, 4)]
    schedule, oracle = SCHEDULES[schedule], Oracle(model)
    first, later = movies(text), movies(films)
    cache = model(**first, use_cache=True).past_key_values
    later["position_ids"] += 5
    out = model(**later, past_key_values=cache, merge_schedule=schedule)
    for i, row in enumerate(rows_of(out.logits, later)):
        run = oracle.turns([(text[i], schedule), (films[i], schedule)], moving_pixels(films[i], i))
        assert_exact(row, run.logits[5:])
