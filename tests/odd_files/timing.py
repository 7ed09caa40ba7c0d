"""Files whose times, key frames or counts are odd, and files that lie about them."""

import struct
from fractions import Fraction

from .containers import ALL, FACTS, clip
from .records import COUNT, RATE, Case, Fails, shows
from .writing import H264, HEVC, INTRA, MPEG, PLAIN, VPX, box, encode, patched, places, remux

MILLISECONDS = [0, 40, 80, 1000, 1500, 1510, 1600, 4000, 4040, 5000, 5003, 5007, 5050, 9000, 9100, 60000]
LATE = [7000 + 40 * number for number in range(COUNT)]
TICKS = 90000 // RATE  # of a transport stream's clock, per frame
HALF = COUNT // 2


def uneven(name, file, what, codec="libx264", *, milliseconds=MILLISECONDS, **rest):
    times = [(time - milliseconds[0]) / 1000 for time in milliseconds]
    expect = shows(range(len(times)), times, facts=FACTS)
    return clip(name, file, what, codec, numbers=range(len(times)), pts=milliseconds, expect=expect, **rest)


def rated(name, file, rate, what):
    return clip(name, file, what, rate=rate, expect=shows(step=float(1 / rate), facts=FACTS))


def remuxed(file, codec="libx264", *, options=PLAIN, count=COUNT, **rest):
    """A clip through `remux`: fewer packets, other times, other marks; the frames stay."""

    def build(place):
        plain = encode(place / f"plain.{file}", codec, numbers=range(count), options=options)
        path = remux(plain, place / file, **rest)
        plain.unlink()
        return path

    return build


def from_packet(first, file, codec="libx264", **rest):
    return remuxed(file, codec, keep=lambda number, packet: number >= first, **rest)


def marked(key):
    """Change of packets: every one marked as a key frame, or none."""

    def change(number, packet):
        packet.is_keyframe = key
        return packet

    return change


def edited(*entries):
    """An mp4 with a list of edits, `(frames long, first frame)` each."""

    def build(place):
        options = {"movie_timescale": str(RATE), "video_track_timescale": str(RATE)}
        path = encode(place / "clip.mp4", options=PLAIN, container=options)
        rows = b"".join(struct.pack(">IiI", *entry, 0x10000) for entry in entries)
        new = box(b"edts", box(b"elst", struct.pack(">II", 0, len(entries)), rows))
        data = bytearray(path.read_bytes())
        old = data.index(b"edts") - 4
        (size,) = struct.unpack(">I", data[old : old + 4])
        data[old : old + size] = new
        for name in (b"moov", b"trak"):  # behind the frames, so that their offsets stay
            start = data.index(name) - 4
            (length,) = struct.unpack(">I", data[start : start + 4])
            data[start : start + 4] = struct.pack(">I", length + len(new) - size)
        path.write_bytes(data)
        return path

    return build


def negative_in_mkv(place):
    """The blocks of a Matroska file, moved to 200 ms before the start of their cluster."""
    path = encode(place / "clip.mkv", options=PLAIN)
    data = bytearray(path.read_bytes())
    for number, start in enumerate(places(path)):
        data[start - 3 : start - 1] = struct.pack(">h", 40 * number - 200)
    path.write_bytes(data)
    return path


def joined(file, *parts, filters=None):
    """Two streams, one after the other in one file; `filters` for the second."""

    def build(place):
        data = b""
        for number, options in enumerate(parts):
            part = encode(place / f"{number}.{file}", **{"options": PLAIN, **options})
            if number and filters:
                part = remux(part, place / f"moved.{file}", filters=filters)
            data += part.read_bytes()
        for part in place.folder.iterdir():
            part.unlink()
        (place / file).write_bytes(data)
        return place / file

    return build


def halves(**second):
    return {"numbers": range(HALF)}, {"numbers": range(HALF, COUNT), **second}


