"""Mixtures read from front to back: shared among ranks and workers, shuffled in a buffer, resumed exactly.

Each worker reads a stretch of its own of every source, so that together they read each row once. The buffer holds
places of rows and not rows, so a state is small, and a row is read when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from elva_hf.data.readers import Rows, StreamRows
from elva_hf.data.rows import Row
from elva_hf.data.shuffling import RandomStream, pick_spread
from elva_hf.data.sources import DataSource, as_sources, check_filled, epoch_counts, name_row, open_source
from elva_hf.errors_elva import ConfigurationError, ElvaError


class StreamingMixture(IterableDataset):
    """Rows of several sources, interleaved at random in proportion to what is left of each.

    An epoch has the rows that one of a `Mixture` has; where a source is not seen whole, the next epoch goes on where
    this one ended. Every worker of every rank yields rows that no other yields.

    Args:
        sources: What is mixed, or a mapping by name.
        seed: Of the order.
        shuffle_buffer: Places that a worker keeps to draw from; 1 for the order of the files.
        rank: Of this process; asked of `torch.distributed` if None and it is running.
        world_size: Processes.
        even: Whether every worker gets equally many rows of a source, so that some of its last may be left out; then no
            rank waits for another at the end.
        data: By name of a source, what stands for its path: a list of records, or a table of `datasets`. An
            `IterableDataset` is read from its start on resuming, and its source says `num_samples`.

    Raises:
        ConfigurationError: A source without a path, or one that cannot be read.
    """

    def __init__(
        self,
        sources: Iterable[DataSource] | Mapping[str, DataSource],
        seed: int = 0,
        *,
        shuffle_buffer: int = 1000,
        rank: int | None = None,
        world_size: int | None = None,
        even: bool = False,
        data: Mapping[str, Any] | None = None,
    ):
        data = data or {}
        self.sources, self.seed, self.even = as_sources(sources), seed, even
        check_filled(self.sources, data)
        if shuffle_buffer < 1:
            raise ConfigurationError(f"shuffle_buffer is {shuffle_buffer}; give 1 or more.")
        self.shuffle_buffer = shuffle_buffer
        self.rank, self.world_size = _find_rank(rank, world_size)
        self.rows = [open_source(source, data.get(source.name), streaming=True) for source in self.sources]
        self.lengths = [_length(source, rows) for source, rows in zip(self.sources, self.rows, strict=True)]
        self.counts = epoch_counts(self.sources, self.lengths)
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._state: dict[str, Any] | None = None
        self._running: _Reading | None = None

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, of all ranks together."""
        return sum(self.counts)

    def __iter__(self) -> Iterator[Row]:
        return self.read(int(self._epoch))

    def read(self, epoch: int) -> Iterator[Row]:
        """Rows of this worker in an epoch, whatever epoch other workers are in."""
        shard, num_shards = self._shard()
        self._running = _Reading(self, epoch, shard, num_shards)
        if self._state is not None:
            self._running.restore(self._state)
            self._state = None
        return self._running

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is; one other than that of a state which was loaded starts at its beginning."""
        if self._state is not None and self._state["epoch"] != epoch:
            self._state = None
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the reading of this worker is, as JSON could hold it."""
        if self._state is not None:
            return dict(self._state)
        if self._running is None or self._running.epoch != int(self._epoch):
            return {"epoch": int(self._epoch)}
        return self._running.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, the next time it is read.

        Raises:
            ConfigurationError: The state is that of another mixture, seed, or number of workers; found when reading.
        """
        self._state, self._running = dict(state), None
        self._epoch.fill_(state["epoch"])

    def _shard(self) -> tuple[int, int]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return self.rank * count + number, self.world_size * count


class _Reading:
    """One reading of an epoch by one worker; a row that is wrong raises, and the next one follows all the same."""

    def __init__(self, mixture: StreamingMixture, epoch: int, shard: int, num_shards: int):
        self.mixture, self.epoch = mixture, epoch
        self.shard, self.num_shards = shard, num_shards
        self.random = RandomStream(mixture.seed, "stream", epoch, shard, num_shards)
        self.buffer: list[tuple[int, int]] = []
        self.drawn = [0] * len(mixture.sources)
        self.parts = [_Part(mixture, number, epoch, shard, num_shards) for number in range(len(mixture.sources))]

    def __iter__(self) -> _Reading:
        return self

    def __next__(self) -> Row:
        while len(self.buffer) < self.mixture.shuffle_buffer and self._left():
            self.buffer.append(self._draw())
        if not self.buffer:
            raise StopIteration
        place = self.random.below(len(self.buffer))
        self.buffer[place], self.buffer[-1] = self.buffer[-1], self.buffer[place]
        number, drawn = self.buffer.pop()
        return name_row(self.mixture.sources[number], self.parts[number].row(drawn))

    def state(self) -> dict[str, Any]:
        """What it takes to go on from here."""
        return {
            "epoch": self.epoch,
            "mixture": self._kind(),
            "random": self.random.state,
            "drawn": list(self.drawn),
            "buffer": [list(place) for place in self.buffer],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if "mixture" not in state:
            return
        for name, now in self._kind().items():
            if state["mixture"].get(name) != now:
                raise ConfigurationError(
                    f"the state to resume is of a stream with {name}={state['mixture'].get(name)}, this one has {now}; "
                    "resume with the same sources, seed and workers, or start the epoch over."
                )
        self.random.state = state["random"]
        self.drawn = list(state["drawn"])
        self.buffer = [(number, drawn) for number, drawn in state["buffer"]]
        for number, drawn in sorted(self.buffer):
            self.parts[number].reach(drawn)

    def _left(self) -> int:
        return sum(part.count - drawn for part, drawn in zip(self.parts, self.drawn, strict=True))

    def _draw(self) -> tuple[int, int]:
        """The next row of a source, each as likely as it has rows left."""
        ticket = self.random.below(self._left())
        number = 0
        while ticket >= (left := self.parts[number].count - self.drawn[number]):
            ticket -= left
            number += 1
        drawn = self.drawn[number]
        self.drawn[number] += 1
        self.parts[number].reach(drawn)
        return number, drawn

    def _kind(self) -> dict[str, Any]:
        mixture = self.mixture
        return {
            "seed": mixture.seed,
            "shuffle_buffer": mixture.shuffle_buffer,
            "shard": self.shard,
            "num_shards": self.num_shards,
            "even": mixture.even,
            "counts": {source.name: count for source, count in zip(mixture.sources, mixture.counts, strict=True)},
        }


class _Part:
    """The stretch of a source that one worker reads in one epoch."""

    def __init__(self, mixture: StreamingMixture, number: int, epoch: int, shard: int, num_shards: int):
        self.source, self.rows = mixture.sources[number], mixture.rows[number]
        self.length, total = mixture.lengths[number], mixture.counts[number]
        self.taken = min(self.length, self.source.max_samples or self.length)
        if mixture.even:
            self.count = total // num_shards
            start = shard * self.count
        else:
            start = shard * total // num_shards
            self.count = (shard + 1) * total // num_shards - start
        self.start = epoch * total + start
        self.waiting: dict[int, Any] = {}
        self.stream: Iterator[Any] | None = None
        self.next_record = 0

    def row(self, drawn: int) -> Row:
        """The row of a draw that was reached."""
        place = self._place(drawn)
        if isinstance(self.rows, StreamRows):
            return self.rows.row(self.waiting.pop(drawn), place)
        return self.rows[place]

    def reach(self, drawn: int) -> None:
        """Read on to a draw: of what has no indices, it must be kept from now on."""
        if isinstance(self.rows, StreamRows):
            self.waiting[drawn] = self._read(self.rows, self._place(drawn))

    def _place(self, drawn: int) -> int:
        place = (self.start + drawn) % self.taken
        return (
            place
            if self.taken == self.length
            else pick_spread(place, self.taken, self.length, "part", self.source.name)
        )

    def _read(self, rows: StreamRows, place: int) -> Any:
        """The record at a place, which is most often the next one."""
        if self.stream is None or place < self.next_record:
            self.stream, self.next_record = rows.records(place), place
        try:
            while self.next_record < place:
                next(self.stream)
                self.next_record += 1
            record = next(self.stream)
        except StopIteration:
            raise ElvaError(
                f"data source {self.source.name} ended after {self.next_record} rows, and was to have {self.length}; "
                "correct its num_samples."
            ) from None
        self.next_record += 1
        return record


def _find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    from torch import distributed

    running = distributed.is_available() and distributed.is_initialized()
    if (rank is None) != (world_size is None):
        raise ConfigurationError(f"rank is {rank} and world_size is {world_size}; give both or none.")
    if rank is None or world_size is None:
        return (distributed.get_rank(), distributed.get_world_size()) if running else (0, 1)
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"rank is {rank} of {world_size}; it counts from 0.")
    return rank, world_size


def _length(source: DataSource, rows: Rows | StreamRows) -> int:
    if isinstance(rows, Rows):
        return len(rows)
    if rows.num_rows is None:
        raise ConfigurationError(
            f"data source {source.name} is a stream of unknown length; set num_samples to its number of rows."
        )
    return rows.num_rows
