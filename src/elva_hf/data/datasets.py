"""Rows -> encoded samples: a bad clip is replaced by a fixed other one and written down, and too many stop the run."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from inspect import isgenerator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.utils import logging

from elva_hf.chat_elva import MEDIA_KEYS
from elva_hf.data.encoding import EncodedSample, check_template, encode_row
from elva_hf.errors_elva import ConfigurationError, ElvaError, TrainingError
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.source_elva import shown

logger = logging.get_logger(__name__)

MAX_TRIES = 16
"""Bad samples one after another that end a run, whatever their share."""

BAD = (ElvaError, OSError)
"""What makes a sample a bad one; anything else is a fault of the program and stops at once."""

_SLOTS = 256

Transform = Callable[[Tensor, torch.Generator], Tensor]


class TooManyBadSamples(TrainingError):
    """More samples are bad than a run may replace."""


class BadSamples:
    """Counts samples over all worker processes, writes the bad ones down, and stops the run when they are too many.

    Args:
        path: File to append to, one JSON object a line; None if no sample may be bad.
        max_fraction: Largest share of bad samples.
        min_samples: Samples after which the share counts.
    """

    def __init__(self, path: str | os.PathLike[str] | None, max_fraction: float, min_samples: int):
        if not 0 <= max_fraction <= 1:
            raise ConfigurationError(f"max_bad_fraction is {max_fraction!r}; give a share between 0 and 1.")
        if min_samples < 1:
            raise ConfigurationError(f"min_samples is {min_samples!r}; give 1 or more.")
        self.path = None if path is None else Path(path).absolute()
        self.max_fraction, self.min_samples = max_fraction, min_samples
        self._counts = torch.zeros(_SLOTS, 2, dtype=torch.long).share_memory_()  # a row for each process: no lock

    @property
    def counts(self) -> tuple[int, int]:
        """Samples seen and bad ones among them, by all workers since the start of the process."""
        seen, bad = self._counts.sum(0).tolist()
        return seen, bad

    def count(self, *, bad: bool = False) -> None:
        """Count a sample."""
        info = get_worker_info()
        slot = 0 if info is None else 1 + info.id % (_SLOTS - 1)
        self._counts[slot, 0] += 1
        self._counts[slot, 1] += bad

    def add(self, error: Exception, **facts: Any) -> None:
        """Write a bad sample down.

        Raises:
            TooManyBadSamples: It is one too many.
            Exception: `error` itself if no sample may be bad.
        """
        self.count(bad=True)
        if self.path is None:
            raise error
        line = {**facts, "reason": getattr(error, "reason", None) or type(error).__name__, "error": str(error)}
        append_line(self.path, json.dumps(line, ensure_ascii=False))
        logger.warning("bad sample %s: %s", facts.get("index"), error)
        seen, bad = self.counts
        if seen >= self.min_samples and bad > self.max_fraction * seen:
            raise self.stop(f"more than max_bad_fraction={self.max_fraction:g}", error)

    def stop(self, why: str, error: Exception) -> TooManyBadSamples:
        """The error that ends a run."""
        seen, bad = self.counts
        where = "" if self.path is None else f" they are listed in {self.path};"
        return TooManyBadSamples(
            f"{bad} of {seen} samples are bad, {why};{where} mend or remove them, or raise max_bad_fraction. "
            f"The last: {error}"
        )


def append_line(path: Path, line: str) -> None:
    """Append a line in one write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (line + "\n").encode(errors="backslashreplace"))
    finally:
        os.close(handle)


class _Encoding:
    """What the two data sets share: a row in, a sample or an error of the row out."""

    def __init__(self, processor: ElvaProcessor, seed: int, transform: Transform | None, options: dict[str, Any]):
        check_template(processor)
        processor.video_processor.resolve_options(**options)
        processor.video_processor.resolve_budgets(**options)
        self.processor, self.seed, self.transform, self.options = processor, seed, transform, options

    def encode(self, row: Mapping[str, Any], index: int = -1) -> EncodedSample:
        return encode_row(row, self.processor, index=index, **self.options)

    def change(self, sample: EncodedSample, epoch: int) -> EncodedSample:
        if self.transform is None or sample.pixel_values_videos is None:
            return sample
        place = sample.index if sample.index >= 0 else sample.sample_id
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}/{epoch}/{place}").getrandbits(63))
        video_processor = self.processor.video_processor
        options = video_processor.resolve_options(**self.options)
        pixels = transform_patches(sample, self.transform, generator, options)
        return replace(sample, pixel_values_videos=pixels)


