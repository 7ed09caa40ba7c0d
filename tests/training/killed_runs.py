"""Small training runs in processes that can be killed.

As a program it imports everything once, then forks one child (or one per rank) for each line of JSON on its standard
input, and answers with a line: how the child ended and what it found. `Runs` is the other end of the pipe.
"""

import contextlib
import gc
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny_elva import batch, pixels, tiny_model, video, with_pixels, words
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from elva_hf.training import checkpoints
from elva_hf.training.checkpoints import SafeCheckpoints, last_complete_checkpoint
from elva_hf.training.nonfinite import NonFiniteGuard

SECONDS = 40
GRIDS = (((2, 2), (2, 2)), ((1, 2),), ((2, 1), (2, 1), (2, 1)), ())


class Samples(Dataset):
    """Ids of short texts with and without videos."""

    def __init__(self, count=20):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        grids = GRIDS[index % len(GRIDS)]
        return {"index": index, "ids": words(3, index) + (video(*grids) if grids else []) + words(4, 100 + index)}


def collate(samples):
    ids = [sample["ids"] for sample in samples]
    inputs = batch(ids, side="right")
    patches = [pixels(row, sample["index"]) for row, sample in zip(ids, samples, strict=True)]
    patches = [drawn for drawn in patches if drawn is not None]
    inputs = with_pixels(inputs, torch.cat(patches) if patches else None)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


