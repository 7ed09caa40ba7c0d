"""Data files of every kind as rows: JSON, JSON lines, LLaMA-Factory, tables of datasets, tar shards."""

import io
import json
import pickle
import random
import re
import tarfile
from pathlib import Path

import pytest
from clips_elva import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_elva import draw_frames, write_clip

from elva_hf.data.encoding import encode_row
from elva_hf.data.readers import FORMATS, list_files, read_rows, stream_rows
from elva_hf.data.records import JsonRecords
from elva_hf.data.rows import RowError, check_row, media_blocks
from elva_hf.data.schemas import METADATA_KEYS
from elva_hf.decoding_elva import probe
from elva_hf.errors_elva import ConfigurationError, ElvaError
from elva_hf.processing_elva import ElvaProcessor


def record(number, **more):
    turns = [{"from": "human", "value": "<video>\nWhat is it, é?"}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": number, "video": f"{number}.mp4", "conversations": turns, **more}


def plain(number):
    turns = [{"role": "user", "content": f"What {number}?"}, {"role": "assistant", "content": f"Answer {number}."}]
    return {"messages": turns}


def answers(rows):
    return [row["messages"][-1]["content"] for row in rows]


def write_lines(path, records, blank=False):
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text(("\n \n" if blank else "\n").join(lines) + "\n", encoding="utf-8")
    return path


def write_array(path, records, **options):
    path.write_text(json.dumps(records, ensure_ascii=False, **options), encoding="utf-8")
    return path


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", draw_frames(1))


@pytest.mark.parametrize("make", ["lines", "blank lines", "array", "indented array", "lines called json", "bom"])
def test_json_and_json_lines_give_the_same_rows(make, tmp_path):
    records = [record(number) for number in range(30)]
    path = tmp_path / ("a.jsonl" if make in ("lines", "blank lines") else "a.json")
    if "lines" in make:
        write_lines(path, records, blank=make == "blank lines")
    else:
        write_array(path, records, indent=3 if make == "indented array" else None)
    if make == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows = read_rows(path)
    assert len(rows) == 30
    assert answers(rows) == [f"Answer {number}." for number in range(30)]
    assert rows[-1] == rows[29] and rows[4:6] == [rows[4], rows[5]]
    assert media_blocks(rows[7]) == [{"type": "video", "path": str(tmp_path / "7.mp4")}]
    assert all(check_row(row) == row for row in rows)
    with pytest.raises(IndexError):
        rows[30]


def test_rows_are_read_when_they_are_asked_for_and_travel_to_workers(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [record(number) for number in range(1000)])
    rows = read_rows(path)
    copied = pickle.dumps(rows)
    assert len(copied) < 20 * 1000
    text = path.read_text(encoding="utf-8").replace("Answer 500.", "Antwort 50!")
    path.write_text(text, encoding="utf-8")
    assert answers([pickle.loads(copied)[500]]) == ["Antwort 50!"]


@pytest.mark.parametrize("blank", [False, True])
def test_errors_name_the_file_the_line_and_the_id(blank, tmp_path):
    records = [record(number) for number in range(5)]
    records[3]["conversations"][1]["value"] = ""
    path = write_lines(tmp_path / "a.jsonl", records, blank=blank)
    rows = read_rows(path)
    with pytest.raises(RowError) as caught:
        rows[3]
    line = 7 if blank else 4
    assert str(caught.value).startswith(f"a.jsonl line {line}, id '3': message 1 (assistant) is an empty answer")
    assert (caught.value.line, caught.value.row_id) == (line, "3")
    assert answers([rows[4]]) == ["Answer 4."]


def test_a_line_that_is_no_json_is_the_only_one_that_is_lost(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [record(number) for number in range(3)])
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([b'{"id": 1, "conv', b"\xff{}", b"[" * 100_000, *lines]))
    rows = read_rows(path)
    assert len(rows) == 6 and answers(rows[3:]) == ["Answer 0.", "Answer 1.", "Answer 2."]
    for index, words in enumerate(("line 1: no JSON: ", "line 2: no UTF-8 at byte 0", "line 3: no JSON that can be")):
        with pytest.raises(RowError, match=words):
            rows[index]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; expected a JSON array or JSON lines"),
        ("[]", "holds no records"),
        ("hello", "starts with 'h'; expected a JSON array"),
        ('[{"id": 1}, {"id', "no JSON: .* at character .*; is the file cut"),
        ('[{"id": 1} {"id": 2}]', "expected ',' or ']' at character 11"),
        ('[{"id": 1}', "expected ',' or ']' at character 10; is the file cut"),
        ('[{"id": 1}] []', "more text after the array, at character 11"),
        ("[" * 100_000, "no JSON that can be read at character"),
        ("[1, 2]", "a record is 1 .int.; expected a mapping"),
        ('[{"a": 1}]', "keys of its first records .a. fit no known format"),
    ],
)
def test_files_that_are_no_data_say_what_they_are(text, words, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ElvaError, match=words) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(ElvaError, match="does not exist; check the path"):
        read_rows(tmp_path / "none.json")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ElvaError, match=r"ends in none of .jsonl"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(ElvaError, match="holds no data files"):
        read_rows(tmp_path)
    with pytest.raises(ElvaError, match="a int is no data set"):
        read_rows(3)
    path = write_array(tmp_path / "a.json", [record(0)])
    with pytest.raises(ConfigurationError, match="format is 'lava'; known are messages, llava"):
        read_rows(path, "lava")
    with pytest.raises(ConfigurationError, match="'media' is no option of a reader; known are format, media_root"):
        read_rows(path, media="x")
    with pytest.raises(ConfigurationError, match="is no folder; check the path"):
        read_rows(path, media_root=str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match=r"split is 'train', but .* has none"):
        read_rows(path, split="train")


