"""Rows of one prefix and many questions: each question is exactly its own single-turn conversation, merged or not."""

import flash_reference
import pytest
import torch
from merging_cases import assert_exact, double_model, gradients, moving_pixels
from tiny_elva import END, PATCH, PIXELS, START, batch, video, words

from elva_hf.attention_elva import Packing
from elva_hf.data.collator import shared_prefix_mask
from elva_hf.errors_elva import ConfigurationError, PlaceholderError
from elva_hf.packing_elva import count_questions

THRESHOLD = [{"layer": 1, "similarity_threshold": 0.6}]
BOTH = [{"layer": 1, "similarity_threshold": 0.6}, {"layer": 2, "target_ratio": 0.5}]
ROWS = [
    ([*words(2), *video((2, 2), (2, 2), (2, 2), (2, 2))], [words(4, 1), words(7, 2), words(2, 3)]),
    ([*video((1, 3), (1, 3)), *words(1), *video((2, 1), (2, 1), (2, 1))], [words(3, 4)]),
    (words(5, 8), [words(3, 5), words(4, 6)]),
]


def shared(rows):
    """A right-padded batch of rows: ids, mask, positions that start again, segments, and the movies' pixels."""
    ids, segments, places = [], [], []
    for prefix, questions in rows:
        ids.append([*prefix, *(token for one in questions for token in one)])
        segments.append([0] * len(prefix) + [k for k, one in enumerate(questions, 1) for _ in one])
        restarted = [len(prefix) + i for one in questions for i in range(len(one))]
        places.append([*range(len(prefix)), *restarted])
    inputs = batch(ids, "right")
    width = inputs["input_ids"].shape[1]

    def padded(lists, fill):
        return torch.tensor([one + [fill] * (width - len(one)) for one in lists])

    return {
        **inputs,
        "segment_ids": padded(segments, -1),
        "position_ids": padded(places, 0),
        "pixel_values_videos": pixels_of(rows),
    }


def pixels_of(rows):
    return torch.cat([own_pixels(prefix, i) for i, (prefix, _) in enumerate(rows)])


def own_pixels(prefix, seed):
    drawn = moving_pixels(prefix, seed)
    return torch.zeros(0, PIXELS, dtype=torch.float64) if drawn is None else drawn.double()


def alone(model, i, question):
    """The conversation of one question by itself."""
    prefix = ROWS[i][0]
    inputs = batch([prefix + question])
    pixels = own_pixels(prefix, i)
    given = {"pixel_values_videos": pixels} if len(pixels) else {}
    return model(**inputs, **given, use_cache=False).logits[0, len(prefix) :]


def model_with(schedule, kernel="sdpa", **text):
    model = double_model(text={"num_hidden_layers": 4, **text})
    model.set_attn_implementation(kernel)
    model.set_merge_schedule(schedule)
    return model


@pytest.mark.parametrize("schedule", ["none", THRESHOLD, BOTH])
def test_a_question_gets_exactly_what_it_gets_alone(schedule):
    model = model_with(schedule)
    logits = model(**shared(ROWS), use_cache=False).logits
    for i, (prefix, questions) in enumerate(ROWS):
        start = len(prefix)
        for question in questions:
            assert_exact(logits[i, start : start + len(question)], alone(model, i, question))
            start += len(question)


@pytest.mark.parametrize("kernel", ["eager", "flash_attention_2"])
def test_other_kernels_agree_with_sdpa(kernel, monkeypatch):
    expected = model_with(BOTH)(**shared(ROWS), use_cache=False).logits
    if kernel.startswith("flash"):
        flash_reference.install(monkeypatch)
    model = model_with(BOTH, kernel)
    logits = model(**shared(ROWS), use_cache=False).logits
    real = shared(ROWS)["attention_mask"] == 1
    torch.testing.assert_close(logits[real], expected[real], rtol=3e-6, atol=3e-6)


def test_without_merging_it_is_the_four_dimensional_mask():
    model = model_with("none")
    inputs = shared(ROWS)
    real = inputs["attention_mask"] == 1
    logits = model(**inputs, use_cache=False).logits
    inputs["attention_mask"] = shared_prefix_mask(inputs.pop("segment_ids")).double()
    assert_exact(logits[real], model(**inputs, use_cache=False).logits[real])


def test_gradients_are_the_sum_of_the_conversations():
    model = model_with(BOTH)
    weights = torch.randn(200, dtype=torch.float64)
    inputs = shared(ROWS)
    logits = model(**inputs, use_cache=False).logits
    questions = (inputs["segment_ids"] > 0).double()[..., None]
    (logits * questions * weights[: logits.shape[1], None]).sum().backward()
    together = gradients(model)
    model.zero_grad()
    for i, (prefix, asked) in enumerate(ROWS):
        start = len(prefix)
        for question in asked:
            stop = start + len(question)
            (alone(model, i, question) * weights[start:stop, None]).sum().backward()
            start = stop
    for name, gradient in gradients(model).items():
        assert_exact(together[name], gradient)


def test_checkpointing_changes_nothing():
    model = model_with(BOTH).train()
    inputs = shared(ROWS)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["segment_ids"] < 1, -100)
    model(**inputs, use_cache=False).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(**inputs, use_cache=False).loss.backward()
    for name, gradient in gradients(model).items():
        assert_exact(gradient, plain[name])


def test_a_question_reads_its_prefix_and_itself_and_no_other():
    model = model_with("none")
    packing = Packing.share(model.model.language_model.layers[0].self_attn.config, [[2, 1, 3], [1]], torch.zeros(1))
    assert packing.query_lengths == [2, 1, 3, 1]
    assert packing.key_lengths == [2, 3, 5, 1]
    assert packing.key_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 6]


def test_many_questions_make_no_mask_of_all_by_all():
    model = model_with("none")
    packing = Packing.share(model.model.language_model.layers[0].self_attn.config, [[50] + [2] * 40], torch.zeros(1))
    assert max(mask.numel() for mask in packing.masks if mask is not None) <= 2 * 52


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[1, 1, 2, 2]], "must start with the prefix"),
        ([[0, 2, 2, 2]], "in order; got \\[0, 2\\]"),
        ([[0, 1, 0, 1]], "in order; got \\[0, 1, 0, 1\\]"),
        ([[0, 1]], "expected \\(1, 4\\)"),
    ],
)
def test_segments_out_of_order_are_refused(segments, message):
    with pytest.raises(PlaceholderError, match=message):
        count_questions(torch.tensor(segments), torch.ones(1, 4, dtype=torch.bool))


def test_a_video_in_a_question_is_refused():
    model = model_with("none")
    inputs = shared([(words(2), [video((1, 2))])])
    assert {START, END, PATCH} <= set(inputs["input_ids"][0].tolist())
    with pytest.raises(PlaceholderError, match="a video stands in a question"):
        model(**{**inputs, "pixel_values_videos": torch.zeros(2, PIXELS, dtype=torch.float64)}, use_cache=False)


def test_no_cache_is_made_and_one_asked_for_is_refused():
    assert model_with("none")(**shared(ROWS)).past_key_values is None
    with pytest.raises(ConfigurationError, match="pass use_cache=False"):
        model_with("none")(**shared(ROWS), use_cache=True)


def test_a_decoder_that_cannot_pack_says_so():
    model = double_model("gemma2", text={"query_pre_attn_scalar": 8})
    with pytest.raises(ConfigurationError, match="rows of one question"):
        model(**shared(ROWS), use_cache=False)
