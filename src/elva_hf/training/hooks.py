"""Parts of losses that are attached to a model by hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class HookHandle:
    """Removes hooks.

    Args:
        removers: Called once, in order.
    """

    def __init__(self, removers: Sequence[Callable[[], None]]):
        self._removers = list(removers)

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        while self._removers:
            self._removers.pop(0)()


class CarryGradient(torch.autograd.Function):
    """Values as they are, on whose way back `term` gets the gradient of a summand of the loss.

    TRL's trainers drop the loss a model returns and make their own of its `log_probs`.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, term: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = term.shape, term.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(ctx.shape, dtype=ctx.dtype, device=gradient.device)
