"""Any video or image source -> frames with true times, decoded by time and resized as they are decoded.

A source is read in two steps: a look at its index (what is there, and when), and the frames a plan asks for. Letters:
`H`, `W` pixels, `C` channels, `T` frames.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import get_worker_info

from .arrays_elva import open_array, open_images, open_list
from .errors_elva import ConfigurationError, VideoError
from .fetching_elva import fetch
from .files_elva import open_file, open_path
from .frames_elva import FramePlan
from .isolation_elva import IsolatedReader
from .limits_elva import DecodingLimits, UrlPolicy
from .scenes_elva import pick_scene_frames, thumbnail
from .source_elva import Damage, Reader, VideoInfo, VideoSource, shown

Plan = Callable[[VideoInfo], FramePlan]
"""Chooses frames from what is known before decoding."""

FrameSize = Callable[[int, int, bool], tuple[int, int]]
"""`(height, width, high)` of the source and the frame's role -> `(height, width)` to resize the frame to."""

MOST_MISSING = 0.1
"""Share of the frames asked for that may be lost to damage."""


@dataclass(frozen=True)
class DecodingOptions:
    """How sources are read; never part of a checkpoint.

    Args:
        limits: What a source may cost.
        urls: What may be fetched; None for nothing.
        isolate: Whether files are decoded in a process of their own that can open neither files nor sockets.
        threads: Threads of a decoder; None for one in a worker of a `DataLoader`, else as many as it likes.
        on_damage: `"warn"` leaves out frames that cannot be decoded, unless they are more than a tenth; `"raise"` fails
            at any damage.
    """

    limits: DecodingLimits = field(default_factory=DecodingLimits)
    urls: UrlPolicy | None = None
    isolate: bool = False
    threads: int | None = None
    on_damage: str = "warn"

    def __post_init__(self) -> None:
        if self.on_damage not in ("warn", "raise"):
            raise ConfigurationError(f'on_damage is {self.on_damage!r}; give "warn" or "raise".')
        if self.threads is not None and (isinstance(self.threads, bool) or self.threads < 1):
            raise ConfigurationError(f"threads is {self.threads!r}; give 1 or more.")


@dataclass(frozen=True)
class DecodedVideo:
    """Frames of a video, resized.

    Args:
        info: The source; `info.rotation` is what was applied.
        frames: Per frame `(C, h, w)` uint8 RGB.
        indices: Frame numbers in the source.
        times: Seconds from the first frame of the source, true presentation times; None where unknown.
        high: Per frame, True for high resolution.
        num_asked: Frames asked for; more than `len(frames)` where the source has fewer, or some could not be decoded.
        missing: Numbers of the frames that could not be decoded.
        damage: What else was wrong.
    """

    info: VideoInfo
    frames: list[Tensor]
    indices: tuple[int, ...]
    times: tuple[float, ...] | None
    high: tuple[bool, ...]
    num_asked: int
    missing: tuple[int, ...] = ()
    damage: Damage = field(default_factory=Damage)


def probe(source: VideoSource, *, fps: float | None = None, options: DecodingOptions | None = None) -> VideoInfo:
    """Look at a source: size, times, codec. Of a file, at most the first frame is decoded.

    Args:
        source: See `VideoSource`.
        fps: Frames per second of arrays, if known.
        options: How it is read.

    Raises:
        VideoError: The source cannot be used.
    """
    with open_reader(source, fps=fps, options=options) as reader:
        return reader.info


def read_video(
    source: VideoSource,
    plan: Plan,
    size: FrameSize,
    *,
    fps: float | None = None,
    options: DecodingOptions | None = None,
    scenes: bool = False,
) -> DecodedVideo:
    """Open a source and read the frames a plan asks for; see `read_frames`.

    Args:
        source: See `VideoSource`.
        plan: Chooses frames from the source's `VideoInfo`.
        size: Chooses the size of a frame from the size of the source and the frame's role.
        fps: Frames per second of arrays, if known.
        options: How it is read.
        scenes: See `read_frames`.

    Raises:
        VideoError: The source cannot be used.
    """
    options = options or DecodingOptions()
    with open_reader(source, fps=fps, options=options) as reader:
        return read_frames(reader, plan(reader.info), size, on_damage=options.on_damage, scenes=scenes)


