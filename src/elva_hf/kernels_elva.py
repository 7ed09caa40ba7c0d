"""The merge in two Triton kernels: cosine of each token with the next of its tube, and the mean of each run.

Both give what the functions of the same name in `merging_elva` give, up to the rounding of float32 sums; `fusion_elva`
chooses between them. This file needs Triton and is imported where a kernel runs. Letters: `n` tokens of the packed
row, `m` of them kept, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
"""Columns a program reads at once."""


def similarity_to_next(hidden: Tensor, order: Tensor, has_next: Tensor) -> Tensor:
    """Cosine similarity of each token with the next of its tube, both rows read where they stand.

    Args:
        hidden: `(n, D)` float32, bfloat16 or float16.
        order: `(n,)` int64 token indices sorted by tube.
        has_next: `(n,)` bool: the next entry of `order` is of the same tube.

    Returns:
        `(n,)` float32 in the order of `order`, at most 1, `-inf` where there is no next.
    """
    similarity = torch.empty(order.shape, dtype=torch.float32, device=hidden.device)
    if len(order):
        width = hidden.shape[1]
        with torch.cuda.device_of(hidden):
            _similarity_kernel[(len(order),)](
                hidden, order, has_next, similarity, *hidden.stride(), width, BLOCK=_block(width)
            )
    return similarity


def merge_runs(
    hidden: Tensor, token_sizes: Tensor, order: Tensor, survivors: Tensor, new_index: Tensor, num_kept: int
) -> tuple[Tensor, Tensor]:
    """Mean of every run, weighted by what its members stand for, written where the survivor goes.

    One program walks one run in the order of its tube, so the result is the same in every call. Differentiable in
    `hidden`.

    Args:
        hidden: `(n, D)` float32, bfloat16 or float16.
        token_sizes: `(n,)` float32: input tokens each token stands for.
        order: `(n,)` int64 token indices sorted by tube, so that a run stands side by side.
        survivors: `(n,)` int64 survivor of each token.
        new_index: `(n,)` int64 where the survivor of each token goes.
        num_kept: `m`.

    Returns:
        `(m, D)` tokens in the dtype of `hidden`, and `(m,)` their sizes.
    """
    return _MergeRuns.apply(hidden, token_sizes, order, survivors, new_index, num_kept)


class _MergeRuns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        token_sizes: Tensor,
        order: Tensor,
        survivors: Tensor,
        new_index: Tensor,
        num_kept: int,
    ) -> tuple[Tensor, Tensor]:
        width = hidden.shape[1]
        merged, sizes = hidden.new_empty(num_kept, width), torch.empty_like(token_sizes[:num_kept])
        stands = survivors[order]
        begins = torch.ones_like(stands, dtype=torch.bool)
        begins[1:] = stands[1:] != stands[:-1]
        starts = torch.nonzero_static(begins, size=num_kept + 1, fill_value=len(order)).squeeze(1)
        block = _block(width)
        if num_kept:
            with torch.cuda.device_of(hidden):
                _merge_kernel[(num_kept, triton.cdiv(width, block))](
                    hidden, token_sizes, order, stands, starts, new_index, merged, sizes,
                    *hidden.stride(), width, BLOCK=block,
                )  # fmt: skip
        ctx.save_for_backward(token_sizes, sizes, new_index)
        ctx.mark_non_differentiable(sizes)
        return merged, sizes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        before, after, new_index = ctx.saved_tensors
        share = before / after[new_index]
        return (grad[new_index] * share[:, None]).to(grad.dtype), None, None, None, None, None


@triton.jit
def _similarity_kernel(
    hidden, order, has_next, similarity, row_stride, column_stride, width, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0)
    if tl.load(has_next + place):
        this = hidden + tl.load(order + place) * row_stride
        other = hidden + tl.load(order + place + 1) * row_stride
        dot = tl.zeros((BLOCK,), tl.float32)
        this_square = tl.zeros((BLOCK,), tl.float32)
        other_square = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            a = tl.load(this + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(other + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
            dot += a * b
            this_square += a * a
            other_square += b * b
        scale = tl.sqrt_rn(tl.sum(this_square)) * tl.sqrt_rn(tl.sum(other_square))
        scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)  # NaN stays NaN
        cosine = tl.div_rn(tl.sum(dot), scale)
        tl.store(similarity + place, tl.where(cosine > 1.0, 1.0, cosine))
    else:
        tl.store(similarity + place, float("-inf"))


@triton.jit
def _merge_kernel(
    hidden, token_sizes, order, stands, starts, new_index, merged, sizes,
    row_stride, column_stride, width, BLOCK: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = tl.load(starts + run)
    last = tl.load(starts + run + 1)
    survivor = tl.load(stands + first)
    row = tl.load(new_index + survivor)
    own = tl.load(hidden + survivor * row_stride + columns * column_stride, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(token_sizes + survivor)
    away = tl.zeros((BLOCK,), tl.float32)
    for place in range(first, last):
        member = tl.load(order + place)
        if member != survivor:
            size = tl.load(token_sizes + member)
            values = tl.load(hidden + member * row_stride + columns * column_stride, mask=inside, other=0.0)
            away += (values.to(tl.float32) - own) * size
            total += size
    mean = tl.div_rn(away, tl.zeros((BLOCK,), tl.float32) + total) + own
    tl.store(merged + row * width + columns, mean.to(merged.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(sizes + row, total)


def _block(width: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(max(width, 1)))
