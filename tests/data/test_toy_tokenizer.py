"""The toy tokenizer: every text round-trips, every word of the world is one token, every build is the same."""

import pytest
from transformers import AutoTokenizer

from elva_hf.data.toy_tokenizer import SPECIAL_TOKENS, build_toy_tokenizer
from elva_hf.data.toy_world import questions, sample_scene, vocabulary

TEXTS = [
    "",
    " ",
    "What color is the circle?",
    "Grüße, 世界! 🎬\n\t\r  two  spaces ",
    "\x00\x7f e\u0301 \u200b",
    "isn't it? don't , . clean up !",
    "Ġ is a letter too",
    bytes(range(256)).decode("latin-1"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_toy_tokenizer()


@pytest.fixture(scope="module")
def asked():
    return [question for seed in range(1500) for question in questions(sample_scene(seed))]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_every_answer_word_is_one_token_with_and_without_a_space(tokenizer):
    for word in vocabulary()[0]:
        assert len(tokenizer(word).input_ids) == 1, word
        assert len(tokenizer(f" {word}").input_ids) == 1, word


def test_every_question_is_one_token_a_word_and_one_for_the_question_mark(tokenizer, asked):
    for text in {question.text for question in asked}:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 1, text
        assert tokenizer.decode(ids) == text


def test_the_vocabulary_names_every_word_of_the_world(asked):
    answers, words = vocabulary()
    assert {word for question in asked for word in question.answer.split()} == set(answers)
    assert {word for question in asked for word in question.text.rstrip("?").split()} <= set(words)


def test_special_tokens_follow_the_bpe_vocabulary_in_order(tokenizer):
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, len(tokenizer)))
    assert 400 < len(tokenizer) <= 520
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.padding_side == "left"
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)


def test_special_tokens_are_one_token_inside_text_and_can_be_left_out(tokenizer):
    ids = tokenizer("a<video>b<|im_end|>").input_ids
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "a<video>b<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_two_builds_and_a_reload_are_equal(tokenizer, tmp_path):
    assert build_toy_tokenizer().backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "left"
    assert loaded.all_special_ids == tokenizer.all_special_ids
    for text in TEXTS:
        assert loaded(text).input_ids == tokenizer(text).input_ids
