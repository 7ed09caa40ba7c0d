"""Sound files of every container, codec, pixel format, size and orientation: all frames, at their times."""

from fractions import Fraction

import av
from clips_elva import HEIGHT, WIDTH, write_sound
from PIL import Image

from .records import COUNT, RATE, Case, shows
from .writing import (
    AV1,
    EXACT,
    H264,
    HEVC,
    INTRA,
    MPEG,
    VPX,
    box,
    encode,
    new_data,
    painted,
    remux,
    to_yuv,
)

FACTS = {"rotation": 0, "height": HEIGHT, "width": WIDTH, "is_image": False}
SPAN = {**FACTS, "duration": COUNT / RATE, "fps": RATE}
ALL = shows(facts=SPAN)
NO_COLOURS = shows(facts=SPAN, colours=None)
BRIGHT = shows(facts=SPAN, notes=("(?i)HDR|high dynamic range",))
MATRICES = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}


def clip(name, file, what, codec="libx264", *, expect=ALL, **rest):
    """A clip written by `encode`."""
    return Case(name, what, lambda place: encode(place / file, codec, **rest), expect)


CONTAINERS = [
    clip("mp4", "clip.mp4", "H.264 with B-frames in mp4"),
    clip("mp4-faststart", "clip.mp4", "mp4, its index in front", container={"movflags": "faststart"}),
    clip("mp4-fragmented", "clip.mp4", "fragmented mp4", container={"movflags": "frag_keyframe+empty_moov"}),
    clip("mp4-a-fragment-each-frame", "clip.mp4", "mp4 with a fragment for each frame",
         container={"movflags": "frag_every_frame+empty_moov+default_base_moof"}),
    clip("mp4-cmaf", "clip.mp4", "CMAF: fragments with negative offsets and a segment index",
         container={"movflags": "cmaf+dash+frag_keyframe+delay_moov"}),
    clip("mov", "clip.mov", "QuickTime mov"),
    clip("3gp", "clip.3gp", "3gp"),
    clip("mkv", "clip.mkv", "H.264 in Matroska"),
    clip("mkv-live", "clip.mkv", "Matroska as streamed: clusters of unknown size, no index, no duration",
         container={"live": "1"}),
    clip("mkv-cues-in-front", "clip.mkv", "Matroska, its index in front",
         container={"cues_to_front": "1", "reserve_index_space": "2000"}),
    clip("webm-vp8", "clip.webm", "VP8 in WebM", "libvpx", options=VPX),
    clip("webm-vp9", "clip.webm", "VP9 in WebM", "libvpx-vp9", options=VPX),
    clip("ts", "clip.ts", "H.264 in an MPEG transport stream"),
    clip("m2ts", "clip.m2ts", "transport stream of 192-byte packets (Blu-ray, camcorders)", form="mpegts",
         container={"mpegts_m2ts_mode": "1"}),
    clip("mpg", "clip.mpg", "MPEG-2 in an MPEG program stream", "mpeg2video", options=MPEG),
    clip("vob", "clip.vob", "MPEG-2 in a DVD program stream", "mpeg2video", form="vob", options=MPEG),
    clip("avi", "clip.avi", "MPEG-4 in AVI", "mpeg4", options={**MPEG, "bf": "0"}),
    clip("avi-b-frames", "clip.avi", "AVI, which has no times of showing, with B-frames in MPEG-4", "mpeg4",
         options=MPEG),
    clip("avi-h264-b-frames", "clip.avi", "AVI, which has no times of showing, with B-frames in H.264"),
    clip("flv", "clip.flv", "H.264 in Flash video"),
    clip("flv-sorenson", "clip.flv", "Sorenson H.263 in Flash video", "flv", options=INTRA),
    clip("wmv", "clip.wmv", "WMV 2 in ASF", "wmv2", options=INTRA),
    clip("asf-msmpeg4", "clip.asf", "Microsoft MPEG-4 v3 in ASF", "msmpeg4", options=INTRA),
    clip("avi-msmpeg4v2", "clip.avi", "Microsoft MPEG-4 v2 in AVI", "msmpeg4v2", options=INTRA),
    clip("ogv", "clip.ogv", "VP8 in Ogg", "libvpx", options=VPX),
    clip("gif", "clip.gif", "animated GIF", "gif", pixels="rgb8", options={}, expect=NO_COLOURS),
    clip("ivf-vp9", "clip.ivf", "VP9 in IVF", "libvpx-vp9", options=VPX),
    clip("ivf-av1", "clip.ivf", "AV1 in IVF", "libsvtav1", options=AV1),
    clip("raw-h264", "clip.h264", "bare H.264 with B-frames: no container, no times"),
    clip("raw-hevc", "clip.hevc", "bare HEVC with B-frames: no container, no times", "libx265", options=HEVC),
    clip("raw-mpeg4", "clip.m4v", "bare MPEG-4 with B-frames", "mpeg4", form="m4v", options=MPEG),
    clip("raw-mpeg2", "clip.m2v", "bare MPEG-2 with B-frames", "mpeg2video", form="mpeg2video", options=MPEG),
    clip("raw-mpeg1", "clip.m1v", "bare MPEG-1 with B-frames", "mpeg1video", form="mpeg1video", options=MPEG),
]  # fmt: skip


