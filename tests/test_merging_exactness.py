"""Section 5's statements about one forward pass: a merged, packed, padded batch is the oracle of each sample.

Float64 to 1e-10 for sdpa and for transformers' FlashAttention path on reference kernels; eager in float32.
"""

import copy

import flash_reference
import pytest
import torch
from merging_cases import (
    BUSY,
    LAYERS,
    MERGING,
    MIXED,
    SCHEDULES,
    assert_exact,
    deep_model,
    double_model,
    movie,
    movies,
    moving_pixels,
    positions,
    rows_of,
    without,
)
from merging_oracle import Oracle, cross_entropy
from tiny_elva import END, FRAME, LINE, PATCH, RAGGED, START, TEXT_TYPES, video, words

from elva_hf.errors_elva import ConfigurationError

KERNELS = {"sdpa": "sdpa", "flash": flash_reference.NAME}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Name of an attention implementation that runs in float64."""
    if request.param == "flash":
        flash_reference.install(monkeypatch)
    return KERNELS[request.param]


@pytest.fixture
def model(kernel):
    model = double_model()
    model.set_attn_implementation(kernel)
    return model


@pytest.fixture(scope="module")
def oracle():
    """Of the model that `double_model()` gives."""
    return Oracle(double_model())


@pytest.fixture(scope="module")
def found(oracle):
    """What the oracle says of each sample of BUSY under each schedule."""
    known = {}

    def look_up(schedule):
        if schedule not in known:
            with torch.no_grad():
                known[schedule] = [oracle.sample(ids, SCHEDULES[schedule], i) for i, ids in enumerate(BUSY)]
        return known[schedule]

    return look_up


def assert_is_oracle(out, inputs, expected):
    for row, run in zip(rows_of(out.logits, inputs), expected, strict=True):
        assert_exact(row, run.logits)


@pytest.mark.parametrize("schedule", MERGING)
def test_every_schedule_merges_some_and_not_all(found, schedule):
    """Otherwise the tests below would say little."""
    runs = [run for ids, run in zip(BUSY, found(schedule), strict=True) if PATCH in ids]
    patches = [sum(token == PATCH for token in ids) for ids in BUSY if PATCH in ids]
    assert all(0 < sum(run.links) < count for run, count in zip(runs, patches, strict=True))
    for step in zip(*(run.links for run in runs), strict=True):
        assert sum(step) > 0


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row_of_a_padded_batch_is_the_oracle_of_its_sample(model, found, schedule, side):
    inputs = movies(BUSY, side)
    out = model(**inputs, merge_schedule=SCHEDULES[schedule])
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    assert_is_oracle(out, inputs, found(schedule))


@torch.no_grad()
@pytest.mark.parametrize("sample", range(len(BUSY)))
def test_a_sample_alone_is_its_oracle(model, found, sample):
    for schedule in SCHEDULES:
        inputs = movie(BUSY[sample], sample)
        assert_exact(model(**inputs, merge_schedule=SCHEDULES[schedule]).logits[0], found(schedule)[sample].logits)


@torch.no_grad()
def test_positions_and_masks_may_be_left_out(model, found):
    """A batch without padding needs no mask; positions count real tokens by themselves."""
    inputs = without(movie(BUSY[0]), "attention_mask", "position_ids")
    assert_exact(model(**inputs, merge_schedule=MIXED).logits[0], found("paper")[0].logits)
    for side in ("left", "right"):
        inputs = movies(BUSY, side)
        out = model(**without(inputs, "position_ids"), merge_schedule=MIXED)
        assert_is_oracle(out, inputs, found("paper"))


@torch.no_grad()
@pytest.mark.parametrize("model_type", TEXT_TYPES)
@pytest.mark.parametrize("schedule", ["paper", "ratios"])
def test_every_kind_of_decoder_merges_like_its_oracle(model_type, schedule):
    model = double_model(model_type, seed=1)
    oracle = Oracle(model)
    inputs = movies(BUSY)
    expected = [oracle.sample(ids, SCHEDULES[schedule], i) for i, ids in enumerate(BUSY)]
    assert_is_oracle(model(**inputs, merge_schedule=SCHEDULES[schedule]), inputs, expected)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["none", "never"])
def test_a_schedule_that_merges_nothing_is_the_plain_text_model(model, oracle, schedule):
    for side in ("left", "right"):
        inputs = movies(BUSY, side)
        embeds = torch.zeros(*inputs["input_ids"].shape, 32, dtype=torch.float64)
        for i, ids in enumerate(BUSY):
            embeds[i][inputs["attention_mask"][i].bool()] = oracle.embed(ids, moving_pixels(ids, i))
        plain = oracle.text(inputs_embeds=embeds, **{k: inputs[k] for k in ("attention_mask", "position_ids")}).logits
        out = model(**inputs, merge_schedule=SCHEDULES[schedule])
        for row, expected in zip(rows_of(out.logits, inputs), rows_of(plain, inputs), strict=True):
            assert_exact(row, expected)


SINGLE = {"rtol": 0, "atol": 3e-6}


def single_model(**overrides):
    """In float32, with weights small enough that rounding alone stays below 3e-6 in the plain model too."""
    return deep_model(text={"initializer_range": 0.05}, **overrides)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eager_attention_in_float32(schedule):
    model = single_model(patch_embed_type="naive")
    model.set_attn_implementation("eager")
    oracle = Oracle(model)
    expected = [oracle.sample(ids, SCHEDULES[schedule], i).logits for i, ids in enumerate(BUSY)]
    for side in ("left", "right"):
        inputs = movies(BUSY, side, dtype=torch.float32)
        out = model(**inputs, merge_schedule=SCHEDULES[schedule])
        for row, logits in zip(rows_of(out.logits, inputs), expected, strict=True):
            torch.testing.assert_close(row.double(), logits, **SINGLE)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_in_float32():
    """Uncompiled, which is the same arithmetic; compiling takes a minute."""
    model = single_model(patch_embed_type="naive")
    oracle = Oracle(model)
    model.set_attn_implementation("flex_attention")
    inputs = movies(BUSY, dtype=torch.float32)
    with torch.compiler.set_stance("force_eager"):
        out = model(**inputs, merge_schedule=MIXED)
    for i, (row, ids) in enumerate(zip(rows_of(out.logits, inputs), BUSY, strict=True)):
        torch.testing.assert_close(row.double(), oracle.sample(ids, MIXED, i).logits, **SINGLE)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_cross_attention_of_the_front_end_merges_too(attention):
    """Its sums are in float32, so it is compared in float32."""
    model = single_model()
    model.set_attn_implementation(attention)
    oracle = Oracle(model)
    inputs = movies(BUSY, dtype=torch.float32)
    out = model(**inputs, merge_schedule=MIXED)
    for i, (row, ids) in enumerate(zip(rows_of(out.logits, inputs), BUSY, strict=True)):
        torch.testing.assert_close(row.double(), oracle.sample(ids, MIXED, i).logits, **SINGLE)


@torch.no_grad()
def test_the_order_of_the_samples_does_not_matter(model):
    inputs, backwards = movies(BUSY), movies(BUSY[::-1], seeds=range(len(BUSY))[::-1])
    forth = rows_of(model(**inputs, merge_schedule=MIXED).logits, inputs)
    back = rows_of(model(**backwards, merge_schedule=MIXED).logits, backwards)
    for one, other in zip(forth, back[::-1], strict=True):
        assert_exact(one, other)


@torch.no_grad()
def test_companions_do_not_matter(model):
    """Nor how many there are, nor how much padding they bring."""
    alone = movie(BUSY[3], 3)
    expected = model(**alone, merge_schedule=MIXED).logits[0]
    for others in ([0], [2, 2, 2], [1, 4], list(range(5))):
        inputs = movies([BUSY[i] for i in others] + [BUSY[3]], seeds=[*others, 3])
        assert_exact(rows_of(model(**inputs, merge_schedule=MIXED).logits, inputs)[-1], expected)


@torch.no_grad()
def test_more_padding_than_needed_changes_nothing(model, found):
    for side in ("left", "right"):
        inputs = movies([*BUSY, words(90)], side)
        out = model(**inputs, merge_schedule=MIXED)
        for row, run in zip(rows_of(out.logits, inputs), found("paper"), strict=False):
            assert_exact(row, run.logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_row_in_bfloat16_is_bit_for_bit_its_solo_run(side):
    model = deep_model().to(torch.bfloat16)
    for schedule in ("paper", "ratios", "window"):
        options = {"merge_schedule": SCHEDULES[schedule], "output_merge_map": True}
        inputs = movies(BUSY, side, dtype=torch.bfloat16)
        together = model(**inputs, **options)
        logits = rows_of(together.logits, inputs)
        offsets = inputs["attention_mask"].argmax(1)
        for i, ids in enumerate(BUSY):
            alone = model(**movie(ids, i, torch.bfloat16), **options)
            singles = alone.merge_map.survivors if PATCH in ids else ()
            for batched, single in zip(together.merge_map.survivors, singles, strict=bool(singles)):
                assert torch.equal(batched[i][inputs["attention_mask"][i].bool()] - offsets[i], single[0])
            assert torch.equal(logits[i], alone.logits[0])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["paper", "ratios", "window and max_run", "first"])
def test_hidden_states_come_at_the_length_of_the_input(model, found, schedule, side):
    """Entry `i` is what enters layer `i`, the last one the normalised end; a merged token reads its survivor."""
    inputs = movies(BUSY, side)
    out = model(**inputs, merge_schedule=SCHEDULES[schedule], output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    for i, run in enumerate(found(schedule)):
        real = inputs["attention_mask"][i].bool()
        for state, expected in zip(out.hidden_states, run.hidden, strict=True):
            assert_exact(state[i][real], expected)
    body = model.model(**inputs, merge_schedule=SCHEDULES[schedule])
    for row, run in zip(rows_of(body.last_hidden_state, inputs), found(schedule), strict=True):
        assert_exact(row, run.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", MERGING)
def test_the_merge_map_is_the_oracles(model, found, schedule, side):
    inputs = movies(BUSY, side)
    out = model(**inputs, merge_schedule=SCHEDULES[schedule], output_merge_map=True, use_cache=True)
    steps = model.config.resolve_merge_schedule(SCHEDULES[schedule]).steps
    merge_map, mask = out.merge_map, inputs["attention_mask"].bool()
    assert merge_map.layers == tuple(step.layer for step in steps)
    offsets = mask.int().argmax(1).tolist()
    for step, survivors in enumerate(merge_map.survivors):
        assert survivors.shape == mask.shape
        assert (survivors[~mask] == -1).all()
        assert (merge_map.token_sizes(step)[~mask] == 0).all()
        for i, run in enumerate(found(schedule)):
            assert (survivors[i][mask[i]] - offsets[i]).tolist() == run.survivors[step]
            assert merge_map.token_sizes(step)[i][mask[i]].tolist() == run.sizes[step]
            assert merge_map.kept(step)[i][mask[i]].tolist() == [size > 0 for size in run.sizes[step]]
    expected = torch.tensor([run.tokens_per_layer for run in found(schedule)]).T
    assert torch.equal(out.past_key_values.tokens_per_layer, expected)


@torch.no_grad()
def test_the_merge_map_counts_what_each_frame_keeps(model, found):
    inputs = movies(BUSY)
    merge_map = model(**inputs, merge_schedule=MIXED, output_merge_map=True).merge_map
    for i, (ids, run) in enumerate(zip(BUSY, found("paper"), strict=True)):
        frame, counts = -1, []
        for token, size in zip(ids, run.sizes[-1], strict=True):
            if token == FRAME:
                frame += 1
                counts.append(0)
            if token in (FRAME, PATCH, LINE):
                counts[frame] += size > 0
        assert merge_map.kept_per_frame()[i].tolist() == counts
        frames = merge_map.frame_index[i][inputs["attention_mask"][i].bool()].tolist()
        assert max(frames, default=-1) == frame
        assert [number >= 0 for number in frames] == [token in (FRAME, PATCH, LINE) for token in ids]


@torch.no_grad()
def test_no_map_is_made_unless_asked_for(model):
    out = model(**movies(BUSY), merge_schedule=MIXED, use_cache=True)
    assert out.merge_map is None
    assert out.past_key_values.merge_map is None


def identical_frames(count, grid=(2, 2)):
    ids = words(2) + video(*count * [grid]) + words(3, 1)
    frame = torch.randn(grid[0] * grid[1], 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = movie(ids)
    return ids, {**inputs, "pixel_values_videos": frame.repeat(count, 1)}


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 8, 32])
def test_identical_frames_leave_the_patches_of_one(count):
    """At 0.6 and layer 1, positions and neighbours have moved the copies apart, but not that far."""
    model = double_model(text={"initializer_range": 0.1})
    ids, inputs = identical_frames(count)
    out = model(**inputs, merge_schedule=[{"layer": 1, "similarity_threshold": 0.6}], use_cache=True)
    text = sum(token != PATCH for token in ids)
    assert out.past_key_values.tokens_per_layer[1:].tolist() == (LAYERS - 1) * [[text + 4]]


@torch.no_grad()
def test_adjacent_images_never_merge(model):
    """Two one-frame videos of the same picture side by side are two pictures."""
    ids = words(2) + video((2, 2)) + video((2, 2)) + words(2)
    inputs = {**movie(ids), "pixel_values_videos": identical_frames(2)[1]["pixel_values_videos"]}
    for step in ({"similarity_threshold": -0.99}, {"target_ratio": 0.1}):
        out = model(**inputs, merge_schedule=[{"layer": 1, **step}], use_cache=True)
        assert out.past_key_values.tokens_per_layer.tolist() == LAYERS * [[len(ids)]]


@torch.no_grad()
def test_a_threshold_of_minus_one_leaves_the_floor(model):
    """The most that can merge: one patch for each place of each grid of each video."""
    inputs = movies(BUSY)
    out = model(**inputs, merge_schedule=[{"layer": 1, "similarity_threshold": -0.9999}], use_cache=True)
    floors = [4, 3 + 2 + 2, 0, 6 + 2, 1 + 2 + 2]
    text = [sum(token != PATCH for token in ids) for ids in BUSY]
    assert out.past_key_values.tokens_per_layer[-1].tolist() == [a + b for a, b in zip(floors, text, strict=True)]


# gradients


def weights_of(ids, seed):
    """Fixed random weights that turn the logits of a sample into a loss."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(len(ids), 99, dtype=torch.float64, generator=generator)


