"""Embeddings through the layers of a causal decoder, with tokens merging on the way (section 3.1, Figure 2).

The layers are the decoder's own: this file only decides what goes into them. A forward with video is packed (the
samples one after another in one row, no padding), because a merge leaves every sample with a length of its own;
generated tokens and later text run as ordinary padded rows. Letters: `B` samples, `N` tokens, `n` tokens of a packed
row, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .attention_elva import (
    STATIC_KERNELS,
    Packing,
    attention_config,
    causal_mask,
    is_flash,
    kernel_name,
    static_mask,
)
from .cache_elva import ElvaCache, adopt_cache, freeze_cache, has_merged, is_static
from .errors_elva import ConfigurationError
from .geometry_elva import to_host
from .merging_elva import InputMerge, MergeMap, Tubes
from .mlp_elva import mlp_in_chunks
from .packing_elva import BatchLayout, PackedCache
from .schedule_elva import MergeSchedule
from .static_cache_elva import ElvaStaticLayer
from .tokens_elva import PackedTokens, drop_merged, merge_step, pack_tokens, read_columns, restore, survivor_columns
from .trace_elva import StateTrace, Trace

DECODERS = ("qwen2", "qwen3", "llama", "mistral")
"""Decoders that are embedding, rotary positions, layers and a final norm, and nothing else."""

NO_MERGING = MergeSchedule()


@dataclass(frozen=True)
class DecoderOutput:
    """What a run of the decoder gives, all at the input's length.

    Args:
        last_hidden_state: `(B, N, D)` after the final norm, or the columns asked for of it; a merged token reads its
            survivor, padding is zero.
        past_key_values: The cache, or None.
        hidden_states: The input of every layer and the final state, each `(B, N, D)`, or None.
        merge_map: Who stands for whom, or None.
    """

    last_hidden_state: Tensor
    past_key_values: Cache | None
    hidden_states: tuple[Tensor, ...] | None = None
    merge_map: MergeMap | None = None


def can_pack(config: PreTrainedConfig) -> bool:
    """Whether `run_packed` knows a decoder of this configuration."""
    return config.model_type in DECODERS


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Smallest number of tokens a layer of this decoder sees; None if all layers see everything."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return window if kinds is None or "sliding_attention" in kinds else None


def check_window(config: PreTrainedConfig, length: int) -> None:
    """Refuse merged sequences longer than a sliding window.

    Raises:
        ConfigurationError: Windows count original positions, which merged keys no longer stand at.
    """
    window = sliding_window(config)
    if window is not None and length > window:
        raise ConfigurationError(
            f"{length} tokens, but this {config.model_type} decoder has layers that see {window} tokens back, and "
            "merged tokens cannot be counted in such a window. Take fewer or smaller frames, or merge_schedule='none'."
        )


def run_packed(
    decoder: PreTrainedModel,
    inputs_embeds: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    tubes: Tubes | None = None,
    schedule: MergeSchedule = NO_MERGING,
    merged: InputMerge | None = None,
    valid: Tensor | None = None,
    frame_index: Tensor | None = None,
    questions: list[list[int]] | None = None,
    columns: slice | Tensor | None = None,
    output_hidden_states: bool | int | Sequence[int] = False,
    output_merge_map: bool = False,
    **kwargs: Any,
) -> DecoderOutput:
    """Run a batch through the decoder's layers as one packed row, merging where the schedule says.

    Args:
        decoder: A decoder of `DECODERS` whose attention is wrapped (`wrap_decoder`).
        inputs_embeds: `(B, N, D)`.
        attention_mask: `(B, past + N)` or `(B, N)`, 0 for padding on either side.
        position_ids: `(B, N)`; counted over real tokens if None.
        past_key_values: Keys and values of earlier tokens.
        use_cache: Whether to return keys and values; as the decoder's configuration says if None.
        tubes: What may merge; None if nothing may.
        schedule: When it does.
        merged: What merged before the decoder, and takes no room in it; None if nothing did.
        valid: `(B, N)` bool on the host, the mask of the new tokens, if the caller has it there.
        frame_index: `(B, N)` frame of each visual token, for the merge map.
        questions: Per sample the tokens of each question at its end, which sees the prefix before all questions and
            itself, and nothing of the others; None if every token sees all before it. There is no cache then.
        columns: Columns of the input whose last hidden state is wanted; None for all.
        output_hidden_states: Whether to return the input of every layer, or of which.
        output_merge_map: Whether to return, and keep in the cache, who stands for whom.
        **kwargs: Passed to the layers.

    Raises:
        ConfigurationError: The decoder, its cache or its sliding windows cannot be merged or packed.
    """
    config = decoder.config
    if not can_pack(config):
        raise ConfigurationError(
            f"{config.model_type!r} decoders can be neither merged nor packed; those that can are "
            f"{', '.join(DECODERS)}. Use merge_schedule='none' and rows of one question."
        )
    if questions is not None:
        _refuse_cache(past_key_values, use_cache)
        use_cache = False
    tubes = tubes if schedule else None
    tokens = inputs_embeds.shape[1]
    valid = _read_mask(attention_mask, inputs_embeds) if valid is None else valid
    tails = [what.tail for what in (tubes, merged) if what is not None]
    layout = BatchLayout.read(valid, min(tails, default=tokens), inputs_embeds.device, questions)
    seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    has_past = seen and attention_mask is not None and attention_mask.shape[1] == seen + tokens
    past_mask = attention_mask[:, :seen] != 0 if has_past else None
    cache = _open_cache(decoder, past_key_values, use_cache, bool(tails), past_mask)
    if tails or isinstance(cache, ElvaCache) or questions is not None:
        check_window(config, seen + tokens)
    past = _past_masks(cache, past_mask, seen, len(valid), config.num_hidden_layers)
    positions = _positions(position_ids, attention_mask, seen, inputs_embeds)
    state = pack_tokens(decoder, inputs_embeds, positions, layout, tubes)
    state = state if merged is None else drop_merged(state, merged, layout, tubes)
    trace = Trace(StateTrace.start(output_hidden_states, config.num_hidden_layers), {} if output_merge_map else None)
    if merged is not None and trace.survivors is not None:
        trace.survivors[0] = survivor_columns(state, layout)
    state = _run_stages(decoder, state, layout, cache, past, (schedule, tubes), trace, kwargs)

    last, states = _read_states(decoder, state, layout, columns, trace.states)
    merge_map = trace.merge_map(frame_index)
    return DecoderOutput(last, _close_cache(cache, past_key_values, merge_map, seen), states, merge_map)


def _run_stages(
    decoder: PreTrainedModel,
    state: PackedTokens,
    layout: BatchLayout,
    cache: Cache | None,
    past: list[Tensor | None],
    merging: tuple[MergeSchedule, Tubes | None],
    trace: Trace,
    kwargs: dict[str, Any],
) -> PackedTokens:
    """Run all layers; masks and places in the cache are made where a stage begins."""
    schedule, tubes = merging
    attention = attention_config(decoder)
    layers = decoder.layers[: decoder.config.num_hidden_layers]
    run_layer = partial(_run_layer, use_cache=cache is not None, **kwargs)
    with mlp_in_chunks(layers, len(state.hidden)):
        for i, layer in enumerate(layers):
            step = None if tubes is None else schedule.step_at(i)
            if step is not None:
                state = merge_step(state, step, schedule, tubes)
            if step is not None and trace.survivors is not None:
                trace.survivors[i] = survivor_columns(state, layout)
            if i == 0 or step is not None or _starts_stage(cache, i):
                packing, view = _enter_stage(attention, state, layout, cache, i, past[i])
            trace.states.add(partial(restore, state, layout))
            state = replace(state, hidden=run_layer(layer, state.hidden[None], state.rotary, None, view, packing)[0])
    return state


def run_padded(
    decoder: PreTrainedModel,
    inputs_embeds: Tensor,
    *,
    past_key_values: ElvaCache,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    columns: slice | Tensor | None = None,
    output_hidden_states: bool | int | Sequence[int] = False,
    **kwargs: Any,
) -> DecoderOutput:
    """Run tokens that never merge through the decoder's layers, after others that have merged.

    Args:
        decoder: The decoder that filled the cache.
        inputs_embeds: `(B, N, D)`.
        past_key_values: A cache whose layers differ in length.
        attention_mask: `(B, past + N)` or `(B, N)`, 0 for padding; only the new tokens' part is read.
        position_ids: `(B, N)`; counted over real tokens if None.
        columns: Columns of the input whose last hidden state is wanted; None for all.
        output_hidden_states: Whether to return the input of every layer, or of which.
        **kwargs: Passed to the layers.

    Raises:
        ConfigurationError: The sequence outgrows a sliding window.
    """
    tokens = inputs_embeds.shape[1]
    cache, config = past_key_values, decoder.config
    seen = cache.get_seq_length()
    check_window(config, seen + tokens)
    new = None if attention_mask is None else attention_mask[:, -tokens:].to(torch.bool)
    rotary = decoder.rotary_emb(inputs_embeds, _positions(position_ids, attention_mask, seen, inputs_embeds))
    attention = attention_config(decoder)
    states = StateTrace.start(output_hidden_states, config.num_hidden_layers)
    hidden, stages = inputs_embeds, _padded_stages(attention, cache, new, inputs_embeds)
    for i, layer in enumerate(decoder.layers[: config.num_hidden_layers]):
        if i in stages:
            mask, packing = stages[i]
        states.add(hidden)
        hidden = _run_layer(layer, hidden, rotary, mask, cache, packing, use_cache=True, **kwargs)
    hidden = decoder.norm(hidden)
    return DecoderOutput(hidden if columns is None else hidden[:, columns], cache, states.finish(hidden))


def _padded_stages(
    config: PreTrainedConfig, cache: ElvaCache, new: Tensor | None, like: Tensor
) -> dict[int, tuple[Tensor | None, Packing | None]]:
    """What the layers of each stage share in a padded forward, by its first layer: a mask, or where the keys are."""
    batch, tokens, _ = like.shape
    key_masks, stages = {}, {}
    flash_steps = tokens == 1 and is_flash(kernel_name(config))
    for i, entry in enumerate(cache.layers):
        if not entry.starts_stage:
            continue
        key_mask = entry.extend_key_mask(new, batch, tokens)
        if isinstance(entry, ElvaStaticLayer):
            stages[i] = static_mask(config, key_mask, entry.cumulative_length, tokens, like), None
        elif flash_steps and key_mask is not None:
            key_masks[i] = key_mask
        else:
            stages[i] = causal_mask(config, batch, tokens, entry.columns + tokens, key_mask, like), None
    if key_masks:
        counts = to_host(torch.stack([mask.sum(1) for mask in key_masks.values()])).tolist()
        for (i, mask), lengths in zip(key_masks.items(), counts, strict=True):
            stages[i] = None, Packing.gather(mask, lengths)
    return stages


def _run_layer(
    layer: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Cache | PackedCache | None,
    packing: Packing | None,
    **kwargs: Any,
) -> Tensor:
    """Run one layer; position ids stay out of it, as FlashAttention would take gaps in them for borders."""
    output = layer(
        hidden,
        attention_mask=mask,
        position_embeddings=rotary,
        past_key_values=cache,
        packing=packing,
        **kwargs,
    )
    return output[0] if isinstance(output, tuple) else output


def _read_mask(attention_mask: Tensor | None, like: Tensor) -> Tensor:
    """`(B, N)` bool on the host: which of the new tokens are no padding."""
    if attention_mask is None:
        return torch.ones(like.shape[:2], dtype=torch.bool)
    return to_host(attention_mask[:, -like.shape[1] :] != 0)


def _positions(position_ids: Tensor | None, attention_mask: Tensor | None, seen: int, like: Tensor) -> Tensor:
    """`(B or 1, N)`: as given, or counted over the real tokens, so that padding moves nothing."""
    tokens = like.shape[1]
    if position_ids is not None:
        return position_ids
    if attention_mask is not None and attention_mask.shape[1] == seen + tokens:
        return ((attention_mask != 0).long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
    return (seen + torch.arange(tokens, device=like.device))[None]


def _refuse_cache(cache: Cache | None, use_cache: bool | None) -> None:
    if use_cache or (cache is not None and cache.get_seq_length()):
        raise ConfigurationError(
            "rows of several questions (segment_ids) are for training and cannot be cached; pass use_cache=False and "
            "no past_key_values, or one question a row."
        )


def _open_cache(
    decoder: PreTrainedModel,
    cache: Cache | None,
    use_cache: bool | None,
    merging: bool,
    past_mask: Tensor | None,
) -> Cache | None:
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    if decoder.training and decoder.is_activation_checkpointing:
        use_cache = False  # layers that are computed twice cannot file their keys
    if cache is None and not use_cache:
        return None
    if merging or has_merged(cache):
        _check_decoder_of_static(decoder, cache)
        return adopt_cache(cache, decoder.config.num_hidden_layers, past_mask)
    return DynamicCache(config=decoder.config) if cache is None else cache


def _close_cache(cache: Cache | None, given: Cache | None, merge_map: MergeMap | None, seen: int) -> Cache | None:
    """What a run gives back: with the merges of this run if they are wanted, in buffers if a static cache was given."""
    if not isinstance(cache, ElvaCache):
        return cache
    if merge_map is not None:
        cache.record_merges(merge_map, seen)
    return freeze_cache(cache, given) if is_static(given) else cache


def _check_decoder_of_static(decoder: PreTrainedModel, cache: Cache | None) -> None:
    """Refuse a static cache where no mask over a buffer can be had, or that has merged and is to take a video."""
    if not is_static(cache):
        return
    kernel = kernel_name(attention_config(decoder))
    if has_merged(cache):
        problem = "it has been filled by a prefill and takes text only"
    elif kernel not in STATIC_KERNELS:
        problem = f"its steps run on {' or '.join(STATIC_KERNELS)} attention, not {kernel}"
    elif sliding_window(decoder.config) is not None:
        problem = f"this {decoder.config.model_type} decoder has layers with a sliding window"
    else:
        return
    raise ConfigurationError(
        f"a static cache cannot hold the merged tokens of this video: {problem}. Use a DynamicCache (drop "
        "cache_implementation), or merge_schedule='none'."
    )


def _past_masks(
    cache: Cache | None, past_mask: Tensor | None, seen: int, batch: int, num_layers: int
) -> list[Tensor | None]:
    """`(B, columns)` keys each layer's stage holds, on the host; one copy for all stages."""
    if not seen:
        return [None] * num_layers
    if not isinstance(cache, ElvaCache):
        mask = torch.ones(batch, seen, dtype=torch.bool) if past_mask is None else to_host(past_mask)
        return [mask] * num_layers
    masks = cache.stage_masks()
    own = [mask for layer, mask in zip(cache.layers, masks, strict=True) if layer.starts_stage and mask is not None]
    copies = iter(to_host(torch.cat(own, 1)).split([mask.shape[1] for mask in own], 1) if own else ())
    past: list[Tensor | None] = []
    for layer, mask in zip(cache.layers, masks, strict=True):
        if layer.starts_stage:
            stage = torch.ones(batch, layer.columns, dtype=torch.bool) if mask is None else next(copies)
        past.append(stage)
    return past


