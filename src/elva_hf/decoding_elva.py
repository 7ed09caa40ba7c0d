"""Any video or image source -> frames with true times, decoded with PyAV and resized as they are decoded.

A source is read in two steps: a look at its index (what is there, and when), and the frames a plan asks for. Letters:
`H`, `W` pixels, `C` channels, `T` frames.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from typing import Any, Protocol

import av
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from .errors_elva import VideoError
from .frames_elva import FramePlan

VideoSource = Any
"""A path (`str`, `pathlib.Path`), `bytes`, PIL image(s), or numpy / torch array(s)."""

Plan = Callable[["VideoInfo"], FramePlan]
"""Chooses frames from what is known before decoding."""

FrameSize = Callable[[int, int, bool], tuple[int, int]]
"""`(height, width, high)` of the source and the frame's role -> `(height, width)` to resize the frame to."""

_DEMUXERS = (
    "mov,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,flv,asf,ogg"
    ",wav,mp3,flac,aac"  # audio only: opened to be able to say so
)
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
_TIMEOUT_SECONDS = (10.0, 10.0)  # to open, to read
_NEVER_SEEK = frozenset({"gif", "h264", "hevc", "m4v", "mpegvideo"})  # no index, or frames drawn on earlier ones
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_IMAGE_MAGIC = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*", re.DOTALL)
_ATTACHED_PICTURE = av.stream.Disposition.attached_pic
_LIBRARY_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError)


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a source before its frames are decoded.

    Args:
        source: The source as shown to people.
        height: Pixels, as shown (after rotation).
        width: Pixels, as shown.
        num_frames: Frames that can be had.
        duration: Seconds; None for arrays of unknown rate and for images.
        fps: Average frames per second; None where `duration` is.
        codec: Name of the codec; None for arrays.
        container: Name of the container format; None for arrays.
        rotation: Degrees counterclockwise that the stored frames are turned by to be shown: 0, 90, 180 or 270.
        is_image: True for a still image.
        times: Start of each frame in seconds from the first; frame numbers where `duration` is None.
    """

    source: str
    height: int
    width: int
    num_frames: int
    duration: float | None = None
    fps: float | None = None
    codec: str | None = None
    container: str | None = None
    rotation: int = 0
    is_image: bool = False
    times: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class DecodedVideo:
    """Frames of a video, resized.

    Args:
        info: The source.
        frames: Per frame `(C, h, w)` uint8 RGB.
        indices: Frame numbers in the source.
        times: Seconds from the first frame of the source, true presentation times; None where unknown.
        high: Per frame, True for high resolution.
        num_asked: Frames asked for; more than `len(frames)` where the source has fewer, or some could not be decoded.
    """

    info: VideoInfo
    frames: list[Tensor]
    indices: tuple[int, ...]
    times: tuple[float, ...] | None
    high: tuple[bool, ...]
    num_asked: int


class Reader(Protocol):
    """A source that has been looked at and can be read."""

    info: VideoInfo

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield `(index, (H, W, 3) uint8)` for strictly increasing `indices`; damaged frames are left out."""
        ...


def probe(source: VideoSource, *, fps: float | None = None) -> VideoInfo:
    """Look at a source: size, times, codec. Of a file, at most the first frame is decoded.

    Args:
        source: See `VideoSource`.
        fps: Frames per second of arrays, if known.

    Raises:
        VideoError: The source cannot be used.
    """
    return open_reader(source, fps=fps).info


def read_video(source: VideoSource, plan: Plan, size: FrameSize, *, fps: float | None = None) -> DecodedVideo:
    """Decode the frames a plan asks for, each once, resized as soon as it is decoded.

    Args:
        source: See `VideoSource`.
        plan: Chooses frames from the source's `VideoInfo`.
        size: Chooses the size of a frame from the size of the source and the frame's role.
        fps: Frames per second of arrays, if known.

    Raises:
        VideoError: The source cannot be used.
    """
    reader = open_reader(source, fps=fps)
    info, chosen = reader.info, plan(reader.info)
    roles = dict(zip(chosen.indices, chosen.high, strict=True))
    frames = {}
    for index, frame in reader.read(chosen.indices):
        frames[index] = resize_frame(frame, size(info.height, info.width, roles[index]))
    if not frames:
        raise VideoError(
            f"none of the {len(chosen)} frames asked of {info.source} could be decoded; the file is damaged.",
            reason="no_frames",
            source=info.source,
        )
    return DecodedVideo(
        info=info,
        frames=list(frames.values()),
        indices=tuple(frames),
        times=None if info.duration is None and not info.is_image else tuple(info.times[index] for index in frames),
        high=tuple(roles[index] for index in frames),
        num_asked=chosen.num_asked,
    )


