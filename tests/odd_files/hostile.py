"""Inputs made to hurt: ones that point at other files or hosts, bombs, and sources above a limit."""

import struct
import zlib
from io import BytesIO

from PIL import Image

from .containers import ALL, clip
from .records import Case, Fails, shows
from .strangers import content, given
from .writing import INTRA, PLAIN, VPX, box, encode, patched

NO_VIDEO, PROTOCOL = Fails("not_a_video"), Fails("protocol")
PIXELS = Fails("too_many_pixels")


def bait(place):
    """A sound clip beside the input, which nobody may open."""
    return encode(place / "bait.mp4", options=PLAIN, numbers=range(4))


def listing(name, text, *, as_bytes=False):
    """A text that names other media; `{bait}`, `{path}` and `{port}` are filled in."""

    def build(place):
        path = bait(place)
        data = text.format(bait=path.name, path=path, port=place.port).encode()
        if as_bytes:
            return data
        (place / name).write_bytes(data)
        return place / name

    return build


def url(text):
    return lambda place: text.format(path=bait(place), port=place.port)


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile {bait}\n"
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>{bait}</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>"
)
RTSP = "RTSPtext\nrtsp://127.0.0.1:{port}/a\n"
IMF = '<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"><Id>{path}</Id></CompositionPlaylist>'
HTTP = "http://127.0.0.1:{port}/a.ts"
KEY = '#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="http://127.0.0.1:{port}/k"\n#EXTINF:9,\n{bait}\n'

POINTING = [
    Case("hls", "HLS playlist of a file", listing("list.m3u8", HLS.format("{bait}")), NO_VIDEO),
    Case("hls-named-mp4", "HLS playlist named .mp4", listing("list.mp4", HLS.format("{path}")), NO_VIDEO),
    Case("hls-named-ts", "HLS playlist named .ts", listing("list.ts", HLS.format("file:{path}")), NO_VIDEO),
    Case("hls-http", "HLS playlist of a URL", listing("list.m3u8", HLS.format(HTTP)), NO_VIDEO),
    Case("hls-key", "HLS playlist with a key to fetch", listing("list.m3u8", KEY), NO_VIDEO),
    Case("hls-bytes", "HLS playlist as bytes", listing("", HLS.format("{path}"), as_bytes=True), NO_VIDEO),
    Case("dash", "DASH manifest", listing("clip.mpd", DASH), NO_VIDEO),
    Case("sdp", "SDP: a call to listen to the network", listing("call.sdp", SDP), NO_VIDEO),
    Case("sdp-named-mp4", "SDP named .mp4", listing("call.mp4", SDP), NO_VIDEO),
    Case("sdp-bytes", "SDP as bytes", listing("", SDP, as_bytes=True), NO_VIDEO),
    Case("ffconcat", "list of files for FFmpeg", listing("list.ffconcat", CONCAT), NO_VIDEO),
    Case("ffconcat-named-mp4", "list of files for FFmpeg, named .mp4", listing("list.mp4", CONCAT), NO_VIDEO),
    Case("ffconcat-bytes", "list of files for FFmpeg, as bytes", listing("", CONCAT, as_bytes=True), NO_VIDEO),
    Case("ffconcat-absolute", "list of files for FFmpeg, by absolute path",
         listing("list.mp4", "ffconcat version 1.0\nfile {path}\n"), NO_VIDEO),
    Case("rtsp-text", "redirection to an RTSP server", listing("clip.mov", RTSP), NO_VIDEO),
    Case("mov-reference", "QuickTime file that refers to another file for its frames",
         lambda place: reference_movie(place), Fails("no_frames")),
    Case("imf", "list of parts (IMF)", listing("cpl.xml", IMF), NO_VIDEO),
    Case("url-http", "http URL while URLs are off", url("http://127.0.0.1:{port}/x.mp4"), PROTOCOL),
    Case("url-https", "https URL while URLs are off", url("https://user:secret@127.0.0.1:{port}/x.mp4?key=secret"),
         PROTOCOL),
    Case("url-upper", "URL in capitals", url("HTTP://127.0.0.1:{port}/x.mp4"), PROTOCOL),
    Case("url-tcp", "tcp URL", url("tcp://127.0.0.1:{port}"), PROTOCOL),
    Case("url-udp", "udp URL", url("udp://127.0.0.1:{port}"), PROTOCOL),
    Case("url-rtmp", "rtmp URL", url("rtmp://127.0.0.1:{port}/a/b"), PROTOCOL),
    Case("url-rtsp", "rtsp URL", url("rtsp://127.0.0.1:{port}/a"), PROTOCOL),
    Case("url-ftp", "ftp URL", url("ftp://user:secret@127.0.0.1:{port}/x.mp4"), PROTOCOL),
    Case("url-file", "file URL", url("file://{path}"), PROTOCOL),
    Case("url-file-short", "file: and a path", url("file:{path}"), PROTOCOL),
    Case("url-data", "data URL", given("data:video/mp4;base64,AAAAIGZ0eXBpc29t"), PROTOCOL),
    Case("url-concat", "concat: of FFmpeg", url("concat:{path}|{path}"), PROTOCOL),
    Case("url-subfile", "subfile of FFmpeg", url("subfile,,start,0,end,0,,:{path}"), PROTOCOL),
    Case("url-crypto", "crypto: of FFmpeg", url("crypto:{path}"), PROTOCOL),
    Case("url-cache", "cache: of FFmpeg over http", url("cache:http://127.0.0.1:{port}/x.mp4"), PROTOCOL),
    Case("url-lavfi", "lavfi: of FFmpeg", given("lavfi:testsrc"), PROTOCOL),
    Case("url-movie", "a filter of FFmpeg that opens files", url("movie={path}"), Fails("not_found")),
    Case("url-pipe", "pipe: of FFmpeg", given("pipe:0"), PROTOCOL),
    Case("url-pattern", "pattern of image files", lambda place: str(place / "frame%d.png"), Fails("not_found")),
]  # fmt: skip


