"""The file reader: its index against a pass over all packets; frames skipped and sought against all decoded."""

import gc
import io
from pathlib import Path

import av
import numpy as np
import pytest
from clips_elva import HEIGHT, MAKERS, WIDTH, paint, read, write_counter

from elva_hf import admission_elva, container_elva, session_elva
from elva_hf.boxes_elva import composition_offsets, find_index
from elva_hf.container_elva import ContainerReader
from elva_hf.errors_elva import VideoError
from elva_hf.limits_elva import DecodingLimits

COUNT = 60
MP4 = {
    "B-frames": {"g": "12", "bf": "2"},
    "B-pyramid": {"g": "250", "bf": "4", "x264-params": "b-pyramid=normal:ref=4"},
    "no B-frames": {"g": "30", "bf": "0"},
    "open GOP": {"g": "15", "bf": "3", "x264-params": "open-gop=1:keyint=15:min-keyint=15"},
    "one key frame": {"g": "10000", "bf": "3", "x264-params": "scenecut=0"},
    "all key frames": {"g": "1"},
    "edit list off": {"g": "12", "bf": "2"},
}
UNEVEN = np.cumsum(np.random.default_rng(3).integers(10, 200, COUNT)).tolist()


def number(frame):
    return read(frame.pixels.transpose(2, 0, 1))


def all_frames(reader):
    return list(reader.read(range(reader.info.num_frames)))


def from_packets(path, monkeypatch):
    """A reader that may not use the index of the container."""
    with monkeypatch.context() as patch:
        patch.setattr(ContainerReader, "_read_container_index", lambda self, session: None)
        return ContainerReader(str(path), "clip")


@pytest.mark.parametrize("name", MP4)
@pytest.mark.parametrize("pts", [None, UNEVEN], ids=["even", "uneven"])
def test_the_index_of_an_mp4_is_what_its_packets_say(tmp_path, monkeypatch, name, pts):
    path = write_counter(tmp_path / "clip.mp4", COUNT, pts=pts, options=MP4[name])
    with ContainerReader(str(path), "clip") as reader, from_packets(path, monkeypatch) as slow:
        assert reader.work.packets < COUNT <= slow.work.packets  # the first did not read them all
        assert reader.info.times == slow.info.times and reader.info.duration == pytest.approx(slow.info.duration)
        assert np.array_equal(reader._index.key_pts, slow._index.key_pts)
        assert [number(frame) for frame in all_frames(reader)] == list(range(COUNT))


