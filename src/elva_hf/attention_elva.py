"""Attention over packed rows: several samples one after another in one row, each seeing only itself.

For every kernel of transformers there is a wrapper of the same name with the prefix `elva_`. It knows one
more argument, `packing`; without it, it is the kernel. Nothing of transformers is replaced: the wrappers are
registered beside its own functions, and the layers of one decoder are told to use them by name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors_elva import ConfigurationError
from .tiles_elva import causal_attention, suits_tiles
from .transfer_elva import to_device

PREFIX = "elva_"

STATIC_KERNELS = ("sdpa", "eager")
"""Kernels that take a mask over a buffer that is not yet full."""


@dataclass(frozen=True)
class Packing:
    """Where each sample's queries and keys lie in a packed row.

    Args:
        query_lengths: Queries of each sample.
        key_lengths: Keys of each sample; its queries are the last of them.
        masks: `(1, 1, queries, keys)` of each sample in its kernel's form; None where plain causal attention will do.
        flash_kwargs: The same for FlashAttention's variable-length kernels; empty for the others.
        key_index: `(k,)` keys of the row in the order they are read, some more than once; None if each is read once.
        key_places: `(k,)` row and `(k,)` column of each key, where queries and keys come in rows of one query.
    """

    query_lengths: list[int]
    key_lengths: list[int]
    masks: list[Tensor | None]
    flash_kwargs: dict[str, Any]
    key_index: Tensor | None = None
    key_places: tuple[Tensor, Tensor] | None = None

    @classmethod
    def gather(cls, key_mask: Tensor, key_lengths: list[int]) -> Packing:
        """Prepare padded rows of one query each, whose keys have holes, for FlashAttention; needs no host sync.

        transformers would look for the holes in every layer, and wait for the device each time.

        Args:
            key_mask: `(B, keys)` bool, False for a hole.
            key_lengths: Keys of each row without holes.
        """
        batch, columns = key_mask.shape
        index = torch.nonzero_static(key_mask.flatten(), size=sum(key_lengths)).squeeze(1)
        flash_kwargs = {
            "cu_seq_lens_q": torch.arange(batch + 1, dtype=torch.int32, device=key_mask.device),
            "cu_seq_lens_k": nn.functional.pad(key_mask.sum(1).cumsum(0), (1, 0)).to(torch.int32),
            "max_length_q": 1,
            "max_length_k": max(key_lengths),
        }
        return cls(batch * [1], key_lengths, [], flash_kwargs, key_places=(index // columns, index % columns))

    @classmethod
    def share(cls, config: PreTrainedConfig, segments: list[list[int]], like: Tensor) -> Packing:
        """Prepare a packed row whose samples hold a prefix and questions that see it and themselves only.

        A question reads the keys of its prefix again, so no mask of all tokens by all tokens is made.

        Args:
            config: From `attention_config`.
            segments: Per sample the tokens of the prefix and of each question.
            like: A tensor of the decoder's device and dtype.
        """
        key_lengths, index, start = [], [], 0
        for prefix, *questions in segments:
            shared = torch.arange(start, start + prefix)
            key_lengths.append(prefix)
            index.append(shared)
            start += prefix
            for question in questions:
                key_lengths.append(prefix + question)
                index += [shared, torch.arange(start, start + question)]
                start += question
        packing = cls.build(config, [length for sample in segments for length in sample], key_lengths, like)
        return replace(packing, key_index=to_device([torch.cat(index)], like.device)[0])

    @classmethod
    def build(cls, config: PreTrainedConfig, query_lengths: list[int], key_lengths: list[int], like: Tensor) -> Packing:
        """Prepare a packed row for the kernel `config` names.

        Args:
            config: From `attention_config`.
            query_lengths: Queries of each sample.
            key_lengths: Keys of each sample.
            like: A tensor of the decoder's device and dtype.
        """
        kernel = kernel_name(config)
        if is_flash(kernel):
            return cls(query_lengths, key_lengths, [], _flash_kwargs(query_lengths, key_lengths, like.device))
        masks: dict[tuple[int, int], Tensor | None] = {}
        for queries, keys in zip(query_lengths, key_lengths, strict=True):
            if queries and (queries, keys) not in masks:
                masks[queries, keys] = causal_mask(config, 1, queries, keys, None, like)
        lengths = zip(query_lengths, key_lengths, strict=True)
        return cls(query_lengths, key_lengths, [masks.get(pair) for pair in lengths], {})


def _flash_kwargs(query_lengths: list[int], key_lengths: list[int], device: torch.device) -> dict[str, Any]:
    lengths = [query_lengths] if key_lengths == query_lengths else [query_lengths, key_lengths]
    ends = [torch.tensor([0, *accumulate(part)], dtype=torch.int32) for part in lengths]
    ends = to_device(ends, device)
    return {
        "cu_seq_lens_q": ends[0],
        "cu_seq_lens_k": ends[-1],
        "max_length_q": max(query_lengths),
        "max_length_k": max(key_lengths),
    }


def causal_mask(
    config: PreTrainedConfig, batch: int, queries: int, keys: int, key_mask: Tensor | None, like: Tensor
) -> Tensor | None:
    """Mask of the last `queries` of `keys` tokens, in the form of the kernel `config` names.

    Args:
        config: From `attention_config`.
        batch: `B`.
        queries: Tokens that attend.
        keys: Tokens attended to; distances count in these, whatever their position ids.
        key_mask: `(B, keys)` bool, False for padding; None if there is none.
        like: A tensor of the decoder's device and dtype.
    """
    kernel = kernel_name(config)
    if kernel == "sdpa" and queries == 1 and key_mask is not None:
        return key_mask[:, None, None]  # one query is the last token: all keys come before it
    return ALL_MASK_ATTENTION_FUNCTIONS[kernel](
        batch_size=batch,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        kv_offset=0,
        attention_mask=key_mask,
        allow_is_causal_skip=key_mask is None,
        dtype=like.dtype,
        device=like.device,
        config=config,
    )


def static_mask(config: PreTrainedConfig, key_mask: Tensor, seen: Tensor, queries: int, like: Tensor) -> Tensor:
    """Mask of tokens that stand in a buffer after `seen` others, of one shape whatever `seen` is.

    Args:
        config: From `attention_config`; the kernel is one of `STATIC_KERNELS`.
        key_mask: `(B, keys)` bool, False for a hole and for what is yet to come.
        seen: Scalar, columns that are filled before these.
        queries: Tokens that attend.
        like: A tensor of the decoder's device and dtype.
    """
    mask = key_mask[:, None, None]
    if queries > 1:
        columns = torch.arange(key_mask.shape[1], device=key_mask.device)
        mask = mask & (columns <= seen + torch.arange(queries, device=key_mask.device)[:, None])
    if kernel_name(config) == "eager":
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)
    return mask


def wrap_attention(name: str) -> str:
    """Register the wrapper of a kernel if that has not been done; returns its name, `"elva_" + name`."""
    wrapped = _wrapped(name)
    if wrapped != name and wrapped not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(wrapped, partial(attend, name))
        AttentionMaskInterface.register(wrapped, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return wrapped


def _wrapped(name: str) -> str:
    return name if name.startswith((PREFIX, "paged|")) else PREFIX + name


def wrap_decoder(decoder: PreTrainedModel) -> None:
    """Let the layers of a decoder use the wrapper of the attention it was told to use.

    They get a configuration of their own for that, so the decoder's goes on naming what the user asked for.
    """
    config = copy.copy(decoder.config)
    config._attn_implementation = wrap_attention(config._attn_implementation)
    for layer in _layers(decoder):
        layer.self_attn.config = config


def attention_config(decoder: PreTrainedModel) -> PreTrainedConfig:
    """Find the configuration by which a decoder's layers choose their attention.

    Raises:
        ConfigurationError: It names no wrapper, or not the one of the decoder's attention.
    """
    name = decoder.config._attn_implementation
    config = decoder.layers[0].self_attn.config
    if config._attn_implementation != _wrapped(name) or not config._attn_implementation.startswith(PREFIX):
        raise ConfigurationError(
            f"the decoder's attention is {name!r}, but its layers use {config._attn_implementation!r}, which cannot "
            f"run packed rows. Set it with set_attn_implementation({name!r}) of the whole model, not of its decoder."
        )
    return config


def kernel_name(config: PreTrainedConfig) -> str:
    """Name of the kernel behind a wrapper: `"sdpa"` for `"elva_sdpa"`."""
    return config._attn_implementation.removeprefix(PREFIX)


def _layers(decoder: PreTrainedModel) -> list[nn.Module]:
    return [layer for layer in getattr(decoder, "layers", ()) if hasattr(layer, "self_attn")]


def is_flash(kernel: str) -> bool:
    """Whether a kernel takes cumulative lengths, as FlashAttention does."""
    return "flash" in kernel


def attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run a kernel on padded rows, or on one packed row sample by sample.

    Args:
        kernel: Name of the kernel in transformers.
        module: The attention layer.
        query: `(B, heads, N, d)`, or `(1, heads, n, d)` packed.
        key: `(B, key_value_heads, K, d)`, or `(1, key_value_heads, k, d)` packed.
        value: As `key`.
        attention_mask: Mask of padded rows; None for a packed row.
        packing: Where the samples lie in a packed row; None for padded rows.
        **kwargs: Passed to the kernel.

    Returns:
        `(B, N, heads, d)` or `(1, n, heads, d)`, and the kernel's attention weights (None for a packed row).
    """
    run = _find_kernel(kernel, module)
    if packing is not None and packing.key_index is not None:
        key, value = key[:, :, packing.key_index], value[:, :, packing.key_index]
    if is_flash(kernel):
        flash_kwargs = packing.flash_kwargs if packing is not None else {}
        run = partial(run, _Renamed(module, kernel), **{**kwargs, **flash_kwargs})
        if packing is None or packing.key_places is None:
            return run(query, key, value, attention_mask)
        rows, columns = packing.key_places
        key, value = (states[rows, :, columns].transpose(0, 1)[None] for states in (key, value))
        return run(query.transpose(0, 2), key, value, None)[0].transpose(0, 1), None
    if packing is None:
        return run(module, query, key, value, attention_mask, **kwargs)
    rows = zip(
        query.split(packing.query_lengths, 2),
        key.split(packing.key_lengths, 2),
        value.split(packing.key_lengths, 2),
        packing.masks,
        strict=True,
    )
    if kernel == "sdpa":
        run = _sdpa_or_tiles(run)
    seen = [run(module, q, k, v, mask, **kwargs)[0] for q, k, v, mask in rows if q.shape[2]]
    return (seen[0] if len(seen) == 1 else torch.cat(seen, 1)), None


def _sdpa_or_tiles(sdpa: Callable) -> Callable:
    def run(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if suits_tiles(query, key, mask, **kwargs):
            return causal_attention(query, key, value, kwargs.get("scaling")), None
        return sdpa(module, query, key, value, mask, **kwargs)

    return run


def _find_kernel(kernel: str, module: nn.Module) -> Callable:
    """Find a kernel in transformers, which registers no "eager": each model file brings its own."""
    if kernel == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[kernel]


class _Renamed:
    """An attention layer whose configuration names the kernel, by which transformers finds its FlashAttention."""

    def __init__(self, target: Any, kernel: str):
        self._target, self._kernel = target, kernel

    @property
    def config(self) -> Any:
        return _Renamed(self._target.config, self._kernel)

    @property
    def _attn_implementation(self) -> str:
        return self._kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
