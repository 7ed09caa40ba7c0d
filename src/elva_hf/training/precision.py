"""Where bfloat16 is the faster dtype: not on a CPU for which torch multiplies it in a plain loop."""

from __future__ import annotations

from functools import cache

import torch


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether torch has a product of bfloat16 matrices made for this CPU; else float32 is some ten times faster.

    It has one from AVX-512 on, and on Arm with bfloat16 instructions. True where torch does not tell.
    """
    tell = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return tell is None or bool(tell())


def faster_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype that matrices are multiplied in where either will do: bfloat16, or float32 on a CPU without it."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float32 if on_cpu and not cpu_multiplies_bfloat16() else torch.bfloat16
