"""`elva data check`: what it counts is what training gets, and whatever is wrong is said and exits with 2."""

import json
import re
import tarfile

import pytest
from command_line import fails, run, succeeds
from saved_elva import QUESTION, draw_frames, write_clip, write_sound

from elva_hf.data.checking import CheckOptions, chosen_rows, count_text, digest_messages
from elva_hf.data.encoding import encode_row, plan_row
from elva_hf.data.readers import read_rows
from elva_hf.processing_elva import ElvaProcessor

ANSWER = "red"


def record(video, question=QUESTION, answer=ANSWER, **more):
    turns = [
        {"from": "human", "value": f"<video>\n{question}" if video else question},
        {"from": "gpt", "value": answer},
    ]
    return {"conversations": turns, **({"video": video} if video else {}), **more}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def data(tmp_path, clip):
    """Three good rows: one video, the same with another question, and text alone."""
    write_clip(tmp_path / "wide.mp4", draw_frames(2, height=32), rate=4)
    return write(
        tmp_path / "good.jsonl",
        record(str(clip), id="a"),
        record("wide.mp4", question="What shape is the circle?", answer="circle", id="b"),
        record(None, id="c"),
    )


def checked(*args, code=0):
    result = run("data", "check", *args, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def first(*args, code=0):
    (found,) = checked(*args, code=code)["data"]
    return found


def test_token_statistics_are_those_of_training(data, folder):
    found = first(data, "--model", folder)
    processor = ElvaProcessor.from_pretrained(folder)
    samples = [encode_row(row, processor) for row in read_rows(data)]
    totals = [len(sample) for sample in samples]
    answers = [int((sample.labels >= 0).sum()) for sample in samples]
    visual = [sum(rows * (cols + 1) + 1 for video in sample.grids for rows, cols in video) for sample in samples]
    expected = {"total": totals, "answer": answers, "visual": visual}
    expected["text"] = [total - pictures for total, pictures in zip(totals, visual, strict=True)]
    assert set(visual) == {168, 88, 0}
    for kind, numbers in expected.items():
        spread = found["tokens"][kind]
        assert spread["mean"] == pytest.approx(sum(numbers) / 3) and spread["max"] == max(numbers)
        assert spread["p50"] == sorted(numbers)[1]
    assert (found["num_rows"], found["num_checked"], found["num_bad"], found["num_without_media"]) == (3, 3, 0, 1)
    assert found["media"] == {"video h264": 2} and found["sizes"] == {"64x64": 1, "64x32": 1}
    assert found["seconds"] == {"total": pytest.approx(3.0), "max": pytest.approx(2.0)}
    assert found["num_bytes"] > 1000


def test_tables_for_people_say_the_same(data, folder):
    text = succeeds("data", "check", data, "--model", folder, "--decode", 3)
    found = first(data, "--model", folder)
    assert f"data      {data}: 3 rows\nrows      3 good, 0 bad\n" in text
    assert "media     2 video h264; 1 rows without\n" in text and "decoded   the media of 2 rows\n" in text
    (line,) = re.findall("^total .*", text, re.MULTILINE)
    spread = found["tokens"]["total"]
    assert line.split()[2:5] == [str(spread[key]) for key in ("p50", "p95", "max")]
    assert f"context  2048 of {folder}: 0 rows are beyond it\n" in text
    assert all(line == line.rstrip() and line.isascii() for line in text.splitlines())


def test_everything_that_is_wrong_is_counted_and_named(data, folder, tmp_path, clip):
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:500])
    lines = [
        *data.read_text().splitlines(),
        json.dumps(record("none.mp4", id="d")),
        json.dumps(record("sound.mp4", id="e")),
        json.dumps(record("broken.mp4", id="f")),
        json.dumps(record("../a.mp4", id="g")),
        json.dumps(record(str(clip), answer=" ", id="h")),
        '{"id": "i',
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    found = first(path, "--model", folder, code=2)
    assert (found["num_rows"], found["num_bad"]) == (9, 6)
    assert found["problems"] == {"not_found": 1, "no_video_stream": 1, "not_a_video": 1, "row": 3}
    for number, (line, words) in enumerate(
        [
            ("line 4, id 'd'", "does not exist; check the path"),
            ("line 5, id 'e'", "no video stream"),
            ("line 6, id 'f'", "broken.mp4"),
            ("line 7, id 'g'", "leaves the folder"),
            ("line 8, id 'h'", "an empty answer; give it text"),
            ("line 9", "no JSON"),
        ]
    ):
        assert found["errors"][number].startswith(f"bad.jsonl {line}: ") and words in found["errors"][number]
    assert found["tokens"]["total"] == first(data, "--model", folder)["tokens"]["total"]
    result = run("data", "check", path, "--model", folder, "--errors", 2)
    assert result.exit_code == 2 and result.stdout.count("bad.jsonl line") == 2
    assert "rows      3 good, 6 bad: 3 row, 1 no_video_stream, 1 not_a_video, 1 not_found\n" in result.stdout
    assert result.stdout.endswith("... and 4 more; --errors 6 shows all\n")


def test_rows_beyond_the_context_are_named_with_their_tokens(data, folder):
    longest = first(data, "--model", folder)["tokens"]["total"]["max"]
    assert first(data, "--model", folder, "--context-length", longest)["num_beyond"] == 0
    found = first(data, "--model", folder, "--context-length", longest - 1, code=2)
    assert found["problems"] == {"context": 1} and found["num_beyond"] == 1
    assert found["errors"] == [
        f"good.jsonl line 1, id 'a': {longest} tokens, and the context has {longest - 1}; take fewer or smaller frames."
    ]
    assert found["tokens"]["total"]["max"] == longest
    assert first(data, "--model", folder, "--context-length", longest - 1, "--fit")["num_beyond"] == 1


def test_frame_options_change_what_is_taken(data, folder):
    few = first(data, "--model", folder, "--frames", 2)["tokens"]["visual"]
    assert few["max"] == 2 * 21
    small = first(data, "--model", folder, "--longest-edge", 32)["tokens"]["visual"]
    assert small["max"] == 8 * 7


def test_a_preset_counts_pictures_only(data):
    found = checked(data, "--preset", "elva-7b")
    assert found["model"] == "elva-7b" and found["data"][0]["tokens"]["text"] is None
    assert found["data"][0]["tokens"]["visual"]["max"] == 8 * (2 * 3 + 1)
    assert "text is not counted: a preset has no tokenizer" in succeeds("data", "check", data, "--preset", "elva-7b")


def test_decoding_finds_what_the_header_hides(folder, tmp_path):
    path = write_clip(tmp_path / "clip.mp4", draw_frames(3, num_frames=40))
    held = bytearray(path.read_bytes())
    start = held.index(b"mdat") - 4
    size = int.from_bytes(held[start : start + 4], "big")
    begin, end = start + size // 2, start + size
    held[begin:end] = bytes(end - begin)
    path.write_bytes(held)
    data = write(tmp_path / "a.jsonl", record("clip.mp4"))
    succeeds("data", "check", data, "--model", folder)
    deep = run("data", "check", data, "--model", folder, "--decode", 1)
    assert deep.exit_code == 2 and "clip.mp4' is damaged" in deep.stdout


def test_rows_that_come_twice_are_counted(folder, tmp_path):
    rows = [record(None, id="a"), record(None, id="a", answer="blue"), record(None, id="b")]
    found = first(write(tmp_path / "a.jsonl", *rows), "--model", folder)
    assert (found["num_double_ids"], found["num_double_rows"], found["num_bad"]) == (1, 1, 0)
    text = succeeds("data", "check", tmp_path / "a.jsonl", "--model", folder)
    assert "doubles   1 ids and 1 contents that another row has too\n" in text


def test_a_part_of_the_rows_can_be_checked_and_by_workers(folder, tmp_path):
    data = write(
        tmp_path / "a.jsonl", *(record(None, id=number, answer="" if number < 40 else "red") for number in range(80))
    )
    found = first(data, "--model", folder, "--rows", 20, code=2)
    assert (found["num_checked"], found["num_rows"], found["num_bad"]) == (20, 80, 10)
    assert "80 rows, 20 of them checked" in run("data", "check", data, "--model", folder, "--rows", 20).stdout
    alone, together = (first(data, "--model", folder, "--workers", count, code=2) for count in (0, 2))
    assert alone == together


def test_shards_are_checked_like_files(folder, tmp_path, clip):
    path = tmp_path / "a.tar"
    (tmp_path / "caption").write_text("red")
    with tarfile.open(path, "w") as archive:
        archive.add(clip, "0.mp4")
        archive.add(tmp_path / "caption", "0.txt")
    found = first(path, "--model", folder)
    assert found["tokens"]["visual"]["max"] == 168 and found["num_bytes"] == clip.stat().st_size


RECIPE = """\
name: mine
model: {{preset: tiny}}
training: {{batch_size: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-3}}
video: {{num_frames: 2}}
data:
  sources:
    clips: {{path: {path}, num_samples: 5}}
    toy: {{format: toy_world, options: {{num_videos: 3, num_frames: 4, questions_per_video: 2}}}}
"""


def test_a_recipe_is_checked_source_by_source(data, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(path=data))
    clips, toy = checked(recipe, "--model", folder)["data"]
    assert [clips["name"], toy["name"]] == ["mine/clips", "mine/toy"]
    assert clips["tokens"]["visual"]["max"] == 2 * 21  # the recipe's frames
    assert toy["num_rows"] == 3 and toy["media"] == {"video array": 3}
    more = checked(recipe, "--model", folder, "--high", 3, "--low", 1)["data"][0]["tokens"]["visual"]
    assert more["max"] == 3 * 21 + 7
    assert "mine/clips: 3 rows (5 expected)\n" in succeeds("data", "check", recipe, "--model", folder)
    recipe.write_text(RECIPE.format(path="null"))
    message = fails("data", "check", recipe, "--model", folder)
    assert "data sources without a path: clips. Fill them in: data.sources.clips.path=..." in message
    found = checked(recipe, f"data.sources.clips.path={data}", "--model", folder)["data"]
    assert found[0] == clips


def test_the_shipped_recipes_say_which_paths_to_fill_in():
    message = fails("data", "check", "stage2_spatiotemporal", "--preset", "elva-7b")
    assert "data.sources.webvid.path=..." in message


def test_without_a_model_the_visual_tokens_of_the_papers_are_counted(data):
    shown = succeeds("data", "check", data)
    assert shown == succeeds("data", "check", data, "--preset", "elva-7b")
    assert "of elva-7b: 0 rows are beyond it" in shown
    assert "text is not counted" in shown


def test_what_cannot_be_asked_is_one_line(data, folder):
    assert "give one of them" in fails("data", "check", data, "--model", folder, "--preset", "elva-7b")
    assert "does not exist; check the path" in fails("data", "check", "none.jsonl", "--model", folder)
    assert "only a recipe has fields to change" in fails("data", "check", data, "a=1", "--model", folder)
    assert "of kind 'toy' and names no data sources" in fails("data", "check", "tiny", "--model", folder)
    message = fails("data", "check", "stage3_sft", "--format", "llava", "--model", folder)
    assert "format: a recipe says it for each of its sources" in message


def test_text_is_counted_without_opening_media(folder):
    processor = ElvaProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "video", "path": "none"}, {"type": "text", "text": QUESTION}]}]
    turns += [{"role": "assistant", "content": ANSWER}]
    more = [{"role": "user", "content": "What shape is the circle?"}, {"role": "assistant", "content": "circle"}]
    single = count_text({"id": "1", "messages": turns}, processor)
    assert single.longest == single.total and 0 < single.answer < single.total
    joined = count_text({"id": "1", "messages": [*turns, *more], "independent_turns": True}, processor)
    assert single.total <= joined.longest < joined.total and joined.answer > single.answer
    text_alone = {"id": "1", "messages": more}
    assert count_text(text_alone, processor).total == plan_row(text_alone, processor)


def test_the_same_rows_are_drawn_each_time():
    assert chosen_rows(5, None, 0) == range(5) == chosen_rows(5, 9, 0)
    drawn = chosen_rows(1000, 10, 0)
    assert drawn == chosen_rows(1000, 10, 0) != chosen_rows(1000, 10, 1) and drawn == sorted(set(drawn))
    rows = read_rows(
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "b"}]} for q in "aab"]
    )
    digests = [digest_messages(row) for row in rows]
    assert digests[0] == digests[1] != digests[2]
    assert CheckOptions(None).num_rows is None