def test_the_media_root_confines_all_paths(tmp_path):
    (tmp_path / "clips").mkdir()
    records = [record(0), record(1, video=str(tmp_path / "1.mp4")), record(2, video="../2.mp4"), record(3, video="a/3")]
    path = write_lines(tmp_path / "a.jsonl", records)
    rows = read_rows(path, media_root=str(tmp_path / "clips"))
    assert media_blocks(rows[0])[0]["path"] == str(tmp_path / "clips" / "0.mp4")
    assert media_blocks(rows[3])[0]["path"] == str(tmp_path / "clips" / "a" / "3")
    for index in (1, 2):
        with pytest.raises(RowError, match=f"line {index + 1}, id '{index}': the path .* leaves the folder"):
            rows[index]
    rows = read_rows(path)
    assert media_blocks(rows[1])[0]["path"] == str(tmp_path / "1.mp4")
    with pytest.raises(RowError, match="leaves the folder"):
        rows[2]


def test_urls_must_be_allowed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [record(0, video="https://e.org/a.mp4")])
    with pytest.raises(RowError, match="is a URL; download the file"):
        read_rows(path)[0]
    assert media_blocks(read_rows(path, allow_urls=True)[0])[0]["path"] == "https://e.org/a.mp4"


def test_folders_patterns_and_lists_join_files(tmp_path):
    for number in range(3):
        write_lines(tmp_path / f"part-{number}.jsonl", [record(10 * number + i) for i in range(2 + number)])
    rows = read_rows(tmp_path)
    numbers = [0, 1, 10, 11, 12, 20, 21, 22, 23]
    assert answers(rows) == [f"Answer {number}." for number in numbers]
    assert answers(read_rows(str(tmp_path / "part-[12].jsonl"))) == [f"Answer {number}." for number in numbers[2:]]
    assert answers(read_rows([tmp_path / "part-2.jsonl", tmp_path / "part-0.jsonl"])) == [
        f"Answer {number}." for number in numbers[5:] + numbers[:2]
    ]
    assert rows.records.origin(4).file == "part-1.jsonl" and rows.records.origin(4).line == 3
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(ElvaError, match=r"several kinds \(json, tar\); name one file"):
        list_files(str(tmp_path))


def test_records_in_memory_are_rows_too():
    rows = read_rows([plain(0), plain(1)])
    assert answers(rows) == ["Answer 0.", "Answer 1."] and rows[1]["id"] == "1"
    assert answers(stream_rows([plain(0), plain(1)])) == answers(rows)
    with pytest.raises(RowError, match="list row 1, id '1'"):
        read_rows([plain(0), {"messages": []}])[1]


