"""Padded batches as one packed row, and packed keys in a padded cache.

A merge leaves every sample with a length of its own. Packed, the samples stand one after another and nothing is
padding; the cache stays rectangular, because generated tokens are appended to all samples at once. Letters: `B`
samples, `N` columns, `n` tokens of the packed row, `k` keys of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache_elva import ElvaDynamicLayer
from .errors_elva import PlaceholderError
from .transfer_elva import to_device


@dataclass(frozen=True)
class BatchLayout:
    """Where the tokens of a padded batch are, known on the host.

    Args:
        valid: `(B, N)` bool on the host, False for padding.
        index: `(n,)` flat place of each packed token in the batch, on the device; None if there is no padding.
        tail: Trailing columns that no merge reaches.
        questions: Per sample the tokens of each question after the prefix they share; None if rows are plain.
    """

    valid: Tensor
    index: Tensor | None
    tail: int
    questions: list[list[int]] | None = None

    @classmethod
    def read(
        cls, valid: Tensor, tail: int, device: torch.device, questions: list[list[int]] | None = None
    ) -> BatchLayout:
        """Lay out a batch from its mask on the host."""
        index = None if bool(valid.all()) else valid.flatten().nonzero().squeeze(1)
        return cls(valid, *to_device([index], device), tail, questions)

    def segments(self, lengths: list[int]) -> list[list[int]]:
        """Tokens of the prefix and of each question of samples that now have `lengths` tokens.

        Merging shortens the prefix alone.
        """
        each = zip(lengths, self.questions or [[]] * len(lengths), strict=True)
        return [[length - sum(questions), *questions] for length, questions in each]

    def pack(self, padded: Tensor) -> Tensor:
        """`(B, N, ...)` to `(n, ...)`."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, packed: Tensor, fill: float = 0) -> Tensor:
        """`(n, ...)` to `(B, N, ...)`, padding filled."""
        if self.index is not None:
            flat = packed.new_full((self.valid.numel(), *packed.shape[1:]), fill)
            packed = flat.index_copy(0, self.index, packed)
        return packed.unflatten(0, self.valid.shape)

    def file(
        self, lengths: list[int], past: Tensor | None, old_tail: int, device: torch.device
    ) -> tuple[Filing, Tensor, Tensor | None]:
        """Plan where a stage's tokens go in the padded cache.

        What a merge may have shortened is pushed against the tail, which keeps the columns of the input: that is
        what makes cropping the tail exact.

        Args:
            lengths: Tokens each sample has left.
            past: `(B, columns)` bool on the host, keys already in the cache; None if it is empty.
            old_tail: Columns that could be cropped before.
            device: Where the indices are wanted.

        Returns:
            The plan, and `(B, columns)` bool: the stage's keys after this forward, on the host, and on the device (None
            stands for "no hole").
        """
        batch, tokens = self.valid.shape
        last = self.valid[:, tokens - self.tail :]
        body = torch.tensor(lengths) - last.sum(1)
        room = int(body.max())
        new = torch.cat([torch.arange(room) >= room - body[:, None], last], 1)
        keys = new if past is None else torch.cat([past, new], 1)
        slots = None if bool(new.all()) else new.flatten().nonzero().squeeze(1)
        holes = None if bool(keys.all()) else keys
        places = (None, None)
        if past is not None and (batch > 1 or holes is not None):
            places = keys.nonzero(as_tuple=True)
        slots, key_mask, *places = to_device([slots, holes, *places], device)
        tail = self.tail + (old_tail if self.tail == tokens else 0)
        past_columns = None if past is None else past.shape[1]
        key_places = None if places[0] is None else tuple(places)
        return Filing(batch, new.shape[1], tokens, tail, slots, key_places, past_columns), keys, key_mask


def count_questions(segment_ids: Tensor, valid: Tensor, shared: Tensor | None = None) -> list[list[int]]:
    """Count the tokens of each question of rows that hold one prefix and questions about it.

    Args:
        segment_ids: `(B, N)` 0 for the prefix, then 1, 2, ... for the questions; padding is not read.
        valid: `(B, N)` bool, False for padding.
        shared: `(P,)` flat places of tokens that must be in a prefix; None for none.

    Raises:
        PlaceholderError: Segments that do not follow one another, a row without prefix, or a shared token outside it.
    """
    if segment_ids.shape != valid.shape:
        raise PlaceholderError(
            f"segment_ids has shape {tuple(segment_ids.shape)}; expected {tuple(valid.shape)}, one for each token."
        )
    if shared is not None and bool(segment_ids.flatten()[shared].any()):
        sample = int(shared[segment_ids.flatten()[shared] != 0][0]) // valid.shape[1]
        raise PlaceholderError(
            f"sample {sample}: a video stands in a question. Put all videos into the prefix (segment 0), which comes "
            "before the questions, or make each question a row of its own."
        )
    counts = []
    for sample, (segments, real) in enumerate(zip(segment_ids, valid, strict=True)):
        segments = segments[real]
        steps = segments.diff()
        if not len(segments) or segments[0] != 0 or bool(((steps != 0) & (steps != 1)).any()):
            raise PlaceholderError(
                f"sample {sample}: segment_ids must start with the prefix, 0, and count its questions 1, 2, ... in "
                f"order; got {segments.unique_consecutive().tolist()}."
            )
        counts.append(segments.bincount()[1:].tolist())
    return counts


@dataclass(frozen=True)
class Filing:
    """Where the tokens of a packed row go in the padded cache, for the layers of one stage.

    Args:
        batch: `B`.
        width: Columns this forward appends.
        tokens: Columns of the input, merged ones included.
        tail: Columns at the end that were not merged and can be cropped.
        slots: `(n,)` place of each packed token in `(B * width)`; None if every place is taken, in order.
        key_places: `(k,)` sample and `(k,)` column of every key of the stage, sample by sample; None if the new
            keys, or all columns of a single sample, are all there is.
        past: Columns the cache held before; None if it was empty.
    """

    batch: int
    width: int
    tokens: int
    tail: int
    slots: Tensor | None
    key_places: tuple[Tensor, Tensor] | None
    past: int | None

    def pad(self, states: Tensor) -> Tensor:
        """`(1, heads, n, d)` packed to `(B, heads, width, d)` padded."""
        rows = states[0].transpose(0, 1)
        if self.slots is not None:
            rows = rows.new_zeros(self.batch * self.width, *rows.shape[1:]).index_copy(0, self.slots, rows)
        return rows.unflatten(0, (self.batch, self.width)).transpose(1, 2)

    def pack(self, states: Tensor) -> Tensor:
        """`(B, heads, columns, d)` padded to `(1, heads, k, d)` packed."""
        if self.key_places is None:
            return states[:, :, : self.past + self.width]  # a static layer hands out what is yet to come
        samples, columns = self.key_places
        return states[samples, :, columns].transpose(0, 1)[None]


class PackedCache:
    """The cache as a decoder's layers see it in a packed forward: packed keys go in, packed keys come out."""

    def __init__(self, cache: Cache, filing: Filing):
        self.cache, self.filing = cache, filing

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """File `(1, heads, n, d)`; returns all keys and values of the layer, `(1, heads, k, d)`."""
        filing = self.filing
        keys, values = self.cache.update(filing.pad(key_states), filing.pad(value_states), layer_idx, *args, **kwargs)
        layer = self.cache.layers[layer_idx]
        if isinstance(layer, ElvaDynamicLayer):
            layer.merged += filing.tokens - filing.width
            layer.tail = filing.tail
        if filing.past is None:
            return key_states, value_states
        return filing.pack(keys), filing.pack(values)
