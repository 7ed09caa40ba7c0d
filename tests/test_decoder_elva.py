"""The packed run of a decoder's own layers: windows, host syncs, memory, and what it leaves alone."""

import pytest
import torch
from merging_cases import (
    BUSY,
    LAYERS,
    MIXED,
    SCHEDULES,
    assert_exact,
    copy_of,
    deep_model,
    double_model,
    movie,
    movies,
    moving_pixels,
    positions,
    rows_of,
    without,
)
from merging_oracle import Oracle
from tiny_elva import END, FRAME, LINE, PATCH, START, VOCAB, batch_inputs, tiny_model, video, words
from transformers import DynamicCache

from elva_hf import attention_elva, decoder_elva, geometry_elva, mlp_elva, tokens_elva
from elva_hf.decoder_elva import StateTrace, run_packed, run_padded
from elva_hf.errors_elva import ConfigurationError
from elva_hf.merging_elva import Tubes
from elva_hf.mlp_elva import mlp_in_chunks
from elva_hf.packing_elva import BatchLayout

RATIOS = SCHEDULES["ratios"]


@pytest.fixture(scope="module")
def model():
    return double_model()


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


# windows


def hand_made_tubes(rows):
    """Tubes of a padded batch of token ids in which each row is part of one video: equal places are one tube."""
    ids = -1 - torch.arange(rows.numel()).view(rows.shape)
    groups = torch.full(rows.shape, -1)
    patches, floors = [], []
    for sample, row in enumerate(rows.tolist()):
        place, seen = 0, set()
        for column, token in enumerate(row):
            if token == FRAME:
                place = 0
            elif token == PATCH:
                ids[sample, column] = 1000 * sample + place
                groups[sample, column] = sample
                seen.add(place)
                place += 1
        patches.append(int((groups[sample] == sample).sum()))
        floors.append(len(seen))
    tail = rows.shape[1] - 1 - int((rows == PATCH).any(0).nonzero().max())
    return Tubes(ids, groups, list(range(len(rows))), patches, floors, tail)


def frame(rows, columns):
    return [FRAME] + rows * (columns * [PATCH] + [LINE])


CHUNKS = (
    (words(3, 1) + [START] + 2 * frame(2, 2), 2 * frame(2, 2), 2 * frame(2, 2) + [END] + words(4, 2)),
    (words(1, 3) + [START] + 2 * frame(1, 3), 2 * frame(1, 3), 2 * frame(1, 3) + [END] + words(6, 4)),
)
"""Two samples, each a video of six frames in three pieces of two."""


def pad_left(rows, fill=0):
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (0, 0) * (row.ndim - 1) + (longest - len(row), 0), value=fill)
                        for row in rows])  # fmt: skip


