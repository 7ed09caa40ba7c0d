"""Damaged files: what is whole is shown, what is not is left out and said."""

import struct

from PIL import Image

from .containers import FACTS
from .records import RATE, Case, Fails, shows
from .timing import remuxed
from .writing import AV1, H264, HEVC, INTRA, PLAIN, VPX, cut, encode, packets, painted, patched, places, spoil

LONG = 96
GONE = frozenset(range(40, 46))
FIRST_HALF = shows(range(61), facts=FACTS, hit=frozenset([60]))


def long_clip(file, codec="libx264", options=PLAIN, **rest):
    return lambda place: encode(place / file, codec, numbers=range(LONG), options=options, **rest)


def cut_at(file, codec="libx264", options=PLAIN, number=60, **rest):
    """A clip that ends in the middle of the bytes of a frame."""
    return lambda place: cut(long_clip(file, codec, options, **rest)(place), number)


def cut_ts(place):
    """A transport stream that ends in the packet in which frame 61 starts."""
    path = long_clip("clip.ts")(place)
    path.write_bytes(path.read_bytes()[: packets(path)[61].pos + 50])
    return path


def half_of(build):
    def halve(place):
        path = build(place)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        return path

    return halve


def spoilt(file, codec, options, numbers, fill=0, **rest):
    return lambda place: spoil(long_clip(file, codec, options, **rest)(place), numbers, fill)


