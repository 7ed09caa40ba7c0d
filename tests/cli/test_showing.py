"""`elva show`, and schedules on the command line: films and sheets of real runs, and one line for each mistake."""

import json
import os
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from command_line import fails, rows, succeeds
from PIL import Image
from saved_elva import QUESTION, build_checkpoint, draw_frames, save_checkpoint, write_clip
from transformers import pipeline as build_pipeline

import elva_hf
from elva_hf.cli import loading, showing
from elva_hf.viz import merging as viz

STRONG = '[{"layer": 1, "target_ratio": 0.1}]'


def read_film(path):
    with av.open(str(path)) as container:
        (stream,) = container.streams.video
        pages = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return pages, stream.codec_context.name, stream.pix_fmt, stream.average_rate


@pytest.fixture
def views(monkeypatch):
    """What was drawn."""
    drawn = []
    write = showing.write
    monkeypatch.setattr(showing, "write", lambda view, out: (drawn.append(view), write(view, out))[1])
    return drawn


def test_show_films_the_shipped_model_on_the_shipped_clip(tmp_path):
    out = tmp_path / "merge.mp4"
    text = succeeds("show", elva_hf.tiny_checkpoint() / "demo.mp4", "--out", out, "--merge-schedule", "table5")
    pages, codec, pixels, rate = read_film(out)
    assert (len(pages), codec, pixels, rate) == (8, "h264", "yuv420p", showing.FRAMES_PER_SECOND)
    assert pages[0].shape[0] % 2 == pages[0].shape[1] % 2 == 0
    differ = [np.abs(one.astype(int) - other).max() for one, other in pairwise(pages)]
    assert min(differ) > 50
    assert rows(text, "step") == [
        "1    at layer 1, keep 50 %: 188 -> 124 tokens",
        "2    at layer 2, keep 50 %: 124 -> 92 tokens",
        "3    at layer 3, keep 50 %: 92 -> 76 tokens",
    ]
    assert rows(text, "shown") == ["16 of 128 patches left (12%) after the merge at layer 3"]
    assert rows(text, "wrote") == [str(out)]


def test_a_film_is_written_without_the_h264_encoder_too(folder, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    succeeds("show", clip, "--out", tmp_path / "merge.mp4", "--merge-schedule", "table5", "--model", folder)
    pages, codec, *_ = read_film(tmp_path / "merge.mp4")
    assert (len(pages), codec) == (8, "mpeg4")


def test_the_film_shows_the_pages_that_were_drawn(folder, clip, tmp_path, views):
    succeeds("show", clip, "--out", tmp_path / "merge.MP4", "--merge-schedule", "table5", "--model", folder)
    pages, *_ = read_film(tmp_path / "merge.MP4")
    for number in (0, 5):
        page = np.asarray(viz.draw_page(views[0], number)).astype(int)
        assert np.abs(page - pages[number]).mean() < 4


def test_show_draws_what_the_model_saw_and_did(folder, clip, tmp_path, views):
    options = ("--merge-schedule", "paper", "--model", folder, "--high", 2, "--low", 4)
    succeeds("show", clip, "--out", tmp_path / "merge.png", *options, "--device", "cpu")
    with Image.open(tmp_path / "merge.png") as sheet:
        assert sheet.size == viz.draw_sheet(views[0]).size
    (view,) = views

    model, processor = build_checkpoint()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}], tokenize=False
    )
    inputs = processor(text=text, videos=str(clip), num_high_res_frames=2, num_low_res_frames=4, return_metadata=True)
    sampled = inputs.pop("video_metadata")[0]
    inputs = inputs.convert_to_tensors("pt")
    with torch.no_grad():
        outputs = model(**inputs, merge_schedule="paper", output_merge_map=True, use_cache=True)
    fates = viz.read_fates(outputs.merge_map, sampled.grids)
    for one, other in zip(view.fates, fates, strict=True):
        assert np.array_equal(one.sizes, other.sizes) and np.array_equal(one.shifts, other.shifts)
    removed = -np.diff(outputs.past_key_values.tokens_per_layer[:, 0])
    assert (-np.diff(view.layer_tokens) == removed).all() and removed.sum() > 0
    assert view.layer_tokens[0] - view.layer_tokens[-1] == view.num_patches - view.num_kept

    source = draw_frames(1)
    for index, frame, time in zip(sampled.indices, view.frames, view.captions, strict=True):
        assert time == f"{index / 8:.2f} s"
        step = 64 // len(frame)
        small = source[index].reshape(len(frame), step, len(frame), step, 3).mean((1, 3))
        assert np.abs(small - frame).mean() < 12


def test_a_question_is_answered_as_the_pipeline_answers_it(folder, clip, tmp_path, views):
    options = ("--out", tmp_path / "merge.png", "--merge-schedule", STRONG, "--model", folder, "--device", "cpu")
    text = succeeds("show", clip, "--question", QUESTION, *options)
    pipe = build_pipeline("video-text-to-text", model=str(folder), device="cpu")
    answer = pipe(clip, QUESTION, merge_schedule=json.loads(STRONG))[0]["generated_text"]
    assert f"question  {QUESTION}\nanswer    {answer}\n" in text
    assert list(views[0].notes) == [f'"{QUESTION}" - "{answer}"']
    assert views[0].title == "clip.mp4 · merge schedule of 1 step"
    assert rows(succeeds("show", clip, *options), "answer") == []
    assert "empty" in fails("show", clip, "--question", " ", *options)


