"""LLaMA-Factory's `dataset_info.json`: which file, which layout, and what its columns and roles are called."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elva_hf.data.records import as_mapping, read_json
from elva_hf.data.rows import kind_of, quote, refuse_unknown
from elva_hf.errors_elva import ElvaError

_FIELDS = ("file_name", "formatting", "columns", "tags")
_COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
        "images": "images",
        "videos": "videos",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "images": "images", "videos": "videos"},
}
_DEFAULTS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
_SCHEMAS = {"alpaca": "alpaca", "sharegpt": "llava"}
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}


@dataclass(frozen=True)
class DatasetEntry:
    """An entry of a `dataset_info.json`.

    Args:
        path: Data file.
        schema: What its records are once columns and roles are renamed.
        columns: Columns of the file by the names of the schema.
        roles: Roles of the file -> those of messages.
        turn_keys: Keys of a turn for its role and its text.
    """

    path: str
    schema: str
    columns: Mapping[str, str]
    roles: Mapping[str, str]
    turn_keys: tuple[str, str]


def read_dataset_info(file: str, name: str | None = None) -> DatasetEntry:
    """An entry of a `dataset_info.json`; it needs no name if it is the only one.

    Raises:
        ElvaError: There is no such entry, or it asks for what is not read: a hub, tools, rankings.
    """
    entries = as_mapping(read_json(file), file)
    if name is None and len(entries) == 1:
        (name,) = entries
    if name not in entries:
        given = f"no data set {name!r}" if name is not None else "several data sets"
        raise ElvaError(
            f"{file} has {given}: {', '.join(map(str, entries))}; name one of them in options.dataset "
            "(elva data check: --dataset)."
        )
    where = f"{file}, {name}"
    entry = as_mapping(entries[name], where)
    refuse_unknown(entry, _FIELDS, f"{where}:")
    path, layout = entry.get("file_name"), entry.get("formatting", "alpaca")
    if not isinstance(path, str) or not path:
        raise ElvaError(f"{where}: file_name is {kind_of(path)}; download the data set and name its file.")
    if not isinstance(layout, str) or layout not in _COLUMNS:
        raise ElvaError(f"{where}: formatting is {quote(layout)}; known are {', '.join(_COLUMNS)}.")
    columns = _names(entry.get("columns"), _COLUMNS[layout], f"{where}: columns")
    tags = {**_TAGS, **_names(entry.get("tags"), _TAGS, f"{where}: tags")}
    return DatasetEntry(
        path=os.path.join(os.path.dirname(file), path),
        schema=_SCHEMAS[layout],
        columns={_COLUMNS[layout][key]: column for key, column in {**_DEFAULTS[layout], **columns}.items()},
        roles={tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"},
        turn_keys=(tags["role_tag"], tags["content_tag"]),
    )


def _names(given: Any, known: Mapping[str, str], where: str) -> dict[str, str]:
    names = as_mapping({} if given is None else given, where)
    refuse_unknown(names, tuple(known), where)
    for key, value in names.items():
        if value is not None and not isinstance(value, str):
            raise ElvaError(f"{where}.{key} is {kind_of(value)}; expected a name.")
    return {key: value for key, value in names.items() if value is not None}
