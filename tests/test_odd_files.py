"""Every odd or hostile input gives exactly the right frames at the right times, or one clear error; nothing else."""

import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from odd_files import CASES, SECTIONS, Fails, Place
from odd_files.checking import as_stored, check_outcome, examine, is_file, names_of, options, read_frames_of
from odd_files.hostile import CONCAT, HLS, SDP, bait
from odd_files.table import HOW, render, version
from odd_files.watching import CAN_WATCH, FileWatch, Listener, audit, forget_peak, memory

from elva_hf.decoding_elva import open_reader, probe
from elva_hf.errors_elva import REASONS, VideoError

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "inputs.md"
MOST_MEMORY = 600 * 2**20
SOUND = [name for name, case in CASES.items() if not isinstance(case.expect, Fails)]
ISOLATED = [*CASES][::10]  # a process each
SMALL = [name for name in SOUND if name != "bomb-webp"]  # the others are read many times
PYTHON = (".py", ".pyc", ".so", "__pycache__")
watched = pytest.mark.skipif(not CAN_WATCH, reason="needs inotify, /proc and seccomp of Linux")


@pytest.fixture(scope="module")
def listener():
    with Listener() as both:
        yield both


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, listener):
    """Outcome of an input by name; each is made and read once."""
    found = {}

    def outcome(name):
        if name not in found:
            folder, here = tmp_path_factory.mktemp("odd"), Path.cwd()
            os.chdir(folder)  # playlists find their files beside them, or here
            try:
                found[name] = examine(CASES[name], Place(folder, listener.port))
            finally:
                os.chdir(here)
        return found[name]

    return outcome


@pytest.mark.parametrize("name", CASES)
def test_an_input_gives_what_it_should(name, outcomes):
    check_outcome(CASES[name], outcomes(name))


@watched
@pytest.mark.parametrize("name", CASES)
def test_reading_touches_nothing_else(name, outcomes, listener):
    outcome = outcomes(name)
    assert outcome.opened <= names_of(outcome.source)
    assert not listener.calls() and not outcome.leaked
    assert outcome.peak < MOST_MEMORY
    others = [(event, arguments[:1]) for event, arguments in outcome.events if event != "open"]
    assert not others
    paths = [str(arguments[0]) for event, arguments in outcome.events if not isinstance(arguments[0], int)]
    assert {path for path in paths if not path.endswith(PYTHON)} <= {str(outcome.source)}


def check_same(video, other):
    """Two readings agree, bit by bit."""
    for name in ("indices", "times", "missing", "damage"):
        assert getattr(video, name) == getattr(other, name)
    assert all(map(torch.equal, video.frames, other.frames))


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_a_file_give_the_same(name, outcomes):
    outcome = outcomes(name)
    if not is_file(outcome.source):
        pytest.skip("no file")
    data = outcome.source.read_bytes()
    if outcome.error is not None:
        with pytest.raises(VideoError) as caught:
            read_frames_of(CASES[name], data)
        assert caught.value.reason == outcome.error.reason
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        return
    check_same(read_frames_of(CASES[name], data), outcome.video)


@pytest.mark.parametrize("name", SOUND)
def test_a_probe_knows_the_frames_that_come(name, outcomes):
    outcome = outcomes(name)
    info = probe(outcome.source, options=options(CASES[name]))
    assert info == outcome.video.info and info.times == outcome.video.info.times
    assert len(info.times) == info.num_frames and list(info.times) == sorted(info.times)
    assert all(type(time) is float for time in info.times)
    assert all(type(value) in (float, type(None)) for value in (info.duration, info.fps))


def some(count, seed):
    """Choices of frames, forwards and backwards in the file: the last, every third, and a few anywhere."""
    draw = random.Random(seed)
    anywhere = [sorted(draw.sample(range(count), min(count, draw.randrange(1, 6)))) for _ in range(10)]
    return [[count - 1], list(range(0, count, 3)), *anywhere]


@pytest.mark.parametrize("name", SMALL)
def test_any_choice_of_frames_gives_the_same_pixels(name, outcomes):
    case, outcome = CASES[name], outcomes(name)
    whole = dict(zip(outcome.video.indices, outcome.video.frames, strict=True))
    broken = case.expect.hit | case.expect.gone
    with open_reader(outcome.source, options=options(case)) as reader:
        for choice in some(outcome.video.info.num_frames, name):
            chosen = {frame.index: frame for frame in reader.read(choice)}
            assert set(choice) - broken <= set(chosen) <= set(choice), f"asked {choice}, got {sorted(chosen)}"
            for place in set(chosen) - broken:
                pixels = torch.from_numpy(chosen[place].pixels).permute(2, 0, 1)
                if pixels.shape == whole[place].shape:
                    assert torch.equal(pixels, whole[place]), f"frame {place} of {choice} differs"
                if outcome.video.times is not None:
                    assert chosen[place].time == outcome.video.info.times[place]


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "gif", "open-gop-hevc", "intra-refresh", "all-marked-key"])
def test_each_single_frame_read_alone_is_that_frame(name, outcomes):
    outcome = outcomes(name)
    for place, frame in zip(outcome.video.indices, outcome.video.frames, strict=True):
        (alone,) = read_frames_of(CASES[name], outcome.source, [place]).frames
        assert torch.equal(alone, frame), place


