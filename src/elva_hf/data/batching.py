"""Batches of samples of like length: order from a seed, lengths from plans, no list that grows with the data.

Samples are shuffled, cut into windows, and sorted by planned tokens inside a window only: a window is all that has to
be planned ahead, so millions of rows need no pass over them before training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from elva_hf.data.lengths import PlannedLengths
from elva_hf.errors_elva import ConfigurationError
from elva_hf.options_elva import check_whole

_ROUNDS = 4
_CHUNK = 4096


class EpochDataset(Protocol):
    """A data set that knows its epoch."""

    epoch: int

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


class ShuffledSampler(Sampler[int]):
    """Indices of a data set in the order of a seed and the epoch, the same on every rank.

    It keeps no epoch of its own but that of the data set: accelerate tells a new epoch to the one or to the other,
    depending on whether a run is resumed and on how many devices.

    Args:
        dataset: With `epoch` and `set_epoch`, an `ElvaDataset` for example.
        seed: Of the order.
    """

    def __init__(self, dataset: EpochDataset, *, seed: int = 0):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        size, epoch = len(self), self.epoch
        for start in range(0, size, _CHUNK):
            places = np.arange(start, min(start + _CHUNK, size))
            yield from permute(places, size, seed=self.seed, epoch=epoch).tolist()

    @property
    def epoch(self) -> int:
        """That of the data set."""
        return self.dataset.epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is; `Trainer` does."""
        self.dataset.set_epoch(epoch)


class LengthGroupedSampler(ShuffledSampler):
    """Indices in an order in which the samples of a step have about the same number of tokens.

    Every rank gets the same order, of which accelerate gives each its share of every step; `Trainer` skips what a
    resumed run has seen.

    Args:
        dataset: As in `ShuffledSampler`.
        lengths: `PlannedLengths`, or the tokens of every sample.
        batch_size: Samples of a step: those of one device times the number of devices.
        seed: Of the order.
        window: Steps whose samples are sorted together.
    """

    def __init__(
        self,
        dataset: EpochDataset,
        lengths: PlannedLengths | Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        window: int = 50,
    ):
        super().__init__(dataset, seed=seed)
        check_whole(batch_size, "batch_size", "samples")
        check_whole(window, "window", "steps")
        self.lengths = _check_lengths(lengths, len(dataset))
        self.batch_size, self.window = batch_size, window

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        for number, (indices, lengths) in enumerate(
            windows(self.lengths, self.window * self.batch_size, self.seed, epoch)
        ):
            order = indices[np.argsort(lengths, kind="stable")]
            # a step that is not full stays the last one, and is one of short samples
            first = len(order) % self.batch_size
            full = order[first:].reshape(-1, self.batch_size)
            shuffled = np.random.default_rng((self.seed, epoch, number)).permutation(len(full))
            yield from np.concatenate([full[shuffled].ravel(), order[:first]]).tolist()


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of as many samples as fit into a number of tokens, padding counted; for a `DataLoader` of one rank.

    All ranks get the same number of batches, and batches of like length at the same step. How many there are is known
    only at the end: give `Trainer` `max_steps`.

    Args:
        dataset: As in `ShuffledSampler`.
        lengths: `PlannedLengths`, or the tokens of every sample.
        max_tokens: Of a batch: its longest sample times the number of samples.
        seed: Of the order.
        window: Samples that are sorted together.
        num_replicas: Ranks.
        rank: This one.
    """

    def __init__(
        self,
        dataset: EpochDataset,
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
        self.dataset, self.lengths = dataset, _check_lengths(lengths, len(dataset))
        self.max_tokens, self.seed, self.window = max_tokens, seed, window
        self.num_replicas, self.rank = num_replicas, rank

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.dataset.epoch
        for number, (indices, lengths) in enumerate(windows(self.lengths, self.window, self.seed, epoch)):
            order = np.argsort(lengths, kind="stable")
            batches = cut_batches(lengths[order], self.max_tokens)
            batches = fill_steps(batches, self.num_replicas)
            steps = [batches[i : i + self.num_replicas] for i in range(0, len(batches), self.num_replicas)]
            for step in np.random.default_rng((self.seed, epoch, number)).permutation(len(steps)):
                start, end = steps[step][self.rank]
                yield indices[order[start:end]].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is."""
        self.dataset.set_epoch(epoch)


def _check_lengths(lengths: PlannedLengths | Sequence[int], count: int) -> PlannedLengths | np.ndarray:
    if len(lengths) != count:
        raise ConfigurationError(f"{len(lengths)} lengths for {count} samples; give the length of every sample.")
    return lengths if isinstance(lengths, PlannedLengths) else np.asarray(lengths)


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
