"""Rows -> batches of model inputs, padded on the right; shared-prefix packing where it is asked for.

With packing every question of a row sees the videos and itself, never another question, and positions restart after
the videos. A row is therefore exactly as many single-turn conversations as it has questions, at the cost of one pass
over the videos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from elva_hf.data.encoding import EncodedSample, check_template, encode_row
from elva_hf.data.packing import IGNORED, PADDING, PREFIX
from elva_hf.errors_elva import ElvaError
from elva_hf.options_elva import check_choice, check_whole
from elva_hf.processing_elva import ElvaProcessor

PACKINGS = ("none", "shared_prefix")


class TargetCache(Protocol):
    """What a cache of teacher features offers; `training.teacher_cache.TeacherCache` is one."""

    def key(self, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> Any:
        """Name of one video by its patches."""

    def get(self, key: Any, *, grids: Sequence[tuple[int, int]], sample_id: str) -> tuple[Tensor, Tensor]:
        """`(C, h, w, D)` per clip of the video and `(T, D)` per frame; grids and id are for its errors."""


class ElvaCollator:
    """Puts encoded samples, or rows as they are, together as a batch for `ElvaForCausalLM`.

    Works with `transformers.Trainer` on any list of rows, and with TRL's `SFTTrainer` on a `datasets.Dataset` of rows
    (`remove_unused_columns=False` for both, and `dataset_kwargs={"skip_prepare_dataset": True}` for TRL).

    Args:
        processor: Of the model.
        packing: `"none"` makes each independent question a row of its own, with its own copy of the pixels;
            `"shared_prefix"` keeps them in one row, with `segment_ids` and `position_ids`.
        sample_ids: Whether to add `sample_ids`: the index of the sample in its dataset, or a 63-bit hash of its `id`.
        teacher_cache: Where `teacher_tubes` and `teacher_frames` are read, if anywhere.
        pad_to_multiple_of: Round the length up to this many tokens.
        **options: Of the video processor, for rows that are not encoded yet.

    Raises:
        ConfigurationError: An option that cannot be, or a chat template that does not mark the assistant's turns.
    """

    def __init__(
        self,
        processor: ElvaProcessor,
        *,
        packing: str = "none",
        sample_ids: bool = False,
        teacher_cache: TargetCache | None = None,
        pad_to_multiple_of: int | None = None,
        **options: Any,
    ):
        check_choice(packing, "packing", PACKINGS)
        if pad_to_multiple_of is not None:
            check_whole(pad_to_multiple_of, "pad_to_multiple_of", "tokens")
        check_template(processor)
        processor.video_processor.resolve_options(**options)
        processor.video_processor.resolve_budgets(**options)
        self.processor = processor
        self.packing = packing
        self.sample_ids = sample_ids
        self.teacher_cache = teacher_cache
        self.pad_to_multiple_of = pad_to_multiple_of
        self.options = options

    def __call__(self, rows: Sequence[EncodedSample | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: From `encode_row`, or rows for it.

        Returns:
            `input_ids`, `labels` (-100 where nothing is learnt), `attention_mask`, each `(B, N)`; with packed rows
            `segment_ids` (0 for what the questions of a row share, 1, 2, ... for them, -1 for padding) and
            `position_ids`, `(B, N)`; with videos `pixel_values_videos`; and what was asked for: `sample_ids` `(B,)`,
            `teacher_tubes` `(C, h, w, D)`, `teacher_frames` `(F, D)`.

        Raises:
            ElvaError: No rows, and all that `encode_row` and the cache raise.
        """
        if not rows:
            raise ElvaError("a batch of no rows; give at least one.")
        samples = [
            row if isinstance(row, EncodedSample) else encode_row(row, self.processor, **self.options) for row in rows
        ]
        if self.packing == "none":
            samples = [single for sample in samples for single in sample.unpack()]
        batch = pad_samples(samples, self.processor.tokenizer.pad_token_id, self.pad_to_multiple_of)
        pixels = [sample.pixel_values_videos for sample in samples if sample.pixel_values_videos is not None]
        if pixels:
            batch["pixel_values_videos"] = torch.cat(pixels)
        if self.sample_ids:
            batch["sample_ids"] = torch.tensor([number_sample(sample) for sample in samples])
        if pixels and self.teacher_cache is not None:
            batch.update(gather_targets(samples, self.teacher_cache))
        return batch


