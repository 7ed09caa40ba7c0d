"""Read some frames of a clip once, with one reader, and print what it cost as JSON; `decoding.py` runs it.

Every run is a process of its own, in the Python that has the reader: this file needs numpy and that reader alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BITS = 16  # of the number in every frame of a clip: cells side by side along the upper edge, the lowest bit first
DARK, BRIGHT = 28, 228

_CLEAR_REFS = Path("/proc/self/clear_refs")


class Reading(NamedTuple):
    """What a reader hands over.

    Args:
        frames: Of any kind and layout that reader likes.
        times: Seconds of each frame, if the reader says.
    """

    frames: Any
    times: Sequence[float] | None = None


Read = Callable[[str, list[int], tuple[int, int] | None], Reading]
"""`(path, indices, (height, width) or None for the source's own)` -> the frames."""


# The readers. Each imports its library when it is chosen, and returns the function that is timed.


def ours(**options: Any) -> Read:
    """`elva_hf.decoding_elva`."""
    from elva_hf.decoding_elva import DecodingOptions, read_video
    from elva_hf.frames_elva import FramePlan

    def read(path: str, indices: list[int], size: tuple[int, int] | None) -> Reading:
        plan = FramePlan(tuple(indices), (True,) * len(indices), len(indices))
        video = read_video(
            path,
            lambda info: plan,
            lambda height, width, high: size or (height, width),
            options=DecodingOptions(**options),
        )
        return Reading(video.frames, video.times)

    return read


def transformers_pyav() -> Read:
    """`transformers.video_utils.load_video(backend="pyav")`."""
    import av  # noqa: F401 (imported at its first use otherwise)
    from transformers.video_utils import load_video

    def read(path: str, indices: list[int], size: tuple[int, int] | None) -> Reading:
        frames, _ = load_video(path, backend="pyav", sample_indices_fn=lambda metadata, **_: np.array(indices))
        return Reading(_resized(frames, size))

    return read


def pyav(convert_all: bool) -> Read:
    """A loop over every frame of the file, as found in examples."""
    import av

    def read(path: str, indices: list[int], size: tuple[int, int] | None) -> Reading:
        wanted = set(indices)
        with av.open(path) as container:
            frames = [
                pixels
                for index, frame in enumerate(container.decode(video=0))
                for pixels in ([frame.to_ndarray(format="rgb24")] if convert_all or index in wanted else [])
                if index in wanted
            ]
        return Reading(_resized(frames, size))

    return read


def decord(num_threads: int, own_resize: bool = False) -> Read:
    """`decord.VideoReader.get_batch`."""
    from decord import VideoReader

    def read(path: str, indices: list[int], size: tuple[int, int] | None) -> Reading:
        height, width = size if size and own_resize else (-1, -1)
        frames = VideoReader(path, num_threads=num_threads, width=width, height=height).get_batch(indices).asnumpy()
        return Reading(frames if own_resize else _resized(frames, size))

    return read


def torchcodec(seek_mode: str, own_resize: bool = False) -> Read:
    """`torchcodec.decoders.VideoDecoder.get_frames_at`."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read(path: str, indices: list[int], size: tuple[int, int] | None) -> Reading:
        transforms = [Resize(size)] if size and own_resize else None
        batch = VideoDecoder(path, seek_mode=seek_mode, transforms=transforms).get_frames_at(indices)
        frames = batch.data if own_resize else _resized(batch.data, size)
        return Reading(frames, batch.pts_seconds.tolist())

    return read


READERS: dict[str, tuple[Callable[..., Read], dict[str, Any]]] = {
    "elva-hf": (ours, {}),
    "elva-hf, 1 thread": (ours, {"threads": 1}),
    "elva-hf, isolated": (ours, {"isolate": True}),
    "transformers, pyav": (transformers_pyav, {}),
    "PyAV, every frame decoded": (pyav, {"convert_all": False}),
    "PyAV, every frame converted": (pyav, {"convert_all": True}),
    "decord": (decord, {"num_threads": 0}),
    "decord, 1 thread": (decord, {"num_threads": 1}),
    "decord, its own resize": (decord, {"num_threads": 0, "own_resize": True}),
    "torchcodec": (torchcodec, {"seek_mode": "exact"}),
    "torchcodec, approximate": (torchcodec, {"seek_mode": "approximate"}),
    "torchcodec, its own resize": (torchcodec, {"seek_mode": "exact", "own_resize": True}),
}