def run_in_chunks(model, oracle, schedule, cache=None):
    """Feed the pieces one after another; the hidden states of each sample, pieces joined."""
    decoder = model.model.language_model
    whole = [[token for piece in pieces for token in piece] for pieces in CHUNKS]
    embeds = [oracle.embed(ids, moving_pixels(ids, i)) for i, ids in enumerate(whole)]
    mask, done, found = torch.empty(2, 0, dtype=torch.long), [0, 0], [[], []]
    for part in range(3):
        pieces = [pieces[part] for pieces in CHUNKS]
        rows = pad_left([torch.tensor(piece) for piece in pieces])
        real = pad_left([torch.ones(len(piece), dtype=torch.long) for piece in pieces])
        mask = torch.cat([mask, real], 1)
        out = run_packed(
            decoder,
            pad_left([embeds[i][done[i] : done[i] + len(piece)] for i, piece in enumerate(pieces)]),
            attention_mask=mask,
            position_ids=positions(mask)[:, -rows.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            tubes=hand_made_tubes(rows),
            schedule=model.config.resolve_merge_schedule(schedule),
        )
        cache = out.past_key_values
        for i, piece in enumerate(pieces):
            found[i].append(out.last_hidden_state[i][real[i].bool()])
            done[i] += len(piece)
    return [torch.cat(parts) for parts in found], whole, cache


WINDOWED = {
    "thresholds": [{"layer": 1, "similarity_threshold": 0.7}, {"layer": 3, "similarity_threshold": 0.5}],
    "ratios": [{"layer": 1, "target_ratio": 0.8}, {"layer": 3, "target_ratio": 0.7}],
    "mixed": [{"layer": 1, "similarity_threshold": 0.8}, {"layer": 3, "target_ratio": 0.6}],
}


@torch.no_grad()
@pytest.mark.parametrize("steps", WINDOWED)
def test_a_prefill_in_windows_is_the_whole_run_cut_at_windows(model, oracle, steps):
    found, whole, cache = run_in_chunks(model, oracle, {"steps": WINDOWED[steps]})
    schedule = {"steps": WINDOWED[steps], "window": 2}
    inputs = movies(whole)
    out = model.model(**inputs, merge_schedule=schedule, use_cache=True)
    for row, chunked, (i, ids) in zip(rows_of(out.last_hidden_state, inputs), found, enumerate(whole), strict=True):
        run = oracle.sample(ids, schedule, i)
        assert sum(run.links) > 0
        assert_exact(chunked, run.last_hidden_state)
        assert_exact(row, run.last_hidden_state)
    assert torch.equal(cache.tokens_per_layer, out.past_key_values.tokens_per_layer)


@torch.no_grad()
def test_without_a_window_no_prefill_in_pieces_can_be_the_whole_run(model, oracle):
    found, whole, _ = run_in_chunks(model, oracle, {"steps": WINDOWED["ratios"]})
    run = oracle.sample(whole[0], {"steps": WINDOWED["ratios"]}, 0)
    assert float((found[0] - run.last_hidden_state).abs().max()) > 0.01


@torch.no_grad()
def test_words_after_a_prefill_in_pieces(model, oracle):
    """`run_padded` goes on from what `run_packed` left."""
    _, whole, cache = run_in_chunks(model, oracle, {"steps": WINDOWED["mixed"]}, DynamicCache())
    more = words(3, 9)
    embeds = oracle.text.get_input_embeddings()(torch.tensor([more, more]))
    at = torch.stack([torch.arange(len(ids), len(ids) + 3) for ids in whole])
    out = run_padded(model.model.language_model, embeds, past_key_values=cache, position_ids=at)
    for i, ids in enumerate(whole):
        schedule = {"steps": WINDOWED["mixed"], "window": 2}
        run = oracle.sample(ids + more, schedule, i, moving_pixels(ids, i))
        assert_exact(out.last_hidden_state[i], run.last_hidden_state[-3:])


@torch.no_grad()
def test_tubes_by_hand_are_those_of_the_geometry(model):
    rows = torch.tensor([words(2) + video(*4 * [(2, 2)]) + words(3)])
    mine = hand_made_tubes(rows)
    theirs = geometry_elva.read_geometry(model.model.token_kinds(rows)).tubes()
    for name in ("samples", "patches", "floors", "tail"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert torch.equal(mine.groups, theirs.groups)
    assert torch.equal(mine.ids[mine.ids >= 0], theirs.ids[theirs.ids >= 0])


# the host


class Host:
    """Stands for the one function that copies to the host; notes its calls, and answers for a meta device."""

    def __init__(self, monkeypatch, answers=None):
        self.calls, self.given, self.answers = [], [], answers
        for module in (geometry_elva, decoder_elva, tokens_elva):
            monkeypatch.setattr(module, "to_host", self)

    def __call__(self, tensor):
        self.calls.append(tuple(tensor.shape))
        self.given.append(tensor.cpu() if self.answers is None else self.answers[len(self.given)])
        return self.given[-1]


def kinds_on_the_host(model, inputs):
    """What the copy at entry holds: the kind of every token, 8 more for padding."""
    kinds = model.model.token_kinds(inputs["input_ids"])
    return (kinds + 8 * (inputs["attention_mask"] == 0)).to(torch.int8)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["none", "ratio", "ratios", "window and max_run", "table5"])
def test_a_ratio_step_never_waits_for_the_device(monkeypatch, schedule, side):
    """A meta tensor has no values: whatever asked for one would raise. The one answer is the copy at entry."""
    model = deep_model()
    inputs = movies(BUSY, side, dtype=torch.float32)
    expected = model(**inputs, merge_schedule=SCHEDULES[schedule], use_cache=True)
    host = Host(monkeypatch, [kinds_on_the_host(model, inputs)])
    meta = {name: value.to("meta") for name, value in inputs.items()}
    out = model.to("meta")(**meta, merge_schedule=SCHEDULES[schedule], use_cache=True)
    assert host.calls == [tuple(inputs["input_ids"].shape)]
    assert out.logits.shape == expected.logits.shape and out.logits.device.type == "meta"
    for empty, layer in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert empty.keys.shape == layer.keys.shape


@torch.no_grad()
def test_a_threshold_step_waits_once_for_a_number_per_video(monkeypatch):
    model = deep_model()
    inputs = movies(BUSY, dtype=torch.float32)
    schedule = [{"layer": 1, "similarity_threshold": 0.85}, {"layer": 2, "similarity_threshold": 0.7},
                {"layer": 4, "target_ratio": 0.5}]  # fmt: skip
    counting = Host(monkeypatch)
    expected = model(**inputs, merge_schedule=schedule, use_cache=True)
    host = Host(monkeypatch, counting.given)
    meta = {name: value.to("meta") for name, value in inputs.items()}
    out = model.to("meta")(**meta, merge_schedule=schedule, use_cache=True)
    assert host.calls[0] == tuple(inputs["input_ids"].shape)
    assert len(host.calls) == 3 and all(sum(shape) <= 1 + 7 for shape in host.calls[1:])  # 7 videos in the batch
    for empty, layer in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert empty.keys.shape == layer.keys.shape


@torch.no_grad()
def test_a_decode_step_never_waits_for_the_device(monkeypatch):
    model = deep_model()
    inputs = movies(BUSY, dtype=torch.float32)
    out = model(**inputs, merge_schedule=MIXED, use_cache=True)
    host = Host(monkeypatch)
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, 1, dtype=torch.long)], 1)
    model(
        input_ids=torch.tensor(5 * [[9]]),
        attention_mask=mask,
        position_ids=positions(mask)[:, -1:],
        past_key_values=out.past_key_values,
    )
    assert host.calls == []