class T(SafeCheckpoints, Trainer):
    """Disturbs the loss by all three random generators."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * (1 + 0.1 * (random.random() + np.random.rand() + torch.rand(()).item()))


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": 2,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(folder, kind=T, callbacks=(), model=None, **options):
    set_seed(1)
    model = tiny_model(text={"attention_dropout": 0.1}) if model is None else model
    data = {"train_dataset": Samples(), "eval_dataset": Samples(), "data_collator": collate}
    args = arguments(folder, **options)
    if options.get("fsdp"):  # accelerate leaves a model whole where it sees processes on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return kind(model=model, args=args, callbacks=[*callbacks], **data)


def digest(value):
    """SHA-256 of all tensors and numbers in nested lists and dictionaries."""
    found = hashlib.sha256()

    def visit(part):
        if isinstance(part, dict):
            for key in sorted(part, key=str):
                found.update(str(key).encode())
                visit(part[key])
        elif isinstance(part, (list, tuple)):
            for item in part:
                visit(item)
        elif isinstance(part, torch.Tensor):
            part = part.to_local() if hasattr(part, "to_local") else part
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(part).encode())

    visit(value)
    return found.hexdigest()


def outcome(run):
    """What an interrupted run must have in common with an uninterrupted one."""
    log = [
        {key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")}
        for entry in run.state.log_history
        if "loss" in entry
    ]
    generators = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()]
    return {
        "step": run.state.global_step,
        "model": digest(run.model.state_dict()),
        "optimizer": digest(run.optimizer.state_dict()),
        "scheduler": digest(run.lr_scheduler.state_dict()),
        "generators": digest(generators),
        "losses": log,
    }


class Signal(TrainerCallback):
    """Write a byte to a pipe at the start of a step."""

    def __init__(self, pipe, step):
        self.pipe, self.step = pipe, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.pipe is not None:
            os.write(self.pipe, b"x")
            self.pipe = None


class Spoil(TrainerCallback):
    """Make the gradients of chosen steps NaN on this rank, and keep digests of the parameters after each step."""

    def __init__(self, steps):
        self.steps, self.found = steps, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        spoilt = state.global_step in self.steps
        self.handle = model.register_forward_hook(lambda *call: spoil(call[-1])) if spoilt else None

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        moments = optimizer.state_dict()
        self.found.append([digest(model.state_dict()), digest(moments.get("state", moments))])
        if self.handle is not None:
            self.handle.remove()


def spoil(outputs):
    outputs["loss"] = outputs["loss"] * float("nan")


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_in_a_file(value, path, *args, **kwargs):
    Path(path).write_bytes(b"half a file")
    die()


def die_in_the_manifest(path, text, *args, **kwargs):
    if path.name == checkpoints.MANIFEST:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        die()


def die_deleting(path, *args, **kwargs):
    if Path(path).name.startswith("deleted-"):
        next(Path(path).iterdir()).unlink()
        die()


DEATHS = {  # owner and name of a function, what to do before its call and after
    "after the first file": (T, "_save_optimizer_and_scheduler", die, None),
    "inside a file": (torch, "save", die_in_a_file, None),
    "before the manifest": (checkpoints, "seal_checkpoint", die, None),
    "inside the manifest": (Path, "write_text", die_in_the_manifest, None),
    "before the rename": (checkpoints, "_publish", die, None),
    "after the rename": (checkpoints, "_publish", None, die),
    "while deleting an older one": (checkpoints, "_remove", die_deleting, None),
    "after the deletion": (checkpoints, "_rotate", None, die),
}
KILL_POINTS = tuple(DEATHS)


def die_at(point, save):
    """Arrange in this process for its own death inside its `save`-th save (counted from 1)."""
    owner, name, before, after = DEATHS[point]
    inner, save_checkpoint, saves = getattr(owner, name), T._save_checkpoint, []

    def wrapped(*args, **kwargs):
        due = len(saves) == save
        if due and before:
            before(*args, **kwargs)
        result = inner(*args, **kwargs)
        if due and after:
            after()
        return result

    def count_saves(self, *args, **kwargs):
        saves.append(self.state.global_step)
        save_checkpoint(self, *args, **kwargs)

    setattr(owner, name, wrapped)
    T._save_checkpoint = count_saves


def child(order, pipe, rank):
    world = str(order.get("world", 1))
    if world != "1":
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"]), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= ranks | address | order.get("environment", {})
    kill = order.get("kill") or {}
    if "point" in kill and rank == 0:
        die_at(kill["point"], kill["save"])
    if rank == order.get("full_rank"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # less than the random generators' state
    spoiled = Spoil(order.get("spoil", []) if rank == 1 else [])
    callbacks = [Signal(pipe, kill.get("step")), *([NonFiniteGuard(), spoiled] if "spoil" in order else [])]
    run = trainer(order["folder"], callbacks=callbacks, **order.get("options", {}))
    found = last_complete_checkpoint(order["folder"])
    started = time.monotonic()
    run.train(resume_from_checkpoint=found)
    resumed = None if found is None else found.name
    answer = {"resumed": resumed, "seconds": time.monotonic() - started, "states": spoiled.found}
    return outcome(run) | answer | {"model_class": type(run.model_wrapped).__name__}


def fork(order, rank, pipe, answer):
    pid = os.fork()
    if pid:
        return pid
    log = os.open(f"{order['folder']}.log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 0
    try:
        answer.write_text(json.dumps(child(order, pipe, rank)))
    except Exception as error:
        answer.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        status = 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def wait(pid, seconds):
    """Status of a child, which is killed after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def serve_one(order):
    reading, writing = os.pipe()
    kill = order.get("kill") or {}
    answers = [Path(f"{order['folder']}.answer-{rank}.json") for rank in range(order.get("world", 1))]
    for path in answers:
        path.unlink(missing_ok=True)
    pids = [fork(order, rank, writing, path) for rank, path in enumerate(answers)]
    os.close(writing)
    doomed = []
    if "step" in kill and os.read(reading, 1):
        time.sleep(kill["after"])
        doomed = pids
    elif "point" in kill:
        os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        doomed = pids[1:]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    statuses = [wait(pid, SECONDS) for pid in pids]
    if os.WIFSIGNALED(statuses[0]):  # the other rank may have ended by itself when this one was gone
        return {"killed": True}
    found = [json.loads(path.read_text()) if path.exists() else {"error": "no answer"} for path in answers]
    return {"killed": False, "ranks": found, **found[0]}


class Runs:
    """Sends orders to the forking process: `folder`, `options` of the trainer, `kill`, `world`."""

    def __init__(self):
        tests = Path(__file__).parents[1]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, folder, **order):
        print(json.dumps({"folder": str(folder), **order}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the forking process died"
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401 - accelerate imports it in every child otherwise
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder)  # more imports
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(serve_one(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
