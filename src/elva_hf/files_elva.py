"""Opening a local file: regular files only, checked after opening, and read as a video or as an image.

No torch here: the isolated process that decodes runs this module.
"""

from __future__ import annotations

import os
import re
import stat
from typing import BinaryIO

from .admission_elva import Admission
from .container_elva import ContainerReader
from .errors_elva import VideoError
from .images_elva import ImageReader, is_image
from .limits_elva import DecodingLimits
from .source_elva import Reader, shown

_NONBLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_path(path: str) -> BinaryIO:
    """Open a regular file for reading; the check is made on what was opened.

    Raises:
        VideoError: There is none, it is a directory, a device, a pipe or a socket, it is empty, or may not be read.
    """
    name = shown(path)
    try:
        _check_regular(os.stat(path), name)  # opening a pipe or a device acts on it
        descriptor = os.open(path, os.O_RDONLY | _NONBLOCKING)
    except (OSError, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise _cannot_open(path, name, error) from error
    try:
        _check_regular(os.fstat(descriptor), name)  # it may be another by now
    except VideoError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb", buffering=0)


def open_file(file: BinaryIO, name: str, limits: DecodingLimits, threads: int | None = None) -> Reader:
    """The reader for a file that is open: by its first bytes an image or a video. It closes the file.

    Raises:
        VideoError: It cannot be read, or is beyond a limit.
    """
    try:
        Admission(name, limits).check_bytes(file.seek(0, 2))
        file.seek(0)
        head = file.read(16)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return ImageReader(file, name, limits) if is_image(head) else ContainerReader(file, name, limits, threads)


def _check_regular(status: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{name} is a directory;", hint="give a video file in it.", reason="directory", source=name)
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(
            f"{name} is not a regular file;", hint="copy it to one first.", reason="not_regular", source=name
        )
    if not status.st_size:
        raise VideoError(f"{name} is empty: 0 bytes;", hint="was the download complete?", reason="empty", source=name)


def _cannot_open(path: str, name: str, error: Exception) -> VideoError:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:|subfile,", path):
        return VideoError(
            f"{name} is not a local file, and protocols are off;",
            hint="download it first and give its path.",
            reason="protocol",
            source=name,
        )
    if isinstance(error, FileNotFoundError):
        return VideoError(f"{name} does not exist;", hint="check the path.", reason="not_found", source=name)
    detail = error.strerror if isinstance(error, OSError) else error
    return VideoError(f"{name} cannot be read: {detail}.", reason="unreadable", source=name)
