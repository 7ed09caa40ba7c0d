"""Host-built index tensors to the device: in one copy, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; every dtype may begin there


def to_device(tensors: Sequence[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Copy tensors from the host in one go: through pinned memory and without a wait on CUDA; on a CPU as they are.

    Args:
        tensors: On the host, of any shape and dtype; None stays None.
        device: Where they are wanted.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if device.type == "cpu" or not given:
        return list(tensors)
    pinned = device.type == "cuda"
    buffer, starts = pack_bytes(given, pinned=pinned)
    buffer = buffer.to(device, non_blocking=pinned)
    moved = iter(unpack_bytes(buffer, starts, given))
    return [tensor if tensor is None else next(moved) for tensor in tensors]


def pack_bytes(tensors: Sequence[Tensor], *, pinned: bool = False) -> tuple[Tensor, list[int]]:
    """Lay tensors one after another.

    Args:
        tensors: On the host.
        pinned: Whether the buffer is in page-locked memory.

    Returns:
        `(bytes,)` uint8, and the byte at which each tensor starts.
    """
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    for place, tensor in zip(unpack_bytes(buffer, starts, tensors), tensors, strict=True):
        place.copy_(tensor)
    return buffer, starts


def unpack_bytes(buffer: Tensor, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `pack_bytes` laid into a buffer, as views of it.

    Args:
        buffer: `(bytes,)` uint8, on any device.
        starts: From `pack_bytes`.
        like: Tensors of the same shapes and dtypes.
    """
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=True)
    ]
