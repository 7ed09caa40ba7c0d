"""The canonical row and the ways other formats write it: what is taken, and the one line on what is not."""

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from elva_hf.data.rows import MediaRoot, Origin, RowError, check_row, media_blocks
from elva_hf.data.schemas import SCHEMAS, Conversion, detect_schema
from elva_hf.errors_elva import ElvaError

ROW = {
    "id": "42",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "video", "path": "42.mp4", "num_frames": 8},
                {"type": "text", "text": "What <|im_end|> is it?"},
            ],
        },
        {"role": "assistant", "content": "A red square."},
    ],
}


def changed(*path, value):
    """The row with one part of it replaced."""
    row = part = copy.deepcopy(ROW)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return row


def refusal(row, **options):
    with pytest.raises(RowError) as caught:
        check_row(row, Origin("a.jsonl", line=7), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def convert(schema, record, **options):
    return Conversion(schema, **options).row(record, Origin("a.json", index=3), "3")


def failure(schema, record, **options):
    with pytest.raises(RowError) as caught:
        convert(schema, record, **options)
    return str(caught.value)


def content(row, number=0):
    """Content of a message as pairs of type and path or text."""
    blocks = row["messages"][number]["content"]
    return blocks if isinstance(blocks, str) else [(b["type"], b.get("path", b.get("text"))) for b in blocks]


def test_a_good_row_comes_back_equal_and_is_a_copy():
    row = check_row(ROW)
    assert row == ROW and row is not ROW
    row["messages"][1]["content"][0]["path"] = "other"
    assert ROW["messages"][1]["content"][0]["path"] == "42.mp4"


def test_keys_whose_value_is_none_are_no_keys():
    row = changed("messages", 1, "content", 0, value={"type": "video", "path": "42.mp4", "text": None, "fps": None})
    row["independent_turns"] = None
    row["messages"][2]["tool_calls"] = None
    assert media_blocks(check_row(row)) == [{"type": "video", "path": "42.mp4"}]
    assert "independent_turns" not in check_row(row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "a mapping with messages, id, independent_turns"),
        ({**ROW, "image": "a.jpg"}, "unknown key 'image'; known are"),
        ({**ROW, "messagse": []}, "'messagse'; did you mean messages?"),
        (changed("id", value=7), "id is 7; give text"),
        (changed("id", value=""), "id is ''; give text"),
        (changed("messages", value=[]), "no assistant turn, so nothing to learn; add the answer"),
        (changed("messages", value="hello"), "messages is 'hello' (str); give a list"),
        (changed("messages", 2, "role", value="gpt"), "message 2 has the role 'gpt'; give 'system', 'user'"),
        (changed("messages", 0, "role", value="user"), "message 1 has the role 'user', expected 'assistant'"),
        (changed("messages", 1, "role", value="system"), "message 1 is the system's and holds a video; media stand"),
        (changed("messages", 2, "content", value=" \n"), "message 2 (assistant) is an empty answer"),
        (changed("messages", 2, "content", value=[]), "message 2 (assistant) is an empty answer"),
        (changed("messages", 1, "content", value=""), "message 1 (user) is empty"),
        (changed("messages", 2, "content", value=None), "the content of message 2 is missing; give text"),
        (changed("messages", 2, "content", value=5), "the content of message 2 is 5 (int)"),
        (changed("messages", 2, "content", value="\ud83d"), "message 2 has half a surrogate pair at character 0"),
        (changed("messages", 2, "name", value="Ann"), "message 2 has the unknown key 'name'"),
        (changed("messages", 1, "content", 0, value="x"), "a block of message 1 is 'x' (str)"),
        (
            changed("messages", 1, "content", 0, "type", value="audio"),
            "the type 'audio'; expected text, video or image",
        ),
        (changed("messages", 1, "content", 0, "frames", value=8), "a video block of message 1 has the unknown key"),
        (changed("messages", 1, "content", 0, "url", value="b.mp4"), "several sources, url, path"),
        (changed("messages", 1, "content", 0, value={"type": "video"}), "a video block of message 1 has no source"),
        (changed("messages", 1, "content", 0, "path", value=["a", "b"]), "a video is ['a', 'b'] (list); give a path"),
        (changed("messages", 1, "content", 0, "num_frames", value="8"), "num_frames of a video is '8'; give a whole"),
        (changed("messages", 1, "content", 0, "fps", value=2), "exclude each other"),
        (
            changed("messages", 1, "content", 1, "text", value=None),
            "a text block of message 1 holds missing; give text",
        ),
        ({**ROW, "messages": ROW["messages"] + ROW["messages"][1:2]}, "the last message is the user's"),
        ({**ROW, "messages": [*ROW["messages"], *ROW["messages"][1:]], "independent_turns": True}, "holds media, but"),
        ({**ROW, "independent_turns": 1}, "independent_turns is 1; give true or false"),
    ],
)
def test_a_bad_row_is_refused_in_one_line_with_its_place(row, words):
    message = refusal(row)
    assert message.startswith("a.jsonl line 7") and words in message