def resize_frame(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize one frame: uint8 bicubic with antialiasing, within one level of Pillow's.

    Args:
        frame: `(H, W, 3)` uint8.
        size: `(height, width)` in pixels.

    Returns:
        `(3, height, width)` uint8, contiguous.
    """
    channels_first = frame.permute(2, 0, 1)[None]
    if tuple(frame.shape[:2]) != tuple(size):
        channels_first = functional.interpolate(channels_first, size=size, mode="bicubic", antialias=True)
    return channels_first[0].contiguous()


def open_reader(source: VideoSource, *, fps: float | None = None) -> Reader:
    """Find the reader for a source and look at the source.

    Raises:
        VideoError: The source cannot be used.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source))
    if isinstance(source, Image.Image):
        return _ArrayReader([source], "image", is_image=True)
    if isinstance(source, (np.ndarray, Tensor)):
        return _open_array(source, fps)
    if isinstance(source, (list, tuple)):
        return _open_list(source, fps)
    raise VideoError(
        f"a {type(source).__name__} is no video; give a path, bytes, PIL images, or a numpy or torch array.",
        reason="bad_type",
    )


def _open_path(path: str) -> Reader:
    if not isinstance(path, str):
        raise VideoError(f"the path {path!r} is {type(path).__name__}; give a str.", reason="bad_type")
    shown = _shown(path)
    _check_regular_file(path, shown)
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise VideoError(f"{shown} cannot be read: {error.strerror}.", reason="unreadable", source=shown) from error
    if _IMAGE_MAGIC.match(head):
        return _open_image(path, shown)
    return _FileReader("file:" + os.path.abspath(path), shown)


def _open_bytes(data: bytes) -> Reader:
    shown = f"<{len(data)} bytes>"
    if not data:
        raise VideoError(
            "the video is empty: 0 bytes; was the file read to its end before?", reason="empty", source=shown
        )
    if _IMAGE_MAGIC.match(data):
        return _open_image(BytesIO(data), shown)
    return _FileReader(data, shown)


def _check_regular_file(path: str, shown: str) -> None:
    try:
        mode = os.stat(path)
    except (OSError, ValueError) as error:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path):
            raise VideoError(
                f"{shown} is not a local file, and networks and protocols are off;",
                hint="download it first and give its path.",
                reason="protocol",
                source=shown,
            ) from error
        if isinstance(error, FileNotFoundError):
            raise VideoError(
                f"{shown} does not exist;", hint="check the path.", reason="not_found", source=shown
            ) from error
        raise VideoError(f"{shown} cannot be read: {error}.", reason="unreadable", source=shown) from error
    if stat.S_ISDIR(mode.st_mode):
        raise VideoError(f"{shown} is a directory;", hint="give a video file in it.", reason="directory", source=shown)
    if not stat.S_ISREG(mode.st_mode):
        raise VideoError(
            f"{shown} is not a regular file;", hint="copy it to one first.", reason="not_regular", source=shown
        )
    if not mode.st_size:
        raise VideoError(f"{shown} is empty: 0 bytes;", hint="was the download complete?", reason="empty", source=shown)


def _shown(path: str) -> str:
    """The path as people may see it: no user name, password or query of a URL."""
    without_query = re.sub(r"[?#].*", "", path) if "://" in path else path
    shown = re.sub(r"(?<=://)[^/@]*@", "", without_query)
    return repr(shown if len(shown) <= 200 else shown[:197] + "...")


@dataclass(frozen=True)
class _Index:
    """Every frame of a stream in time order, from its packets.

    Args:
        pts: Presentation times, strictly increasing, in units of the stream; None where packets carry none.
        key_pts: Those of key frames.
        num_frames: Frames.
    """

    pts: list[int] | None
    key_pts: list[int]
    num_frames: int

    def keyframe_before(self, pts: int) -> int | None:
        place = bisect_right(self.key_pts, pts)
        return self.key_pts[place - 1] if place else None