def dressed(*, red, blue, full=False, depth=8):
    """Frames of known matrix, range and depth."""
    return lambda number: to_yuv(painted(number), red=red, blue=blue, full=full, depth=depth)


def tagged(space, primaries, transfer, *, full=False):
    """Tags of colour for the encoder, by their numbers in ISO 23091."""

    def setup(stream):
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = space, primaries, transfer
        context.color_range = 2 if full else 1

    return setup


def hdr(name, what, transfer):
    red, blue = MATRICES["2020"]
    return clip(name, "clip.mp4", what, "libx265", pixels="yuv444p10le", options=HEVC, expect=BRIGHT,
                frames=dressed(red=red, blue=blue, depth=10), setup=tagged(9, 9, transfer))  # fmt: skip


def matrix(name, what, space, number, *, full=False):
    red, blue = MATRICES[name]
    label = f"colours-{name}" + "-full-range" * full
    return clip(label, "clip.mp4", what, pixels="yuv444p", frames=dressed(red=red, blue=blue, full=full),
                setup=tagged(space, number, number, full=full), options={**H264, "crf": "4"})  # fmt: skip


def interlaced(name, file, what, codec, options):
    """Fields have whole blocks of 16 lines, so a frame needs a multiple of 32."""
    expect = shows(facts={**SPAN, "height": 64}, notes=("(?i)interlac",))
    return clip(name, file, what, codec, options=options, size=(64, WIDTH), expect=expect)


