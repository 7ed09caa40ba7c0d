"""Encoding, remuxing and patching of small clips whose frames carry their number and four colours."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from clips_elva import HEIGHT, WIDTH, paint

from .records import COUNT, RATE

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder prints its settings otherwise

COLOURS = ((200, 40, 40), (40, 180, 60), (50, 70, 200), (200, 160, 120))
EXACT = {"fflags": "+bitexact"}  # no random numbers in the file
H264 = {"preset": "ultrafast", "g": "8", "bf": "2", "sc_threshold": "0", "crf": "12"}
PLAIN = {**H264, "bf": "0"}  # decoding order is the order of showing
HEVC = {"preset": "ultrafast", "crf": "12", "x265-params": "log-level=none:keyint=8:min-keyint=8:bframes=2:pools=none"}
VPX = {"g": "8", "deadline": "realtime", "cpu-used": "8", "crf": "8", "b": "0"}
AV1 = {"preset": "11", "g": "8", "crf": "20"}
MPEG = {"g": "8", "bf": "2", "qscale": "3", "flags": "+qscale", "global_quality": str(3 * 118)}
INTRA = {"flags": "+qscale", "global_quality": "236", "strict": "-1"}


def painted(number, height=HEIGHT, width=WIDTH):
    """`(height, width, 3)` uint8: the number above, four colours in the lowest quarter."""
    frame = paint(number)
    for place, colour in enumerate(COLOURS):
        frame[HEIGHT * 3 // 4 :, place * WIDTH // 4 : (place + 1) * WIDTH // 4] = colour
    rows, columns = np.arange(height) * HEIGHT // height, np.arange(width) * WIDTH // width
    return frame[rows][:, columns]


def to_yuv(rgb, *, red, blue, full=False, depth=8):
    """A `yuv444p` frame by the book: `red` and `blue` weights of the matrix, full or studio range."""
    levels = rgb.astype(np.float64) / 255
    luma = levels @ (red, 1 - red - blue, blue)
    planes = [luma, (levels[..., 2] - luma) / (2 - 2 * blue), (levels[..., 0] - luma) / (2 - 2 * red)]
    scale, low = 2 ** (depth - 8), 0 if full else 16
    spans = (255, 255, 255) if full else (219, 224, 224)
    bases = (low, 128, 128)
    values = [plane * span * scale + base * scale for plane, span, base in zip(planes, spans, bases, strict=True)]
    frame = av.VideoFrame(rgb.shape[1], rgb.shape[0], "yuv444p" if depth == 8 else f"yuv444p{depth}le")
    for plane, value in zip(frame.planes, values, strict=True):
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        pixels = np.clip(np.round(value), 0, 256 * scale - 1).astype(np.uint8 if depth == 8 else "<u2")
        padded[:, : pixels.nbytes // plane.height] = pixels.view(np.uint8)
        plane.update(padded.tobytes())
    return frame


def encode(
    path,
    codec="libx264",
    numbers=range(COUNT),
    *,
    rate=RATE,
    pixels="yuv420p",
    size=(HEIGHT, WIDTH),
    form=None,
    container=None,
    options=None,
    pts=None,
    rotation=None,
    frames=None,
    setup=None,
):
    """Write the frames `numbers`; `pts` in 1/1000 s, `frames(number)` makes a frame, `setup(stream)` changes more."""
    with av.open(str(path), "w", format=form, options={**EXACT, **(container or {})}) as out:
        stream = out.add_stream(codec, rate=rate, options=options if options is not None else H264)
        (stream.height, stream.width), stream.pix_fmt = size, pixels
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if setup is not None:
            setup(stream)
        for place, number in enumerate(numbers):
            frame = frames(number) if frames else av.VideoFrame.from_ndarray(painted(number, *size), format="rgb24")
            frame = frame.reformat(format=pixels)
            if pts is not None:
                frame.pts, frame.time_base = pts[place], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return Path(path)


def packets(path):
    """The packets of the first video stream, in the order of decoding."""
    with av.open(str(path)) as source:
        return [packet for packet in source.demux(video=0) if packet.size]


def remux(source, path, *, keep=None, change=None, form=None, container=None, filters=None, extra=None):
    """Copy the video packets that `keep(number, packet)`, through bitstream `filters`, changed by `change`."""
    with (
        av.open(str(source)) as inward,
        av.open(str(path), "w", format=form, options={**EXACT, **(container or {})}) as out,
    ):
        origin = inward.streams.video[0]
        stream = out.add_stream_from_template(origin)
        if extra is not None:
            extra(out)
        chain = BitStreamFilterContext(filters, origin) if filters else None
        number = 0
        for packet in inward.demux(origin):
            if packet.size and not (keep is None or keep(number, packet)):
                number += 1
                continue
            for made in chain.filter(packet if packet.size else None) if chain else [packet] * bool(packet.size):
                made = change(number, made) if change else made
                made.stream = stream
                out.mux(made)
            number += bool(packet.size)
    return Path(path)


def new_data(packet, data):
    """The packet with other bytes."""
    copy = av.Packet(bytes(data))
    copy.pts, copy.dts, copy.duration, copy.time_base = packet.pts, packet.dts, packet.duration, packet.time_base
    copy.is_keyframe = packet.is_keyframe
    return copy


def patched(path, *changes):
    """Overwrite bytes in a file: each change is `(box, offset, data)`, the offset from behind the box's name."""
    data = bytearray(path.read_bytes())
    for box, offset, new in changes:
        start = data.index(box) + len(box) + offset
        data[start : start + len(new)] = new
    path.write_bytes(data)
    return path


def box(name, *content):
    """An ISO box."""
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + name + body


def places(path):
    """Start of the bytes of each packet in the file."""
    data, start, found = path.read_bytes(), 0, []
    for packet in packets(path):
        start = data.index(bytes(packet), start)
        found.append(start)
    return found


def cut(path, number):
    """Cut a file in the middle of packet `number`."""
    middle = places(path)[number] + packets(path)[number].size // 2
    path.write_bytes(path.read_bytes()[:middle])
    return path


def spoil(path, numbers, fill=0):
    """Fill packets with one byte value."""
    data, starts, sizes = bytearray(path.read_bytes()), places(path), [packet.size for packet in packets(path)]
    for number in numbers:
        data[starts[number] : starts[number] + sizes[number]] = bytes([fill]) * sizes[number]
    path.write_bytes(data)
    return path