def pad_samples(
    samples: Sequence[EncodedSample], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, Tensor]:
    """Token tensors of a batch, padded on the right.

    Args:
        samples: `B` samples.
        pad_token_id: Id of the padding.
        pad_to_multiple_of: Round the length up to this many tokens.
    """
    length = max(map(len, samples))
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of

    def pad(tensors: Iterator[Tensor], value: int) -> Tensor:
        padded = torch.full((len(samples), length), value)
        for row, tensor in zip(padded, tensors, strict=True):
            row[: len(tensor)] = tensor
        return padded

    batch = {
        "input_ids": pad((sample.input_ids for sample in samples), pad_token_id),
        "labels": pad((sample.labels for sample in samples), IGNORED),
        "attention_mask": pad((torch.ones_like(sample.input_ids) for sample in samples), 0),
    }
    if any(sample.segment_ids is not None for sample in samples):
        segments = (
            torch.full_like(sample.input_ids, PREFIX) if sample.segment_ids is None else sample.segment_ids
            for sample in samples
        )
        batch["segment_ids"] = pad(segments, PADDING)
        batch["position_ids"] = pad((sample.position_ids for sample in samples), 0)
    return batch


def number_sample(sample: EncodedSample) -> int:
    """The index of a sample, or a 63-bit hash of its id where it has none."""
    if sample.index >= 0:
        return sample.index
    return int.from_bytes(hashlib.blake2b(sample.sample_id.encode(), digest_size=8).digest(), "big") >> 1


def gather_targets(samples: Sequence[EncodedSample], cache: TargetCache) -> dict[str, Tensor]:
    """A teacher's features of all videos of a batch, in order.

    Args:
        samples: Those of the batch.
        cache: Holds the features of each of their videos.
    """
    tubes, frames = [], []
    for sample in samples:
        if sample.pixel_values_videos is None:
            continue
        videos = sample.pixel_values_videos.split(sample.patches_per_video)
        for pixels, grids in zip(videos, sample.grids, strict=True):
            of_clips, of_frames = cache.get(cache.key(pixels, grids), grids=grids, sample_id=sample.sample_id)
            tubes.append(of_clips)
            frames.append(of_frames)
    return {"teacher_tubes": torch.cat(tubes), "teacher_frames": torch.cat(frames)}


@dataclass(frozen=True)
class PackedRow:
    """One video and its questions as token ids.

    Args:
        prefix: Ids up to and including the video.
        turns: Per question the ids after the video up to the answer, and the answer's ids.
    """

    prefix: list[int]
    turns: list[tuple[list[int], list[int]]]

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(question) + len(answer) for question, answer in self.turns)


def pack_rows(rows: Sequence[PackedRow], pad_token_id: int, *, merges: bool = False) -> dict[str, Tensor]:
    """Build a right-padded batch of packed rows.

    Args:
        rows: `B` rows.
        pad_token_id: Id of the padding.
        merges: Whether the batch is for a model that merges, which takes `segment_ids` and no mask of all by all. Short
            rows are faster with the mask.

    Returns:
        `input_ids`, `labels`, `position_ids`, each `(B, N)`, and `attention_mask`, `(B, 1, N, N)` float32: 0 where a
        token may look, the lowest float where it may not. Rows of one question are plain sequences: their mask is
        `(B, N)`, 1 for a token; and so it is with `merges`, beside `segment_ids` `(B, N)`.
    """
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        start = len(row.prefix)
        input_ids[i, :start] = torch.tensor(row.prefix)
        position_ids[i, :start] = torch.arange(start)
        segments[i, :start] = 0
        for number, (question, answer) in enumerate(row.turns, start=1):
            stop = start + len(question) + len(answer)
            input_ids[i, start:stop] = torch.tensor(question + answer)
            labels[i, start + len(question) : stop] = torch.tensor(answer)
            position_ids[i, start:stop] = len(row.prefix) + torch.arange(stop - start)
            segments[i, start:stop] = number
            start = stop
    batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    if int(segments.max()) <= 1:
        return {**batch, "attention_mask": (segments >= 0).long()}
    if merges:
        return {**batch, "attention_mask": (segments >= 0).long(), "segment_ids": segments}
    return {**batch, "attention_mask": shared_prefix_mask(segments)}


def shared_prefix_mask(segments: Tensor) -> Tensor:
    """Attention mask of packed rows: causal, within a segment and to the prefix.

    Args:
        segments: `(B, N)` 0 for the prefix, 1, 2, ... for the questions, -1 for padding.

    Returns:
        `(B, 1, N, N)` float32, to be added to the scores. Padding sees itself, so no row is empty.
    """
    seen, looking = segments[:, None, None, :], segments[:, None, :, None]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    allowed = causal & ((seen == 0) | (seen == looking)) & (seen >= 0)
    allowed = allowed | torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
