"""benchmarks/end_to_end.py: the script runs whole at its smallest size, and its stages are the whole."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import encoding
        import end_to_end
        import measuring
        import pipelines

        for module in (end_to_end, measuring):
            patch.setattr(module, "run_in_fresh_process", lambda function, *arguments: function(*arguments))
        patch.setattr(end_to_end, "time_elva", lambda: None)  # names functions of elva_hf for good: once, below
        yield SimpleNamespace(main=end_to_end, encoding=encoding, measuring=measuring, pipelines=pipelines)


@pytest.fixture(scope="module")
def result(scripts, tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("results"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        name_stages_for_now(patch, scripts.encoding)
        options = ["--size", "tiny", "--frames", "8", "--processes", "1", "--out", str(folder), "--clips", str(folder)]
        patch.setattr(sys, "argv", ["end_to_end.py", *options])
        scripts.main.main()
    torch.set_num_threads(threads)
    return {
        "json": json.loads((folder / "end-to-end-cpu.json").read_text()),
        "text": (folder / "end-to-end-cpu.md").read_text(),
    }


def name_stages_for_now(patch, encoding):
    """`time_elva()`, undone when the context ends."""
    from elva_hf import container_elva, decoding_elva, video_processing_elva

    reader, processor = container_elva.ContainerReader, video_processing_elva.ElvaVideoProcessor
    for owner, name in (
        (reader, "__init__"),
        (reader, "read"),
        (decoding_elva, "resize_frame"),
        (processor, "decode"),
    ):
        patch.setattr(owner, name, getattr(owner, name))
    encoding.time_elva()


def test_every_row_goes_through_every_stage(scripts, result):
    rows = result["json"]["rows"]
    assert [row["pipeline"] for row in rows] == list(scripts.main.ROWS)
    for row in rows:
        stages = {name: figure["median"] for name, figure in row["stages"].items()}
        assert tuple(stages) == scripts.main.STAGE_NAMES
        assert all(seconds > 0 for seconds in stages.values()), stages
        assert sum(stages.values()) == pytest.approx(row["seconds"]["median"])


def test_frames_have_the_tokens_of_table_5_at_that_size(result):
    plain, merged, hybrid = (row["tokens"] for row in result["json"]["rows"])
    text = plain - 8 * 21
    assert plain == merged and hybrid == 2 * 21 + 6 * 7 + text
    assert text == len("What happens in this video?") + 2


def test_at_full_size_frames_are_336_and_168_pixels(scripts):
    scale = scripts.pipelines.make_scale("7b")
    assert scripts.main.frame_options(scale, 32, hybrid=True) == {
        "num_high_res_frames": 8,
        "num_low_res_frames": 24,
        "longest_edge": 336,
        "low_res_longest_edge": 168,
        "patch_size": 28,
    }


def test_the_tables_are_made_from_the_numbers(scripts, result):
    assert scripts.main.as_markdown(result["json"]) == result["text"]
    changed = json.loads(json.dumps(result["json"]))
    changed["rows"][0]["stages"]["decode"]["median"] = 123.0
    assert "| 123.0 |" in scripts.main.as_markdown(changed)


def test_the_published_tables_are_made_from_the_published_numbers(scripts):
    for path in sorted(scripts.measuring.RESULTS.glob("end-to-end-*.json")):
        facts = json.loads(path.read_text())
        assert facts["kind"] == "measured" and facts["setting"]["size"] != "tiny"
        assert path.with_suffix(".md").read_text() == scripts.main.as_markdown(facts)


@pytest.mark.gpu
def test_the_same_script_runs_on_a_gpu(scripts, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        options = ["--size", "tiny", "--device", "cuda", "--frames", "8", "--processes", "1"]
        patch.setattr(sys, "argv", ["end_to_end.py", *options, "--out", str(tmp_path), "--clips", str(tmp_path)])
        scripts.main.main()
    assert (tmp_path / "end-to-end-cuda.json").exists()
