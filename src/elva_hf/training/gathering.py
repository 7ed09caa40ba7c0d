"""Rows of all processes, with gradient; each process may have another number of rows, also none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_counts(rows: Tensor, group: dist.ProcessGroup | None = None) -> tuple[list[int], int]:
    """How many rows every process has; one small copy to the host.

    Args:
        rows: `(n, ...)` of this process.
        group: Processes that take part, all of which must call this; the default group if None.

    Returns:
        Rows of each process, and which of them this process is. Without a process group: its own rows, and 0.
    """
    if not _is_distributed():
        return [len(rows)], 0
    own = torch.tensor([len(rows)], device=rows.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return torch.cat(every).tolist(), dist.get_rank(group)


def gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Join the rows of all processes, in the order of their ranks.

    The gradient of a process is the sum of what the losses of all processes ask of its rows. So backward talks to the
    other processes too, if the rows need a gradient: in all of them or in none.

    Args:
        rows: `(n, ...)` of this process, equal in all other dimensions and in type everywhere.
        counts: Of `gather_counts`.
        group: Processes that take part, all of which must call this; the default group if None.

    Returns:
        `(sum of counts, ...)`; the rows themselves without a process group.
    """
    if not _is_distributed() or not any(counts):
        return rows
    return _GatherRows.apply(rows, counts, group)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class _GatherRows(torch.autograd.Function):
    """Gather rows padded to the longest; sum their gradients over the processes on the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        rank = dist.get_rank(group)
        ctx.group, ctx.first, ctx.stop = group, sum(counts[:rank]), sum(counts[: rank + 1])
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        every = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(every, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.first : ctx.stop], None, None
