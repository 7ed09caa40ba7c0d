"""Muon for the matrices of the decoder's layers and AdamW for all else, behind the interface of one optimiser.

Muon (`torch.optim.Muon`) makes every update of a matrix orthogonal, so that rare directions move as far as common ones.
Embeddings, norms, biases and the patch embedding stay with AdamW, as is usual. Muon multiplies in bfloat16, and in
float32 on a CPU where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.precision import faster_dtype

MOMENTUM = 0.95


class _Muon(torch.optim.Muon):
    """torch's, with its products in float32 where bfloat16 is slow; the state is the same."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if all(faster_dtype(weight.device) == torch.bfloat16 for weight in weights):
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group, faster_dtype(weight.device))
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any], dtype: torch.dtype) -> None:
        state, rate = self.state[weight], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
        update = weight.grad.lerp(momentum, group["momentum"])
        update = orthogonalize(update.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_(update, alpha=-rate * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1])))


def orthogonalize(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of `(m, n)` near one by iterations of a quintic polynomial (Newton-Schulz).

    Args:
        matrix: Of any floating dtype, in which all products are taken.
        coefficients: Of the first, third and fifth power.
        steps: Iterations.
        eps: The least norm that is divided by.
    """
    first, third, fifth = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), wide, beta=first)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps `torch.optim.Muon` and `torch.optim.AdamW` together; schedulers see the groups of both.

    Args:
        model: Its parameters are shared out: 2-D weights under `layers` to Muon, the others to AdamW.
        learning_rate: Of AdamW.
        muon_learning_rate: Of Muon, not scaled by the shape of a matrix.
        weight_decay: Of Muon's matrices; AdamW decays nothing.
        betas: Of AdamW.

    Raises:
        ConfigurationError: The model has no matrix in a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        muon_learning_rate: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ):
        matrices, rest = [], []
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                (matrices if weight.ndim == 2 and ".layers." in name else rest).append(weight)
        if not matrices:
            raise ConfigurationError("no layer of the model has a matrix to train; use AdamW alone.")
        self.parts = [
            _Muon(
                matrices,
                lr=muon_learning_rate,
                momentum=MOMENTUM,
                weight_decay=weight_decay,
                adjust_lr_fn="original",
            ),
            torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=0.0),
        ]
        # the very dictionaries of the parts: a scheduler that writes a learning rate here writes it there
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both, as a list under `parts`."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
