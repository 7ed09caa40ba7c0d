"""Decoding with a static cache after a merge: the words of a dynamic one, in steps of one shape that compile."""

import copy
import logging

import pytest
import torch
from generating import BEAMS, GREEDY, NEW
from mavors_models import film, mavors_model, sample_inputs
from merging_cases import BUSY, LAYERS, MIXED, SCHEDULES, deep_model, double_model, movie, movies, positions, without
from tiny_elva import batch, words
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, StaticCache

from elva_hf.cache_elva import ElvaCache
from elva_hf.errors_elva import ConfigurationError
from elva_hf.static_cache_elva import ElvaStaticLayer, round_up

STATIC = {"cache_implementation": "static", "disable_compile": True}
STEPS = 8


@pytest.fixture(scope="module")
def model():
    """Merges by `MIXED`; shared, do not change it."""
    model = double_model()
    model.set_merge_schedule(MIXED)
    return model


def prompts(samples=BUSY, side="left"):
    return without(movies(samples, side), "position_ids")


def static_cache(model, inputs, room=STEPS):
    return StaticCache(config=model.config.text_config, max_cache_len=inputs["input_ids"].shape[1] + room)


def grown(mask, step):
    return torch.cat([mask, torch.ones(len(mask), step, dtype=torch.long)], 1)


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["paper", "ratios", "first", "none"])
def test_the_words_are_those_of_a_dynamic_cache(model, schedule, side, options):
    options = {**options, "merge_schedule": SCHEDULES[schedule]}
    for inputs in (prompts(side=side), prompts(BUSY[:1]), batch([words(5), words(3)], side)):
        expected = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, **STATIC), expected)


def test_eager_attention_says_the_same(model):
    eager = deep_model(patch_embed_type="naive")
    eager.set_merge_schedule(MIXED)
    eager.set_attn_implementation("eager")
    inputs = without(movies(BUSY, dtype=torch.float32), "position_ids")
    assert torch.equal(eager.generate(**inputs, **GREEDY, **STATIC), eager.generate(**inputs, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_step_has_the_logits_of_a_dynamic_cache(model, side):
    """Of one token and of several, with padding among them."""
    inputs = movies(BUSY, side)
    caches = [None, static_cache(model, inputs)]
    caches = [model(**inputs, past_key_values=cache, use_cache=True).past_key_values for cache in caches]
    mask = inputs["attention_mask"]
    for step in (1, 1, 3, 2):
        new = torch.ones(len(BUSY), step, dtype=torch.long)
        if step == 3:
            new[1, 0] = 0
        mask = torch.cat([mask, new], 1)
        ids = torch.arange(len(BUSY) * step).view(-1, step) % 80 + 9
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, -step:]}
        outs = [model(**given, past_key_values=cache) for cache in caches]
        real = new.bool()
        torch.testing.assert_close(outs[1].logits[real], outs[0].logits[real], rtol=0, atol=1e-10)
    assert int(caches[1].get_seq_length()) == caches[0].get_seq_length()
    assert torch.equal(caches[1].tokens_per_layer, caches[0].tokens_per_layer)


@torch.no_grad()
def test_a_layer_has_room_for_what_is_left_and_what_is_to_come(model):
    inputs = movies(BUSY)
    dynamic = model(**inputs, use_cache=True).past_key_values
    given = static_cache(model, inputs, 70)
    static = model(**inputs, past_key_values=given).past_key_values
    assert isinstance(static, ElvaCache) and static.is_compileable and given.layers is static.layers
    assert [layer.max_cache_len for layer in static.layers] == [
        round_up(layer.columns + 70) for layer in dynamic.layers
    ]
    assert len({layer.max_cache_len for layer in static.layers}) > 1  # deeper layers hold less
    for layer, other in zip(static.layers, dynamic.layers, strict=True):
        assert isinstance(layer, ElvaStaticLayer)
        assert torch.equal(layer.keys[:, :, : other.columns], other.keys)
        assert torch.equal(layer.values[:, :, : other.columns], other.values)


def test_sizes_of_buffers_are_few():
    assert [round_up(columns) for columns in (1, 64, 65, 1000, 1024, 1025, 10000)] == [
        64,
        64,
        128,
        1024,
        1024,
        1152,
        10240,
    ]
    for columns in range(1, 5000, 7):
        assert columns <= round_up(columns) <= columns + max(63, columns // 8)


def test_the_map_of_merges_is_that_of_a_dynamic_cache(model):
    options = {**GREEDY, "output_merge_map": True, "return_dict_in_generate": True}
    maps = [model.generate(**prompts(), **options, **more).past_key_values.merge_map for more in ({}, STATIC)]
    assert maps[0].layers == maps[1].layers and torch.equal(maps[0].frame_index, maps[1].frame_index)
    for one, other in zip(maps[0].survivors, maps[1].survivors, strict=True):
        assert torch.equal(one, other)


def test_a_static_cache_of_ones_own_is_filled_and_goes_on(model):
    inputs = prompts()
    cache = static_cache(model, inputs, 3 * NEW)
    expected = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), expected.sequences)
    dynamic = expected.past_key_values
    turn = torch.cat([expected.sequences, torch.tensor(len(BUSY) * [words(2, 40)])], 1)
    more = {"input_ids": turn, "attention_mask": grown(inputs["attention_mask"], NEW + 2)}
    found = model.generate(**more, **GREEDY, past_key_values=cache)
    assert torch.equal(found, model.generate(**more, **GREEDY, past_key_values=dynamic))


