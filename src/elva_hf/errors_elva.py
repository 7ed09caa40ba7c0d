"""Every error elva-hf raises on bad input: one tree, so that callers can catch at the level they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONS: Mapping[str, str] = {
    # where it comes from
    "not_found": "there is no such file",
    "directory": "the path is a directory",
    "not_regular": "the path is a device, a pipe or a socket",
    "unreadable": "the file exists and cannot be read",
    "empty": "no bytes, no frames, or a side of length 0",
    "protocol": "a URL while URLs are off, or one that is not https",
    "address": "a URL to a host or address that may not be asked",
    "fetch": "a download that failed",
    # what it may cost
    "too_many_bytes": "larger than max_bytes",
    "too_many_pixels": "a frame larger than max_pixels",
    "too_many_frames": "more frames or packets than max_frames",
    "too_long": "longer than max_duration",
    "timeout": "reading took longer than it may",
    "out_of_memory": "decoding needs more memory than it may have",
    # what is in it
    "not_a_video": "no container that can be opened, or a cut one without its index",
    "no_video_stream": "a container without moving pictures",
    "codec": "a codec that is not on the allow-list",
    "no_frames": "a video of which no frame can be decoded",
    "damaged": "more than a tenth of the frames asked for cannot be decoded",
    "too_small": "a side shorter than 4 pixels",
    "bad_image": "an image file that cannot be read",
    "not_an_image": "a video where a still image is wanted",
    "crashed": "the isolated decoder died",
    # arrays
    "bad_type": "an object that is no video",
    "bad_shape": "an array whose axes are no frames",
    "bad_dtype": "an array that is neither uint8 nor floating point",
    "bad_range": "floating-point values outside 0 to 1",
    "not_finite": "NaN or infinite values",
    # what is asked of it
    "bad_time": "a time outside the video, or of a video that has no times",
}
"""Every `VideoError.reason`, and what it means."""


class ElvaError(ValueError):
    """Base of all errors that a caller can cause and mend; they travel between processes whole."""

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[ElvaError], args: tuple, fields: dict[str, Any]) -> ElvaError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigurationError(ElvaError):
    """A configuration value, or a combination of values, that no model can have."""


class VideoError(ElvaError):
    """A video or image that cannot be read or used.

    Args:
        message: What is wrong, naming the value and the expectation.
        reason: Machine-readable code, a key of `REASONS`.
        source: The input as shown to people; never bytes, never credentials.
        hint: What to do about it; appended to the message.
    """

    def __init__(self, message: str, *, reason: str = "unreadable", source: str | None = None, hint: str | None = None):
        super().__init__(message if hint is None else f"{message} {hint}")
        self.reason = reason
        self.source = source
        self.hint = hint


class PlaceholderError(ElvaError):
    """Visual placeholders in the text that do not match the pixels given with it."""


class ContextOverflowError(ElvaError):
    """A request that needs more tokens or memory than it may have.

    Args:
        message: What is wrong, with the numbers.
        budget: What is too small: `"max_visual_tokens"`, `"max_memory"`, `"context_length"`, `"max_length"`.
        needed: What the request needs, in tokens or bytes.
        limit: What it may have, in the same unit.
        settings: Options that would fit, for example `{"num_high_res_frames": 4, "num_low_res_frames": 12}`; None if
            nothing would.
    """

    def __init__(
        self,
        message: str,
        *,
        budget: str | None = None,
        needed: int | None = None,
        limit: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        super().__init__(message)
        self.budget = budget
        self.needed = needed
        self.limit = limit
        self.settings = settings


class CheckpointError(ElvaError):
    """A checkpoint folder that cannot be loaded, or is not what it says."""


class TrainingError(ElvaError):
    """A training run that cannot go on: too many bad samples, or steps without a finite gradient."""