def read_frames(
    reader: Reader, plan: FramePlan, size: FrameSize, *, on_damage: str = "warn", scenes: bool = False
) -> DecodedVideo:
    """Decode the frames of a plan, each once, resized as soon as it is decoded.

    Args:
        reader: An open source.
        plan: The frames.
        size: Chooses the size of a frame from the size of the source and the frame's role.
        on_damage: See `DecodingOptions`.
        scenes: Whether the plan's number of high-resolution frames is given to the frames that stand for the scenes of
            the video instead of those the plan marks.

    Raises:
        VideoError: Too many frames cannot be decoded.
    """
    info = reader.info
    sizes = {high: size(info.height, info.width, high) for high in set(plan.high)}
    roles = dict(zip(plan.indices, plan.high, strict=True))
    choose = scenes and len(sizes) == 2
    indices, times, frames = [], [], []
    for index, time, pixels in reader.read(plan.indices):
        tensor = torch.from_numpy(pixels)
        wanted = (True, False) if choose else (roles[index],)
        frames.append({high: resize_frame(tensor, sizes[high]) for high in wanted})
        indices.append(index)
        times.append(time)
    missing = tuple(sorted(roles.keys() - set(indices)))
    _check_damage(info, len(plan), missing, reader.damage, on_damage)
    high = tuple(roles[index] for index in indices)
    if choose:
        features = np.stack([thumbnail(frame[False].numpy()) for frame in frames])
        high = tuple(pick_scene_frames(features, min(sum(plan.high), len(frames))))
    return DecodedVideo(
        info=info,
        frames=[frame[role] for frame, role in zip(frames, high, strict=True)],
        indices=tuple(indices),
        times=None if None in times else tuple(times),
        high=high,
        num_asked=plan.num_asked,
        missing=missing,
        damage=reader.damage,
    )


def resize_frame(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize one frame: uint8 bicubic with antialiasing, within one level of Pillow's.

    Args:
        frame: `(H, W, 3)` uint8.
        size: `(height, width)` in pixels.

    Returns:
        `(3, height, width)` uint8, contiguous.
    """
    if tuple(frame.shape[:2]) == tuple(size):
        return torch.from_numpy(np.ascontiguousarray(frame.numpy().transpose(2, 0, 1)))  # half the time of contiguous()
    channels_first = frame.permute(2, 0, 1)[None]
    return functional.interpolate(channels_first, size=size, mode="bicubic", antialias=True)[0].contiguous()


def open_reader(source: VideoSource, *, fps: float | None = None, options: DecodingOptions | None = None) -> Reader:
    """Find the reader for a source and look at the source; close the reader, or use it in a `with` statement.

    Args:
        source: See `VideoSource`.
        fps: Frames per second of arrays, if known; a file tells its own.
        options: How it is read.

    Raises:
        VideoError: The source cannot be used.
    """
    options = options or DecodingOptions()
    if isinstance(source, (str, os.PathLike)):
        return _open_text(os.fspath(source), options)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        if not data:
            raise VideoError(
                "the video is empty: 0 bytes; was the file read to its end before?", reason="empty", source="<0 bytes>"
            )
        return _open_file(BytesIO(data), f"<{len(data)} bytes>", options)
    if isinstance(source, Image.Image):
        return open_images([source], options.limits, is_image=True)
    if isinstance(source, (np.ndarray, Tensor)):
        return open_array(source, options.limits, fps)
    if isinstance(source, (list, tuple)):
        return open_list(source, options.limits, fps)
    raise VideoError(
        f"a {type(source).__name__[:60]} is no video; give a path, bytes, PIL images, or a numpy or torch array.",
        reason="bad_type",
    )


def _open_text(text: str, options: DecodingOptions) -> Reader:
    """A path, or, where they are allowed, a URL."""
    if not isinstance(text, str):
        raise VideoError(f"the path {text!r} is {type(text).__name__}; give a str.", reason="bad_type")
    if not re.match(r"(https?|ftp|data|file):", text, re.IGNORECASE):
        return _open_file(open_path(text), shown(text), options)
    if options.urls is None:
        raise VideoError(
            f"{shown(text)} is not a local file, and networks and protocols are off;",
            hint="give a path, or pass allow_urls=True to fetch https URLs.",
            reason="protocol",
            source=shown(text),
        )
    return _open_file(fetch(text, options.urls), shown(text), options)


def _open_file(file: BinaryIO, name: str, options: DecodingOptions) -> Reader:
    if options.isolate:
        return IsolatedReader(file, name, options.limits)
    threads = options.threads
    if threads is None and get_worker_info() is not None:
        threads = 1
    return open_file(file, name, options.limits, threads)


def _check_damage(info: VideoInfo, num_asked: int, missing: tuple[int, ...], damage: Damage, on_damage: str) -> None:
    if len(missing) == num_asked:
        raise VideoError(
            f"none of the {num_asked} frames asked of {info.source} could be decoded; the file is damaged.",
            reason="no_frames",
            source=info.source,
        )
    if len(missing) > MOST_MISSING * num_asked or (
        on_damage == "raise" and (missing or damage.num_bad_packets or damage.num_corrupt_frames)
    ):
        raise VideoError(
            f"{info.source} is damaged: of {num_asked} frames asked for {len(missing)} cannot be decoded and "
            f"{damage.num_corrupt_frames} hold errors;",
            hint="get an intact copy, or ask for a part of it with video_start and video_end.",
            reason="damaged",
            source=info.source,
        )
