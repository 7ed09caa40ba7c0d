"""Sound files of every container, codec, pixel format, size and orientation: all frames, at their times."""

from fractions import Fraction

from clips_elva import HEIGHT, WIDTH

from .records import COUNT, RATE, Case, shows
from .writing import (
    AV1,
    H264,
    HEVC,
    INTRA,
    MPEG,
    VPX,
    encode,
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

CASES = {
    "Containers": CONTAINERS,
    "Codecs and colours": CODECS,
    "Sizes and turns": SHAPES,
}
