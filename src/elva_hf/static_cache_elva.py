"""Layers of fixed size for decoding after a merge: what a prefill left, and room for the tokens to come.

After the prefill the length of every layer is known. A decode step then writes into buffers, asks the device nothing
and has the shapes of the step before, so that `torch.compile` and CUDA graphs can take it. Letters: `B` samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

MIN_STEP = 64
STEPS_PER_OCTAVE = 8


class ElvaStaticLayer(StaticLayer):
    """Keys and values of one decoder layer after a merge, in buffers with room for more.

    As in transformers `cumulative_length` is a tensor; it counts the columns held, not the tokens seen.

    Attributes:
        starts_stage: Whether a merge, or the decoder itself, stands before this layer.
        key_mask: `(B, max_cache_len)` bool, False for a hole and for what is to come. On a stage's first layer only.
        merged: Tokens seen minus columns held.
        lag: The same on the device: a compiled step, which would be compiled again for another number, reads this.
        survivors: As in `ElvaDynamicLayer`.
        frame_index: Likewise.
    """

    def __init__(self, max_cache_len: int, **kwargs: Any):
        super().__init__(max_cache_len, **kwargs)
        self.starts_stage = False
        self.merged = 0
        self.lag = torch.tensor(0)
        self.key_mask: Tensor | None = None
        self.survivors: Tensor | None = None
        self.frame_index: Tensor | None = None

    @classmethod
    def freeze(cls, layer: Any, room: int) -> ElvaStaticLayer:
        """Copy what an `ElvaDynamicLayer` holds into buffers with room for `room` more tokens."""
        columns, device = layer.columns, layer.keys.device
        frozen = cls(round_up(columns + room))
        frozen.cumulative_length = torch.full((), columns, dtype=torch.long, device=device)
        frozen.lazy_initialization(layer.keys, layer.values)
        frozen.keys[:, :, :columns] = layer.keys
        frozen.values[:, :, :columns] = layer.values
        for name in ("starts_stage", "merged", "survivors", "frame_index"):
            setattr(frozen, name, getattr(layer, name))
        frozen.lag = torch.full((), layer.merged, dtype=torch.long, device=device)
        torch._dynamo.mark_static_address(frozen.lag)
        if layer.starts_stage:
            frozen.key_mask = torch.zeros(len(layer.keys), frozen.max_cache_len, dtype=torch.bool, device=device)
            frozen.key_mask[:, :columns] = True if layer.key_mask is None else layer.key_mask
            torch._dynamo.mark_static_address(frozen.key_mask)
        return frozen

    def get_seq_length(self) -> Tensor | int:
        """Logical length: tokens seen, merged ones included; a tensor, as reading it would wait for the device."""
        return self.cumulative_length + self.lag if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Most tokens the layer can have seen."""
        return self.max_cache_len + self.merged

    def extend_key_mask(self, new: Tensor | None, batch: int, columns: int) -> Tensor:
        """Write `(B, columns)` into the stage's key mask and return all of it; None stands for "no hole"."""
        places = self.cumulative_length + torch.arange(columns, device=self.key_mask.device)
        new = self.key_mask.new_ones(batch, columns) if new is None else new
        return self.key_mask.index_copy_(1, places, new)

    def reset(self) -> None:
        """Empty the layer; its buffers stay."""
        super().reset()
        self.lag.zero_()
        self.merged, self.survivors, self.frame_index = 0, None, None
        if self.key_mask is not None:
            self.key_mask.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples, for beam search; the buffers stay where they are."""
        for record in (self.keys, self.values, self.key_mask, self.survivors, self.frame_index):
            if record is not None:
                record.copy_(record.index_select(0, beam_idx.to(record.device)))


def round_up(columns: int) -> int:
    """Size of a buffer for so many columns: at most an eighth or 63 more, so that few sizes occur.

    A compiled step is compiled again for each combination of sizes; prompts of about the same length share one.
    """
    step = max(MIN_STEP, 2 ** (columns.bit_length() - 1) // STEPS_PER_OCTAVE)
    return -(-columns // step) * step
