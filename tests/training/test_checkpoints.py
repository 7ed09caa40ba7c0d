"""Checkpoints are whole or not there, whatever happens while they are written."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from elva_hf.errors_elva import CheckpointError
from elva_hf.training import checkpoints
from elva_hf.training.checkpoints import (
    MANIFEST,
    PARTIAL,
    checkpoint_fault,
    last_complete_checkpoint,
    seal_checkpoint,
)

sys.path.insert(0, str(Path(__file__).parent))
from killed_runs import T, outcome, trainer

SHORT = {"max_steps": 4, "save_steps": 2, "save_total_limit": None}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run folder with checkpoint-2 and checkpoint-4; do not change it."""
    folder = tmp_path_factory.mktemp("written") / "run"
    trainer(folder, **SHORT).train()
    return folder


@pytest.fixture
def run(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "run"))


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


def alter(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "COMPLETE.json is missing"),
    "half a manifest": (lambda folder: os.truncate(folder / MANIFEST, 40), "COMPLETE.json cannot be read"),
    "a list for a manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), "COMPLETE.json cannot be read"),
    "a file is missing": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "a file is short": (lambda folder: shorten(folder / "model.safetensors"), "model.safetensors has"),
    "a bit is flipped": (lambda folder: alter(folder / "rng_state.pth"), "rng_state.pth has another SHA-256"),
    "copied from another step": (
        lambda folder: shutil.copy(folder.with_name("checkpoint-2") / MANIFEST, folder / MANIFEST),
        "COMPLETE.json is that of step 2",
    ),
}


def test_a_checkpoint_lists_its_files_and_nothing_is_left_aside(written):
    assert names(written) == {"checkpoint-2", "checkpoint-4"}
    folder = written / "checkpoint-4"
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["global_step"] == 4
    assert set(manifest["files"]) == names(folder) - {MANIFEST}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names(folder)
    assert all(entry["size"] == (folder / name).stat().st_size for name, entry in manifest["files"].items())
    assert checkpoint_fault(folder) is None
    assert last_complete_checkpoint(written) == folder


