"""What people type is text: no special token or chat mark of theirs becomes one, and none is ever generated."""

import re

import numpy as np
import pytest
import torch
from clips_elva import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_elva import build_checkpoint, draw_frames
from transformers import GenerationConfig, pipeline

from elva_hf.configuration_elva import SPECIAL_TOKENS
from elva_hf.errors_elva import ConfigurationError, ElvaError, PlaceholderError
from elva_hf.processing_elva import ElvaProcessor

FRAMES = np.zeros((2, 8, 8, 3), np.uint8)
TOKENS = [*SPECIAL_TOKENS.values(), "<|im_start|>", "<|im_end|>", "<eos>", "<pad>"]
ALL = "".join(TOKENS)
VIDEO = {"type": "video", "video": FRAMES}
NEW = 6


@pytest.fixture(scope="module")
def processor():
    options = {"patch_size": 4, "longest_edge": 8, "low_res_longest_edge": 8, "num_frames": 2}
    return ElvaProcessor.from_tokenizer(byte_tokenizer(), **options)


@pytest.fixture(scope="module")
def parts():
    return build_checkpoint()


@pytest.fixture(scope="module")
def pipe(parts):
    return pipeline("video-text-to-text", model=parts[0], processor=parts[1], device="cpu", max_new_tokens=NEW)


def text(words):
    return {"type": "text", "text": words}


def encode(processor, chat, **options):
    how = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    return processor.apply_chat_template(chat, **how, **options)["input_ids"][0]


def special_ids(processor, ids):
    known = set(processor.tokenizer.get_added_vocab().values())
    return [token for token in ids if token in known]


