"""The decoding and processor benchmarks run whole at their smallest size; and reading takes no more work than it must.

Work is counted (packets, frames, seeks), not timed, so that these guards hold on any machine.
"""

import json
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elva_hf import ElvaVideoProcessor
from elva_hf.decoding_elva import open_reader

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
FIELDS = ("kind", "command", "device", "commit", "date", "python", "torch", "transformers", "versions", "peer_versions")


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import decoding
        import encoding
        import measuring
        import numbered_clips
        import processors
        import reading

        patch.setattr(measuring, "run_in_fresh_process", lambda function, *args: function(*args))
        yield SimpleNamespace(
            decoding=decoding,
            encoding=encoding,
            measuring=measuring,
            numbered_clips=numbered_clips,
            processors=processors,
            reading=reading,
        )


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder for clips that several tests read."""
    return tmp_path_factory.mktemp("clips")


def run_script(script, clips, folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        argv = [f"benchmarks/{script.__name__}.py", "--size", "tiny", "--rounds", "1", *options]
        patch.setattr(sys, "argv", [*argv, "--clips", str(clips), "--out", str(folder)])
        script.main()
    return {
        "json": json.loads((folder / f"{script.__name__}.json").read_text()),
        "markdown": (folder / f"{script.__name__}.md").read_text(),
    }


@pytest.fixture(scope="module")
def read(scripts, clips, tmp_path_factory):
    readers = "elva-hf+PyAV, every frame decoded+torchcodec"
    options = ("--tasks", "minute, few+hour", "--readers", readers)
    return run_script(scripts.decoding, clips, tmp_path_factory.mktemp("read"), *options)


@pytest.fixture(scope="module")
def encoded(scripts, clips, tmp_path_factory):
    return run_script(scripts.processors, clips, tmp_path_factory.mktemp("encoded"), "--processors", "ELVA")


def row(result, **wanted):
    found = [row for row in result["json"]["rows"] if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, wanted
    return found[0]


@pytest.mark.parametrize("name", ["read", "encoded"])
def test_a_result_says_that_it_is_measured_and_with_what(name, request):
    result = request.getfixturevalue(name)
    for field in FIELDS:
        assert result["json"][field], field
    assert result["json"]["kind"] == "measured"
    assert result["json"]["device"] in result["markdown"]
    assert result["json"]["versions"]["av"] in result["markdown"]
    assert platform.node() not in json.dumps(result)


def test_every_frame_that_we_read_is_the_frame_asked_for(read):
    for task in ("minute, few", "hour"):
        ours = row(read, task=task, reader="elva-hf")
        assert ours["exact"]
        assert ours["kind"] == "measured"
        assert ours["seconds"]["min"] > 0
        assert ours["seconds_ratio"] == 1
    assert row(read, task="minute, few", reader="elva-hf")["num_frames"] == 4
    assert row(read, task="hour", reader="elva-hf")["num_frames"] == 8


def test_what_is_not_measured_says_from_what_it_is_derived(read):
    whole = row(read, task="hour", reader="PyAV, every frame decoded")
    part = row(read, task="minute, few", reader="PyAV, every frame decoded")
    assert whole["kind"] == "derived"
    assert whole["basis"] == "3 times 'minute, few'"
    assert whole["seconds"]["min"] == pytest.approx(3 * part["seconds"]["min"])
    assert whole["basis"] in read["markdown"]


def test_a_reader_that_is_not_there_is_listed_with_the_reason(read):
    absent = row(read, task="hour", reader="torchcodec")
    if "seconds" in absent:
        pytest.skip("torchcodec is installed here")
    assert absent["unavailable"] == "ModuleNotFoundError: No module named 'torchcodec'"
    assert absent["unavailable"] in read["markdown"]
    claims = [claim for claim in read["json"]["claims"] if claim["claim"].startswith("CPU of torchcodec")]
    assert {claim["holds"] for claim in claims} == {None}


def test_the_tables_are_made_from_the_numbers(scripts, read, encoded):
    assert scripts.decoding.as_markdown(read["json"]) == read["markdown"]
    assert scripts.processors.as_markdown(encoded["json"]) == encoded["markdown"]
    changed = json.loads(json.dumps(read["json"]))
    changed["rows"][0]["exact"] = False
    assert "WRONG FRAMES" in scripts.decoding.as_markdown(changed)


def test_the_published_tables_are_made_from_the_published_numbers(scripts):
    for script in (scripts.decoding, scripts.processors):
        path = scripts.measuring.RESULTS / f"{script.__name__}.json"
        assert path.exists(), f"run: python benchmarks/{path.stem}.py"
        facts = json.loads(path.read_text())
        assert all(facts[field] for field in FIELDS)
        assert facts["setting"]["size"] == "full"
        assert all(
            row.get("kind") in ("measured", "derived") or row.get("unavailable") or row.get("failed")
            for row in facts["rows"]
        )
        assert path.with_suffix(".md").read_text() == script.as_markdown(facts)


def test_every_published_reading_of_ours_is_exact(scripts):
    facts = json.loads((scripts.measuring.RESULTS / "decoding.json").read_text())
    ours = [row for row in facts["rows"] if row["reader"].startswith("elva-hf")]
    assert len(ours) > len(facts["setting"]["tasks"])
    assert all(row["exact"] for row in ours)


def test_the_model_inputs_are_counted(encoded):
    # 720p at longest edge 112: 2 x 4 patches of 28 pixels; <FRAME> and two <LINE>
    ours = row(encoded, processor="ELVA")
    assert (ours["num_frames"], ours["num_pixels"], ours["num_visual_tokens"]) == (4, 4 * 56 * 112, 4 * 11)
    stages = {name: figure["median"] for name, figure in ours["stages"].items()}
    assert sum(stages.values()) == pytest.approx(ours["seconds"]["median"])
    assert stages["decode"] > stages["resize"] > 0


def test_the_fastest_reader_that_is_wrong_does_not_count(scripts):
    def one(reader, seconds, exact):
        return {"task": "hour", "reader": reader, "seconds": {"min": seconds}, "exact": exact}

    rows = [one("elva-hf", 2.0, True), one("decord", 1.0, False), one("decord, 1 thread", 3.0, True)]
    setting = scripts.decoding.Setting("full", 1, False, ("hour",), tuple(scripts.reading.READERS))
    claims = {claim["claim"]: claim for claim in scripts.decoding.make_claims(setting, rows)}
    assert claims["CPU of decord / ours, hour"]["figure"] == 1.5
    assert claims["CPU of decord / ours, hour"]["holds"] is True
    assert claims["CPU of torchcodec / ours, hour"]["holds"] is None


def test_a_wrong_frame_or_a_wrong_time_is_noticed(scripts, clips, monkeypatch):
    path = make_clip(scripts, clips, seconds=2, height=72, width=128, gop=12)
    job = {"reader": "late", "path": str(path), "warm_up": str(path), "size": None, "num_encoded": 60, "fps": 30}

    def late(frames_late, seconds_late):
        def read(path, indices, size):
            with open_reader(path) as reader:
                frames = list(reader.read([index + frames_late for index in indices]))
            times = [index / 30 + seconds_late for index in indices]
            return scripts.reading.Reading([frame.pixels for frame in frames], times)

        return read

    outcomes = []
    for frames_late, seconds_late in ((0, 0.0), (1, 0.0), (0, 0.1)):
        monkeypatch.setitem(
            scripts.reading.READERS, "late", (late, {"frames_late": frames_late, "seconds_late": seconds_late})
        )
        outcomes.append(scripts.reading.run({**job, "indices": [3, 31, 50]})["exact"])
    assert outcomes == [True, False, False]


@pytest.mark.parametrize(("height", "width"), [(72, 128), (180, 320), (112, 196)])
def test_the_number_of_a_frame_can_be_read_at_any_size(scripts, height, width):
    for number in (0, 1, 1799, 40_000, 2**16 - 1):
        luma = np.full((height, width), 120, np.uint8)
        scripts.numbered_clips._paint_number(luma, number)
        assert scripts.reading.read_number(np.repeat(luma[..., None], 3, 2)) == number


@NEEDS_PROC
def test_the_cost_of_a_reading_is_its_own(scripts):
    held = np.ones(30_000_000, np.uint8)
    with scripts.reading.Cost() as cost:
        np.ones(40_000_000, np.uint8).sum()
    assert held[0] == 1
    assert 38e6 <= cost.figures["peak_bytes"] < 60e6
    assert 0 < cost.figures["seconds"] < 5


def test_stages_count_what_they_call_once(scripts, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(scripts.encoding, "cpu_seconds", lambda: next(clock))
    stages = scripts.encoding.Stages()
    owner = SimpleNamespace(inner=lambda: iter("ab"))
    owner.outer = lambda: list(owner.inner())
    stages.time(owner, "inner", "decode")
    stages.time(owner, "outer", "patchify")
    assert owner.outer() == ["a", "b"]
    assert stages.seconds == {"decode": 4, "resize": 0, "patchify": 5}  # the call and three steps; the ticks between


def test_sizes_of_peers_come_as_near_as_they_can(scripts):
    # the whole numbers of 28 or 32 pixels that Qwen's rounding down gives for 252 x 448
    for factor, expected in ((28, (252, 448)), (32, (256, 448))):
        area = scripts.encoding.nearest_area(252 * 448, factor)
        scale = (area / (720 * 1280)) ** 0.5
        assert tuple(int(side * scale / factor) * factor for side in (720, 1280)) == expected


# Work, counted.


def make_clip(scripts, folder, **spec):
    return scripts.numbered_clips.make_clip(folder, scripts.numbered_clips.ClipSpec(**spec))


@pytest.fixture(scope="module")
def long_clip(scripts, clips):
    """Ten times 20 s, a key frame every 250 frames or fewer."""
    return make_clip(scripts, clips, seconds=20, height=72, width=128, gop=250, repeats=10)


def spread_out(count, num_frames):
    return [(2 * part + 1) * num_frames // (2 * count) for part in range(count)]


def read_counted(path, indices):
    """What was read, and the reader's work before and for it."""
    with open_reader(path) as reader:
        looked = (reader.work.packets, reader.work.frames)
        numbers = [(frame.index, round(30 * frame.time)) for frame in reader.read(indices)]
        assert numbers == [(index, index) for index in indices]
        return looked, reader.work


