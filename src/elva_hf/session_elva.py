"""A container that PyAV has open: its packets, its decoder, and the frame at which it stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import av
from av.video.frame import PictureType

from .admission_elva import Admission
from .boxes_elva import find_index
from .errors_elva import VideoError

LIBRARY_ERRORS = (av.FFmpegError, OSError, ValueError, IndexError)
"""What PyAV raises on files that are not what they should be."""

_ALONE = frozenset({"hevc", "libdav1d", "vp9"})  # decoders whose threads cost more than they save
_COVER = av.stream.Disposition.attached_pic
_MOST_GAPS = 16  # places where a file is damaged, after which the rest is left


@dataclass
class Work:
    """What reading a container took, counted.

    Args:
        packets: Packets taken from the file, those of an index pass included.
        frames: Frames that came out of the decoder.
        converted: Frames that were turned to RGB.
        seeks: Jumps to a key frame.
        bad_packets: Packets that the decoder refused.
        corrupt_frames: Converted frames in which the decoder concealed errors.
        refused_sizes: Packets refused for a size that is too large or none.
    """

    packets: int = 0
    frames: int = 0
    converted: int = 0
    seeks: int = 0
    bad_packets: int = 0
    corrupt_frames: int = 0
    refused_sizes: int = 0


class Session:
    """An open container, its decoder, and the frame at which it stands."""

    def __init__(self, container: Any, stream: Any, admission: Admission, work: Work):
        self._container = container
        self._admission = admission
        self._work = work
        self.stream = stream
        self.codec: str = stream.codec_context.name
        self.format: str = container.format.name
        self.base = float(stream.time_base or 0)  # seconds
        self.rate = float(stream.average_rate or stream.guessed_rate or 0)  # frames per second
        self.claimed_duration = _claimed_duration(container, stream)
        self.sought = False  # whether it has jumped
        self.suspect = False  # whether frames may show damage that the decoder does not tell, up to the next key frame
        self.last: Any = None
        self.wanted: frozenset[int] | None = None  # times of frames that must be decoded; None for all
        self._had_size = stream.codec_context.width > 0
        self._frames = self._decode_all(self.packets())

    def close(self) -> None:
        """Close the container and end the decoder's threads now.

        Left to the garbage collector they could meet their end in a forked process, which would wait for them for ever.
        """
        self._frames, self.last = iter(()), None
        self._container.close()
        del self._container, self.stream

    def packets(self) -> Iterator[Any]:
        """Packets to the end of the file; where it is damaged, from the next place that can be read."""
        for _ in range(_MOST_GAPS):
            try:
                for packet in self._container.demux(self.stream):
                    self._admission.check_clock()
                    self._work.packets += 1
                    self._work.bad_packets += bool(packet.is_corrupt)
                    yield packet
                return
            except MemoryError:  # FFmpeg's is an FFmpegError as well
                raise
            except av.FFmpegError:
                self._work.bad_packets += 1

    def decode(self, packet: Any) -> Iterator[Any]:
        """Frames of a packet; none of a damaged one."""
        self.suspect |= bool(packet.is_corrupt)
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except av.FFmpegError as error:
            self._work.bad_packets += 1
            self.suspect = True
            context = self.stream.codec_context
            self._admission.check_pixels(context.width, context.height)
            # some decoders forget a size that is too large
            forgotten = self._had_size or isinstance(error, av.error.ArgumentError)
            self._work.refused_sizes += forgotten and not context.width
            return
        self._work.frames += len(frames)
        for frame in frames:
            self.suspect &= not frame.key_frame
            yield frame

    def next_frame(self) -> Any:
        """The next frame that the decoder gives, in the order of time; None at the end."""
        for frame in self._frames:
            if frame.pts is not None or self.wanted is None:
                self.last = frame
                return frame
        return None

    def seek(self, positions: Sequence[int]) -> bool:
        """Go to a key frame at or before `positions[0]`, trying one position after the other.

        Seeking to the target itself, not to its key frame, avoids landing one key frame too early in files with
        B-frames. A frame from which decoding can only recover by and by (intra refresh) is no key frame.
        """
        self.last, self.sought = None, True
        self.stream.codec_context.skip_frame = "DEFAULT"
        for position in positions:
            self._work.seeks += 1
            try:
                self._container.seek(position, stream=self.stream, backward=True)
            except (VideoError, MemoryError):
                raise
            except LIBRARY_ERRORS:
                continue
            packets = self.packets()
            first = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
            if first is None or first.pts > positions[0]:
                continue
            frames = self._decode_all(chain([first], packets))
            frame = next(frames, None)
            if frame is not None and frame.pict_type == PictureType.I and (frame.pts or first.pts) <= positions[0]:
                self._frames = chain([frame], frames)
                return True
        return False

    def _decode_all(self, packets: Iterator[Any]) -> Iterator[Any]:
        context = self.stream.codec_context
        for packet in packets:
            if self.wanted is not None:
                needed = packet.pts is None or packet.pts in self.wanted
                context.skip_frame = "DEFAULT" if needed else "NONREF"
            yield from self.decode(packet)


def _claimed_duration(container: Any, stream: Any) -> float | None:
    """Seconds that a file says its pictures last; None where it does not say, or speaks of other streams too."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration is None or len(container.streams) > 1 or "matroska" not in container.format.name:
        return None
    return (container.duration - (container.start_time or 0)) / av.time_base


