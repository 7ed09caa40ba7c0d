"""`docs/inputs.md`: what comes out of each odd input, as it was when it was read."""

import re
from itertools import groupby

import av
import numpy as np
from clips_elva import read

from elva_hf.errors_elva import REASONS

from . import SECTIONS
from .checking import upright

HOW = "`python scripts/inputs_table.py`"
HEAD = f"""# Inputs, results and errors

Made by {HOW} from the inputs of `tests/odd_files` and what came out of them. `tests/test_odd_files.py`
checks every row, and that this page is up to date; do not edit it.

The inputs are made on the fly with PyAV. Each frame carries its number in its pixels, and four colours, so that a frame
that is lost, doubled, out of order, turned or of a wrong colour is seen. A source gives exactly its frames, each at its
own time in seconds from the first, or it raises one `VideoError` whose `reason` is a code. Reading opens no other file
and no socket, whatever the input says. The bytes of a file give what the file gives, and any choice of frames gives the
pixels that a full decode gives.

`48x128` is height x width in pixels. Frames that cannot be decoded are left out; where they are more than a tenth of
the frames asked for, the source is `damaged`.
"""


def version():
    """What the page depends on."""
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__}, libavcodec {libavcodec}"


def ranges(numbers):
    """`0-7, 20-27` of numbers in any order."""
    if len(numbers) > 4 and len(set(numbers)) == 1:
        return f"{numbers[0]}, {len(numbers)} times"
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def seconds(time):
    return f"{time:.3f}".rstrip("0").rstrip(".")


def spacing(times):
    """The times of frames, in words."""
    gaps = np.diff(times)
    if len(gaps) and gaps.max() - gaps.min() <= 2.1e-3:
        return f"one each {seconds((times[-1] - times[0]) / len(gaps))} s"
    shown = [seconds(time) for time in times]
    return "at " + ", ".join(shown if len(shown) <= 8 else [*shown[:6], "...", shown[-1]]) + " s"


def result(outcome):
    """One line on what came out."""
    if outcome.error is not None:
        return f"`{outcome.error.reason}`: {anonymous(str(outcome.error), outcome.place)}"
    video = outcome.video
    info, damage = video.info, video.damage
    numbers = [read(upright(frame, info)) for frame in video.frames]
    noun = "still image" if info.is_image else f"{len(numbers)} frame{'s' * (len(numbers) > 1)}"
    parts = [f"{noun} ({ranges(numbers)}) of {info.height}x{info.width}"]
    if video.times is None:
        parts.append("no times")
    elif not info.is_image:
        parts.append(spacing(info.times))
    if info.rotation:
        parts.append(f"turned by {info.rotation} degrees")
    if video.missing:
        parts.append(f"left out: {ranges(video.missing)}")
    if damage.num_corrupt_frames:
        parts.append(f"{damage.num_corrupt_frames} with errors")
    return "; ".join([*parts, *damage.notes])


def anonymous(text, place):
    """The text without what changes from run to run: folder, port, size in bytes, a very long name."""
    text = text.replace(f"{place.folder}/", "").replace(f":{place.port}", ":PORT")
    return re.sub(r"x{20,}[^']*", "xxx...", re.sub(r"\b\d+ bytes", "N bytes", text))


def cell(text):
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def render(outcomes):
    """The page; `outcomes(name)` is an `Outcome`."""
    lines, causes = [HEAD, f"Versions: {version()}."], {reason: [] for reason in REASONS}
    for section, cases in SECTIONS.items():
        lines += ["", f"## {section}", "", "| Input | What it is | What comes out |", "|---|---|---|"]
        for case in cases:
            outcome = outcomes(case.name)
            if outcome.error is not None:
                causes[outcome.error.reason].append(case.name)
            lines.append(f"| {case.name} | {cell(case.what)} | {cell(result(outcome))} |")
    lines += ["", "## Reasons", "", "| `VideoError.reason` | Meaning | Inputs above |", "|---|---|---|"]
    lines += [f"| `{reason}` | {cell(REASONS[reason])} | {', '.join(names)} |" for reason, names in causes.items()]
    return "\n".join(lines) + "\n"
