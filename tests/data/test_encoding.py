"""Rows -> ids and labels: the ids are those of inference, and only the assistant's words are learnt."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips_elva import byte_tokenizer
from saved_elva import build_checkpoint, draw_frames, write_clip
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from elva_hf.data import encoding
from elva_hf.data.encoding import EncodedSample, check_template, encode_row, plan_row
from elva_hf.data.packing import IGNORED, restart_positions
from elva_hf.errors_elva import ConfigurationError, ContextOverflowError, ElvaError, VideoError
from elva_hf.processing_elva import ElvaProcessor

SIZES = {"patch_size": 16, "longest_edge": 64, "low_res_longest_edge": 32, "num_frames": 4}
SPOKEN = "a <video> b <|im_end|> c <|im_start|>user\n <FRAME><LINE> <|vision_start|> <image> d"
VIDEO = {"type": "video", "video": draw_frames(1)}
IMAGE = {"type": "image", "image": draw_frames(2, num_frames=1)[0]}


def greedy_tokenizer():
    """Merges over neighbouring line breaks and words, as real vocabularies do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ĊĊ", "Ġt", "Ġth", "Ġthe"]
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet + words)}, merges=merges))
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s?\w+|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def llama_tokenizer():
    """Spaces as in SentencePiece, one of them before the first word of a text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bytes, opened by <bos>": lambda: byte_tokenizer(bos=True),
    "merges": greedy_tokenizer,
    "SentencePiece": llama_tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def processor(request):
    return ElvaProcessor.from_tokenizer(TOKENIZERS[request.param](), **SIZES)


@pytest.fixture(scope="module")
def toy():
    return build_checkpoint()[1]


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text(words):
    return {"type": "text", "text": words}


def says(words):
    return {"role": "assistant", "content": words}


CHATS = {
    "one video": [user(VIDEO, text("what is it?")), says("a red square")],
    "system prompt": [{"role": "system", "content": "Be brief."}, user(VIDEO, text("what?")), says("red")],
    "several turns": [
        user(VIDEO, text("what?")),
        says("red"),
        user("and now?"),
        says("blue, I say"),
        user("?"),
        says("!"),
    ],
    "several media": [user(text("first"), VIDEO, text("then"), IMAGE, VIDEO, text("which?")), says("the second")],
    "media in turns": [user(VIDEO, text("what?")), says("red"), user(text("and here: "), IMAGE), says("blue")],
    "text after text": [user(VIDEO, text("wh"), text("at <vid"), text("eo>?")), says([text("it is "), text("red")])],
    "image": [user(IMAGE, text("what?")), says("red")],
    "video after text": [user(text("what is this? "), VIDEO), says("red")],
    "text only": [user("What is two and two?"), says("four")],
    "typed special tokens": [user(VIDEO, text(SPOKEN)), says(SPOKEN), user(SPOKEN), says(SPOKEN)],
    "spaces": [user(VIDEO, text(" what? ")), says(" red "), user("\n"), says("Grüße, 世界! \U0001f3ac")],
    "clip with options": [user({**VIDEO, "num_frames": 2}, text("what?")), says("red")],
}


def prompt_ids(processor, messages, **options):
    template = {"tokenize": True, "add_generation_prompt": True, "sanitize_control_tokens": True}
    return processor.apply_chat_template(messages, **template, **options)[0]


@pytest.mark.parametrize("name", CHATS)
def test_what_stands_before_each_answer_is_the_prompt_of_inference(processor, name):
    messages = CHATS[name]
    sample = encode_row({"messages": messages}, processor)
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    starts = [i for i in range(len(ids)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        assert ids[:start] == prompt_ids(processor, messages[:turn])
    assert ids == processor.apply_chat_template(messages, tokenize=True, sanitize_control_tokens=True)[0]


@pytest.mark.parametrize("name", CHATS)
def test_labels_are_the_answers_and_the_ends_of_their_turns(processor, name):
    messages = CHATS[name]
    sample = encode_row({"messages": messages}, processor)
    learnt = sample.labels != IGNORED
    assert torch.equal(sample.labels[learnt], sample.input_ids[learnt])
    runs = [
        [label for _, label in run]
        for spoken, run in itertools.groupby(enumerate(sample.labels.tolist()), lambda pair: pair[1] != IGNORED)
        if spoken
    ]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for run, answer in zip(runs, answers, strict=True):
        spoken = answer if isinstance(answer, str) else "".join(block["text"] for block in answer)
        assert run[-1] == end
        assert end not in run[:-1]
        assert processor.tokenizer.decode(run[:-1]) == spoken


def test_pixels_are_those_of_inference_in_the_order_of_the_chat(processor):
    messages = CHATS["several media"]
    sample = encode_row({"messages": messages, "id": "x7"}, processor, index=3)
    template = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages[:1], **template)
    assert torch.equal(sample.pixel_values_videos, inputs["pixel_values_videos"])
    assert sample.grids == (((4, 4),) * 4, ((4, 4),), ((4, 4),) * 4)
    assert sum(sample.patches_per_video) == len(sample.pixel_values_videos)
    assert (sample.sample_id, sample.index, sample.segment_ids) == ("x7", 3, None)


def test_an_answer_never_merges_with_the_line_break_before_it():
    processor = ElvaProcessor.from_tokenizer(greedy_tokenizer(), **SIZES)
    messages = [user(VIDEO, text("what?")), says("\nred"), user("the end?"), says("\n\nyes")]
    sample = encode_row({"messages": messages}, processor)
    first = prompt_ids(processor, messages[:1])
    assert sample.input_ids[: len(first)].tolist() == first
    assert sample.labels[len(first)] != IGNORED
    assert sample.labels[len(first) - 1] == IGNORED
    learnt = sample.labels[sample.labels != IGNORED]
    assert processor.tokenizer.decode(learnt) == "\nred<|im_end|>\n\nyes<|im_end|>"
    joined = processor.apply_chat_template(messages, tokenize=True, sanitize_control_tokens=True)[0]
    assert joined != sample.input_ids.tolist()  # the tokenizer would have merged


@pytest.mark.parametrize("name", [*CHATS, "independent"])
@pytest.mark.parametrize("options", [{}, {"num_frames": 7}, {"longest_edge": 32, "timestamps": True}])
def test_a_plan_is_the_length_of_the_sample_and_decodes_nothing(toy, name, options, monkeypatch, tmp_path):
    messages = CHATS.get(name, INDEPENDENT)
    path = write_clip(tmp_path / "clip.mp4", draw_frames(3), rate=4)
    messages = [dict(message) for message in messages]
    for message in messages:
        if not isinstance(message["content"], str):
            message["content"] = [
                {**block, "video": str(path)} if block["type"] == "video" else block for block in message["content"]
            ]
    row = {"messages": messages, "independent_turns": name == "independent"}
    expected = len(encode_row(row, toy, **options))

    def decode(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(type(toy.video_processor), "decode", decode)
    assert plan_row(row, toy, **options) == expected


INDEPENDENT = [
    {"role": "system", "content": "Be brief."},
    user(VIDEO, text("what is it?")),
    says("red"),
    user("where <video>?"),
    says("on the left of it"),
    user([text("why")][0]),
    says([text("who knows <|im_end|>")]),
]


def singles(messages):
    """The single-turn conversations that a row of independent turns stands for, by hand."""
    opening = [message for message in messages if message["role"] == "system"]
    turns = messages[len(opening) :]
    media = [block for block in turns[0]["content"] if block["type"] != "text"]
    for asked, answer in zip(turns[::2], turns[1::2], strict=True):
        texts = [text(asked["content"])] if isinstance(asked["content"], str) else asked["content"]
        yield [*opening, user(*media, *(block for block in texts if block["type"] == "text")), answer]


def test_independent_turns_are_the_single_turn_conversations(processor):
    packed = encode_row({"messages": INDEPENDENT, "independent_turns": True, "id": "r"}, processor, index=5)
    unpacked = packed.unpack()
    alone = [encode_row({"messages": messages}, processor) for messages in singles(INDEPENDENT)]
    assert len(unpacked) == len(alone) == 3
    for one, other in zip(unpacked, alone, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.pixel_values_videos, other.pixel_values_videos)
        assert (one.grids, one.sample_id, one.index, one.segment_ids) == (other.grids, "r", 5, None)
    shared = int((packed.segment_ids == 0).sum())
    assert packed.input_ids[shared - 1] == processor.video_end_token_id
    assert len(packed) == shared + sum(len(one) - shared for one in alone)


def test_a_video_is_decoded_once_for_many_independent_turns(processor, monkeypatch):
    decoded = []
    decode = type(processor.video_processor).decode
    monkeypatch.setattr(
        type(processor.video_processor), "decode", lambda *args: decoded.append(len(args[1])) or decode(*args)
    )
    encode_row({"messages": INDEPENDENT, "independent_turns": True}, processor)
    assert decoded == [1]


def test_media_of_independent_turns_come_before_the_text():
    processor = build_checkpoint()[1]
    messages = [user(text("what is this?"), IMAGE, VIDEO), says("red"), user("and?"), says("blue")]
    packed = encode_row({"messages": messages, "independent_turns": True}, processor)
    other = [user(IMAGE, VIDEO, text("what is this?")), *messages[1:]]
    again = encode_row({"messages": other, "independent_turns": True}, processor)
    assert torch.equal(packed.input_ids, again.input_ids)
    assert packed.grids == again.grids == (((4, 4),), ((4, 4),) * 8)


def test_independent_turns_of_text_share_what_they_have_in_common(toy):
    messages = [{"role": "system", "content": "You count."}, user("one"), says("two"), user("two"), says("three")]
    packed = encode_row({"messages": messages, "independent_turns": True}, toy)
    alone = singles([messages[0], user(text("one")), *messages[2:]])
    for one, single in zip(packed.unpack(), alone, strict=True):
        assert torch.equal(one.input_ids, encode_row({"messages": single}, toy).input_ids)
    same = [user("one"), says("two"), user("one"), says("two")]
    packed = encode_row({"messages": same, "independent_turns": True}, toy)
    assert all((one.labels != IGNORED).sum() == 2 for one in packed.unpack())


def test_one_independent_turn_is_an_ordinary_row(toy):
    row = {"messages": CHATS["one video"]}
    alone = encode_row({**row, "independent_turns": True}, toy)
    assert alone.segment_ids is None
    assert torch.equal(alone.input_ids, encode_row(row, toy).input_ids)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([user("a"), user("b"), says("c")], "user, user, assistant"),
        ([user("a"), says("b"), user("c")], "in turn"),
        ([user(VIDEO, text("a")), says("b"), user(IMAGE, text("c")), says("d")], "question 1 .* image of its own"),
    ],
)
def test_turns_that_cannot_be_independent_are_refused(toy, messages, match):
    with pytest.raises(ElvaError, match=match):
        encode_row({"messages": messages, "independent_turns": True}, toy)


def test_positions_restart_after_the_shared_part():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 3, 4, 3, 4, 5, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert restart_positions(segments).tolist() == expected
    assert EncodedSample(torch.arange(8), torch.arange(8), segment_ids=segments[0, :8]).position_ids.tolist() == [
        *expected[0][:8]
    ]


def test_frames_of_a_stage_are_options(toy):
    row = {"messages": CHATS["one video"]}
    assert encode_row(row, toy, num_frames=2).grids == (((4, 4),) * 2,)
    assert encode_row(row, toy, longest_edge=32).grids == (((2, 2),) * 8,)
    with pytest.raises(ConfigurationError, match="num_frames"):
        encode_row(row, toy, num_frame=2)


@pytest.mark.parametrize("independent", [False, True])
def test_a_row_over_the_context_is_refused_or_fitted_never_cut(toy, independent):
    messages = [user(VIDEO, text("a")), says("b"), user("c " * 40), says("d " * 40)]
    row = {"messages": messages, "independent_turns": independent}
    whole = encode_row(row, toy)
    longest = max(map(len, whole.unpack()))
    assert len(encode_row(row, toy, context_length=longest)) == len(whole)
    with pytest.raises(ContextOverflowError) as caught:
        encode_row(row, toy, context_length=longest - 1)
    assert (caught.value.needed, caught.value.limit) == (longest, longest - 1)
    fitted = encode_row(row, toy, context_length=longest - 1, overflow="fit")
    assert max(map(len, fitted.unpack())) < longest
    assert sum(fitted.labels != IGNORED) == sum(whole.labels != IGNORED)
    assert plan_row(row, toy, context_length=longest - 1, overflow="fit") == len(fitted)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("words", "messages"),
        ({"text": "a"}, "messages"),
        ({"messages": [user("a")]}, "assistant says nothing"),
        ({"messages": [[user("a"), says("b")]]}, "several chats"),
        ({"messages": [user("a"), {"role": "assistant", "content": [IMAGE, text("b")]}]}, "message 1 .* holds a image"),
    ],
)
def test_a_row_with_nothing_to_learn_is_refused(toy, row, match):
    with pytest.raises(ElvaError, match=match):
        encode_row(row, toy)


def test_a_template_without_generation_marks_is_refused(toy):
    plain = toy.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    other = ElvaProcessor(toy.tokenizer, toy.video_processor, chat_template=plain)
    for call in (check_template, lambda made: encode_row({"messages": CHATS["one video"]}, made)):
        with pytest.raises(ConfigurationError, match="endgeneration"):
            call(other)
    for tags in (("{% generation %}", "{% endgeneration %}"), ("{%-generation-%}", "{%-endgeneration-%}")):
        spelled = toy.chat_template.replace("{%- generation -%}", tags[0]).replace("{%- endgeneration -%}", tags[1])
        named = ElvaProcessor(toy.tokenizer, toy.video_processor, chat_template={"default": spelled})
        assert check_template(named) == spelled


def test_another_template_with_marks_says_what_is_learnt(toy):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}U: {% for b in m.content %}{{ '<video>' if b.type == 'video' else b.text }}"
        "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    processor = ElvaProcessor(toy.tokenizer, toy.video_processor, chat_template=template)
    messages = [user(VIDEO, text("what?")), says("red"), user(text("and?")), says("blue")]
    sample = encode_row({"messages": messages}, processor)
    start = len(prompt_ids(processor, messages[:1]))
    assert sample.input_ids[:start].tolist() == prompt_ids(processor, messages[:1])
    assert toy.tokenizer.decode(sample.labels[sample.labels != IGNORED]) == "red<|im_end|>blue<|im_end|>"


def test_an_answer_does_not_merge_with_what_the_template_writes_after_it():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<eos>{% generation %}{{ m.content }}{{ '\\n' }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    processor = ElvaProcessor.from_tokenizer(greedy_tokenizer(), chat_template=template, **SIZES)
    sample = encode_row({"messages": [user("what?"), says("red"), user("so?"), says("blue")]}, processor)
    assert processor.tokenizer.decode(sample.labels[sample.labels != IGNORED]) == "red\nblue\n"
    learnt = sample.labels != IGNORED
    assert torch.equal(sample.labels[learnt], sample.input_ids[learnt])
    assert processor.tokenizer.decode(sample.input_ids) == "what?\n<eos>red\n\nso?\n<eos>blue\n\n"


def test_a_video_that_cannot_be_read_is_a_video_error(toy, tmp_path):
    row = {"messages": [user({"type": "video", "path": str(tmp_path / "none.mp4")}, text("a")), says("b")]}
    for call in (encode_row, plan_row):
        with pytest.raises(VideoError) as caught:
            call(row, toy)
        assert caught.value.reason == "not_found"


def test_rows_are_not_changed(toy):
    row = {
        "messages": [user(dict(VIDEO), text("a")), says([text("b")]), user("c"), says("d")],
        "independent_turns": True,
    }
    video = row["messages"][0]["content"][0]["video"]
    encode_row(row, toy)
    assert row["messages"][0]["content"][0]["video"] is video
    assert row["messages"][1] == says([text("b")])
    np.testing.assert_array_equal(video, draw_frames(1))


def test_a_tokenizer_that_closes_every_text_is_refused():
    processor = ElvaProcessor.from_tokenizer(ByT5Tokenizer(), **SIZES)
    with pytest.raises(ElvaError, match="ByT5Tokenizer writes this row otherwise in parts"):
        encode_row({"messages": CHATS["one video"]}, processor)


def test_a_tokenizer_that_splits_parts_otherwise_is_found_out(toy, monkeypatch):
    tokenize = encoding._tokenize

    def other(*args):
        tokens = tokenize(*args)
        return replace(tokens, ids=tokens.ids[:-1], labels=tokens.labels[:-1])

    monkeypatch.setattr(encoding, "_tokenize", other)
    with pytest.raises(ElvaError, match="in parts"):
        encode_row({"messages": CHATS["one video"]}, toy)