def test_errors_name_the_id_and_travel_between_processes():
    with pytest.raises(RowError) as caught:
        check_row(changed("messages", 2, "content", value=""), Origin("a.jsonl", line=7))
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error).startswith("a.jsonl line 7, id '42': message 2")
    assert (error.file, error.line, error.index, error.row_id) == ("a.jsonl", 7, None, "42")
    assert isinstance(error, ElvaError)


def test_independent_turns_ask_about_the_media_of_the_first():
    later = [{"role": "user", "content": "And its shape?"}, {"role": "assistant", "content": "Square."}]
    row = {**ROW, "messages": [*ROW["messages"], *later], "independent_turns": True}
    assert check_row(row)["independent_turns"] is True
    assert "independent_turns" not in check_row({**row, "independent_turns": False})


def test_media_in_memory_stay_what_they_are():
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for held in (frames, b"mp4"):
        row = check_row(changed("messages", 1, "content", 0, value={"type": "video", "video": held}))
        assert media_blocks(row)[0]["video"] is held
    undecoded = {"type": "video", "video": {"bytes": b"mp4", "path": "a.mp4"}}
    assert media_blocks(check_row(changed("messages", 1, "content", 0, value=undecoded)))[0]["video"] == b"mp4"
    by_path = {"type": "video", "video": {"bytes": None, "path": "a.mp4"}}
    assert media_blocks(check_row(changed("messages", 1, "content", 0, value=by_path)))[0]["path"] == "a.mp4"


def test_paths_are_relative_to_the_root_and_stay_in_it():
    root = MediaRoot("clips", confined=True)
    assert root.resolve("a/b.mp4") == "clips/a/b.mp4"
    assert root.resolve("a/../b.mp4") == "clips/b.mp4"
    for path in ("../b.mp4", "a/../../b.mp4", "/etc/passwd", ".."):
        with pytest.raises(ElvaError, match="leaves the folder 'clips'; set media_root"):
            root.resolve(path)
    assert MediaRoot("/data", confined=True).resolve("/data/b.mp4") == "/data/b.mp4"
    assert MediaRoot("data").resolve("/elsewhere/b.mp4") == "/elsewhere/b.mp4"
    with pytest.raises(ElvaError, match="leaves"):
        MediaRoot("data").resolve("../b.mp4")
    assert MediaRoot("").resolve("..b.mp4") == "..b.mp4"
    for path in ("", " ", "a\0b"):
        with pytest.raises(ElvaError, match="is none; name a file"):
            root.resolve(path)


def test_urls_are_refused_unless_they_are_allowed_and_https():
    for url in ("https://e.org/a.mp4", "http://e.org/a.mp4", "file:///a", "data:video/mp4;base64,AA", "s3://b/a.mp4"):
        with pytest.raises(ElvaError, match="is a URL; download the file"):
            MediaRoot().resolve(url)
    allowed = MediaRoot("clips", confined=True, allow_urls=True)
    assert allowed.resolve("https://e.org/a.mp4") == "https://e.org/a.mp4"
    with pytest.raises(ElvaError, match="is no https URL"):
        allowed.resolve("http://e.org/a.mp4")
    with pytest.raises(ElvaError) as caught:
        MediaRoot().resolve("https://me:secret@e.org/a.mp4?key=1")
    assert "secret" not in str(caught.value) and "key" not in str(caught.value)


def test_llava_records_become_rows():
    record = {
        "id": 5,
        "image": "a.jpg",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A dog. In HTML: <image>"},
            {"from": "user", "value": "Sure?"},
            {"from": "assistant", "value": "Yes."},
        ],
    }
    row = convert("llava", record)
    assert row["id"] == "5" and [m["role"] for m in row["messages"]] == ["system", *2 * ("user", "assistant")]
    assert content(row, 1) == [("image", "a.jpg"), ("text", "What is it?")]
    assert content(row, 2) == "A dog. In HTML: <image>"
    assert check_row(row) == row


def llava(text, **media):
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}], **media}