def _read_states(
    decoder: PreTrainedModel,
    state: PackedTokens,
    layout: BatchLayout,
    columns: slice | Tensor | None,
    trace: StateTrace,
) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
    """The last hidden state, of the columns that are wanted, and all states that are."""
    if columns is not None and not trace.wanted:
        return read_columns(state, layout, columns, decoder.norm), None
    final = restore(replace(state, hidden=decoder.norm(state.hidden)), layout)
    return final if columns is None else final[:, columns], trace.finish(final)


def _starts_stage(cache: Cache | None, layer: int) -> bool:
    return isinstance(cache, ElvaCache) and cache.layers[layer].starts_stage


def _enter_stage(
    config: PreTrainedConfig,
    state: PackedTokens,
    layout: BatchLayout,
    cache: Cache | None,
    layer: int,
    past: Tensor | None,
) -> tuple[Packing, PackedCache | None]:
    """Prepare what all layers up to the next merge share: masks, and places in the cache."""
    if layout.questions is not None:
        return Packing.share(config, layout.segments(state.lengths), state.hidden), None
    if cache is None:
        return Packing.build(config, state.lengths, state.lengths, state.hidden), None
    entry = cache.layers[layer] if isinstance(cache, ElvaCache) else None
    filing, keys, key_mask = layout.file(
        state.lengths, past, entry.tail if entry is not None else 0, state.hidden.device
    )
    if entry is not None:
        entry.starts_stage = True
        entry.key_mask = key_mask
    key_lengths = state.lengths if past is None else keys.sum(1).tolist()
    packing = Packing.build(config, state.lengths, key_lengths, state.hidden)
    return packing, PackedCache(cache, filing)
