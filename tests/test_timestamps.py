"""Time marks: the true time of each frame as text before it, counted, and still before it after merging."""

import re

import numpy as np
import pytest
import torch
from clips_elva import byte_tokenizer, write_counter
from merging_cases import deep_model
from PIL import Image

from elva_hf.configuration_elva import SPECIAL_TOKENS
from elva_hf.errors_elva import ConfigurationError, ContextOverflowError, VideoError
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.source_elva import Damage, Frame, VideoInfo

OPTIONS = {"patch_size": 4, "longest_edge": 16, "low_res_longest_edge": 8, "num_frames": 4}
UNEVEN = (0, 700, 1500, 2100, 6000, 60_000, 61_000, 62_500)  # milliseconds


@pytest.fixture(scope="module")
def processor():
    return ElvaProcessor.from_tokenizer(byte_tokenizer(), **OPTIONS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_counter(tmp_path_factory.mktemp("clips") / "uneven.mkv", len(UNEVEN), pts=UNEVEN)


def draw(num_frames=4, height=8, width=8):
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def written_times(processor, ids):
    """What stands before each `<FRAME>`, and the rest must be that of a video without marks."""
    text = processor.decode(ids)
    marks = re.findall(r"([0-9.]+s)<FRAME>", text)
    assert len(marks) == text.count("<FRAME>")
    return marks, re.sub(r"[0-9.]+s(?=<FRAME>)", "", text)


def test_each_frame_stands_after_its_true_time(processor, clip):
    out = processor(text="a<video>b", videos=clip, num_frames=8, timestamps=True, return_metadata=True)
    marks, rest = written_times(processor, out["input_ids"][0])
    assert marks == ["0.0s", "0.7s", "1.5s", "2.1s", "6.0s", "60.0s", "61.0s", "62.5s"]
    assert out["video_metadata"][0].times == pytest.approx([pts / 1000 for pts in UNEVEN])
    plain = processor(text="a<video>b", videos=clip, num_frames=8)
    assert rest == processor.decode(plain["input_ids"][0]) and rest.startswith("a<|vision_start|><FRAME>")
    assert torch.equal(out["pixel_values_videos"], plain["pixel_values_videos"])


def test_times_count_from_the_start_of_the_video_not_of_the_part(processor, clip):
    ids = processor(text="<video>", videos=clip, num_frames=3, video_start=60.0, timestamps=True)["input_ids"][0]
    assert written_times(processor, ids)[0] == ["60.0s", "61.0s", "62.5s"]


@pytest.mark.parametrize(
    ("fps", "marks"), [(2, ["0.0s", "0.5s"]), (25, ["0.00s", "0.04s"]), (500, ["0.000s", "0.002s"])]
)
def test_digits_are_as_many_as_tell_frames_apart(processor, fps, marks):
    options = {"video_metadata": {"fps": fps}, "do_sample_frames": False, "timestamps": True}
    ids = processor(text="<video>", videos=draw(2), **options)["input_ids"][0]
    assert written_times(processor, ids)[0] == marks


def test_an_image_has_no_time(processor, clip):
    still = Image.fromarray(draw(1)[0])
    out = processor(text="<image><video>", images=still, videos=clip, timestamps=True)
    assert processor.decode(out["input_ids"][0]).startswith("<|vision_start|><FRAME>")
    assert written_times(processor, out["input_ids"][0][9:])[0]  # the video has


def test_a_video_without_times_is_refused_before_anything_is_decoded(processor, clip, monkeypatch):
    monkeypatch.setattr("elva_hf.sampled_elva.read_frames", lambda *args, **options: pytest.fail("decoded"))
    for videos, text in ((draw(), "<video>"), ([clip, draw()], "<video><video>")):
        for overflow in ("error", "fit"):
            with pytest.raises(
                VideoError, match=r"timestamps=True needs a video with known times.*video_metadata"
            ) as caught:
                processor(text=text, videos=videos, timestamps=True, overflow=overflow)
            assert caught.value.reason == "bad_time" and caught.value.source == "(4, 8, 8, 3) array"
    with pytest.raises(VideoError, match="known times"):
        processor.count_tokens(draw(), timestamps=True)


def test_arrays_of_stated_rate_have_times(processor):
    ids = processor(text="<video>", videos=draw(), video_metadata={"fps": 2.0}, timestamps=True)["input_ids"][0]
    assert written_times(processor, ids)[0] == ["0.0s", "0.5s", "1.0s", "1.5s"]


def test_it_is_a_field_of_the_processor_and_saved(clip, tmp_path):
    made = ElvaProcessor.from_tokenizer(byte_tokenizer(), **OPTIONS, timestamps=True)
    made.save_pretrained(tmp_path)
    loaded = ElvaProcessor.from_pretrained(tmp_path)
    ids = loaded(text="<video>", videos=clip)["input_ids"][0]
    assert ids == made(text="<video>", videos=clip)["input_ids"][0]
    assert len(written_times(loaded, ids)[0]) == 4
    assert "s<FRAME>" not in loaded.decode(loaded(text="<video>", videos=clip, timestamps=False)["input_ids"][0])
    with pytest.raises(ConfigurationError, match="timestamps is 'yes'"):
        made(text="<video>", videos=clip, timestamps="yes")
    with pytest.raises(ConfigurationError, match="timestamps"):
        made._get_num_multimodal_tokens(video_sizes=[(9, 8, 12)])


def test_marks_are_counted_where_tokens_are(processor, clip, config):
    options = {"num_frames": 8, "timestamps": True}
    ids = processor(text="<video>", videos=clip, **options)["input_ids"][0]
    counted = processor.count_tokens(clip, **options)
    assert counted.num_mark_tokens == len("0.0s0.7s1.5s2.1s6.0s60.0s61.0s62.5s")
    assert counted.num_tokens == len(ids) == processor.plan(clip, config=config, **options).num_tokens
    assert processor.count_tokens(clip, num_frames=8).num_mark_tokens == 0


def test_marks_take_room_in_the_context(processor, clip):
    options = {"num_frames": 8, "timestamps": True}
    ids = processor(text="ab<video>", videos=clip, **options)["input_ids"][0]
    processor(text="ab<video>", videos=clip, **options, context_length=len(ids))
    visual = processor.count_tokens(clip, num_frames=8).num_visual_tokens
    processor(text="ab<video>", videos=clip, **options, max_visual_tokens=visual)
    with pytest.raises(ContextOverflowError) as caught:
        processor(text="ab<video>", videos=clip, **options, context_length=len(ids) - 1)
    again = processor(
        text="ab<video>", videos=clip, timestamps=True, context_length=len(ids) - 1, **caught.value.settings
    )
    fitted = processor(text="ab<video>", videos=clip, **options, context_length=len(ids) - 1, overflow="fit")
    assert len(fitted["input_ids"][0]) < len(ids) and fitted["input_ids"] == again["input_ids"]
    assert len(written_times(processor, fitted["input_ids"][0])[0]) == 8


def test_no_frame_is_given_up_that_would_have_fitted_with_its_mark(processor):
    options = {"video_metadata": {"fps": 3.0}, "timestamps": True, "return_metadata": True}
    clip = draw(12, 16, 16)

    def tokens(count):
        return len(
            processor(text="<video>", videos=clip, num_high_res_frames=0, num_low_res_frames=count, **options)[
                "input_ids"
            ][0]
        )

    needed = [tokens(count) for count in range(1, 13)]
    for limit in range(needed[0], needed[-1], 3):
        out = processor(text="<video>", videos=clip, num_frames=12, context_length=limit, overflow="fit", **options)
        assert out["video_metadata"][0].num_frames == sum(count <= limit for count in needed)
        with pytest.raises(ContextOverflowError) as caught:
            processor(text="<video>", videos=clip, num_frames=12, context_length=limit, **options)
        assert sum(caught.value.settings.values()) == out["video_metadata"][0].num_frames


def test_assistant_masks_still_cover_answers(processor, clip):
    chat = [
        {"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "a?"}]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "b?"}, {"type": "video", "path": clip, "num_frames": 2}]},
        {"role": "assistant", "content": "two"},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "timestamps": True}
    out = processor.apply_chat_template(chat, return_assistant_tokens_mask=True, **options)
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    assert processor.decode(ids[mask.bool()]) == "one<|im_end|>two<|im_end|>"
    clean = processor.apply_chat_template(chat, sanitize_control_tokens=True, **options)
    assert torch.equal(clean["input_ids"], out["input_ids"])
    assert len(written_times(processor, ids)[0]) == 6


class Leaky:
    """A reader of twenty frames, two a second, one of which cannot be decoded."""

    info = VideoInfo("'leaky'", 8, 8, 20, 10.0, 2.0, times=tuple(i / 2 for i in range(20)))
    damage = Damage(num_bad_packets=1)

    def read(self, indices):
        for index in indices:
            if index != 6:
                yield Frame(index, index / 2, np.full((8, 8, 3), index, np.uint8))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_a_frame_that_is_lost_takes_its_time_with_it(processor, monkeypatch):
    monkeypatch.setattr("elva_hf.video_processing_elva.open_reader", lambda source, **options: Leaky())
    out = processor(text="<video>", videos="leaky", num_frames=20, timestamps=True, return_metadata=True)
    marks, _ = written_times(processor, out["input_ids"][0])
    assert marks == [f"{i / 2}s" for i in range(20) if i != 6]
    assert out["video_metadata"][0].missing == (6,)
    assert len(out["pixel_values_videos"]) == 19 * 4 == out["input_ids"][0].count(processor.video_token_id)


@pytest.fixture(scope="module")
def model(processor):
    ids = {f"{name}_id": processor.tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    return deep_model(text={"vocab_size": len(processor.tokenizer)}, **ids)


@pytest.mark.parametrize(
    "schedule",
    ["table5", [{"layer": 1, "similarity_threshold": 0.99}, {"layer": 3, "target_ratio": 0.4}], "paper"],
    ids=["table5", "mixed", "paper"],
)
def test_marks_stay_before_their_frames_in_every_layer(processor, model, schedule):
    frames = np.repeat(draw(3, 8, 12), 4, axis=0)
    options = {
        "video_metadata": {"fps": 4.0},
        "num_high_res_frames": 12,
        "num_low_res_frames": 0,
        "return_tensors": "pt",
    }
    texts = ["ab<video>cd<video>e", "<video>f"]
    videos = [[frames, frames[:5]], [frames]]
    runs = {}
    for timestamps in (False, True):
        inputs = processor(text=texts, videos=videos, timestamps=timestamps, **options)
        with torch.no_grad():
            out = model(**inputs, merge_schedule=schedule, output_merge_map=True, use_cache=True)
        runs[timestamps] = inputs, out
    inputs, out = runs[True]
    ids, merges = inputs["input_ids"], out.merge_map
    assert len(merges.layers) > 0 and not bool(merges.kept().all())
    for step in range(len(merges.layers)):
        for row, kept in zip(ids, merges.kept(step), strict=True):
            alive = row[kept & (row != processor.tokenizer.pad_token_id)].tolist()
            text = processor.decode(alive)
            marks = re.findall(r"([0-9.]+s)<FRAME>", text)
            whole = re.findall(r"([0-9.]+s)<FRAME>", processor.decode(row))
            assert marks == whole and len(marks) == text.count("<FRAME>") == processor.decode(row).count("<FRAME>")
            assert text.count("<LINE>") == processor.decode(row).count("<LINE>")
    if schedule == "table5":  # ratios alone: how many merge does not depend on what stands between
        patches = [
            torch.stack(
                [(run["input_ids"] == processor.video_token_id) & ran.merge_map.kept(step) for step in range(3)]
            )
            for run, ran in runs.values()
        ]
        assert torch.equal(patches[0].sum(-1), patches[1].sum(-1))
        held = [ran.past_key_values.tokens_per_layer - run["attention_mask"].sum(1) for run, ran in runs.values()]
        assert torch.equal(*held)


def test_marks_change_nothing_about_which_patches_may_merge(processor, model):
    """With hardly any similarity asked for all merge that may: the same ones, whatever is written between."""
    schedule = [{"layer": 1, "similarity_threshold": -0.999}]
    frames = np.repeat(draw(2, 8, 8), 3, axis=0)
    kept = []
    for timestamps in (False, True):
        options = {"video_metadata": {"fps": 4.0}, "num_frames": 6, "timestamps": timestamps, "return_tensors": "pt"}
        inputs = processor(text="<video>x", videos=frames, **options)
        with torch.no_grad():
            merges = model(**inputs, merge_schedule=schedule, output_merge_map=True).merge_map
        patch = inputs["input_ids"][0] == processor.video_token_id
        kept.append(merges.kept()[0][patch])
    assert torch.equal(*kept) and int(kept[0].sum()) == 4