def reference_movie(place):
    """The sample table points into a file that an alias record names."""
    path = encode(place / "clip.mov", options=PLAIN)
    target = bait(place).name.encode()
    data = bytearray(path.read_bytes())
    name = bytes([len(target)]) + target
    alias = bytes(10) + bytes(28) + bytes(12) + name.ljust(64, b"\0") + bytes(16) + struct.pack(">HH", 1, 1) + bytes(16)
    alias += struct.pack(">HH", 2, len(target)) + target + bytes(len(target) % 2) + struct.pack(">HH", 0xFFFF, 0)
    old = data.index(b"dref") - 4
    (size,) = struct.unpack(">I", data[old : old + 4])
    new = box(b"dref", struct.pack(">II", 0, 1), box(b"alis", bytes(4), alias))
    data[old : old + size] = new
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        start = data.index(name) - 4
        (length,) = struct.unpack(">I", data[start : start + 4])
        data[start : start + 4] = struct.pack(">I", length + len(new) - size)
    path.write_bytes(data)
    return path


def _exponential(bits, place):
    """The exp-Golomb number at `place` in a string of bits, and the place behind it."""
    zeros = bits.index("1", place) - place
    end = place + 2 * zeros + 1
    return int(bits[place + zeros : end], 2) - 1, end


def enlarged(stream, columns, rows):
    """Bare H.264 whose first parameter set claims so many macroblocks of 16 x 16 pixels."""
    start = stream.index(b"\0\0\1\x67") + 7  # behind the level
    end = stream.index(b"\0\0\1", start)
    bits = "".join(f"{byte:08b}" for byte in stream[start:end].rstrip(b"\0"))
    place = 0
    for _ in range(2):
        _, place = _exponential(bits, place)
    order, place = _exponential(bits, place)
    assert order in (0, 2)
    for _ in range(2 if order == 0 else 1):
        _, place = _exponential(bits, place)
    head, place = bits[: place + 1], place + 1
    for _ in range(2):
        _, place = _exponential(bits, place)
    sizes = "".join("0" * (f"{size:b}".__len__() - 1) + f"{size:b}" for size in (columns, rows))
    new = (head + sizes + bits[place:]).rstrip("0")
    new += "0" * (-len(new) % 8)
    data = bytes(int(new[i : i + 8], 2) for i in range(0, len(new), 8))
    return stream[:start] + data + stream[end - (stream[end - 1] == 0) :]


SINGLE = {**PLAIN, "g": "999"}  # one key frame, one parameter set


def h264_bomb(place):
    path = encode(place / "clip.h264", options=SINGLE)
    path.write_bytes(enlarged(path.read_bytes(), 512, 512))
    return path


def h264_bomb_in_the_middle(place):
    path = encode(place / "clip.h264", options=SINGLE)
    data = path.read_bytes()
    path.write_bytes(data + enlarged(data, 512, 512))
    return path


def mjpeg_bomb(side):
    """Every JPEG frame, and the header of the AVI, claims so many pixels."""

    def build(place):
        path = encode(place / "clip.avi", "mjpeg", pixels="yuvj420p", options=INTRA)
        data = path.read_bytes().replace(struct.pack(">HH", 48, 128), struct.pack(">HH", side, side))
        path.write_bytes(data.replace(struct.pack("<II", 128, 48), struct.pack("<II", side, side)))
        return path

    return build