def frames_from_key_frames(indices, keys):
    """Frames from the key frame before each of `indices` up to it, each counted once."""
    needed = set()
    for index in indices:
        needed.update(range(max(key for key in keys if key <= index), index + 1))
    return len(needed)


def test_looking_at_a_long_mp4_reads_a_handful_of_its_packets(long_clip):
    (packets, frames), _ = read_counted(long_clip, [5999])
    assert packets <= 16
    assert frames <= 2


def test_frames_of_a_long_clip_decode_only_from_their_key_frames_and_skip_what_none_refers_to(scripts, long_clip):
    indices = spread_out(64, 6000)
    _, work = read_counted(long_clip, indices)
    keys = [600 * repeat + key for repeat in range(10) for key in (0, 250, 500)]
    needed = frames_from_key_frames(indices, keys)
    assert needed < 0.9 * 6000
    spec = scripts.numbered_clips.ClipSpec(seconds=20, height=72, width=128, gop=250, repeats=10)
    unreferenced = scripts.numbered_clips.describe_clip(long_clip, spec)["unreferenced_share"]
    assert unreferenced > 0.1
    assert work.packets < needed + 2 * 64
    assert work.frames < (1 - unreferenced + 0.03) * needed + 64
    assert work.converted == 64
    assert work.seeks <= 30
    assert work.bad_packets == 0


