"""benchmarks/training.py: the script runs whole at its smallest size, and its pieces are what they say.

Everything runs in the test's process; that each variant has a process of its own is `measuring`'s, tested elsewhere.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from elva_hf.geometry_elva import read_geometry
from elva_hf.training.losses import frame_clips, generative_loss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import measuring
        import training
        import training_steps

        yield SimpleNamespace(measuring=measuring, training=training, steps=training_steps)


def in_this_process(function, *arguments):
    return function(*arguments)


@pytest.fixture(scope="module")
def result(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.training, "run_in_fresh_process", in_this_process)
        options = ["--size", "tiny", "--processes", "1", "--steps", "1", "--out", str(folder)]
        patch.setattr(sys, "argv", ["training.py", *options])
        scripts.training.main()
    torch.set_num_threads(threads)
    return {
        "json": json.loads((folder / "training-cpu.json").read_text()),
        "markdown": (folder / "training-cpu.md").read_text(),
    }


@pytest.fixture
def setting(scripts):
    return scripts.steps.Setting("tiny", "cpu", threads=1, batch_size=2, warmup=1, steps=1, processes=1)


def find(result, part, run):
    [row] = [row for row in result["json"][part] if row["run"] == run]
    return row


def test_every_way_to_take_a_step_is_measured_or_named(scripts, result):
    rows = result["json"]["steps"]
    assert [row["run"] for row in rows] == list(scripts.training.STEPS)
    for row in rows:
        if "failed" in row:
            assert "needs CUDA" in row["failed"]
            assert f"`{row['run']}` ({row['failed']})" in result["markdown"]
        else:
            assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]["median"])
            assert row["samples_per_second"] == pytest.approx(row["samples"] / row["seconds"]["median"])
            assert row["held_bytes"]["median"] > 0 and math.isfinite(row["loss"])
    assert result["json"]["kind"] == "measured"


def test_mfu_is_against_the_measured_product(result):
    peak = result["json"]["matmul"]["flops_per_second"]["median"]
    row = find(result, "steps", "plain")
    assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"]["median"] / peak)


def test_a_step_needs_three_forward_passes_of_the_ledger(scripts):
    scale = scripts.steps.make_scale("1.5b")
    flops = scripts.training.step_flops(scale, scripts.steps.Variant())
    weights = 28 * (1536 * (2 * 1536 + 2 * 256 + 3 * 8960))
    tokens = 4 * (16 * 154 + 2 + 230)
    linear = 6 * weights * tokens
    head = 6 * 1536 * 151936 * 4 * 200
    assert linear + head < flops < 1.25 * (linear + head)  # attention and the patch embedding on top
    merged = scripts.training.step_flops(scale, scripts.steps.Variant(merge_schedule="table5"))
    assert merged < 0.6 * flops
    with pytest.raises(ValueError, match="paper"):
        scripts.training.step_flops(scale, scripts.steps.Variant(merge_schedule="paper"))


def test_guidance_adds_its_losses(result):
    plain = find(result, "steps", "plain")["loss"]
    for run in ("guidance, cached targets", "guidance, teacher on the fly"):
        assert find(result, "steps", run)["loss"] > plain + 1, "random directions: L_MSE alone is about 2"


def test_what_changes_only_cost_does_not_change_the_loss(result):
    plain = find(result, "steps", "plain")["loss"]
    for run in ("gradient checkpointing", "AdamW not fused"):
        assert find(result, "steps", run)["loss"] == pytest.approx(plain, abs=0.02)
    some, all_of_them = find(result, "logits", "where labels are"), find(result, "logits", "everywhere")
    assert some["loss"] == pytest.approx(all_of_them["loss"], abs=0.02)


def test_both_sides_of_a_comparison_learn_the_same(result):
    one, eight = find(result, "packing", "one row"), find(result, "packing", "eight rows")
    assert (one["samples"], eight["samples"]) == (1, 8)
    assert one["supervised"] == eight["supervised"] == 8 * 3
    assert one["tokens"] == 3 * 16 + 2 + 8 * 6
    assert eight["tokens"] == 8 * (3 * 16 + 2 + 6)
    assert one["loss"] == pytest.approx(eight["loss"], abs=0.02)


def test_a_step_changes_the_weights_and_lowers_the_loss(scripts, setting):
    trainee = scripts.steps.make_trainee(setting, scripts.steps.Variant(), "")
    for group in trainee.optimizer.param_groups:
        group["lr"] = 1e-2
    losses = [float(trainee.step()) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    assert trainee.held_bytes == pytest.approx(
        3 * sum(weight.nbytes for weight in trainee.model.parameters()), rel=0.01
    )


def test_activations_are_recomputed_where_asked(scripts, setting):
    for asked in (False, True):
        model = scripts.steps.make_trainee(setting, scripts.steps.Variant(checkpointing=asked), "").model
        layers = model.model.language_model.layers
        assert [layer.gradient_checkpointing for layer in layers] == len(layers) * [asked]


@pytest.mark.parametrize("logits", ["labels", "all"])
def test_logits_are_computed_where_asked_and_give_the_same_loss(scripts, setting, logits):
    trainee = scripts.steps.make_trainee(setting, scripts.steps.Variant(logits=logits), "")
    rows = []
    trainee.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.numel() // 64))
    loss = trainee.loss(dict(trainee.batch))
    labels = trainee.batch["labels"]
    assert rows == [labels.numel() if logits == "all" else int((labels != -100).sum())]
    torch.testing.assert_close(generative_loss(trainee.model.eval()(**trainee.batch).logits, labels), loss)


def test_cached_targets_fit_the_batch(scripts, setting):
    scale = setting.make()
    model = scripts.steps.make_trainee(setting, scripts.steps.Variant(), "").model
    batch = scripts.steps.make_batch(scale, scripts.steps.Variant())
    geometry = read_geometry(model.model.token_kinds(batch["input_ids"]))
    targets = scripts.steps.cached_targets(scale)
    assert targets["teacher_tubes"].shape == (len(frame_clips(geometry)[1]), 2, 2, 16)
    assert targets["teacher_frames"].shape == (geometry.num_frames, 16)
    assert (batch["labels"] != -100).sum(1).tolist() == [scale.caption] * 2


def test_a_variant_that_does_not_fit_is_named(scripts, setting, monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(scripts.steps, "make_trainee", too_large)
    row = scripts.steps.run_steps(setting, scripts.steps.Variant())
    assert scripts.training.summarise([row, row], [row, row]) == {"failed": "out of memory"}
    [line] = scripts.training.not_run([{"run": "plain", **row}])
    assert line == "Not measured: `plain` (out of memory)."


def test_the_tables_are_made_from_the_numbers(scripts, result):
    assert scripts.training.as_markdown(result["json"]) == result["markdown"]
    changed = json.loads(json.dumps(result["json"]))
    changed["steps"][1]["seconds_ratio"] = 0.123
    assert "| gradient checkpointing | 0.12 |" in scripts.training.as_markdown(changed)


def test_tables_can_be_made_when_the_base_did_not_fit(scripts, result):
    changed = json.loads(json.dumps(result["json"]))
    changed["steps"][0] = {"run": "plain", "failed": "out of memory"}
    changed["logits"][1] = {"run": "everywhere", "failed": "out of memory"}
    assert "Not measured: `everywhere` (out of memory)." in scripts.training.as_markdown(changed)


def test_the_published_tables_are_made_from_the_published_numbers(scripts):
    published = sorted(scripts.measuring.RESULTS.glob("training-*.json"))
    assert published, "run: python benchmarks/training.py"
    for path in published:
        facts = json.loads(path.read_text())
        assert facts["kind"] == "measured"
        assert facts["setting"]["size"] != "tiny"
        assert path.with_suffix(".md").read_text() == scripts.training.as_markdown(facts)


@pytest.mark.gpu
def test_the_same_script_runs_on_a_gpu(scripts, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        argv = ["training.py", "--size", "tiny", "--device", "cuda", "--processes", "1", "--out", str(tmp_path)]
        patch.setattr(sys, "argv", argv)
        scripts.training.main()
    facts = json.loads((tmp_path / "training-cuda.json").read_text())
    assert facts["device"] == torch.cuda.get_device_name()
