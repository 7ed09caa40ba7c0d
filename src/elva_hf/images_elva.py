"""Image files -> frames, with Pillow: a still image is one frame, an animated one a video.

No torch here: the isolated process that decodes runs this module.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Self

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .admission_elva import Admission
from .errors_elva import VideoError
from .limits_elva import DecodingLimits
from .source_elva import Damage, Frame, VideoInfo

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_ORIENTATION = 0x0112  # tag of EXIF
_USUAL_MILLISECONDS = 100  # of a frame that does not say how long it lasts
_MAGIC = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*", re.DOTALL)
LIBRARY_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on images that are not what they should be."""


def is_image(head: bytes) -> bool:
    """Whether a file that begins so is an image of a format that is read; 16 bytes are enough."""
    return bool(_MAGIC.match(head))


class ImageReader:
    """An image file that is open.

    Args:
        file: A seekable binary file, which stays open until `close`.
        shown: The source as people may see it.
        limits: What it may cost.

    Raises:
        VideoError: It cannot be read, or is beyond a limit.
    """

    def __init__(self, file: BinaryIO, shown: str, limits: DecodingLimits):
        self._file = file
        self._admission = Admission(shown, limits)
        self.damage = Damage()
        try:
            with self._admission.memory():
                self._look()
        except VideoError:
            self.close()
            raise
        except LIBRARY_ERRORS as error:
            self.close()
            raise unreadable_image(self._admission.name, error) from error

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield the frames at strictly increasing `indices`."""
        for index in indices:
            try:
                with warnings.catch_warnings(), self._admission.memory():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                    if self.info.is_image:
                        pixels = image_to_pixels(ImageOps.exif_transpose(self._image), self._admission.name)
                    else:
                        if index < self._image.tell():  # Pillow does not always find its way back
                            self._file.seek(0)
                            self._image = Image.open(self._file, formats=_FORMATS)
                        self._image.seek(index)
                        pixels = image_to_pixels(self._image, self._admission.name)
            except VideoError:
                raise
            except LIBRARY_ERRORS as error:
                if self.info.is_image:
                    raise unreadable_image(self._admission.name, error) from error
                return
            yield Frame(index, self.info.times[index], pixels)

    def close(self) -> None:
        """Close the file; reading is over."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _look(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own ceiling is below
            image = self._image = Image.open(self._file, formats=_FORMATS)
        width, height = image.size
        self._admission.check_pixels(width, height)
        count = 1 if image.format == "TIFF" else getattr(image, "n_frames", 1)
        self._admission.check_count(count)
        if count == 1 and image.getexif().get(_ORIENTATION, 1) >= 5:  # lies on its side
            width, height = height, width
        times, duration = ((0.0,), None) if count == 1 else self._times(count)
        self._admission.check_duration(duration or 0)
        self.info = VideoInfo(
            source=self._admission.name,
            height=height,
            width=width,
            num_frames=count,
            duration=duration,
            fps=count / duration if duration else None,
            is_image=count == 1,
            times=times,
        )

    def _times(self, count: int) -> tuple[tuple[float, ...], float]:
        """Start of each frame in seconds, and the end of the last."""
        times, end = [], 0.0
        for index in range(count):
            self._admission.check_clock()
            self._image.seek(index)
            self._image.load()  # only then does Pillow know how long a frame of WebP lasts
            times.append(end)
            end += (self._image.info.get("duration") or _USUAL_MILLISECONDS) / 1000
        return tuple(times), end


def unreadable_image(name: str, error: Exception) -> VideoError:
    """The error for an image that Pillow gives up on."""
    if isinstance(error, Image.DecompressionBombError):
        return VideoError(f"{name} says that it has far too many pixels.", reason="too_many_pixels", source=name)
    unknown = isinstance(error, UnidentifiedImageError)  # its text holds an address
    reason = "no known image" if unknown else (str(error) or type(error).__name__).splitlines()[0][:200]
    return VideoError(
        f"{name} is an image that cannot be read ({reason});",
        hint="check that it is complete.",
        reason="bad_image",
        source=name,
    )


def image_to_pixels(image: Image.Image, name: str) -> np.ndarray:
    """`(H, W, 3)` uint8 of an image of any mode; transparent pixels are laid on white.

    Raises:
        VideoError: Its values have no range that is known: 32-bit integers, or floating point outside 0 to 1.
    """
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image).astype(np.float32) / 257)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values >= 0).all() or not (values <= 1).all():
            raise _bad_range(name, "floating-point values outside 0 to 1")
        return _gray(values * 255)
    if image.mode == "I":
        raise _bad_range(name, "32-bit integers, whose range is unknown")
    if image.mode == "La":
        image = image.convert("LA")
    transparent = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    return lay_on_white(np.array(image.convert("RGBA"))) if transparent else np.array(image.convert("RGB"))


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.round().astype(np.uint8)[..., None], 3, -1)


def _bad_range(name: str, values: str) -> VideoError:
    return VideoError(f"{name} holds {values};", hint="convert it to 8 bits first.", reason="bad_range", source=name)


def lay_on_white(pixels: np.ndarray) -> np.ndarray:
    """`(H, W, 4)` uint8 with opacity last -> `(H, W, 3)` uint8."""
    colors, opacity = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if (opacity == 255).all():
        return np.ascontiguousarray(colors)
    return ((colors * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