def test_rows_of_every_format_are_what_the_encoder_takes(tmp_path, clip):
    processor = ElvaProcessor.from_tokenizer(byte_tokenizer(), patch_size=16, longest_edge=32, num_frames=2)
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "A."}]
    asked = {
        "llava": {
            "video": str(clip),
            "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A."}],
        }
    }
    asked["swift"] = {"messages": turns, "videos": [str(clip)]}
    asked["alpaca"] = {"instruction": "<video>What?", "output": "A.", "videos": [str(clip)]}
    blocks = [{"type": "video", "path": str(clip)}, {"type": "text", "text": "What?"}]
    asked["messages"] = {"messages": [{"role": "user", "content": blocks}, turns[1]]}
    asked["caption"] = {"caption": "A.", "video": str(clip)}
    samples = {}
    for name, fields in asked.items():
        rows = read_rows(write_lines(tmp_path / f"{name}.jsonl", [fields]), caption_prompt="What?")
        assert rows.conversion.schema == name
        samples[name] = encode_row(rows[0], processor)
    ids = {name: sample.input_ids.tolist() for name, sample in samples.items()}
    assert all(value == ids["llava"] for value in ids.values())
    assert samples["llava"].pixel_values_videos is not None


def write_dataset_info(folder, **entries):
    return write_array(folder / "dataset_info.json", entries)


def test_llama_factory_columns_and_tags_are_followed(tmp_path):
    turns = [{"who": "q", "what": "<video>What?"}, {"who": "a", "what": "Yes."}]
    write_array(tmp_path / "chat.json", [{"talk": turns, "clips": ["a.mp4"], "note": "x", "id": 8}])
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "q", "assistant_tag": "a"}
    chat = {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "talk", "videos": "clips"}}
    path = write_dataset_info(tmp_path, chat={**chat, "tags": tags})
    (row,) = read_rows(path)
    assert row["id"] == "8" and media_blocks(row) == [{"type": "video", "path": str(tmp_path / "a.mp4")}]
    assert answers([row]) == ["Yes."]
    assert list(read_rows(tmp_path)) == [row]

    write_array(tmp_path / "ask.json", [{"q": "What?", "more": "Now?", "output": "Yes.", "old": [["a", "b"]]}])
    columns = {"prompt": "q", "query": "more", "history": "old"}
    write_dataset_info(tmp_path, chat=chat, ask={"file_name": "ask.json", "columns": columns})
    (row,) = read_rows(path, dataset="ask")
    assert [message["content"] for message in row["messages"]] == ["a", "b", "What?\nNow?", "Yes."]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"hf_hub_url": "a/b"}, "unknown key 'hf_hub_url'"),
        ({}, "file_name is missing; download the data set"),
        ({"file_name": "a.json", "formatting": "xml"}, "formatting is 'xml'; known are alpaca, sharegpt"),
        ({"file_name": "a.json", "columns": {"tools": "t"}}, "unknown key 'tools'"),
        ({"file_name": "a.json", "columns": {"prompt": 1}}, "columns.prompt is 1 .int.; expected a name"),
        ({"file_name": "a.json", "ranking": True}, "unknown key 'ranking'"),
        ({"file_name": "none.json"}, "none.json does not exist"),
        ([], "is .. .list.; expected a mapping"),
    ],
)
def test_llama_factory_entries_that_are_not_read_say_so(entry, words, tmp_path):
    with pytest.raises(ElvaError, match=words):
        read_rows(write_dataset_info(tmp_path, one=entry))


def test_llama_factory_needs_a_name_among_several(tmp_path):
    path = write_dataset_info(tmp_path, one={}, two={})
    with pytest.raises(ElvaError, match=r"several data sets: one, two; name one of them in options\.dataset"):
        read_rows(path)
    with pytest.raises(ElvaError, match="no data set 'three': one, two"):
        read_rows(path, dataset="three")


