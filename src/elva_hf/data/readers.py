"""Data sets of any known format as canonical rows, by index and lazily.

    rows = read_rows("train.json", media_root="clips")   # LLaVA, ShareGPT, ms-swift, LLaMA-Factory, messages, ...
    rows[0]["messages"]

How records are stored (JSON array, JSON lines, parquet, `datasets`, tar shards) and what they look like (the schemas)
are found out apart from each other: any schema may stand in any container.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from elva_hf.data.llama_factory import read_dataset_info
from elva_hf.data.records import JoinedRecords, JsonRecords, RecordList, Records, starts_as
from elva_hf.data.rows import MediaRoot, Origin, Row, RowError, check_clip
from elva_hf.data.schemas import SCHEMAS, Conversion, detect_schema
from elva_hf.data.shards import TarRecords
from elva_hf.data.tables import TableRecords, is_stream, is_table, open_parquet, open_saved
from elva_hf.errors_elva import ConfigurationError, ElvaError

FORMATS = (*SCHEMAS, "llama_factory")
SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".tar": "tar"}
NUM_DETECTED = 64
"""Records whose keys decide the format."""


@dataclass(frozen=True)
class ReadOptions:
    """How a data set is read.

    Args:
        format: A name of `FORMATS`; None to find it out.
        media_root: Folder of the media, which then all lie in it; None for the folder of each data file.
        split: Of a data set that has several.
        dataset: Entry of a `dataset_info.json` that has several.
        ignore_keys: Keys of records, and suffixes of members of shards, that are read past.
        independent_turns: Whether the turns of a row are questions about the same media that know nothing of each
            other; None leaves it to each row.
        caption_prompt: What a caption answers.
        allow_urls: Whether https URLs may stand for paths.
        video: Options of a `VideoClip` for all videos that have none of their own.
    """

    format: str | None = None
    media_root: str | None = None
    split: str | None = None
    dataset: str | None = None
    ignore_keys: tuple[str, ...] = ()
    independent_turns: bool | None = None
    caption_prompt: str = ""
    allow_urls: bool = False
    video: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise ConfigurationError(f"format is {self.format!r}; known are {', '.join(FORMATS)}.")
        if self.media_root is not None and not os.path.isdir(self.media_root):
            raise ConfigurationError(f"media_root {self.media_root!r} is no folder; check the path.")
        if isinstance(self.ignore_keys, str):
            raise ConfigurationError(f"ignore_keys is {self.ignore_keys!r}; give a list of keys.")
        check_clip(self.video)

    def conversion(self, schema: str, folder: str) -> Conversion:
        """How records of a schema, from a file in `folder`, become rows."""
        confined = self.media_root is not None
        return Conversion(
            schema=schema,
            root=MediaRoot(self.media_root if confined else folder, confined, self.allow_urls),
            ignore_keys=tuple(self.ignore_keys),
            independent_turns=self.independent_turns,
            caption_prompt=self.caption_prompt,
            video=self.video,
        )


class Rows(Sequence):
    """Canonical rows of records, each read and checked when it is asked for.

    Args:
        records: What a file holds.
        conversion: How they become rows.
    """

    def __init__(self, records: Records, conversion: Conversion):
        self.records, self.conversion = records, conversion

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        """A row, or a list of them for a slice.

        Raises:
            RowError: The row cannot be trained on.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        record = self.records[index]
        try:
            return self.conversion.row(record, Origin(), str(index))
        except RowError as error:  # the place is looked up only for errors: it takes a reading of the file
            raise RowError(error.message, self.records.origin(index), error.row_id) from error


def read_rows(source: Any, format: str | None = None, media_root: str | None = None, **options: Any) -> Rows:
    """Rows of a data set, by index.

    Args:
        source: A file, a folder of files of one kind, a pattern (`shards/*.tar`), a list of files or of records, or a
            `datasets.Dataset`.
        format: See `ReadOptions`, and so all others.
        media_root: Folder of the media.
        **options: The others.

    Raises:
        ElvaError: It cannot be read, or its format is not clear.
        ConfigurationError: An option that is none.
    """
    return open_rows(source, read_options(format=format, media_root=media_root, **options))


def stream_rows(source: Any, format: str | None = None, media_root: str | None = None, **options: Any) -> Iterator[Row]:
    """The same from front to back, also of a `datasets.IterableDataset`; a row that is wrong ends it.

    Args:
        source: As in `read_rows`.
        format: Likewise.
        media_root: Likewise.
        **options: Likewise.

    Raises:
        ElvaError: As `read_rows`, and `RowError` of a row.
    """
    chosen = read_options(format=format, media_root=media_root, **options)
    if is_stream(source):
        return iter(StreamRows(source, chosen))
    return iter(open_rows(source, chosen))


def read_options(**options: Any) -> ReadOptions:
    """`ReadOptions`, with a word on what is none.

    Raises:
        ConfigurationError: An unknown name, or a value that is none.
    """
    known = ReadOptions.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigurationError(f"{name!r} is no option of a reader; known are {', '.join(known)}.")
    return ReadOptions(**options)


def open_rows(source: Any, options: ReadOptions) -> Rows:
    """As `read_rows`.

    Raises:
        ElvaError: Likewise.
    """
    if is_stream(source):
        raise ElvaError("an IterableDataset has no indices; use stream_rows, or a StreamingMixture.")
    if is_table(source):
        return _convert(TableRecords(source, type(source).__name__), options, "", type(source).__name__)
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source), options)
    if not isinstance(source, Sequence) or isinstance(source, (bytes, bytearray)):
        raise ElvaError(f"a {type(source).__name__} is no data set; give a path, a list of records or a Dataset.")
    if source and all(isinstance(item, (str, os.PathLike)) for item in source):
        return _open_files([os.fspath(item) for item in source], options)
    return _convert(RecordList(source, "list"), options, "", "the list")