LIBRARIES = ("av", "decord", "torchcodec", "torch", "torchvision", "transformers", "numpy")


def _resized(frames: Iterable[Any], size: tuple[int, int] | None) -> Any:
    """Frames resized one by one as the processors of transformers do it: uint8, bicubic, antialiased."""
    if size is None:
        return frames
    import torch

    small = []
    for frame in frames:
        pixels = torch.as_tensor(frame)
        pixels = pixels.permute(2, 0, 1) if pixels.shape[-1] == 3 else pixels
        small.append(torch.nn.functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0])
    return small


def read_number(frame: np.ndarray) -> int:
    """The number painted in an `(H, W, 3)` frame of any size."""
    height, width = frame.shape[:2]
    top = height // 72
    columns = frame[top : max(height // 24, top + 1)].mean((0, 2))
    centres = (np.arange(BITS) + 0.5) * width / BITS
    half = width / BITS / 4
    cells = [columns[int(centre - half) : int(centre + half) + 1].mean() for centre in centres]
    return sum(int(cell > (DARK + BRIGHT) / 2) << place for place, cell in enumerate(cells))


def as_images(frames: Iterable[Any]) -> Iterator[np.ndarray]:
    """`(H, W, 3)` arrays from what any reader returns."""
    for frame in frames:
        pixels = np.asarray(frame)
        yield pixels if pixels.shape[-1] == 3 else pixels.transpose(1, 2, 0)


# What is measured: CPU time of this process and its children, wall time, resident memory.


class Cost:
    """Measures the block under `with`; `figures` has CPU and wall seconds and the bytes above what was held before."""

    def __init__(self, *, children: bool = False):
        self._children = children

    def __enter__(self) -> Cost:
        gc.collect()
        self._watch = _ChildrenWatch() if self._children else None
        self._held = _reset_peak()
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = {"seconds": cpu_seconds() - self._cpu, "wall_seconds": time.perf_counter() - self._wall}
        peak = None if self._held is None else _resident("self", "VmHWM") - self._held
        if peak is not None and self._watch is not None:
            peak += self._watch.stop()
        self.figures = {**seconds, "peak_bytes": peak}


class _ChildrenWatch:
    """Looks at the resident peaks of child processes every so often; a process that is gone cannot be asked."""

    def __init__(self) -> None:
        self._peaks: dict[str, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Sum of the peaks that were seen."""
        self._ended.set()
        self._thread.join()
        return sum(self._peaks.values())

    def _look(self) -> None:
        while not self._ended.wait(0.03):
            for task in Path("/proc/self/task").glob("*/children"):
                for child in task.read_text().split():
                    try:
                        self._peaks[child] = _resident(child, "VmHWM")
                    except (OSError, TypeError):
                        continue


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _reset_peak() -> int | None:
    if not _CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # VmHWM starts again from VmRSS
    return _resident("self", "VmRSS")


def _resident(process: str, field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[1])


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job: warm up on a small clip, read the frames under measurement, then check every number and time."""
    make, options = READERS[job["reader"]]
    try:
        read = make(**options)
    except (ImportError, OSError, RuntimeError) as error:  # torchcodec without FFmpeg: RuntimeError
        return {"unavailable": first_line(error)}
    size = tuple(job["size"]) if job["size"] else None
    try:
        read(job["warm_up"], [0, 1], size)
        with Cost(children="isolate" in options) as cost:
            reading = read(job["path"], job["indices"], size)
    except Exception as error:  # a reader that cannot read this clip is a result
        return {"failed": first_line(error)}
    numbers = [read_number(image) for image in as_images(reading.frames)]
    exact = numbers == [index % job["num_encoded"] for index in job["indices"]]
    if reading.times is not None:
        wanted = np.array(job["indices"]) / job["fps"]
        exact = exact and np.allclose(np.array(reading.times), wanted, atol=2e-3)  # webm rounds to milliseconds
    return {**cost.figures, "num_frames": len(numbers), "exact": bool(exact)}


def versions() -> dict[str, str]:
    """The libraries of this Python that matter here."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def first_line(error: Exception) -> str:
    """An error without traceback, and without the names of folders."""
    line = (str(error).strip() or "no message").splitlines()[0]
    return re.sub(r"(?:/[\w.+-]+)+/", "", f"{type(error).__name__}: {line}")[:160]


if __name__ == "__main__":
    print(json.dumps(versions() if sys.argv[1] == "versions" else run(json.loads(sys.argv[1]))))
