"""What a mixture is made of: a data set, how it is read, and how much of it is taken."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elva_hf.data.readers import FORMATS, ReadOptions, Rows, StreamRows, check_files, list_files, open_rows
from elva_hf.data.records import RecordList
from elva_hf.data.rows import Row, RowError, check_clip
from elva_hf.data.tables import is_stream, open_parquet
from elva_hf.data.toy_rows import ToyRows, open_toy_rows
from elva_hf.errors_elva import ConfigurationError, ElvaError

TOY_WORLD = "toy_world"
_TOY_FIELDS = tuple(ToyRows.__dataclass_fields__)


@dataclass(frozen=True)
class DataSource:
    """One data set of a mixture.

    Args:
        name: Its name, which stands before the ids of its rows.
        path: What `read_rows` takes; None is still to be filled in.
        format: See `ReadOptions`; `"toy_world"` makes rows instead of reading them.
        media_root: See `ReadOptions`.
        num_samples: Rows that it is expected to have (Table 8); of a stream whose length is unknown, those of a pass.
        max_samples: Rows taken of it at most: a random part, spread over the file, always the same.
        weight: Share of the mixture, relative to the others', which then have weights too; None for as many as it has.
        repeat: Times that its rows are seen in an epoch; a fraction takes other rows in each epoch.
        split: See `ReadOptions`.
        independent_turns: See `ReadOptions`.
        video: See `ReadOptions`.
        caption_prompt: See `ReadOptions`.
        ignore_keys: See `ReadOptions`.
        allow_urls: See `ReadOptions`.
        options: Of the format: those of `ToyRows`, or `dataset`, the entry of a `dataset_info.json`.

    Raises:
        ConfigurationError: A value that is none.
    """

    name: str
    path: str | None = None
    format: str | None = None
    media_root: str | None = None
    num_samples: int | None = None
    max_samples: int | None = None
    weight: float | None = None
    repeat: float = 1.0
    split: str | None = None
    independent_turns: bool | None = None
    video: dict[str, Any] = field(default_factory=dict)
    caption_prompt: str = ""
    ignore_keys: tuple[str, ...] = ()
    allow_urls: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigurationError(f"a data source has the name {self.name!r}; give text.")
        formats = (*FORMATS, TOY_WORLD)
        if self.format is not None and self.format not in formats:
            raise ConfigurationError(f"{self.name}: format is {self.format!r}; known are {', '.join(formats)}.")
        for name in ("num_samples", "max_samples"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{self.name}: {name} is {value!r}; give a whole number, 1 or more.")
        _check_number(self, "weight", least=0.0)
        _check_number(self, "repeat", least=0.0)
        if self.repeat == 0:
            raise ConfigurationError(f"{self.name}: repeat is 0; leave the source out instead.")
        if self.weight is not None and self.repeat != 1:
            raise ConfigurationError(f"{self.name}: weight and repeat exclude each other; keep one.")
        known = _TOY_FIELDS if self.format == TOY_WORLD else ("dataset",)
        for name in self.options:
            if name not in known:
                raise ConfigurationError(f"{self.name}: options has {name!r}; known are {', '.join(known)}.")
        try:
            check_clip(self.video)
        except ElvaError as error:
            raise ConfigurationError(f"{self.name}: {error}") from None

    @property
    def is_missing(self) -> bool:
        """Whether its path is still to be filled in."""
        return self.path is None and self.format != TOY_WORLD

    @property
    def read_options(self) -> ReadOptions:
        """How it is read."""
        return ReadOptions(
            format="messages" if self.format == TOY_WORLD else self.format,
            media_root=self.media_root,
            split=self.split,
            dataset=self.options.get("dataset"),
            ignore_keys=tuple(self.ignore_keys),
            independent_turns=self.independent_turns,
            caption_prompt=self.caption_prompt,
            allow_urls=self.allow_urls,
            video=self.video,
        )


def check_filled(sources: Iterable[DataSource], given: Iterable[str] = ()) -> None:
    """Check that every source has a path.

    Args:
        sources: All of a mixture, with names of their own.
        given: Names of those that need none, for their data are in memory.

    Raises:
        ConfigurationError: Naming all that have none, and how to give them.
    """
    sources = list(sources)
    names = [source.name for source in sources]
    double = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if double is not None:
        raise ConfigurationError(f"two data sources are named {double!r}; give each a name of its own.")
    if not sources:
        raise ConfigurationError("a mixture needs at least one data source; add one under data.sources.")
    missing = [source.name for source in sources if source.is_missing and source.name not in set(given)]
    if missing:
        wanted = " ".join(f"data.sources.{name}.path=..." for name in missing)
        raise ConfigurationError(f"data sources without a path: {', '.join(missing)}. Fill them in: {wanted}")


def open_source(source: DataSource, data: Any = None, *, streaming: bool = False) -> Rows | StreamRows:
    """The rows of a source.

    Args:
        source: What to open.
        data: What stands for its path: a list of records, or a table of `datasets`.
        streaming: Whether rows may come from front to back only, where that saves a copy of the data.

    Raises:
        ElvaError: It cannot be read.
    """
    try:
        return _open(source, source.path if data is None else data, streaming)
    except RowError:
        raise
    except ElvaError as error:
        raise ConfigurationError(f"data source {source.name}: {error}") from error


def _open(source: DataSource, data: Any, streaming: bool) -> Rows | StreamRows:
    options = source.read_options
    if source.format == TOY_WORLD:
        split = {} if source.split is None else {"split": source.split}
        rows = open_toy_rows(**source.options, **split)
        return Rows(RecordList(rows, TOY_WORLD), options.conversion("messages", ""))
    if streaming and isinstance(data, str) and _is_parquet(data):
        files = list_files(data)
        check_files(files)
        table = open_parquet(files, streaming=True)
        return StreamRows(table, options, num_rows=count_parquet(files))
    if is_stream(data):
        if not streaming:
            raise ElvaError("an IterableDataset has no indices; use a StreamingMixture.")
        return StreamRows(data, options, num_rows=source.num_samples)
    return open_rows(data, options)


def count_parquet(files: Sequence[str]) -> int:
    """Rows of parquet files, by their footers."""
    from pyarrow import parquet

    return sum(parquet.read_metadata(file).num_rows for file in files)


def epoch_counts(sources: Sequence[DataSource], lengths: Sequence[int]) -> list[int]:
    """Rows of each source in an epoch: as many as it has times `repeat`, or by weight as many as all have together.

    Args:
        sources: Of a mixture.
        lengths: Rows of each.

    Raises:
        ConfigurationError: Some have weights and others none, or all weights are 0.
    """
    lengths = [min(length, source.max_samples or length) for source, length in zip(sources, lengths, strict=True)]
    weights = [source.weight for source in sources]
    if all(weight is None for weight in weights):
        return [max(1, round(length * source.repeat)) for source, length in zip(sources, lengths, strict=True)]
    without = [source.name for source in sources if source.weight is None]
    if without or not any(weights):
        what = f"{', '.join(without)} has no weight, others have" if without else "all weights are 0"
        raise ConfigurationError(f"{what}; give every data source a weight above 0, or none of them.")
    return _apportion(sum(lengths), [weight or 0.0 for weight in weights])


def name_row(source: DataSource, row: Row) -> Row:
    """A row whose id says where it comes from."""
    return {**row, "id": f"{source.name}/{row['id']}"}


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to weights whose sum is `total`, by largest remainder."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _check_number(source: DataSource, name: str, least: float) -> None:
    value = getattr(source, name)
    if value is None and name == "weight":
        return
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= least
    if not fine:
        raise ConfigurationError(f"{source.name}: {name} is {value!r}; give a number, {least:g} or more.")


def _is_parquet(path: str) -> bool:
    if os.path.isdir(path):
        held = os.listdir(path)
        return not {"state.json", "dataset_dict.json"} & set(held) and any(name.endswith(".parquet") for name in held)
    return path.endswith(".parquet")


def as_sources(sources: Iterable[DataSource] | Mapping[str, DataSource]) -> list[DataSource]:
    """Sources of a list, or of a recipe's mapping by name."""
    return list(sources.values() if isinstance(sources, Mapping) else sources)