def open_session(file: BinaryIO, size: int, admission: Admission, work: Work, threads: int | None) -> Session:
    """Open a container and the decoder of its pictures.

    Args:
        file: A seekable file; sessions may share it.
        size: Its bytes.
        admission: Its limits.
        work: Counts what is done.
        threads: See `ContainerReader`.

    Raises:
        VideoError: It is no video, or of a codec that is not decoded.
    """
    limits = admission.limits
    options = {
        "protocol_whitelist": "none",  # all bytes come through our own file object
        "format_whitelist": ",".join(sorted(limits.demuxers)),
        "codec_whitelist": ",".join(sorted(limits.codecs)),
    }
    try:
        container = av.open(Input(file, size, admission.check_clock), options=options)
    except (VideoError, MemoryError):
        raise
    except LIBRARY_ERRORS as error:
        raise (
            _without_index(admission) if _lost_index(file, size) else _not_a_video(admission, error, _head(file))
        ) from error
    try:
        stream = next((stream for stream in container.streams.video if not stream.disposition & _COVER), None)
        if stream is None:
            raise _without_index(admission) if _lost_index(file, size) else _no_pictures(admission, container)
        _prepare(stream.codec_context, admission, threads)
        return Session(container, stream, admission, work)
    except BaseException:
        container.close()
        raise


def _prepare(context: Any, admission: Admission, threads: int | None) -> None:
    """Check a codec before anything is decoded, and set it up."""
    limits, name = admission.limits, None if context is None else context.name
    if name not in limits.codecs:
        raise admission.error(
            f"is encoded with {name or 'an unknown codec'}, which is not among the codecs that are decoded;",
            "codec",
            "convert it to H.264 first, or, if you trust it, name the codec in DecodingLimits.codecs.",
        )
    admission.check_pixels(context.width, context.height)
    context.options = {**context.options, "max_pixels": str(limits.max_pixels)}
    if threads is None:
        context.thread_type = "SLICE"  # threads over frames cost more than they save where frames are skipped
        context.thread_count = 1 if name in _ALONE else 0
    else:
        context.thread_type = "AUTO" if threads > 1 else "NONE"
        context.thread_count = threads


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(64)


def _lost_index(file: BinaryIO, size: int) -> bool:
    """Whether it is an mp4 or mov file that was cut before its index."""

    def read_at(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    return read_at(4, 4) == b"ftyp" and find_index(read_at, size) is None


def _without_index(admission: Admission) -> VideoError:
    return admission.error(
        "is an mp4 or mov file without its index (no complete moov box);",
        "not_a_video",
        "the download or recording stopped too early: get the whole file.",
    )


def _not_a_video(admission: Admission, error: Exception, head: bytes) -> VideoError:
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head):
        return admission.error(
            "is text, not a video;", "not_a_video", "was a web page or a pointer saved in place of the file?"
        )
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].lower()
    return admission.error(
        f"is not a video that can be read ({reason});",
        "not_a_video",
        "give an mp4, mkv, webm, mov, avi, ts or gif file, complete to its end.",
    )


def _no_pictures(admission: Admission, container: Any) -> VideoError:
    kinds = sorted({stream.type for stream in container.streams}) or ["none"]
    return admission.error(
        f"has no video stream; it holds: {', '.join(kinds)}.", "no_video_stream", "Give a file with moving pictures."
    )


class Input:
    """The file as PyAV reads it: from any place, never longer than the clock allows."""

    name = ""

    def __init__(self, file: BinaryIO, size: int, check_clock: Callable[[], None]):
        self._file, self._size, self._check_clock, self._place = file, size, check_clock, 0

    def read(self, length: int) -> bytes:
        self._check_clock()
        self._file.seek(self._place)  # sessions share the file
        data = self._file.read(length)
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, (0, self._place, self._size)[whence] + offset)
        return self._place

    def tell(self) -> int:
        return self._place


def is_hidden(packet: Any, codec: str) -> bool:
    """True for packets that show no frame: outside an edit list, or a VP8 reference that is never shown."""
    return packet.is_discard or (codec == "vp8" and not bytes(packet)[0] >> 4 & 1)
