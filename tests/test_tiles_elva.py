"""Attention in tiles: against float64, what it may stand in for, and where it does."""

import pytest
import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from elva_hf import attention_elva, tiles_elva
from elva_hf.attention_elva import Packing, attend
from elva_hf.tiles_elva import causal_attention, suits_tiles


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def a_cpu_for_tiles(monkeypatch):
    monkeypatch.setattr(tiles_elva, "multiplies_bfloat16", lambda: True)


def make_row(tokens, heads=8, groups=2, width=16, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, width), (groups, width), (groups, width))
    return [torch.randn(1, tokens, *shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def in_float64(query, key, value, scale=None):
    row = (part.double() for part in (query, key, value))
    return functional.scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (8, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize("tokens", [1, 15, 64, 65, 200])
def test_tiles_give_what_float64_gives(tokens, heads, groups, scale):
    row = make_row(tokens, heads, groups, dtype=torch.float32)
    found = causal_attention(*row, scaling=scale)
    assert found.shape == (1, tokens, heads, 16)
    assert relative(found, in_float64(*row, scale)) < 1e-6


def test_in_bfloat16_tiles_are_about_as_exact_as_the_kernel_they_replace():
    row = make_row(700, width=64)
    kernel = functional.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True).transpose(1, 2)
    expected = in_float64(*row)
    assert relative(causal_attention(*row), expected) < 1.25 * relative(kernel, expected)


def test_large_scores_keep_the_precision_of_float32():
    query, key, value = make_row(300, width=64)
    query = query * 8  # scores of some hundred, of which bfloat16 keeps no fraction
    expected = in_float64(query, key, value)
    assert relative(causal_attention(query, key, value), expected) < 0.005


@pytest.mark.parametrize("rows", [1, 7, 200, 1000])
def test_the_size_of_tiles_changes_nothing(monkeypatch, rows):
    row = make_row(200, dtype=torch.float64)
    monkeypatch.setattr(tiles_elva, "TILE_ROWS", rows)
    torch.testing.assert_close(causal_attention(*row).double(), in_float64(*row), rtol=1e-5, atol=1e-6)


def test_no_token_sees_a_later_one():
    query, key, value = make_row(200)
    before = causal_attention(query, key, value)
    for part in (query, key, value):
        part[:, :, 130:] = 7
    after = causal_attention(query, key, value)
    assert torch.equal(before[:, :130], after[:, :130])
    assert not torch.equal(before[:, 130:], after[:, 130:])


def test_tiles_stand_in_for_plain_causal_inference_in_bfloat16_only(a_cpu_for_tiles):
    query, key, _ = make_row(200)
    assert suits_tiles(query, key, None)
    assert suits_tiles(query, key, None, dropout=0.0, scaling=0.3, is_causal=None)
    assert not suits_tiles(query, key, torch.ones(1, 1, 200, 200, dtype=torch.bool))
    assert not suits_tiles(query, key, None, dropout=0.1)
    assert not suits_tiles(query, key, None, is_causal=False)
    assert not suits_tiles(query[:, :, -100:], key, None)
    assert not suits_tiles(query[:, :, :100], key[:, :, :100], None)
    assert not suits_tiles(query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1), None)
    assert not suits_tiles(query.float(), key.float(), None)
    assert not suits_tiles(query.half(), key.half(), None)
    assert not suits_tiles(query[:, :2], key, None)
    assert not suits_tiles(*make_row(4097)[:2], None)
    assert not suits_tiles(query.to("meta"), key.to("meta"), None)
    with torch.enable_grad():
        assert not suits_tiles(query, key, None)


@pytest.mark.parametrize(
    ("capabilities", "suits"),
    [
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, False),
        ({"avx2": True}, False),
        ({}, False),
    ],
)
def test_which_processors_are_faster_with_tiles(monkeypatch, capabilities, suits):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert tiles_elva.multiplies_bfloat16.__wrapped__() is suits


def test_an_older_torch_that_does_not_know_its_processor_keeps_its_kernel(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not tiles_elva.multiplies_bfloat16.__wrapped__()


class Layer(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 4


def packing_of(*lengths):
    return Packing(list(lengths), list(lengths), [None] * len(lengths), {})


def test_packed_rows_use_tiles_for_their_long_samples(a_cpu_for_tiles, monkeypatch):
    seen = []

    def watch(query, *rest):
        seen.append(query.shape[2])
        return causal_attention(query, *rest)

    monkeypatch.setattr(attention_elva, "causal_attention", watch)
    query, key, value = make_row(500)
    found, weights = attend(
        "sdpa", Layer(), query, key, value, None, packing_of(300, 50, 150), dropout=0.0, scaling=0.25
    )
    assert seen == [300, 150]
    assert weights is None
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for piece in (slice(0, 300), slice(300, 350), slice(350, 500)):
        alone = kernel(Layer(), *(part[:, :, piece] for part in (query, key, value)), None, dropout=0.0, scaling=0.25)[
            0
        ]
        torch.testing.assert_close(found[:, piece], alone, rtol=0.02, atol=0.02)


def test_rows_that_are_not_packed_keep_the_kernel(a_cpu_for_tiles, monkeypatch):
    monkeypatch.setattr(attention_elva, "causal_attention", None)
    query, key, value = make_row(300)
    found, _ = attend("sdpa", Layer(), query, key, value, None, dropout=0.0, scaling=0.25)
    assert found.shape == (1, 300, 8, 16)
