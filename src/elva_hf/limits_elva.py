"""What a source may cost and where it may come from: ceilings, time-outs, allow-lists, the policy for URLs."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from .errors_elva import ConfigurationError

DEMUXERS = frozenset(
    {
        *("mov", "matroska", "webm", "avi", "gif", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "ivf"),
        *("flv", "asf", "ogg"),
        *("wav", "mp3", "flac", "aac"),  # audio only: opened to be able to say so
    }
)
"""Container formats of FFmpeg that are opened; playlists, devices and protocols are not among them."""

CODECS = frozenset(
    {
        *(
            "h264",
            "hevc",
            "vp8",
            "vp9",
            "av1",
            "libdav1d",
            "mpeg1video",
            "mpeg2video",
            "mpeg4",
            "msmpeg4v1",
            "msmpeg4v2",
        ),
        *("msmpeg4", "h263", "flv", "theora", "wmv1", "wmv2", "wmv3", "vc1", "mjpeg", "gif", "png", "prores"),
        *("dnxhd", "ffv1", "qtrle", "rawvideo"),
    }
)
"""Decoders of FFmpeg that are run."""

SHORTEST_SIDE = 4  # pixels
"""The least a frame may measure."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class DecodingLimits:
    """Ceilings for one video or image. A source beyond one of them is refused, never cut.

    Args:
        max_bytes: Size of a file or of `bytes`.
        max_pixels: Height times width of a frame as stored.
        max_frames: Frames of a source, and packets of a file.
        max_duration: Seconds of video.
        max_seconds: Wall-clock time of reading one source, from opening to the last frame.
        max_process_memory: Bytes of memory of the process that decodes with `isolate=True`.
        demuxers: Container formats that are opened, by FFmpeg's names.
        codecs: Decoders that are run, by FFmpeg's names.
    """

    max_bytes: int = 64 * 2**30
    max_pixels: int = 8192 * 4320
    max_frames: int = 2_000_000
    max_duration: float = 24 * 3600.0
    max_seconds: float = 600.0
    max_process_memory: int = 4 * 2**30
    demuxers: frozenset[str] = DEMUXERS
    codecs: frozenset[str] = CODECS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("demuxers", "codecs"):
                object.__setattr__(self, field.name, frozenset(value))
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigurationError(f"{field.name} is {value!r}; a limit is a number above 0.")


@dataclass(frozen=True)
class UrlPolicy:
    """What may be fetched when URLs are allowed: https only, public addresses only, checked at every redirect.

    Args:
        max_bytes: Most bytes of a download.
        timeout: Seconds of a download, from the first look-up to the last byte.
        max_redirects: Redirects that are followed.
        allowed_hosts: Names of hosts that may be asked, `None` for any; `".example.org"` allows its subdomains.
        allow_private_addresses: Whether loopback, private and link-local addresses may be asked.
    """

    max_bytes: int = 512 * 2**20
    timeout: float = 30.0
    max_redirects: int = 5
    allowed_hosts: tuple[str, ...] | None = None
    allow_private_addresses: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.allowed_hosts, str):
            raise ConfigurationError(f"allowed_hosts is {self.allowed_hosts!r}; give a tuple of names.")
        if self.allowed_hosts is not None:
            object.__setattr__(self, "allowed_hosts", tuple(host.lower() for host in self.allowed_hosts))
        if self.max_bytes < 1 or not self.timeout > 0 or self.max_redirects < 0:
            raise ConfigurationError(
                f"max_bytes={self.max_bytes}, timeout={self.timeout}, max_redirects={self.max_redirects}; the first "
                "two must be above 0, the last 0 or more."
            )


def parse_bytes(value: int | str, name: str) -> int:
    """A number of bytes, written as a number or as text such as `"512MB"` or `"2GiB"`.

    Raises:
        ConfigurationError: It is no size, or not above 0.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    if found and found[2].upper() in _UNITS and float(found[1]) > 0:
        return max(1, int(float(found[1]) * _UNITS[found[2].upper()]))
    raise ConfigurationError(f'{name} is {value!r}; give a number of bytes above 0, or text such as "512MB" or "2GiB".')