CODECS = [
    clip("h264-all-intra", "clip.mp4", "H.264, key frames only", options={**H264, "g": "1"}),
    clip("h264-422", "clip.mp4", "H.264 4:2:2", pixels="yuv422p"),
    clip("h264-444", "clip.mp4", "H.264 4:4:4", pixels="yuv444p"),
    clip("h264-rgb", "clip.mp4", "H.264 in RGB", "libx264rgb", pixels="rgb24"),
    clip("h264-gray", "clip.mp4", "H.264 without colour", pixels="gray", expect=NO_COLOURS),
    clip("h264-10-bit", "clip.mp4", "H.264 of 10 bits", pixels="yuv420p10le"),
    clip("h264-10-bit-422", "clip.mov", "H.264 of 10 bits, 4:2:2 (cameras)", pixels="yuv422p10le"),
    clip("hevc", "clip.mp4", "HEVC with B-frames in mp4", "libx265", options=HEVC),
    clip("hevc-ts", "clip.ts", "HEVC in a transport stream", "libx265", options=HEVC),
    clip("hevc-10-bit", "clip.mkv", "HEVC of 10 bits in Matroska", "libx265", pixels="yuv420p10le", options=HEVC),
    clip("hevc-12-bit-444", "clip.mp4", "HEVC of 12 bits, 4:4:4", "libx265", pixels="yuv444p12le", options=HEVC),
    hdr("hdr-pq", "HEVC of 10 bits tagged HDR10 (PQ, BT.2020)", 16),
    hdr("hdr-hlg", "HEVC of 10 bits tagged HLG (BT.2020)", 18),
    matrix("601", "colours in BT.601, tagged so", 6, 6),
    matrix("709", "colours in BT.709, tagged so", 1, 1),
    matrix("709", "colours in BT.709, full range, tagged so", 1, 1, full=True),
    clip("vp9-mp4", "clip.mp4", "VP9 in mp4", "libvpx-vp9", options=VPX),
    clip("vp9-444", "clip.webm", "VP9 4:4:4", "libvpx-vp9", pixels="yuv444p", options=VPX),
    clip("vp9-rgb", "clip.webm", "VP9 in RGB", "libvpx-vp9", pixels="gbrp", options=VPX),
    clip("vp9-alpha", "clip.webm", "VP9 with transparency (dropped)", "libvpx-vp9", pixels="yuva420p", options=VPX),
    clip("vp9-hidden-frames", "clip.webm", "VP9 with references that are never shown", "libvpx-vp9",
         options={"g": "16", "lag-in-frames": "16", "auto-alt-ref": "1", "cpu-used": "8", "crf": "8", "b": "0"}),
    clip("av1-mp4", "clip.mp4", "AV1 in mp4", "libsvtav1", options=AV1),
    clip("av1-10-bit", "clip.mkv", "AV1 of 10 bits in Matroska", "libsvtav1", pixels="yuv420p10le", options=AV1),
    clip("mpeg4-mp4", "clip.mp4", "MPEG-4 with B-frames in mp4", "mpeg4", options=MPEG),
    clip("mpeg2-ts", "clip.ts", "MPEG-2 with B-frames in a transport stream", "mpeg2video", options=MPEG),
    clip("mjpeg-avi", "clip.avi", "Motion JPEG in AVI", "mjpeg", pixels="yuvj420p", options=INTRA),
    clip("mjpeg-mov", "clip.mov", "Motion JPEG 4:4:4 in mov", "mjpeg", pixels="yuvj444p", options=INTRA),
    clip("prores", "clip.mov", "ProRes 422", "prores_ks", pixels="yuv422p10le", options={}),
    clip("prores-alpha", "clip.mov", "ProRes 4444 with transparency (dropped)", "prores_ks", pixels="yuva444p10le",
         options={}),
    clip("ffv1", "clip.mkv", "FFV1 in RGB", "ffv1", pixels="bgr0", options={}),
    clip("ffv1-gray", "clip.mkv", "FFV1 without colour", "ffv1", pixels="gray", options={}, expect=NO_COLOURS),
    clip("ffv1-16-bit", "clip.mkv", "FFV1 of 16 bits in RGB", "ffv1", pixels="gbrp16le", options={}),
    clip("qtrle-alpha", "clip.mov", "QuickTime Animation with transparency (dropped)", "qtrle", pixels="argb",
         options={}),
    clip("png-mov", "clip.mov", "PNG frames in mov", "png", pixels="rgb24", options={}),
    clip("png-16-bit-alpha", "clip.mov", "PNG frames of 16 bits with transparency (dropped)", "png",
         pixels="rgba64be", options={}),
    clip("raw-frames-avi", "clip.avi", "frames without compression in AVI", "rawvideo", pixels="bgr24", options={}),
    clip("raw-frames-mkv", "clip.mkv", "frames without compression in Matroska", "rawvideo", options={}),
    interlaced("interlaced-h264", "clip.mp4", "interlaced H.264, top field first", "libx264",
               {**H264, "flags": "+ilme+ildct", "x264-params": "tff=1"}),
    interlaced("interlaced-mpeg2", "clip.mpg", "interlaced MPEG-2, top field first", "mpeg2video",
               {**MPEG, "flags": "+ilme+ildct+qscale", "top": "1"}),
]  # fmt: skip


def sized(name, height, width, what, codec="ffv1", file="clip.mkv", pixels="bgr0", options=None):
    expect = shows(range(8), facts={**FACTS, "height": height, "width": width})
    return clip(name, file, what, codec, numbers=range(8), size=(height, width), pixels=pixels,
                options=options or {}, expect=expect)  # fmt: skip


