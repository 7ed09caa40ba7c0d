"""Teacher features on disk: `elva teach` writes them once, training reads them.

A folder holds `teacher.json`, which says what the teacher is, and `shard-*.safetensors`. A video goes by a hash of its
own pixels, so a cache never needs to know where a video came from, and never gives the features of other frames. All
that a process writes is in shards of its own, renamed when they are whole, so any number of processes may write at once
and none needs a lock.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from elva_hf.errors_elva import CheckpointError, ConfigurationError
from elva_hf.training.teacher import TeacherSpec, denormalize
from elva_hf.training.teacher_shards import (
    DTYPES,
    Grids,
    Manifest,
    Shard,
    ShardIndex,
    checksum,
    claim,
    describe_runs,
    find_shards,
    grid_runs,
    read_manifest,
    refuse_another,
    write_shard,
)

MAX_OPEN_FILES = 16
SHARD_BYTES = 2**28


class TeacherCache:
    """Features that `elva teach` wrote; safe to hand to the workers of a `DataLoader`, forked or spawned.

    Args:
        folder: What `elva teach --out` named.
        image_mean: Of the student's video processor.
        image_std: Likewise.
        max_open_files: Shards kept open at once.

    Raises:
        CheckpointError: The folder is no cache, or a shard of it is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        max_open_files: int = MAX_OPEN_FILES,
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.image_mean, self.image_std = image_mean, image_std
        self.max_open_files = max_open_files
        self._index = ShardIndex(self.folder, self.manifest)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._process = os.getpid()

    @property
    def spec(self) -> TeacherSpec:
        """The teacher."""
        return self.manifest.teacher

    @property
    def patch_size(self) -> int:
        """Of the student, in pixels."""
        return self.manifest.patch_size

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def check(self, teacher: TeacherSpec | None, patch_size: int) -> None:
        """Make sure that the features are those of a teacher, for a student.

        Args:
            teacher: None to leave it unchecked.
            patch_size: Of the student, in pixels.

        Raises:
            ConfigurationError: They are of another; names both.
        """
        wanted = Manifest(teacher or self.spec, patch_size, self.manifest.dtype)
        refuse_another(self.folder, self.manifest, wanted)

    def key(self, pixels: Tensor, grids: Grids) -> str:
        """The name of one video: a hash of its 8-bit pixels and grids.

        Args:
            pixels: `(P, 3 * patch_size**2)` of one video, normalised as the student's processor does, or uint8.
            grids: Rows and columns of patches of each frame.

        Raises:
            ConfigurationError: Patches of another size, or not normalised with this cache's mean and deviation.
        """
        if pixels.shape[1] != 3 * self.patch_size**2:
            raise ConfigurationError(
                f"a patch has {pixels.shape[1]} values, and teacher cache {self.folder} is for patch size "
                f"{self.patch_size}, which has {3 * self.patch_size**2}; teach a cache for this model."
            )
        return content_key(denormalize(pixels, self.image_mean, self.image_std), grids)

    def get(self, key: str, *, grids: Grids | None = None, sample_id: str | None = None) -> tuple[Tensor, Tensor]:
        """Features of one video.

        Args:
            key: From `key`.
            grids: Of its frames; makes the error of a missing video say more, as does `sample_id`.
            sample_id: Of its row.

        Returns:
            `(C, h, w, D)` mean map of each clip, in order of first appearance, and `(T, D)` mean of each frame.

        Raises:
            CheckpointError: The video is not in the cache, or what the cache holds of it is damaged.
        """
        shard = self._find(key)
        if shard is None:
            self._raise_missing(grids, sample_id)
        return shard.read(key)

    def _find(self, key: str) -> Shard | None:
        return next((shard for shard in map(self._shard, self._index.find(key)) if key in shard.entries), None)

    def _shard(self, number: int) -> Shard:
        if self._process != os.getpid():  # forked: the parent's files are its own
            self._process, self._open = os.getpid(), OrderedDict()
        if number not in self._open:
            self._open[number] = Shard(self.folder / self._index.names[number], self.manifest)
        self._open.move_to_end(number)
        while len(self._open) > self.max_open_files:
            self._open.popitem(last=False)
        return self._open[number]

    def _raise_missing(self, grids: Grids | None, sample_id: str | None) -> NoReturn:
        known = [entry for number in range(len(self._index.names)) for entry in self._shard(number).entries.values()]
        reason = explain_missing(known, grids, sample_id)
        raise CheckpointError(
            f"teacher cache {self.folder} lacks {f'a video of row {sample_id!r}' if sample_id else 'a video'}: "
            f"{reason}. Add it with: elva teach RECIPE --out {self.folder} (with the frame options of this run), or "
            "train with guidance.teacher instead of guidance.cache."
        )