def test_everything_is_on_disk_before_the_one_rename(tmp_path, monkeypatch):
    events = []

    def spy(name, path_of):
        inner = getattr(os, name)

        def wrapped(*args):
            events.append((name, path_of(*args)))
            return inner(*args)

        monkeypatch.setattr(checkpoints.os, name, wrapped)

    spy("fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    spy("rename", lambda source, target: (Path(source), Path(target)))
    run = tmp_path / "run"
    trainer(run, max_steps=1, save_steps=1).train()
    partial, final = run / PARTIAL / "checkpoint-1", run / "checkpoint-1"
    at = events.index(("rename", (partial, final)))
    assert [event for event in events if event[0] == "rename"] == [events[at]]
    synced = [path for name, path in events[:at] if name == "fsync"]
    assert {path.name for path in synced if path.parent == partial} == names(final)
    assert synced[-2:] == [partial / MANIFEST, partial]
    assert synced.count(partial) == 2  # its entries before and after the manifest
    assert ("fsync", run) in events[at:]


def test_plain_transformers_resumes_from_it(run):
    plain = trainer(run, Trainer, max_steps=6, save_strategy="no")
    plain.train(resume_from_checkpoint=True)
    assert plain.state.global_step == 6
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-4")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(run, damage, caplog):
    spoil, message = damage
    spoil(run / "checkpoint-4")
    with caplog.at_level(logging.WARNING):
        assert last_complete_checkpoint(run) == run / "checkpoint-2"
    assert "checkpoint-4 is passed over" in caplog.text
    assert message in caplog.text
    with pytest.raises(CheckpointError, match=message.replace("[", ".")):
        trainer(run, **SHORT).train(resume_from_checkpoint=run / "checkpoint-4")
    resumed = trainer(run, **SHORT)
    steps = []
    resumed.add_callback(steps_seen(steps))
    resumed.train(resume_from_checkpoint=True)
    assert steps == [2, 3]
    assert checkpoint_fault(run / "checkpoint-4") is None  # written anew


def steps_seen(steps):
    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    return Seen()


def test_without_a_whole_checkpoint_resuming_is_refused(run, tmp_path):
    for step in (2, 4):
        (run / f"checkpoint-{step}" / MANIFEST).unlink()
    for folder in (run, tmp_path / "empty"):
        with pytest.raises(CheckpointError, match="it holds no whole checkpoint"):
            trainer(folder, **SHORT).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        trainer(run, **SHORT).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_of_plain_transformers_counts_once_it_is_sealed(tmp_path):
    run = tmp_path / "run"
    trainer(run, Trainer, **SHORT).train()
    assert last_complete_checkpoint(run) is None
    seal_checkpoint(run / "checkpoint-4", hashes="all")
    assert last_complete_checkpoint(run) == run / "checkpoint-4"
    trainer(run, **{**SHORT, "max_steps": 5}).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        seal_checkpoint(tmp_path)


def test_only_small_files_are_hashed_unless_all_are_asked_for(run, monkeypatch):
    folder = run / "checkpoint-4"
    monkeypatch.setattr(checkpoints, "SMALL_FILE_BYTES", 2**16)
    for hashes in ("small", "all"):
        seal_checkpoint(folder, hashes=hashes)
        files = json.loads((folder / MANIFEST).read_text())["files"]
        assert ("sha256" in files["optimizer.pt"]) == (hashes == "all")
        assert "sha256" in files["config.json"]


def test_a_cut_file_without_a_hash_is_found_by_its_size(run, monkeypatch):
    folder = run / "checkpoint-4"
    monkeypatch.setattr(checkpoints, "SMALL_FILE_BYTES", 0)
    seal_checkpoint(folder)
    assert last_complete_checkpoint(run) == folder
    os.truncate(folder / "optimizer.pt", 1000)
    assert checkpoint_fault(folder).startswith("optimizer.pt has 1000 bytes where")
    assert last_complete_checkpoint(run) == run / "checkpoint-2"


def test_the_final_mean_of_a_resumed_run_is_over_its_own_steps(tmp_path):
    """Step 4 is logged by nobody before the resume, and with step 6 after it."""
    options = {**SHORT, "max_steps": 6, "save_steps": 4}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    losses = {entry["step"]: entry["loss"] for entry in whole.state.log_history if "loss" in entry}
    trainer(tmp_path / "run", **options, logging_steps=3).train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    resumed = trainer(tmp_path / "run", **options, logging_steps=3).train(resume_from_checkpoint=checkpoint)
    assert resumed.training_loss == pytest.approx((losses[5] + losses[6]) / 2, rel=1e-5)


def test_rotation_counts_whole_checkpoints_and_waits_for_the_new_one(run, monkeypatch):
    (run / "checkpoint-2" / MANIFEST).unlink()
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-3")
    manifest = (run / "checkpoint-3" / MANIFEST).read_text()
    (run / "checkpoint-3" / MANIFEST).write_text(manifest.replace('"global_step": 4', '"global_step": 3'))
    at_publishing = []
    publish = checkpoints._publish

    def spy(partial, final):
        at_publishing.append(names(run))
        publish(partial, final)

    monkeypatch.setattr(checkpoints, "_publish", spy)
    trainer(run, **{**SHORT, "max_steps": 6, "save_total_limit": 2}).train(resume_from_checkpoint=True)
    assert at_publishing == [{"checkpoint-2", "checkpoint-3", "checkpoint-4", PARTIAL}]
    assert names(run) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}  # 2 is not whole: not counted, not deleted


def evaluated(folder, values, **options):
    """A run whose evaluations find `values`."""

    class Evaluated(T):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": values.pop(0)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4, **options}
    return trainer(folder, Evaluated, load_best_model_at_end=True, metric_for_best_model="loss", **options)


@pytest.mark.parametrize(("limit", "kept"), [(1, {2}), (2, {2, 4}), (None, {1, 2, 3, 4})])
def test_the_best_model_is_kept_and_loaded_at_the_end(tmp_path, limit, kept):
    run = tmp_path / "run"
    made = evaluated(run, [3.0, 1.0, 2.0, 2.5], save_total_limit=limit)
    made.train()
    best = run / "checkpoint-2"
    assert made.state.best_model_checkpoint == str(best)
    assert names(run) == {f"checkpoint-{step}" for step in kept}
    for step in kept:
        state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(run / f"checkpoint-{min(step, 2)}")
        assert state["best_global_step"] == min(step, 2)
        assert checkpoint_fault(run / f"checkpoint-{step}") is None
    loaded = type(made.model).from_pretrained(best).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in made.model.state_dict().items())


