"""Muon for the matrices of the decoder's layers and AdamW for all else, behind the interface of one optimiser.

Muon (`torch.optim.Muon`) makes every update of a matrix orthogonal, so that rare directions move as far as common ones.
Embeddings, norms, biases and the patch embedding stay with AdamW, as is usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from elva_hf.errors_elva import ConfigurationError

MOMENTUM = 0.95


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
            torch.optim.Muon(
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