# compiled


def decode_alike(model, step, inputs, plain, static, *, steps, atol):
    """Decode greedily with a dynamic cache and, by `step`, with a static one, comparing logits; returns tokens seen."""
    mask, token = inputs["attention_mask"], plain.logits[:, -1:].argmax(-1)
    for _ in range(steps):
        mask = grown(mask, 1)
        given = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": True, "logits_to_keep": 1}
        plain, static = (
            run(**model.prepare_inputs_for_generation(token, 1, out.past_key_values, **given))
            for run, out in ((model, plain), (step, static))
        )
        torch.testing.assert_close(static.logits, plain.logits, rtol=0, atol=atol)
        token = plain.logits.argmax(-1)
    return mask.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("samples", [BUSY, BUSY[:1]], ids=["batch", "one"])
@pytest.mark.parametrize("schedule", ["paper", "none"])
def test_a_compiled_step_is_one_graph_for_all_steps(model, samples, schedule):
    """`fullgraph=True` raises at a break; a second graph would be a recompilation."""
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(model.__call__, backend=counter, fullgraph=True)
    inputs = movies(samples)
    plain = model(**inputs, use_cache=True, merge_schedule=SCHEDULES[schedule])
    static = model(
        **inputs, past_key_values=static_cache(model, inputs), merge_schedule=SCHEDULES[schedule], logits_to_keep=1
    )
    decode_alike(model, step, inputs, plain, static, steps=STEPS, atol=1e-9)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_compiled_step_serves_prompts_that_merged_otherwise_before_the_decoder():
    """Mavors' own compression: layer 0 then holds less than the prompt, by a number that is each prompt's own."""
    torch._dynamo.reset()
    model, counter, merged = mavors_model(chunk_similarity_threshold=0.8), CompileCounter(), set()
    step = torch.compile(model.__call__, backend=counter, fullgraph=True)
    for change in (1.0, 0.8, 0.2):  # chunks ever more alike
        inputs = sample_inputs([words(3), film(4, 4, 4, 4), words(4, 2)], change=change)
        plain = model(**inputs, use_cache=True)
        static = model(**inputs, past_key_values=static_cache(model, inputs))
        merged.add(static.past_key_values.layers[0].merged)
        seen = decode_alike(model, step, inputs, plain, static, steps=2, atol=1e-4)
        assert int(static.past_key_values.get_seq_length()) == seen
    assert len(merged) == 3 and counter.frame_count == 1


GRAPHS = []


def keep_graph(graph, example_inputs):
    """A backend that runs a graph as it is; a function, as generate() copies what it is given."""
    GRAPHS.append(graph)
    return graph.forward


@pytest.mark.parametrize("schedule", ["paper", "ratios", "none"])
def test_generate_compiles_its_steps_by_itself(model, schedule, caplog):
    """As on an accelerator; the flag makes transformers do so on a CPU."""
    torch._dynamo.reset()
    GRAPHS.clear()
    model = copy.deepcopy(model)
    compile_config = CompileConfig(fullgraph=True, backend=keep_graph, mode=None)
    compile_config._compile_all_devices = True
    options = {**GREEDY, "max_new_tokens": STEPS, "merge_schedule": SCHEDULES[schedule]}
    static = {"cache_implementation": "static", "compile_config": compile_config, "return_dict_in_generate": True}
    sizes = set()
    with caplog.at_level(logging.WARNING, "transformers"):
        for seed in (0, 100, 0):  # other pixels merge in other places
            inputs = without(movies(BUSY, seeds=range(seed, seed + len(BUSY))), "position_ids")
            found = model.generate(**inputs, **options, **static)
            assert torch.equal(found.sequences, model.generate(**inputs, **options))
            sizes.add(tuple(layer.max_cache_len for layer in found.past_key_values.layers))
    assert 1 <= len(GRAPHS) <= len(sizes)  # none for a prompt of a size that was there before
    assert schedule == "paper" or len(sizes) == 1
    assert "unable to meet the criteria" not in caplog.text


class NoHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where the host asks for a value of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero"), function
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["paper", "none"])
def test_a_step_asks_the_device_nothing(model, schedule):
    inputs = movies(BUSY)
    cache = model(**inputs, past_key_values=static_cache(model, inputs), merge_schedule=SCHEDULES[schedule])
    mask = grown(inputs["attention_mask"], 1)
    prepared = model.prepare_inputs_for_generation(
        torch.full_like(mask, 9), 1, cache.past_key_values, attention_mask=mask,
        position_ids=positions(mask), use_cache=True,
    )  # fmt: skip
    with NoHost():
        model(**prepared)


# what is refused


def test_a_second_video_is_refused(model):
    inputs = movie(BUSY[0])
    cache = model(**inputs, past_key_values=static_cache(model, inputs, 100)).past_key_values
    later = {**movie(BUSY[0], 1), "attention_mask": torch.ones(1, 2 * len(BUSY[0]), dtype=torch.long)}
    for schedule in ("paper", "none"):
        with pytest.raises(ConfigurationError, match="takes text only"):
            model(**later, past_key_values=cache, merge_schedule=SCHEDULES[schedule])


def test_a_cache_that_is_too_small_or_filled_is_refused(model):
    inputs = movie(BUSY[0])
    with pytest.raises(ConfigurationError, match="larger max_cache_len"):
        model(**inputs, past_key_values=static_cache(model, inputs, -1))
    text = static_cache(model, inputs, 100)
    model(input_ids=torch.tensor([words(3)]), past_key_values=text)
    with pytest.raises(ConfigurationError, match="already holds tokens"):
        model(**without(inputs, "attention_mask"), past_key_values=text)


def test_a_window_and_flash_attention_are_refused(model, monkeypatch):
    windowed = double_model("mistral", text={"sliding_window": 200})
    with pytest.raises(ConfigurationError, match="layers with a sliding window"):
        windowed.generate(**prompts(), **GREEDY, **STATIC, merge_schedule=MIXED)
    import flash_reference

    flash_reference.install(monkeypatch)
    flash = copy.deepcopy(model)
    flash.set_attn_implementation(flash_reference.NAME)
    with pytest.raises(ConfigurationError, match="sdpa or eager attention, not flash_attention_2"):
        flash.generate(**prompts(), **GREEDY, **STATIC)


@torch.no_grad()
def test_an_emptied_cache_takes_text_again(model):
    inputs = movies(BUSY[:1])
    cache = model(**inputs, past_key_values=static_cache(model, inputs)).past_key_values
    cache.reset()
    ids = torch.tensor([words(4)])
    out = model(input_ids=ids, past_key_values=cache)
    torch.testing.assert_close(out.logits, model(input_ids=ids).logits, rtol=0, atol=1e-10)
    assert cache.tokens_per_layer.tolist() == LAYERS * [[4]]


@torch.no_grad()
def test_a_reordered_cache_is_that_of_reordered_samples(model):
    inputs, order = movies(BUSY), torch.tensor([3, 3, 0, 2, 1])
    cache = model(**inputs, past_key_values=static_cache(model, inputs), output_merge_map=True).past_key_values
    buffers = [layer.keys.data_ptr() for layer in cache.layers]
    before = cache.tokens_per_layer, cache.merge_map.survivors
    ids = torch.tensor(len(BUSY) * [[9]])
    mask = grown(inputs["attention_mask"], 1)
    at = positions(mask)[:, -1:]
    expected = model(input_ids=ids, position_ids=at, past_key_values=copy.deepcopy(cache)).logits[order]
    cache.reorder_cache(order)
    assert torch.equal(cache.tokens_per_layer, before[0][:, order])
    assert all(torch.equal(one, other[order]) for one, other in zip(cache.merge_map.survivors, before[1], strict=True))
    found = model(input_ids=ids, position_ids=at[order], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert [layer.keys.data_ptr() for layer in cache.layers] == buffers


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("schedule", ["paper", "none"])
def test_a_step_on_a_gpu_waits_for_nothing(model, schedule):
    """CUDA itself is the judge."""
    model = copy.deepcopy(model).cuda()
    inputs = {name: value.cuda() for name, value in movies(BUSY).items()}
    out = model(**inputs, past_key_values=static_cache(model, inputs), merge_schedule=SCHEDULES[schedule])
    mask = grown(inputs["attention_mask"].cpu(), 1)
    prepared = model.prepare_inputs_for_generation(
        torch.full_like(mask, 9).cuda(), 1, out.past_key_values, attention_mask=mask.cuda(),
        position_ids=positions(mask).cuda(), use_cache=True,
    )  # fmt: skip
    model(**prepared)  # what a first run sets up may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_says_the_words_of_a_dynamic_cache_compiled(model):
    model = copy.deepcopy(model).float().cuda()
    inputs = {name: value.cuda() for name, value in prompts().items()}
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].float()
    expected = model.generate(**inputs, **GREEDY)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)
