"""The files of a teacher cache: a manifest, and shards that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elva_hf.errors_elva import CheckpointError, ConfigurationError
from elva_hf.training.teacher import TeacherSpec

FORMAT = 1
MANIFEST = "teacher.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Manifest:
    """What a folder holds the features of.

    Args:
        teacher: Whose they are.
        patch_size: Of the student, in pixels.
        dtype: `"float16"` or `"bfloat16"`.
    """

    teacher: TeacherSpec
    patch_size: int
    dtype: str = "float16"

    def __str__(self) -> str:
        teacher = self.teacher
        return (
            f"teacher {teacher.path}, layer {teacher.layer}, fingerprint {teacher.fingerprint[:8]}, patch size "
            f"{self.patch_size}, {self.dtype}"
        )

    @cached_property
    def digest(self) -> str:
        """Hash of all that decides a feature; not of where the weights lie."""
        facts = {**self.to_json(), "teacher": {**self.teacher.to_dict(), "path": None, "revision": None}}
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Content of `teacher.json`."""
        return {
            "format": FORMAT,
            "teacher": self.teacher.to_dict(),
            "patch_size": self.patch_size,
            "dtype": self.dtype,
        }

    def differences(self, other: Manifest) -> list[str]:
        """What of another would give other features, in words."""
        found = self.teacher.differences(other.teacher)
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in ("patch_size", "dtype")]
        return found + [f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs]


class Shard:
    """An open shard; its tensors stay on disk until they are read."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        try:
            self.file = safe_open(path, "pt")
            metadata = self.file.metadata()
            self.entries: dict[str, dict[str, Any]] = json.loads(metadata["entries"])
            digest = metadata["manifest"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from error
        if digest != manifest.digest:
            raise ConfigurationError(
                f"{path} was not written by {manifest}, which {MANIFEST} beside it names; keep the shards of each "
                "teacher in a folder of their own."
            )

    def read(self, key: str) -> tuple[Tensor, Tensor]:
        """Tubes and frames of a video."""
        try:
            tensors = [self.file.get_tensor(f"{key}.{name}") for name in ("tubes", "frames")]
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error
        if checksum(tensors) != self.entries[key]["crc32"]:
            raise self._damaged("its checksum is wrong")
        return tensors[0], tensors[1]

    def _damaged(self, error: Any) -> CheckpointError:
        return CheckpointError(
            f"teacher cache shard {self.path} is damaged ({error}); delete it and run elva teach again, which writes "
            "only what is missing."
        )


class ShardIndex:
    """Which shards may hold a key: by the first half of its bits, in arrays that processes share."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.names = find_shards(folder)
        halves, numbers = [], []
        for number, name in enumerate(self.names):
            keys = Shard(folder / name, manifest).entries
            halves += [int(key[:16], 16) for key in keys]
            numbers += [number] * len(keys)
        order = np.argsort(np.array(halves, np.uint64), kind="stable")
        self.halves = np.array(halves, np.uint64)[order]
        self.numbers = np.array(numbers, np.int32)[order]

    def __len__(self) -> int:
        return len(np.unique(self.halves))

    def find(self, key: str) -> Iterator[int]:
        """Numbers of the shards that may hold a key."""
        half = np.uint64(int(key[:16], 16))
        start, stop = (int(np.searchsorted(self.halves, half, side)) for side in ("left", "right"))
        return map(int, self.numbers[start:stop])


def read_manifest(folder: Path) -> Manifest:
    """What a folder holds the features of.

    Raises:
        CheckpointError: It is no cache, or one of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no teacher cache: it has no {MANIFEST}; write one with elva teach.")
    try:
        values = json.loads(path.read_text())
        version = values["format"]
        manifest = Manifest(TeacherSpec.from_dict(values["teacher"]), values["patch_size"], values["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); write the cache anew with elva teach.") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} is of format {version}, and this version of elva-hf reads {FORMAT}.")
    return manifest


def claim(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder that has none; of two processes one wins, and both must agree with it."""
    path = folder / MANIFEST
    if not path.exists():
        own = folder / f".{MANIFEST}.{uuid.uuid4().hex}"
        own.write_text(json.dumps(manifest.to_json(), indent=2) + "\n")
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)
    refuse_another(folder, read_manifest(folder), manifest)


def refuse_another(folder: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise ConfigurationError where a folder is not of what is wanted, naming both."""
    if differences := found.differences(wanted):
        raise ConfigurationError(
            f"teacher cache {folder} is of {found}; asked for is {wanted} ({'; '.join(differences)}). Name another "
            "folder, or use the teacher and the model that it was written for."
        )


def write_shard(
    folder: Path, manifest: Manifest, rank: int, tensors: Mapping[str, Tensor], entries: Mapping[str, Mapping[str, Any]]
) -> int:
    """Write a shard under a name of its own, renamed when it is whole.

    Args:
        folder: Of the cache.
        manifest: What the folder holds.
        rank: Of the process.
        tensors: `KEY.tubes` and `KEY.frames` of each video.
        entries: Per key runs of grids, id of the row, checksum.

    Returns:
        Its bytes.
    """
    metadata = {"format": str(FORMAT), "manifest": manifest.digest, "entries": json.dumps(entries)}
    name = f"shard-{rank:05d}-{uuid.uuid4().hex}.safetensors"
    unfinished = folder / f".{name}.unfinished"
    try:
        save_file(dict(tensors), unfinished, metadata)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        size = unfinished.stat().st_size
        os.replace(unfinished, folder / name)
    finally:
        unfinished.unlink(missing_ok=True)
    return size


def find_shards(folder: Path) -> list[str]:
    """Names of the whole shards of a folder."""
    return sorted(path.name for path in folder.glob("shard-*.safetensors"))


def checksum(tensors: Sequence[Tensor]) -> int:
    """CRC-32 of the bytes of tensors, one after another."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def grid_runs(grids: Grids) -> list[list[int]]:
    """Rows, columns and number of equal grids in a row."""
    runs: list[list[int]] = []
    for rows, cols in grids:
        if runs and runs[-1][:2] == [rows, cols]:
            runs[-1][2] += 1
        else:
            runs.append([int(rows), int(cols), 1])
    return runs


def describe_runs(runs: Sequence[Sequence[int]]) -> str:
    """How many frames of which grid, in words."""
    counts: Counter = Counter()
    for rows, cols, number in runs:
        counts[rows, cols] += number
    return " and ".join(f"{number} frames of {rows}x{cols} patches" for (rows, cols), number in counts.items())