class _FileReader:
    """A video file, or its bytes."""

    def __init__(self, file: str | bytes, shown: str):
        self._file = file
        self._shown = shown
        with self._open() as (container, stream):
            self._look(container, stream)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the frames at `indices`; see `Reader`."""
        frames = self._by_order(indices) if self._index.pts is None else self._by_time(indices)
        for index, frame in frames:
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            yield index, torch.rot90(pixels, self.info.rotation // 90) if self.info.rotation else pixels

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        file = BytesIO(self._file) if isinstance(self._file, bytes) else self._file
        try:
            container = av.open(file, options=_OPTIONS, timeout=_TIMEOUT_SECONDS)
        except _LIBRARY_ERRORS as error:
            raise VideoError(
                f"{self._shown} is not a video that can be read ({_reason(error)});",
                hint="give an mp4, mkv, webm, mov, avi, ts or gif file, complete to its end.",
                reason="not_a_video",
                source=self._shown,
            ) from error
        with container:
            yield container, self._video_stream(container)

    def _video_stream(self, container: Any) -> Any:
        for stream in container.streams.video:
            if not stream.disposition & _ATTACHED_PICTURE:
                return stream
        kinds = sorted({stream.type for stream in container.streams}) or ["none"]
        raise VideoError(
            f"{self._shown} has no video stream; it holds: {', '.join(kinds)}.",
            hint="Give a file with moving pictures.",
            reason="no_video_stream",
            source=self._shown,
        )

    def _look(self, container: Any, stream: Any) -> None:
        """One pass over the packets; only the first frame is decoded, for its true size and rotation."""
        codec, base = stream.codec_context.name, stream.time_base
        first, packets = None, []
        for packet in _demux(container, stream):
            first = next(_decode(packet), None) if first is None else first
            if packet.size and not _is_hidden(packet, codec):
                packets.append((packet.pts, packet.duration or 0, packet.is_keyframe))
        if first is None:
            raise VideoError(
                f"{self._shown} holds no frame that can be decoded ({codec or 'unknown codec'});",
                hint="the file is damaged or cut short.",
                reason="no_frames",
                source=self._shown,
            )
        self._index = _build_index(packets, seekable=container.format.name not in _NEVER_SEEK)
        rate = stream.average_rate or stream.guessed_rate
        times, duration = _timeline(packets, self._index, float(base or 0), float(rate or 0))
        turned = first.rotation % 360
        rotation = round(turned / 90) % 4 * 90
        height, width = (first.width, first.height) if rotation % 180 else (first.height, first.width)
        self.info = VideoInfo(
            source=self._shown,
            height=height,
            width=width,
            num_frames=self._index.num_frames,
            duration=duration,
            fps=len(times) / duration if duration else None,
            codec=codec,
            container=container.format.name,
            rotation=rotation,
            times=times,
        )

    def _by_time(self, indices: Sequence[int], *, seek: bool = True) -> Iterator[tuple[int, Any]]:
        """Decode forward, jumping to a later key frame where one stands before the next frame wanted."""
        index, frame, frames = self._index, None, None
        with self._open() as (container, stream):
            for place, number in enumerate(indices):
                target = index.pts[number]
                keyframe = index.keyframe_before(target) if seek else None
                if keyframe is not None and keyframe > (index.pts[0] if frame is None else frame.pts):
                    frame, frames = None, _seek(container, stream, (target, keyframe))
                    if frames is None:
                        yield from self._by_time(indices[place:], seek=False)
                        return
                frames = _decode_all(container, stream) if frames is None else frames
                while frame is None or frame.pts < target:
                    frame = next(frames, None)
                    if frame is None:
                        return
                if frame.pts == target:
                    yield number, frame

    def _by_order(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        wanted = set(indices)
        with self._open() as (container, stream):
            for number, frame in enumerate(_decode_all(container, stream)):
                if number in wanted:
                    yield number, frame
                if number >= indices[-1]:
                    return


def _demux(container: Any, stream: Any) -> Iterator[Any]:
    """Packets to the end of the file, or to where it is damaged."""
    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        return


def _decode(packet: Any) -> Iterator[Any]:
    """Frames of a packet; none of a damaged one."""
    try:
        yield from packet.decode()
    except av.FFmpegError:
        return


def _decode_all(container: Any, stream: Any) -> Iterator[Any]:
    yield from chain.from_iterable(map(_decode, _demux(container, stream)))


def _seek(container: Any, stream: Any, positions: Sequence[int]) -> Iterator[Any] | None:
    """Frames from a key frame at or before `positions[0]`, trying one position after the other.

    Seeking to the target itself, not to its key frame, avoids landing one key frame too early in files with B-frames.
    """
    for position in positions:
        try:
            container.seek(position, stream=stream, backward=True)
        except _LIBRARY_ERRORS:
            continue
        packets = _demux(container, stream)
        first = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
        if first is not None and first.pts <= positions[0]:
            return chain.from_iterable(map(_decode, chain([first], packets)))
    return None


def _is_hidden(packet: Any, codec: str) -> bool:
    """True for packets that show no frame: outside an edit list, or a VP8 reference that is never shown."""
    return packet.is_discard or (codec == "vp8" and not bytes(packet)[0] >> 4 & 1)


def _build_index(packets: Sequence[tuple[int | None, int, bool]], *, seekable: bool) -> _Index:
    if any(pts is None for pts, _, _ in packets):
        return _Index(None, [], len(packets))
    pts = sorted({pts for pts, _, _ in packets})
    return _Index(pts, sorted({pts for pts, _, key in packets if key}) if seekable else [], len(pts))


def _timeline(
    packets: Sequence[tuple[int | None, int, bool]], index: _Index, base: float, rate: float
) -> tuple[tuple[float, ...], float]:
    """Start of each frame in seconds from the first, and the end of the last."""
    if index.pts is None:
        gap = 1 / (rate or 25.0)  # FFmpeg's own guess for streams without times
        return tuple(i * gap for i in range(index.num_frames)), index.num_frames * gap
    times = tuple((pts - index.pts[0]) * base for pts in index.pts)
    mean_gap = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / (rate or 25.0)
    last = max(duration for pts, duration, _ in packets if pts == index.pts[-1])
    return times, times[-1] + (last * base or mean_gap)


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].lower()


class _ArrayReader:
    """Frames that are already in memory."""

    def __init__(self, frames: Sequence[Any], shown: str, *, fps: float | None = None, is_image: bool = False):
        self._frames = frames
        height, width = self._frame(0).shape[:2]
        duration = len(frames) / fps if fps else None
        self.info = VideoInfo(
            source=shown,
            height=height,
            width=width,
            num_frames=len(frames),
            duration=duration,
            fps=fps or None,
            is_image=is_image,
            times=tuple(i / (fps or 1.0) for i in range(len(frames))),
        )

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield the frames at `indices`; see `Reader`."""
        for index in indices:
            yield index, self._frame(index)

    def _frame(self, index: int) -> Tensor:
        frame = self._frames[index]
        return _pil_to_tensor(frame) if isinstance(frame, Image.Image) else _to_rgb(frame)


