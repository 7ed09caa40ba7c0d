"""A run that is stopped or killed and resumed ends, to the bit, as one that never was."""

import atexit
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

import elva_hf.training
from elva_hf.training.checkpoints import PARTIAL, last_complete_checkpoint
from elva_hf.training.nonfinite import RECORD_NAME

sys.path.insert(0, str(Path(__file__).parent))
from killed_runs import KILL_POINTS, Runs

EQUAL = ("step", "model", "optimizer", "scheduler", "generators", "losses")
KILLS = 30
CAMPAIGNS = {  # every run has several kills, each resumed where the last one left it
    "saves every second step": {"num_train_epochs": 2},
    "saves every step, keeps one": {"save_steps": 1, "save_total_limit": 1, "num_train_epochs": 2},
    "accumulates three, logs every third": {
        "gradient_accumulation_steps": 3,
        "logging_steps": 3,
        "save_steps": 1,
        "num_train_epochs": 4,
    },
}


@pytest.fixture(scope="module")
def runs():
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def whole_run(runs, tmp_path_factory):
    """Runs that nothing interrupts, by their options."""
    known = {}

    def run(**order):
        key = repr(order)
        if key not in known:
            known[key] = runs(tmp_path_factory.mktemp("whole") / "run", **order)
            assert "error" not in known[key], known[key]["error"]
        return known[key]

    return run


def assert_equal_runs(found, wanted):
    assert "error" not in found, found["error"]
    assert found["step"] == wanted["step"] > 0
    finished = found["resumed"] == f"checkpoint-{found['step']}"  # nothing left to draw random numbers for
    keys = [key for key in EQUAL if not (finished and key == "generators")]
    assert {key: found[key] for key in keys} == {key: wanted[key] for key in keys}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_num_workers": 2, "num_train_epochs": 2, "save_steps": 3},
        {"logging_steps": 3, "save_steps": 4},
        {"save_strategy": "epoch"},
    ],
    ids=["plain", "two workers", "between two lines of the log", "at the end of an epoch"],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(runs, whole_run, tmp_path, options):
    stopped = runs(tmp_path / "run", options=options, kill={"step": 6, "after": 0})
    assert stopped["killed"]
    resumed = runs(tmp_path / "run", options=options)
    assert resumed["resumed"] is not None
    assert_equal_runs(resumed, whole_run(options=options))


def test_the_seed_and_the_samples_matter_to_what_is_compared(whole_run):
    one, other = whole_run(options={}), whole_run(options={"seed": 4})
    assert all(one[key] != other[key] for key in ("model", "optimizer", "losses"))


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_run_killed_at_any_stage_of_a_save_ends_as_if_it_had_not_been(runs, whole_run, tmp_path, point):
    run, options = tmp_path / "run", {"num_train_epochs": 2}
    assert runs(run, options=options, kill={"point": point, "save": 4})["killed"]
    renamed = point in KILL_POINTS[KILL_POINTS.index("after the rename") :]
    names = {path.name for path in run.iterdir()}
    assert ("checkpoint-8" in names) == renamed
    assert last_complete_checkpoint(run).name == ("checkpoint-8" if renamed else "checkpoint-6")
    assert PARTIAL in names
    resumed = runs(run, options=options)
    assert resumed["resumed"] == ("checkpoint-8" if renamed else "checkpoint-6")
    assert_equal_runs(resumed, whole_run(options=options))
    assert {path.name for path in run.iterdir()} == {"checkpoint-8", "checkpoint-10"}


def test_kill_at_thirty_random_moments(runs, whole_run, tmp_path):
    moments = random.Random(30)
    kills, in_saves = 0, 0
    while kills < KILLS:
        for index, options in enumerate(CAMPAIGNS.values()):
            wanted = whole_run(options=options)
            step_seconds = wanted["seconds"] / wanted["step"]
            run = tmp_path / f"run-{kills}-{index}"
            for _ in range(5):
                last = last_complete_checkpoint(run)
                done = int(last.name.split("-")[1]) if last else 0
                if done == wanted["step"]:
                    break
                step = moments.randrange(done, min(done + 3, wanted["step"]))
                answer = runs(run, options=options, kill={"step": step, "after": moments.uniform(0, 2 * step_seconds)})
                kills += answer["killed"]
                in_saves += answer["killed"] and (run / PARTIAL).exists()
                if not answer["killed"]:
                    break
            assert_equal_runs(runs(run, options=options), wanted)
    print(f"{kills} kills, {in_saves} of them inside a save")


