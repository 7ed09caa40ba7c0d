"""Small clips of every container and codec that is read, and what can happen to their bytes."""

import io
import random
import re
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SIDE = 64


def picture(number, side=SIDE):
    """`(side, side, 3)` uint8: a bright square that moves over a slope."""
    slope = np.arange(side, dtype=np.uint8)[:, None, None] + np.array([0, 40, 80], np.uint8)
    frame = np.broadcast_to(slope, (side, side, 3)).copy()
    frame[8:24, 4 * number % side :][:, :16] = 230
    return frame


def clip(form, codec, pixels="yuv420p", frames=10, *, container=None, sound=False, rotation=None, **options):
    """The bytes of an encoded clip, the same on every machine."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip(path := Path(folder, "clip"), form, codec, pixels, frames, container, sound, rotation, options)
        return path.read_bytes()


def write_clip(path, form, codec, pixels, frames, container, sound, rotation, options):
    flags = {"fflags": "+bitexact", **(container or {})}
    with av.open(str(path), "w", format=form, options=flags) as out:
        stream = out.add_stream(codec, rate=25, options={"g": "5", "threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, pixels
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        if rotation is not None:
            stream.set_display_rotation(rotation)
        voice = out.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number in range(frames):
            out.mux(stream.encode(make_frame(number, pixels)))
        if voice:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            out.mux(voice.encode(silence))
            out.mux(voice.encode())
        out.mux(stream.encode())


def make_frame(number, pixels):
    rgb = picture(number)
    if pixels == "rgb8":
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixels)
    else:
        planes = [rgb[..., 0], rgb[::2, ::2, 1].reshape(-1, SIDE), rgb[::2, ::2, 2].reshape(-1, SIDE)]
        frame = av.VideoFrame.from_ndarray(np.concatenate(planes), format=pixels)
    frame.pts, frame.time_base = number, Fraction(1, 25)
    return frame


def image(form, frames=1, **options):
    """The bytes of an image file, animated if it has several frames."""
    file = io.BytesIO()
    pictures = [Image.fromarray(picture(number)) for number in range(frames)]
    more = {"save_all": True, "append_images": pictures[1:], "duration": 100} if frames > 1 else {}
    pictures[0].save(file, form, **more, **options)
    return file.getvalue()


X264 = {"preset": "veryfast", "bf": "2"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1:info=0"}
CLIPS = {
    "h264.mp4": lambda: clip("mp4", "libx264", **X264),
    "faststart.mp4": lambda: clip("mp4", "libx264", container={"movflags": "faststart"}, rotation=90, **X264),
    "seeks.mp4": lambda: clip("mp4", "libx264", frames=40, **X264),
    "fragmented.mp4": lambda: clip(
        "mp4", "libx264", container={"movflags": "frag_keyframe+empty_moov+default_base_moof"}, **X264
    ),
    "sound.mp4": lambda: clip("mp4", "mpeg4", sound=True),
    "hevc.mp4": lambda: clip("mp4", "libx265", **X265),
    "av1.mp4": lambda: clip("mp4", "libsvtav1", preset="12", **{"svtav1-params": "lp=1"}),
    "mjpeg.mov": lambda: clip("mov", "mjpeg", "yuvj420p", 6),
    "h264.mkv": lambda: clip("matroska", "libx264", **X264),
    "ffv1.mkv": lambda: clip("matroska", "ffv1", frames=4),
    "vp9.webm": lambda: clip("webm", "libvpx-vp9", deadline="realtime", **{"cpu-used": "8"}),
    "vp8.webm": lambda: clip("webm", "libvpx", deadline="realtime", **{"cpu-used": "8"}),
    "h264.ts": lambda: clip("mpegts", "libx264", **X264),
    "mpeg2.mpg": lambda: clip("mpeg", "mpeg2video"),
    "mpeg4.avi": lambda: clip("avi", "mpeg4"),
    "flv1.flv": lambda: clip("flv", "flv"),
    "wmv2.asf": lambda: clip("asf", "wmv2"),
    "moving.gif": lambda: clip("gif", "gif", "rgb8"),
    "raw.h264": lambda: clip("h264", "libx264", **X264),
    "vp9.ivf": lambda: clip("ivf", "libvpx-vp9", deadline="realtime", **{"cpu-used": "8"}),
    "still.png": lambda: image("PNG"),
    "still.jpg": lambda: image("JPEG"),
    "still.tif": lambda: image("TIFF", compression="tiff_lzw"),
    "still.webp": lambda: image("WEBP"),
    "moving.webp": lambda: image("WEBP", 5),
    "moving.png": lambda: image("PNG", 4),
}


def make_clips():
    """Name -> bytes of every clip that is damaged."""
    return {name: make() for name, make in CLIPS.items()}


BOXES = rb"moov|moof|mvhd|trak|tkhd|edts|elst|mdia|mdhd|hdlr|minf|vmhd|stbl|stsd|stts|ctts|stss|stsc|stsz|stco|mfhd"
BOXES += rb"|traf|tfhd|tfdt|trun|sidx|mvex|trex|ftyp|mdat|avc1|avcC|hvcC|av1C|RIFF|LIST|strh|strf|avih|idx1|movi|IHDR"
BOXES += rb"|IDAT|acTL|fcTL|fdAT|VP8 |VP8X|VP8L|ANIM|ANMF|DKIF"
FIELD = re.compile(BOXES)
EBML = re.compile(
    rb"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x15\x49\xa9\x66|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\x1c\x53\xbb\x6b"
    rb"|\x2a\xd7\xb1|\x44\x89|\xae|\xe0|\xb0|\xba|\xa3|\xe7|\xbb|\xb7"
)
INDEX = re.compile(rb"moov|moof|\x16\x54\xae\x6b|\x1c\x53\xbb\x6b|idx1|hdrl|IHDR")
EXTREMES = (0, 1, 2, -1, -2, 7, 8, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, -0x80000000, 0x10000000)


def flip_bits(rng, data, other):
    return flip(rng, data, 0, len(data), rng.choice((1, 1, 2, 4, 16, 64)))


def flip(rng, data, start, end, count):
    data = bytearray(data)
    for _ in range(count if end > start else 0):
        data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def fill_run(rng, data, other):
    start, end = block(rng, data, 200)
    value = rng.choice((b"\0", b"\xff", b"\x80", None))
    return data[:start] + (value * (end - start) if value else rng.randbytes(end - start)) + data[end:]


def truncate(rng, data, other):
    return data[: rng.randrange(len(data))]


def insert(rng, data, other):
    start, _ = block(rng, data, 1)
    return data[:start] + rng.randbytes(rng.choice((1, 2, 4, 50, 1000))) + data[start:]


def delete(rng, data, other):
    start, end = block(rng, data, rng.choice((4, 200)))
    return data[:start] + data[end:]


def swap(rng, data, other):
    (a, b), (c, d) = sorted((block(rng, data, 300), block(rng, data, 300)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[max(b, d) :]


def repeat(rng, data, other):
    start, end = block(rng, data, rng.choice((8, 300, len(data))))
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 20)) + data[end:]


def splice(rng, data, other):
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def damage_header(rng, data, other):
    return flip(rng, data, 0, min(200, len(data)), rng.choice((1, 2, 8)))


def damage_index(rng, data, other):
    places = [found.start() for found in INDEX.finditer(data)] or [0]
    start = rng.choice(places)
    return flip(rng, data, start, min(start + 900, len(data)), rng.choice((1, 2, 8)))


def damage_tail(rng, data, other):
    start = len(data) * 9 // 10
    return flip(rng, data, start, len(data), rng.choice((1, 4, 32)))


def size_field(rng, data, other):
    """The size before a box, or after an EBML element, to 0, -1 or the largest."""
    boxes = [(found.start() - 4, 4) for found in FIELD.finditer(data) if found.start() >= 4]
    places = boxes if len(boxes) > 3 else [(found.end(), rng.choice((1, 2, 8))) for found in EBML.finditer(data)]
    start, width = rng.choice(places or [(rng.randrange(len(data)), 4)])
    return write_number(rng, data, start, width)


def value_field(rng, data, other):
    """A number inside a box or an element, or anywhere."""
    found = [match.end() for match in FIELD.finditer(data)] or [match.end() for match in EBML.finditer(data)]
    if not found or rng.random() < 0.2:
        return write_number(rng, data, rng.randrange(len(data)), rng.choice((1, 2, 4, 8)))
    return write_number(rng, data, rng.choice(found) + rng.choice((0, 4, 8, 12, 16, 20, 28, 36)), rng.choice((2, 4, 8)))


def write_number(rng, data, start, width):
    value = rng.choice(EXTREMES) % 256**width
    return data[:start] + value.to_bytes(width, rng.choice(("big", "big", "little"))) + data[start + width :]


def block(rng, data, longest):
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.randint(1, max(1, longest)))


MUTATIONS = (
    flip_bits, fill_run, truncate, insert, delete, swap, repeat, splice, damage_header, damage_index, damage_tail,
    size_field, value_field,
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged clip: its number, the clip, what was done to it."""

    number: int
    clip: str
    mutations: tuple[str, ...]
    data: bytes

    def __str__(self):
        return f"mutant {self.number} ({self.clip}, {' and '.join(self.mutations)})"


def make_mutant(clips, number, seed=0):
    """The same bytes for the same numbers."""
    rng = random.Random(f"{seed}/{number}")
    names = list(clips)
    name, other = names[number % len(names)], rng.choice(names)
    chosen = rng.choices(MUTATIONS, k=rng.choice((1, 1, 1, 2, 3)))
    data = clips[name]
    for mutation in chosen:
        data = mutation(rng, data, clips[other]) or b"\0"
    return Mutant(number, name, tuple(mutation.__name__ for mutation in chosen), data)