@torch.no_grad()
def test_a_second_video_waits_once_more_for_the_masks_of_all_stages(monkeypatch, model):
    inputs = movies(BUSY)
    out = model(**inputs, merge_schedule=RATIOS, use_cache=True)
    later = movies(5 * [video(*3 * [(2, 2)]) + words(2)])
    mask = torch.cat([inputs["attention_mask"], later["attention_mask"]], 1)
    later = {**later, "attention_mask": mask, "position_ids": positions(mask)[:, -25:]}
    host = Host(monkeypatch)
    model(**later, merge_schedule=RATIOS, past_key_values=out.past_key_values)
    assert len(host.calls) == 2


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_waits_no_more_often_than_that(monkeypatch):
    """CUDA itself is the judge: any other wait raises."""
    model = deep_model().cuda()
    inputs = {name: value.cuda() for name, value in movies(BUSY, dtype=torch.float32).items()}
    model(**inputs, merge_schedule=RATIOS)  # what a first run sets up may wait

    def to_host(tensor):
        torch.cuda.set_sync_debug_mode("default")
        copied = tensor.cpu()
        torch.cuda.set_sync_debug_mode("error")
        return copied

    for module in (geometry_elva, decoder_elva, tokens_elva):
        monkeypatch.setattr(module, "to_host", to_host)
    try:
        for schedule in ("ratios", "paper", "window"):
            model(**inputs, merge_schedule=SCHEDULES[schedule], use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# what is built how often, and what never exists


@torch.no_grad()
def test_masks_and_positions_are_made_once_per_stage(monkeypatch, model):
    made = {"packing": 0, "mask": 0, "rotary": 0}
    build, mask = attention_elva.Packing.build.__func__, decoder_elva.causal_mask

    def count(name, call):
        def counted(*args, **kwargs):
            made[name] += 1
            return call(*args, **kwargs)

        return counted

    monkeypatch.setattr(attention_elva.Packing, "build", classmethod(count("packing", build)))
    monkeypatch.setattr(decoder_elva, "causal_mask", count("mask", mask))
    handle = model.model.language_model.rotary_emb.register_forward_hook(
        lambda *_: made.update(rotary=made["rotary"] + 1)
    )
    stages = 1 + len(RATIOS)
    cache = model(**movies(BUSY), merge_schedule=RATIOS, use_cache=True).past_key_values
    assert made == {"packing": stages, "mask": 0, "rotary": 1}
    model(input_ids=torch.tensor(5 * [[9]]), past_key_values=cache)
    handle.remove()
    assert made == {"packing": stages, "mask": stages, "rotary": 2}


def head_inputs(model, run):
    """Rows that pass the head while `run` runs."""
    shapes = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:-1].numel()))
    run()
    handle.remove()
    return shapes