def flipped(file, codec, options, numbers, **rest):
    """One byte in the middle of some frames is turned over."""

    def build(place):
        path = long_clip(file, codec, options, **rest)(place)
        data, starts, sizes = bytearray(path.read_bytes()), places(path), [packet.size for packet in packets(path)]
        for number in numbers:
            data[starts[number] + sizes[number] // 2] ^= 0xFF
        path.write_bytes(data)
        return path

    return build


def put_in(file, number, junk, **rest):
    """Junk between two frames."""

    def build(place):
        path = long_clip(file, **rest)(place)
        start, data = packets(path)[number].pos, path.read_bytes()
        path.write_bytes(data[:start] + junk + data[start:])
        return path

    return build


def without_ts_packets(place):
    """The transport packets of frame 45 are lost."""
    path = long_clip("clip.ts")(place)
    data, found = path.read_bytes(), packets(path)
    path.write_bytes(data[: found[45].pos] + data[found[46].pos :])
    return path


def truncated_picture(name, kind):
    def build(place):
        Image.fromarray(painted(5)).save(place / name, kind)
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[: len(data) // 2])
        return place / name

    return build


def wrong_sum(place):
    """A PNG whose pixels were changed behind its checksum."""
    Image.fromarray(painted(5)).save(place / "still.png")
    data = bytearray((place / "still.png").read_bytes())
    data[data.index(b"IDAT") + 20] ^= 0xFF
    (place / "still.png").write_bytes(data)
    return place / "still.png"


def left_out(numbers):
    return shows(range(LONG), facts=FACTS, gone=frozenset(numbers))


def touched(numbers, *, silent=False):
    return shows(range(LONG), facts=FACTS, hit=frozenset(numbers), silent=silent)


NOISE = "noise=amount=eq(n\\,45)+eq(n\\,62)"
CUT = [
    Case("cut-mp4", "mp4 cut in the middle: its index, at the end, is lost", cut_at("clip.mp4"),
         Fails("not_a_video", "(?i)moov|index|cut|complete")),
    Case("cut-faststart", "mp4 with its index in front, cut in frame 60 of 96",
         cut_at("clip.mp4", container={"movflags": "faststart"}), FIRST_HALF),
    Case("cut-fragmented", "fragmented mp4, cut in frame 60 of 96",
         cut_at("clip.mp4", container={"movflags": "frag_keyframe+empty_moov"}), FIRST_HALF),
    Case("cut-mkv", "Matroska, cut in frame 60 of 96", cut_at("clip.mkv"), FIRST_HALF),
    Case("cut-webm", "WebM, cut in frame 60 of 96", cut_at("clip.webm", "libvpx-vp9", VPX), FIRST_HALF),
    Case("cut-ts", "transport stream, cut where frame 61 of 96 starts", cut_ts,
         shows(range(62), facts=FACTS, hit=frozenset([60, 61]))),
    Case("cut-avi", "AVI, cut in frame 60 of 96: its index, at the end, is lost",
         cut_at("clip.avi", "mpeg4", INTRA), FIRST_HALF),
    Case("cut-flv", "Flash video, cut in frame 60 of 96", cut_at("clip.flv"), FIRST_HALF),
    Case("cut-ivf", "IVF, cut in frame 60 of 96", cut_at("clip.ivf", "libvpx-vp9", VPX), FIRST_HALF),
    Case("cut-raw-h264", "bare H.264, cut in frame 60 of 96", cut_at("clip.h264"), FIRST_HALF),
    Case("cut-gif", "GIF, cut in frame 60 of 96", cut_at("clip.gif", "gif", {}, pixels="rgb8"),
         shows(range(61), facts=FACTS, hit=frozenset([60]), colours=None)),
    Case("cut-in-the-header", "mp4 of 200 bytes", lambda place: _first(place, 200), Fails("not_a_video")),
    Case("cut-png", "PNG, cut in the middle", truncated_picture("still.png", "PNG"), Fails("bad_image")),
    Case("cut-jpeg", "JPEG, cut in the middle", truncated_picture("still.jpg", "JPEG"), Fails("bad_image")),
    Case("cut-webp", "WebP, cut in the middle", truncated_picture("still.webp", "WEBP"), Fails("bad_image")),
]  # fmt: skip


def _first(place, size):
    path = long_clip("clip.mp4", container={"movflags": "faststart"})(place)
    path.write_bytes(path.read_bytes()[:size])
    return path


BROKEN = [
    Case("noise", "noise in the bytes of frames 45 and 62 of 96 (a key frame each 8)",
         remuxed("clip.mkv", count=LONG, filters=NOISE), touched([45, 46, 47, 62, 63])),
    Case("flipped-h264", "one byte turned over in frames 45 and 62 of 96, H.264",
         flipped("clip.mp4", "libx264", PLAIN, [45, 62]), touched([45, 46, 47, 62, 63], silent=True)),
    Case("flipped-hevc", "one byte turned over in frames 46 and 63 of 96, HEVC",
         flipped("clip.mp4", "libx265", {**HEVC, "x265-params": HEVC["x265-params"].replace("bframes=2", "bframes=0")},
                 [46, 63]), touched([46, 47, 63], silent=True)),
    Case("flipped-vp9", "one byte turned over in frames 46 and 63 of 96, VP9",
         flipped("clip.webm", "libvpx-vp9", VPX, [46, 63]), touched([46, 47, 63], silent=True)),
    Case("flipped-av1", "one byte turned over in frames 10, 30 and 50 of 96, AV1, key frames only",
         flipped("clip.mkv", "libsvtav1", {**AV1, "g": "1"}, [10, 30, 50]), touched([10, 30, 50], silent=True)),
    Case("flipped-ffv1", "one byte turned over in frames 10, 30 and 50 of 96, FFV1 with checksums",
         flipped("clip.mkv", "ffv1", {"slicecrc": "1", "level": "3", "g": "1"}, [10, 30, 50], pixels="bgr0"),
         touched([10, 30, 50])),
    Case("zeroed-mjpeg", "frames 40 to 45 of 96 are zeros, Motion JPEG in AVI",
         spoilt("clip.avi", "mjpeg", INTRA, GONE, pixels="yuvj420p"), left_out(GONE)),
    Case("zeroed-h264", "frames 40 to 45 of 96 are zeros, H.264, key frames only",
         spoilt("clip.mp4", "libx264", {**PLAIN, "g": "1"}, GONE), left_out(GONE)),
    Case("zeroed-prores", "frames 40 to 45 of 96 are zeros, ProRes",
         spoilt("clip.mov", "prores_ks", {}, GONE, pixels="yuv422p10le"), left_out(GONE)),
    Case("zeroed-first", "the first frame of 96 is zeros: shown from the next key frame",
         spoilt("clip.mp4", "libx264", PLAIN, [0]), shows(range(8, LONG), facts=FACTS, notes=("left out",))),
    Case("zeroed-avi-b-frames", "frame 41 of 96 is zeros, H.264 with B-frames in AVI: without times of showing nobody "
         "knows the numbers of the frames behind it", spoilt("clip.avi", "libx264", H264, [42]), Fails("damaged")),
    Case("zeroed-avi-b-frames-late", "frame 89 of 96 is zeros, H.264 with B-frames in AVI",
         spoilt("clip.avi", "libx264", H264, [90]), shows(range(LONG), facts=FACTS, gone=frozenset(range(89, LONG)),
                                                          hit=frozenset([86, 87, 88]))),
    Case("zeroed-half", "frames 20 to 69 of 96 are zeros: more than a tenth",
         spoilt("clip.mp4", "libx264", {**PLAIN, "g": "1"}, range(20, 70)), Fails("damaged")),
    Case("zeroed-all", "all frames are zeros", spoilt("clip.mp4", "libx264", PLAIN, range(LONG)), Fails("no_frames")),
    Case("lost-frame-ts", "the packets of frame 45 of 96 are lost (a key frame each 8)", without_ts_packets,
         shows([*range(45), *range(46, LONG)], [n / RATE for n in range(LONG) if n != 45], facts=FACTS,
               hit=frozenset([45, 46]))),
    Case("junk-ts", "100 zeros between the packets of a transport stream", put_in("clip.ts", 48, bytes(100)),
         shows(range(LONG), facts=FACTS, remarks=".")),
    Case("junk-like-sync-ts", "100 bytes of junk in a transport stream that look like the start of a packet: the key "
         "frame behind them, 48 of 96, is lost", put_in("clip.ts", 48, b"\x47" * 100),
         shows([*range(48), *range(49, LONG)], [n / RATE for n in range(LONG) if n != 48], facts=FACTS,
               hit=frozenset(range(48, 55)))),
    Case("junk-mkv", "100 bytes of junk in a Matroska file: the rest of the cluster, frames 46 and 47 of 96, is lost",
         put_in("clip.mkv", 46, bytes(100), container={"cluster_time_limit": "300"}),
         shows([*range(46), *range(48, LONG)], [n / RATE for n in range(LONG) if n not in (46, 47)], facts=FACTS,
               remarks=".")),
    Case("no-parameters", "mp4 whose decoder parameters are zeros",
         lambda place: patched(long_clip("clip.mp4")(place), (b"avcC", 0, bytes(30))), Fails("no_frames")),
    Case("no-fragments", "the header of a fragmented mp4 without a fragment",
         lambda place: _before(place, b"moof", 4), Fails("no_frames")),
    Case("only-a-fragment", "a fragment of an mp4 without its header",
         lambda place: _fragment(place), Fails("not_a_video")),
    Case("no-clusters", "the header of a Matroska file without frames",
         lambda place: _before(place, b"\x1f\x43\xb6\x75", 0, "clip.mkv"), Fails("not_a_video")),
    Case("offsets-behind-the-end", "mp4 whose frames lie behind the end of the file",
         lambda place: _far(place), Fails("no_frames")),
    Case("broken-png", "PNG whose bytes were changed", wrong_sum, Fails("bad_image")),
]  # fmt: skip


def _before(place, name, back, file="clip.mp4"):
    container = {"movflags": "frag_keyframe+empty_moov"} if file.endswith("mp4") else {}
    path = long_clip(file, container=container)(place)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(name) - back])
    return path


def _fragment(place):
    path = long_clip("clip.mp4", container={"movflags": "frag_keyframe+empty_moov"})(place)
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"moof") - 4 :])
    return path


def _far(place):
    path = long_clip("clip.mp4")(place)
    data = bytearray(path.read_bytes())
    start = data.index(b"stco") + 4
    (count,) = struct.unpack(">I", data[start + 4 : start + 8])
    data[start + 8 : start + 8 + 4 * count] = struct.pack(">I", 2**30) * count
    path.write_bytes(data)
    return path


CASES = {"Cut files": CUT, "Broken files": BROKEN}