@cache
def compiled_deepspeed():
    """Environment of DeepSpeed on CPU; what it compiles is compiled here, not by ranks that may be killed meanwhile."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": folder.name}
    code = "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder('ShareMemCommBuilder').load()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, check=True, capture_output=True)
    return environment


def launch_options(name):
    """The part of an order that says how two processes train."""
    options = {"ddp_backend": "gloo", "num_train_epochs": 3}
    match name:
        case "DDP":
            return {"options": {**options, "ddp_find_unused_parameters": True}}
        case "DeepSpeed ZeRO-2":
            pytest.importorskip("deepspeed")
            launch = Path(elva_hf.training.__file__).parent / "launch"
            zero2 = json.loads((launch / "zero2.json").read_text())
            options = {"bf16": True, "deepspeed": zero2, "num_train_epochs": 3}
            return {"options": options, "environment": compiled_deepspeed()}
    kind = "SHARDED_STATE_DICT" if name == "FSDP2, sharded" else "FULL_STATE_DICT"
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]}
    return {"options": {**options, "fsdp": True, "fsdp_config": {**layers, "state_dict_type": kind}}}


WRAPPERS = {
    "DDP": "DistributedDataParallel",
    "FSDP2, sharded": "FSDPElvaForCausalLM",
    "FSDP2, full": "FSDPElvaForCausalLM",
    "DeepSpeed ZeRO-2": "DeepSpeedEngine",
}
SLOW = [pytest.mark.slow]  # DeepSpeed compiles
LAUNCHES = [pytest.param(name, marks=SLOW if name in ("FSDP2, full", "DeepSpeed ZeRO-2") else []) for name in WRAPPERS]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_ranks_killed_and_resumed_equal_two_that_were_not(runs, tmp_path, launch):
    ranks = {"world": 2, **launch_options(launch)}
    wanted = runs(tmp_path / "whole", port=free_port(), **ranks)
    assert wanted["model_class"] == WRAPPERS[launch]
    for kill in ({"step": 3, "after": 0}, {"point": "before the rename", "save": 2}):
        assert runs(tmp_path / "run", port=free_port(), kill=kill, **ranks)["killed"]
        last = last_complete_checkpoint(tmp_path / "run")
    resumed = runs(tmp_path / "run", port=free_port(), **ranks)
    assert resumed["resumed"] == last.name == "checkpoint-4"
    for rank in range(2):
        assert_equal_runs(resumed["ranks"][rank], wanted["ranks"][rank])
    assert resumed["ranks"][0]["generators"] != resumed["ranks"][1]["generators"]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(runs, tmp_path, launch):
    answer = runs(tmp_path / "run", world=2, port=free_port(), spoil=[2, 4], **launch_options(launch))
    for rank in answer["ranks"]:
        assert "error" not in rank, rank["error"]
        models = [model for model, _ in rank["states"]]
        assert [after == before for before, after in itertools.pairwise(models)] == [False, True, False, True] + 4 * [
            False
        ]
        if launch != "DeepSpeed ZeRO-2":  # whose state counts steps
            optimizers = [optimizer for _, optimizer in rank["states"]]
            assert optimizers[1] == optimizers[2] != optimizers[3] == optimizers[4] != optimizers[5]
    lines = [json.loads(line) for line in (tmp_path / "run" / RECORD_NAME).read_text().splitlines()]
    assert [(line["step"], line["skipped_steps"], line["consecutive"]) for line in lines] == [(3, 1, 1), (5, 2, 1)]
    assert all(len(line["ranks"]) == 2 for line in lines)


def test_what_one_rank_cannot_write_no_rank_keeps(runs, tmp_path):
    answer = runs(tmp_path / "run", world=2, port=free_port(), full_rank=1, **launch_options("DDP"))
    first, second = (rank["error"] for rank in answer["ranks"])
    assert second.startswith("CheckpointError: ")
    assert "checkpoint-2 could not be written" in second
    assert "checkpoint-2 was given up, rank 1 could not write its part: CheckpointError: " in first
    assert list((tmp_path / "run").iterdir()) == []


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
