"""Any source -> exactly the right frames at their true times; one clear error for each bad source."""

import io
import os
import pickle
import socket

import av
import numpy as np
import pytest
import torch
from clips_elva import HEIGHT, MAKERS, WIDTH, paint, read, write_counter, write_sound
from PIL import Image

from elva_hf import decoding_elva
from elva_hf.decoding_elva import DecodingOptions, open_reader, probe, read_video, resize_frame
from elva_hf.errors_elva import REASONS, ConfigurationError, ContextOverflowError, VideoError
from elva_hf.frames_elva import FramePlan, FrameSampling
from elva_hf.limits_elva import DecodingLimits, UrlPolicy
from elva_hf.source_elva import shown

COUNT = 40


def pick(*indices, high=None):
    return lambda info: FramePlan(indices, tuple(high or [True] * len(indices)), len(indices))


def keep(height, width, high):
    return height, width


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {kind: write_counter(folder / f"clip.{kind}", COUNT) for kind in MAKERS}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("wanted", [range(COUNT), (0,), (39,), (11, 12, 13), (3, 25, 26, 38), (23, 24, 35, 36)])
def test_every_container_gives_exactly_the_frames_asked(clips, kind, wanted):
    video = read_video(clips[kind], pick(*wanted), keep)
    assert [read(frame) for frame in video.frames] == list(wanted) == list(video.indices)
    assert video.times == pytest.approx([i / 25 for i in wanted], abs=1e-3)
    assert all(frame.shape == (3, HEIGHT, WIDTH) and frame.dtype == torch.uint8 for frame in video.frames)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_probe_knows_size_times_and_codec(clips, kind):
    info = probe(clips[kind])
    assert (info.height, info.width, info.num_frames, info.rotation) == (HEIGHT, WIDTH, COUNT, 0)
    assert info.duration == pytest.approx(COUNT / 25, abs=2e-3) and info.fps == pytest.approx(25, abs=0.05)
    assert info.codec and info.container and not info.is_image
    assert info.times == pytest.approx([i / 25 for i in range(COUNT)], abs=1e-3)


def test_every_container_gives_the_same_plan(clips):
    plans = [FrameSampling(num_frames=5).plan(info.times, info.duration) for info in map(probe, clips.values())]
    assert all(plan == plans[0] for plan in plans)


def test_a_path_a_string_and_bytes_agree(clips):
    path = clips["mp4"]
    videos = [read_video(source, pick(2, 30), keep) for source in (path, str(path), path.read_bytes())]
    for video in videos[1:]:
        assert all(map(torch.equal, video.frames, videos[0].frames)) and video.times == videos[0].times