def lying(file, *changes, **rest):
    """A clip with bytes of its header overwritten."""
    return lambda place: patched(encode(place / file, **{"options": PLAIN, **rest}), *changes)


BIG = struct.pack(">I", 2**31 - 1)
TIMES = [
    uneven("uneven-mkv", "clip.mkv", "frames at uneven times, gaps of up to 51 s, Matroska"),
    uneven("uneven-mp4", "clip.mp4", "frames at uneven times, gaps of up to 51 s, mp4"),
    uneven("uneven-webm", "clip.webm", "frames at uneven times, WebM", "libvpx-vp9", options=VPX),
    uneven("uneven-ts", "clip.ts", "frames at uneven times, transport stream"),
    Case("uneven-avi", "AVI with frames left out: 5 are skipped before frame 10",
         remuxed("clip.avi", "mpeg4", options=INTRA, filters="setts=ts=TS+5*gte(N\\,10)"),
         shows(times=[(n + 5 * (n >= 10)) / RATE for n in range(COUNT)], facts=FACTS)),
    clip("fine-clock", "clip.mp4", "mp4 whose units of time are nanoseconds",
         container={"video_track_timescale": "1000000000"}),
    uneven("late-start-mkv", "clip.mkv", "Matroska whose first frame is at 7 s", milliseconds=LATE),
    uneven("late-start-mp4", "clip.mp4", "mp4 that shows nothing for 7 s (empty edit)", milliseconds=LATE),
    Case("late-start-fragmented", "fragmented mp4 whose first frame is at 1000 s",
         remuxed("clip.mp4", filters="setts=ts=TS+12800000", container={"movflags": "frag_keyframe+delay_moov"}),
         ALL),
    Case("late-start-ts", "transport stream whose clock starts at 20 h",
         remuxed("clip.ts", filters=f"setts=ts=TS+{20 * 3600 * 90000}"), ALL),
    Case("clock-turns-over", "transport stream whose clock of 33 bits turns over in the middle",
         remuxed("clip.ts", filters=f"setts=ts=TS+{2**33 - TICKS * HALF}"), ALL),
    Case("clock-starts-again", "two transport streams in one file: the clock starts again in the middle",
         joined("clip.ts", *halves()), shows(facts=FACTS, remarks=".")),
    rated("ten-seconds-a-frame", "clip.mp4", Fraction(1, 10), "one frame in 10 s"),
    rated("240-a-second", "clip.mp4", Fraction(240), "240 frames a second"),
    rated("ntsc-mp4", "clip.mp4", Fraction(30000, 1001), "29.97 frames a second, mp4"),
    rated("ntsc-mkv", "clip.mkv", Fraction(24000, 1001), "23.976 frames a second, rounded to 1 ms by Matroska"),
    Case("same-time-twice", "frames 9 and 10 have one time: both are given, in the order of decoding",
         remuxed("clip.mkv", filters="setts=ts=TS-40*eq(N\\,10)"),
         shows(times=[(n - (n == 10)) / RATE for n in range(COUNT)], facts=FACTS)),
    Case("negative-times-mp4", "mp4 whose first 5 frames lie before time 0: they are not shown",
         remuxed("clip.mp4", filters="setts=ts=TS-5*512"), shows(range(5, COUNT), facts=FACTS)),
    Case("negative-times-mkv", "Matroska whose first 5 frames lie before time 0", negative_in_mkv, ALL),
    Case("edits-cut-both-ends", "mp4 whose list of edits shows frames 6 to 25", edited((20, 6)),
         shows(range(6, 26), facts=FACTS)),
    Case("edits-leave-out-the-middle", "mp4 whose list of edits shows frames 0 to 7 and 20 to 27",
         edited((8, 0), (8, 20)), shows([*range(8), *range(20, 28)], facts=FACTS)),
    Case("edits-show-a-part-twice", "mp4 whose list of edits shows frames 8 to 15 two times",
         edited((8, 8), (8, 8)), shows([*range(8, 16), *range(8, 16)], facts=FACTS)),
    clip("no-times", "clip.h264", "bare H.264, one key frame, three B-frames in a row: no times at all",
         options={**H264, "bf": "3", "g": "10000"}),
]  # fmt: skip

