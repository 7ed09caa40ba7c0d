"""Tokens of rows, planned without decoding: when they are asked for, in processes of their own, and once for a run."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from elva_hf.data.datasets import BAD
from elva_hf.data.encoding import plan_row
from elva_hf.processing_elva import ElvaProcessor

UNREADABLE = 1
"""Length of a row that cannot be read; another one will replace it."""

_UNKNOWN = 0
_FINGERPRINTED_ROWS = 64

Plan = Callable[[int], int]


class PlannedLengths:
    """Tokens of rows, planned when they are asked for and kept in a file beside the run.

    The file's name holds a fingerprint of the rows and of all that decides on their tokens, so that it never speaks for
    other data. Its memory is mapped, not held.

    Args:
        rows: Anything with `__len__` and `__getitem__` that gives rows.
        processor: Of the model.
        folder: Where the file lies; None holds the lengths in memory, four bytes a row.
        num_workers: Processes that plan ahead; 0 plans when asked.
        **options: Of the video processor, as the data set has them.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        processor: ElvaProcessor,
        *,
        folder: str | os.PathLike[str] | None = None,
        num_workers: int = 0,
        **options: Any,
    ):
        self._plan = partial(plan_index, rows, processor, options)
        self.num_workers = num_workers
        self.path = None
        if folder is not None:
            self.path = Path(folder) / f"lengths-{fingerprint_rows(rows, processor, options)}.npy"
        self._lengths = np.zeros(len(rows), np.int32) if self.path is None else _map_lengths(self.path, len(rows))
        self._pool: ProcessPoolExecutor | None = None
        self._pending: list[tuple[np.ndarray, Future]] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of some rows, `(n,)`; `UNREADABLE` for one that cannot be read."""
        self.prepare(indices)
        for missing, planned in self._pending:
            self._lengths[missing] = planned.result()
        self._pending = []
        missing = self._missing(indices)
        self._lengths[missing] = [self._plan(index) for index in missing.tolist()]
        return np.array(self._lengths[indices])

    def prepare(self, indices: np.ndarray) -> None:
        """Begin to plan some rows in the worker processes, if there are any, and do not wait."""
        missing = self._missing(indices)
        for pending, _ in self._pending:
            missing = np.setdiff1d(missing, pending)
        if not self.num_workers or not len(missing):
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy threads and devices
            self._pool = ProcessPoolExecutor(self.num_workers, context, _start_worker, (self._plan,))
        for part in np.array_split(missing, min(len(missing), 4 * self.num_workers)):
            self._pending.append((part, self._pool.submit(_plan_in_worker, part.tolist())))

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._pending = None, []

    def _missing(self, indices: np.ndarray) -> np.ndarray:
        return np.unique(indices[self._lengths[indices] == _UNKNOWN])


def plan_index(rows: Sequence[Mapping[str, Any]], processor: ElvaProcessor, options: dict[str, Any], index: int) -> int:
    """Tokens of a row; `UNREADABLE` if it cannot be read, which the data set will say when its turn comes."""
    try:
        return plan_row(rows[index], processor, **options)
    except BAD:
        return UNREADABLE


_worker_plan: list[Plan] = []


def _start_worker(plan: Plan) -> None:
    _worker_plan.append(plan)


def _plan_in_worker(indices: list[int]) -> list[int]:
    return [_worker_plan[0](index) for index in indices]


def fingerprint_rows(rows: Sequence[Any], processor: ElvaProcessor, options: Mapping[str, Any]) -> str:
    """16 hexadecimal digits for rows and all that decides on their tokens; of many rows 64 are looked at.

    Args:
        rows: Their own `fingerprint` is taken if they have one.
        processor: Of the model.
        options: Of the video processor.
    """
    own = getattr(rows, "fingerprint", None)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), _FINGERPRINTED_ROWS)).astype(int).tolist()
    facts = {
        "rows": len(rows),
        "content": own if isinstance(own, str) else [_read_row(rows, index) for index in chosen],
        "video_processor": processor.video_processor.to_dict(),
        "chat_template": processor.chat_template,
        "tokenizer": [len(processor.tokenizer), processor.tokenizer("What happens in 12 frames?")["input_ids"]],
        "options": dict(options),
    }
    text = json.dumps(facts, sort_keys=True, default=_describe)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


def _read_row(rows: Sequence[Any], index: int) -> Any:
    try:
        return rows[index]
    except BAD as error:
        return str(error)


def _describe(value: Any) -> str:
    """What JSON does not know, in a way that is the same in every process."""
    content = hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest() if hasattr(value, "shape") else ""
    return f"{type(value).__name__} {getattr(value, 'shape', '')} {content or repr(value)}"


def _map_lengths(path: Path, count: int) -> np.ndarray:
    """The file of lengths as an array, made anew if it is not there or cut."""
    try:
        found = np.load(path, mmap_mode="r+")
        if found.shape == (count,) and found.dtype == np.int32:
            return found
    except (OSError, ValueError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_name(f"{path.name}.{os.getpid()}")
    np.lib.format.open_memmap(begun, "w+", np.int32, (count,)).flush()
    os.replace(begun, path)
    return np.load(path, mmap_mode="r+")