@pytest.mark.parametrize("name", MP4)
def test_skipped_and_sought_frames_are_bit_equal_to_all_decoded_in_order(tmp_path, name):
    path = write_counter(tmp_path / "clip.mp4", COUNT, options=MP4[name])
    with av.open(str(path)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    generator = np.random.default_rng(0)
    for size in (1, 2, 5, 20, COUNT):
        wanted = sorted(generator.choice(COUNT, size, replace=False).tolist())
        with ContainerReader(str(path), "clip") as reader:
            frames = list(reader.read(wanted))
        assert [frame.index for frame in frames] == wanted
        assert all(np.array_equal(frame.pixels, plain[frame.index]) for frame in frames)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
def test_frames_that_nobody_needs_are_not_decoded(tmp_path, codec):
    path = write_counter(tmp_path / "clip.mp4", COUNT, codec=codec, options={"g": "250", "bf": "2"})
    with ContainerReader(str(path), "clip") as reader:
        assert [number(frame) for frame in reader.read([3, 31, 58])] == [3, 31, 58]
        assert reader.work.frames < 0.75 * COUNT and reader.work.converted == 3


def test_reading_jumps_over_groups_of_frames(tmp_path):
    path = write_counter(tmp_path / "clip.mp4", 240, options={"g": "12", "bf": "0"})
    with ContainerReader(str(path), "clip") as reader:
        assert [number(frame) for frame in reader.read([5, 110, 229])] == [5, 110, 229]
        assert reader.work.frames < 5 + 12 + 12 + 10 and reader.work.seeks == 2


def test_every_frame_is_decoded_once(tmp_path):
    path = write_counter(tmp_path / "clip.mp4", COUNT)
    with ContainerReader(str(path), "clip") as reader:
        assert len(all_frames(reader)) == COUNT == reader.work.frames == reader.work.converted
        assert reader.work.seeks == 0


@pytest.mark.parametrize("kind", MAKERS)
def test_a_reader_can_be_read_again_from_anywhere(tmp_path, kind):
    path = write_counter(tmp_path / f"clip.{kind}", 40)
    with ContainerReader(str(path), "clip") as reader:
        for wanted in ([30, 31], [2, 38], range(40), [0], [39]):
            assert [number(frame) for frame in reader.read(wanted)] == list(wanted)


def test_a_frame_that_skipping_lost_is_looked_for_again(tmp_path, monkeypatch):
    path = write_counter(tmp_path / "clip.mkv", COUNT, codec="libvpx-vp9", options={"g": "12"})
    monkeypatch.setattr(container_elva, "SKIPPABLE", frozenset({"vp9"}))
    lose = {0}

    def decode_without(self, packet, plain=session_elva.Session.decode):
        for frame in plain(self, packet):
            if self.wanted is None or frame.pts not in lose:
                yield frame

    monkeypatch.setattr(session_elva.Session, "decode", decode_without)
    with ContainerReader(str(path), "clip") as reader:
        lose = set(reader._index.pts[[20, 33]].tolist())
        assert [number(frame) for frame in reader.read([10, 20, 33, 40])] == [10, 20, 33, 40]


def test_a_file_whose_times_start_again_keeps_all_frames(tmp_path):
    first, second = (write_counter(tmp_path / f"{name}.ts", 20).read_bytes() for name in "ab")
    with ContainerReader(first + second, "two") as reader:
        assert reader.info.num_frames == 40 and not reader._index.in_order
        assert [number(frame) for frame in reader.read([0, 7, 19, 20, 27, 39])] == [0, 7, 19, 0, 7, 19]
        assert reader.info.times == pytest.approx([i / 25 for i in range(40)], abs=1e-3)
        assert reader.info.duration == pytest.approx(1.6, abs=2e-3)


def test_frames_before_the_first_key_frame_are_left_out_and_named(tmp_path):
    path, out = write_counter(tmp_path / "clip.mkv", 40, options={"g": "12", "bf": "0"}), tmp_path / "late.mkv"
    with av.open(str(path)) as source, av.open(str(out), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for place, packet in enumerate(source.demux(video=0)):
            if packet.size and place >= 5:
                packet.stream = stream
                copy.mux(packet)
    with ContainerReader(str(out), "late") as reader:
        assert [number(frame) for frame in all_frames(reader)] == list(range(12, 40))
        assert reader.info.times[0] == 0 and reader.info.duration == pytest.approx(28 / 25, abs=2e-3)
        assert any("7 frames before the first" in note for note in reader.damage.notes)


@pytest.mark.parametrize("change", ["size", "cut", "two tables", "counts"])
def test_an_index_that_contradicts_itself_is_not_used(tmp_path, change):
    path = write_counter(tmp_path / "clip.mp4", COUNT, options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    moov = find_index(lambda offset, length: bytes(data[offset : offset + length]), len(data))
    assert composition_offsets(moov, COUNT) is not None
    if change == "counts":
        assert composition_offsets(moov, COUNT + 1) is None
    elif change == "cut":
        for end in range(0, len(moov), 7):
            composition_offsets(moov[:end], COUNT)  # never raises
    elif change == "two tables":
        track = moov[moov.index(b"trak") - 4 :]
        assert composition_offsets(moov + track[: int.from_bytes(track[:4], "big")], COUNT) is None
    else:
        place, broken = moov.index(b"ctts"), bytearray(moov)
        broken[place + 11] = 200  # more entries than the box holds
        assert composition_offsets(bytes(broken), COUNT) is None


def test_a_wrong_table_of_times_gives_no_frame_another_time(tmp_path):
    path = write_counter(tmp_path / "clip.mp4", COUNT)
    data = bytearray(path.read_bytes())
    place = data.index(b"ctts") + 12
    for entry in range(20):
        data[place + 8 * entry + 6 : place + 8 * entry + 8] = b"\0\0"  # decoded and shown at once, it says
    with av.open(io.BytesIO(bytes(data))) as container:
        plain = {
            frame.pts: read(frame.to_ndarray(format="rgb24").transpose(2, 0, 1)) for frame in container.decode(video=0)
        }
    with ContainerReader(bytes(data), "lying") as reader:
        found = {int(reader._index.pts[frame.index]): number(frame) for frame in all_frames(reader)}
    assert len(found) > COUNT / 2 and found.items() <= plain.items()


def limits(**given):
    return DecodingLimits(**given)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (limits(max_bytes=100), "too_many_bytes"),
        (limits(max_pixels=HEIGHT * WIDTH - 1), "too_many_pixels"),
        (limits(max_frames=COUNT - 1), "too_many_frames"),
        (limits(max_duration=COUNT / 25 - 0.1), "too_long"),
        (limits(max_seconds=1e-9), "timeout"),
        (limits(codecs={"vp9"}), "codec"),
        (limits(demuxers={"matroska"}), "not_a_video"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", ["mp4", "ts"])
def test_each_limit_refuses_with_its_reason(tmp_path, kind, given, reason):
    path = write_counter(tmp_path / f"clip.{kind}", COUNT)
    ContainerReader(str(path), "clip", limits(max_frames=COUNT, max_pixels=HEIGHT * WIDTH)).close()
    with pytest.raises(VideoError) as caught:
        ContainerReader(str(path), "clip", given)
    assert caught.value.reason == reason and "\n" not in str(caught.value)


def test_time_runs_out_while_reading_too(tmp_path, monkeypatch):
    path = write_counter(tmp_path / "clip.mp4", COUNT)
    now = [0.0]
    monkeypatch.setattr(admission_elva.time, "monotonic", lambda: now[0])
    with ContainerReader(str(path), "clip", limits(max_seconds=5)) as reader:
        frames = reader.read(range(COUNT))
        next(frames)
        now[0] = 6.0
        with pytest.raises(VideoError, match="max_seconds=5"):
            list(frames)


def test_an_mp4_that_lost_its_index_says_so(tmp_path):
    data = write_counter(tmp_path / "clip.mp4", COUNT).read_bytes()
    with pytest.raises(VideoError, match=r"index.*stopped too early") as caught:
        ContainerReader(data[: len(data) // 2], "clip")
    assert caught.value.reason == "not_a_video"


def test_threads_do_not_change_a_bit(tmp_path):
    path = write_counter(tmp_path / "clip.mp4", COUNT)
    frames = {}
    for threads in (None, 1, 3):
        with ContainerReader(str(path), "clip", threads=threads) as reader:
            frames[threads] = [frame.pixels for frame in reader.read([1, 17, 40])]
    assert all(np.array_equal(a, b) for other in (1, 3) for a, b in zip(frames[None], frames[other], strict=True))


def test_a_file_object_may_have_no_descriptor_and_is_closed_at_the_end(tmp_path):
    file = io.BytesIO(write_counter(tmp_path / "clip.mkv", 10).read_bytes())
    with ContainerReader(file, "clip") as reader:
        assert number(next(reader.read([4]))) == 4
    assert file.closed


def test_a_size_that_changes_is_noted(tmp_path):
    small = write_counter(tmp_path / "a.ts", 10).read_bytes()
    path = tmp_path / "b.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH * 2, HEIGHT * 2, "yuv420p"
        for value in range(10, 20):
            pixels = np.repeat(np.repeat(paint(value), 2, 0), 2, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with ContainerReader(small + path.read_bytes(), "both") as reader:
        frames = all_frames(reader)
        assert [number(frame) for frame in frames] == list(range(20))
        assert {frame.pixels.shape for frame in frames} == {(HEIGHT, WIDTH, 3), (2 * HEIGHT, 2 * WIDTH, 3)}
        assert reader.damage.notes == (f"the size changes from {WIDTH}x{HEIGHT} to {WIDTH * 2}x{HEIGHT * 2}",)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
@pytest.mark.parametrize("kind", MAKERS)
def test_no_thread_outlives_its_reader(tmp_path, kind):
    """One left to the garbage collector hangs a forked worker of a `DataLoader`."""
    path = str(write_counter(tmp_path / f"clip.{kind}", 40))

    def count():
        return len(list(Path("/proc/self/task").iterdir()))

    gc.collect()
    gc.disable()
    try:
        before = count()
        with ContainerReader(path, "closed") as reader:
            list(reader.read([3, 30]))
        reader = ContainerReader(path, "abandoned in the middle")
        frames = reader.read([3, 30])
        next(frames)
        reader.close()
        ContainerReader(path, "never closed")
        with pytest.raises(VideoError) as caught:
            ContainerReader(path, "refused", limits(max_duration=0.1))
        del caught
        assert count() == before
    finally:
        gc.enable()