def _open_image(file: str | BytesIO, shown: str) -> Reader:
    try:
        with Image.open(file, formats=_IMAGE_FORMATS) as image:
            if getattr(image, "n_frames", 1) == 1 or image.format == "TIFF":
                return _ArrayReader([ImageOps.exif_transpose(image)], shown, is_image=True)
            frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(image)]
            milliseconds = image.info.get("duration") or 100
            return _ArrayReader(frames, shown, fps=1000 / milliseconds)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(
            f"{shown} is an image that cannot be read ({_reason(error)});",
            hint="check that it is complete.",
            reason="bad_image",
            source=shown,
        ) from error


def _open_array(array: np.ndarray | Tensor, fps: float | None) -> Reader:
    shown = f"{tuple(array.shape)} array"
    tensor = _checked(array, shown)
    if tensor.ndim == 3:
        return _ArrayReader([_channels_last(tensor, shown)], shown, is_image=True)
    if tensor.ndim == 4:
        return _ArrayReader(_channels_last(tensor, shown), shown, fps=fps)
    raise VideoError(
        f"an array of shape {tuple(tensor.shape)} is no video; expected (T, H, W, C) or (T, C, H, W), or (H, W, C) for "
        "an image.",
        reason="bad_shape",
        source=shown,
    )