class ElvaDataset(Dataset):
    """Encoded samples of rows, by index; the same for the same seed, epoch and index.

    A sample that cannot be read (`VideoError` and any other `ElvaError` of the row, `OSError`) is written to
    `bad_samples_path` and replaced by another one, which seed, epoch and index alone decide.

    Args:
        rows: Anything with `__len__` and `__getitem__` that gives rows, a `Mixture` or a list for example.
        processor: Of the model; its video processor says which frames are taken.
        seed: Of the substitutes and of `transform`.
        max_bad_fraction: Largest share of bad samples.
        bad_samples_path: JSON lines are appended here; None if a bad sample is an error.
        min_samples: Samples after which the share counts.
        transform: Changes the frames of a clip: `(T, 3, H, W)` float32 in [0, 1] and a `torch.Generator` in, frames of
            the same shape out.
        **options: Of the video processor, see `encode_row`.

    Raises:
        ConfigurationError: An option that cannot be, or a chat template that does not mark the assistant's turns.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        processor: ElvaProcessor,
        *,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        bad_samples_path: str | os.PathLike[str] | None = None,
        min_samples: int = 100,
        transform: Transform | None = None,
        **options: Any,
    ):
        self.rows = rows
        self.bad_samples = BadSamples(bad_samples_path, max_bad_fraction, min_samples)
        self._encoding = _Encoding(processor, seed, transform, options)
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # workers that persist see it change

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedSample:
        """A sample.

        Raises:
            TooManyBadSamples: More are bad than may be.
        """
        index = range(len(self))[index]
        epoch = self.epoch
        candidates = substitutes(index, len(self), seed=self._encoding.seed, epoch=epoch)
        for candidate, following in pairwise(candidates):
            row: Any = None
            try:
                row = self.rows[candidate]
                sample = self._encoding.encode(row, candidate)
            except BAD as error:
                facts = describe_row(row, error, index=candidate, epoch=epoch)
                self.bad_samples.add(error, **facts, replaced_by=following)
                last = error
            else:
                self.bad_samples.count()
                return self._encoding.change(sample, epoch)
        raise self.bad_samples.stop(f"the last {MAX_TRIES} of them one after another", last) from last

    @property
    def epoch(self) -> int:
        """The epoch, as all processes see it."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is; accelerate does, or our samplers do for it."""
        self._epoch.fill_(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


class ElvaStream(IterableDataset):
    """Encoded samples of rows that are streamed; a bad sample is written down and left out.

    Args:
        rows: Iterable rows, a `StreamingMixture` for example, whose `state_dict` and `load_state_dict` let torchdata's
            `StatefulDataLoader` resume. Its iterator must go on after a row that raises, as a generator cannot.
        processor: As in `ElvaDataset`, and so all others.
        seed: Of `transform`.
        max_bad_fraction: Largest share of bad samples.
        bad_samples_path: JSON lines are appended here; None if a bad sample is an error.
        min_samples: Samples after which the share counts.
        transform: Changes the frames of a clip.
        **options: Of the video processor.

    Raises:
        ConfigurationError: As `ElvaDataset`.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        processor: ElvaProcessor,
        *,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        bad_samples_path: str | os.PathLike[str] | None = None,
        min_samples: int = 100,
        transform: Transform | None = None,
        **options: Any,
    ):
        self.rows = rows
        self.bad_samples = BadSamples(bad_samples_path, max_bad_fraction, min_samples)
        self._encoding = _Encoding(processor, seed, transform, options)
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    def __iter__(self) -> Iterator[EncodedSample]:
        return self.read(int(self._epoch))

    def read(self, epoch: int) -> Iterator[EncodedSample]:
        """Samples of this worker in an epoch, whatever epoch other workers are in."""
        bad_in_a_row = 0
        rows = self.rows.read(epoch) if hasattr(self.rows, "read") else iter(self.rows)
        while True:
            row: Any = None
            try:
                row = next(rows)
                sample = self._encoding.encode(row)
            except StopIteration:
                return
            except BAD as error:
                if row is None and isgenerator(rows):
                    raise  # it is at its end now, and so would the stream be, without a word
                self.bad_samples.add(error, **describe_row(row, error, index=None, epoch=epoch))
                bad_in_a_row += 1
                if bad_in_a_row == MAX_TRIES:
                    raise self.bad_samples.stop(f"the last {MAX_TRIES} of them one after another", error) from error
            else:
                self.bad_samples.count()
                bad_in_a_row = 0
                yield self._encoding.change(sample, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is."""
        self._epoch.fill_(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is; the rows must have it too."""
        return {"rows": self.rows.state_dict(), "epoch": int(self._epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a stream was."""
        self._epoch.fill_(state["epoch"])
        self.rows.load_state_dict(state["rows"])


def substitutes(index: int, num_rows: int, *, seed: int, epoch: int) -> Iterator[int]:
    """`index`, then what is tried in its place, `MAX_TRIES + 1` numbers in all.

    Args:
        index: The row that is wanted.
        num_rows: Rows to choose from.
        seed: Of the run.
        epoch: Of the run.
    """
    yield index
    generator = random.Random(f"{seed}/{epoch}/{index}")
    for _ in range(MAX_TRIES):
        index = (index + 1 + int(generator.random() * max(num_rows - 1, 1))) % num_rows
        yield index


def describe_row(row: Any, error: Exception, *, index: int | None, epoch: int) -> dict[str, Any]:
    """What of a bad row is written down: its place, its id, and the path of what is wrong."""
    row_id = row.get("id") if isinstance(row, Mapping) else getattr(error, "row_id", None)
    facts = {"index": index, "epoch": epoch, "id": row_id, "path": _find_path(row, error)}
    if isinstance(getattr(error, "line", None), int):
        facts["line"] = error.line
    return {key: value if isinstance(value, (int, str, type(None))) else str(value) for key, value in facts.items()}


def _find_path(row: Any, error: Exception) -> str | None:
    """The file that an error is about: as the row names it, or else as the error does."""
    paths = list(_paths(row))
    source = getattr(error, "source", None)
    if source is not None:
        return next((path for path in paths if shown(path) == source), source)
    named = getattr(error, "filename", None) or getattr(error, "file", None)
    return named or next(iter(paths), None)


def _paths(row: Any) -> Iterator[str]:
    """Paths and URLs in the content of a row, if it has the form of one."""
    messages = row.get("messages") if isinstance(row, Mapping) else None
    for message in messages if isinstance(messages, (list, tuple)) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for block in content if isinstance(content, (list, tuple)) else ():
            keys = MEDIA_KEYS.get(block.get("type"), ()) if isinstance(block, Mapping) else ()
            yield from (block[key] for key in keys if isinstance(block.get(key), str))


def transform_patches(sample: EncodedSample, transform: Transform, generator: torch.Generator, options: Any) -> Tensor:
    """Patches of a sample after its frames have been changed.

    Args:
        sample: With pixels.
        transform: See `ElvaDataset`; the frames of a video that share a grid are given to it together.
        generator: Of its random numbers.
        options: `patch_size`, `image_mean` and `image_std` of the patches.

    Returns:
        `(num_patches, 3 * patch_size**2)`.

    Raises:
        ConfigurationError: The transform returns frames of another shape.
    """
    size = options.patch_size
    mean, std = (torch.tensor(values)[:, None, None] for values in (options.image_mean, options.image_std))
    pixels = sample.pixel_values_videos.clone()
    for video, grids in zip(pixels.split(sample.patches_per_video), sample.grids, strict=True):
        frames = video.split([rows * cols for rows, cols in grids])
        for rows, cols in dict.fromkeys(grids):
            chosen = [frame for frame, grid in zip(frames, grids, strict=True) if grid == (rows, cols)]
            patches = torch.stack(chosen).view(len(chosen), rows, cols, 3, size, size)
            images = patches.permute(0, 3, 1, 4, 2, 5).reshape(len(chosen), 3, rows * size, cols * size)
            changed = transform((images * std + mean).clamp(0, 1), generator)
            if changed.shape != images.shape:
                raise ConfigurationError(
                    f"the transform made {tuple(changed.shape)} of frames of {tuple(images.shape)}; keep the shape."
                )
            cut = ((changed - mean) / std).view(len(chosen), 3, rows, size, cols, size).permute(0, 2, 4, 1, 3, 5)
            for frame, patch in zip(chosen, cut.reshape(len(chosen), rows * cols, -1), strict=True):
                frame.copy_(patch)
    return pixels
