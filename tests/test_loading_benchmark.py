"""The loading benchmark runs whole at its smallest size, and its tables are made from its numbers."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TASKS = "stage 1, images+stage 2, 360p, 8 questions"
FIELDS = ("kind", "command", "device", "commit", "date", "python", "torch", "transformers", "versions")


@pytest.fixture(scope="module")
def scripts():
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import loading
        import measuring

        for module in (loading, measuring):
            patch.setattr(module, "run_in_fresh_process", lambda function, *args: function(*args))
        yield SimpleNamespace(loading=loading, measuring=measuring)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    options = ["--size", "tiny", "--rounds", "1", "--workers", "0+1", "--tasks", TASKS]
    with pytest.MonkeyPatch.context() as patch:
        argv = ["benchmarks/loading.py", *options, "--clips", str(folder), "--out", str(folder)]
        patch.setattr(sys, "argv", argv)
        scripts.loading.main()
    return {
        "json": json.loads((folder / "loading.json").read_text()),
        "markdown": (folder / "loading.md").read_text(),
        "folder": folder,
    }


def test_a_result_says_what_is_measured_and_what_is_derived(result):
    facts = result["json"]
    assert all(facts[field] for field in FIELDS)
    assert {row["kind"] for row in facts["rows"]} == {"measured"}
    assert {row["kind"] for row in facts["derived"]} == {"derived"}
    assert "Derived, not measured" in result["markdown"]
    for row in facts["rows"]:
        assert set(row["samples_per_second"]) == {"0", "1"}
        assert all(figure["min"] > 0 for figure in row["samples_per_second"].values())
        assert row["pixel_seconds"]["median"] < row["cpu_seconds"]["median"] * 2


def test_the_samples_have_the_shape_of_their_stage(result):
    image, video = result["json"]["rows"]
    patches = 6 * 11  # 320x180 is not enlarged to the longest edge of 448
    assert image["num_bytes"] == patches * 3 * 28**2 * 4
    assert video["num_bytes"] == 4 * image["num_bytes"]
    assert video["num_tokens"] > 4 * (patches + 6 + 1) + 8 * 20


def test_what_a_gpu_would_take_follows_from_the_measured_time(scripts, result):
    for line in result["json"]["derived"]:
        (row,) = [row for row in result["json"]["rows"] if row["task"] == line["task"]]
        assert line["cores_per_gpu"] == pytest.approx(line["gpu_samples_per_second"] * row["cpu_seconds"]["median"])
        best = max(figure["median"] for figure in row["samples_per_second"].values())
        assert line["fed_share"] == pytest.approx(best / line["gpu_samples_per_second"])
    small, large = result["json"]["derived"][:2]
    assert 3 < small["gpu_samples_per_second"] / large["gpu_samples_per_second"] < 7


def test_a_batch_of_other_frames_is_noticed(scripts, result):
    task = scripts.loading.make_tasks("tiny")["stage 2, 360p"]
    processor = scripts.loading.make_processor()
    for count, fails in ((4, False), (3, True)):
        ids = torch.tensor([[processor.frame_token_id] * count] * scripts.loading.BATCH_SIZE)
        if fails:
            with pytest.raises(RuntimeError, match="6 frames"):
                scripts.loading.check({"input_ids": ids}, task, processor)
        else:
            scripts.loading.check({"input_ids": ids}, task, processor)


def test_the_tables_are_made_from_the_numbers(scripts, result):
    assert scripts.loading.as_markdown(result["json"]) == result["markdown"]


def test_the_published_tables_are_made_from_the_published_numbers(scripts):
    path = scripts.measuring.RESULTS / "loading.json"
    assert path.exists(), "run: python benchmarks/loading.py"
    facts = json.loads(path.read_text())
    assert all(facts[field] for field in FIELDS)
    assert facts["setting"]["size"] == "full"
    assert path.with_suffix(".md").read_text() == scripts.loading.as_markdown(facts)
