"""A key-value cache whose layers differ in length: after a merge, deeper layers hold fewer keys.

Every layer counts twice. Its logical length is the tokens it has seen, on which generate() builds positions and
crops; its physical length is the columns it holds. Samples of a batch keep unlike numbers of tokens, so columns have
holes: the first layer of a stage (the layers between two merges) carries the stage's key mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .errors_elva import ConfigurationError
from .merging_elva import MergeMap
from .static_cache_elva import ElvaStaticLayer


class ElvaDynamicLayer(DynamicLayer):
    """Keys and values of one decoder layer, of which merged tokens take no room.

    Attributes:
        starts_stage: Whether a merge, or the decoder itself, stands before this layer.
        key_mask: `(B, physical)` bool, False for a hole; None if the stage has none. On a stage's first layer only.
        merged: Tokens seen minus columns held.
        tail: Columns at the end that hold one token each in every layer, so that they can be cropped.
        survivors: `(B, N)` who stands for whom after the merge before this layer; None if not asked for.
        frame_index: `(B, N)` frame of each token, on the first layer; None if not asked for.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.starts_stage = False
        self._forget()

    def _forget(self) -> None:
        self.merged = 0
        self.tail = 0
        self.key_mask: Tensor | None = None
        self.survivors: Tensor | None = None
        self.frame_index: Tensor | None = None

    @property
    def columns(self) -> int:
        """Physical length."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, merged ones included."""
        return self.columns + self.merged

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length with the queries, and how far it lags behind the logical one."""
        return self.columns + query_length, self.merged

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(B, heads, N, d)`, one column for each token; the first are kept as they are."""
        self.tail += key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def extend_key_mask(self, new: Tensor | None, batch: int, columns: int) -> Tensor | None:
        """Append `(B, columns)` to the stage's key mask and return it; None stands for "no hole"."""
        if self.key_mask is not None or new is not None:
            parts = ((self.key_mask, self.columns), (new, columns))
            device = new.device if new is not None else self.key_mask.device
            full = [
                torch.ones(batch, length, dtype=torch.bool, device=device) if part is None else part.to(device)
                for part, length in parts
            ]
            self.key_mask = torch.cat(full, 1)
        return self.key_mask

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number).

        Raises:
            ConfigurationError: Some of them were merged: what they were is gone.
        """
        count = abs(tokens_to_remove)
        if tokens_to_remove < 0 and self.is_initialized and count > self.tail:
            raise ConfigurationError(
                f"cannot crop {count} tokens: only the last {self.tail} of the cache are not part of a video that was "
                "merged. Crop fewer, or start again from an empty cache."
            )
        super().crop(tokens_to_remove)
        if count and self.is_initialized:
            self.tail -= count
            self.key_mask = None if self.key_mask is None else self.key_mask[:, :-count]
            self.survivors = None if self.survivors is None else self.survivors[:, : self.get_seq_length()]
            self.frame_index = None if self.frame_index is None else self.frame_index[:, : self.get_seq_length()]

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the samples, for beam search."""
        super().reorder_cache(beam_idx)
        self._map(lambda record: record.index_select(0, beam_idx.to(record.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda record: record.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self._map(lambda record: record[indices])

    def offload(self) -> None:
        """Move to the host's memory."""
        super().offload()
        self._map(lambda record: record.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device."""
        super().prefetch()
        if self.is_initialized:
            self._map(lambda record: record.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("key_mask", "survivors", "frame_index"):
            record = getattr(self, name)
            if record is not None:
                setattr(self, name, change(record))


class ElvaCache(Cache):
    """A cache of `ElvaDynamicLayer`, or of `ElvaStaticLayer` where a `StaticCache` was given.

    `model(...)` and `generate(...)` return it once something has merged.
    """

    @property
    def tokens_per_layer(self) -> Tensor:
        """`(num_layers, B)` int64: tokens each layer holds of each sample."""
        counts, mask = [], None
        for layer in self.layers:
            if layer.starts_stage:
                mask = layer.key_mask
            if not layer.is_initialized:
                return torch.zeros(len(self.layers), 0, dtype=torch.long)
            counts.append(torch.full((len(layer.keys),), layer.columns) if mask is None else mask.sum(1).cpu())
        return torch.stack(counts)

    @property
    def merge_map(self) -> MergeMap | None:
        """Who stands for whom among all tokens seen; None unless `output_merge_map=True` was given."""
        steps = [i for i, layer in enumerate(self.layers) if layer.survivors is not None]
        if not steps:
            return None
        length = int(self.get_seq_length())
        survivors = tuple(extend_survivors(self.layers[i].survivors, length) for i in steps)
        frames = self.layers[0].frame_index
        if frames is not None:
            frames = torch.nn.functional.pad(frames, (0, length - frames.shape[1]), value=-1)
        return MergeMap(tuple(steps), survivors, frames)

    def record_merges(self, merge_map: MergeMap, seen: int) -> None:
        """Keep the map of a forward that came after `seen` tokens; a step counts all merges up to its layer."""
        layers = range(len(self.layers))
        survivors = {i: self.layers[i].survivors for i in layers if self.layers[i].survivors is not None}
        earlier = {i: extend_survivors(record, seen) for i, record in survivors.items()}
        shifted = (torch.where(record < 0, record, record + seen) for record in merge_map.survivors)
        later = dict(zip(merge_map.layers, shifted, strict=True))
        for i in sorted({*earlier, *later}) if later else ():
            alone = extend_survivors(later[min(later)][:, :0], seen)
            before = _survivors_at(earlier, i, 0) if earlier else alone
            self.layers[i].survivors = torch.cat([before, _survivors_at(later, i, seen)], 1)
        if merge_map.frame_index is not None:
            self._record_frames(merge_map.frame_index, seen)

    def _record_frames(self, frame_index: Tensor, seen: int) -> None:
        before = self.layers[0].frame_index
        before = frame_index[:, :0] if before is None else before
        before = torch.nn.functional.pad(before, (0, seen - before.shape[1]), value=-1)
        if seen:
            frame_index = torch.where(frame_index < 0, -1, frame_index + before.amax(1, keepdim=True) + 1)
        self.layers[0].frame_index = torch.cat([before, frame_index], 1)

    def stage_masks(self) -> list[Tensor | None]:
        """Key mask of every layer's stage."""
        masks, mask = [], None
        for layer in self.layers:
            mask = layer.key_mask if layer.starts_stage else mask
            masks.append(mask)
        return masks


def extend_survivors(survivors: Tensor, length: int) -> Tensor:
    """Let tokens after the recorded ones, up to `length`, stand for themselves."""
    batch, seen = survivors.shape
    alone = torch.arange(seen, length, device=survivors.device).expand(batch, -1)
    return torch.cat([survivors, alone], 1)


def _survivors_at(records: dict[int, Tensor], layer: int, offset: int) -> Tensor:
    """Who stands for whom at a layer, from records of some layers: the last one before it, or nobody merged yet."""
    at = [i for i in records if i <= layer]
    if at:
        return records[max(at)]
    first = records[min(records)]
    own = torch.arange(offset, offset + first.shape[1], device=first.device)
    return torch.where(first < 0, first, own)


def adopt_cache(cache: Cache | None, num_layers: int, past_mask: Tensor | None = None) -> ElvaCache:
    """Make a cache ready for merging, in place: its layers are exchanged, what they hold is kept.

    Args:
        cache: A dynamic cache, empty or filled; None for a new one.
        num_layers: Layers of the decoder.
        past_mask: `(B, past)` 0 for padding, for what a filled cache of another class holds.

    Returns:
        An `ElvaCache` that shares its layers with `cache`; of a static one only once `freeze_cache` has been called.

    Raises:
        ConfigurationError: The layers cannot differ in length, or have already dropped tokens.
    """
    if isinstance(cache, ElvaCache):
        return cache
    if is_static(cache) and not has_merged(cache):
        _check_static(cache)
        return adopt_cache(None, num_layers)
    layers = cache.layers if cache is not None else []
    if not has_merged(cache):
        _adopt_layers(layers, num_layers, past_mask)
    adopted = ElvaCache(layers=layers)
    if cache is not None:
        vars(adopted).update({**vars(cache), "layers": layers, "layer_class_to_replicate": None})
    return adopted


def is_static(cache: Cache | None) -> bool:
    """Whether a cache has layers of fixed size, as `StaticCache` has."""
    return cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)


def has_seen(cache: Cache | None) -> bool:
    """Whether a cache holds tokens; a static one is not asked, as the answer is on the device: once filled, it does."""
    if is_static(cache):
        return cache.layers[0].is_initialized
    return cache is not None and cache.get_seq_length() > 0


def freeze_cache(filled: ElvaCache, static: Cache) -> ElvaCache:
    """Put what a prefill left into layers of fixed size, with the room a static cache has beside the prompt.

    Args:
        filled: By the prefill; emptied.
        static: An empty `StaticCache`; its layers are exchanged.

    Returns:
        An `ElvaCache` that shares its layers with `static`.

    Raises:
        ConfigurationError: The prompt does not fit.
    """
    room = static.layers[0].max_cache_len - filled.get_seq_length()
    if room < 0:
        raise ConfigurationError(
            f"the prompt has {filled.get_seq_length()} tokens, but the static cache was made for "
            f"{static.layers[0].max_cache_len}. Make it with a larger max_cache_len."
        )
    for i in range(len(filled.layers)):
        static.layers[i] = ElvaStaticLayer.freeze(filled.layers[i], room)
        filled.layers[i].reset()  # one layer at a time is held twice
    return ElvaCache(layers=static.layers)


def has_merged(cache: Cache | None) -> bool:
    """Whether a cache, whatever its class, has layers that `adopt_cache` has exchanged."""
    return cache is not None and any(isinstance(layer, ElvaDynamicLayer | ElvaStaticLayer) for layer in cache.layers)


def _adopt_layers(layers: list[Any], num_layers: int, past_mask: Tensor | None) -> None:
    for layer in layers:
        _check_layer(layer)
    layers[:] = [_adopt_layer(layer) for layer in layers]
    layers.extend(ElvaDynamicLayer() for _ in range(num_layers - len(layers)))
    layers[0].starts_stage = True
    if layers[0].columns and past_mask is not None:
        layers[0].key_mask = past_mask[:, : layers[0].columns].to(torch.bool)


def _check_static(cache: Cache) -> None:
    """Refuse a static cache that cannot be filled by a prefill that merges."""
    kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if kinds or cache.offloading or has_seen(cache):
        what = f"with {', '.join(sorted(kinds))} layers" if kinds else "that is offloaded or already holds tokens"
        raise ConfigurationError(
            f"a static cache {what} cannot hold merged tokens. Use a new StaticCache of full attention, a DynamicCache "
            "(drop cache_implementation), or merge_schedule='none'."
        )


def _check_layer(layer: Any) -> None:
    is_full_window = isinstance(layer, DynamicSlidingWindowLayer) and layer.cumulative_length >= layer.sliding_window
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, ElvaDynamicLayer) or is_full_window:
        raise ConfigurationError(
            f"a cache with {type(layer).__name__} layers cannot hold merged tokens. Use a DynamicCache (drop "
            "cache_implementation), or merge_schedule='none'."
        )


def _adopt_layer(layer: DynamicLayer) -> ElvaDynamicLayer:
    if isinstance(layer, ElvaDynamicLayer):
        return layer
    adopted = ElvaDynamicLayer()
    if layer.is_initialized:
        adopted.lazy_initialization(layer.keys, layer.values)
        adopted.keys, adopted.values, adopted.tail = layer.keys, layer.values, layer.get_seq_length()
    return adopted
