"""Training on a CPU without products of bfloat16 matrices: what chooses float32 by itself, and what says so."""

import pytest
import torch

from elva_hf.training import precision


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "expected"),
    [("cpu", True, torch.bfloat16), ("cpu", False, torch.float32), ("cuda", False, torch.bfloat16)],
)
def test_bfloat16_is_the_faster_dtype_but_on_a_cpu_without_it(monkeypatch, device, has_bfloat16, expected):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: has_bfloat16)
    assert precision.faster_dtype(device) == expected


def test_torch_is_asked_what_the_cpu_multiplies():
    assert precision.cpu_multiplies_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