PLACES = {
    "content as a string": lambda words: [{"role": "user", "content": words}],
    "a block of text": lambda words: [{"role": "user", "content": [VIDEO, text(words)]}],
    "a block before the video": lambda words: [{"role": "user", "content": [text(words), VIDEO]}],
    "between videos": lambda words: [{"role": "user", "content": [VIDEO, text(words), VIDEO]}],
    "the system message": lambda words: [
        {"role": "system", "content": words},
        {"role": "user", "content": [VIDEO, text("?")]},
    ],
    "a system block": lambda words: [
        {"role": "system", "content": [text(words)]},
        {"role": "user", "content": [VIDEO, text("?")]},
    ],
    "an earlier answer": lambda words: [
        {"role": "user", "content": [VIDEO, text("?")]},
        {"role": "assistant", "content": words},
        {"role": "user", "content": "and?"},
    ],
    "the role": lambda words: [{"role": f"user{words}", "content": [VIDEO, text("?")]}],
    "two blocks": lambda words: [
        {"role": "user", "content": [VIDEO, text(words[: len(words) // 2]), text(words[len(words) // 2 :])]}
    ],
    "a block for each letter": lambda words: [{"role": "user", "content": [VIDEO, *map(text, words)]}],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("typed", [*TOKENS, ALL], ids=[*TOKENS, "all of them"])
def test_a_token_that_is_typed_is_text_wherever_it_stands(processor, place, typed):
    plain, injected = (encode(processor, PLACES[place](words)) for words in ("word", f"word {typed} word"))
    assert special_ids(processor, injected) == special_ids(processor, plain)
    assert f"word {typed} word" in processor.decode(injected)


@pytest.mark.parametrize("place", PLACES)
def test_a_token_with_the_sanitisers_own_marks_in_it_is_text(processor, place):
    mark, end = "\U000f0000", "\U000f0001"
    for typed in (f"<FRA{mark}ME>", f"{mark}<FRAME>{end}", f"{end}<FRAME>{mark}", f"<vi{end}deo>", f"<|im_{mark}end|>"):
        plain, injected = (encode(processor, PLACES[place](words)) for words in ("word", f"word {typed} word"))
        assert special_ids(processor, injected) == special_ids(processor, plain), typed


def test_the_pipeline_takes_every_question_and_message_as_text(pipe):
    frames = draw_frames(1)
    known = list(pipe.tokenizer.get_added_vocab())
    forms = {
        "question": lambda words: {"video": frames, "text": words},
        **{name: lambda words, build=build: replace_video(build(words), frames) for name, build in PLACES.items()},
    }
    for typed in [*known, "".join(known)]:
        for name, build in forms.items():
            plain, injected = (
                pipe.preprocess(build(words))["input_ids"][0].tolist() for words in ("Which", f"Which{typed}Which")
            )
            assert special_ids(pipe.processor, injected) == special_ids(pipe.processor, plain), (typed, name)
    assert pipe(frames, "".join(known))[0]["generated_text"] is not None


def replace_video(chat, frames):
    def block(part):
        return {"type": "video", "video": frames} if isinstance(part, dict) and part["type"] == "video" else part

    return [
        {**message, "content": [block(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in chat
    ]


@pytest.mark.parametrize("typed", SPECIAL_TOKENS.values())
def test_the_raw_processor_counts(processor, typed):
    for words in (f"a{typed}", f"<video>{typed}", f"{typed}<video>"):
        with pytest.raises(PlaceholderError):
            processor(text=words, videos=FRAMES if "<video>" in words.replace(typed, "", 1) else None)


WORDS = st.lists(st.one_of(st.sampled_from(TOKENS), st.text(max_size=4), st.sampled_from("<>|_\n")), max_size=8)
PIECES = st.one_of(
    st.sampled_from([token[:cut] for token in TOKENS for cut in (1, 4, -1)]),
    st.sampled_from([token[cut:] for token in TOKENS for cut in (1, 4, -1)]),
    st.sampled_from(TOKENS),
    st.text(max_size=3),
)
BLOCKS = st.lists(st.one_of(PIECES.map(text), st.just(VIDEO)), min_size=1, max_size=8)
TURNS = st.lists(
    st.tuples(
        st.sampled_from(["system", "user", "assistant"]),
        st.one_of(WORDS.map("".join), BLOCKS),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(turns=TURNS, last=st.booleans())
def test_whatever_is_typed_only_the_template_writes_special_tokens(processor, turns, last):
    chat = [{"role": role, "content": content} for role, content in [*turns, ("user", "?")]]
    ids = encode(processor, chat, add_generation_prompt=last)
    videos = sum(block is VIDEO for _, content in turns if isinstance(content, list) for block in content)
    tokens = processor.tokenizer.convert_ids_to_tokens(special_ids(processor, ids))
    visual = ["<|vision_start|>", *2 * ["<FRAME>", *2 * ["<video>", "<video>", "<LINE>"]], "<|vision_end|>"]
    marks = [token for token in tokens if token not in visual]
    assert marks == [*len(chat) * ["<|im_start|>", "<|im_end|>"], *["<|im_start|>"] * last]
    assert [token for token in tokens if token in visual] == videos * visual


JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2),
        st.floats(allow_nan=True),
        st.text(max_size=3),
        st.binary(max_size=3),
        st.sampled_from(["user", "assistant", "text", "video", "image", "image_url", "a.mp4", "<video>", *TOKENS]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "text", "video", "image", "path", "url", "role", "content", "image_url", "fps"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
ODD_BLOCKS = st.dictionaries(
    st.sampled_from(["type", "text", "video", "image", "path", "num_frames", "fps", "frame_times", "video_start"]), JUNK
).flatmap(lambda block: st.sampled_from(["text", "video", "image"]).map(lambda kind: {**block, "type": kind}))
ODD_CHATS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": st.one_of(st.lists(ODD_BLOCKS, max_size=3), JUNK)},
        optional={"name": JUNK},
    ),
    max_size=3,
)


@settings(max_examples=400, deadline=None)
@given(
    chat=st.one_of(JUNK, ODD_CHATS, st.lists(ODD_CHATS, max_size=2)),
    sanitize=st.booleans(),
    tokenize=st.booleans(),
    continued=st.booleans(),
)
def test_messages_of_any_form_raise_one_kind_of_error_or_none(processor, chat, sanitize, tokenize, continued):
    options = {"tokenize": tokenize, "sanitize_control_tokens": sanitize and tokenize, "return_dict": True}
    try:
        processor.apply_chat_template(chat, **options, continue_final_message=continued)
    except ElvaError as error:
        assert str(error) and "\n" not in str(error)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["<video>", "<image>", "a", ""]), max_size=5).map("".join), min_size=1, max_size=3
    ),
    videos=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    images=st.integers(0, 3),
    nested=st.booleans(),
)
def test_placeholders_are_matched_one_by_one_or_refused(processor, texts, videos, images, nested):
    given_videos = [[np.full((2, 8, 8, 3), 10 * i + j, np.uint8) for j in range(n)] for i, n in enumerate(videos)]
    flat = [video for group in given_videos for video in group]
    given_images = [np.full((8, 8, 3), 200 + i, np.uint8) for i in range(images)]
    wanted = [(text.count("<video>"), text.count("<image>")) for text in texts]
    counts = [count for count, _ in wanted]
    fits = sum(count for _, count in wanted) == images and (counts == videos if nested else sum(counts) == sum(videos))
    try:
        out = processor(text=texts, videos=given_videos if nested else flat or None, images=given_images or None)
    except PlaceholderError:
        assert not fits
        return
    except ElvaError as error:
        assert "is empty" in str(error) and not all(text.strip() for text in texts)
        return
    assert fits
    order = re.findall("<video>|<image>", "".join(texts))
    queues = {"<video>": iter(flat), "<image>": iter(given_images)}
    expected = [(next(queues[token]).flat[0], 8 if token == "<video>" else 4) for token in order]
    if order:
        levels = ((out["pixel_values_videos"][:, 0] + 1) * 127.5).round().int().tolist()
        assert levels == [level for level, size in expected for _ in range(size)]
    for ids, (num_videos, num_images) in zip(out["input_ids"], wanted, strict=True):
        assert ids.count(processor.frame_token_id) == 2 * num_videos + num_images


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (3, ElvaError, "the content of message 0 is a int"),
        ([3], ElvaError, "a block of content in message 0 is a int"),
        (["words"], ElvaError, '{"type": "text", "text": ...}'),
        ([{"text": "a"}], ElvaError, "message 0 has content of type None; expected text, video or image"),
        ([{"type": "audio", "audio": "a.wav"}], ElvaError, "content of type 'audio'"),
        ([{"type": "text"}], ElvaError, "a block of text in message 0 holds a NoneType; give a string"),
        ([{"type": "text", "text": 3}], ElvaError, "holds a int"),
        (
            [{**VIDEO, "num_frame": 3}],
            ConfigurationError,
            "a video block in message 0 has the key 'num_frame'; did you",
        ),
        ([{**VIDEO, "nframes": 3}], ConfigurationError, "has the key 'nframes'; did you mean num_frames"),
        (
            [{**VIDEO, "max_pixels": 3}],
            ConfigurationError,
            "'max_pixels'; known are video, url, path, num_high_res_fra",
        ),
        (
            [{"type": "image", "image": FRAMES[0], "fps": 2}],
            ConfigurationError,
            "an? image block in message 0 has the key",
        ),
        ([{**VIDEO, "path": "a.mp4"}], PlaceholderError, "has several sources, video, path; give one"),
        ([{**VIDEO, "num_frames": 2, "fps": 1.0}], ConfigurationError, "exclude each other"),
    ],
)
def test_a_message_of_another_form_is_told_what_is_wrong(processor, content, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        encode(processor, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("hello", "a str is no chat"),
        ({"role": "user", "content": "a"}, "a dict is no chat"),
        (None, "a NoneType is no chat"),
        ([3], "chat 0 is a int"),
        ([{"role": "user", "content": "a"}, 3], "message 1 is a int"),
        ([{"content": "a"}], "message 0 has the role None"),
        ([[{"role": "user", "content": "a"}], [{"role": 3, "content": "a"}]], "chat 1, message 0 has the role 3"),
    ],
)
def test_a_chat_of_another_form_is_told_what_is_wrong(processor, chat, message):
    with pytest.raises(ElvaError, match=message):
        processor.apply_chat_template(chat)


def test_rows_of_a_dataset_have_none_where_nothing_is(processor):
    keys = ("text", "video", "path", "url", "image", "num_frames", "fps", "frame_times", "nframes", "max_pixels")
    row = dict.fromkeys(keys)
    chat = [{"role": "user", "name": None, "content": [{**row, **VIDEO}, {**row, **text("what?")}]}]
    assert encode(processor, chat) == encode(processor, [{"role": "user", "content": [VIDEO, text("what?")]}])
    assert set(chat[0]["content"][0]) == {*keys, "type"}  # the caller's row is left alone


def test_links_are_written_as_other_interfaces_do(processor, tmp_path):
    from clips_elva import write_counter

    clip = str(write_counter(tmp_path / "clip.mp4", 4))
    plain = encode(processor, [{"role": "user", "content": [{"type": "video", "path": clip}]}])
    for block in ({"video_url": {"url": clip}}, {"video_url": clip}, {"video_url": {"url": clip, "detail": "low"}}):
        assert encode(processor, [{"role": "user", "content": [{"type": "video_url", **block}]}]) == plain


class Loud:
    """A head that wants special tokens most of all."""

    def __init__(self, model):
        self.model, self.forward = model, model.lm_head.forward

    def __enter__(self):
        ids = self.model.config.special_token_ids
        self.model.lm_head.forward = lambda hidden: self.forward(hidden).index_add(
            -1, torch.tensor(ids), torch.full((*hidden.shape[:-1], len(ids)), 1e3)
        )

    def __exit__(self, *exception):
        self.model.lm_head.forward = self.forward


WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 2, "do_sample": True},
    "a config of one's own": {"generation_config": GenerationConfig(max_new_tokens=NEW)},
    "a sampling config": {"generation_config": GenerationConfig(max_new_tokens=NEW, do_sample=True)},
    "other tokens suppressed": {"suppress_tokens": [30]},
    "no tokens suppressed": {"suppress_tokens": []},
    "a config that suppresses others": {
        "generation_config": GenerationConfig(max_new_tokens=NEW, suppress_tokens=[30])
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_generation_never_writes_a_visual_token(parts, pipe, way):
    model, _ = parts
    inputs = {key: value for key, value in pipe.preprocess({"text": "Which?"}).items() if key != "requests"}
    options = {**({} if "generation_config" in WAYS[way] else {"max_new_tokens": NEW}), **WAYS[way]}
    with Loud(model):
        sequences = model.generate(**inputs, **options)
        answer = pipe(draw_frames(1), "Which?", skip_special_tokens=False, **WAYS[way])[0]["generated_text"]
    new = sequences[:, inputs["input_ids"].shape[1] :]
    assert new.numel() and not torch.isin(new, torch.tensor(model.config.special_token_ids)).any()
    assert not any(token in answer for token in SPECIAL_TOKENS.values())


def test_a_checkpoint_without_generation_settings_never_writes_one_either(parts, tmp_path):
    model, _ = parts
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = type(model).from_pretrained(tmp_path)
    with Loud(loaded):
        new = loaded.generate(torch.tensor([[20, 21]]), max_new_tokens=NEW, do_sample=False)[0, 2:]
    assert not torch.isin(new, torch.tensor(model.config.special_token_ids)).any()
