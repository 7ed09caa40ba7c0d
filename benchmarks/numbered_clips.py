"""The clips of the decoding benchmarks: moving textures and grain, and in every frame its own number.

A clip is encoded once and kept; its name says what it is. Letters: `H`, `W` pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from reading import BITS, BRIGHT, DARK

VERSION = 1  # of the pictures: a clip of another version is made again
NUM_GRAINS = 12

# codec: (encoder, options, container, option of the longest distance between key frames)
ENCODERS = {
    "h264": ("libx264", {"preset": "veryfast", "crf": "22"}, "mp4"),
    "hevc": ("libx265", {"preset": "veryfast", "crf": "26", "x265-params": "log-level=error"}, "mp4"),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "6", "crf": "34", "b": "0"}, "webm"),
    "av1": ("libsvtav1", {"preset": "9", "crf": "36"}, "mp4"),
}


@dataclass(frozen=True)
class ClipSpec:
    """A clip to make.

    Args:
        codec: One of `ENCODERS`.
        b_frames: False for a stream in which every frame is referred to, as phones and webcams write (H.264 only).
        seconds: Length.
        height: Pixels.
        width: Pixels.
        gop: Frames from one key frame to the next, at most.
        fps: Frames per second.
        repeats: How often the packets are written one after the other; numbers start again with each repeat.
    """

    codec: str = "h264"
    b_frames: bool = True
    seconds: int = 60
    height: int = 720
    width: int = 1280
    gop: int = 250
    fps: int = 30
    repeats: int = 1

    @property
    def num_encoded(self) -> int:
        """Frames of one repeat; the painted numbers are below it."""
        return self.seconds * self.fps

    @property
    def num_frames(self) -> int:
        """Frames of the whole clip."""
        return self.num_encoded * self.repeats

    @property
    def name(self) -> str:
        """File name."""
        times = f"x{self.repeats}" if self.repeats > 1 else ""
        size = f"{self.width}x{self.height}"
        plain = "" if self.b_frames else "-bf0"
        return f"{self.codec}-{size}-{self.seconds}s{times}-gop{self.gop}{plain}-v{VERSION}.{ENCODERS[self.codec][2]}"


def make_clip(folder: Path, spec: ClipSpec) -> Path:
    """The file of a clip, made unless it is there."""
    path = folder / spec.name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"part-{os.getpid()}-{path.name}")
        if spec.repeats > 1:
            _repeat(make_clip(folder, replace(spec, repeats=1)), part, spec)
        else:
            _encode(part, spec)
        part.replace(path)
    return path


def describe_clip(path: Path, spec: ClipSpec) -> dict[str, Any]:
    """What came out: bit rate, key frames, and the share of frames that no other refers to (H.264 only)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        keys, unused, num_packets = 0, [], 0
        for packet in container.demux(stream):
            if packet.size:
                num_packets += 1
                keys += packet.is_keyframe
                if spec.codec == "h264":
                    unused.append(is_unreferenced(bytes(packet)))
        return {
            "name": path.name,
            "codec": spec.codec,
            "height": stream.height,
            "width": stream.width,
            "num_frames": num_packets,
            "num_key_frames": keys,
            "seconds": spec.num_frames / spec.fps,
            "megabits_per_second": path.stat().st_size * 8e-6 / (spec.num_frames / spec.fps),
            "unreferenced_share": float(np.mean(unused)) if unused else None,
        }


def is_unreferenced(packet: bytes) -> bool:
    """Whether the picture of an H.264 packet (4-byte lengths, as in mp4) is one that no other refers to."""
    place = 0
    while place + 4 < len(packet):
        header = packet[place + 4]
        if header & 31 in (1, 5):  # a slice, a slice of a key picture
            return not header >> 5 & 3  # nal_ref_idc
        place += 4 + int.from_bytes(packet[place : place + 4], "big")
    return False


def _encode(path: Path, spec: ClipSpec) -> None:
    encoder, options, _ = ENCODERS[spec.codec]
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    plain = {} if spec.b_frames else {"bf": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=spec.fps, options={**options, "g": str(spec.gop), **plain})
        stream.height, stream.width, stream.pix_fmt = spec.height, spec.width, "yuv420p"
        for luma in _pictures(spec):
            container.mux(stream.encode(_to_frame(luma)))
        container.mux(stream.encode())


def _pictures(spec: ClipSpec) -> Iterator[np.ndarray]:
    """Luma of every frame: a panning texture under grain, three moving squares, and the number on top."""
    random = np.random.default_rng(0)
    height, width, side = spec.height, spec.width, spec.height // 9 * 2
    texture = sum(
        weight * _smooth(random, 2 * height, 2 * width, scale * height / 720)
        for weight, scale in ((0.55, 90), (0.3, 16), (0.26, 4))
    ).astype(np.int16)
    grains = (random.standard_normal((NUM_GRAINS, height, width)) * 3.5).astype(np.int16)
    square = _smooth(random, side, side, 6 * height / 720).clip(16, 235).astype(np.uint8)
    for number in range(spec.num_encoded):
        top, left = _bounce(number, height), _bounce(2 * number, width)
        grain = grains[random.integers(NUM_GRAINS)]
        luma = (texture[top : top + height, left : left + width] + grain).clip(16, 235).astype(np.uint8)
        for speed in (1, 2, 3):
            top, left = _bounce(speed * number + 200 * speed, height - side), _bounce(speed * number, width - side)
            luma[top : top + side, left : left + side] = square
        _paint_number(luma, number)
        yield luma


def _paint_number(luma: np.ndarray, number: int) -> None:
    height, width = luma.shape
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for place in range(BITS):
        luma[: height // 18, edges[place] : edges[place + 1]] = BRIGHT if number >> place & 1 else DARK


def _smooth(random: np.random.Generator, height: int, width: int, scale: float) -> np.ndarray:
    """Random `(height, width)` values from 0 to 255 that vary over `scale` pixels."""
    scale = max(scale, 1)
    coarse = (random.random((int(height / scale) + 2, int(width / scale) + 2)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)


def _bounce(value: int, limit: int) -> int:
    """`value` walked to and fro between 0 and `limit`."""
    return abs((value + limit) % (2 * limit) - limit)


def _to_frame(luma: np.ndarray) -> av.VideoFrame:
    height, width = luma.shape
    frame = av.VideoFrame(width, height, "yuv420p")
    flat = np.full((height // 2, width // 2), 128, np.uint8)
    half = luma[::2, ::2] // 3
    flat[height // 18 :], other = 84 + half[height // 18 :], flat.copy()  # the number stays grey
    other[height // 18 :] = 170 - half[height // 18 :]
    for plane, values in zip(frame.planes, (luma, flat, other), strict=True):
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        rows[:, : plane.width] = values
    return frame


def _repeat(source: Path, path: Path, spec: ClipSpec) -> None:
    """Write the packets of a clip several times over, each time later by the clip's length."""
    with av.open(str(path), "w") as output:
        stream = None
        for number in range(spec.repeats):
            with av.open(str(source)) as clip:
                wanted = clip.streams.video[0]
                stream = stream or output.add_stream_from_template(wanted)
                shift = round(number * spec.seconds / wanted.time_base)
                for packet in clip.demux(wanted):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        output.mux(packet)
