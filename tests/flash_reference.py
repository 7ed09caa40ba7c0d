"""FlashAttention's two functions in plain PyTorch, and transformers' own FlashAttention path on top of them.

What is tested with it is what reaches the kernel: which keys, which lengths, which rows. The kernels
themselves need a GPU. Real kernels read past what they are given without a word; these refuse.
"""

import pytest
import torch
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as flash

NAME = "flash_attention_2"

_GLOBALS = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)


def attend(query, key, value, softmax_scale, causal, window_size):
    """One sequence: query `(q, H, d)`, key and value `(k, K, d)`; the last query stands at the last key."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    ahead = torch.arange(len(key)) - (torch.arange(len(query)) + len(key) - len(query))[:, None]
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros(len(query), len(key), dtype=torch.bool)
    if right >= 0:
        hidden = hidden | (ahead > right)
    if left >= 0:
        hidden = hidden | (ahead < -left)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)  # a query without keys gives zero
    return torch.einsum("hqk,khd->qhd", weights, value)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False
):
    """`(B, S, H, d)` in and out."""
    assert q.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0], "flash_attn_func: shapes"
    assert dropout_p == 0.0 and softcap == 0.0
    calls.append(("dense", q.shape[0] * [q.shape[1]], k.shape[0] * [k.shape[1]]))
    return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    deterministic=False,
):
    """Packed `(total, H, d)` in and out; every length must fit the tensors."""
    assert q.ndim == 3 and k.shape == v.shape, "flash_attn_varlen_func: shapes"
    assert dropout_p == 0.0 and softcap == 0.0
    queries = _lengths(cu_seqlens_q, max_seqlen_q, len(q), "q")
    keys = _lengths(cu_seqlens_k, max_seqlen_k, len(k), "k")
    assert len(queries) == len(keys), "as many sequences of queries as of keys"
    calls.append(("packed", queries, keys))
    rows = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([attend(*row, softmax_scale, causal, window_size) for row in rows])


calls: list = []
"""What reached the kernels since `install`: `("dense" or "packed", lengths of queries, lengths of keys)`."""


def _lengths(cumulative, longest, total, which):
    assert cumulative.dtype == torch.int32, f"cu_seqlens_{which} must be int32, is {cumulative.dtype}"
    lengths = cumulative.diff().tolist()
    assert int(cumulative[0]) == 0 and int(cumulative[-1]) == total, f"cu_seqlens_{which} must span {total} tokens"
    assert min(lengths) >= 0 and max(lengths) <= int(longest), f"max_seqlen_{which}={longest} is too small"
    return lengths


def _import(implementation, *args, **kwargs):
    if implementation != NAME:  # the real function knows no other name of ours either
        raise ImportError(f"no FlashAttention called {implementation!r}")
    return flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `attn_implementation="flash_attention_2"` run on the reference until the test ends."""
    for name in _GLOBALS:
        monkeypatch.setattr(flash, name, None)
    calls.clear()
    monkeypatch.setattr(flash, "_lazy_imports", _import)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
