"""Guided training in two processes (gloo, CPU) against one: DDP, FSDP2, LoRA, GradCache."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import distributed_guidance
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked by PEFT

TOLERANCE = {"rtol": 0, "atol": 2e-6}  # norms and cross-entropy are in float32, whatever the weights are
ONE_PROCESS = {
    "ddp 2x1": "ddp 2x1",
    "ddp 1x2": "ddp 2x1",
    "ddp contrast": "ddp contrast",
    "ddp grad cache 2x1": "ddp contrast",
    "ddp grad cache 1x2": "ddp contrast",
    "ddp plain trainer": "ddp plain trainer",
    "ddp trl": "ddp plain trainer",
    "ddp lora": "ddp lora",
    "fsdp2 2x1": "ddp contrast",
    "fsdp2 grad cache 1x2": "ddp contrast",
}
"""Which case, in one process with micro-batches of 4, each case must equal."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of both ranks for every case."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(distributed_guidance.__file__)
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
    }
    logs = [folder / f"log{rank}" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], logs[0].read_text()[-3000:] + logs[1].read_text()[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Results of one process with the whole step in one micro-batch."""
    results = {}
    for name in sorted(set(ONE_PROCESS.values())):
        case = {**distributed_guidance.CASES[name], "batch": (4, 1)}
        trainer = distributed_guidance.build(tmp_path_factory.mktemp("one"), **case)
        trainer.train()
        results[name] = distributed_guidance.result(trainer)
    return results


def skip_without_trl(name):
    if "trl" in distributed_guidance.CASES[name]:
        pytest.importorskip("trl")


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_two_processes_learn_what_one_does(name, two_processes, one_process):
    skip_without_trl(name)
    expected = one_process[ONE_PROCESS[name]]["parameters"]
    for rank in two_processes:
        found = {key.removeprefix("module."): value for key, value in rank[name]["parameters"].items()}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_every_process_logs_the_components_of_all(name, two_processes, one_process):
    skip_without_trl(name)
    expected = one_process[ONE_PROCESS[name]]["logs"]
    for rank in two_processes:
        assert len(rank[name]["logs"]) == len(expected) == 2
        for found, entry in zip(rank[name]["logs"], expected, strict=True):
            assert found.keys() - {"entropy", "mean_token_accuracy", "num_tokens"} == entry.keys()  # TRL's own
            for key in {"loss", "loss_gen", "loss_mse", "loss_con", "logit_scale"} & entry.keys():
                assert found[key] == pytest.approx(entry[key], rel=1e-5), key


def test_the_processes_were_wrapped_as_the_cases_say(two_processes):
    parts = {"", "model.language_model.layers.0", "model.language_model.layers.1"}
    for name, case in two_processes[0].items():
        fsdp = name.startswith("fsdp2")
        assert case["wrapper"] == ("FSDPElvaForCausalLM" if fsdp else "DistributedDataParallel"), name
        assert parts <= set(case["sharded"]) if fsdp else case["sharded"] == [], name