def turned(name, file, degrees, what):
    height, width = (WIDTH, HEIGHT) if degrees % 180 else (HEIGHT, WIDTH)
    facts = {**SPAN, "height": height, "width": width, "rotation": degrees}
    return clip(name, file, what, rotation=degrees, expect=shows(facts=facts))


def turned_by_message(place):
    """The turn is in the coded frames (SEI), not in the container."""
    plain = encode(place / "plain.ts")
    filters = "h264_metadata=display_orientation=insert:rotate=90"
    path = remux(plain, place / "clip.ts", filters=filters)
    plain.unlink()
    return path


def anamorphic(stream):
    stream.codec_context.sample_aspect_ratio = Fraction(16, 11)


SHAPES = [
    sized("odd-size-h264", 37, 57, "37 x 57 pixels, H.264 4:4:4", "libx264", "clip.mp4", "yuv444p", H264),
    sized("odd-size-vp9", 37, 57, "37 x 57 pixels, VP9 4:2:0", "libvpx-vp9", "clip.webm", "yuv420p", VPX),
    sized("odd-size-av1", 67, 73, "67 x 73 pixels, AV1 4:2:0", "libsvtav1", "clip.mkv", "yuv420p", AV1),
    sized("odd-size-mjpeg", 37, 57, "37 x 57 pixels, Motion JPEG 4:2:0", "mjpeg", "clip.avi", "yuvj420p", INTRA),
    sized("cropped-h264", 38, 74, "38 x 74 pixels: H.264 crops them from 48 x 80", "libx264", "clip.mp4", "yuv420p",
          H264),
    sized("wide", 16, 4096, "16 x 4096 pixels"),
    sized("tall", 4096, 16, "4096 x 16 pixels"),
    sized("smallest", 4, 8, "4 x 8 pixels, the smallest height there may be"),
    clip("anamorphic", "clip.mp4", "pixels that are not square: frames come as stored", setup=anamorphic),
    turned("rotated-90", "clip.mp4", 90, "phone clip, turned by 90 degrees"),
    turned("rotated-180", "clip.mp4", 180, "phone clip, turned by 180 degrees"),
    turned("rotated-270", "clip.mov", 270, "phone clip, turned by 270 degrees"),
    turned("rotated-mkv", "clip.mkv", 90, "Matroska, turned by 90 degrees"),
    Case("rotated-in-the-stream", "the turn by 90 degrees is written in the coded frames", turned_by_message,
         shows(facts={**SPAN, "height": WIDTH, "width": HEIGHT, "rotation": 90})),
]  # fmt: skip


def with_sound(place):
    """Video of 32 frames, sound longer than it."""
    sound, path = write_sound(place / "sound.mp4"), place / "clip.mp4"
    with av.open(sound) as other, av.open(path, "w", options=EXACT) as out:
        video = out.add_stream("libx264", rate=RATE, options=H264)
        video.height, video.width, video.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        track = out.add_stream_from_template(other.streams.audio[0])
        template = next(packet for packet in other.demux(audio=0) if packet.size)
        for number in range(2 * COUNT):
            copy = new_data(template, bytes(template))
            copy.pts = copy.dts = number * 1024
            copy.stream = track
            out.mux(copy)
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24").reformat(format="yuv420p")
            out.mux(video.encode(frame))
        out.mux(video.encode())
    sound.unlink()
    return path


def two_streams(file):
    """Two video streams: the first counts from 0, the second from 100."""

    def build(place):
        clips = [encode(place / f"{start}.{file}", numbers=range(start, start + COUNT)) for start in (0, 100)]
        path = place / file
        with av.open(clips[0]) as one, av.open(clips[1]) as two, av.open(path, "w", options=EXACT) as out:
            streams = [out.add_stream_from_template(source.streams.video[0]) for source in (one, two)]
            for pair in zip(one.demux(video=0), two.demux(video=0), strict=True):
                for packet, stream in zip(pair, streams, strict=True):
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
        for part in clips:
            part.unlink()
        return path

    return build