@pytest.mark.parametrize("name", ISOLATED)
def test_an_isolated_reader_gives_the_same(name, outcomes):
    outcome = outcomes(name)
    if outcome.error is not None:
        with pytest.raises(VideoError) as caught:
            read_frames_of(CASES[name], outcome.source, isolate=True)
        assert (caught.value.reason, str(caught.value)) == (outcome.error.reason, str(outcome.error))
        return
    check_same(read_frames_of(CASES[name], outcome.source, isolate=True), outcome.video)


@watched
def test_a_jail_without_sockets_and_files_changes_nothing(outcomes, tmp_path):
    """By path no socket is asked for; from memory no file is opened either: the kernel would kill the process."""
    sources = {name: outcomes(name).source for name in CASES}
    paths = {name: str(source) for name, source in sources.items() if isinstance(source, (str, Path))}
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    command = [sys.executable, "-m", "odd_files.jailed", str(tmp_path)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("this kernel has no seccomp")
    for kind, results in found.items():
        for name, result in results.items():
            outcome = outcomes(name)
            expected = outcome.error.reason if outcome.error else len(outcome.video.frames)
            assert result == expected, f"{name} by {kind}"
    assert found["path"].keys() == paths.keys() and found["path"].keys() | found["memory"].keys() == CASES.keys()


ALONE = {
    "a socket, SDP": ("SOCKETS", SDP.format(port=5004)),
    "a file, list of files": ("FILES", CONCAT.format(bait="bait.mp4")),
}


@watched
@pytest.mark.parametrize("what", ALONE)
def test_the_jail_kills_what_pyav_does_alone(what, tmp_path):
    calls, text = ALONE[what]
    code = (
        f"import io, av; from odd_files import watching; print(watching.die_at(watching.{calls}), flush=True)\n"
        f"try: av.open(io.BytesIO({text.encode()!r}))\nexcept av.FFmpegError: pass"
    )
    bait(Place(tmp_path, 9))
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False
    )
    if done.stdout.strip() == b"False":
        pytest.skip("this kernel has no seccomp")
    assert done.returncode == -signal.SIGSYS, done.stderr.decode()[-2000:]


@watched
@pytest.mark.parametrize("text", [CONCAT, HLS.format("{bait}")])
def test_the_watch_sees_what_pyav_opens_alone(text, tmp_path):
    path = bait(Place(tmp_path, 9))
    (tmp_path / "list.m3u8").write_text(text.format(bait=path.name))
    watch = FileWatch(tmp_path)
    with av.open(str(tmp_path / "list.m3u8")):
        pass
    assert watch.opened() == {"list.m3u8", "bait.mp4"}


def test_the_listener_notes_calls(listener):
    for scheme in ("tcp", "http"):
        with pytest.raises(av.FFmpegError):
            av.open(f"{scheme}://127.0.0.1:{listener.port}/x.mp4", timeout=0.3)
    assert listener.calls() == 2 and listener.calls() == 0


@watched
def test_the_peak_of_memory_is_seen():
    if not forget_peak():
        pytest.skip("this kernel does not let the peak be set back")
    before = memory("VmRSS")
    np.ones(2**27, np.uint8)
    assert 2**26 < memory("VmHWM") - before < 2**28


def test_python_calls_are_noted(tmp_path):
    (tmp_path / "a").touch()
    with audit() as events:
        (tmp_path / "a").read_bytes()
    (tmp_path / "a").read_bytes()
    assert [arguments[0] for event, arguments in events if event == "open"] == [str(tmp_path / "a")]


def test_the_page_of_inputs_is_up_to_date(outcomes):
    page = PAGE.read_text()
    if version() not in page:
        pytest.skip(f"the page was not made with {version()}")
    stale = [line for line in render(outcomes).splitlines() if line not in page.splitlines()]
    assert page == render(outcomes), f"docs/inputs.md is not up to date: run {HOW}; first: {stale[:1]}"


def test_the_family_covers_what_it_should():
    assert len(CASES) == sum(map(len, SECTIONS.values())) >= 54, "two inputs of one name"
    reasons = {case.expect.reason for case in CASES.values() if isinstance(case.expect, Fails)}
    elsewhere = {"address", "fetch", "timeout", "out_of_memory", "crashed", "not_an_image", "bad_time"}
    assert reasons | elsewhere == set(REASONS)


def test_frames_above_a_megapixel_are_kept_small():
    assert as_stored(48, 128, True) == (48, 128) and as_stored(2048, 2048, True) == (48, 128)


def test_bytes_io_is_no_source():
    with pytest.raises(VideoError, match="BytesIO") as caught:
        probe(io.BytesIO(SDP.encode()))
    assert caught.value.reason == "bad_type"


def test_the_readme_counts_the_inputs():
    readme = (TESTS.parent / "README.md").read_text()
    assert f"What comes of {len(CASES)} odd, damaged and hostile inputs" in readme
