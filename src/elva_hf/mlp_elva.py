"""The MLP of a layer, some tokens at a time: a long prefill need not hold what is between its two matrices whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

MLP_ROWS = 2048
"""Tokens the MLP of a layer takes at a time in a long prefill; bounds its memory, changes no result."""

MLP_ROWS_PER_THREAD = 256
"""The same for each thread of a CPU: larger pieces go back to the system and must be fetched anew."""


def mlp_rows(device: torch.device) -> int:
    """Tokens the MLP of a layer takes at a time on a device."""
    return MLP_ROWS if device.type != "cpu" else min(MLP_ROWS, MLP_ROWS_PER_THREAD * torch.get_num_threads())


@contextmanager
def mlp_in_chunks(layers: nn.ModuleList, tokens: int) -> Iterator[None]:
    """Let the MLP of each layer take `mlp_rows` tokens at a time, where no gradient needs its insides.

    Only these instances change, and only inside the context; a second thread that meets a wrapped MLP leaves
    it alone.

    Args:
        layers: The decoder's layers.
        tokens: Length of the packed row.
    """
    wrapped, rows = [], mlp_rows(next(layers.parameters()).device)
    if tokens > rows and not torch.is_grad_enabled():
        for layer in layers:
            mlp = getattr(layer, "mlp", None)
            if mlp is not None and not isinstance(mlp.forward, _Chunked):
                own = vars(mlp).get("forward")
                mlp.forward = _Chunked(mlp.forward, rows)
                wrapped.append((mlp, mlp.forward, own))
    try:
        yield
    finally:
        for mlp, ours, own in wrapped:
            if vars(mlp).get("forward") is not ours:
                continue
            if own is None:
                del mlp.forward
            else:
                mlp.forward = own


class _Chunked:
    def __init__(self, forward: Any, rows: int):
        self.forward, self.rows = forward, rows

    def __call__(self, hidden: Tensor) -> Tensor:
        parts = hidden.split(self.rows, 1)
        first = self.forward(parts[0])
        output = first.new_empty(*hidden.shape[:-1], first.shape[-1])  # so that the pieces never exist twice
        places = output.split(self.rows, 1)
        places[0].copy_(first)
        for part, place in zip(parts[1:], places[1:], strict=True):
            place.copy_(self.forward(part))
        return output