@pytest.mark.parametrize(
    ("text", "media", "blocks"),
    [
        ("<video>\nWhat?", {"video": "a"}, [("video", "a"), ("text", "What?")]),
        ("What?\n<video>", {"video": "a"}, [("text", "What?"), ("video", "a")]),
        ("What<video>now?", {"video": "a"}, [("text", "What"), ("video", "a"), ("text", "now?")]),
        ("<image>\n<image>\nSame?", {"images": ["a", "b"]}, [("image", "a"), ("image", "b"), ("text", "Same?")]),
        ("<image> <video>", {"video": "v", "image": "i"}, [("image", "i"), ("text", " "), ("video", "v")]),
        ("<image>\nWhat?", {"video": "a"}, [("video", "a"), ("text", "What?")]),
        ("<video><image>", {"videos": ["a", "b"]}, [("video", "a"), ("video", "b")]),
        ("<image>\n\n\nWhat?", {"image": "a", "video": None}, [("image", "a"), ("text", "\n\nWhat?")]),
    ],
)
def test_placeholders_take_the_media_in_order(text, media, blocks):
    assert content(convert("llava", llava(text, **media))) == blocks


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (llava("What?", video="a.mp4"), "0 <video> in the user turns for 1 videos ('a.mp4')"),
        (llava("<video>What?"), "1 <video> in the user turns for 0 videos"),
        (llava("<video>", image="a.jpg"), "<video> in the user turns for 0 videos"),
        (llava("<image><image>", videos=["a", "b", "c"]), "2 <video> in the user turns for 3 videos ('a', 'b', 'c')"),
        (llava("<video>", video="a", videos=["b"]), "both 'video' and 'videos' are given; keep one"),
        (llava("<video>", video=3), "a video is 3 (int); give a path"),
        (llava("<video>", video="a", bbox=[1]), "the record has the unknown key 'bbox'"),
        ({"conversations": "x"}, "conversations is 'x' (str); expected a list of turns"),
        (
            {"conversations": [{"from": "human", "value": "x", "loss": 1}]},
            "turn 0 of conversations has the unknown key",
        ),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "turn 0 of conversations is by 'tool'; expected human"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "message 0 has the role 'assistant', expected 'user'"),
        ([1], "a record is a mapping; this is [1] (list)"),
    ],
)
def test_a_bad_record_is_refused_in_one_line_with_its_place(record, words):
    message = failure("llava", record)
    assert message.startswith("a.json row 3, id '3': ") and words in message and "\n" not in message


def test_keys_that_are_named_are_read_past():
    record = llava("<video>", video="a", bbox=[1])
    record["conversations"][0]["weight"] = 0.5
    assert content(convert("llava", record, ignore_keys=("bbox", "weight"))) == [("video", "a")]


def test_text_only_records_keep_their_text_as_it_is():
    record = llava("Write <|im_start|> and <FRAME>.")
    assert content(convert("llava", record)) == "Write <|im_start|> and <FRAME>."


def test_swift_records_become_rows():
    record = {
        "messages": [{"role": "user", "content": "<image>Same as <video>?"}, {"role": "assistant", "content": "No."}],
        "images": ["a.jpg"],
        "videos": ["b.mp4"],
    }
    blocks = [("image", "a.jpg"), ("text", "Same as "), ("video", "b.mp4"), ("text", "?")]
    assert content(convert("swift", record)) == blocks
    older = {"system": "Be brief.", "history": [["One?", "1."]], "query": "Two?", "response": "2."}
    row = convert("swift", older)
    assert [content(row, i) for i in range(5)] == ["Be brief.", "One?", "1.", "Two?", "2."]
    assert "unknown key 'objects'" in failure("swift", {**older, "objects": {}})
    assert convert("swift", {**older, "objects": {}}, ignore_keys=("objects",)) == row


def test_swift_media_without_placeholders_go_first():
    record = {"query": "What?", "response": "A dog.", "videos": ["a", "b"]}
    assert content(convert("swift", record)) == [("video", "a"), ("video", "b"), ("text", "What?")]
    assert "1 <video> in the user turns for 2 videos" in failure("swift", {**record, "query": "<video>What?"})


def test_blocks_without_a_source_take_the_next_of_the_list():
    ask = [{"type": "text", "text": "<image> of"}, {"type": "image"}, {"type": "image", "path": "z.jpg"}]
    record = {
        "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": "Yes."}],
        "images": ["a.jpg"],
    }
    assert content(convert("swift", record)) == [("text", "<image> of"), ("image", "a.jpg"), ("image", "z.jpg")]


def test_alpaca_records_become_rows():
    record = {"instruction": "<video>What?", "input": "Look well.", "output": "A dog.", "videos": ["a"]}
    assert content(convert("alpaca", record)) == [("video", "a"), ("text", "What?\nLook well.")]
    assert "output is missing" in failure("alpaca", {"instruction": "What?"})
    assert "history 0 is ['a'] (list)" in failure("alpaca", {**record, "history": [["a"]]})


def test_captions_answer_a_prompt_or_nothing():
    record = {"caption": "A dog.", "video": "a.mp4"}
    row = convert("caption", record)
    assert content(row) == [("video", "a.mp4")] and content(row, 1) == "A dog."
    row = convert("caption", record, caption_prompt="Describe it.")
    assert content(row) == [("video", "a.mp4"), ("text", "Describe it.")]
    assert "a caption without a video or image" in failure("caption", {"caption": "A dog."})


