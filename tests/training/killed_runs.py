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
from accelerate.state import AcceleratorState
from tiny_elva import batch, pixels, tiny_model, video, with_pixels, words
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from elva_hf.training import checkpoints
from elva_hf.training.checkpoints import SafeCheckpoints, last_complete_checkpoint

GRIDS = (((2, 2), (2, 2)), ((1, 2),), ((2, 1), (2, 1), (2, 1)), ())
KILL_POINTS = (
    "after the first file",
    "inside a file",
    "before the manifest",
    "inside the manifest",
    "before the rename",
    "after the rename",
    "while deleting an older one",
    "after the deletion",
)


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
    dataset = Samples()
    return kind(
        model=model,
        args=arguments(folder, **options),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collate,
        callbacks=[*callbacks],
    )


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


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def die_at(point, save):
    """Arrange in this process for its own death inside its `save`-th save (counted from 1)."""
    seen = {"saves": 0}

    def wrap(owner, name, before=None, after=None):
        inner = getattr(owner, name)

        def wrapped(*args, **kwargs):
            due = seen["saves"] == save
            if due and before is not None:
                before(*args, **kwargs)
            result = inner(*args, **kwargs)
            if due and after is not None:
                after(*args, **kwargs)
            return result

        setattr(owner, name, wrapped)

    save_checkpoint = T._save_checkpoint

    def count_saves(self, *args, **kwargs):
        seen["saves"] += 1
        save_checkpoint(self, *args, **kwargs)

    T._save_checkpoint = count_saves

    def cut(value, path, *args, **kwargs):
        Path(path).write_bytes(b"half a file")
        die()

    def half_manifest(path, text, *args, **kwargs):
        if path.name == checkpoints.MANIFEST:
            with path.open("w") as file:
                file.write(text[: len(text) // 2])
            die()

    def deleting(path, *args, **kwargs):
        if Path(path).name.startswith("deleted-"):
            next(Path(path).iterdir()).unlink()
            die()

    match point:
        case "after the first file":
            wrap(T, "_save_optimizer_and_scheduler", before=lambda *args, **kwargs: die())
        case "inside a file":
            wrap(torch, "save", before=cut)
        case "before the manifest":
            wrap(checkpoints, "seal_checkpoint", before=lambda *args, **kwargs: die())
        case "inside the manifest":
            wrap(Path, "write_text", before=half_manifest)
        case "before the rename":
            wrap(checkpoints, "_publish", before=lambda *args, **kwargs: die())
        case "between the renames":
            wrap(os, "rename", after=lambda *args, **kwargs: die())
        case "after the rename":
            wrap(checkpoints, "_publish", after=lambda *args, **kwargs: die())
        case "while deleting an older one":
            wrap(checkpoints, "_remove", before=deleting)
        case "after the deletion":
            wrap(checkpoints, "_rotate", after=lambda *args, **kwargs: die())
        case _:
            raise ValueError(point)


def child(order, pipe, rank):
    folder = Path(order["folder"])
    world = order.get("world", 1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(order["port"]),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    kill = order.get("kill") or {}
    if "point" in kill and rank == 0:
        die_at(kill["point"], kill["save"])
    if rank == order.get("full_rank"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # less than the random generators' state
    run = trainer(folder, callbacks=[Signal(pipe, kill.get("step"))], **order.get("options", {}))
    found = last_complete_checkpoint(folder)
    started = time.monotonic()
    run.train(resume_from_checkpoint=found)
    resumed = None if found is None else found.name
    return {**outcome(run), "resumed": resumed, "seconds": time.monotonic() - started}


def serve_one(order):
    world = order.get("world", 1)
    reading, writing = os.pipe()
    answers = [Path(f"{order['folder']}.answer-{rank}.json") for rank in range(world)]
    pids = []
    for rank in range(world):
        answers[rank].unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            log = os.open(f"{order['folder']}.log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 0
            try:
                answers[rank].write_text(json.dumps(child(order, writing, rank)))
            except Exception as error:
                answers[rank].write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
                status = 1
                with contextlib.suppress(OSError):
                    traceback.print_exc()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(status)
        pids.append(pid)
    os.close(writing)
    kill = order.get("kill") or {}
    if "step" in kill and os.read(reading, 1):
        time.sleep(kill["after"])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    elif "point" in kill and world > 1:
        os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
    os.close(reading)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    if all(os.WIFSIGNALED(status) for status in statuses):
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
