"""Decoding in a process of its own: the same frames and errors as without, and nothing that process does can hurt."""

import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from clips_elva import MAKERS, read, write_counter, write_sound
from PIL import Image

from elva_hf import isolation_elva
from elva_hf.errors_elva import ConfigurationError, VideoError
from elva_hf.files_elva import open_file, open_path
from elva_hf.isolation_elva import WORKER, IsolatedReader
from elva_hf.limits_elva import DecodingLimits

COUNT = 24
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# A worker that is honest, but for what a test appends: any of these functions, or none.
HONEST = """
import json, os, signal, struct, sys, time
def send(header, payload=b""):
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\\n" + payload)
    sys.stdout.buffer.flush()
def facts():
    return dict(height=4, width=6, num_frames=3, duration=3.0, fps=1.0, codec="h264", container="mov", rotation=0)
def times():
    return struct.pack("3d", 0.0, 1.0, 2.0)
def ready():
    send({"ready": True})
def info():
    send({"info": facts(), "damage": [0, 0, []]}, times())
def frame(index):
    send({"frame": [index, float(index), 4, 6], "damage": [0, 0, []]}, bytes([index]) * 72)
def end():
    send({"end": True, "damage": [0, 0, []]})
"""
SERVE = """
start = json.loads(sys.stdin.readline())
ready()
info()
left = []
for line in sys.stdin:
    left = json.loads(line).get("read", left)
    frame(left.pop(0)) if left else end()
"""


def collect(reader):
    with reader:
        info = reader.info
        frames = [
            (*frame[:2], frame.pixels.tobytes(), frame.pixels.shape) for frame in reader.read(range(len(info.times)))
        ]
        return info, frames, reader.damage


def outcome(call):
    try:
        return call()
    except VideoError as error:
        return error.reason, str(error), error.source, error.hint


def direct(file, limits=None):
    limits = limits or DecodingLimits()
    opened = open_path(file) if isinstance(file, str) else io.BytesIO(file)
    return outcome(lambda: collect(open_file(opened, "'clip'", limits, 1)))


def isolated(file, limits=None):
    return outcome(lambda: collect(IsolatedReader(file, "'clip'", limits or DecodingLimits())))


def is_alive(pid):
    return Path(f"/proc/{pid}").exists()