def vp9_bomb(side):
    """Every key frame claims so many pixels."""

    def build(place):
        path = encode(place / "clip.ivf", "libvpx-vp9", options=VPX)
        data, start = bytearray(path.read_bytes()), 0
        while (start := data.find(b"\x49\x83\x42", start) + 3) > 2:
            value = int.from_bytes(data[start : start + 5], "big")  # 4 bits of colour, 16 of width, 16 of height
            value = value & ~(0xFFFFFFFF << 4) | (side - 1) << 20 | (side - 1) << 4
            data[start : start + 5] = value.to_bytes(5, "big")
        path.write_bytes(data)
        return path

    return build


def vp8_bomb(place):
    """Every key frame claims 16383 x 16383 pixels."""
    path = encode(place / "clip.webm", "libvpx", options=VPX)
    old, new = (b"\x9d\x01\x2a" + struct.pack("<HH", *size) for size in ((128, 48), (16383, 16383)))
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(height, width, *extra):
    """A whole PNG of one bit a pixel."""

    def build(place):
        packer, rows = zlib.compressobj(9), bytes(max(1, height // 16) * (1 + (width + 7) // 8))
        pixels = b"".join(packer.compress(rows) for _ in range(16)) + packer.flush()
        header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
        (place / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        return place / "bomb.png"

    return build


def webp_bomb(place):
    """60 frames of 2048 x 2048 pixels in a few kilobytes: 1 GB with their transparency."""
    still = BytesIO()
    Image.new("RGB", (2048, 2048), (200, 40, 40)).save(still, "WEBP", lossless=True)
    picture = still.getvalue()[12:]
    three = lambda number: struct.pack("<I", number)[:3]  # noqa: E731
    frame = three(0) * 2 + three(2047) * 2 + three(40) + b"\0" + picture
    part = lambda name, data: name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)  # noqa: E731
    body = part(b"VP8X", struct.pack("<I", 2) + three(2047) * 2) + part(b"ANIM", bytes(6)) + part(b"ANMF", frame) * 60
    (place / "bomb.webp").write_bytes(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body)
    return place / "bomb.webp"


def gif_bomb(side):
    """The screen claims so many pixels, the frames are small."""

    def build(place):
        path = encode(place / "clip.gif", "gif", pixels="rgb8", options={})
        data = path.read_bytes()
        path.write_bytes(data[:6] + struct.pack("<HH", side, side) + data[10:])
        return path

    return build


def huge_entry(place):
    """The sample entry of an mp4 claims 65535 x 65535 pixels, its frames have 48 x 128."""
    return patched(encode(place / "clip.mp4", options=PLAIN), (b"avc1", 24, b"\xff" * 4))


def huge_table(place):
    """The table of sizes of an mp4 claims 2147483647 frames."""
    return patched(encode(place / "clip.mp4", options=PLAIN), (b"stsz", 8, struct.pack(">I", 2**31 - 1)))


def equal_sizes(place):
    """The table of sizes of an mp4 says: 2147483647 frames of 1 byte each."""
    return patched(encode(place / "clip.mp4", options=PLAIN), (b"stsz", 4, struct.pack(">II", 1, 2**31 - 1)))


TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 * 2**20), 9))
Y4M = b"YUV4MPEG2 W65535 H65535 F25:1 Ip A1:1 C444\nFRAME\n" + bytes(1000)
BOMBS = [
    Case("bomb-h264", "bare H.264 that claims 8192 x 8192 pixels", h264_bomb, PIXELS),
    Case("bomb-h264-later", "bare H.264 that claims 8192 x 8192 pixels from the middle on", h264_bomb_in_the_middle,
         PIXELS),
    Case("bomb-mjpeg", "Motion JPEG that claims 8192 x 8192 pixels", mjpeg_bomb(8192), PIXELS),
    Case("bomb-mjpeg-large", "Motion JPEG that claims 65500 x 65500 pixels, which no decoder takes", mjpeg_bomb(65500),
         Fails("no_frames")),
    Case("bomb-vp9", "VP9 that claims 8192 x 8192 pixels", vp9_bomb(8192), PIXELS),
    Case("bomb-vp9-large", "VP9 that claims 65536 x 65536 pixels, which no decoder takes", vp9_bomb(65536), PIXELS),
    Case("bomb-vp8", "VP8 that claims 16383 x 16383 pixels", vp8_bomb, PIXELS),
    Case("bomb-gif", "GIF that claims 8192 x 8192 pixels", gif_bomb(8192), PIXELS),
    Case("bomb-gif-large", "GIF that claims 65535 x 65535 pixels, which no decoder takes", gif_bomb(65535), PIXELS),
    Case("bomb-png", "PNG of 8192 x 8192 pixels", png_bomb(8192, 8192), PIXELS),
    Case("bomb-png-large", "PNG of 32768 x 32768 pixels", png_bomb(32768, 32768), PIXELS),
    Case("bomb-png-text", "PNG whose comment unpacks to 200 MB", png_bomb(64, 64, TEXT), Fails("bad_image")),
    Case("bomb-webp", "animated WebP of 60 frames of 2048 x 2048 pixels in a few kB: shown one by one", webp_bomb,
         shows([0] * 60, colours=None)),
    Case("bomb-yuv4mpeg", "YUV4MPEG header that claims 65535 x 65535 pixels", content("bomb.y4m", Y4M), NO_VIDEO),
    Case("bomb-mp4-entry", "mp4 that claims 65535 x 65535 pixels before frames of 48 x 128: the frames count",
         huge_entry, ALL),
    Case("bomb-mp4-table", "mp4 that claims 2147483647 frames in its table of sizes", huge_table, NO_VIDEO),
    Case("bomb-mp4-equal-sizes", "mp4 that claims 2147483647 frames of one byte", equal_sizes,
         Fails("no_frames")),
    clip("codec-magicyuv", "clip.avi", "a codec that is not on the list: MagicYUV", "magicyuv", pixels="gbrp",
         options={}, expect=Fails("codec", "magicyuv")),
    clip("codec-huffyuv", "clip.avi", "a codec that is not on the list: HuffYUV", "huffyuv", pixels="yuv422p",
         options={}, expect=Fails("codec", "huffyuv")),
    clip("codec-flashsv", "clip.flv", "a codec that is not on the list: Flash screen video", "flashsv", pixels="bgr24",
         options={}, expect=Fails("codec", "flashsv")),
]  # fmt: skip


