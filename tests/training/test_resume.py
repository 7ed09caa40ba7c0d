"""A run that is stopped or killed and resumed ends, to the bit, as one that never was."""

import random
import socket
import sys
from pathlib import Path

import pytest

from elva_hf.training.checkpoints import PARTIAL, last_complete_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from killed_runs import KILL_POINTS, Runs

EQUAL = ("step", "model", "optimizer", "scheduler", "generators", "losses")
KILLS = 30
CAMPAIGNS = {  # every run has several kills, each resumed where the last one left it
    "saves every second step": {},
    "saves every step, keeps one": {"save_steps": 1, "save_total_limit": 1, "num_train_epochs": 3},
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
    kills = 0
    while kills < KILLS:
        for index, options in enumerate(CAMPAIGNS.values()):
            wanted = whole_run(options=options)
            step_seconds = wanted["seconds"] / wanted["step"]
            run = tmp_path / f"run-{kills}-{index}"
            for _ in range(5):
                last = last_complete_checkpoint(run)
                done = int(last.name.split("-")[1]) if last else 0
                step = moments.randrange(done, min(done + 6, wanted["step"]))
                answer = runs(run, options=options, kill={"step": step, "after": moments.uniform(0, 2 * step_seconds)})
                kills += answer["killed"]
                if not answer["killed"]:
                    break
            assert_equal_runs(runs(run, options=options), wanted)


def test_two_ranks_killed_and_resumed_equal_two_that_were_not(runs, whole_run, tmp_path):
    ranks = {"world": 2, "options": {"ddp_backend": "gloo", "ddp_find_unused_parameters": True}}
    wanted = whole_run(port=free_port(), **ranks)
    for kill in ({"step": 5, "after": 0}, {"point": "before the rename", "save": 3}):
        assert runs(tmp_path / "run", port=free_port(), kill=kill, **ranks)["killed"]
    resumed = runs(tmp_path / "run", port=free_port(), **ranks)
    assert resumed["resumed"] == "checkpoint-8"
    for rank in range(2):
        assert_equal_runs(resumed["ranks"][rank], wanted["ranks"][rank])
    assert resumed["ranks"][0]["generators"] != resumed["ranks"][1]["generators"]


def test_what_one_rank_cannot_write_no_rank_keeps(runs, tmp_path):
    ranks = {"world": 2, "options": {"ddp_backend": "gloo", "ddp_find_unused_parameters": True}}
    answer = runs(tmp_path / "run", port=free_port(), full_rank=1, **ranks)
    first, second = (rank["error"] for rank in answer["ranks"])
    assert "CheckpointError: " in second and "checkpoint-2 could not be written" in second
    assert "checkpoint-2 was given up, rank 1 could not write its part: CheckpointError: " in first
    assert list((tmp_path / "run").iterdir()) == []


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