def wait_until(truth, seconds=5.0):
    end = time.monotonic() + seconds
    while not truth() and time.monotonic() < end:
        time.sleep(0.01)
    return truth()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {kind: str(write_counter(folder / f"clip.{kind}", COUNT)) for kind in MAKERS}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install a worker that is honest but for the code given; open a file with it."""

    def install(code="", serve=SERVE, **limits):
        worker = tmp_path / "worker.py"
        worker.write_text(HONEST + code + serve)
        monkeypatch.setattr(isolation_elva, "WORKER", worker)
        return IsolatedReader(b"anything", "'clip'", DecodingLimits(**limits))

    return install


@pytest.mark.parametrize("kind", MAKERS)
def test_every_container_gives_what_it_gives_without_isolation(clips, kind):
    info, frames, damage = isolated(clips[kind])
    assert (info, frames, damage) == direct(clips[kind]) and len(frames) == COUNT


def test_a_path_bytes_and_every_kind_of_file_agree(clips):
    path = clips["mp4"]
    data = Path(path).read_bytes()
    expected = direct(path)
    with open(path, "rb") as buffered, open(path, "rb", buffering=0) as raw, tempfile.TemporaryFile() as temporary:
        temporary.write(data)  # not flushed
        for file in (data, io.BytesIO(data), buffered, raw, temporary):
            assert isolated(file) == expected


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tiff", "animated.webp"])
def test_images_give_what_they_give_without_isolation(tmp_path, kind):
    path = str(tmp_path / f"image.{kind}")
    images = [Image.fromarray(np.full((8, 12, 3), shade, np.uint8)) for shade in (30, 200)]
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    if "animated" in kind:
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    else:
        images[0].save(path, exif=exif) if kind in ("png", "jpg", "webp") else images[0].save(path)
    info, frames, damage = isolated(path)
    assert (info, frames, damage) == direct(path) and len(frames) == 1 + ("animated" in kind)


def test_rotation_uneven_times_and_damage_are_the_same(tmp_path, clips):
    turned = write_counter(tmp_path / "turned.mp4", 12, rotation=90)
    uneven = write_counter(tmp_path / "uneven.mkv", 12, pts=[0, 10, 500, *range(600, 1500, 100)])
    data = bytearray(Path(clips["ts"]).read_bytes())
    for place in range(len(data) // 3, len(data) // 2, 97):
        data[place] ^= 0xFF
    for file in (str(turned), str(uneven), bytes(data)):
        assert isolated(file) == direct(file)


def test_errors_are_those_without_isolation(tmp_path, clips):
    data = Path(clips["mp4"]).read_bytes()
    image = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(image, "PNG")
    cases = [
        (b"", {}),
        (b"no video at all, only text" * 20, {}),
        (image.getvalue()[:1000], {}),
        (write_sound(tmp_path / "sound.wav").read_bytes(), {}),
        (data[: len(data) // 2], {}),
        (data, {"max_bytes": 100}),
        (data, {"max_pixels": 1000}),
        (data, {"max_frames": 5}),
        (data, {"max_duration": 0.1}),
        (data, {"codecs": {"vp9"}}),
        (data, {"max_seconds": 1e-9}),
    ]
    found = [isolated(file, DecodingLimits(**limits)) for file, limits in cases]
    assert found == [direct(file, DecodingLimits(**limits)) for file, limits in cases]
    assert len({reason for reason, *_ in found}) >= 9


def test_reads_one_after_the_other_and_abandoned_ones_give_the_right_frames(clips):
    with IsolatedReader(clips["mp4"], "'clip'") as reader:
        assert [frame.index for frame in reader.read([3, 4, 20])] == [3, 4, 20]
        for first in (1, 5, 2):
            frames = reader.read(range(first, COUNT))
            assert read(next(frames).pixels.transpose(2, 0, 1)) == first
        assert [frame.index for frame in reader.read([0])] == [0] and not list(reader.read([]))
        with pytest.raises(VideoError, match="a second time"):
            next(frames)


def test_the_file_given_is_closed_with_the_reader_and_its_place_is_not_moved(clips):
    with open(clips["mp4"], "rb", buffering=0) as file:
        file.seek(7)
        with IsolatedReader(file, "'clip'") as reader:
            assert len(list(reader.read([0, 9]))) == 2 and file.tell() == 7
        assert file.closed
    file = io.BytesIO(b"no video")
    with pytest.raises(VideoError):
        IsolatedReader(file, "'clip'")
    assert file.closed


def test_a_platform_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr(isolation_elva, "resource", None)
    with pytest.raises(ConfigurationError, match="Linux, macOS"):
        IsolatedReader(b"anything", "'clip'")


def test_a_system_that_refuses_the_limits_is_a_configuration_error(fake):
    with pytest.raises(ConfigurationError, match="does not work here: OSError: no such limit"):
        fake('def ready():\n    send({"refused": "OSError: no such limit"}); sys.exit()')


# ---- what the process may do


def run_worker_code(code, **start):
    """Run code in a process that has loaded the worker as the worker itself would."""
    load = f"import json, os, runpy, sys\nworker = runpy.run_path({str(WORKER)!r})\n"
    load += f"worker['_load']({ {'path': sys.path, 'limits': {}, **start}!r})\n"
    command = [sys.executable, "-I", "-S", "-c", load + code]
    done = subprocess.run(command, capture_output=True, text=True, env=isolation_elva._THREADS, check=True)
    return json.loads(done.stdout)


@LINUX
def test_the_worker_loads_no_torch_and_runs_one_thread():
    modules, threads = run_worker_code("print(json.dumps([list(sys.modules), len(os.listdir('/proc/self/task'))]))")
    assert {"av", "numpy", "elva_hf.container_elva"} <= set(modules) and threads == 1
    assert not {"torch", "transformers", "torchvision"} & set(modules)


def test_start_up_takes_less_than_a_second_of_processor_time(clips):
    def seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = seconds()
    IsolatedReader(clips["mp4"], "'clip'").close()
    assert 0 < seconds() - start < 1


ATTEMPTS = """
import resource, socket
if {nobody}:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
worker["restrict"](2**32, 5.0)
def attempt(call):
    try:
        call()
    except (OSError, ValueError) as error:
        return getattr(error, "errno", None) or str(error)
