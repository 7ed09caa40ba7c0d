"""Faults of decoding: the right frame, or one error."""

from .fault import Fault

CONTAINER = "tests/test_container_elva.py"
DECODED = "tests/test_decoding_elva.py"
ODD = "tests/test_odd_files.py"
FETCHING = "tests/test_fetching_elva.py"
ISOLATION = "tests/test_isolation_elva.py"
FRAMES = "tests/test_frames_elva.py"
BUDGET = "tests/test_budget_elva.py"
BUDGETS = "tests/test_budgets.py"

DECODING = (
    Fault(
        "a frame near the one wanted taken for it",
        "container_elva.py",
        "            if frame is not None and frame.pts == target:\n                yield number, frame",
        "            if frame is not None:\n                yield number, frame",
        (ODD, CONTAINER),
    ),
    Fault(
        "frames skipped that others refer to",
        "session_elva.py",
        '"DEFAULT" if needed else "NONREF"',
        '"DEFAULT" if needed else "NONKEY"',
        (CONTAINER,),
    ),
    Fault(
        "the wanted frame skipped too",
        "session_elva.py",
        "needed = packet.pts is None or packet.pts in self.wanted",
        "needed = packet.pts is None",
        (CONTAINER, "-k", "nobody_needs or looked_for_again"),
    ),
    Fault(
        "a recovery point taken for a key frame",
        "session_elva.py",
        "frame.pict_type == PictureType.I and ",
        "",
        (ODD, "-k", "intra"),
    ),
    Fault(
        "composition offsets left out of the index",
        "container_elva.py",
        "pts = dts + offsets",
        "pts = dts + 0 * offsets",
        (CONTAINER, "-k", "index_of_an_mp4"),
    ),
    Fault(
        "an edit list ignored",
        "container_elva.py",
        "entry.is_discard or ",
        "",
        (ODD, "-k", "edit or trim or discard"),
    ),
    Fault(
        "what cannot be decoded at the start counted",
        "container_elva.py",
        "self._index = self._from_first(index, first)",
        "self._index = index",
        (CONTAINER, ODD, "-k", "before_the_first or between"),
    ),
    Fault(
        "times that start again sorted into one",
        "index_elva.py",
        "np.cumsum(np.diff(dts) < 0)",
        "np.cumsum(np.diff(dts) < -(2**40))",
        (CONTAINER, "-k", "start_again"),
    ),
    Fault(
        "turned the wrong way",
        "container_elva.py",
        "np.rot90(pixels, turns)",
        "np.rot90(pixels, -turns)",
        (DECODED, "-k", "upright"),
    ),
    Fault(
        "a cover taken for the video",
        "session_elva.py",
        "if not stream.disposition & _COVER",
        "if True",
        (ODD, "-k", "cover"),
    ),
    Fault(
        "playlists and protocols opened",
        "session_elva.py",
        """        "protocol_whitelist": "none",  # all bytes come through our own file object
        "format_whitelist": ",".join(sorted(limits.demuxers)),
""",
        "",
        (ODD, "-k", "concat or hls or sdp"),
    ),
    Fault(
        "codecs not checked",
        "session_elva.py",
        "if name not in limits.codecs:",
        "if name is None:",
        (CONTAINER, "-k", "each_limit"),
    ),
    Fault(
        "pixels not checked",
        "admission_elva.py",
        "if width * height > self.limits.max_pixels:",
        "if width * height < 0:",
        (ODD, "-k", "bomb"),
    ),
    Fault(
        "pipes and devices opened",
        "files_elva.py",
        "        _check_regular(os.stat(path), name)  # opening a pipe or a device acts on it\n",
        "",
        (ODD, "-k", "fifo or pipe or device"),
    ),
    Fault(
        "a lost frame not told",
        "decoding_elva.py",
        "missing = tuple(sorted(roles.keys() - set(indices)))",
        "missing = ()",
        (DECODED, "-k", "damaged or missing"),
    ),
    Fault(
        "threads left to the garbage collector",
        "session_elva.py",
        "        self._container.close()\n        del self._container, self.stream",
        "        self._container.close()",
        (CONTAINER, "-k", "outlives"),
    ),
    Fault(
        "private addresses asked",
        "fetching_elva.py",
        "return address.is_global and",
        "return True and",
        (FETCHING,),
    ),
    Fault(
        "the isolated process may open files",
        "isolated_worker.py",
        "    _lower(resource.RLIMIT_NOFILE, 0)\n",
        "",
        (ISOLATION,),
    ),
    Fault(
        "a budget exceeded by one token",
        "budget_elva.py",
        "limit is None or used <= limit",
        "limit is None or used <= limit + 1",
        (BUDGET,),
    ),
    Fault(
        "budgets checked after decoding",
        "processing_elva.py",
        "sampled = planned = encoder.plan(prompts, opened, budgets)",
        "sampled = planned = [video.sample() for video in opened]",
        (BUDGETS,),
    ),
    Fault(
        "the end of the window included",
        "frames_elva.py",
        "bisect_left(times, end - TIME_TOLERANCE)",
        "bisect_right(times, end + TIME_TOLERANCE)",
        (FRAMES,),
    ),
)