def _open_list(items: Sequence[Any], fps: float | None) -> Reader:
    shown = f"list of {len(items)} frames"
    if not items:
        raise VideoError("the list of frames is empty; give at least one frame.", reason="empty", source=shown)
    if all(isinstance(item, Image.Image) for item in items):
        return _ArrayReader(items, shown, fps=fps)
    if not all(isinstance(item, (np.ndarray, Tensor)) for item in items):
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise VideoError(
            f"a list of {kinds} is no video; a video as a list holds its frames, all PIL images or all arrays.",
            hint="Give several videos one by one.",
            reason="bad_type",
            source=shown,
        )
    frames = []
    for number, item in enumerate(items):
        name = f"frame {number} of a {shown}"
        tensor = _checked(item, name)
        if tensor.ndim != 3:
            raise VideoError(
                f"{name} has shape {tuple(tensor.shape)}; expected (H, W, C) or (C, H, W).",
                reason="bad_shape",
                source=shown,
            )
        frames.append(_channels_last(tensor, name))
    return _ArrayReader(frames, shown, fps=fps)


def _checked(array: np.ndarray | Tensor, shown: str) -> Tensor:
    """A tensor on the CPU with usable values: uint8, or floating point in [0, 1]."""
    if isinstance(array, np.ndarray):
        if array.dtype != np.uint8 and array.dtype.kind != "f":
            raise _bad_dtype(shown, array.dtype)
        array = np.ascontiguousarray(array)
        array = torch.from_numpy(array if array.flags.writeable else array.copy())
    if array.dtype != torch.uint8 and not array.is_floating_point():
        raise _bad_dtype(shown, array.dtype)
    if not array.numel():
        raise VideoError(f"the {shown} is empty; every side must be at least 1.", reason="empty", source=shown)
    tensor = array.detach().cpu()
    if tensor.is_floating_point():
        _check_range(tensor, shown)
    return tensor


def _check_range(tensor: Tensor, shown: str) -> None:
    low, high = (float(value) for value in tensor.aminmax())
    if not bool(torch.isfinite(tensor).all()):
        raise VideoError(
            f"the {shown} holds NaN or infinite values; clean it first.", reason="not_finite", source=shown
        )
    if low < 0 or high > 1:
        raise VideoError(
            f"the floating-point {shown} spans {low:.4g} to {high:.4g}; expected 0 to 1.",
            hint="Divide by 255, or give uint8; do not normalise before the processor.",
            reason="bad_range",
            source=shown,
        )


def _bad_dtype(shown: str, dtype: Any) -> VideoError:
    return VideoError(
        f"the {shown} has dtype {dtype}; expected uint8 (0 to 255) or floating point (0 to 1).",
        hint="Convert it first.",
        reason="bad_dtype",
        source=shown,
    )


def _channels_last(tensor: Tensor, shown: str) -> Tensor:
    """`(..., H, W, C)` from either layout; C is 1, 3 or 4."""
    if tensor.shape[-1] in (1, 3, 4) and (tensor.shape[-3] not in (1, 3, 4) or tensor.shape[-1] == 3):
        return tensor
    if tensor.shape[-3] in (1, 3, 4):
        return tensor.movedim(-3, -1)
    raise VideoError(
        f"the array {tuple(tensor.shape)} has no channel axis of 1, 3 or 4, first or last in a frame;",
        hint="stack frames as (T, H, W, 3).",
        reason="bad_shape",
        source=shown,
    )


def _pil_to_tensor(image: Image.Image) -> Tensor:
    transparent = "A" in image.getbands() or "transparency" in image.info
    return _to_rgb(torch.from_numpy(np.array(image.convert("RGBA" if transparent else "RGB"))))


def _to_rgb(frame: Tensor) -> Tensor:
    """`(H, W, 3)` uint8 from `(H, W, C)`; transparent pixels are laid on white."""
    if frame.dtype != torch.uint8:
        frame = (frame.float() * 255).round().to(torch.uint8)
    if frame.shape[-1] == 4:
        alpha = frame[..., 3:].float() / 255
        return (frame[..., :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return frame.expand(*frame.shape[:2], 3)


def array_fps(metadata: Any) -> float | None:
    """Frames per second from a metadata object or mapping, if it has them."""
    return metadata.get("fps") if isinstance(metadata, Mapping) else getattr(metadata, "fps", None)