tries = dict(
    read=lambda: open({file!r}),
    write=lambda: open({file!r} + ".new", "w"),
    socket=lambda: socket.socket(),
    pipe=lambda: os.pipe(),
    copy=lambda: os.dup(0),
    remove=lambda: os.unlink({file!r}),
    rename=lambda: os.rename({file!r}, {file!r} + ".new"),
    truncate=lambda: os.truncate({file!r}, 0),
    run=lambda: os.execv("/bin/true", ["true"]),
    signal=lambda: os.kill({parent}, 0),
    more_files=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
    more_memory=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40)),
    new_root=lambda: os.chroot("/"),
    fork=lambda: os.fork() or os._exit(0),
)
failed = {{name: attempt(call) for name, call in tries.items()}}
def grow():
    bytearray(2**33)
try:
    grow()
except MemoryError:
    failed["memory"] = True
print(json.dumps(failed))
"""


def landlock():
    import ctypes

    call = ctypes.CDLL(None).syscall
    call.restype = ctypes.c_long
    return call(*map(ctypes.c_long, (444, 0, 0, 1)))


@LINUX
@pytest.mark.parametrize("nobody", [False, True])
def test_after_restrict_no_file_socket_process_or_privilege_can_be_had(tmp_path, nobody):
    if nobody and os.getuid():
        pytest.skip("only root can become nobody")
    file = tmp_path / "precious"
    file.write_text("kept")
    for folder in (tmp_path, *tmp_path.parents):
        if nobody and folder.stat().st_uid == 0 and folder.name.startswith("pytest"):
            folder.chmod(0o777)
    failed = run_worker_code(ATTEMPTS.format(file=str(file), nobody=nobody, parent=os.getpid()))
    assert file.read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
    assert {failed[name] for name in ("read", "write", "socket", "pipe")} == {errno.EMFILE}, failed
    assert failed["copy"] in (errno.EMFILE, errno.EINVAL), failed
    assert failed["memory"] and failed["more_files"] and failed["more_memory"] and failed["new_root"] == errno.EPERM
    if nobody or os.getuid():
        assert failed["fork"] == errno.EAGAIN
    if landlock() >= 1:
        assert {failed[name] for name in ("remove", "rename", "run")} <= {errno.EACCES, errno.EPERM}, failed
    if landlock() >= 3:
        assert failed["truncate"] in (errno.EACCES, errno.EPERM)
    if landlock() >= 6:
        assert failed["signal"] == errno.EPERM


@LINUX
def test_the_child_inherits_no_variable_and_only_three_pipes_and_the_file(clips, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with open(clips["avi"], "rb"), IsolatedReader(clips["mp4"], "'clip'") as reader:
        folder = Path(f"/proc/{reader._process.pid}")
        environment = folder.joinpath("environ").read_bytes()
        opened = {os.readlink(link) for link in folder.joinpath("fd").iterdir()}
        assert b"secret" not in environment and b"HF_TOKEN" not in environment and b"PATH=" not in environment
        assert clips["mp4"] in opened and clips["avi"] not in opened
        assert all(name.startswith("pipe:") or name in ("/dev/null", clips["mp4"]) for name in opened), opened
        limits = folder.joinpath("limits").read_text()
        status = folder.joinpath("status").read_text()
        assert "NoNewPrivs:\t1" in status and "CapEff:\t0000000000000000" in status and "Threads:\t1\n" in status
        rows = {row[:25].strip(): row[25:].split()[:2] for row in limits.splitlines()}
        assert rows["Max open files"] == rows["Max file size"] == rows["Max processes"] == ["0", "0"]
        assert rows["Max core file size"] == ["0", "0"] and rows["Max address space"] == [str(2**32)] * 2
        assert rows["Max cpu time"] == ["1210", "1211"]


# ---- what may go wrong


def write_large(path, height=4096, width=4096):
    """One frame of one colour that takes 50 MB and more to decode."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p"
        frame = av.VideoFrame(width, height, "yuvj420p")
        for plane in frame.planes:
            plane.update(bytes([128]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@LINUX
def test_too_little_memory_is_out_of_memory_for_videos_and_images(tmp_path, clips):
    video, image = write_large(tmp_path / "large.avi"), str(tmp_path / "large.png")
    Image.new("RGB", (4096, 4096)).save(image, compress_level=1)
    with IsolatedReader(clips["mp4"], "'clip'") as reader:
        status = Path(f"/proc/{reader._process.pid}/status").read_text()
    usual = 1024 * int(status.partition("VmPeak:")[2].split()[0])
    for file in (video, image):
        with IsolatedReader(file, "'clip'") as reader:
            assert next(reader.read([0])).pixels.shape == (4096, 4096, 3)
        for memory in (1, usual + 20 * 2**20):
            result = isolated(file, DecodingLimits(max_process_memory=memory))
            assert result[0] == "out_of_memory" and "max_process_memory" in result[1], (file, memory, result)


def test_a_killed_decoder_is_a_crash_with_its_signal(clips):
    with IsolatedReader(clips["mp4"], "'clip'") as reader:
        frames = reader.read(range(COUNT))
        next(frames)
        os.kill(reader._process.pid, signal.SIGKILL)
        with pytest.raises(VideoError, match="killed by SIGKILL") as caught:
            list(frames)
        assert caught.value.reason == "crashed" and caught.value.source == "'clip'"
        with pytest.raises(VideoError, match="has ended"):
            list(reader.read([0]))


@LINUX
def test_a_stopped_decoder_is_a_time_out_and_does_not_stay(clips):
    with IsolatedReader(clips["mp4"], "'clip'", DecodingLimits(max_seconds=0.2)) as reader:
        os.kill(reader._process.pid, signal.SIGSTOP)
        with pytest.raises(VideoError, match=r"max_seconds=0\.2") as caught:
            list(reader.read(range(COUNT)))
        assert caught.value.reason == "timeout" and not is_alive(reader._process.pid)


def test_a_request_that_nobody_reads_is_a_time_out(fake):
    silent = "start = json.loads(sys.stdin.readline())\nready()\ninfo()\ntime.sleep(60)"
    with fake(serve=silent, max_seconds=0.2) as reader, pytest.raises(VideoError) as caught:
        list(reader.read(range(10**6)))
    assert caught.value.reason == "timeout"


def test_an_answer_that_comes_in_drips_is_a_time_out(fake):
    drips = "def frame(index):\n    while True:\n        os.write(1, b'x')\n        time.sleep(0.01)"
    with fake(drips, max_seconds=0.2) as reader, pytest.raises(VideoError) as caught:
        list(reader.read([0]))
    assert caught.value.reason == "timeout"


def test_nothing_waits_once_the_time_is_over():
    ends = os.pipe()
    pipes = isolation_elva._Pipes(ends[1], ends[0])
    os.write(ends[1], b"{}\n")
    pipes.deadline = time.monotonic() - 1
    with pytest.raises(TimeoutError):
        pipes.receive()
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(
    ("name", "reason"), [("SIGXCPU", "timeout"), ("SIGSEGV", "crashed"), ("SIGABRT", "crashed"), ("SIGSYS", "crashed")]
)
def test_signals_of_the_system_get_their_reason(fake, name, reason):
    with fake(f"def end():\n    os.kill(os.getpid(), signal.{name})") as reader, pytest.raises(VideoError) as caught:
        list(reader.read([0]))
    assert caught.value.reason == reason and (name in str(caught.value)) == (reason == "crashed")


def test_a_decoder_that_does_not_start_is_a_crash(fake, monkeypatch):
    monkeypatch.setattr(isolation_elva, "_SECONDS_TO_START", 0.2)
    with pytest.raises(VideoError, match="did not start") as caught:
        fake("def ready():\n    time.sleep(60)")
    assert caught.value.reason == "crashed"
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(VideoError, match="no process could be started"):
        fake()


def test_the_fake_worker_is_honest_without_lies(fake):
    with fake() as reader:
        assert reader.info.times == (0.0, 1.0, 2.0) and reader.info.source == "'clip'"
        assert [(frame.index, int(frame.pixels.max())) for frame in reader.read([0, 2])] == [(0, 0), (2, 2)]


LIES = {
    "garbage": 'def ready():\n    sys.stdout.write("hello\\n"); sys.stdout.flush()',
    "no line ends": 'def ready():\n    while True: sys.stdout.write("x" * 65536)',
    "bytes": 'def ready():\n    os.write(1, bytes(range(128, 256)) + b"\\n")',
    "nesting": 'def ready():\n    os.write(1, b"[" * 60000 + b"\\n")',
    "a list": "def ready():\n    send([])",
    "not ready": "def ready():\n    send({})",
    "exit": "def ready():\n    sys.exit(3)",
    "no info": "def info():\n    send({})",
    "info is no object": 'def info():\n    send({"info": 3})',
    "half the times": 'def info():\n    send({"info": facts()}, times()[:9]); sys.exit()',
    "times that fall": 'def times():\n    return struct.pack("3d", 0.0, 2.0, 1.0)',
    "times without number": 'def times():\n    return struct.pack("3d", 0.0, float("nan"), 1.0)',
    "endless times": 'def times():\n    return struct.pack("3d", 0.0, 1.0, float("inf"))',
    "an error without a reason": 'def info():\n    send({"error": {"message": "x"}})',
    "an error with an odd reason": 'def info():\n    send({"error": {"reason": ["crashed"], "message": "x"}})',
    "an error that is text": 'def info():\n    send({"error": "x"})',
    "an error with a number": 'def info():\n    send({"error": {"reason": "codec", "message": 5}})',
    "damage": 'def end():\n    send({"end": True, "damage": [1, -2, []]})',
    "short damage": 'def end():\n    send({"end": True, "damage": [1]})',
    "many notes": 'def end():\n    send({"end": True, "damage": [0, 0, ["x"] * 65]})',
    "notes of numbers": 'def end():\n    send({"end": True, "damage": [0, 0, [7]]})',
    "neither frame nor end": "def end():\n    send({})",
    "another frame": 'def frame(index):\n    send({"frame": [1, 1.0, 4, 6]}, bytes(72))',
    "a frame too many": "def end():\n    frame(2)",
    "a frame with true": 'def frame(index):\n    send({"frame": [False, 1.0, 4, 6]}, bytes(72))',
    "a frame of text": 'def frame(index):\n    send({"frame": "1234"}, bytes(72))',
    "a short frame": 'def frame(index):\n    send({"frame": [index, 1.0, 4, 6]}, bytes(71)); sys.exit()',
    "a large frame": 'def frame(index):\n    send({"frame": [index, 1.0, 2**16, 2**16]}, bytes(72))',
    "a frame without height": 'def frame(index):\n    send({"frame": [index, 1.0, 0, 6]})',
    "a negative frame": 'def frame(index):\n    send({"frame": [index, 1.0, -4, -6]}, bytes(72))',
    "an endless time": 'def frame(index):\n    send({"frame": [index, 10**400, 4, 6]}, bytes(72))',
    "a time of text": 'def frame(index):\n    send({"frame": [index, "1", 4, 6]}, bytes(72))',
    **{
        f"{name} {value}": f"honest = facts\ndef facts():\n    return {{**honest(), {name!r}: {value}}}"
        for name, value in [
            ("num_frames", 10**12),
            ("num_frames", 0),
            ("num_frames", True),
            ("num_frames", 2.0),
            ("height", "'4'"),
            ("height", 10**30),
            ("width", -6),
            ("duration", "float('nan')"),
            ("duration", -1.0),
            ("duration", 1e30),
            ("duration", 10**400),
            ("fps", "float('inf')"),
            ("fps", "[]"),
            ("rotation", 45),
            ("rotation", "{}"),
            ("codec", 3),
            ("container", "['mp4']"),
        ]
    },
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_decoder_is_a_crash_and_soon(fake, lie):
    start = time.monotonic()
    with pytest.raises(VideoError) as caught, fake(LIES[lie]) as reader:
        list(reader.read([0]))
    assert caught.value.reason == "crashed" and caught.value.source == "'clip'", caught.value
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)


def test_random_answers_end_in_a_video_error_or_in_frames(fake):
    """The header of one answer in three is changed at a random place."""
    junk = [None, True, -1, 0, 7, 2**40, 10**400, 0.5, 1e308, "", "x" * 1000, "\x1b[2J\n", [], [[]], {}, {"a": 1}]
    change = """
import random
choose, junk, honest = random.Random({seed}), json.loads({junk!r}), send
def change(value):
    if isinstance(value, dict) and value and choose.random() < 0.9:
        name = choose.choice(list(value))
        return {{**value, name: change(value[name])}}
    if isinstance(value, list) and value and choose.random() < 0.9:
        place = choose.randrange(len(value))
        return [change(item) if number == place else item for number, item in enumerate(value)]
    return choose.choice(junk)
def send(header, payload=b""):
    honest(header if "ready" in header or choose.random() < 0.6 else change(header), payload)
"""
    reasons = set()
    for seed in range(25):
        result = outcome(
            lambda seed=seed: collect(fake(change.format(seed=seed, junk=json.dumps(junk)), max_seconds=0.5))
        )
        reasons.add(result[0] if isinstance(result[0], str) else "frames")
    assert {"crashed", "frames"} <= reasons <= {"crashed", "frames", "timeout"}


def test_what_an_error_says_is_cut_to_one_printable_line(fake):
    text = json.dumps({"reason": "codec", "message": "\x1b[2J\nbad" * 500, "hint": None})
    with pytest.raises(VideoError) as caught:
        fake(f'def info():\n    send({{"error": json.loads({text!r})}})')
    assert caught.value.reason == "codec" and len(str(caught.value)) == 500 and str(caught.value).isprintable()


# ---- what must not stay


def open_and_close(fake):
    fake().close()


def open_twice_closed(fake):
    reader = fake()
    reader.close()
    reader.close()


def open_and_forget(fake):
    fake()


def abandon_a_read(fake):
    next(fake().read([0, 1, 2]))


def fail_to_open(fake):
    with pytest.raises(VideoError):
        fake("def info():\n    send({})")


@LINUX
@pytest.mark.parametrize("way", [open_and_close, open_twice_closed, open_and_forget, abandon_a_read, fail_to_open])
def test_no_process_and_no_descriptor_stays(fake, monkeypatch, way):
    started = []
    start = isolation_elva._start_worker
    monkeypatch.setattr(isolation_elva, "_start_worker", lambda file: started.append(start(file)) or started[-1])
    way(fake)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        way(fake)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(started) == 11 and all(process.returncode is not None for process in started)
    assert not any(is_alive(process.pid) for process in started)


@LINUX
def test_an_interrupt_in_the_middle_of_an_answer_ends_the_process(clips, monkeypatch):
    def interrupt(self, array):
        raise KeyboardInterrupt

    reader = IsolatedReader(clips["mp4"], "'clip'")
    monkeypatch.setattr(isolation_elva._Pipes, "fill", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(reader.read([0]))
    assert not is_alive(reader._process.pid)
    with pytest.raises(VideoError, match="has ended"):
        list(reader.read([0]))


def test_closing_in_another_thread_wakes_who_waits(fake):
    reader = fake("def frame(index):\n    time.sleep(60)")
    timer = threading.Timer(0.2, reader.close)
    timer.start()
    with pytest.raises(VideoError):
        list(reader.read([0]))
    timer.join()


@LINUX
def test_a_reader_outlives_the_thread_that_made_it(clips):
    made = []
    thread = threading.Thread(target=lambda: made.append(IsolatedReader(clips["mp4"], "'clip'")))
    thread.start()
    thread.join()
    assert wait_until(lambda: not is_alive(f"self/task/{thread.native_id}"))
    with made[0] as reader:
        assert [frame.index for frame in reader.read([2, 3])] == [2, 3]


@LINUX
def test_the_decoder_dies_with_its_parent(clips):
    code = f"""
import os, runpy, signal, sys, types
sys.path[:] = {sys.path!r}
package = types.ModuleType("elva_hf")
package.__path__ = [{str(WORKER.parent)!r}]
sys.modules["elva_hf"] = package
from elva_hf.isolation_elva import IsolatedReader
reader = IsolatedReader({clips["mp4"]!r}, "clip")
os.kill(reader._process.pid, signal.SIGSTOP)  # it cannot even notice that its pipes close
print(reader._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False).stdout)
    status = Path(f"/proc/{pid}/status")
    assert wait_until(lambda: not status.exists() or "\nState:\tZ" in status.read_text())


def in_a_fork(path, inherited, answers):
    with pytest.raises(VideoError, match="another process"):
        list(inherited.read([0]))
    inherited.close()
    answers.send([frame.index for frame in IsolatedReader(path, "'clip'").read([1, 5])])


@LINUX
def test_a_fork_opens_its_own_and_leaves_its_parents_alone(clips):
    receiver, sender = multiprocessing.Pipe(False)
    with IsolatedReader(clips["mp4"], "'clip'") as reader:
        child = multiprocessing.get_context("fork").Process(target=in_a_fork, args=(clips["mkv"], reader, sender))
        child.start()
        assert receiver.poll(10) and receiver.recv() == [1, 5]
        child.join()
        assert child.exitcode == 0 and [frame.index for frame in reader.read([4])] == [4]
