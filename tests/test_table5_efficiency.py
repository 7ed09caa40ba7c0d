"""benchmarks/table5_efficiency.py: every row runs at its smallest size, and what is counted is what runs.

Everything runs in the test's process; that each row has a process of its own is `measuring`'s, tested elsewhere.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = ("llava-all-logits", "llava", "llava-equal-tokens", "videollama3", "qwen2.5-vl")
GEMMA = ("gemma4-front-end", "gemma4-front-end-square", "gemma4")
ELVA = ("elva", "elva+merge", "elva+merge+hybrid")
ROWS = (*PEERS, *GEMMA, *ELVA)


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import measuring
        import peers
        import pipelines
        import table5_efficiency
        import table5_flops
        import table5_measuring
        import table5_report
        import table5_targets

        patch.setattr(measuring.gc, "collect", lambda: 0)  # takes most of the time in a process as full as this
        yield SimpleNamespace(
            measuring=measuring,
            peers=peers,
            pipelines=pipelines,
            main=table5_efficiency,
            flops=table5_flops,
            process=table5_measuring,
            report=table5_report,
            targets=table5_targets,
        )


def in_this_process(function, *arguments):
    return function(*arguments)


def run_script(scripts, folder, *options):
    """The script's exit status."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.main, "run_in_fresh_process", in_this_process)
        patch.setattr(scripts.measuring, "run_in_fresh_process", in_this_process)
        patch.setattr(sys, "argv", ["table5_efficiency.py", "--processes", "1", "--out", str(folder), *options])
        status = scripts.main.main()
    torch.set_num_threads(threads)
    return status


def read(folder, stem):
    return {"json": json.loads((folder / f"{stem}.json").read_text()), "text": (folder / f"{stem}.md").read_text()}


