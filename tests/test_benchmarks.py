"""benchmarks/: the script of the prefill figures runs whole at its smallest size, and its instruments measure."""

import json
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_elva import tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
SCHEDULES = ("none", "four halvings", "paper", "table5")


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import measuring
        import prefill
        import random_elva

        yield SimpleNamespace(measuring=measuring, prefill=prefill, random_elva=random_elva)


def run_prefill(scripts, folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        argv = ["benchmarks/prefill.py", "--size", "tiny", "--processes", "1", "--out", str(folder), *options]
        patch.setattr(sys, "argv", argv)
        scripts.prefill.main()


@pytest.fixture(scope="module")
def result(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    run_prefill(scripts, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["prefill-cpu.json", "prefill-cpu.md"]
    return {
        "json": json.loads((folder / "prefill-cpu.json").read_text()),
        "markdown": (folder / "prefill-cpu.md").read_text(),
    }


def rows(result, part, **wanted):
    found = [row for row in result["json"][part] if all(row[key] == value for key, value in wanted.items())]
    assert found, (part, wanted)
    return found


def test_a_result_says_that_it_is_measured_and_with_what(result):
    facts = result["json"]
    assert facts["kind"] == "measured"
    assert facts["command"].startswith("python benchmarks/prefill.py --size tiny")
    assert "CPU" in facts["device"]
    assert platform.node() not in json.dumps(facts)
    assert facts["torch"] == torch.__version__
    for key in ("commit", "date", "transformers", "python"):
        assert facts[key], key
        assert str(facts[key]) in result["markdown"] or key == "python"


def test_every_schedule_is_measured_at_both_resolutions(result):
    assert [(row["resolution"], row["schedule"]) for row in result["json"]["schedules"]] == [
        (resolution, schedule) for resolution in ("high", "hybrid") for schedule in SCHEDULES
    ]
    for row in result["json"]["schedules"]:
        assert row["seconds"]["min"] > 0
        assert row["seconds_ratio"] > 0


def test_ratio_schedules_keep_the_tokens_that_geometry_says(result):
    # 8 frames of 4x4 patches: 128 patches in 16 tubes; 40 <FRAME> and <LINE>, 12 text tokens
    [halvings] = rows(result, "schedules", schedule="four halvings", resolution="high")
    assert halvings["input_tokens"] == 180
    assert halvings["tokens_per_layer"] == [[52 + n] for n in (128, 64, 64, 32, 32, 16, 16, 16)]
    [none] = rows(result, "schedules", schedule="none", resolution="hybrid")
    assert none["tokens_per_layer"] == 8 * [[2 * 21 + 6 * 7 + 12]]


def test_thresholds_merge_something_but_not_everything(result):
    for resolution in ("high", "hybrid"):
        [row] = rows(result, "schedules", schedule="paper", resolution=resolution)
        assert row["input_tokens"] > row["tokens_per_layer"][1][0] > row["tokens_per_layer"][-1][0] > 52


def test_ratios_are_to_no_merging_at_high_resolution(result):
    [base] = rows(result, "schedules", schedule="none", resolution="high")
    assert base["seconds_ratio"] == base["kv_bytes_ratio"] == 1
    for row in result["json"]["schedules"]:
        kept = sum(map(sum, row["tokens_per_layer"])) / sum(map(sum, base["tokens_per_layer"]))
        assert row["kv_bytes_ratio"] == pytest.approx(kept)


def test_a_batch_keeps_what_its_clips_keep_alone(result):
    for schedule in ("none", "paper"):
        alone, batch, padded = rows(result, "batches", schedule=schedule)
        assert [alone["run"], batch["run"], padded["run"]] == ["alone", "batch", "left-padded"]
        assert alone["seconds_ratio"] == 1
        assert alone["tokens_per_layer"] == batch["tokens_per_layer"] == padded["tokens_per_layer"]
    assert len(set(alone["tokens_per_layer"][0])) == 4, "the clips differ in length"


def test_the_merge_steps_are_counted_and_timed(result):
    steps = {row["schedule"]: row["steps"] for row in result["json"]["merge_share"]}
    assert steps == {"four halvings": 4, "paper": 3, "table5": 3}
    for row in result["json"]["merge_share"]:
        assert 0 < row["share"]["median"] < 0.5
        assert row["merge_seconds"]["median"] < row["seconds"]["median"]


def test_the_mlp_runs_whole_and_in_chunks(result):
    """How much memory that saves is for the full size: at this one it drowns in the allocator's own."""
    whole, chunks = result["json"]["mlp"]
    assert (whole["run"], chunks["run"]) == ("whole", "in chunks")
    assert chunks["rows_at_a_time"] < whole["rows_at_a_time"] == whole["tokens"]


@NEEDS_PROC
def test_every_run_on_linux_has_a_peak(result):
    for row in [*result["json"]["schedules"], *result["json"]["batches"], *result["json"]["mlp"]]:
        assert row["peak_bytes"]["median"] > 0


def test_the_tables_are_made_from_the_numbers(scripts, result):
    assert scripts.prefill.as_markdown(result["json"]) == result["markdown"]
    changed = json.loads(json.dumps(result["json"]))
    changed["schedules"][1]["seconds_ratio"] = 0.123
    assert "| four halvings | high | 180 | 68 | 0.54 | 0.12 |" in scripts.prefill.as_markdown(changed)


def test_the_published_tables_are_made_from_the_published_numbers(scripts):
    published = sorted(scripts.measuring.RESULTS.glob("prefill-*.json"))
    assert published, "run: python benchmarks/prefill.py"
    for path in published:
        facts = json.loads(path.read_text())
        assert facts["kind"] == "measured"
        assert facts["setting"]["size"] != "tiny"
        assert path.with_suffix(".md").read_text() == scripts.prefill.as_markdown(facts)


@pytest.mark.gpu
def test_the_same_script_runs_on_a_gpu(scripts, tmp_path):
    run_prefill(scripts, tmp_path, "--device", "cuda")
    facts = json.loads((tmp_path / "prefill-cuda.json").read_text())
    assert facts["device"] == torch.cuda.get_device_name()
    assert all(row["peak_bytes"]["median"] > 0 for row in facts["schedules"])


def test_places_of_a_clip_are_as_similar_as_it_says(scripts):
    config = scripts.random_elva.make_size("tiny").config
    clip = scripts.random_elva.Clip(grids=400 * ((4, 4),), text_tokens=4, similarity=(0.2, 1.0))
    frames = clip.pixels(config, torch.float32).unflatten(0, (400, 16))
    assert frames.std() == pytest.approx(1, abs=0.02)
    similarity = torch.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    assert similarity.mean() == pytest.approx(0.6, abs=0.02)
    assert (similarity > 0.6).float().mean() == pytest.approx(0.5, abs=0.03)


def test_low_resolution_frames_resemble_low_resolution_frames(scripts):
    config = scripts.random_elva.make_size("tiny").config
    clip = scripts.random_elva.Clip(((4, 4), (2, 2), (4, 4), (2, 2)), text_tokens=4, similarity=(1.0, 1.0))
    first_high, first_low, second_high, second_low = clip.pixels(config, torch.float32).split((16, 4, 16, 4))
    assert torch.equal(first_high, second_high)
    assert torch.equal(first_low, second_low)


def test_left_padding_at_full_length_is_the_stock_decoder(scripts):
    decoder = tiny_model().model.language_model
    hidden, lengths = torch.randn(3, 7, 32), [4, 7, 6]
    mask = torch.tensor([(7 - length) * [0] + length * [1] for length in lengths])
    decoder.set_attn_implementation("sdpa")
    with torch.no_grad():
        ours, cache = scripts.prefill.left_padded_prefill(decoder, hidden, 2 * [lengths])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        stock = decoder(inputs_embeds=hidden, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(ours[mask.bool()], stock.last_hidden_state[mask.bool()])
    assert [layer.keys.shape[-2] for layer in cache.layers] == [7, 7]


def test_left_padding_is_as_wide_as_the_longest_row_that_merging_leaves(scripts):
    decoder = tiny_model().model.language_model
    decoder.set_attn_implementation("sdpa")
    hidden, cache = scripts.prefill.left_padded_prefill(decoder, torch.randn(2, 9, 32), [[9, 5], [3, 5]])
    assert hidden.shape == (2, 5, 32)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [9, 5]


@NEEDS_PROC
def test_the_meter_sees_the_peak_and_not_what_was_there(scripts):
    held = torch.ones(30_000_000)
    torch.ones(50_000_000).sum()  # an earlier peak, let go
    with scripts.measuring.Meter("cpu") as meter:
        torch.ones(10_000_000).sum()
    assert held[0] == 1
    assert 38e6 <= meter.peak_bytes < 60e6
    assert meter.seconds > 0


def test_a_meter_without_memory_leaves_the_outer_one_alone(scripts):
    with scripts.measuring.Meter("cpu") as outer:
        torch.ones(10_000_000).sum()
        with scripts.measuring.Meter("cpu", memory=False) as inner:
            pass
    assert inner.peak_bytes is None
    assert outer.wall_seconds > inner.wall_seconds
    assert outer.peak_bytes is None or outer.peak_bytes >= 38e6


def test_every_call_has_a_process_of_its_own(scripts):
    numbers = {scripts.measuring.run_in_fresh_process(os.getpid) for _ in range(2)} | {os.getpid()}
    assert len(numbers) == 3


def test_ratios_are_taken_round_by_round(scripts):
    drifting, base = [1.0, 6.0, 2.0], [1.0, 3.0, 4.0]
    assert scripts.measuring.ratio(drifting, base) == 1.0
    assert scripts.measuring.spread(drifting) == {"median": 2.0, "min": 1.0, "max": 6.0}
    assert scripts.measuring.ratio([None, None], [1, 2]) is None
    assert scripts.measuring.spread([None]) is None


def test_tables_keep_small_figures_readable(scripts):
    table = scripts.measuring.markdown_table(["a", "b"], [[0.01234, None], [123.456, "x"], [0.5, 7]])
    assert table.splitlines()[2:] == ["| 0.012 | - |", "| 123.5 | x |", "| 0.50 | 7 |"]


@pytest.mark.parametrize("out", [["--out", "/some/where"], ["--out=/some/where"], []])
def test_a_command_in_a_result_names_no_folder_of_the_one_who_ran_it(scripts, out):
    words = ["benchmarks/prefill.py", "--only", "a", "b", *out, "--size", "tiny"]
    assert scripts.measuring.command_line(words) == "python benchmarks/prefill.py --only a b --size tiny"