def test_what_a_crash_left_aside_is_removed_by_the_next_save_and_never_resumed_from(run):
    stale = run / PARTIAL / "checkpoint-9"
    shutil.copytree(run / "checkpoint-4", stale)
    (run / PARTIAL / "deleted-checkpoint-1").mkdir()
    assert last_complete_checkpoint(run) == run / "checkpoint-4"
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-4")
    trainer(run, **{**SHORT, "max_steps": 6}).train(resume_from_checkpoint=True)
    assert names(run) == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_a_checkpoint_of_the_same_step_is_replaced_or_kept(run, monkeypatch):
    before = (run / "checkpoint-4" / "model.safetensors").read_bytes()
    changed = {**SHORT, "data_seed": 9}
    other = trainer(run, **changed)
    rename = os.rename

    def crash(source, target):
        rename(source, target)
        raise SystemExit

    monkeypatch.setattr(checkpoints.os, "rename", crash)
    with pytest.raises(SystemExit):
        other.train(resume_from_checkpoint=run / "checkpoint-2")
    monkeypatch.setattr(checkpoints.os, "rename", rename)
    assert names(run) == {"checkpoint-2", PARTIAL}
    assert last_complete_checkpoint(run) == run / "checkpoint-4"  # put back
    assert (run / "checkpoint-4" / "model.safetensors").read_bytes() == before
    trainer(run, **changed).train(resume_from_checkpoint=run / "checkpoint-2")
    assert names(run) == {"checkpoint-2", "checkpoint-4"}
    assert (run / "checkpoint-4" / "model.safetensors").read_bytes() != before