def with_cover(place):
    """A picture as cover in front of the video."""
    plain, path = encode(place / "plain.mp4"), place / "clip.mp4"
    with av.open(plain) as source, av.open(path, "w", options=EXACT) as out:
        cover = out.add_stream("png", rate=1)
        cover.height, cover.width, cover.pix_fmt = HEIGHT, WIDTH, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = out.add_stream_from_template(source.streams.video[0])
        out.mux(cover.encode(av.VideoFrame.from_ndarray(painted(255), format="rgb24")))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    plain.unlink()
    return path


def with_subtitles(place):
    """Subtitles and an attached font beside the video."""
    plain, text, path = encode(place / "plain.mkv"), place / "words.srt", place / "clip.mkv"
    text.write_text("1\n00:00:00,000 --> 00:00:09,000\nhello\n")
    with av.open(plain) as source, av.open(text) as words, av.open(path, "w", options=EXACT) as out:
        lines, stream = (out.add_stream_from_template(other.streams[0]) for other in (words, source))
        out.add_attachment("font.ttf", "application/x-truetype-font", b"no font")
        for other, target in ((words, lines), (source, stream)):
            for packet in other.demux():
                if packet.size:
                    packet.stream = target
                    out.mux(packet)
    plain.unlink(), text.unlink()
    return path


def timecoded(stream):
    stream.metadata["timecode"] = "01:00:00:00"