@pytest.fixture(scope="module")
def result(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    options = ["--size", "tiny", "--frames", "8", "--batch-sizes", "1", "2", "--new-tokens", "3"]
    assert run_script(scripts, folder, *options) == 0
    return read(folder, "table5-cpu")


@pytest.fixture(scope="module")
def tiny(scripts):
    return scripts.peers.make_pipelines(scripts.pipelines.make_scale("tiny"))


@pytest.fixture
def setting(scripts):
    return scripts.process.Setting(
        size="tiny",
        device="cpu",
        dtype="bfloat16",
        attention="sdpa",
        threads=1,
        processes=1,
        new_tokens=0,
        batch_sizes=(1,),
        batch_frames=(4,),
        merge_schedule="table5",
    )


def find(rows, **wanted):
    [row] = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


# What one run measures.


def test_every_row_is_measured(result):
    facts = result["json"]
    assert facts["kind"] == "measured" and facts["finished"]
    assert [row["pipeline"] for row in facts["rows"]] == list(ROWS)
    for row in facts["rows"]:
        assert "failed" not in row, row
        assert row["seconds"]["median"] > 0
        assert 0 < row["front_end_seconds"]["median"] < row["seconds"]["median"]
        assert row["floor_seconds"] > 0 and row["floor_bytes"] > row["weight_bytes"]
    assert find(facts["rows"], pipeline="llava")["seconds_ratio"] == 1


def test_generation_is_measured_by_batch_size_wherever_it_differs(result):
    for row in result["json"]["rows"]:
        sizes = [batch["batch_size"] for batch in row["batches"]]
        assert sizes == ([] if row["pipeline"] == "llava-all-logits" else [1, 2])
        for batch in row["batches"]:
            assert batch["decode_tokens_per_second"]["median"] > batch["requests_per_second"]["median"] > 0


def test_the_stages_add_up_to_the_whole(result):
    for row in result["json"]["rows"]:
        stages = row["front_end_seconds"]["median"] + row["prefill_seconds"]["median"]
        assert stages == pytest.approx(row["seconds"]["median"])
        if row["peak_bytes"] is not None:
            peaks = (row["front_end_peak_bytes"]["median"], row["prefill_peak_bytes"]["median"])
            assert row["peak_bytes"]["median"] == max(peaks)


def test_keys_and_values_take_the_bytes_that_arithmetic_says(result, tiny):
    for row in result["json"]["rows"]:
        pipeline = tiny[row["pipeline"]]
        assert row["tokens_per_layer"] == pipeline.layers(8)
        per_token = pipeline.scale.shape().kv_bytes_per_token
        held = sum(pipeline.layers(8)) if row["pipeline"] != "gemma4" else 2 * 572 + 6 * 63  # windows of 64
        assert row["kv_bytes"] == held * per_token == pipeline.kv_bytes(8)


def test_equal_tokens_are_equal(result):
    rows = result["json"]["rows"]
    equal, elva = find(rows, pipeline="llava-equal-tokens"), find(rows, pipeline="elva")
    assert equal["tokens_per_layer"] == elva["tokens_per_layer"] and equal["kv_bytes"] == elva["kv_bytes"]


def test_the_share_of_the_merge_steps_is_measured_where_there_are_any(result):
    for row in result["json"]["rows"]:
        if "+merge" in row["pipeline"]:
            assert 0 < row["merge_share"]["median"] < 0.9
        else:
            assert row["merge_share"] is None


def test_the_tables_are_made_from_the_numbers(scripts, result):
    assert scripts.report.as_markdown(result["json"]) == result["text"]
    changed = json.loads(json.dumps(result["json"]))
    find(changed["rows"], pipeline="elva")["seconds_ratio"] = 0.123
    assert "| elva | 180 | 180 | 0.12 |" in scripts.report.as_markdown(changed)


def test_tiny_models_are_judged_by_no_target(result):
    assert result["json"]["targets"] == []
    assert "Targets are stated for `--size 0.5b`" in result["text"]


# What runs.


def test_every_row_has_the_same_decoder(tiny):
    shapes = {}
    for name, pipeline in tiny.items():
        model = pipeline.build("meta", torch.bfloat16, "sdpa")
        decoder = [(key, weight) for key, weight in model.named_parameters() if "language" in key or "lm_head" in key]
        shapes[name] = sorted(tuple(weight.shape) for key, weight in decoder)
    assert len(shapes["elva"]) > 8 * 9
    assert shapes.pop("gemma4") != shapes["elva"], "its own form of decoder, at the same sizes"
    assert all(found == shapes["elva"] for found in shapes.values())


def test_at_full_size_a_frame_has_the_tokens_of_each_model(scripts):
    pipelines = scripts.peers.make_pipelines(scripts.pipelines.make_scale("7b"))
    tokens = {name: pipeline.visual_tokens(32) / 32 for name, pipeline in pipelines.items()}
    assert tokens == {
        **{"llava-all-logits": 576, "llava": 576, "llava-equal-tokens": 144, "videollama3": 144, "qwen2.5-vl": 72},
        **{"gemma4-front-end": 70, "gemma4-front-end-square": 64, "gemma4": 70, "elva": 157, "elva+merge": 157},
        "elva+merge+hybrid": (157 + 3 * 43) / 4,
    }
    texts = {name: pipeline.text_tokens(32) for name, pipeline in pipelines.items()}
    assert texts.pop("llava-equal-tokens") == 290 + 13 * 32
    assert set(texts.values()) == {290}


def test_the_towers_have_the_sizes_of_the_real_ones(scripts):
    pipelines = scripts.peers.make_pipelines(scripts.pipelines.make_scale("small"))
    towers = {"llava": "model.vision_tower", "videollama3": "model.vision_model", "qwen2.5-vl": "model.visual.blocks"}
    counts = {
        name: sum(
            weight.numel()
            for weight in pipelines[name].build("meta", torch.bfloat16, "sdpa").get_submodule(tower).parameters()
        )
        for name, tower in towers.items()
    }
    assert counts["llava"] == 303_507_456  # CLIP-ViT-L/14-336
    assert counts["qwen2.5-vl"] == 32 * 19_702_200
    assert counts["videollama3"] / 1e6 == pytest.approx(412, abs=1)  # SigLIP-so400m without its pooling head


def test_clips_of_a_batch_have_one_length_and_odd_frames_are_refused_where_they_come_in_pairs(scripts, tiny):
    for pipeline in tiny.values():
        inputs = pipeline.inputs(4, 3, torch.bfloat16)
        assert inputs["input_ids"].shape == (3, pipeline.layers(4)[0])
    with pytest.raises(ValueError, match=r"3 frames: Qwen2\.5-VL takes them in pairs"):
        tiny["qwen2.5-vl"].inputs(3, 1, torch.bfloat16)


def test_a_threshold_schedule_is_measured_and_not_derived(scripts, setting):
    pipeline = replace(setting, merge_schedule="paper").pipelines()["elva+merge"]
    with pytest.raises(ValueError, match="'paper' keeps depends on the pixels"):
        pipeline.layers(8)
    [row] = scripts.process.run_pipeline(replace(setting, merge_schedule="paper"), "elva+merge", [8])
    assert row["tokens_per_layer"][0] == 180 > row["tokens_per_layer"][-1]


def test_generation_that_stops_early_is_refused(scripts):
    def stops_early(input_ids, stopping_criteria, **options):
        for _ in range(2):
            stopping_criteria[0](input_ids, None)

    model = SimpleNamespace(generation_config=SimpleNamespace(), generate=stops_early)
    with pytest.raises(RuntimeError, match="2 tokens were generated instead of 3"):
        scripts.process.generate(model, {"input_ids": torch.ones(1, 2, dtype=torch.long)}, 3, "cpu")


# What goes wrong.


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.")


def test_a_row_that_does_not_fit_is_named(scripts, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.peers.Llava, "build", out_of_memory)
        options = ["--size", "tiny", "--frames", "4", "--new-tokens", "0", "--only", "llava", "elva"]
        assert run_script(scripts, tmp_path, *options) == 0
    result = read(tmp_path, "table5-cpu")
    assert "Not measured: `llava` (out of memory)." in result["text"]
    assert "seconds_ratio" not in find(result["json"]["rows"], pipeline="elva"), "there is nothing to compare with"


def test_another_error_is_named_and_is_the_exit_status(scripts, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.pipelines.Elva, "prefill", lambda *_: 1 / 0)
        options = ["--size", "tiny", "--frames", "4", "--new-tokens", "0", "--only", "elva"]
        assert run_script(scripts, tmp_path, *options) == 1
    assert "`elva` (ZeroDivisionError: division by zero)" in read(tmp_path, "table5-cpu")["text"]


def test_a_batch_that_does_not_fit_leaves_the_others(scripts, setting, monkeypatch):
    real = scripts.process.generate

    def small_batches(model, inputs, *options):
        return real(model, inputs, *options) if len(inputs["input_ids"]) < 2 else out_of_memory()

    monkeypatch.setattr(scripts.process, "generate", small_batches)
    tried = replace(setting, new_tokens=2, batch_sizes=(1, 2))
    [row] = scripts.process.run_pipeline(tried, "elva", [4])
    assert [batch.get("failed") for batch in row["batches"]] == [None, "out of memory"]
    batches = [scripts.main.summarise_batch([batch]) for batch in row["batches"]]
    table = scripts.report.rates_table([{"pipeline": "elva", "batches": batches}])
    assert table.splitlines()[-1].endswith("| out of memory |")


def test_batches_run_only_where_asked(scripts, setting):
    tried = replace(setting, new_tokens=2, batch_sizes=(1, 2), batch_frames=(4,))
    few, many = scripts.process.run_pipeline(tried, "elva", [4, 6])
    assert [[batch["batch_size"] for batch in row["batches"]] for row in (few, many)] == [[1, 2], [1]]


def test_a_killed_process_is_named(scripts, setting, monkeypatch):
    def killed(*arguments):
        raise BrokenPipeError

    monkeypatch.setattr(scripts.main, "run_in_fresh_process", killed)
    rows = scripts.main.run_guarded(setting, "elva", [4, 8])
    assert [row["failed"] for row in rows] == 2 * ["the process died (BrokenPipeError); out of memory?"]


def test_a_run_that_is_stopped_leaves_what_it_has(scripts, setting, monkeypatch):
    monkeypatch.setattr(scripts.main, "run_in_fresh_process", in_this_process)
    monkeypatch.setattr(scripts.measuring, "run_in_fresh_process", in_this_process)
    steps = scripts.main.measure(setting, ["llava", "elva"], [4], scaling=False)
    first = {**next(steps), "chart": None}
    assert [row["pipeline"] for row in first["rows"]] == ["llava"] and not first["finished"]
    assert "Unfinished: " in scripts.report.as_markdown(first)
    *_, last = steps
    assert last["finished"] and len(last["rows"]) == 2


def test_an_unknown_row_is_refused(scripts, tmp_path):
    with pytest.raises(SystemExit, match="--only nobody: not known here; choose from llava-all-logits"):
        run_script(scripts, tmp_path, "--size", "tiny", "--only", "nobody")


# What is judged.


def fake_rounds(seconds, frames=16, peak=None):
    return {
        (name, frames): [{"seconds": value, "peak_bytes": (peak or seconds)[name], "weight_bytes": 100}]
        for name, value in seconds.items()
    }


ON_A_CPU = {"size": "0.5b", "device": "cpu", "dtype": "bfloat16"}
ON_A_GPU = {"size": "7b", "device": "cuda", "dtype": "bfloat16"}


def test_targets_are_met_or_missed_by_how_much(scripts):
    seconds = {"llava": 100.0, "llava-equal-tokens": 30.0, "gemma4-front-end": 1.0}
    seconds |= {"elva": 9.0, "elva+merge": 5.0, "elva+merge+hybrid": 1.2}
    targets = scripts.targets.targets_of(ON_A_CPU, fake_rounds(seconds), [])
    verdicts = [(row["measured"], row["met"], row["missed_by"]) for row in targets[:5]]
    assert verdicts[0] == (0.09, True, None)
    assert verdicts[1] == (0.05, False, pytest.approx(1.0))
    assert verdicts[2] == (pytest.approx(0.012), True, None)
    assert verdicts[4] == (pytest.approx(1.2), False, pytest.approx(0.5))
    table = scripts.targets.targets_table(targets)
    assert "| at most 0.025 | 0.050 | missed by 100 % |" in table
    assert "peak memory, elva / gemma4-front-end, the closest" in table


def test_targets_of_rows_that_did_not_run_are_not_met(scripts):
    rounds = fake_rounds({"elva": 1.0})
    rounds["llava", 16] = [{"failed": "out of memory"}]
    targets = scripts.targets.targets_of(ON_A_CPU, rounds, [])
    assert {row["met"] for row in targets} == {None}
    assert "not measured" in scripts.targets.targets_table(targets)


def test_savings_on_a_gpu_are_at_least_what_they_should_be(scripts):
    names = ("llava", "llava-all-logits", "elva+merge+hybrid")
    rounds = fake_rounds(
        dict.fromkeys(names, 1.0), 32, {"llava": 100, "llava-all-logits": 300, "elva+merge+hybrid": 20}
    )
    rounds["elva+merge", 128] = [{"merge_share": 0.02, "seconds": 1.0}]
    rows = [{"pipeline": "elva", "frames": 128, "prefill_utilisation": 0.45}]
    targets = scripts.targets.targets_of(ON_A_GPU, rounds, rows)
    assert find(targets, what="128 frames: prefill over the matmul peak, elva")["missed_by"] == pytest.approx(0.1)
    assert find(targets, what="32 frames: total memory saved, elva+merge+hybrid, llava-all-logits")["measured"] == 0.7
    assert find(targets, what="128 frames: merge steps over prefill, elva+merge")["met"]
    assert find(targets, what="32 frames: peak above the weights, elva+merge+hybrid / llava")["met"]


def test_growth_is_judged_from_32_to_256_frames(scripts, tmp_path):
    rounds = {}
    for frames, plain in ((8, 1.0), (32, 4.0), (256, 40.0)):
        rounds |= fake_rounds({"elva": plain, "elva+merge": 0.5 * frames / 8, "elva+merge+hybrid": 0.1}, frames)
    targets = scripts.targets.targets_of(ON_A_CPU, rounds, [], scaling=True)
    assert not find(targets, what="elva: time at 256 frames / at 32")["met"]
    assert find(targets, what="elva+merge: time at 256 frames / at 32")["measured"] == 8.0
    assert find(targets, what="8 frames: time, elva+merge / elva")["met"]


@pytest.mark.parametrize("place", [ON_A_CPU, ON_A_GPU], ids=["cpu", "cuda"])
def test_what_is_stated_for_bfloat16_is_not_judged_in_float32(scripts, place):
    rounds = {("elva", count): [{"seconds": seconds}] for count, seconds in ((32, 1.0), (256, 9.0))}
    assert scripts.targets.targets_of(place, rounds, [])
    assert not scripts.targets.targets_of({**place, "dtype": "float32"}, rounds, [])
    (growth,) = [row for row in scripts.targets.targets_of(place, rounds, [], scaling=True) if row["bound"] == 8.0]
    assert growth["measured"] == 9.0


def test_no_run_replaces_the_files_of_another_kind(scripts, setting):
    def stem(scaling=False, **changes):
        return scripts.main.file_stem(replace(setting, dtype="bfloat16", **changes), scaling=scaling)

    assert (stem(), stem(scaling=True), stem(device="cuda")) == ("table5-cpu", "table5-scaling-cpu", "table5-cuda")
    static = replace(setting, dtype="float32", cache_implementation="static")
    assert scripts.main.file_stem(static, scaling=False) == "table5-cpu-float32-static"


def test_growth_is_measured_for_elva_alone(scripts, tmp_path):
    assert run_script(scripts, tmp_path, "--size", "tiny", "--scaling", "--frames", "4", "8") == 0
    result = read(tmp_path, "table5-scaling-cpu")
    assert [row["pipeline"] for row in result["json"]["rows"]] == [name for name in ELVA for _ in range(2)]
    assert scripts.report.as_markdown(result["json"]) == result["text"]
    assert "| elva | 8 | 180 | 180 | 1.00 |" in result["text"]
    assert (tmp_path / result["json"]["chart"]).read_bytes().startswith(b"\x89PNG")


def test_the_published_tables_are_made_from_the_published_numbers(scripts):
    results = sorted(scripts.measuring.RESULTS.glob("table5-*.json"))
    published = [path for path in results if not path.stem.startswith("table5-profile")]
    assert published, "run: python benchmarks/table5_efficiency.py --derived"
    for path in published:
        facts = json.loads(path.read_text())
        render = scripts.flops.as_markdown if facts["kind"] == "derived" else scripts.report.as_markdown
        assert path.with_suffix(".md").read_text() == render(facts)
        assert facts["kind"] == "derived" or facts["setting"]["size"] != "tiny"


@pytest.mark.gpu
def test_the_same_script_runs_on_a_gpu(scripts, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        options = ["--size", "tiny", "--device", "cuda", "--frames", "4", "8", "--new-tokens", "3", "--processes", "1"]
        patch.setattr(sys, "argv", ["table5_efficiency.py", *options, "--out", str(tmp_path)])
        assert scripts.main.main() == 0
    facts = read(tmp_path, "table5-cuda")["json"]
    assert facts["device"] == torch.cuda.get_device_name()
    assert all(row["peak_bytes"]["median"] > 0 for row in facts["rows"])