def test_the_head_sees_no_position_that_nobody_asks_for(monkeypatch):
    model = deep_model()
    inputs = movies(BUSY, dtype=torch.float32)
    prompt = without(inputs, "position_ids")
    options = {"do_sample": False, "max_new_tokens": 3, "merge_schedule": MIXED}
    assert head_inputs(model, lambda: model.generate(**prompt, **options)) == [5, 5, 5]
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    model.train()
    run = {"labels": labels, "merge_schedule": MIXED}
    assert head_inputs(model, lambda: model(**inputs, **run)) == [20]
    monkeypatch.setattr("elva_hf.modeling_elva.LOSS_ROWS", 8)
    assert head_inputs(model, lambda: model(**inputs, **run)) == [8, 8, 4]


def test_padding_costs_nothing():
    """The layers see real tokens only, and fewer after each merge."""
    model, seen = deep_model(), []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    inputs = movies(BUSY, dtype=torch.float32)
    cache = model(**inputs, merge_schedule=RATIOS, use_cache=True).past_key_values
    assert seen == [(1, int(tokens)) for tokens in cache.tokens_per_layer.sum(1)]
    assert seen[0][1] == sum(map(len, BUSY)) > seen[-1][1]


@torch.no_grad()
def test_long_rows_pass_the_mlp_in_pieces_and_nothing_changes(monkeypatch, model):
    inputs, rows = movies(BUSY), []
    expected = model(**inputs, merge_schedule=MIXED).logits
    monkeypatch.setattr(mlp_elva, "MLP_ROWS", 50)
    mlp = model.model.language_model.layers[0].mlp
    handle = mlp.down_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    out = model(**inputs, merge_schedule=MIXED).logits
    handle.remove()
    assert rows == [50, 50, 50, 50, 4]
    assert_exact(out, expected)
    assert all("forward" not in vars(layer.mlp) for layer in model.model.language_model.layers)


def test_an_mlp_in_pieces_is_put_back_whatever_happens(monkeypatch):
    layers = deep_model().model.language_model.layers
    monkeypatch.setattr(mlp_elva, "MLP_ROWS", 4)
    layers[1].mlp.forward = patched = lambda hidden: hidden
    with torch.no_grad(), pytest.raises(RuntimeError), mlp_in_chunks(layers, 5):
        assert "forward" in vars(layers[0].mlp)
        raise RuntimeError
    assert "forward" not in vars(layers[0].mlp) and layers[1].mlp.forward is patched
    with mlp_in_chunks(layers, 5):  # a gradient needs the insides
        assert "forward" not in vars(layers[0].mlp)
    with torch.no_grad(), mlp_in_chunks(layers, 4):
        assert "forward" not in vars(layers[0].mlp)


@torch.no_grad()
def test_two_forwards_in_pieces_at_once_leave_each_other_alone(monkeypatch):
    """As two threads would: the second enters and leaves while the first is inside."""
    layers = deep_model().model.language_model.layers
    monkeypatch.setattr(mlp_elva, "MLP_ROWS", 4)
    first, second = mlp_in_chunks(layers, 5), mlp_in_chunks(layers, 5)
    first.__enter__()
    second.__enter__()
    second.__exit__(None, None, None)
    assert layers[0].mlp(torch.zeros(1, 9, 32)).shape == (1, 9, 32)
    first.__exit__(None, None, None)
    assert all("forward" not in vars(layer.mlp) for layer in layers)


# outputs