def test_tar_shards_give_their_members_as_bytes(tmp_path, clip):
    video = clip.read_bytes()
    first = write_tar(
        tmp_path / "a-0.tar",
        [
            ("x/000.mp4", video),
            ("x/000.json", {"conversations": record(0)["conversations"], "video": "000.mp4"}),
            ("x/001.first.mp4", video),
            ("x/001.second.mp4", video[:100]),
            (
                "x/001.json",
                {"conversations": [{"from": "human", "value": "<video><video>Same?"}, {"from": "gpt", "value": "No."}]},
            ),
        ],
    )
    rows = read_rows(first)
    assert len(rows) == 2 and [row["id"] for row in rows] == ["x/000", "x/001"]
    assert answers(rows) == ["Answer 0.", "No."]
    assert [block["video"] for block in media_blocks(rows[1])] == [video, video[:100]]
    assert probe(media_blocks(rows[0])[0]["video"]).num_frames == 8
    assert check_row(rows[0]) == rows[0]

    write_tar(tmp_path / "b-0.tar", [("0.jpg", b"jpg"), ("0.txt", b"A dog."), ("1.png", b"png"), ("1.txt", b"A cat.")])
    write_tar(tmp_path / "b-1.tar", [("2.jpg", b"jpg"), ("2.txt", b"A cow.")])
    rows = read_rows(str(tmp_path / "b-*.tar"), caption_prompt="What?")
    assert answers(rows) == ["A dog.", "A cat.", "A cow."]
    assert rows[2]["messages"][0]["content"] == [{"type": "image", "image": b"jpg"}, {"type": "text", "text": "What?"}]
    assert rows.records.origin(2).file == "b-1.tar"
    assert answers(stream_rows(str(tmp_path / "b-*.tar"))) == ["A dog.", "A cat.", "A cow."]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0.mp4", b"v"), ("0.pkl", b"p")], "'0.pkl' is not read .pickles never are.; known are json, txt"),
        ([("0.mp4", b"v"), ("1.mp4", b"v"), ("0.txt", b"t")], "members of '0' do not stand together; sort the names"),
        (
            [("0.mp4", b"v"), ("0.json", {"caption": "a", "videos": ["a", "b"]})],
            "names 2 videos, and 1 stand beside it",
        ),
        ([("0.mp4", b"v"), ("0.json", [1])], "json of the sample is no mapping"),
        ([("0.mp4", b"v"), ("0.json", b"{")], "id '0': no JSON"),
        ([("0.mp4", b"v"), ("0.txt", b"\xff")], "txt of the sample is no UTF-8 at byte 0"),
        ([("0.txt", b"text")], "a caption without a video or image"),
    ],
)
def test_shards_with_other_members_say_so(members, words, tmp_path):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ElvaError, match=words) as caught:
        read_rows(path)[0]
    assert "a.tar" in str(caught.value)
    if words.startswith("'0.pkl'"):
        with pytest.raises(RowError, match="caption is missing"):
            read_rows(path, "caption", ignore_keys=("pkl",))[0]