def open_ended_mdat(place):
    """The box of the frames says "to the end of the file" (size 0), as cameras that stream write it."""
    path = encode(place / "clip.mp4", container={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") - 4
    data[start : start + 4] = bytes(4)
    path.write_bytes(data)
    return path


def junk_behind(place):
    path = encode(place / "clip.mp4")
    path.write_bytes(path.read_bytes() + bytes(range(256)) * 20)
    return path


def strange_boxes(place):
    """Boxes that nobody knows, in front and behind."""
    path = encode(place / "clip.mp4")
    strange = box(b"uuid", bytes(range(200))) + box(b"wxyz", b"???") + box(b"free", bytes(500))
    data = path.read_bytes()
    start = data.index(b"mdat") - 4
    moov = data.index(b"moov") - 4
    path.write_bytes(data[:moov] + strange + data[moov:] + strange)  # offsets of frames stay, as moov is behind mdat
    assert start < moov
    return path


def junk_in_front_of_ts(place):
    path = encode(place / "clip.ts")
    path.write_bytes(bytes(range(100)) + path.read_bytes())
    return path


def renamed(name):
    def build(place):
        return encode(place / "clip.mp4").rename(place / name)

    return build


def linked(place):
    (place / "link.mp4").symlink_to(encode(place / "clip.mp4"))
    return place / "link.mp4"


def avif(place):
    return encode(place / "still.avif", "libsvtav1", numbers=[5], options=AV1)


def picture(name, kind, mode="RGB", **options):
    def build(place):
        Image.fromarray(painted(5)).convert(mode).save(place / name, kind, **options)
        return place / name

    return build


STILL = shows([5], [0.0], facts={"is_image": True, "height": HEIGHT, "width": WIDTH})
STILL_GRAY = shows([5], [0.0], facts={"is_image": True, "height": HEIGHT, "width": WIDTH}, colours=None)
OTHERS = [
    Case("with-longer-sound", "sound that is longer than the video", with_sound, ALL),
    Case("with-two-videos", "two video streams: the first counts", two_streams("clip.mkv"), ALL),
    Case("with-two-videos-mp4", "two video tracks in mp4: the first counts", two_streams("clip.mp4"), ALL),
    clip("with-timecode", "clip.mov", "a track of time codes beside the video", setup=timecoded),
    Case("with-cover", "a cover picture in front of the video", with_cover, ALL),
    Case("with-subtitles", "subtitles and an attached font beside the video", with_subtitles, ALL),
    Case("mp4-open-ended", "mp4 whose frames go on to the end of the file (box of size 0)", open_ended_mdat, ALL),
    Case("mp4-junk-behind", "mp4 with 5 kB of junk behind it", junk_behind, ALL),
    Case("mp4-strange-boxes", "mp4 with boxes that nobody knows", strange_boxes, ALL),
    Case("ts-junk-in-front", "transport stream with 100 bytes of junk in front", junk_in_front_of_ts, ALL),
    Case("named-txt", "mp4 named .txt", renamed("clip.txt"), ALL),
    Case("named-without-suffix", "mp4 without a suffix", renamed("clip"), ALL),
    Case("named-like-a-protocol", "mp4 named concat:a|b.mp4", renamed("concat:a|b.mp4"), ALL),
    Case("named-like-a-pattern", "mp4 named %03d-*?.mp4", renamed("%03d-*?.mp4"), ALL),
    Case("named-with-newline", "mp4 whose name has a line break", renamed("two\nlines.mp4"), ALL),
    Case("named-in-unicode", "mp4 named in Greek, Chinese and emoji", renamed("βίντεο 视频 🎬.mp4"), ALL),
    Case("symbolic-link", "symbolic link to an mp4", linked, ALL),
    Case("png", "PNG", picture("still.png", "PNG"), STILL),
    Case("png-named-mp4", "PNG named .mp4", picture("still.mp4", "PNG"), STILL),
    Case("jpeg", "JPEG", picture("still.jpg", "JPEG", quality=95, subsampling=0), STILL),
    Case("webp", "WebP", picture("still.webp", "WEBP", lossless=True), STILL),
    Case("bmp", "BMP", picture("still.bmp", "BMP"), STILL),
    Case("tiff", "TIFF", picture("still.tif", "TIFF"), STILL),
    Case("png-palette", "PNG with a palette", picture("still.png", "PNG", "P"), STILL_GRAY),
    Case("png-gray", "PNG without colour", picture("still.png", "PNG", "L"), STILL_GRAY),
    Case("png-alpha", "PNG with transparency", picture("still.png", "PNG", "RGBA"), STILL),
    Case("jpeg-cmyk", "JPEG in CMYK", picture("still.jpg", "JPEG", "CMYK"), STILL_GRAY),
    Case("one-frame-gif", "GIF of one frame", picture("still.gif", "GIF"), shows([5], [0.0], colours=None)),
    Case("avif", "AVIF: an AV1 frame in an mp4-like file", avif, shows([5], [0.0])),
]  # fmt: skip


def moving_picture(name, kind, duration=40, **options):
    def build(place):
        frames = [Image.fromarray(painted(number)) for number in range(COUNT)]
        frames[0].save(place / name, kind, save_all=True, append_images=frames[1:], duration=duration, **options)
        return place / name

    return build


UNEVEN = [20 + 10 * (number % 5) for number in range(COUNT)]
STARTS = [sum(UNEVEN[:number]) / 1000 for number in range(COUNT)]
MOVING = [
    Case("animated-webp", "animated WebP", moving_picture("moving.webp", "WEBP", lossless=True), ALL),
    Case("animated-webp-uneven", "animated WebP whose frames stay 20 to 60 ms",
         moving_picture("moving.webp", "WEBP", UNEVEN, lossless=True),
         shows(times=STARTS, facts={**FACTS, "duration": sum(UNEVEN) / 1000})),
    Case("animated-png", "animated PNG", moving_picture("moving.png", "PNG"), ALL),
    Case("gif-uneven", "GIF whose frames stay 20 to 60 ms", moving_picture("moving.gif", "GIF", UNEVEN),
         shows(times=STARTS, colours=24)),
    Case("gif-restoring", "GIF whose frames are wiped before the next (disposal 2)",
         moving_picture("moving.gif", "GIF", disposal=2), shows(colours=24)),
    Case("gif-without-delays", "GIF whose delays are 0: 10 frames a second, as browsers show it",
         moving_picture("moving.gif", "GIF", 0), shows(step=0.1, colours=24)),
]  # fmt: skip

CASES = {
    "Containers": CONTAINERS,
    "Codecs and colours": CODECS,
    "Sizes and turns": SHAPES,
    "Things beside the video, strange names, pictures": OTHERS,
    "Moving pictures": MOVING,
}