def test_a_few_frames_of_a_short_gop_cost_a_few_gops(scripts, clips):
    path = make_clip(scripts, clips, seconds=20, height=72, width=128, gop=12)
    indices = spread_out(8, 600)
    _, work = read_counted(path, indices)
    needed = frames_from_key_frames(indices, range(0, 600, 12))
    assert work.frames <= needed
    assert work.packets <= needed + 4 * 8
    assert work.seeks <= 8
    assert work.converted == 8


def test_without_b_frames_no_frame_is_decoded_twice(scripts, clips):
    path = make_clip(scripts, clips, seconds=20, height=72, width=128, gop=60, b_frames=False)
    indices = spread_out(32, 600)
    _, work = read_counted(path, indices)
    assert work.frames <= frames_from_key_frames(indices, range(0, 600, 60)) + 4
    assert work.converted == 32


class Operators(TorchDispatchMode):
    """Names of torch's operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_frames_are_cut_into_patches_without_waking_the_threads_of_torch(scripts, clips):
    """Threads that wake for each frame spin until the next: that once cost more than a third of a call."""
    path = make_clip(scripts, clips, seconds=2, height=72, width=128, gop=12)
    processor = ElvaVideoProcessor(longest_edge=56)
    with Operators() as operators:
        patches = processor([str(path)], num_frames=8)["pixel_values_videos"]
    assert torch.is_tensor(patches)
    assert sum("bicubic" in name for name in operators.names) == 8
    assert not {"add_", "sub_", "mul_", "div_", "copy_", "add", "sub", "mul", "div"} & set(operators.names)
