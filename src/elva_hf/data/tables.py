"""Tables of Hugging Face `datasets`: objects, folders it has saved, parquet files. Videos are never decoded here.

`datasets` would decode videos with torchcodec; what is stored is `{"path", "bytes"}`, and so much is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elva_hf.data.rows import Origin
from elva_hf.errors_elva import ConfigurationError, ElvaError


def import_datasets() -> Any:
    """The package `datasets`.

    Raises:
        ConfigurationError: It is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigurationError('tables are read with datasets; pip install "elva-hf[train]" brings it.') from None
    return datasets


def is_table(value: Any) -> bool:
    """Whether an object is a `Dataset` or `IterableDataset`, found out without importing `datasets`."""
    return any(kind.__module__.split(".")[0] == "datasets" for kind in type(value).__mro__)


def is_stream(value: Any) -> bool:
    """Whether a table can only be read from front to back."""
    kinds = type(value).__mro__
    return any(kind.__name__ == "IterableDataset" and kind.__module__.split(".")[0] == "datasets" for kind in kinds)


class TableRecords:
    """Rows of a `Dataset` as they are stored: nothing in them is decoded, nothing of it is copied.

    Args:
        table: A `Dataset`.
        name: What errors call it.

    Raises:
        ElvaError: It is a dictionary of splits.
    """

    def __init__(self, table: Any, name: str):
        self.table, self.name = one_split(table).with_format("arrow"), name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (record,) = self.table[index : index + 1].to_pylist()
        return record

    def origin(self, index: int) -> Origin:
        """Where a row stands."""
        return Origin(self.name, index=index)


def one_split(table: Any) -> Any:
    """A table that is no dictionary of splits.

    Raises:
        ElvaError: It is one.
    """
    if isinstance(table, Mapping):
        raise ElvaError(f"the data set has the splits {', '.join(table)}; choose one, with split or table['train'].")
    return table


def open_parquet(files: Sequence[str], *, streaming: bool = False) -> Any:
    """Parquet files as one table; `datasets` copies them into its cache unless they are streamed.

    Raises:
        ElvaError: They cannot be read.
    """
    datasets = import_datasets()
    try:
        table = datasets.load_dataset("parquet", data_files=list(files), split="train", streaming=streaming)
    except Exception as error:
        raise ElvaError(f"{files[0]}: cannot be read as parquet: {_first_line(error)}") from error
    return table


def open_saved(folder: str, split: str | None = None) -> Any:
    """A folder written by `save_to_disk`, memory-mapped.

    Raises:
        ElvaError: It is none, or has no such split.
    """
    datasets = import_datasets()
    try:
        table = datasets.load_from_disk(folder)
    except Exception as error:
        raise ElvaError(f"{folder}: cannot be read by datasets: {_first_line(error)}") from error
    if isinstance(table, Mapping):
        if split not in table:
            raise ElvaError(f"{folder} has the splits {', '.join(table)}; set split to one (it is {split!r}).")
        table = table[split]
    return table


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
