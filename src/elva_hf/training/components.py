"""Means of the loss components of Eq. 4 over the steps and processes of a logging window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elva_hf.training.losses import LossComponents


class ComponentMeans:
    """Sums parts of optimiser steps on the device; nothing is copied to the host before it is logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0
        self._logit_scale: Tensor | None = None

    def add(self, terms: LossComponents, logit_scale: Tensor | None, steps: float) -> None:
        """Add what a micro-batch contributes.

        Args:
            terms: Its parts of the step's components.
            logit_scale: `(1,)` tau of Eq. 3, of which the latest is kept.
            steps: Share of an optimiser step it is.
        """
        for name, value in terms.detached().items():
            self._sums[name] = value.float() + self._sums.get(name, torch.zeros(())).to(value.device)
        self._steps += steps
        self._logit_scale = None if logit_scale is None else logit_scale.detach()

    @property
    def means(self) -> dict[str, Tensor]:
        """Per step, of this process: `loss_gen`, `loss_mse`, `loss_con` as far as in use, and `logit_scale`."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        return means if self._logit_scale is None else {**means, "logit_scale": self._logit_scale}

    def take(self) -> dict[str, float]:
        """Mean of `means` over all processes, each of which must call this; what was added is forgotten."""
        means = self.means
        self.__init__()
        if not means:
            return {}
        values = torch.stack([value.float().flatten()[0] for value in means.values()])
        if world_size() > 1:
            dist.all_reduce(values)
            values = values / world_size()
        return dict(zip(means, values.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What was added, as plain numbers: a resumed run goes on in the middle of a window."""
        scale = None if self._logit_scale is None else float(self._logit_scale)
        sums = {name: float(value) for name, value in self._sums.items()}
        return {"sums": sums, "steps": self._steps, "logit_scale": scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        scale = state["logit_scale"]
        self._sums = {name: torch.tensor(value) for name, value in state["sums"].items()}
        self._steps = state["steps"]
        self._logit_scale = None if scale is None else torch.tensor(scale)


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
