"""Damaged bytes -> frames in the right form or one clear error, in bounded time and memory; and that this is seen.

Longer: `ELVA_FUZZ_MUTANTS=100000 ELVA_FUZZ_SEED=1 pytest tests/test_decoding_fuzz.py -s`.
"""

import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damaged_clips import make_clips, make_mutant
from mutating import MEMORY, Run, run_mutants

from elva_hf.decoding_elva import DecodingOptions, VideoInfo, probe, read_video
from elva_hf.errors_elva import VideoError
from elva_hf.frames_elva import FramePlan

PARTS = 4
MUTANTS = int(os.environ.get("ELVA_FUZZ_MUTANTS", 4000))
SEED = int(os.environ.get("ELVA_FUZZ_SEED", 0))


@pytest.fixture(scope="module")
def clips():
    return make_clips()


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_file_gives_frames_in_the_right_form_or_one_clear_error(clips, tmp_path, part):
    numbers = range(part * MUTANTS // PARTS, (part + 1) * MUTANTS // PARTS)
    report = run_mutants(Run(clips, tmp_path, SEED), numbers)
    print(report)
    assert not report.failures, f"{report}\nagain: python tests/mutating.py NUMBER --seed {SEED} [--data FILE]"
    assert report.num_mutants == len(numbers)
    assert len(numbers) < 500 or report.outcomes["read"] > len(numbers) / 5, report  # or nothing was tested


def test_an_isolated_reader_says_the_same_of_a_damaged_file(clips, tmp_path):
    options, numbers = DecodingOptions(isolate=True), range(48)
    report = run_mutants(
        Run(
            clips,
            tmp_path,
            reader=lambda source, plan, size: read_video(source, plan, size, options=options),
            look=lambda source: probe(source, options=options),
        ),
        numbers,
    )
    assert not report.failures, report
    assert report.outcomes == run_mutants(Run(clips, tmp_path), numbers).outcomes


def test_every_clip_is_good_before_it_is_damaged(clips):
    for name, data in clips.items():
        info = probe(data)
        whole = FramePlan(tuple(range(info.num_frames)), (True,) * info.num_frames, info.num_frames)
        video = read_video(data, lambda _, plan=whole: plan, keep)
        assert len(video.frames) == info.num_frames and (info.num_frames > 3) == ("still" not in name), name
        assert len(data) < 20_000, name
        for index, frame in enumerate(video.frames):
            alone = read_video(data, lambda _, index=index: FramePlan((index,), (True,), 1), keep)
            assert torch.equal(alone.frames[0], frame), f"frame {index} of {name}"


def test_a_mutant_is_the_same_for_the_same_numbers(clips):
    mutants = [make_mutant(clips, number) for number in range(200)]
    assert mutants == [make_mutant(clips, number) for number in range(200)]
    assert sum(a.data != make_mutant(clips, a.number, 1).data for a in mutants) > 190
    assert sum(mutant.data != clips[mutant.clip] for mutant in mutants) > 190
    assert len({mutant.data for mutant in mutants}) > 190


# Readers with one fault each: the third read, in every process, goes wrong.
COUNT = 9


def good(source, plan, size, **changes):
    info = VideoInfo("x", 8, 8, 3, times=(0.0, 1.0, 2.0), duration=3.0, fps=1.0)
    chosen = plan(info)
    frames = [np.zeros((3, *size(8, 8, high)), np.uint8) for high in chosen.high]
    parts = {"info": info, "frames": frames, "indices": chosen.indices, "high": chosen.high, "times": None}
    return SimpleNamespace(**{**parts, "num_asked": chosen.num_asked, **changes})


def stray(*asked):
    raise IndexError("list index out of range")


def exits(*asked):
    raise SystemExit(3)


def crash(*asked):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(*asked):
    time.sleep(60)


def slow(*asked):
    time.sleep(0.4)
    return good(*asked)


def hoard(*asked):
    return bytearray(2 * MEMORY)


def leak(*asked):
    os.dup(1)
    return good(*asked)


def leave_a_child(*asked):
    if not os.fork():
        time.sleep(2)
        os._exit(0)
    return good(*asked)


def leave_a_thread(*asked):
    threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
    return good(*asked)


def no_frames(*asked):
    return good(*asked, frames=[])


def not_asked(*asked):
    return good(*asked, indices=(7,), frames=[np.zeros((3, 8, 8), np.uint8)], high=(True,))


def floats(*asked):
    video = good(*asked)
    return good(*asked, frames=[frame.astype(np.float32) for frame in video.frames])


def too_many(*asked):
    return good(*asked, num_asked=99)


def lost(*asked):
    return good(*asked, missing=(1,))


def other_size(*asked):
    return good(asked[0], asked[1], lambda height, width, high: (5, 5))


def standing_time(*asked):
    video = good(*asked)
    return good(*asked, times=(float("nan"),) * len(video.indices))


def no_width(source, plan, size):
    plan(VideoInfo("x", 8, 0, 1, times=(0.0,)))


def unknown_reason(*asked):
    raise VideoError("this reason is nowhere", reason="because")


def two_lines(*asked):
    raise VideoError("first\nsecond", reason="damaged")


def long_line(*asked):
    raise VideoError("x" * 400, reason="damaged")


FAULTS = {
    stray: "stray IndexError: 'list index out of range' at test_decoding_fuzz.py:",
    exits: "stray SystemExit",
    crash: f"crash: the process ended with {-signal.SIGSEGV}",
    hang: "hang: no result after 0.3 s",
    slow: "slow: 0.4 s",
    hoard: "stray MemoryError",
    leak: "leak: ",
    leave_a_child: "leak: ",
    leave_a_thread: "leak: ",
    no_frames: "wrong form: 0 frames",
    not_asked: "wrong form: indices (7,) of",
    floats: "wrong form: dtype float32",
    too_many: "wrong form: 99 asked",
    lost: "wrong form: missing (1,) of",
    other_size: "wrong form: shape (3, 5, 5)",
    standing_time: "wrong form: times that are no numbers",
    no_width: "wrong form: sides or frames below 1",
    unknown_reason: "wrong form: reason because",
    two_lines: "wrong form: message",
    long_line: "wrong form: message",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_broken_reader_is_seen_and_the_mutants_after_it_are_read(tmp_path, fault):
    reads = 0

    def reader(*asked):
        nonlocal reads
        reads += 1
        return (fault if reads == 3 else good)(*asked)

    clips = {"a.mp4": b"some bytes" * 20, "b.mkv": b"other bytes" * 20}
    run = Run(clips, tmp_path, reader=reader, look=lambda source: reader(source, pick, keep).info, seconds=0.3)
    report = run_mutants(run, range(COUNT))
    restarts = fault in (crash, hang)  # a new process, so its third read fails again
    assert [failure.mutant.number for failure in report.failures] == ([2, 5, 8] if restarts else [2]), report
    assert report.outcomes.total() == COUNT - len(report.failures)
    failure = report.failures[0]
    assert failure.problem.startswith(FAULTS[fault]), report
    assert failure.path.read_bytes() == make_mutant(clips, 2).data and "mutant 2 (a.mp4, " in str(report)


def pick(info):
    return FramePlan((0,), (True,), 1)


def keep(height, width, high):
    return height, width


def test_a_hang_leaves_word_of_where_it_was(tmp_path):
    run_mutants(Run({"a.mp4": bytes(100)}, tmp_path, reader=hang, look=hang, seconds=0.2), range(1))
    assert "in hang" in (tmp_path / "child.log").read_text()


def test_a_reader_that_always_fails_ends_the_run_early(tmp_path):
    report = run_mutants(Run({"a.mp4": bytes(100)}, tmp_path, reader=stray, look=stray), range(100), most_failures=3)
    assert report.num_mutants == len(report.failures) == 3
