"""Mixtures of data sources: how often each is seen in an epoch, in an order that seed and epoch alone decide.

    mixture = Mixture([DataSource("webvid", "webvid.jsonl", repeat=2), DataSource("valor", "valor.jsonl")], seed=0)
    mixture[0]["id"]   # "valor/8812"

Nothing is shuffled in memory: the row that stands at a place is computed when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

from elva_hf.data.readers import Rows
from elva_hf.data.rows import Row
from elva_hf.data.shuffling import Permutation, pick_spread
from elva_hf.data.sources import DataSource, as_sources, check_filled, epoch_counts, name_row, open_source
from elva_hf.data.streams import StreamingMixture

__all__ = ["DataSource", "Mixture", "StreamingMixture", "open_source"]


class Mixture(Dataset):
    """Rows of several sources by index, shuffled.

    An epoch has every row of a source `repeat` times, or, where sources have weights, as many rows as all sources have
    together, shared out by weight. No row of a source comes again before all others of it have come, also over epochs.

    Args:
        sources: What is mixed, or a mapping by name.
        seed: Of the order.
        shuffle: False if a place holds the same row in every epoch, source after source, for samplers that shuffle and
            remember lengths by place; sources that are not seen whole then show the same part in every epoch.
        data: By name of a source, what stands for its path: a list of records, or a `datasets.Dataset`.

    Raises:
        ConfigurationError: A source without a path, or one that cannot be read.
    """

    def __init__(
        self,
        sources: Iterable[DataSource] | Mapping[str, DataSource],
        seed: int = 0,
        *,
        shuffle: bool = True,
        data: Mapping[str, Any] | None = None,
    ):
        data = data or {}
        self.sources, self.seed, self.shuffle = as_sources(sources), seed, shuffle
        check_filled(self.sources, data)
        self.rows: list[Rows] = [open_source(source, data.get(source.name)) for source in self.sources]
        self.counts = epoch_counts(self.sources, list(map(len, self.rows)))
        self._ends = list(accumulate(self.counts))
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # workers that persist see it change
        self._orders: dict[tuple, Permutation] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        """A row of this epoch.

        Raises:
            RowError: It cannot be trained on.
        """
        number, row = self.locate(index)
        return name_row(self.sources[number], self.rows[number][row])

    def locate(self, index: int) -> tuple[int, int]:
        """Which source stands at a place of this epoch, and which of its rows."""
        epoch = int(self._epoch) if self.shuffle else 0
        place = range(len(self))[index]
        if self.shuffle:
            place = self._order(len(self), "epoch", epoch)[place]
        number = bisect_right(self._ends, place)
        drawn = place - (self._ends[number - 1] if number else 0)
        return number, self._row(number, epoch * self.counts[number] + drawn)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is: another order, and where sources are not seen whole, other rows."""
        self._epoch.fill_(epoch)

    @property
    def fingerprint(self) -> str:
        """The same for mixtures that hold the same rows at the same places, as far as sizes and options tell."""
        sizes = [
            (source, len(rows), count) for source, rows, count in zip(self.sources, self.rows, self.counts, strict=True)
        ]
        return blake2b(repr((self.seed, self.shuffle, sizes)).encode(), digest_size=16).hexdigest()

    def _row(self, number: int, drawn: int) -> int:
        """The row of a source that is drawn at this place of all its draws."""
        source, total = self.sources[number], len(self.rows[number])
        count = min(total, source.max_samples or total)
        passes, place = divmod(drawn, count)
        row = self._order(count, "pass", source.name, passes)[place]
        return row if count == total else pick_spread(row, count, total, "part", source.name)

    def _order(self, size: int, *key: str | int) -> Permutation:
        if key not in self._orders:
            if len(self._orders) > 4 * len(self.sources):
                self._orders.clear()
            self._orders[key] = Permutation(size, self.seed, *key)
        return self._orders[key]