class Counter(TrainerCallback, ExportableState):
    def __init__(self):
        self.count = 0

    def on_step_end(self, *args, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


def test_callbacks_keep_their_state_and_new_ones_may_join(run):
    options = {**SHORT, "restore_callback_states_from_checkpoint": True}
    trainer(run, callbacks=[Counter(), Counter()], **{**options, "max_steps": 6}).train(resume_from_checkpoint=True)
    last = trainer(run, callbacks=[Counter(), Counter()], **{**options, "max_steps": 8})
    last.train(resume_from_checkpoint=True)
    counters = [callback.count for callback in last.callback_handler.callbacks if type(callback) is Counter]
    assert counters == [4, 4]


class Processing:
    def save_pretrained(self, folder):
        Path(folder, "processor_config.json").write_text("{}")


def test_the_processor_is_saved_and_save_only_model_leaves_the_rest_out(tmp_path, caplog):
    run = tmp_path / "run"
    made = trainer(run, **SHORT, save_only_model=True)
    made.processing_class = Processing()
    made.train()
    folder = run / "checkpoint-4"
    assert "processor_config.json" in json.loads((folder / MANIFEST).read_text())["files"]
    assert not {"optimizer.pt", "scheduler.pt", "rng_state.pth"} & names(folder)
    with caplog.at_level(logging.WARNING):
        trainer(run, **{**SHORT, "max_steps": 5}).train(resume_from_checkpoint=True)
    assert "holds no optimizer" in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_saved_alone_and_resumed(tmp_path):
    peft = pytest.importorskip("peft")
    from tiny_elva import tiny_model

    def adapted(folder, **options):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
        torch.manual_seed(0)
        return trainer(folder, model=peft.get_peft_model(tiny_model(), config), **{**SHORT, **options})

    whole = adapted(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-4"
    assert "adapter_model.safetensors" in names(folder)
    assert "model.safetensors" not in names(folder)
    assert whole._bytes_needed(tmp_path / "other") < sum(p.numel() * 4 for p in whole.model.parameters())
    shutil.rmtree(folder)
    resumed = adapted(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=True)
    assert outcome(resumed) == outcome(whole) | {"generators": outcome(resumed)["generators"]}


def test_a_pickle_that_runs_code_is_refused(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        copy = Path(shutil.copytree(run, tmp_path / name))
        torch.save(Evil(), copy / "checkpoint-4" / name)
        seal_checkpoint(copy / "checkpoint-4")
        with pytest.raises(Exception, match=r"(?i)weights_only"):
            trainer(copy, **{**SHORT, "max_steps": 6}).train(resume_from_checkpoint=True)
    assert not (tmp_path / "owned").exists()


def test_a_push_to_the_hub_starts_from_the_final_name(tmp_path, monkeypatch):
    pushed = []

    def push(self, folder):
        pushed.append((folder, checkpoint_fault(folder)))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    made = trainer(tmp_path / "run", **SHORT)
    made.args.push_to_hub = True
    with pytest.raises(Exception, match=r"."):  # no Hub here: it ends when the last push is to be finished
        made.train()
        raise RuntimeError("no push was waited for")
    assert pushed == [(str(tmp_path / "run" / f"checkpoint-{step}"), None) for step in (2, 4)]


@contextmanager
def files_up_to(size):
    """Let this process write no file beyond `size` bytes, as a full disk would not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [800, 50_000, 150_000, 220_000])
def test_a_write_that_fails_keeps_the_previous_checkpoint_and_names_what_is_missing(run, tmp_path, size):
    """The limits stop it in the configuration, the weights and the optimizer (twice)."""
    shutil.rmtree(run / "checkpoint-4")
    before, full = contents(run), trainer(run, **SHORT)
    needed = sum(path.stat().st_size for path in (run / "checkpoint-2").iterdir())
    with files_up_to(size), pytest.raises(CheckpointError) as caught:
        full.train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert f"{run / 'checkpoint-4'} could not be written" in message
    assert f"about {checkpoints._with_margin(needed)} bytes" in message
    assert "are free; free some, lower save_total_limit or move output_dir" in message
    assert "(checkpoint-2 is untouched)" in message
    assert contents(run) == before
    assert names(run) == {"checkpoint-2"}
    resumed = trainer(run, **SHORT)
    resumed.train(resume_from_checkpoint=True)
    found = outcome(resumed)
    whole = trainer(tmp_path / "whole", **SHORT)
    whole.train()
    assert found == outcome(whole)


def test_other_errors_in_a_save_stay_what_they_are(run, monkeypatch):
    made = trainer(run, **{**SHORT, "max_steps": 6})

    def fail(folder):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(made, "_save_scaler", fail)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        made.train(resume_from_checkpoint=True)
    assert names(run) == {"checkpoint-2", "checkpoint-4"}


def test_room_is_looked_for_before_anything_is_written(run, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(T, "save_model", lambda *args, **kwargs: pytest.fail("a file was written"))
    with pytest.raises(CheckpointError, match=r"No space left on device.* bytes .* and 1000 are free"):
        trainer(run, **{**SHORT, "max_steps": 6}).train(resume_from_checkpoint=True)
    assert names(run) == {"checkpoint-2", "checkpoint-4"}


def test_the_first_checkpoint_is_estimated_from_the_model_and_its_optimizer(tmp_path):
    run = tmp_path / "run"
    made = trainer(run, **SHORT)
    estimate = made._bytes_needed(run)
    made.train()
    written = sum(path.stat().st_size for path in (run / "checkpoint-4").iterdir())
    assert 0.8 * written < estimate < checkpoints._with_margin(written)
    assert made._bytes_needed(run) == written
    made.args.save_only_model = True
    assert made._bytes_needed(tmp_path / "other") == pytest.approx(estimate / 3, rel=0.01)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("looked_for", [True, False], ids=["seen before", "found out in writing"])
def test_a_full_disk_keeps_the_previous_checkpoint(small_disk, monkeypatch, looked_for):
    """900 kB hold two of these checkpoints."""
    monkeypatch.setattr(checkpoints, "_with_margin", lambda size: size if looked_for else 0)
    run = small_disk / "run"
    with pytest.raises(CheckpointError, match="checkpoint-6 could not be written") as caught:
        trainer(run, **{**SHORT, "max_steps": 6}).train()
    assert "(checkpoint-4 is untouched)" in str(caught.value)
    assert names(run) == {"checkpoint-2", "checkpoint-4"}
    shutil.rmtree(run / "checkpoint-2")  # the fix
    trainer(run, **{**SHORT, "max_steps": 6}).train(resume_from_checkpoint=True)
    assert names(run) == {"checkpoint-4", "checkpoint-6"}


def test_a_read_only_run_folder_is_an_error_that_says_so(small_disk, monkeypatch):
    monkeypatch.setattr(checkpoints, "_with_margin", lambda size: size)
    run = small_disk / "run"
    trainer(run, max_steps=2, save_steps=2).train()
    made = trainer(run, max_steps=4, save_steps=2)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*\(checkpoint-2 is untouched\)"):
        made.train(resume_from_checkpoint=True)
