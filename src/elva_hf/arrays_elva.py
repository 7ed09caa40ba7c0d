"""Frames that are already in memory: numpy and torch arrays, PIL images, and lists of them.

Letters: `T` frames, `H`, `W` pixels, `C` channels, of which there are 1, 3 or 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .admission_elva import Admission
from .errors_elva import ConfigurationError, VideoError
from .images_elva import LIBRARY_ERRORS, image_to_pixels, lay_on_white, unreadable_image
from .limits_elva import DecodingLimits
from .source_elva import Damage, Frame, VideoInfo


class ArrayReader:
    """Frames in memory.

    Args:
        frames: Per frame `(H, W, C)` or `(C, H, W)`, uint8 or floating point in [0, 1], or a PIL image.
        name: The source as people may see it.
        fps: Frames per second, if known.
        is_image: Whether it is a still image.
    """

    def __init__(self, frames: Sequence[Any], name: str, *, fps: float | None = None, is_image: bool = False):
        self._frames = frames
        self._name = name
        self.damage = Damage()
        height, width = _to_pixels(frames[0], name).shape[:2]
        self.info = VideoInfo(
            source=name,
            height=height,
            width=width,
            num_frames=len(frames),
            duration=len(frames) / fps if fps else None,
            fps=fps or None,
            is_image=is_image,
            times=tuple(i / (fps or 1.0) for i in range(len(frames))),
        )

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield the frames at `indices`."""
        timed = self.info.duration is not None or self.info.is_image
        for index in indices:
            yield Frame(index, self.info.times[index] if timed else None, _to_pixels(self._frames[index], self._name))

    def close(self) -> None:
        """Let go of the frames."""
        self._frames = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_array(array: np.ndarray | Tensor, limits: DecodingLimits, fps: float | None = None) -> ArrayReader:
    """A video `(T, H, W, C)` or `(T, C, H, W)`, or an image `(H, W, C)` or `(C, H, W)`.

    Raises:
        VideoError: Its shape, type or values are no video's.
    """
    name = f"{tuple(array.shape[:5])} array"
    if array.ndim not in (3, 4):
        raise VideoError(
            f"an array of {array.ndim} axes, {tuple(array.shape[:5])}, is no video; expected (T, H, W, C) or "
            "(T, C, H, W), or (H, W, C) for an image.",
            reason="bad_shape",
            source=name,
        )
    _check_dtype(array, name)
    _check_shape(array.shape, name)
    frames = array if array.ndim == 4 else [array]
    _check_size(array.nbytes, [_size(array.shape)], len(frames), name, limits)
    _check_values(frames, name)
    fps = _check_fps(fps, len(frames), name, limits)
    return ArrayReader(frames, name, fps=fps, is_image=array.ndim == 3)


def open_list(items: Sequence[Any], limits: DecodingLimits, fps: float | None = None) -> ArrayReader:
    """A video as a list of its frames, all PIL images or all arrays.

    Raises:
        VideoError: It is empty or mixed, or a frame is none.
    """
    name = f"list of {len(items)} frames"
    if not items:
        raise VideoError("the list of frames is empty; give at least one frame.", reason="empty", source=name)
    if all(isinstance(item, Image.Image) for item in items):
        return open_images(items, limits, fps)
    if not all(isinstance(item, (np.ndarray, Tensor)) for item in items):
        kinds = ", ".join(sorted({type(item).__name__[:40] for item in items})[:4])
        raise VideoError(
            f"a list of {kinds} is no video; a video as a list holds its frames, all PIL images or all arrays.",
            hint="Give several videos one by one.",
            reason="bad_type",
            source=name,
        )
    for number, item in enumerate(items):
        frame_name = f"frame {number} of a {name}"
        if item.ndim != 3:
            raise VideoError(
                f"{frame_name} has {item.ndim} axes, {tuple(item.shape[:5])}; expected (H, W, C) or (C, H, W).",
                reason="bad_shape",
                source=name,
            )
        _check_dtype(item, frame_name)
        _check_shape(item.shape, frame_name)
    _check_size(sum(item.nbytes for item in items), [_size(item.shape) for item in items], len(items), name, limits)
    for number, item in enumerate(items):
        _check_values([item], f"frame {number} of a {name}")
    return ArrayReader(items, name, fps=_check_fps(fps, len(items), name, limits))


def open_images(
    images: Sequence[Image.Image], limits: DecodingLimits, fps: float | None = None, *, is_image: bool = False
) -> ArrayReader:
    """A video as a list of PIL images, or a still image.

    Raises:
        VideoError: An image has no pixels, or cannot be read, or there are too many.
    """
    name = "image" if is_image else f"list of {len(images)} frames"
    for image in images:
        if not all(image.size):
            raise VideoError(
                f"an image of {image.width}x{image.height} pixels is empty; every side must be at least 1.",
                reason="empty",
                source=name,
            )
    num_bytes = sum(image.width * image.height for image in images)
    _check_size(num_bytes, [(image.height, image.width) for image in images], len(images), name, limits)
    return ArrayReader(images, name, fps=_check_fps(fps, len(images), name, limits), is_image=is_image)