class StreamRows:
    """Rows of a `datasets.IterableDataset`; iterating starts over each time.

    Args:
        table: The data set.
        options: How it is read.
        num_rows: How many it has, if that is known.
    """

    def __init__(self, table: Any, options: ReadOptions, num_rows: int | None = None):
        self.table = table if table.features is None else table.decode(False)
        self.num_rows = num_rows
        first = islice(self.records(), NUM_DETECTED) if options.format is None else ()
        schema = options.format or detect_schema(first, type(table).__name__)
        self.conversion = options.conversion(schema, "")

    def __iter__(self) -> Iterator[Row]:
        return (self.row(record, index) for index, record in enumerate(self.records()))

    def records(self, start: int = 0) -> Iterator[Any]:
        """Records from number `start` on: all of them, also where `datasets` would share them among workers."""
        table = self.table.skip(start) if start else self.table
        for batch in table.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}

    def row(self, record: Any, index: int) -> Row:
        """The row of a record."""
        return self.conversion.row(record, Origin("IterableDataset", index=index), str(index))


def list_files(path: str) -> list[str]:
    """The data files that a path names: itself, those of a folder, or those that fit a pattern; sorted.

    Raises:
        ElvaError: There are none, or a folder holds several kinds.
    """
    if os.path.isdir(path):
        found = sorted(os.path.join(path, name) for name in os.listdir(path) if _kind(name))
    elif not os.path.exists(path) and glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
    else:
        found = [path]
    if not found:
        raise ElvaError(f"{path} holds no data files; expected {', '.join(SUFFIXES)}.")
    kinds = sorted({str(_kind(name)) for name in found})
    if len(kinds) > 1:
        raise ElvaError(f"{path} holds files of several kinds ({', '.join(kinds)}); name one file, or a pattern.")
    return found


def _open_path(path: str, options: ReadOptions) -> Rows:
    if os.path.isdir(path):
        held = set(os.listdir(path))
        if held & {"state.json", "dataset_dict.json"}:
            return _convert(TableRecords(open_saved(path, options.split), path), options, path, path)
        if "dataset_info.json" in held:
            path = os.path.join(path, "dataset_info.json")
    return _open_files(list_files(path), options)


def _open_files(files: list[str], options: ReadOptions) -> Rows:
    check_files(files)
    is_info = options.format == "llama_factory" or os.path.basename(files[0]) == "dataset_info.json"
    for name, used in (("split", False), ("dataset", is_info)):
        if getattr(options, name) is not None and not used:
            raise ConfigurationError(f"{name} is {getattr(options, name)!r}, but {files[0]} has none; leave it out.")
    if is_info:
        return _open_dataset_info(files[0], options)
    return _convert(_open_records(files, options), options, os.path.dirname(files[0]), files[0])


def check_files(files: Sequence[str]) -> None:
    """Check that files are there.

    Raises:
        ElvaError: One is not, or is no file.
    """
    for file in files:
        if not os.path.isfile(file):
            what = "is no file; name a data file" if os.path.exists(file) else "does not exist; check the path"
            raise ElvaError(f"{file} {what}.")


def _open_records(files: Sequence[str], options: ReadOptions) -> Records:
    kind = _kind(files[0])
    if kind == "parquet":
        return TableRecords(open_parquet(files), os.path.basename(files[0]) if len(files) == 1 else "parquet")
    if kind == "tar":
        return JoinedRecords([TarRecords(file, options.ignore_keys) for file in files])
    if kind == "json":
        return JoinedRecords([_open_json(file) for file in files])
    raise ElvaError(f"{files[0]} ends in none of {', '.join(SUFFIXES)}; name it so, unpacked if it is compressed.")


def _open_json(file: str) -> JsonRecords:
    try:
        first = starts_as(file)
    except OSError as error:
        raise ElvaError(f"{file} cannot be read: {error.strerror}.") from error
    if first not in ("[", "{"):
        raise ElvaError(
            f"{file} {f'starts with {first!r}' if first else 'is empty'}; expected a JSON array or JSON lines."
        )
    return JsonRecords(file, lines=first == "{")


def _open_dataset_info(file: str, options: ReadOptions) -> Rows:
    entry = read_dataset_info(file, options.dataset)
    files = list_files(entry.path)
    check_files(files)
    records = _open_records(files, options)
    base = options.conversion(entry.schema, os.path.dirname(file))
    conversion = replace(base, columns=entry.columns, roles=entry.roles, turn_keys=entry.turn_keys)
    return Rows(records, conversion)


def _convert(records: Records, options: ReadOptions, folder: str, where: str) -> Rows:
    if not len(records):
        raise ElvaError(f"{where} holds no records.")
    schema = options.format
    if schema is None:
        schema = detect_schema(_first(records), where)
    return Rows(records, options.conversion(schema, folder))


def _first(records: Records) -> Iterator[Any]:
    """The first records that can be read at all."""
    failed, number = None, min(len(records), NUM_DETECTED)
    for index in range(number):
        try:
            yield records[index]
        except RowError as error:
            failed, number = failed or error, number - 1
    if failed is not None and not number:
        raise failed


def _kind(name: str) -> str | None:
    return SUFFIXES.get(os.path.splitext(name)[1].lower())