def test_shards_that_are_compressed_cut_or_hold_links_are_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.{kind}", b"x" * 3000) for i in range(4) for kind in ("mp4", "txt")])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:7000])
    with pytest.raises(ElvaError, match="no plain tar file: unexpected end of data"):
        read_rows(tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "zip.tar", "w:gz") as archive:
        archive.add(whole, "0.mp4")
    with pytest.raises(ElvaError, match=r"no plain tar file: .*; unpack it if it is compressed"):
        read_rows(tmp_path / "zip.tar")
    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        link = tarfile.TarInfo("0.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ElvaError, match=r"'0.mp4' is a link or device"):
        read_rows(tmp_path / "link.tar")


def test_shards_are_those_of_the_webdataset_library(tmp_path, clip):
    webdataset = pytest.importorskip("webdataset")
    rng = random.Random(0)
    with webdataset.TarWriter(str(tmp_path / "w.tar"), encoder=True) as sink:
        for number in range(20):
            sample = {"__key__": f"s{number:04d}", "mp4": clip.read_bytes()[: 100 + rng.randrange(900)]}
            sink.write({**sample, "json": {"caption": f"Answer {number}."}})
    rows = read_rows(tmp_path / "w.tar")
    theirs = list(webdataset.WebDataset(str(tmp_path / "w.tar"), shardshuffle=False))
    assert [row["id"] for row in rows] == [sample["__key__"] for sample in theirs]
    assert [media_blocks(row)[0]["video"] for row in rows] == [sample["mp4"] for sample in theirs]
    assert answers(rows) == [f"Answer {number}." for number in range(20)]


class TestTables:
    """Of the package datasets, which may be missing."""

    @pytest.fixture(autouse=True)
    def _quiet(self, tmp_path, monkeypatch):
        self.datasets = pytest.importorskip("datasets")
        self.datasets.disable_progress_bars()
        monkeypatch.setattr(self.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def table(self, clip, count=3, **more):
        video = clip.read_bytes()
        columns = {"conversations": [record(i)["conversations"] for i in range(count)]}
        columns["video"] = [{"path": None, "bytes": video[: len(video) - i]} for i in range(count)]
        table = self.datasets.Dataset.from_dict({**columns, **more})
        return table.cast_column("video", self.datasets.Video())

    def test_videos_stay_as_they_are_stored(self, clip):
        table = self.table(clip)
        rows = read_rows(table)
        assert answers(rows) == ["Answer 0.", "Answer 1.", "Answer 2."]
        video = clip.read_bytes()
        assert [media_blocks(row)[0]["video"] for row in rows] == [video, video[:-1], video[:-2]]
        assert probe(media_blocks(rows[0])[0]["video"]).num_frames == 8

    def test_lists_of_videos_and_paths_are_read_too(self, clip):
        turns = [[{"role": "user", "content": "<video><video>Same?"}, {"role": "assistant", "content": "Yes."}]]
        table = self.datasets.Dataset.from_dict({"messages": turns, "videos": [[str(clip), str(clip)]]})
        table = table.cast_column("videos", self.datasets.List(self.datasets.Video()))
        assert [block["path"] for block in media_blocks(read_rows(table)[0])] == 2 * [str(clip)]

    def test_chats_of_blocks_come_with_nones(self, clip):
        blocks = [{"type": "video", "path": str(clip), "text": None}, {"type": "text", "path": None, "text": "What?"}]
        answer = [{"type": "text", "path": None, "text": "Yes."}]
        chat = [{"role": "user", "content": blocks}, {"role": "assistant", "content": answer}]
        rows = read_rows(self.datasets.Dataset.from_dict({"messages": [chat]}))
        assert rows[0]["messages"][0]["content"] == [
            {"type": "video", "path": str(clip)},
            {"type": "text", "text": "What?"},
        ]

    def test_parquet_and_saved_folders_are_the_same_rows(self, clip, tmp_path):
        table = self.table(clip)
        wanted = list(read_rows(table))
        for number in range(3):
            table.select([number]).to_parquet(tmp_path / f"p/part-{number}.parquet")
        table.save_to_disk(tmp_path / "saved")
        self.datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
        assert list(read_rows(tmp_path / "p")) == wanted
        assert list(read_rows(tmp_path / "saved")) == wanted
        assert list(read_rows(tmp_path / "splits", split="test")) == wanted[:1]
        with pytest.raises(ElvaError, match="has the splits train, test; set split to one"):
            read_rows(tmp_path / "splits")
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(ElvaError, match="cannot be read as parquet"):
            read_rows(tmp_path / "bad.parquet")

    def test_iterable_datasets_are_streamed_and_have_no_indices(self, clip):
        table = self.table(clip).to_iterable_dataset(num_shards=2)
        rows = list(stream_rows(table))
        assert rows == list(read_rows(self.table(clip)))
        with pytest.raises(ElvaError, match="an IterableDataset has no indices; use stream_rows"):
            read_rows(table)

    def test_a_dictionary_of_splits_is_no_table(self, clip):
        with pytest.raises(ElvaError, match="has the splits train; choose one"):
            read_rows(self.datasets.DatasetDict({"train": self.table(clip)}))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers() | st.none(), max_size=3), max_size=6
    ),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
)
def test_every_record_of_json_is_found_where_it_stands(tmp_path_factory, records, indent, ascii_only):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(
        json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="surrogatepass"
    )
    try:
        assert list(JsonRecords(path, lines=False)) == records
    except ElvaError as error:  # half a surrogate pair cannot be written in UTF-8
        assert "no UTF-8" in str(error)
    lines = "\n".join(json.dumps(record) for record in records)
    path.write_text(lines, encoding="utf-8")
    assert list(JsonRecords(path, lines=True)) == records


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["a.json", "a.jsonl", "a.tar", "dataset_info.json"]))
def test_no_bytes_do_anything_but_give_rows_or_say_why_not(tmp_path_factory, data, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    with pytest.raises(ElvaError):
        list(read_rows(path))


def test_the_examples_of_the_documents_are_rows():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    found = []
    for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
        rows = read_rows([json.loads(block)])
        assert check_row(rows[0]) == rows[0]
        found.append(rows.conversion.schema)
    assert found == ["messages", "llava", "swift", "alpaca", "caption"]
    for name in (*METADATA_KEYS, *FORMATS):
        assert name.startswith("__") or f"`{name}`" in text