def array_fps(metadata: Any) -> float | None:
    """Frames per second from a metadata object or mapping, if it has them."""
    return metadata.get("fps") if isinstance(metadata, Mapping) else getattr(metadata, "fps", None)


def _check_dtype(array: np.ndarray | Tensor, name: str) -> None:
    if isinstance(array, Tensor):
        if array.layout != torch.strided or array.device.type == "meta":
            kind = "on the meta device" if array.device.type == "meta" else f"of layout {array.layout}"
            raise VideoError(
                f"the {name} is a tensor {kind}, without plain values;",
                hint="give a dense one.",
                reason="bad_type",
                source=name,
            )
        usable = array.dtype == torch.uint8 or (array.is_floating_point() and array.itemsize > 1)
    else:
        usable = array.dtype == np.uint8 or array.dtype.kind == "f"
    if not usable:
        raise VideoError(
            f"the {name} has dtype {str(array.dtype)[:60]}; expected uint8 (0 to 255) or floating point (0 to 1).",
            hint="Convert it first.",
            reason="bad_dtype",
            source=name,
        )


def _check_shape(shape: Sequence[int], name: str) -> None:
    if not all(shape):
        raise VideoError(f"the {name} is empty; every side must be at least 1.", reason="empty", source=name)
    if not _is_channels_last(shape) and shape[-3] not in (1, 3, 4):
        raise VideoError(
            f"the array {tuple(shape)} has no channel axis of 1, 3 or 4, first or last in a frame;",
            hint="stack frames as (T, H, W, 3).",
            reason="bad_shape",
            source=name,
        )


def _size(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[-3], shape[-2]) if _is_channels_last(shape) else (shape[-2], shape[-1])


def _check_fps(fps: Any, num_frames: int, name: str, limits: DecodingLimits) -> float | None:
    if fps is None:
        return None
    try:
        rate = float(fps)
        duration = num_frames / rate
    except (TypeError, ValueError, ArithmeticError):
        rate = duration = float("nan")
    if isinstance(fps, (bool, str, bytes)) or not (0 < rate < float("inf")) or not duration < float("inf"):
        raise ConfigurationError(f"fps is {_brief(fps)}; it must be a positive number of frames per second.")
    Admission(f"the {name}", limits).check_duration(duration)
    return rate


def _check_size(
    num_bytes: int, sizes: Sequence[tuple[int, int]], num_frames: int, name: str, limits: DecodingLimits
) -> None:
    """Check the bytes of all frames, every `(height, width)` there is, and the number of frames."""
    admission = Admission(f"the {name}", limits)
    for height, width in dict.fromkeys(sizes):
        admission.check_pixels(width, height)
    admission.check_bytes(num_bytes)
    admission.check_count(num_frames)


def _check_values(frames: Sequence[Any], name: str) -> None:
    """Floating-point values must be finite and in [0, 1]; frame by frame, to need no second copy."""
    for frame in frames:
        if (frame.dtype == torch.uint8) if isinstance(frame, Tensor) else (frame.dtype == np.uint8):
            return
        frame = frame.detach() if isinstance(frame, Tensor) else frame
        low, high = (float(bound) for bound in (frame.min(), frame.max()))
        if not np.isfinite([low, high]).all():  # NaN wins every comparison of min and max
            raise VideoError(
                f"the {name} holds NaN or infinite values; clean it first.", reason="not_finite", source=name
            )
        if low < 0 or high > 1:
            raise VideoError(
                f"the floating-point {name} spans {low:.4g} to {high:.4g}; expected 0 to 1.",
                hint="Divide by 255, or give uint8; do not normalise before the processor.",
                reason="bad_range",
                source=name,
            )


def _brief(value: Any) -> str:
    """A value in one short line."""
    try:
        return " ".join(repr(value).split())[:60]
    except ValueError:  # a whole number of more digits than Python writes
        return f"a very large {type(value).__name__}"


def _is_channels_last(shape: Sequence[int]) -> bool:
    return shape[-1] in (1, 3, 4) and (shape[-3] not in (1, 3, 4) or shape[-1] == 3)


def _to_pixels(frame: Any, name: str) -> np.ndarray:
    """`(H, W, 3)` uint8 of one frame of any kind."""
    if isinstance(frame, Image.Image):
        try:
            return image_to_pixels(ImageOps.exif_transpose(frame), name)
        except VideoError:
            raise
        except LIBRARY_ERRORS as error:  # an image opened from a file is read only now
            raise unreadable_image(name, error) from error
    if isinstance(frame, Tensor):
        frame = frame.detach().cpu().resolve_neg()
        frame = (frame if frame.dtype == torch.uint8 else frame.float()).numpy()
    if not _is_channels_last(frame.shape):
        frame = np.moveaxis(frame, -3, -1)
    if frame.dtype != np.uint8:
        frame = (frame.astype(np.float32) * 255).round().astype(np.uint8)
    if frame.shape[-1] == 4:
        return lay_on_white(frame)
    return np.array(np.broadcast_to(frame, (*frame.shape[:2], 3)))
