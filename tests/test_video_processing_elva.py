"""Frames -> patches: order of elements, values, grids, options, saving."""

import json
import logging

import numpy as np
import pytest
import torch
from clips_elva import paint, read, write_counter
from PIL import Image

from elva_hf.decoding_elva import DecodingOptions, open_reader, read_video
from elva_hf.errors_elva import ConfigurationError, VideoError
from elva_hf.limits_elva import DecodingLimits, UrlPolicy
from elva_hf.options_elva import VideoClip
from elva_hf.source_elva import Damage, Frame, VideoInfo
from elva_hf.video_processing_elva import ElvaVideoProcessor, normalize, patchify, split_videos

TABLE_6 = [(8, 16, 5976), (8, 32, 7144), (16, 0, 9616), (16, 8, 10200), (16, 16, 10784), (32, 0, 19232)]


@pytest.fixture
def small():
    return ElvaVideoProcessor(patch_size=4, longest_edge=32, low_res_longest_edge=16, num_frames=4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_counter(tmp_path_factory.mktemp("clips") / "clip.mp4", 20)


def draw(num_frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def loop_patches(frames, size):
    """The reference: one element at a time, frame, row, column, then channel, row, column."""
    patches = []
    for frame in frames:
        for top in range(0, frame.shape[0], size):
            for left in range(0, frame.shape[1], size):
                patch = []
                for channel in range(3):
                    for y in range(size):
                        for x in range(size):
                            patch.append((float(frame[top + y, left + x, channel]) / 255 - 0.5) / 0.5)
                patches.append(patch)
    return torch.tensor(patches)


def test_patches_equal_a_loop(small):
    videos = [draw(4, 12, 20), draw(3, 8, 4, seed=1)]
    out = small(videos)
    expected = torch.cat([loop_patches(video, 4) for video in videos])
    assert out["pixel_values_videos"].dtype == torch.float32
    torch.testing.assert_close(out["pixel_values_videos"], expected, rtol=0, atol=1e-6)
    assert out["video_grids"] == [[(3, 5)] * 4, [(2, 1)] * 3]


def test_patchify_has_channel_row_column_inside_and_rows_outside():
    frame = torch.arange(3 * 4 * 6).view(3, 4, 6)
    patches = patchify(frame, 2)
    assert patches.shape == (6, 12)
    assert torch.equal(patches[4], frame[:, 2:4, 2:4].flatten())


def test_values_are_normalised_by_channel():
    patches = torch.full((2, 12), 51, dtype=torch.uint8)
    out = normalize(patches, (0.0, 0.1, 0.2), (1.0, 0.5, 0.1)).view(2, 3, 4)
    assert out[0, :, 0].tolist() == pytest.approx([0.2, 0.2, 0.0], abs=1e-6)


@pytest.mark.parametrize(("high", "low", "tokens"), TABLE_6)
def test_table_6_from_real_frames(high, low, tokens):
    processor = ElvaVideoProcessor(longest_edge=672, low_res_longest_edge=224)
    frames = np.broadcast_to(draw(1, 672, 672), (40, 672, 672, 3))
    options = {"num_high_res_frames": high, "num_low_res_frames": low}
    planned = processor.sample(frames, **options)
    assert planned.num_visual_tokens == tokens and planned.num_tokens == tokens + 2
    out = processor(frames, return_metadata=True, **options)
    assert out["video_metadata"] == [planned]
    assert len(out["pixel_values_videos"]) == planned.num_patches
    assert sum(planned.high) == high and planned.num_frames == high + low


@pytest.mark.parametrize(("side", "tokens"), [(672, 601), (448, 273), (336, 157), (224, 73), (168, 43)])
def test_a_frame_of_the_paper_has_its_tokens(side, tokens):
    image = Image.fromarray(draw(1, 700, 700)[0])
    out = ElvaVideoProcessor(longest_edge=side)(image, return_metadata=True)
    assert out["video_metadata"][0].tokens_per_frame == (tokens,)
    assert len(out["pixel_values_videos"]) == (side // 28) ** 2


def test_planning_and_decoding_agree_on_a_file(small, clip):
    for options in (
        {},
        {"fps": 10.0},
        {"num_high_res_frames": 3, "num_low_res_frames": 6},
        {"do_sample_frames": False},
    ):
        out = small(clip, return_metadata=True, **options)
        assert out["video_metadata"] == [small.sample(clip, **options)]
        assert len(out["pixel_values_videos"]) == out["video_metadata"][0].num_patches
    assert out["video_metadata"][0].num_frames == 20


def test_hybrid_frames_have_two_grids_in_time_order(small, clip):
    out = small(clip, num_high_res_frames=2, num_low_res_frames=3, return_metadata=True)
    video = out["video_metadata"][0]
    assert video.high == (False, True, False, True, False) or sum(video.high) == 2
    assert [grid == (3, 8) for grid in video.grids] == list(video.high)
    assert list(video.times) == sorted(video.times) and video.indices == (2, 6, 10, 14, 18)


def test_the_right_pixels_reach_the_patches(clip):
    processor = ElvaVideoProcessor(patch_size=16, longest_edge=128, num_frames=5)
    out = processor(clip, return_metadata=True)
    for number, patches in zip(out["video_metadata"][0].indices, out["pixel_values_videos"].split(24), strict=True):
        frame = patches.view(3, 8, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(3, 48, 128)
        assert read((frame + 1) * 127.5) == number


def test_numpy_on_request_and_nothing_else(small):
    assert isinstance(small(draw(2, 8, 8), return_tensors="np")["pixel_values_videos"], np.ndarray)
    with pytest.raises(ConfigurationError, match="return_tensors"):
        small(draw(2, 8, 8), return_tensors="tf")


def test_a_list_of_frames_is_one_video_and_other_lists_are_several(clip):
    frames = [Image.fromarray(frame) for frame in draw(3, 8, 8)]
    assert len(split_videos(frames)) == 1
    assert len(split_videos(list(draw(3, 8, 8)))) == 1
    assert len(split_videos([frames, frames[:1]])) == 2
    assert len(split_videos([clip, str(clip), clip.read_bytes(), draw(3, 8, 8)])) == 4
    assert len(split_videos(clip)) == 1
    with pytest.raises(VideoError, match="empty"):
        split_videos([])


def test_a_short_video_is_reported_once_and_never_padded(small, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for _ in range(3):
            out = small(draw(3, 8, 8), num_frames=77, return_metadata=True)
    finally:
        logger.removeHandler(caplog.handler)
    video = out["video_metadata"][0]
    assert (video.num_frames, video.num_asked, video.indices) == (3, 77, (0, 1, 2))
    assert [record for record in caplog.messages if "3 of 77" in record] == [record for record in caplog.messages][:1]
    assert len(caplog.messages) == 1


def test_an_image_never_warns(small, caplog):
    small(Image.fromarray(paint(1)), num_frames=50)
    assert not caplog.messages


def test_arrays_of_stated_rate_can_be_sampled_by_fps(small):
    out = small(draw(8, 8, 8), fps=1.0, video_metadata={"fps": 4.0}, return_metadata=True)
    assert out["video_metadata"][0].times == (0.5, 1.5)
    with pytest.raises(ConfigurationError, match="video_metadata"):
        small(draw(8, 8, 8), fps=1.0)
    with pytest.raises(ConfigurationError, match="2 videos, but 1"):
        small(draw(8, 8, 8), video_metadata=[{"fps": 1}, {"fps": 2}])


def test_a_video_is_no_image(small, clip):
    with pytest.raises(VideoError, match="20 frames"):
        small.encode([clip], images=[True])
    with pytest.raises(VideoError, match="as an image"):
        small.sample(clip, image=True)


def test_one_way_to_count_frames_replaces_another(small):
    frames = draw(12, 8, 8)
    assert ElvaVideoProcessor().num_high_res_frames == ElvaVideoProcessor().num_low_res_frames == 32
    assert ElvaVideoProcessor(num_high_res_frames=4).num_low_res_frames == 32
    assert ElvaVideoProcessor(fps=2.0).num_high_res_frames is None
    assert small.sample(frames, num_frames=6).num_frames == 6
    hybrid = small.sample(frames, num_high_res_frames=2, num_low_res_frames=3)
    assert (hybrid.num_frames, sum(hybrid.high)) == (5, 2)
    assert small.sample(frames, num_low_res_frames=3).high == (False,) * 3
    assert small.sample(frames).num_frames == 4  # the processor itself is unchanged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 2, "num_high_res_frames": 2}, "exclude each other"),
        ({"num_frames": 2, "fps": 1.0}, "exclude each other"),
        ({"num_frames": 2, "do_sample_frames": False}, "every frame"),
        ({"num_frame": 2}, "did you mean num_frames"),
        ({"do_resize": False}, "no option"),
        ({"longest_edge": 30}, "multiple of patch_size 4"),
        ({"longest_edge": 0}, "longest_edge is 0"),
        ({"patch_size": 4.0}, "patch_size"),
        ({"num_high_res_frames": 1, "num_low_res_frames": 1, "low_res_longest_edge": 18}, "low_res_longest_edge"),
        ({"image_mean": [0.5, 0.5]}, "2 values"),
        ({"image_std": 0.0}, "above 0"),
    ],
)
def test_bad_options_are_refused_at_the_call_and_at_construction(small, options, message):
    with pytest.raises(ConfigurationError, match=message):
        small(draw(2, 8, 8), **options)
    if "do_sample_frames" not in options:
        with pytest.raises(ConfigurationError, match=message):
            ElvaVideoProcessor(**{"patch_size": 4, "longest_edge": 32, "low_res_longest_edge": 16, **options})


def test_the_ceiling_holds_for_low_resolution_too():
    processor = ElvaVideoProcessor(longest_edge=224, num_high_res_frames=1, num_low_res_frames=2)
    assert processor.sample(draw(3, 300, 300)).grids == ((8, 8),) * 3


def test_low_resolution_is_not_checked_where_it_is_not_used():
    ElvaVideoProcessor(patch_size=20, longest_edge=100, num_frames=4)


def test_saving_and_loading_keeps_every_field(small, tmp_path):
    for processor in (small, ElvaVideoProcessor(), ElvaVideoProcessor(fps=1.5, image_mean=[0.1, 0.2, 0.3])):
        processor.save_pretrained(tmp_path)
        loaded = ElvaVideoProcessor.from_pretrained(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert saved["video_processor_type"] == "ElvaVideoProcessor" and "_valid_kwargs_names" not in saved


def test_loading_with_options_overrides_the_saved_ones(tmp_path):
    ElvaVideoProcessor().save_pretrained(tmp_path)
    loaded = ElvaVideoProcessor.from_pretrained(tmp_path, num_frames=8, longest_edge=448)
    assert (loaded.num_frames, loaded.num_high_res_frames, loaded.longest_edge) == (8, None, 448)
    assert ElvaVideoProcessor.from_pretrained(tmp_path, num_low_res_frames=0).num_high_res_frames == 32


def test_filling_frame_by_frame_gives_the_values_of_the_whole(clip):
    """Bit for bit what patchify and normalize give on all frames at once."""
    options = {"num_high_res_frames": 3, "num_low_res_frames": 6}
    processor = ElvaVideoProcessor(
        patch_size=4,
        longest_edge=32,
        low_res_longest_edge=16,
        image_mean=[0.48, 0.46, 0.41],
        image_std=[0.27, 0.26, 0.28],
    )
    frames = [
        frame
        for source in (clip, draw(5, 20, 12), Image.fromarray(paint(3)))
        for frame in decode_alone(processor, source, options)
    ]
    whole = normalize(torch.cat([patchify(frame, 4) for frame in frames]), processor.image_mean, processor.image_std)
    filled, _ = processor.encode([clip, draw(5, 20, 12), Image.fromarray(paint(3))], **options)
    assert filled.dtype == torch.float32 and filled.is_contiguous() and torch.equal(filled, whole)


def decode_alone(processor, source, options):
    chosen = processor.resolve_options(**options)
    return read_video(source, lambda info: chosen.plan(info), chosen.frame_size).frames


class Leaky:
    """A reader of forty frames, of which some cannot be decoded."""

    def __init__(self, lost, damage=None, name="'leaky'"):
        self.info = VideoInfo(name, 8, 12, 40, 4.0, 10.0, times=tuple(i / 10 for i in range(40)))
        self.lost, self.damage = lost, damage or Damage()

    def read(self, indices):
        for index in indices:
            if index not in self.lost:
                yield Frame(index, index / 10, np.full((8, 12, 3), index, np.uint8))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def test_frames_that_are_lost_are_left_out_named_and_not_padded(small, monkeypatch, caplog):
    damage = Damage(2, 1, ("interlaced: both fields",))
    readers = [Leaky((3, 17), damage), Leaky((), name="'whole'"), Leaky((0,), name="'headless'")]
    monkeypatch.setattr("elva_hf.video_processing_elva.open_reader", lambda source, **options: readers[source])
    patches, sampled = small.encode([0, 1, 2], num_frames=40)
    leaky, whole, headless = sampled
    assert (leaky.missing, whole.missing, headless.missing) == ((3, 17), (), (0,))
    assert leaky.damage == damage and whole.damage == Damage()
    assert leaky.indices == tuple(i for i in range(40) if i not in (3, 17)) and len(leaky.times) == 38
    assert len(patches) == sum(video.num_patches for video in sampled) == 6 * (38 + 40 + 39)
    levels = ((patches[::6, 0] + 1) * 127.5).round().int().tolist()
    assert levels == [*leaky.indices, *whole.indices, *headless.indices]
    assert patches.untyped_storage().nbytes() == patches.nbytes  # trimmed, not hidden
    assert "'leaky': 2 frames cannot be decoded and are left out: 3, 17." in caplog.messages
    assert "'leaky' is damaged: the decoder refused 2 packets and concealed errors in 1 frames." in caplog.messages
    assert "'leaky': interlaced: both fields." in caplog.messages
    assert not [message for message in caplog.messages if "'whole'" in message]


def test_damage_can_be_refused(small, monkeypatch):
    monkeypatch.setattr("elva_hf.video_processing_elva.open_reader", lambda source, **options: Leaky((3,)))
    with pytest.raises(VideoError, match="1 cannot be decoded") as caught:
        small(["leaky"], num_frames=40, on_damage="raise")
    assert caught.value.reason == "damaged"


def test_fewer_frames_for_a_budget_are_not_called_a_short_video(small, caplog):
    out = small(draw(30, 8, 8), num_frames=30, max_visual_tokens=100, overflow="fit", return_metadata=True)
    assert out["video_metadata"][0].num_frames < out["video_metadata"][0].num_asked == 30
    assert not caplog.messages


def test_a_part_of_a_video(small, clip):
    whole = small(clip, do_sample_frames=False, return_metadata=True)
    part = small(clip, do_sample_frames=False, video_start=0.2, video_end=0.4, return_metadata=True)
    video = part["video_metadata"][0]
    assert video.indices == (5, 6, 7, 8, 9) and video.times == whole["video_metadata"][0].times[5:10]
    rows = video.num_patches // 5
    assert torch.equal(part["pixel_values_videos"], whole["pixel_values_videos"][5 * rows : 10 * rows])
    assert small.sample(clip, video_start=0.2, num_frames=3).times[0] >= 0.2
    with pytest.raises(VideoError, match="earlier start") as caught:
        small(clip, video_start=0.8)
    assert caught.value.reason == "bad_time"


def test_frames_at_given_times(small, clip):
    out = small(clip, frame_times=[0.5, 0.0, 0.13], return_metadata=True)
    assert out["video_metadata"][0].indices == (0, 3, 12) and out["video_metadata"][0].high == (True,) * 3
    assert small.sample(clip, frame_times=np.array([0.5])).indices == (12,)
    with pytest.raises(VideoError, match=r"frame_times holds 0\.9 s"):
        small(clip, frame_times=[0.9])
    with pytest.raises(ConfigurationError, match="exclude each other"):
        small(clip, frame_times=[0.1], fps=1.0)


def test_high_frames_by_scene(small):
    """Five dark frames, two of a lamp, fifteen of another room: each scene has one high frame."""
    frames = np.zeros((22, 24, 24, 3), np.uint8)
    frames[5:7, :12] = 250
    frames[7:] = (90, 20, 160)
    options = {"num_high_res_frames": 3, "num_low_res_frames": 19, "return_metadata": True}
    out = small(frames, **options, high_res_selection="scenes")
    video = out["video_metadata"][0]
    chosen = [index for index, high in zip(video.indices, video.high, strict=True) if high]
    assert len(chosen) == 3 and chosen[0] < 5 and chosen[1] in (5, 6) and chosen[2] >= 7
    assert [grid == (6, 6) for grid in video.grids] == list(video.high)
    uniform = small(frames, **options)["video_metadata"][0]
    assert [index for index, high in zip(uniform.indices, uniform.high, strict=True) if high] == [3, 11, 18]
    assert video.num_visual_tokens == uniform.num_visual_tokens
    edges = np.cumsum([0, *(rows * cols for rows, cols in video.grids)])
    levels = [float(out["pixel_values_videos"][edge, 0]) for edge in edges[:-1]]
    assert levels == [float(np.float32(frames[i, 0, 0, 0]) / 255 - 0.5) / 0.5 for i in video.indices]
    with pytest.raises(ConfigurationError, match="high_res_selection is 'best'"):
        small(frames, high_res_selection="best")


def test_a_clip_brings_options_of_its_own(small, clip):
    out = small(
        [VideoClip(clip, num_frames=2), clip, VideoClip(clip, video_end=0.4)], num_frames=5, return_metadata=True
    )
    assert [video.num_frames for video in out["video_metadata"]] == [2, 5, 5]
    assert out["video_metadata"][2].times[-1] < 0.4 < out["video_metadata"][1].times[-1]
    many = small.sample(VideoClip(clip, num_high_res_frames=1, num_low_res_frames=3), do_sample_frames=False)
    assert (many.num_frames, sum(many.high)) == (4, 1)
    windows = small.sample(VideoClip(clip, video_start=0.2), video_end=0.6, do_sample_frames=False)
    assert windows.indices == tuple(range(5, 15))
    with pytest.raises(ConfigurationError, match="exclude each other"):
        small(VideoClip(clip, num_frames=2, fps=1.0))
    with pytest.raises(TypeError):
        VideoClip(clip, 3)
    with pytest.raises(AttributeError):
        VideoClip(clip).num_frames = 3


def test_a_url_is_refused_unless_urls_are_allowed(small):
    for options in ({}, {"allow_urls": False}):
        with pytest.raises(VideoError, match="allow_urls=True") as caught:
            small("https://user:secret@example.org/clip.mp4?token=1", **options)
        assert (
            caught.value.reason == "protocol" and "secret" not in str(caught.value) and "token" not in str(caught.value)
        )


def test_reading_options_reach_the_reader(small, clip, monkeypatch):
    seen = []

    def spy(source, *, fps, options):
        seen.append(options)
        return open_reader(source, fps=fps, options=options)

    monkeypatch.setattr("elva_hf.video_processing_elva.open_reader", spy)
    small(clip)
    assert seen[-1] == DecodingOptions()
    limits, policy = DecodingLimits(max_pixels=10**6), UrlPolicy(allowed_hosts=("example.org",))
    small(clip, limits=limits, allow_urls=policy, isolate=True, threads=1, on_damage="raise")
    assert seen[-1] == DecodingOptions(limits=limits, urls=policy, isolate=True, threads=1, on_damage="raise")
    small.sample(clip, allow_urls=True)
    assert seen[-1].urls == UrlPolicy()
    with pytest.raises(VideoError) as caught:
        small(clip, limits=DecodingLimits(max_pixels=100))
    assert caught.value.reason == "too_many_pixels"


def test_an_isolated_decoder_gives_the_same(small, clip):
    assert torch.equal(*(small(clip, isolate=isolate)["pixel_values_videos"] for isolate in (True, False)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_urls": "yes"}, "allow_urls is 'yes'"),
        ({"isolate": 1}, "isolate is 1"),
        ({"limits": {"max_pixels": 3}}, "limits is a dict; give DecodingLimits"),
        ({"threads": 0}, "threads is 0"),
        ({"on_damage": "ignore"}, "on_damage is 'ignore'"),
    ],
)
def test_reading_options_of_the_wrong_kind_are_refused(small, clip, options, message):
    with pytest.raises(ConfigurationError, match=message):
        small(clip, **options)


NEVER_SAVED = {
    "allow_urls": True,
    "limits": {"max_bytes": 10**15},
    "isolate": False,
    "threads": 64,
    "on_damage": "warn",
    "max_memory": 10**15,
    "context_length": 10**9,
    "video_start": 1.0,
    "frame_times": [1.0],
}


@pytest.mark.parametrize("name", NEVER_SAVED)
@pytest.mark.parametrize(
    "file", ["video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"]
)
def test_a_checkpoint_cannot_set_what_the_machine_decides(tmp_path, name, file):
    fields = {**ElvaVideoProcessor().to_dict(), name: NEVER_SAVED[name]}
    content = {"video_processor": fields} if file == "processor_config.json" else fields
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(
        ConfigurationError, match=f"'{name}' is an option of a call, .* pass {name}=... to the processor"
    ):
        ElvaVideoProcessor.from_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=f"'{name}' is an option of a call"):
        ElvaVideoProcessor(**{name: NEVER_SAVED[name]})


def test_what_the_machine_decides_is_never_saved(small, clip, tmp_path):
    small(clip, allow_urls=True, max_memory="1GB", threads=1, isolate=False, limits=DecodingLimits())
    made = ElvaVideoProcessor(high_res_selection="scenes", timestamps=True, max_visual_tokens=4096, overflow="fit")
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert not set(NEVER_SAVED) & set(saved)
    loaded = ElvaVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == made.to_dict()
    assert (loaded.high_res_selection, loaded.timestamps) == ("scenes", True)
    assert (loaded.max_visual_tokens, loaded.overflow) == (4096, "fit")