OPEN = "b-adapt=0:keyint=8:min-keyint=8:open-gop=1"
AFTER = shows(range(8, COUNT), facts=FACTS, notes=("left out",))
KEYS = [
    clip("one-frame", "clip.mp4", "mp4 of one frame", numbers=[7], expect=shows([7], [0.0], facts=FACTS)),
    clip("one-frame-webm", "clip.webm", "WebM of one frame", "libvpx-vp9", options=VPX, numbers=[7],
         expect=shows([7], [0.0], facts=FACTS)),
    clip("one-frame-ts", "clip.ts", "transport stream of one frame", numbers=[7],
         expect=shows([7], [0.0], facts=FACTS)),
    clip("two-frames", "clip.mp4", "mp4 of two frames", numbers=[7, 9], expect=shows([7, 9], facts=FACTS)),
    clip("one-key-frame", "clip.mp4", "mp4 of which only the first frame is a key frame",
         options={**H264, "g": "10000"}),
    clip("one-key-frame-ts", "clip.ts", "transport stream of which only the first frame is a key frame",
         options={**H264, "g": "10000"}),
    clip("open-gop-h264", "clip.mp4", "B-frames that need the next key frame (open GOP), H.264",
         options={**H264, "preset": "veryfast", "bf": "3", "x264-params": OPEN}),
    clip("open-gop-hevc", "clip.mkv", "B-frames that need the next key frame (open GOP), HEVC", "libx265",
         options={**HEVC, "x265-params": f"log-level=none:pools=none:bframes=3:{OPEN}"}),
    clip("open-gop-mpeg2", "clip.ts", "B-frames that need the next key frame (open GOP), MPEG-2", "mpeg2video",
         options=MPEG),
    clip("b-pyramid", "clip.mp4", "B-frames that lean on B-frames, five references",
         options={**H264, "preset": "medium", "bf": "5", "g": "16", "x264-params": "b-pyramid=normal:ref=5:b-adapt=0"}),
    clip("intra-refresh", "clip.mp4", "H.264 renewed column by column instead of by key frames",
         options={**PLAIN, "x264-params": "intra-refresh=1:keyint=8"}),
    Case("all-marked-key", "mp4 that marks every frame as a key frame, though one in 8 is",
         remuxed("clip.mp4", change=marked(True)), ALL),
    Case("all-marked-key-mkv", "Matroska that marks every frame as a key frame, though one in 8 is",
         remuxed("clip.mkv", change=marked(True)), ALL),
    Case("none-marked-key", "Matroska that marks no frame as a key frame", remuxed("clip.mkv", change=marked(False)),
         ALL),
    Case("starts-between-key-frames-ts", "transport stream without its first 3 frames: shown from the next key frame",
         from_packet(3, "clip.ts"), AFTER),
    Case("starts-between-key-frames-mkv", "Matroska without its first 3 frames: shown from the next key frame",
         from_packet(3, "clip.mkv"), AFTER),
    Case("starts-between-key-frames-mp4", "mp4 without its first 3 frames: shown from the next key frame",
         from_packet(3, "clip.mp4"), AFTER),
    Case("starts-between-key-frames-hevc", "HEVC without its first 3 frames: shown from the next key frame",
         from_packet(3, "clip.ts", "libx265", options={**HEVC, "x265-params": HEVC["x265-params"] + ":open-gop=0"}),
         AFTER),
    Case("starts-between-key-frames-vp9", "VP9 without its first 3 frames: shown from the next key frame",
         from_packet(3, "clip.webm", "libvpx-vp9", options=VPX), AFTER),
    Case("starts-between-key-frames-raw", "bare H.264 without its first 3 frames: shown from the next key frame",
         from_packet(3, "clip.h264"), AFTER),
    Case("no-key-frame", "transport stream without any key frame",
         from_packet(1, "clip.ts", options={**PLAIN, "g": "999"}), Fails("no_frames")),
    Case("no-key-frame-vp9", "WebM without any key frame",
         from_packet(1, "clip.webm", "libvpx-vp9", options={**VPX, "g": "999"}), Fails("no_frames")),
]  # fmt: skip