def limited(name, what, reason, limits, build=None):
    return Case(name, what, build or (lambda place: encode(place / "clip.mp4")), Fails(reason), limits)


LIMITS = [
    limited("above-max-bytes", "a file above max_bytes", "too_many_bytes", {"max_bytes": 1000}),
    limited("above-max-frames", "a file of 32 frames, max_frames 31", "too_many_frames", {"max_frames": 31}),
    Case("at-max-frames", "a file of 32 frames, max_frames 32", lambda place: encode(place / "clip.mp4"), ALL,
         {"max_frames": 32}),
    limited("above-max-frames-ts", "a transport stream of 32 frames, max_frames 31", "too_many_frames",
            {"max_frames": 31}, lambda place: encode(place / "clip.ts")),
    limited("above-max-frames-gif", "a GIF of 32 frames, max_frames 31", "too_many_frames", {"max_frames": 31},
            lambda place: encode(place / "clip.gif", "gif", pixels="rgb8", options={})),
    limited("above-max-duration", "1.28 s of video, max_duration 1", "too_long", {"max_duration": 1.0}),
    limited("above-max-duration-raw", "1.28 s of bare H.264, max_duration 1", "too_long", {"max_duration": 1.0},
            lambda place: encode(place / "clip.h264")),
    limited("above-max-pixels", "48 x 128 pixels, max_pixels 6143", "too_many_pixels", {"max_pixels": 6143}),
    Case("at-max-pixels", "48 x 128 pixels, max_pixels 6144", lambda place: encode(place / "clip.mp4"), ALL,
         {"max_pixels": 6144}),
    limited("above-max-pixels-turned", "a turned clip of 48 x 128 pixels, max_pixels 6143", "too_many_pixels",
            {"max_pixels": 6143}, lambda place: encode(place / "clip.mp4", rotation=90)),
    limited("off-the-demuxers", "mp4 while only Matroska is allowed", "not_a_video",
            {"demuxers": {"matroska", "webm"}}),
    limited("off-the-codecs", "H.264 while only VP9 is allowed", "codec", {"codecs": {"vp9"}}),
    Case("too-small", "2 x 2 pixels", lambda place: encode(place / "clip.mkv", "ffv1", size=(2, 2), pixels="bgr0",
         options={}, numbers=[0]), Fails("too_small")),
    Case("too-small-png", "PNG of 2 x 2 pixels", png_bomb(2, 2), Fails("too_small")),
    Case("too-flat", "2 x 128 pixels", lambda place: encode(place / "clip.mkv", "ffv1", size=(2, 128), pixels="bgr0",
         options={}, numbers=[0]), Fails("too_small")),
]  # fmt: skip

CASES = {"Files and URLs that point elsewhere": POINTING, "Bombs": BOMBS, "Limits": LIMITS}
