"""Reading an odd input under watch, and comparing what came out with what should."""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips_elva import HEIGHT, WIDTH, read

from elva_hf.decoding_elva import DecodedVideo, DecodingOptions, read_video
from elva_hf.errors_elva import REASONS, VideoError
from elva_hf.frames_elva import FramePlan
from elva_hf.limits_elva import DecodingLimits

from .records import Fails, Place
from .watching import CAN_WATCH, FileWatch, audit, descriptors, forget_peak, memory, within
from .writing import COLOURS

MOST_SECONDS = 20
TIME_TOLERANCE = 1.01e-3  # seconds; Matroska and Flash round to 1 ms


@dataclass
class Outcome:
    """What came out of an input, and what reading it did beside."""

    place: Place
    source: Any
    video: DecodedVideo | None = None
    error: BaseException | None = None
    opened: set[str] = field(default_factory=set)
    events: list = field(default_factory=list)
    leaked: dict[int, str] = field(default_factory=dict)
    peak: int = 0


def options(case, **rest):
    return DecodingOptions(limits=DecodingLimits(**case.limits), **rest)


def choose(indices):
    """A plan of these frames; None for all."""

    def plan(info):
        chosen = tuple(range(info.num_frames)) if indices is None else tuple(indices)
        return FramePlan(chosen, (True,) * len(chosen), len(chosen))

    return plan


def as_stored(height, width, high):
    """No resizing, but of frames above a megapixel."""
    return (height, width) if height * width <= 2**20 else (HEIGHT, WIDTH)


def read_frames_of(case, source, indices=None, **rest):
    return read_video(source, choose(indices), as_stored, options=options(case, **rest))


def examine(case, place):
    """Build an input, and read all its frames under watch."""
    outcome = Outcome(place, case.build(place))
    if not CAN_WATCH:
        take(case, outcome)
        return outcome
    before, watch = descriptors(), FileWatch(place.folder)
    counts, start = forget_peak(), memory("VmRSS")
    with audit() as outcome.events:
        take(case, outcome)
    outcome.peak = memory("VmHWM") - start if counts else 0
    outcome.opened = watch.opened()
    outcome.leaked = {number: target for number, target in descriptors().items() if before.get(number) != target}
    return outcome


def take(case, outcome):
    """Read all frames, or keep the error."""
    try:
        outcome.video = within(MOST_SECONDS, partial(read_frames_of, case, outcome.source))
    except Exception as error:
        outcome.error = error.with_traceback(None)


def check_outcome(case, outcome):
    """What came out is what should."""
    if isinstance(case.expect, Fails):
        check_error(case.expect, outcome)
    else:
        assert outcome.error is None, f"{type(outcome.error).__name__}: {outcome.error}"
        check_video(case.expect, outcome.video)


def check_error(expect, outcome):
    error = outcome.error
    assert error is not None, f"expected {expect.reason}, got {outcome.video.info.num_frames} frames"
    assert isinstance(error, VideoError), f"{type(error).__name__}: {error}"
    message = str(error)
    assert error.reason == expect.reason, f"{error.reason}: {message}"
    assert error.reason in REASONS and re.search(expect.says, message), message
    assert "\n" not in message and message.isprintable() and 20 < len(message) < 400, message
    assert "secret" not in message + str(error.source), message


def check_video(expect, video):
    info, shown = video.info, dict(zip(video.indices, video.frames, strict=True))
    check_facts(expect, info)
    assert video.num_asked == info.num_frames and video.high == (True,) * len(shown)
    assert set(video.missing) == set(range(info.num_frames)) - set(shown)
    lost = set(video.missing)
    assert not set(shown) & expect.gone, f"shown though gone: {sorted(set(shown) & expect.gone)}"
    assert lost <= expect.gone | expect.hit, f"left out: {sorted(lost - expect.gone - expect.hit)}"
    numbers = {place: read(upright(frame, info)) for place, frame in shown.items()}
    wrong = {place: number for place, number in numbers.items() if number != expect.frames[place]}
    assert wrong.keys() <= expect.hit, f"position: number shown: {wrong}"
    assert expect.silent or not wrong or video.damage.num_bad_packets + video.damage.num_corrupt_frames, (
        f"silently wrong: {wrong}"
    )
    for place in set(shown) - expect.hit:
        check_colours(expect, upright(shown[place], info))
    assert video.times == (None if expect.times is None else tuple(info.times[place] for place in shown))
    check_damage(expect, video.damage)


def check_damage(expect, damage):
    for note in expect.notes:
        assert any(re.search(note, found) for found in damage.notes), f"no note of {note}: {damage.notes}"
    if not expect.hit | expect.gone:
        patterns = [*expect.notes, *filter(None, [expect.remarks])]
        strange = [note for note in damage.notes if not any(re.search(pattern, note) for pattern in patterns)]
        assert not strange, f"a sound clip is said to be damaged: {strange}"
        assert patterns or not (damage.num_bad_packets or damage.num_corrupt_frames), damage


def check_facts(expect, info):
    count = info.num_frames
    tail = set(range(count, len(expect.frames)))  # damaged frames at the end may not be counted
    assert count <= len(expect.frames) and tail <= expect.hit, f"{count} frames, not {len(expect.frames)}"
    if expect.times is not None:
        assert info.times == pytest.approx(expect.times[:count], abs=TIME_TOLERANCE)
    for name, value in expect.facts.items():
        found = getattr(info, name)
        if isinstance(value, float) or name == "fps":
            assert found == pytest.approx(value, rel=5e-3), f"{name} is {found}, not {value}"
        else:
            assert found == value, f"{name} is {found}, not {value}"
    assert info.duration is None or info.duration >= info.times[-1]


def upright(frame, info):
    """The frame as it was painted."""
    return torch.rot90(frame, -info.rotation // 90, (1, 2))


def check_colours(expect, frame):
    if expect.colours is None:
        return
    height, width = frame.shape[1:]
    for number, colour in enumerate(COLOURS):
        pixel = frame[:, height * 7 // 8, (2 * number + 1) * width // 8].int().numpy()
        off = np.abs(pixel - np.array(colour)).max()
        assert off <= expect.colours, f"colour {colour} is shown as {pixel.tolist()}"


def is_file(source):
    return isinstance(source, Path) and source.is_file()


def names_of(source):
    """Files in the folder that may be opened: the source, and what it links to."""
    return {source.name, source.resolve().name} if is_file(source) else set()