LARGER = {"size": (96, 256)}
GROWN = shows(facts=FACTS, notes=("(?i)size",))
CHANGES = [
    Case("grows-ts", "transport stream whose frames are twice as large from the middle on",
         joined("clip.ts", *halves(**LARGER), filters=f"setts=ts=TS+{TICKS * HALF}"), GROWN),
    Case("grows-raw", "bare H.264 whose frames are twice as large from the middle on",
         joined("clip.h264", *halves(**LARGER)), GROWN),
    Case("changes-format", "bare H.264 that goes from 4:2:0 to 4:4:4 in the middle",
         joined("clip.h264", *halves(pixels="yuv444p")), shows(facts=FACTS)),
    Case("changes-depth", "bare H.264 that goes from 8 to 10 bits in the middle",
         joined("clip.h264", *halves(pixels="yuv420p10le")), shows(facts=FACTS)),
]  # fmt: skip

TRUE = shows(facts=FACTS, remarks="lasts")
LIES = [
    Case("lying-duration-mp4", "mp4 that claims to last 46 h", lying("clip.mp4", (b"mvhd", 16, BIG), (b"mdhd", 16, BIG),
         (b"tkhd", 20, BIG)), TRUE),
    Case("lying-no-duration-mp4", "mp4 that claims to last 0 s",
         lying("clip.mp4", (b"mvhd", 16, bytes(4)), (b"mdhd", 16, bytes(4)), (b"tkhd", 20, bytes(4))), TRUE),
    Case("lying-count-mp4", "mp4 whose table of times claims 2147483647 frames", lying("clip.mp4", (b"stts", 8, BIG)),
         TRUE),
    Case("lying-few-mp4", "mp4 whose table of times knows 8 of 32 frames",
         lying("clip.mp4", (b"stts", 8, struct.pack(">I", 8))), TRUE),
    Case("lying-duration-mkv", "Matroska that claims to last 11 days",
         lying("clip.mkv", (b"\x44\x89\x88", 0, struct.pack(">d", 1e9))), TRUE),
    Case("lying-nan-duration-mkv", "Matroska that claims to last NaN seconds",
         lying("clip.mkv", (b"\x44\x89\x88", 0, struct.pack(">d", float("nan")))), TRUE),
    Case("lying-count-avi", "AVI that claims 4294967295 frames",
         lying("clip.avi", (b"avih", 20, b"\xff" * 4), (b"strh", 36, b"\xff" * 4), codec="mpeg4", options=INTRA), TRUE),
    Case("lying-rate-avi", "AVI whose rate is 0 / 0", lying("clip.avi", (b"strh", 24, bytes(8)), codec="mpeg4",
         options=INTRA), TRUE),
    Case("lying-size-mp4", "mp4 whose header claims 8 x 8 pixels",
         lying("clip.mp4", (b"tkhd", 76, struct.pack(">HHHH", 8, 0, 8, 0)), (b"avc1", 24, struct.pack(">HH", 8, 8))),
         TRUE),
    Case("lying-timescale-mp4", "mp4 whose units of time are 1/0 s: read as whole seconds",
         lying("clip.mp4", (b"mdhd", 12, bytes(4)), container={"use_editlist": "0"}),
         shows(step=512.0, facts=FACTS, remarks="lasts")),
]  # fmt: skip

CASES = {
    "Times": TIMES,
    "Key frames": KEYS,
    "Changes on the way": CHANGES,
    "Headers that lie": LIES,
}