def test_vp8_frames_that_are_never_shown_are_no_frames(tmp_path):
    path, hidden = tmp_path / "hidden.webm", 7
    clip = write_counter(tmp_path / "clip.webm", 20, codec="libvpx")
    with av.open(str(clip)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            data[0] &= 0xEF if number == hidden else 0xFF  # the bit that shows a frame
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.stream, copy.is_keyframe = stream, packet.is_keyframe
            out.mux(copy)
    shown = [number for number in range(20) if number != hidden]
    video = read_video(path, pick(*range(19)), keep)
    assert video.info.num_frames == 19 and [read(frame) for frame in video.frames] == shown
    assert video.times == pytest.approx([number / 25 for number in shown], abs=1e-3)


def test_uneven_times_are_the_files_own(tmp_path):
    pts = [0, 40, 80, 1000, 1500, 1510, 1600, 4000, 4040, 5000]
    video = read_video(write_counter(tmp_path / "uneven.mkv", 10, pts=pts), pick(*range(10)), keep)
    assert video.times == pytest.approx([t / 1000 for t in pts], abs=1e-3)
    assert [read(frame) for frame in video.frames] == list(range(10))
    chosen = FrameSampling(num_frames=4).plan(video.info.times, video.info.duration).indices
    assert all(0 <= index < 10 for index in chosen) and chosen[1] == 6  # on screen from 1.6 s to 4 s


def test_times_start_at_the_first_frame(tmp_path):
    pts = [7000 + 40 * i for i in range(20)]
    video = read_video(write_counter(tmp_path / "late.mkv", 20, pts=pts), pick(0, 13, 19), keep)
    assert video.times == pytest.approx([0, 0.52, 0.76], abs=1e-3) and video.info.duration == pytest.approx(
        0.8, abs=2e-3
    )
    assert [read(frame) for frame in video.frames] == [0, 13, 19]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_rotated_clip_is_shown_upright(tmp_path, rotation):
    video = read_video(write_counter(tmp_path / "phone.mp4", 6, rotation=rotation), pick(5), keep)
    turned = torch.rot90(torch.from_numpy(paint(5)), rotation // 90).permute(2, 0, 1)
    assert (video.info.height, video.info.width) == turned.shape[1:] and video.info.rotation == rotation % 360
    assert video.frames[0].shape == turned.shape
    assert (video.frames[0].float() - turned.float()).abs().mean() < 8


def test_cover_art_is_no_video(clips, tmp_path):
    path = tmp_path / "cover.mp4"
    png = io.BytesIO()
    Image.fromarray(paint(255)).save(png, "PNG")
    with av.open(str(clips["mp4"])) as source, av.open(str(path), "w") as out:
        cover = out.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = HEIGHT, WIDTH, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = out.add_stream_from_template(source.streams.video[0])
        out.mux(cover.encode(av.VideoFrame.from_ndarray(paint(255), format="rgb24")))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    video = read_video(path, pick(4), keep)
    assert read(video.frames[0]) == 4 and video.info.num_frames == COUNT


def test_frames_are_resized_by_their_role(clips):
    sizes = {True: (64, 160), False: (32, 80)}
    video = read_video(clips["mp4"], pick(3, 9, 20, high=(True, False, True)), lambda h, w, high: sizes[high])
    assert [tuple(frame.shape[1:]) for frame in video.frames] == [(64, 160), (32, 80), (64, 160)]
    assert [read(frame) for frame in video.frames] == [3, 9, 20] and video.high == (True, False, True)


def test_resizing_is_pillows_bicubic_within_one_level():
    image = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    ours = resize_frame(torch.from_numpy(image), (42, 70)).permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(Image.fromarray(image).resize((70, 42), Image.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert torch.equal(resize_frame(torch.from_numpy(image), (90, 160)), torch.from_numpy(image).permute(2, 0, 1))


FRAMES = np.stack([paint(i) for i in range(6)])
ARRAYS = {
    "numpy THWC": FRAMES,
    "numpy TCHW": FRAMES.transpose(0, 3, 1, 2),
    "torch THWC": torch.from_numpy(FRAMES),
    "torch TCHW": torch.from_numpy(FRAMES).permute(0, 3, 1, 2),
    "float64": FRAMES / 255,
    "float32": (FRAMES / 255).astype(np.float32),
    "bfloat16": (torch.from_numpy(FRAMES) / 255).bfloat16(),
    "with gradient": (torch.from_numpy(FRAMES) / 255).requires_grad_(),
    "PIL": [Image.fromarray(frame) for frame in FRAMES],
    "list of numpy": list(FRAMES),
    "list of torch CHW": list(torch.from_numpy(FRAMES).permute(0, 3, 1, 2)),
    "tuple": tuple(FRAMES),
    "reversed view": FRAMES[::-1][::-1],
    "read-only": np.broadcast_to(FRAMES, FRAMES.shape),
    "opaque RGBA": np.concatenate([FRAMES, np.full((*FRAMES.shape[:3], 1), 255, np.uint8)], -1),
    "gray": FRAMES[..., :1],
}


@pytest.mark.parametrize("name", ARRAYS)
def test_every_kind_of_array_gives_the_same_frames(name):
    video = read_video(ARRAYS[name], pick(1, 4), keep)
    for frame, number in zip(video.frames, (1, 4), strict=True):
        difference = frame.int() - torch.from_numpy(paint(number)).permute(2, 0, 1).int()
        assert difference.abs().max() <= (1 if name == "bfloat16" else 0)
    assert video.times is None and video.info.duration is None and video.info.num_frames == 6


def test_arrays_of_known_rate_have_times():
    video = read_video(FRAMES, pick(0, 3), keep, fps=2.0)
    assert video.times == (0.0, 1.5) and video.info.duration == 3.0


def test_clear_pixels_are_laid_on_white():
    clear = np.zeros((1, 4, 4, 4), np.uint8)
    assert read_video(clear, pick(0), keep).frames[0].unique().tolist() == [255]
    assert read_video(Image.fromarray(clear[0]), pick(0), keep).frames[0].unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_an_image_is_a_video_of_one_frame(tmp_path, kind):
    image = Image.fromarray(paint(77))
    path = tmp_path / "still.any"
    image.save(path, kind)
    for source in (image, paint(77), paint(77).transpose(2, 0, 1), path, path.read_bytes()):
        video = read_video(source, pick(0), keep)
        assert video.info.is_image and video.info.num_frames == 1 and video.times == (0.0,)
        assert read(video.frames[0]) == 77


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(paint(3)).save(tmp_path / "photo.jpg", exif=exif)
    assert (probe(tmp_path / "photo.jpg").height, probe(tmp_path / "photo.jpg").width) == (WIDTH, HEIGHT)


def test_an_animated_image_is_a_video(tmp_path):
    frames = [Image.fromarray(frame) for frame in FRAMES]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    video = read_video(tmp_path / "moving.webp", pick(0, 5), keep)
    assert video.info.num_frames == 6 and not video.info.is_image and [read(f) for f in video.frames] == [0, 5]
    assert video.info.duration == pytest.approx(0.6)


def test_a_damaged_tail_leaves_the_frames_before_it(clips, tmp_path):
    data = clips["ts"].read_bytes()
    (tmp_path / "cut.ts").write_bytes(data[: len(data) // 2])
    video = read_video(tmp_path / "cut.ts", lambda info: pick(*range(info.num_frames))(info), keep)
    assert 5 < len(video.frames) < COUNT
    assert [read(frame) for frame in video.frames][:-1] == [round(time * 25) for time in video.times][:-1]


def test_a_frame_that_cannot_be_decoded_is_left_out_and_the_others_keep_their_numbers(tmp_path):
    path = write_counter(tmp_path / "stills.avi", 10, codec="mjpeg", options={"strict": "-1"})
    data = bytearray(path.read_bytes())
    starts = [place for place in range(len(data)) if data[place : place + 3] == b"\xff\xd8\xff"]
    data[starts[5] : starts[6] - 8] = bytes(starts[6] - 8 - starts[5])
    path.write_bytes(data)
    video = read_video(path, pick(*range(10)), keep)
    assert video.indices == (0, 1, 2, 3, 4, 6, 7, 8, 9) and video.num_asked == 10
    assert [read(frame) for frame in video.frames] == list(video.indices)
    assert len(video.times) == len(video.high) == 9


def bad(tmp_path):
    sound, wav = write_sound(tmp_path / "sound.mp4"), write_sound(tmp_path / "sound.wav")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello world\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    clip = write_counter(tmp_path / "clip.mp4", 5).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    return {
        "missing": (tmp_path / "none.mp4", "not_found"),
        "directory": (tmp_path, "directory"),
        "empty": (tmp_path / "empty.mp4", "empty"),
        "text": (tmp_path / "text.mp4", "not_a_video"),
        "noise": (tmp_path / "noise.mp4", "not_a_video"),
        "playlist": (tmp_path / "list.mp4", "not_a_video"),
        "playlist bytes": ((tmp_path / "list.mp4").read_bytes(), "not_a_video"),
        "cut": (tmp_path / "cut.mp4", "not_a_video"),
        "image": (tmp_path / "broken.png", "bad_image"),
        "audio": (sound, "no_video_stream"),
        "wav": (wav, "no_video_stream"),
        "null": ("a\0b.mp4", "unreadable"),
        "http": ("https://user:secret@example.org/a.mp4?key=secret", "protocol"),
        "concat": (f"concat:{tmp_path / 'clip.mp4'}", "protocol"),
        "file url": (f"file://{tmp_path / 'clip.mp4'}", "protocol"),
        "data url": ("data:video/mp4;base64,AAAA", "protocol"),
        "empty bytes": (b"", "empty"),
        "device": ("/dev/zero", "not_regular"),
        "None": (None, "bad_type"),
        "number": (3, "bad_type"),
        "dict": ({"path": "a.mp4"}, "bad_type"),
        "bytes path": (os.fsencode(tmp_path), "not_a_video"),
        "empty list": ([], "empty"),
        "paths": ([str(tmp_path / "clip.mp4")], "bad_type"),
        "mixed": ([paint(0), Image.fromarray(paint(0))], "bad_type"),
        "2-D": (np.zeros((4, 4), np.uint8), "bad_shape"),
        "5-D": (np.zeros((1, 1, 4, 4, 3), np.uint8), "bad_shape"),
        "channels": (np.zeros((2, 5, 5, 2), np.uint8), "bad_shape"),
        "list of 4-D": ([FRAMES, FRAMES], "bad_shape"),
        "no frames": (np.zeros((0, 4, 4, 3), np.uint8), "empty"),
        "no pixels": (np.zeros((2, 0, 4, 3), np.uint8), "empty"),
        "int64": (FRAMES.astype(np.int64), "bad_dtype"),
        "uint16": (FRAMES.astype(np.uint16), "bad_dtype"),
        "bool": (FRAMES > 3, "bad_dtype"),
        "object": (np.full((1, 2, 2, 3), "x", object), "bad_dtype"),
        "int tensor": (torch.zeros(1, 2, 2, 3, dtype=torch.int32), "bad_dtype"),
        "0..255 floats": (FRAMES.astype(np.float32), "bad_range"),
        "-1..1 floats": (FRAMES / 127.5 - 1, "bad_range"),
        "NaN": (np.full((1, 4, 4, 3), np.nan), "not_finite"),
        "Inf": (torch.full((1, 4, 4, 3), float("inf")), "not_finite"),
        "NaN in a list": ([np.zeros((4, 4, 3)), np.full((4, 4, 3), np.nan)], "not_finite"),
    }


def test_each_bad_source_has_one_clear_line(tmp_path):
    for name, (source, reason) in bad(tmp_path).items():
        with pytest.raises(VideoError) as caught:
            read_video(source, pick(0), keep)
        message = str(caught.value)
        assert reason in REASONS
        assert caught.value.reason == reason, f"{name}: {caught.value.reason}: {message}"
        assert "\n" not in message and len(message) < 400, name
        assert "secret" not in message + str(caught.value.source), name
        with pytest.raises(VideoError):
            probe(source)


def test_a_file_named_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_counter(tmp_path / "clip.mp4", 4).rename(tmp_path / "concat:x.mp4")
    assert probe("concat:x.mp4").num_frames == 4


def test_nothing_asks_the_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(VideoError, match="networks"):
        probe("http://example.org/a.mp4")


def test_an_empty_bytes_message_names_what_to_do():
    with pytest.raises(VideoError, match="0 bytes"):
        probe(bytearray())


def broken_stills(tmp_path, *numbers):
    """Ten stills in an avi, some of them wiped."""
    path = write_counter(tmp_path / "stills.avi", 10, codec="mjpeg", options={"strict": "-1"})
    data = bytearray(path.read_bytes())
    starts = [place for place in range(len(data)) if data[place : place + 3] == b"\xff\xd8\xff"]
    for number in numbers:
        data[starts[number] : starts[number + 1] - 8] = bytes(starts[number + 1] - 8 - starts[number])
    path.write_bytes(data)
    return path


def test_what_was_damaged_is_told(tmp_path):
    video = read_video(broken_stills(tmp_path, 5), pick(*range(10)), keep)
    assert video.missing == (5,) and video.damage.num_bad_packets == 1


def test_more_than_a_tenth_missing_is_an_error(tmp_path):
    with pytest.raises(VideoError, match="of 10 frames asked for 2 cannot be decoded") as caught:
        read_video(broken_stills(tmp_path, 3, 5), pick(*range(10)), keep)
    assert caught.value.reason == "damaged"
    assert read_video(broken_stills(tmp_path, 3, 5), pick(0, 1, 2, 4), keep).missing == ()


def test_all_missing_is_an_error_of_its_own(tmp_path):
    with pytest.raises(VideoError) as caught:
        read_video(broken_stills(tmp_path, 3, 5), pick(3, 5), keep)
    assert caught.value.reason == "no_frames"


def test_any_damage_is_an_error_if_asked(tmp_path):
    options = DecodingOptions(on_damage="raise")
    assert len(read_video(write_counter(tmp_path / "a.mp4", 5), pick(0, 4), keep, options=options).frames) == 2
    with pytest.raises(VideoError) as caught:
        read_video(broken_stills(tmp_path, 5), pick(*range(10)), keep, options=options)
    assert caught.value.reason == "damaged"


@pytest.mark.parametrize("given", [{"on_damage": "ignore"}, {"threads": 0}, {"threads": True}])
def test_options_that_mean_nothing_are_refused(given):
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        DecodingOptions(**given)


def test_a_url_is_fetched_only_where_urls_are_allowed(clips, monkeypatch):
    asked = []

    def fetch(url, policy):
        asked.append((url, policy))
        return io.BytesIO(clips["mp4"].read_bytes())

    monkeypatch.setattr(decoding_elva, "fetch", fetch)
    url, policy = "https://user:secret@example.org/a.mp4?key=secret", UrlPolicy(max_bytes=10**6)
    with pytest.raises(VideoError, match="allow_urls") as caught:
        read_video(url, pick(3), keep)
    assert caught.value.reason == "protocol" and not asked
    video = read_video(url, pick(3), keep, options=DecodingOptions(urls=policy))
    assert asked == [(url, policy)] and read(video.frames[0]) == 3
    assert "secret" not in video.info.source


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_an_isolated_process_gives_the_same_frames(clips, kind):
    options = DecodingOptions(isolate=True)
    for source in (clips[kind], clips[kind].read_bytes()):
        apart, here = read_video(source, pick(2, 30), keep, options=options), read_video(source, pick(2, 30), keep)
        assert all(map(torch.equal, apart.frames, here.frames)) and apart.times == here.times
        assert apart.info == here.info


def test_an_isolated_process_reads_images_too(tmp_path):
    Image.fromarray(paint(77)).save(tmp_path / "still.png")
    for source in (tmp_path / "still.png", (tmp_path / "still.png").read_bytes()):
        video = read_video(source, pick(0), keep, options=DecodingOptions(isolate=True))
        assert video.info.is_image and read(video.frames[0]) == 77


class Threads(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        with open_reader(self.path) as reader:
            return -1 if reader._threads is None else reader._threads


def test_a_worker_of_a_data_loader_decodes_with_one_thread(clips):
    data = Threads(str(clips["mp4"]))
    assert data[0] == -1
    assert list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)) == [1]
    with open_reader(str(clips["mp4"]), options=DecodingOptions(threads=3)) as reader:
        assert reader._threads == 3


def test_scenes_choose_the_frames_of_high_resolution(tmp_path):
    frames = np.concatenate([np.full((n, 32, 32, 3), value, np.uint8) for n, value in ((2, 0), (9, 90), (5, 255))])
    sizes = {True: (16, 16), False: (8, 8)}
    plan = FramePlan(tuple(range(16)), tuple(i in (1, 8, 14) for i in range(16)), 16)
    video = read_video(frames, lambda info: plan, lambda h, w, high: sizes[high], scenes=True)
    assert sum(video.high) == 3
    assert [any(video.high[:2]), any(video.high[2:11]), any(video.high[11:])] == [True] * 3
    assert [tuple(frame.shape[1:]) for frame in video.frames] == [sizes[high] for high in video.high]
    uniform = read_video(frames, lambda info: plan, lambda h, w, high: sizes[high])
    assert uniform.high == plan.high


def test_images_have_limits_too(tmp_path):
    Image.fromarray(paint(1)).save(tmp_path / "still.png")
    frames = [Image.fromarray(frame) for frame in FRAMES]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    for name, limits, reason in (
        ("still.png", {"max_pixels": 100}, "too_many_pixels"),
        ("still.png", {"max_bytes": 100}, "too_many_bytes"),
        ("moving.webp", {"max_frames": 5}, "too_many_frames"),
        ("moving.webp", {"max_duration": 0.5}, "too_long"),
    ):
        with pytest.raises(VideoError) as caught:
            probe(tmp_path / name, options=DecodingOptions(DecodingLimits(**limits)))
        assert caught.value.reason == reason


def test_arrays_have_limits_too():
    huge = np.broadcast_to(np.zeros(3, np.uint8), (10**6, 1000, 1000, 3))
    with pytest.raises(VideoError) as caught:
        probe(huge)
    assert caught.value.reason == "too_many_bytes"
    with pytest.raises(VideoError) as caught:
        probe(FRAMES, options=DecodingOptions(DecodingLimits(max_frames=5)))
    assert caught.value.reason == "too_many_frames"


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return probe("none.mp4")


def test_an_error_keeps_its_facts_between_processes():
    with pytest.raises(VideoError) as caught:
        probe("none.mp4")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.reason, again.source, again.hint) == (
        *(str(caught.value), "not_found", caught.value.source, caught.value.hint),
    )
    overflow = ContextOverflowError("too long", budget="context_length", needed=9, limit=3, settings={"num_frames": 1})
    assert pickle.loads(pickle.dumps(overflow)).__dict__ == overflow.__dict__
    with pytest.raises(VideoError, match="does not exist"):
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("clip?#@.mp4", "clip?#@.mp4"),
        ("https://user:secret@example.org/a.mp4?key=secret#secret", "https://example.org/a.mp4"),
        ("https:user:secret@example.org/a", "..."),
        ("https://user:sec/ret@example.org/a", "https://..."),
        ("https:\\\\u:secret@h?tok=secret", "..."),
        ("rtsp://secret@h", "rtsp://h"),
        ("data:video/mp4;base64,secret", "data:..."),
        ("C:\\clip.mp4", "C:\\clip.mp4"),
    ],
)
def test_what_people_see_of_a_source_holds_no_secret(path, seen):
    assert shown(path) == repr(seen)