def test_ask_merges_as_it_is_told(folder, clip):
    options = ("--model", folder, "--max-new-tokens", 12, "--device", "cpu")
    pipe = build_pipeline("video-text-to-text", model=str(folder), device="cpu", max_new_tokens=12)
    answers = {}
    for schedule in ("none", STRONG):
        text = succeeds("ask", clip, QUESTION, *options, "--merge-schedule", schedule)
        given = loading.read_merge_schedule(schedule)
        answers[schedule] = pipe(clip, QUESTION, merge_schedule=given)[0]["generated_text"]
        assert f"answer    {answers[schedule]}\n" in text
    assert answers["none"] != answers[STRONG]


def test_the_checkpoint_brings_its_own_schedule(clip, tmp_path, views):
    folder = save_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"steps": [{"layer": 2, "target_ratio": 0.5}], "ratio_of": "input", "max_run": 2}
    (folder / "config.json").write_text(json.dumps({**config, "merge_schedule": own}))
    succeeds("show", clip, "--out", tmp_path / "merge.png", "--model", folder)
    succeeds("show", clip, "--out", tmp_path / "merge.png", "--model", folder, "--merge-schedule", "table5")
    assert [view.steps for view in views] == [
        {2: "keep 50 % of the input"},
        {1: "keep 50 %", 2: "keep 50 %", 3: "keep 50 %"},
    ]
    assert views[0].longest == 2
    assert views[1].title == "clip.mp4 · merge schedule table5"


def test_a_step_can_be_chosen(folder, clip, tmp_path, views):
    options = ("--out", tmp_path / "merge.png", "--model", folder, "--merge-schedule", "table5")
    left = [rows(succeeds("show", clip, *options, *step), "shown")[0] for step in ((), ("--step", 1), ("--step", 3))]
    assert left[0] == left[2] == "16 of 128 patches left (12%) after the merge at layer 3"
    assert left[1] == "64 of 128 patches left (50%) after the merge at layer 1"
    assert [view.layer for view in views] == [3, 1, 3]
    for step in (0, 4, -1):
        assert f"--step {step}: the merge schedule has steps 1 to 3" in fails("show", clip, *options, "--step", step)


def test_without_merging_there_is_nothing_to_show(folder, clip, tmp_path):
    for options in ((), ("--merge-schedule", "none"), ("--merge-schedule", "[]")):
        message = fails("show", clip, "--out", tmp_path / "merge.png", "--model", folder, *options)
        assert "nothing to show" in message and "--merge-schedule: paper, table5" in message
    assert not (tmp_path / "merge.png").exists()


def test_a_file_that_cannot_be_written_is_refused_before_any_work(folder, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_config", lambda checkpoint: pytest.fail("work was done"))
    options = ("--model", folder, "--merge-schedule", "table5")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(clip)
    told = {
        "merge.gif": "ends in .mp4",
        "merge": "ends in .mp4",
        "missing/merge.mp4": f"no folder {tmp_path / 'missing'}",
        "folder.mp4": "cannot write there",
        "link.mp4": "is the video itself",
        os.path.relpath(clip, tmp_path): "is the video itself",
    }
    for name, message in told.items():
        assert message in fails("show", clip, "--out", tmp_path / name, *options), name
    assert "--out" in fails("show", clip, *options)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert "cannot write there" in fails("show", clip, "--out", tmp_path / "merge.mp4", *options)


def test_mistakes_in_a_schedule_are_one_line_before_the_weights_are_read(folder, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "build_pipeline", lambda *args: pytest.fail("weights were read"))
    for command in (("ask", clip, QUESTION), ("show", clip, "--out", tmp_path / "merge.png")):

        def told(schedule, command=command):
            return fails(*command, "--model", folder, "--merge-schedule", schedule)

        assert "'papre' is not known; choose one of none, paper, table5" in told("papre")
        assert "is no JSON" in told("[{'layer': 1}]")
        assert "decoder has 4 layers" in told('[{"layer": 4, "target_ratio": 0.5}]')
        assert "'maxrun'" in told('{"steps": "paper", "maxrun": 3}')


def test_a_video_too_long_for_the_model_is_refused_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "build_pipeline", lambda *args: pytest.fail("weights were read"))
    long = write_clip(tmp_path / "long.mp4", np.zeros((120, 64, 64, 3), np.uint8))
    options = ("--model", folder, "--merge-schedule", "table5", "--frames", 120)
    assert "2048 positions" in fails("show", long, "--out", tmp_path / "merge.png", *options)


def test_an_image_is_a_video_of_one_frame(folder, tmp_path, views):
    Image.fromarray(draw_frames(1)[0]).save(tmp_path / "picture.png")
    options = ("--model", folder, "--merge-schedule", "table5")
    text = succeeds("show", tmp_path / "picture.png", "--out", tmp_path / "merge.png", *options)
    assert rows(text, "shown") == ["16 of 16 patches left (100%) after the merge at layer 3"]
    assert views[0].longest == 1
    assert "is the video itself" in fails("show", tmp_path / "picture.png", "--out", tmp_path / "picture.png", *options)