class TeacherCacheWriter:
    """Adds features to a folder; use it as a context manager. Several may write to one folder at once.

    Args:
        folder: Made if it is not there.
        teacher: Whose features they are.
        patch_size: Of the student, in pixels.
        rank: Of this process; part of the names of its shards.
        dtype: `"float16"` or `"bfloat16"`.
        shard_bytes: Size from which a shard is written.

    Raises:
        ConfigurationError: The folder holds features of another teacher, layer, patch size or dtype; names both.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: TeacherSpec,
        patch_size: int,
        *,
        rank: int = 0,
        dtype: str = "float16",
        shard_bytes: int = SHARD_BYTES,
    ):
        if dtype not in DTYPES:
            raise ConfigurationError(f"dtype {dtype!r} of a teacher cache is none of {', '.join(DTYPES)}.")
        self.folder, self.rank, self.shard_bytes = Path(folder), rank, shard_bytes
        self.manifest = Manifest(teacher, patch_size, dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        claim(self.folder, self.manifest)
        self.num_added = self.num_bytes = 0
        names = find_shards(self.folder)
        self._known = {key for name in names for key in Shard(self.folder / name, self.manifest).entries}
        self._start_shard()

    def __enter__(self) -> TeacherCacheWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.flush()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, key: str, tubes: Tensor, frames: Tensor, grids: Grids, sample_id: str = "") -> None:
        """Keep the features of one video; those of a video that is there already are not written again.

        Args:
            key: From `content_key`.
            tubes: `(C, h, w, D)`.
            frames: `(T, D)`.
            grids: Of its frames.
            sample_id: Of its row, for error messages.

        Raises:
            ConfigurationError: Values that the dtype cannot hold.
        """
        if key in self:
            return
        tensors = [values.detach().to("cpu", DTYPES[self.manifest.dtype]).contiguous() for values in (tubes, frames)]
        if not all(bool(values.isfinite().all()) for values in tensors):
            raise ConfigurationError(
                f"features of {sample_id or key} are not finite in {self.manifest.dtype}; teach a new folder with "
                "--dtype bfloat16, or look at the teacher if they are not finite at all."
            )
        self._known.add(key)
        self._tensors |= {f"{key}.tubes": tensors[0], f"{key}.frames": tensors[1]}
        self._entries[key] = {"runs": grid_runs(grids), "id": sample_id, "crc32": checksum(tensors)}
        self._pending += sum(values.numel() * values.element_size() for values in tensors)
        self.num_added += 1
        if self._pending >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard, whole or not at all."""
        if not self._entries:
            return
        self.num_bytes += write_shard(self.folder, self.manifest, self.rank, self._tensors, self._entries)
        self._start_shard()

    def _start_shard(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._pending = 0


def content_key(patches: Tensor, grids: Grids) -> str:
    """Hash of one video as the student sees it.

    Args:
        patches: `(P, 3 * patch_size**2)` uint8.
        grids: Rows and columns of patches of each frame.

    Raises:
        ConfigurationError: Grids of another number of patches.
    """
    if sum(rows * cols for rows, cols in grids) != len(patches):
        raise ConfigurationError(f"{len(patches)} patches do not fill the grids {describe_runs(grid_runs(grids))}.")
    digest = hashlib.blake2b(f"{patches.shape[1]} {[tuple(map(int, grid)) for grid in grids]}".encode(), digest_size=16)
    digest.update(patches.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def explain_missing(known: Sequence[Mapping[str, Any]], grids: Grids | None, sample_id: str | None) -> str:
    """How a video that is not in a cache differs from those that are.

    Args:
        known: Entries of the cache: `runs` of grids and `id` of each video.
        grids: Of the missing one, if known.
        sample_id: Likewise.
    """
    if not known:
        return "the cache is empty"
    if grids is None:
        return "it was not taught"
    runs = grid_runs(grids)
    same_row = [entry["runs"] for entry in known if sample_id and entry["id"] == sample_id]
    if same_row and runs not in same_row:
        return f"the row was taught with {describe_runs(same_row[0])}, and has {describe_runs(runs)} now"
    if same_row:
        return "the row was taught with other pixels (another crop, flip, decoder or file), or has another video more"
    counts = Counter(sum(number for _, _, number in entry["runs"]) for entry in known)
    if len(grids) not in counts:
        return f"it has {len(grids)} frames, and those taught have {', '.join(map(str, sorted(counts)))}"
    if all(entry["runs"] != runs for entry in known):
        return f"none of its resolution was taught ({describe_runs(runs)})"
    return "it was not taught"
