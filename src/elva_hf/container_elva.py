"""A video file -> exactly the frames asked for, decoded with PyAV by time, each once, as few others as can be.

Nothing a file says of itself is trusted: frames are found by the times of their packets, and a frame is delivered only
if it came out of the decoder with that time. No torch here: the isolated process that decodes runs this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any, BinaryIO, Self

import numpy as np
from av.video.reformatter import VideoReformatter

from .admission_elva import Admission
from .boxes_elva import composition_offsets, find_index
from .index_elva import Index, PacketTimes, build_index
from .limits_elva import DecodingLimits
from .session_elva import Session, Work, is_hidden, open_session
from .source_elva import Damage, Frame, VideoInfo

BARE = frozenset({"h264", "hevc", "m4v", "mpegvideo"})
"""Streams without a container: their frames have an order and no times."""

NEVER_SEEK = frozenset({"gif"})
"""Containers whose frames are drawn on earlier ones."""

SKIPPABLE = frozenset({"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video"})
"""Decoders that can leave out single frames that no other frame refers to."""

SHORTEST_JUMP = 3  # frames; fewer are decoded sooner than sought
_MOST_RECOVERIES = 16
_MOST_RESTARTS = 2
_TRANSFERS = {16: "PQ", 18: "HLG"}


class ContainerReader:
    """A video file that is open: its facts at once, its frames when asked.

    Args:
        file: Path of a local file, its bytes, or a seekable binary file, which stays open until `close`.
        shown: The source as people may see it.
        limits: What it may cost.
        threads: Threads of the decoder; None for the codec's own choice.

    Raises:
        VideoError: It is no video, holds no frame that can be decoded, or is beyond a limit.
    """

    def __init__(
        self,
        file: str | bytes | BinaryIO,
        shown: str,
        limits: DecodingLimits | None = None,
        threads: int | None = None,
    ):
        self._admission = Admission(shown, limits or DecodingLimits())
        self._threads = threads
        self._session: Session | None = None
        self._recoveries = self._restarts = 0
        self._can_seek = True
        self._notes: dict[str, None] = {}  # an ordered set
        self._reformatter = VideoReformatter()
        self.work = Work()
        self._file: BinaryIO = _open_file(file)
        try:
            self._size = self._file.seek(0, 2)
            self._admission.check_bytes(self._size)
            with self._admission.memory():
                self._look()
        except BaseException:
            self.close()
            raise

    @property
    def damage(self) -> Damage:
        """What was found wrong so far."""
        return Damage(self.work.bad_packets, self.work.corrupt_frames, tuple(self._notes))

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yield the frames at strictly increasing `indices`; those that cannot be decoded are left out."""
        if not len(indices):
            return
        self._admission.start_clock()
        index = self._index
        if index.pts is None:
            found = self._by_order(indices)
        else:
            found = self._by_time(indices) if index.in_order else self._by_sequence(indices)
        with self._admission.memory():
            for number, frame in found:
                yield Frame(number, float(index.times[number]), self._to_pixels(frame))

    def close(self) -> None:
        """Close the file; reading is over."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _open(self) -> Session:
        return open_session(self._file, self._size, self._admission, self.work, self._threads)

    def _reopen(self, wanted: frozenset[int] | None) -> Session:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._session = self._open()
        self._session.wanted = wanted
        return self._session

    def _look(self) -> None:
        """Learn the index, and the true size and rotation from the first frame."""
        session = self._reopen(None)
        first = self._indexed_by_container(session)
        if first is None:
            session = session if session.last is None else self._reopen(None)
            first = self._indexed_by_packets(session)
        index, admission = self._index, self._admission
        admission.check_pixels(first.width, first.height)
        admission.check_duration(index.duration)
        rotation = round(first.rotation % 360 / 90) % 4 * 90
        self._stored_size = (first.width, first.height)
        height, width = self._stored_size if rotation % 180 else self._stored_size[::-1]
        self.info = VideoInfo(
            source=admission.name,
            height=height,
            width=width,
            num_frames=len(index),
            duration=index.duration,
            fps=len(index) / index.duration if index.duration else None,
            codec=session.codec,
            container=session.format,
            rotation=rotation,
            times=tuple(index.times.tolist()),
        )
        self._note_facts(first, session.claimed_duration)

    def _note_facts(self, first: Any, claimed: float | None) -> None:
        found = self._index.duration
        if claimed is not None and claimed - found > max(1.0, 0.1 * claimed):
            self._notes[f"it says that it lasts {claimed:.1f} s, but only {found:.1f} s can be read"] = None
        if first.interlaced_frame:
            self._notes["interlaced: both fields of a frame are shown at once"] = None
        if first.color_trc in _TRANSFERS:
            self._notes[f"high dynamic range ({_TRANSFERS[first.color_trc]}): shown without tone mapping"] = None

    def _note_lost(self, count: int) -> None:
        if count:
            self._notes[f"{count} frames before the first that can be decoded are left out"] = None

    def _indexed_by_container(self, session: Session) -> Any:
        """Take the index that an mp4 file carries, if it agrees with the first frame; otherwise None.

        The session then stands at that frame.
        """
        index = self._read_container_index(session)
        first = None if index is None else session.next_frame()
        if first is None or first.pts != int(index.pts[0]):
            return None
        self._index = index
        return first

    def _read_container_index(self, session: Session) -> Index | None:
        stream = session.stream
        if "mp4" not in session.format or not stream.time_base:
            return None
        entries = stream.index_entries
        count = len(entries)
        self._admission.check_count(count)
        if count < 2 or stream.frames != count:  # a fragmented file tells its index piece by piece
            return None
        if any(entry.is_discard or entry.pos + entry.size > self._size for entry in entries):
            return None  # an edit list, or a file that is cut
        moov = find_index(self._read_at, self._size)
        offsets = None if moov is None else composition_offsets(moov, count)
        if offsets is None:
            return None
        dts = np.fromiter((entry.timestamp for entry in entries), np.int64, count)
        self._admission.check_duration(float(dts[-1] - dts[0]) * float(stream.time_base))
        pts = dts + offsets
        if (np.diff(dts) <= 0).any() or len(np.unique(pts)) != count:
            return None
        pts += (stream.start_time or 0) - pts.min()
        keys = np.fromiter((entry.is_keyframe for entry in entries), bool, count)
        durations = np.zeros(count, np.int64)
        durations[-1] = max(0, (stream.duration or 0) - int(dts[-1] - dts[0]))
        return build_index(pts, durations, keys, dts, base=float(stream.time_base), rate=session.rate, seekable=True)

    def _indexed_by_packets(self, session: Session) -> Any:
        """Take the index from one pass over all packets, and decode the first frame; the session stands at the end."""
        first, times, num_corrupt = None, PacketTimes(), 0
        for packet in session.packets():
            if first is None:
                first = next(session.decode(packet), None)
            if packet.size and not is_hidden(packet, session.codec):
                times.add(packet)
                num_corrupt += bool(packet.is_corrupt)
                self._admission.check_count(len(times), "packets")
        self.work.bad_packets = num_corrupt  # what else was bad is met again
        if first is None or not len(times):
            raise self._no_frames(session)
        self._admission.check_duration(times.span(session.base))
        made_up = session.format in BARE or not times.complete
        if made_up or (session.format == "avi" and session.stream.codec_context.has_b_frames):  # AVI has no pts
            lost = times.before_first_key()
            self._note_lost(lost)
            self._index = times.order(lost, session.base, session.rate, made_up=made_up)
        else:
            index = times.index(session.base, session.rate, seekable=session.format not in NEVER_SEEK)
            self._index = self._from_first(index, first)
        session.last = None
        return first

    def _no_frames(self, session: Session) -> Exception:
        if self.work.refused_sizes:
            return self._admission.error(
                f"has frames of more pixels than max_pixels={self._admission.limits.max_pixels}, or of no size at all;",
                "too_many_pixels",
                "scale it down, or raise DecodingLimits.max_pixels.",
            )
        return self._admission.error(
            f"holds no frame that can be decoded ({session.codec});", "no_frames", "the file is damaged or cut short."
        )

    def _from_first(self, index: Index, first: Any) -> Index:
        """Leave out what stands before the first frame that can be decoded."""
        place = np.flatnonzero(index.pts == first.pts)
        if not len(place) or not place[0]:
            return index
        lost = int(place[0])
        self._note_lost(lost)
        start = index.times[lost]
        times, duration = index.times[lost:] - start, float(index.duration - start)
        return Index(index.pts[lost:], times, index.key_pts, duration, index.in_order)

    def _by_time(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Decode forward, jumping to a later key frame where one stands before the next frame wanted."""
        index = self._index
        wanted = frozenset(index.pts[list(indices)].tolist())
        session, reached = self._take_session(int(index.pts[indices[0]]))
        session.wanted = wanted if session.codec in SKIPPABLE else None
        frame, ended = session.last, False
        for number in indices:
            target = int(index.pts[number])
            keyframe = index.keyframe_before(target) if self._can_seek else None
            if keyframe is not None and index.frames_between(reached, keyframe) >= SHORTEST_JUMP:
                frame, ended = None, False
                if not session.seek((target, keyframe)):  # back to the start, and on from there without jumps
                    self._can_seek = False
                    session = self._reopen(session.wanted)
            while not ended and (frame is None or frame.pts < target):
                frame = session.next_frame()
                ended = frame is None
            if frame is not None and frame.pts == target:
                yield number, frame
            elif (session.sought or session.wanted is not None) and (found := self._recover(target)) is not None:
                yield number, found
            reached = target if frame is None else max(target, frame.pts)

    def _recover(self, target: int) -> Any:
        """Look for one frame again, skipping no other, at last from the start of the file; None if it is damaged."""
        keyframe = self._index.keyframe_before(target)
        for from_start in (False, True):
            if self._recoveries == _MOST_RECOVERIES or (from_start and self._restarts == _MOST_RESTARTS):
                return None
            self._recoveries += 1
            self._restarts += from_start
            session, bad_packets = self._open(), self.work.bad_packets
            try:
                if not from_start and (keyframe is None or not session.seek((target, keyframe))):
                    continue
                while (frame := session.next_frame()) is not None and frame.pts <= target:
                    if frame.pts == target:
                        self._can_seek &= not from_start
                        return frame
            finally:
                session.close()
                self.work.bad_packets = bad_packets  # met before
        return None

    def _by_sequence(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Decode all, and tell frames of equal time apart by their order."""
        pts, wanted, place = self._index.pts, set(indices), 0
        session = self._reopen(None)
        while place <= indices[-1] and (frame := session.next_frame()) is not None:
            later = np.flatnonzero(pts[place:] == frame.pts)
            if not len(later):
                continue
            place += int(later[0])
            if place in wanted:
                yield place, frame
            place += 1

    def _by_order(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Count frames from the start; after one that is lost nobody knows the number of the next."""
        wanted = set(indices)
        session = self._reopen(None)
        refused = None
        for number in range(indices[-1] + 1):
            frame = session.next_frame()
            refused = self.work.bad_packets if refused is None else refused
            if frame is None or self.work.bad_packets > refused:
                return
            if number in wanted:
                yield number, frame

    def _take_session(self, pts: int) -> tuple[Session, int]:
        """The open session, at or before a time, or a new one; and the time where it stands."""
        session, index = self._session, self._index
        if session is not None and session.last is not None and session.last.pts <= pts:
            return session, session.last.pts
        keyframe = index.keyframe_before(pts) if self._can_seek else None
        if session is not None and keyframe is not None:
            session.wanted = None
            if session.seek((pts, keyframe)):
                return session, keyframe
        return self._reopen(None), int(index.pts[0])

    def _to_pixels(self, frame: Any) -> np.ndarray:
        """`(H, W, 3)` uint8 RGB, upright."""
        self.work.converted += 1
        suspect = self._session is not None and self._session.suspect
        self.work.corrupt_frames += bool(frame.is_corrupt) or suspect
        if (frame.width, frame.height) != self._stored_size:
            width, height = self._stored_size
            self._notes[f"the size changes from {width}x{height} to {frame.width}x{frame.height}"] = None
        pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        turns = self.info.rotation // 90
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

    def _read_at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)


def _open_file(file: str | bytes | BinaryIO) -> BinaryIO:
    if isinstance(file, str):
        return open(file, "rb", buffering=0)
    return BytesIO(file) if isinstance(file, bytes) else file