def test_options_of_videos_are_put_beside_those_that_have_none():
    row = convert("messages", ROW, video={"num_frames": 16})
    assert media_blocks(row)[0]["num_frames"] == 8
    row = convert("llava", llava("<video><image>", video="a", image="b"), video={"num_frames": 16})
    assert media_blocks(row) == [{"type": "video", "path": "a", "num_frames": 16}, {"type": "image", "path": "b"}]


def test_the_schema_is_found_by_keys_over_several_records():
    assert detect_schema([llava("a")], "f") == "llava"
    assert detect_schema([{"messages": []}], "f") == "messages"
    assert detect_schema([{"messages": []}, {"messages": [], "videos": ["a"]}], "f") == "swift"
    assert detect_schema([{"query": "a", "response": "b"}], "f") == "swift"
    assert detect_schema([{"instruction": "a", "output": "b", "video": "v"}], "f") == "alpaca"
    assert detect_schema([{"caption": "a", "video": "v"}], "f") == "caption"
    with pytest.raises(ElvaError, match=r"f: the keys .*\(answer, question\) fit no known format; set format to"):
        detect_schema([{"question": "a", "answer": "b"}], "f")
    with pytest.raises(ElvaError, match=r"fit several formats \(llava, messages\)"):
        detect_schema([{"messages": [], "conversations": []}], "f")


def test_a_row_goes_round_through_json_and_every_reader_of_it():
    row = check_row(ROW)
    assert convert("messages", json.loads(json.dumps(row))) == row


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<video>", "user"]),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=6), part, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from(["human", "user", "gpt", "assistant", "system"])
texts = st.sampled_from(["<video>\nWhat?", "What?", "<image>", "<video><video>", "Yes.", ""]) | anything
turn = st.fixed_dictionaries({}, optional={"from": roles | anything, "value": texts, "role": roles, "content": texts})
block = st.fixed_dictionaries(
    {"type": st.sampled_from(["video", "image", "text"])}, optional={"path": anything, "text": texts}
)
message = st.fixed_dictionaries({"role": roles | anything, "content": texts | st.lists(block | anything, max_size=3)})
media = st.sampled_from(["a.mp4", "", "../a", "http://x", ["a.mp4"], ["a.mp4", "b.mp4"], {"path": "a"}]) | anything
record = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers() | st.text(max_size=3) | anything,
        "conversations": st.lists(turn | anything, max_size=4) | anything,
        "messages": st.lists(message | anything, max_size=4) | anything,
        "query": texts,
        "response": texts,
        "history": st.lists(st.lists(texts, max_size=3), max_size=2) | anything,
        "instruction": texts,
        "input": texts,
        "output": texts,
        "caption": texts,
        "system": texts,
        "video": media,
        "videos": media,
        "images": media,
        "independent_turns": st.booleans() | anything,
    },
)


@settings(max_examples=300, deadline=None)
@given(record=record | anything, schema=st.sampled_from([*SCHEMAS]))
@example(record={"messages": [{"role": "user", "content": [{"type": ["video"]}]}], "videos": ["a"]}, schema="swift")
@example(record={"query": "a", "response": "b", "videos": [{"bytes": 1}]}, schema="swift")
def test_no_record_does_anything_but_become_a_good_row_or_say_why_not(record, schema):
    before = copy.deepcopy(record)
    try:
        row = Conversion(schema, root=MediaRoot("clips")).row(record, Origin("a.jsonl", line=1), "0")
    except ElvaError as error:
        assert str(error).startswith("a.jsonl line 1") and "\n" not in str(error)
    else:
        assert check_row(row) == row
    assert repr(record) == repr(before)


@settings(max_examples=200, deadline=None)
@given(row=record.map(lambda fields: {"id": "1", **fields}) | anything)
def test_no_row_passes_the_check_but_a_row(row):
    try:
        checked = check_row(row)
    except ElvaError:
        return
    assert check_row(checked) == checked


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<video>", "<image>", "text", "\n", "<vid", " "]), max_size=8).map("".join))
def test_every_placeholder_gives_one_block_and_no_text_is_lost(text):
    videos = [f"v{i}" for i in range(text.count("<video>"))]
    images = [f"i{i}" for i in range(text.count("<image>"))]
    assume(videos or images)
    row = convert("llava", llava(text, videos=videos, images=images))
    blocks = media_blocks(row)
    assert [b["path"] for b in blocks if b["type"] == "video"] == videos
    assert [b["path"] for b in blocks if b["type"] == "image"] == images
    written = "".join(b.get("text", f"<{b['type']}>") for b in row["messages"][0]["content"])
    assert written.replace("\n", "") == text.replace("\n", "")