def weighted(logits, samples):
    return sum((row * weights_of(ids, i)).sum() for i, (row, ids) in enumerate(zip(logits, samples, strict=True)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_parameter_gets_the_gradient_of_the_oracle(model, schedule, side):
    oracle = Oracle(model)
    weighted([oracle.sample(ids, SCHEDULES[schedule], i).logits for i, ids in enumerate(BUSY)], BUSY).backward()
    inputs = movies(BUSY, side)
    out = model(**inputs, merge_schedule=SCHEDULES[schedule])
    weighted(rows_of(out.logits, inputs), BUSY).backward()
    expected = oracle.gradients()
    for name, parameter in model.named_parameters():
        assert_exact(parameter.grad, expected.pop(name))
    assert not expected


def labels_of(inputs):
    """Every real token after the first is to be predicted, visual ones too; padding is not."""
    mask = inputs["attention_mask"]
    first = torch.nn.functional.one_hot(mask.argmax(1), mask.shape[1])
    return inputs["input_ids"].masked_fill((mask == 0) | (first == 1), -100)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("schedule", ["paper", "ratios", "window"])
def test_gradient_checkpointing_changes_nothing(model, schedule, reentrant):
    inputs = movies(BUSY)
    twin = copy.deepcopy(model).train()
    model.train()
    twin.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    losses = []
    for net in (model, twin):
        loss = net(**inputs, labels=labels_of(inputs), merge_schedule=SCHEDULES[schedule], use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert_exact(*losses)
    for (name, plain), saved in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert plain.grad is not None, name
        assert_exact(saved.grad, plain.grad)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_no_gradient_and_everything_else_does(model, side):
    inputs = movies(BUSY, side)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    pixels = inputs["pixel_values_videos"].requires_grad_()
    out = model(**without(inputs, "input_ids"), inputs_embeds=embeds, merge_schedule=MIXED)
    weighted(rows_of(out.logits, inputs), BUSY).backward()
    mask = inputs["attention_mask"].bool()
    visual = torch.isin(inputs["input_ids"], torch.tensor([PATCH, FRAME, LINE]))
    assert (embeds.grad[~mask] == 0).all()
    assert (embeds.grad[mask & ~visual] != 0).any(-1).all()
    assert (pixels.grad != 0).any(-1).all()


@pytest.mark.parametrize("schedule", ["ratios", "paper", "first"])
def test_pixels_pass_gradcheck_through_the_whole_model(schedule):
    model = double_model().requires_grad_(False)
    ids = words(1) + video(*3 * [(1, 2)]) + words(2)
    inputs = movie(ids)

    def logits(pixels):
        return model(**{**inputs, "pixel_values_videos": pixels}, merge_schedule=SCHEDULES[schedule]).logits

    torch.autograd.gradcheck(logits, inputs["pixel_values_videos"].requires_grad_(), fast_mode=True)


def test_the_loss_of_a_batch_is_the_mean_over_the_oracles_tokens(model):
    inputs = movies(BUSY)
    oracle = Oracle(model)
    parts = [cross_entropy(oracle.sample(ids, MIXED, i).logits, torch.tensor(ids)) for i, ids in enumerate(BUSY)]
    expected = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    out = model(**inputs, labels=labels_of(inputs), merge_schedule=MIXED)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-6, atol=0)


# what is refused, and what is left to the plain path


@torch.no_grad()
def test_a_window_that_holds_the_sequence_is_exact(kernel):
    for name, text in (
        ("mistral", {"sliding_window": 70}),
        ("qwen2", {"sliding_window": 70, "use_sliding_window": True, "max_window_layers": 3}),
    ):
        model = double_model(name, text=text)
        model.set_attn_implementation(kernel)
        oracle = Oracle(model)
        inputs = movies(BUSY)
        out = model(**inputs, merge_schedule=MIXED, use_cache=True)
        assert_is_oracle(out, inputs, [oracle.sample(ids, MIXED, i) for i, ids in enumerate(BUSY)])


@torch.no_grad()
def test_a_window_shorter_than_the_sequence_is_refused(kernel):
    model = double_model("mistral", text={"sliding_window": 40})
    model.set_attn_implementation(kernel)
    with pytest.raises(ConfigurationError, match="see 40 tokens back"):
        model(**movies(BUSY), merge_schedule=MIXED)
    inputs = movies([BUSY[4], BUSY[2]])  # 37 and 6 tokens
    oracle = Oracle(model)
    out = model(**inputs, merge_schedule=MIXED)
    assert_is_oracle(out, inputs, [oracle.sample(BUSY[4], MIXED, 0), oracle.sample(BUSY[2], MIXED, 1)])


@torch.no_grad()
def test_a_cache_that_outgrows_the_window_is_refused():
    model = double_model("mistral", text={"sliding_window": 54})
    inputs = movie(BUSY[0])  # 51 tokens
    out = model(**inputs, merge_schedule=MIXED, use_cache=True)
    step = {"input_ids": torch.tensor([words(2)]), "past_key_values": out.past_key_values}
    out = model(**step, position_ids=torch.tensor([[51, 52]]))
    with pytest.raises(ConfigurationError, match="see 54 tokens back"):
        model(**step, position_ids=torch.tensor([[53, 54]]))


def test_attention_weights_are_refused_with_merging():
    model = deep_model()
    model.set_attn_implementation("eager")
    inputs = movies(BUSY, dtype=torch.float32)
    with pytest.raises(ConfigurationError, match="output_attentions"):
        model(**inputs, merge_schedule=MIXED, output_attentions=True)
    assert len(model(**inputs, merge_schedule="none", output_attentions=True).attentions) == LAYERS


@torch.no_grad()
def test_a_batch_without_video_takes_the_plain_path(model):
    inputs = movies([words(7), words(4, 1)])
    assert torch.equal(model(**inputs, merge_schedule=MIXED).logits, model(**inputs, merge_schedule="none").logits)


@torch.no_grad()
def test_embeddings_instead_of_ids(model, found):
    inputs = movies(BUSY)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    out = model(**without(inputs, "input_ids"), inputs_embeds=embeds, merge_schedule=MIXED)
    assert_is_oracle(out, inputs, found("paper"))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_some_positions_only(model, side):
    """`logits_to_keep` counts positions of the input, merged or not."""
    inputs = movies(BUSY, side)
    whole = model(**inputs, merge_schedule=MIXED).logits
    assert_exact(model(**inputs, merge_schedule=MIXED, logits_to_keep=1).logits, whole[:, -1:])
    assert_exact(model(**inputs, merge_schedule=MIXED, logits_to_keep=20).logits, whole[:, -20:])
    some = torch.tensor([0, 7, 12, 30])
    assert_exact(model(**inputs, merge_schedule=MIXED, logits_to_keep=some).logits, whole[:, some])


@torch.no_grad()
def test_the_schedule_of_the_config_of_the_model_and_of_the_call(model, found):
    inputs = movies(BUSY)
    assert_is_oracle(model(**inputs), inputs, found("none"))
    model.set_merge_schedule(SCHEDULES["ratios"])
    assert_is_oracle(model(**inputs), inputs, found("ratios"))
    assert_is_oracle(model(**inputs, merge_schedule=MIXED), inputs, found("paper"))
    assert_is_oracle(model(**inputs, merge_schedule="none"), inputs, found("none"))
    model.set_merge_schedule("none")
    assert_is_oracle(model(**inputs), inputs, found("none"))


@torch.no_grad()
def test_small_videos_and_short_samples(model, oracle):
    """RAGGED has videos of one to four frames; also a sample that is nothing but a frame."""
    samples = [*RAGGED, [START, FRAME, PATCH, LINE, END], words(1)]
    inputs = movies(samples, "right")
    for schedule in ("paper", "table5", "first", "window"):
        out = model(**inputs, merge_schedule=SCHEDULES[schedule])
        expected = [oracle.sample(ids, SCHEDULES[schedule], i) for i, ids in enumerate(samples)]
        assert_is_oracle(out, inputs, expected)


# prefill and decode


GROWTH = (1, 1, 3, 1)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_cached_step_is_the_oracle_of_the_grown_sequence(model, oracle, schedule, side):
    extra = [words(sum(GROWTH), 50 + i) for i in range(len(BUSY))]
    expected = [
        oracle.sample(ids + more, SCHEDULES[schedule], i) for i, (ids, more) in enumerate(zip(BUSY, extra, strict=True))
    ]
    inputs = movies(BUSY, side)
    out = model(**inputs, merge_schedule=SCHEDULES[schedule], use_cache=True)
    mask, done = inputs["attention_mask"], 0
    for step in GROWTH:
        mask = torch.cat([mask, torch.ones(len(BUSY), step, dtype=torch.long)], 1)
        out = model(
            input_ids=torch.tensor([more[done : done + step] for more in extra]),
            attention_mask=mask,
            position_ids=positions(mask)[:, -step:],
            past_key_values=out.past_key_values,
            merge_schedule=SCHEDULES[schedule],
        )
        for row, run, ids in zip(out.logits, expected, BUSY, strict=True):
            assert_exact(row, run.logits[len(ids) + done : len(ids) + done + step])
        done += step
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + done


@torch.no_grad()
def test_a_cached_step_needs_no_mask_and_no_positions(model, oracle):
    """generate() drops a mask of ones, so what is dead must be known to the cache."""
    inputs = movie(BUSY[0])
    more = words(3, 50)
    expected = oracle.sample(BUSY[0] + more, MIXED).logits
    out = model(**without(inputs, "attention_mask", "position_ids"), merge_schedule=MIXED, use_cache=True)
    for i, token in enumerate(more):
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
        assert_exact(out.logits[0, -1], expected[len(BUSY[0]) + i])


@torch.no_grad()
def test_a_second_video_on_a_filled_cache_is_one_run_of_both(model, oracle):
    """Each turn may have a schedule of its own."""
    second = [
        video(*3 * [(2, 2)]) + words(2, 30),
        words(5, 31),
        words(2, 32) + video(*4 * [(1, 2)]) + video((2, 1), (2, 1)),
        video((1, 1)) + words(1, 33),
        words(1, 34) + video(*3 * [(1, 2), (2, 2)]) + words(2, 35),
    ]
    for one, two in (("paper", "paper"), ("ratios", "paper"), ("none", "ratios"), ("paper", "none")):
        first, later = movies(BUSY), movies(second, seeds=range(100, 105))
        out = model(**first, merge_schedule=SCHEDULES[one], use_cache=True)
        mask = torch.cat([first["attention_mask"], later["attention_mask"]], 1)
        step = later["input_ids"].shape[1]
        out = model(
            **{**later, "attention_mask": mask, "position_ids": positions(mask)[:, -step:]},
            past_key_values=out.past_key_values,
            merge_schedule=SCHEDULES[two],
        )
        for i, row in enumerate(rows_of(out.logits, later)):
            patches = [moving_pixels(BUSY[i], i), moving_pixels(second[i], 100 + i)]
            patches = [part for part in patches if part is not None]
            turns = [(BUSY[i], SCHEDULES[one]), (second[i], SCHEDULES[two])]
            run = oracle.turns(turns, torch.cat(patches) if patches else None)
            assert_exact(row, run.logits[len(BUSY[i]) :])
            assert out.past_key_values.tokens_per_layer[:, i].tolist() == run.tokens_per_layer


def test_a_mask_without_a_hole_and_none_are_one(model):
    inputs = movie(BUSY[0])
    given = model(**inputs, merge_schedule=MIXED).logits
    assert torch.equal(model(**without(inputs, "attention_mask"), merge_schedule=MIXED).logits, given)


def test_ready_four_dimensional_masks_are_refused_with_merging(model):
    """They say who sees whom in the input; merged tokens are not in it."""
    inputs = movies(BUSY)
    ready = torch.ones(len(BUSY), 1, *2 * inputs["input_ids"].shape[1:], dtype=torch.bool).tril()
    with pytest.raises(ConfigurationError, match="attention_mask"):
        model(**{**inputs, "attention_mask": ready}, merge_schedule=MIXED)
