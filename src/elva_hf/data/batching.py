"""Batches of samples of like length: order from a seed, lengths from plans, no list that grows with the data.

Samples are shuffled, cut into windows, and sorted by planned tokens inside a window only: a window is all that has to
be planned ahead, so millions of rows need no pass over them before training.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from elva_hf.data.datasets import BAD
from elva_hf.data.encoding import plan_row
from elva_hf.errors_elva import ConfigurationError
from elva_hf.options_elva import check_whole
from elva_hf.processing_elva import ElvaProcessor

UNREADABLE = 1
"""Length of a row that cannot be read; another one will replace it."""

_UNKNOWN = 0
_ROUNDS = 4
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


class LengthGroupedSampler(Sampler[int]):
    """Indices in an order in which the samples of a step have about the same number of tokens.

    Every rank gets the same order, of which accelerate gives each its share of every step; `Trainer` skips what a
    resumed run has seen.

    Args:
        lengths: `PlannedLengths`, or the tokens of every sample.
        batch_size: Samples of a step: those of one device times the number of devices.
        seed: Of the order.
        window: Steps whose samples are sorted together.
    """

    def __init__(self, lengths: PlannedLengths | Sequence[int], batch_size: int, *, seed: int = 0, window: int = 50):
        check_whole(batch_size, "batch_size", "samples")
        check_whole(window, "window", "steps")
        self.lengths = lengths if isinstance(lengths, PlannedLengths) else np.asarray(lengths)
        self.batch_size, self.seed, self.window, self.epoch = batch_size, seed, window, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        for number, (indices, lengths) in enumerate(
            windows(self.lengths, self.window * self.batch_size, self.seed, self.epoch)
        ):
            order = indices[np.argsort(lengths, kind="stable")]
            # a step that is not full stays the last one, and is one of short samples
            first = len(order) % self.batch_size
            full = order[first:].reshape(-1, self.batch_size)
            shuffled = np.random.default_rng((self.seed, self.epoch, number)).permutation(len(full))
            yield from np.concatenate([full[shuffled].ravel(), order[:first]]).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is; `Trainer` does."""
        self.epoch = epoch


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of as many samples as fit into a number of tokens, padding counted; for a `DataLoader` of one rank.

    All ranks get the same number of batches, and batches of like length at the same step. How many there are is known
    only at the end: give `Trainer` `max_steps`.

    Args:
        lengths: `PlannedLengths`, or the tokens of every sample.
        max_tokens: Of a batch: its longest sample times the number of samples.
        seed: Of the order.
        window: Samples that are sorted together.
        num_replicas: Ranks.
        rank: This one.
    """

    def __init__(
        self,
        lengths: PlannedLengths | Sequence[int],
        max_tokens: int,
        *,
        seed: int = 0,
        window: int = 4096,
        num_replicas: int = 1,
        rank: int = 0,
    ):
        for value, name in ((max_tokens, "max_tokens"), (window, "window"), (num_replicas, "num_replicas")):
            check_whole(value, name, {"max_tokens": "tokens", "window": "samples"}.get(name, "ranks"))
        if not 0 <= rank < num_replicas:
            raise ConfigurationError(f"rank is {rank}; give 0 to {num_replicas - 1}.")
        self.lengths = lengths if isinstance(lengths, PlannedLengths) else np.asarray(lengths)
        self.max_tokens, self.seed, self.window, self.epoch = max_tokens, seed, window, 0
        self.num_replicas, self.rank = num_replicas, rank

    def __iter__(self) -> Iterator[list[int]]:
        for number, (indices, lengths) in enumerate(windows(self.lengths, self.window, self.seed, self.epoch)):
            order = np.argsort(lengths, kind="stable")
            batches = cut_batches(lengths[order], self.max_tokens)
            batches = fill_steps(batches, self.num_replicas)
            steps = [batches[i : i + self.num_replicas] for i in range(0, len(batches), self.num_replicas)]
            for step in np.random.default_rng((self.seed, self.epoch, number)).permutation(len(steps)):
                start, end = steps[step][self.rank]
                yield indices[order[start:end]].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is."""
        self.epoch = epoch


def windows(
    lengths: PlannedLengths | np.ndarray, size: int, seed: int, epoch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled indices, cut into windows, and the lengths of their samples; the next window is planned meanwhile.

    Args:
        lengths: Of all samples.
        size: Samples of a window.
        seed: Of the order.
        epoch: Likewise.
    """

    def shuffled(start: int) -> np.ndarray:
        return permute(np.arange(start, min(start + size, len(lengths))), len(lengths), seed=seed, epoch=epoch)

    for start in range(0, len(lengths), size):
        indices = shuffled(start)
        if isinstance(lengths, PlannedLengths):
            planned = lengths(indices)
            lengths.prepare(shuffled(start + size))
            yield indices, planned
        else:
            yield indices, lengths[indices]


def permute(places: np.ndarray, size: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    """What stands at some places of a shuffled `range(size)`, without shuffling it: a Feistel network of four rounds.

    Args:
        places: `(n,)` int64, each in `range(size)`.
        size: Length of the range.
        seed: Of the order.
        epoch: Likewise.

    Returns:
        `(n,)` int64; over all places each number of the range once.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng((seed, epoch)).integers(0, 2**63, _ROUNDS, np.uint64)

    def shuffle(values: np.ndarray) -> np.ndarray:
        left, right = values >> np.uint64(half), values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << np.uint64(half)) | right

    values = shuffle(places.astype(np.uint64))
    while (outside := values >= size).any():  # the network permutes a power of four: go on until inside the range
        values[outside] = shuffle(values[outside])
    return values.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatter the bits of 64-bit numbers."""
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        values = (values ^ (values >> np.uint64(31))) * np.uint64(factor)
    return values ^ (values >> np.uint64(29))


def cut_batches(lengths: np.ndarray, max_tokens: int) -> list[tuple[int, int]]:
    """Start and end of each batch of samples that are sorted by length.

    Args:
        lengths: `(n,)` tokens, ascending.
        max_tokens: Of a batch, padded to its longest sample.

    Raises:
        ConfigurationError: A sample alone has more.
    """
    if len(lengths) and lengths[-1] > max_tokens:
        raise ConfigurationError(
            f"a sample has {lengths[-1]} tokens, more than max_tokens={max_tokens} of a batch; raise max_tokens, or "
            'give context_length with overflow="fit".'
        )
    batches, start = [], 0
    for end, length in enumerate(lengths.tolist()):
        if (end + 1 - start) * length > max_tokens:
            batches.append((start, end))
            start = end
    return [*batches, (start, len(lengths))]


def fill_steps(batches: list[tuple[int, int]], num_replicas: int) -> list[tuple[int, int]]:
    """As many batches as ranks share evenly: the largest are halved; where all hold one sample, the last is repeated.

    Args:
        batches: Start and end of each.
        num_replicas: Ranks.
    """
    batches = list(batches)
    while len(batches) % num_replicas:
        largest = max(range(len(batches)), key=lambda i: batches[i][1] - batches[i][0])
        start, end = batches[largest]
        if end - start < 2:
            batches.append(batches[-1])
        else:
            batches[largest : largest + 1] = [(start, (start + end) // 2), ((start + end) // 2, end)]
    return batches


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
