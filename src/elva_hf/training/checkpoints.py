"""Checkpoints that are either whole or not there: written aside, synced, listed in a manifest, then renamed.

A checkpoint named `checkpoint-N` is complete by construction, also for a resume by plain transformers. What is being
written, replaced or deleted lies in the folder `_partial`, which no resume looks at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from torch import Tensor, distributed
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_gather

from elva_hf.errors_elva import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "COMPLETE.json"
"""Last file of a checkpoint to be written: the sizes of all others."""

PARTIAL = "_partial"
"""Folder inside the run folder for checkpoints that are being written or deleted; pushes to the Hub skip `_*`."""

SMALL_FILE_BYTES = 16 * 2**20
"""Smaller files are listed with their SHA-256 and read again before a resume."""

LOSS_SUM = "loss_sum.json"
"""The loss since the last line of the log, which `trainer_state.json` lacks."""

_NAME = re.compile(r"checkpoint-(\d+)")
_STORAGE_MESSAGES = ("PytorchStreamWriter", "inline_container", "file write failed", "os error", "iostream error")


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run folder, None if there is none; says in the log what it passed over.

    Puts back a checkpoint that a crash caught between the two renames that replace it.
    """
    folder = Path(folder)
    _put_back_replaced(folder)
    for path in reversed(_checkpoints(folder)):
        fault = checkpoint_fault(path)
        if fault is None:
            return path
        logger.warning("%s is passed over: %s", path, fault)
    return None


