"""Which code runs the two heavy parts of a merge: Triton kernels on CUDA, the functions of `merging_elva` elsewhere.

The rule is `fuses`; the choice is made here and nowhere else. Both compute the same, sums in float32, but in another
order: similarities differ in their last bits, so a link whose similarity is a threshold to within 1e-6, or two links
that are as close to each other, may be decided differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import merging_elva
from .merging_elva import TubeLinks, index_survivors

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_REFERENCE_ONLY: ContextVar[bool] = ContextVar("elva_reference_only", default=False)


@contextmanager
def reference_merging() -> Iterator[None]:
    """Merge with the pure functions under `with`, on every device."""
    token = _REFERENCE_ONLY.set(True)
    try:
        yield
    finally:
        _REFERENCE_ONLY.reset(token)


def fuses(hidden: Tensor) -> bool:
    """Whether the kernels take a tensor: on CUDA, float32, bfloat16 or float16, with Triton and a GPU it compiles for.

    Without Triton (it comes with PyTorch for CUDA on Linux), on GPUs of compute capability below 8.0, and under
    `reference_merging` the pure functions run. A kernel that fails raises.
    """
    supported = hidden.is_cuda and hidden.dtype in FUSED_DTYPES and not _REFERENCE_ONLY.get()
    return supported and _has_triton() and _compiles_for(hidden.get_device())


def similarity_to_next(hidden: Tensor, links: TubeLinks) -> Tensor:
    """See `merging_elva.similarity_to_next`."""
    if not fuses(hidden):
        return merging_elva.similarity_to_next(hidden, links)
    from . import kernels_elva

    return kernels_elva.similarity_to_next(hidden.detach(), links.order, links.has_next)


def merge_tokens(
    hidden: Tensor, token_sizes: Tensor, survivors: Tensor, num_kept: int, links: TubeLinks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `merging_elva.merge_tokens`.

    Args:
        hidden: `(n, D)` tokens of the packed row.
        token_sizes: `(n,)` float32: input tokens each token stands for.
        survivors: `(n,)` from `find_survivors`.
        num_kept: `m`, the number of survivors.
        links: What `survivors` was found with; in their order a run stands side by side.
    """
    if not fuses(hidden):
        return merging_elva.merge_tokens(hidden, token_sizes, survivors, num_kept)
    from . import kernels_elva

    _, kept, new_index = index_survivors(survivors, num_kept)
    merged = kernels_elva.merge_runs(hidden, token_sizes, links.order, survivors, new_index, num_kept)
    return *merged, kept, new_index


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _compiles_for(device: int) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