@torch.no_grad()
@pytest.mark.parametrize("asked", [[0, 3], [-1], [2, -2, 99]], ids=str)
def test_some_hidden_states_only(model, asked):
    """By index, as transformers allows: the others are None and were never restored."""
    inputs = movies(BUSY)
    every = model(**inputs, merge_schedule=MIXED, output_hidden_states=True).hidden_states
    some = model(**inputs, merge_schedule=MIXED, output_hidden_states=asked).hidden_states
    wanted = {index % 7 for index in asked if index < 7}
    assert len(some) == len(every) == LAYERS + 1
    for i, (one, other) in enumerate(zip(some, every, strict=True)):
        assert (one is not None) == (i in wanted)
        assert one is None or torch.equal(one, other)


@torch.no_grad()
def test_hidden_states_of_a_cached_step(model, oracle):
    inputs, more = movie(BUSY[0]), words(2, 50)
    out = model(**inputs, merge_schedule=MIXED, use_cache=True)
    step = model(
        input_ids=torch.tensor([more]),
        position_ids=torch.tensor([[51, 52]]),
        past_key_values=out.past_key_values,
        output_hidden_states=True,
    )
    run = oracle.sample(BUSY[0] + more, MIXED)
    for state, expected in zip(step.hidden_states, run.hidden, strict=True):
        assert_exact(state[0], expected[-2:])


def test_a_trace_keeps_what_is_wanted():
    trace = StateTrace.start([0, -1], 2)
    trace.add(torch.zeros(1))
    trace.add(lambda: pytest.fail("made though not wanted"))
    assert [state if state is None else int(state) for state in trace.finish(torch.ones(1))] == [0, None, 1]
    assert StateTrace.start(None, 2).finish(torch.ones(1)) is None


def test_a_layout_packs_and_unpacks():
    valid = torch.tensor([[False, True, True], [True, True, True], [True, False, False]])
    layout = BatchLayout.read(valid, 1, torch.device("cpu"))
    padded = torch.arange(9.0).view(3, 3)
    assert layout.pack(padded).tolist() == [1, 2, 3, 4, 5, 6]
    assert layout.unpack(layout.pack(padded), fill=-1).tolist() == [[-1, 1, 2], [3, 4, 5], [6, -1, -1]]
    full = BatchLayout.read(torch.ones(2, 2, dtype=torch.bool), 0, torch.device("cpu"))
    assert full.index is None and full.unpack(full.pack(padded[:2, :2])).shape == (2, 2)


def test_padding_reads_zero(model):
    inputs = movies(BUSY)
    out = model.model(**inputs, merge_schedule=MIXED)
    assert (out.last_hidden_state[inputs["attention_mask"] == 0] == 0).all()


def test_tuples_come_when_asked_for(model):
    inputs = movies(BUSY)
    logits, cache = model(**inputs, merge_schedule=MIXED, use_cache=True, return_dict=False)[:2]
    assert torch.equal(logits, model(**inputs, merge_schedule=MIXED).logits)
    assert cache.get_seq_length() == logits.shape[1]


# other decoders, and models with odd parts


def test_a_decoder_that_is_more_than_its_layers_is_refused():
    """Gemma scales its embeddings in its own forward; running its layers alone would be wrong."""
    model = tiny_model("gemma", text={"num_hidden_layers": LAYERS})
    inputs = batch_inputs(BUSY)
    with pytest.raises(
        ConfigurationError, match="'gemma' decoders can be neither merged nor packed; those that can are qwen2"
    ):
        model(**inputs, merge_schedule=MIXED)
    assert model(**inputs).logits.shape[-1] == VOCAB


def test_a_layer_dropped_from_the_config_is_not_run():
    """transformers runs `num_hidden_layers` of a decoder's layers, and so do we."""
    model = double_model()
    oracle = Oracle(model)
    model.model.language_model.config.num_hidden_layers = 4
    oracle.text.base_model.layers = oracle.text.base_model.layers[:4]
    inputs = movie(BUSY[0])
    steps = SCHEDULES["threshold"]
    assert_exact(model(**inputs, merge_schedule=steps).logits[0], oracle.sample(BUSY[0], steps).logits)


def test_a_frozen_decoder_gets_no_gradient_and_the_front_end_does(model):
    twin = copy_of(model).train()
    twin.model.language_model.requires_grad_(False)
    inputs = movies(BUSY)
    twin(**inputs, labels=inputs["input_ids"], merge_schedule=MIXED).loss.backward()
    for name, parameter in twin.named_parameters():
        assert (parameter.grad is None) == ("language_model" in name), name