def checkpoint_fault(folder: str | Path, *, hashes: bool = True) -> str | None:
    """What keeps a checkpoint from being whole, naming the file; None if nothing does.

    Args:
        hashes: Also compare the SHA-256 of the files that the manifest lists with one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, step = dict(manifest["files"]), int(manifest["global_step"])
        wanted = {name: (int(entry["size"]), entry.get("sha256")) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not written to its end (or not by elva-hf)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        return f"{MANIFEST} is that of step {step}"
    faults = (_file_fault(folder, name, size, sha256 if hashes else None) for name, (size, sha256) in wanted.items())
    return next((fault for fault in faults if fault), None)


def seal_checkpoint(folder: str | Path, *, hashes: Literal["small", "all"] = "small") -> None:
    """Sync every file of a checkpoint to disk and write its manifest, which says that it is whole.

    `SafeCheckpoints` does this to its own; call it for a checkpoint of another trainer that you know to be whole.

    Args:
        hashes: Which files are listed with their SHA-256 beside their size: `"small"` (under 16 MB) or all.

    Raises:
        CheckpointError: The folder holds no `trainer_state.json`.
    """
    folder = Path(folder)
    try:
        step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of a Trainer: trainer_state.json: {error!r}") from error
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"size": size} | (
            {"sha256": _sha256(path)} if hashes == "all" or size < SMALL_FILE_BYTES else {}
        )
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps({"global_step": step, "files": files}, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


class SafeCheckpoints:
    """Mixin to put before a `Trainer`: `class T(SafeCheckpoints, Trainer)`.

    `checkpoint-N` appears in one rename after all its files are on disk. Older ones are deleted only then, and only
    whole ones count for `save_total_limit`. `train(resume_from_checkpoint=True)` resumes from the newest whole one.
    The run folder lies on a disk that all ranks see, or `save_on_each_node` is set.
    """

    checkpoint_hashes: Literal["small", "all"] = "small"
    """Files listed with their SHA-256, see `seal_checkpoint`."""

    _redirected_to: Path | None = None
    _push_is_due = False
    _resumed_loss: dict[str, float] | None = None

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, from a whole checkpoint.

        Raises:
            CheckpointError: The checkpoint asked for is not whole, the run folder has none, or one cannot be written.
        """
        checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        self._resumed_loss = _read_loss_sum(checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, asked: str | Path | bool | None) -> str | None:
        if asked is None or asked is False:
            return None
        found, fault = None, None
        if self.args.process_index == 0:
            found = last_complete_checkpoint(self.args.output_dir) if asked is True else Path(asked)
            fault = "it holds no whole checkpoint" if found is None else checkpoint_fault(found)
        found, fault = self._from_first_rank([found, fault])
        if fault is None:
            if not _has_optimizer(found):
                logger.warning("%s holds no optimizer: its state, the schedule and random numbers start anew", found)
            return str(found)
        raise CheckpointError(
            f"cannot resume from {self.args.output_dir if asked is True else asked}: {fault}; resume from an older "
            "checkpoint (last_complete_checkpoint finds it), or mark one that you know to be whole with seal_checkpoint"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._resumed_loss is not None:
            self._tr_loss += self._resumed_loss["loss"]
            self._total_loss_scalar -= self._resumed_loss["loss"]  # the final mean is over the steps of this call
            self._globalstep_last_logged = int(self._resumed_loss["last_logged_step"])
            self._resumed_loss = None
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._redirected_to is None else str(self._redirected_to)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._redirected_to is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._push_is_due = True  # the background upload needs the final name

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        partial, final = run / PARTIAL / name, run / name
        with self._all_or_none(run, name):
            if self.args.should_save:
                _prepare(run, self._bytes_needed(run))
        with self._all_or_none(run, name):
            self._write(model, trial, run, partial)
        with self._all_or_none(run, name):
            if self.args.should_save:
                seal_checkpoint(partial, hashes=self.checkpoint_hashes)
                _publish(partial, final)
        if self._push_is_due:
            self._push_is_due = False
            super()._push_from_checkpoint(str(final))
        if self.args.should_save:
            _rotate(run, self.args.save_total_limit, {final, Path(self.state.best_model_checkpoint or final)})
            _remove(run / PARTIAL)

    def _write(self, model: Any, trial: Any, run: Path, partial: Path) -> None:
        state, best = self.state, self.state.best_global_step
        self._keep_callback_states()
        loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        state.best_global_step = None  # else transformers looks for the best checkpoint beside the partial one
        self._redirected_to = partial.parent
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._redirected_to, state.best_global_step = None, best
        best_path = run / f"checkpoint-{best}"
        if best and (best == state.global_step or best_path.is_dir()):
            state.best_model_checkpoint = str(best_path)
        if self.args.should_save:
            state.save_to_json(str(partial / "trainer_state.json"))
            sums = {"loss": loss, "last_logged_step": self._globalstep_last_logged}
            (partial / LOSS_SUM).write_text(json.dumps(sums), encoding="utf-8")

    def _keep_callback_states(self) -> None:
        """Make room for callbacks that a resumed checkpoint did not know, and for each of several of one class."""
        callbacks = [*self.callback_handler.callbacks, self.control]
        found = [type(callback).__name__ for callback in callbacks if isinstance(callback, ExportableState)]
        self.state.stateful_callbacks.update({name: [] if found.count(name) > 1 else {} for name in found})

    def _bytes_needed(self, run: Path) -> int:
        """Size of the last whole checkpoint, or of what the model and its optimizer will take."""
        whole = _whole_checkpoints(run)
        if whole:
            return sum(path.stat().st_size for path in whole[-1].rglob("*") if path.is_file())
        parameters = list(self.model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        size = sum(map(_num_bytes, trained if hasattr(self.model, "peft_config") else parameters))
        if self.is_fsdp_enabled and "FULL" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            size *= 2  # for from_pretrained and for FSDP
        if self.args.save_only_model:
            return size
        if self.is_deepspeed_enabled:
            return size + 12 * sum(map(_numel, trained))  # float32 weights and two moments
        return size + 2 * sum(map(_num_bytes, trained))

    @contextmanager
    def _all_or_none(self, run: Path, name: str) -> Iterator[None]:
        """Raise on every rank if one raises, and remove what was written."""
        failure = None
        try:
            yield
        except Exception as error:  # raised again below, on all ranks
            failure = error
            if _is_storage_error(error):
                failure = CheckpointError(_storage_message(run, name, error, self._bytes_needed(run)))
                failure.__cause__ = error
        if failure is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            failures = [str(failure)]  # the others may be inside a collective of their own: the launcher ends them
        else:
            failures = self._from_all_ranks(None if failure is None else f"{type(failure).__name__}: {failure}")
        if any(failures) and self.args.should_save:
            shutil.rmtree(run / PARTIAL, ignore_errors=True)
        if failure is not None:
            raise failure
        for rank, message in enumerate(failures):
            if message is not None:
                raise CheckpointError(f"{name} was given up, rank {rank} could not write its part: {message}")

    def _from_all_ranks(self, value: Any) -> list[Any]:
        if not _is_distributed():
            return [value]
        values = distributed.get_world_size() * [None]
        distributed.all_gather_object(values, value)
        return values

    def _from_first_rank(self, values: list[Any]) -> list[Any]:
        if _is_distributed():
            distributed.broadcast_object_list(values, src=0, device=self.args.device)
        return values


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _checkpoints(folder: Path) -> list[Path]:
    """Folders named `checkpoint-N`, oldest step first."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps) if steps[step].is_dir()]


def _file_fault(folder: Path, name: str, size: int, sha256: str | None) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    found = path.stat().st_size
    if found != size:
        return f"{name} has {found} bytes where {MANIFEST} says {size}"
    if sha256 is not None and _sha256(path) != sha256:
        return f"{name} has another SHA-256 than {MANIFEST} says"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder; they order the rename themselves
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _prepare(run: Path, size: int) -> None:
    """Clear what a crash left, and see that there is room for a checkpoint."""
    _put_back_replaced(run)
    if (run / PARTIAL).exists():
        logger.warning("%s was left by a save that did not end; it is removed", run / PARTIAL)
        shutil.rmtree(run / PARTIAL)
    (run / PARTIAL).mkdir(parents=True)
    if _free_bytes(run) < _with_margin(size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run))


def _with_margin(size: int) -> int:
    return size + size // 50 + 2**20


def _publish(partial: Path, final: Path) -> None:
    if final.exists():
        os.rename(final, partial.with_name(f"replaced-{final.name}"))
    os.rename(partial, final)
    _sync(final.parent)


def _put_back_replaced(run: Path) -> None:
    for replaced in (run / PARTIAL).glob("replaced-checkpoint-*"):
        final = run / replaced.name.removeprefix("replaced-")
        if not final.exists() and checkpoint_fault(replaced) is None:
            os.rename(replaced, final)


def _rotate(run: Path, limit: int | None, protected: set[Path]) -> None:
    """Delete the oldest whole checkpoints beyond `limit`, never a protected one."""
    if limit is None or limit <= 0:
        return
    whole, protected = _whole_checkpoints(run), {path.resolve() for path in protected}
    others = [path for path in whole if path.resolve() not in protected]
    surplus = len(whole) - max(limit, len(whole) - len(others))
    for path in others[: max(surplus, 0)]:
        logger.info("deleting %s because of save_total_limit=%s", path, limit)
        doomed = run / PARTIAL / f"deleted-{path.name}"
        os.rename(path, doomed)
        _remove(doomed)


def _whole_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints by the sizes of their files, oldest step first."""
    return [path for path in _checkpoints(run) if checkpoint_fault(path, hashes=False) is None]


def _remove(folder: Path) -> None:
    """Delete a folder; what cannot be deleted is said, and tried again at the next save."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def _is_storage_error(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    return isinstance(error, (RuntimeError, SafetensorError)) and any(part in str(error) for part in _STORAGE_MESSAGES)


def _storage_message(run: Path, name: str, error: Exception, size: int) -> str:
    previous = _whole_checkpoints(run)
    kept = f"{previous[-1].name} is untouched" if previous else "there is no earlier checkpoint"
    reason = " ".join(str(error).split())[:300]
    return (
        f"{run / name} could not be written: {reason}; it needs about {_with_margin(size)} bytes beside the older ones "
        f"and {_free_bytes(run)} are free; free some, lower save_total_limit or move output_dir to another disk, then "
        f"resume with resume_from_checkpoint=True ({kept})"
    )


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _numel(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in place


def _num_bytes(parameter: Tensor) -> int:
    return _numel(parameter) * parameter.element_size()


def _has_optimizer(checkpoint: str | Path) -> bool:
    names = [path.name for path in Path(checkpoint).iterdir()]
    return any(name.startswith("optimizer") or name == "latest" for name in names)  # `latest`: DeepSpeed


def _read_loss_sum(checkpoint: str | None) -> dict[str, float] | None:
    path = None if checkpoint is None else Path(checkpoint) / LOSS_SUM
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
