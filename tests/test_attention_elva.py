"""The attention wrappers: a packed row is each of its samples alone, and nothing of transformers changes."""

import copy
import json

import flash_reference
import pytest
import torch
from merging_cases import BUSY, MIXED, deep_model, movies, rows_of
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from elva_hf import decoder_elva
from elva_hf.attention_elva import Packing, attend, attention_config, causal_mask, kernel_name, wrap_attention
from elva_hf.errors_elva import ConfigurationError
from elva_hf.modeling_elva import ElvaForCausalLM

KERNELS = ("sdpa", "eager", flash_reference.NAME)
EXACT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(params=KERNELS)
def attention(request, monkeypatch):
    """An attention layer that uses a wrapper."""
    if request.param == flash_reference.NAME:
        flash_reference.install(monkeypatch)
    model = deep_model()
    model.set_attn_implementation(request.param)
    return model.model.language_model.layers[0].self_attn


def states(queries, keys, batch=1):
    """Random queries, keys and values of an attention layer of 4 heads over 2."""
    return (torch.randn(batch, heads, length, 8) for heads, length in ((4, queries), (2, keys), (2, keys)))


def plain(query, key, value):
    """One sample in a loop: the last query stands at the last key and sees everything up to itself."""
    seen = torch.empty(1, query.shape[2], 4, 8)
    for head in range(4):
        for i in range(query.shape[2]):
            visible = key.shape[2] - query.shape[2] + i + 1
            scores = key[0, head // 2, :visible] @ query[0, head, i] / 8**0.5
            seen[0, i, head] = scores.softmax(0) @ value[0, head // 2, :visible]
    return seen


def mask_of_transformers(config, batch, queries, keys, key_mask, like):
    """What `causal_mask` gives, always made by transformers."""
    return ALL_MASK_ATTENTION_FUNCTIONS[kernel_name(config)](
        batch_size=batch, q_length=queries, kv_length=keys, q_offset=keys - queries, attention_mask=key_mask,
        allow_is_causal_skip=key_mask is None, dtype=like.dtype, device=like.device, config=config,
    )  # fmt: skip


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("holes", [True, False])
def test_a_mask_over_keys_with_holes_is_transformers_own(attention, queries, holes):
    key_mask = torch.rand(3, 9) > 0.4 if holes else None
    arguments = (attention.config, 3, queries, 9, key_mask, torch.ones(1))
    found, expected = causal_mask(*arguments), mask_of_transformers(*arguments)
    assert (found is None) == (expected is None)
    if found is not None:
        assert found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa"], indirect=True)
def test_the_mask_of_one_query_is_the_key_mask_itself(attention):
    """Every stage of every decode step makes one; transformers' would be a dozen operations each."""
    key_mask = torch.rand(3, 9) > 0.4
    mask = causal_mask(attention.config, 3, 1, 9, key_mask, torch.ones(1))
    assert mask.data_ptr() == key_mask.data_ptr() and mask.shape == (3, 1, 1, 9)


@torch.no_grad()
def test_decoding_after_a_merge_is_bit_equal_with_masks_made_by_transformers(monkeypatch):
    model, inputs = deep_model(), movies(BUSY, dtype=torch.float32)

    def decode():
        cache = model(**inputs, merge_schedule=MIXED, use_cache=True).past_key_values
        ids = torch.arange(9, 14)[:, None]
        return torch.cat([model(input_ids=ids + i, past_key_values=cache).logits for i in range(4)], 1)

    found = decode()
    monkeypatch.setattr(decoder_elva, "causal_mask", mask_of_transformers)
    assert torch.equal(found, decode())


@pytest.mark.parametrize(
    "query_lengths, key_lengths",
    [
        ([5], [5]),
        ([5, 1, 3], [5, 1, 3]),
        ([5, 1, 3], [9, 4, 3]),
        ([1, 1], [7, 2]),
        ([3, 3, 3], [3, 3, 3]),
        ([4, 0, 2], [6, 3, 2]),
        ([4, 0], [4, 0]),
    ],
    ids=str,
)
def test_a_packed_row_is_each_sample_alone(attention, query_lengths, key_lengths):
    query, key, value = states(sum(query_lengths), sum(key_lengths))
    packing = Packing.build(attention.config, query_lengths, key_lengths, query)
    name = kernel_name(attention.config)
    out, weights = attend(name, attention, query, key, value, None, packing=packing, scaling=attention.scaling)
    assert weights is None
    rows = zip(query.split(query_lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True)
    expected = torch.cat([plain(*row) for row in rows], 1)
    torch.testing.assert_close(out, expected, **EXACT)


def test_without_packing_a_wrapper_is_its_kernel(attention):
    """Padded rows with holes in the keys, as in a cached step after a merge."""
    query, key, value = states(2, 6, batch=3)
    key_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1]], dtype=torch.bool)
    mask = causal_mask(attention.config, 3, 2, 6, key_mask, query)
    name = kernel_name(attention.config)
    out, _ = attend(name, attention, query, key, value, mask, scaling=attention.scaling)
    for i, row in enumerate(key_mask):
        expected = plain(query[i : i + 1], key[i : i + 1, :, row], value[i : i + 1, :, row])
        torch.testing.assert_close(out[i : i + 1], expected, **EXACT)


def test_flash_attention_gets_one_call_with_every_length(monkeypatch):
    flash_reference.install(monkeypatch)
    model = deep_model()
    model.set_attn_implementation(flash_reference.NAME)
    attention = model.model.language_model.layers[0].self_attn
    packing = Packing.build(attention.config, [4, 1], [6, 3], torch.zeros(1))
    assert packing.flash_kwargs["cu_seq_lens_q"].tolist() == [0, 4, 5]
    assert packing.flash_kwargs["cu_seq_lens_k"].tolist() == [0, 6, 9]
    assert packing.flash_kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert (packing.flash_kwargs["max_length_q"], packing.flash_kwargs["max_length_k"]) == (4, 6)
    attend(flash_reference.NAME, attention, *states(5, 9), None, packing=packing, scaling=attention.scaling)
    assert flash_reference.calls == [("packed", [4, 1], [6, 3])]


@torch.no_grad()
def test_flash_attention_never_learns_positions(monkeypatch):
    """With gaps in them transformers would take one sample for several packed ones; one call a layer is enough."""
    flash_reference.install(monkeypatch)
    model = deep_model()
    model.set_attn_implementation(flash_reference.NAME)
    given = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs.get("position_ids")), with_kwargs=True
        )
    inputs = movies(BUSY, dtype=torch.float32)
    cache = model(**inputs, merge_schedule=MIXED, use_cache=True).past_key_values
    assert given == 6 * [None]
    assert len(flash_reference.calls) == 6
    lengths = cache.tokens_per_layer.tolist()
    assert [keys for _, _, keys in flash_reference.calls] == lengths
    model(input_ids=torch.tensor(5 * [[9]]), past_key_values=cache, attention_mask=torch.ones(5, 62))
    assert given == 12 * [None]


@torch.no_grad()
def test_a_sample_alone_needs_no_mask(monkeypatch):
    """Plain causal attention: no kernel is asked for `N * N` values."""
    model, masks = deep_model(), []
    attention = model.model.language_model.layers[0].self_attn
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping,
        "sdpa",
        lambda module, query, key, value, mask, **kwargs: (
            masks.append(mask) or sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        ),
    )
    packing = Packing.build(attention.config, [5, 3], [5, 3], torch.zeros(1))
    assert packing.masks == [None, None]
    inputs = movies(BUSY, dtype=torch.float32)
    cache = model(**inputs, merge_schedule=MIXED, use_cache=True).past_key_values
    assert len(masks) == 6 * len(BUSY) and all(mask is None for mask in masks)
    one = movies(BUSY[:1], dtype=torch.float32)
    cache = model(**one, merge_schedule=MIXED, use_cache=True).past_key_values
    masks.clear()
    model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    assert masks == 6 * [None]


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("queries, keys", [(4, 4), (2, 5), (1, 3)])
def test_masks_count_columns(name, queries, keys):
    """Query `i` of the last ones sees every real key up to its own column."""
    model = deep_model()
    model.set_attn_implementation(name)
    key_mask = torch.ones(2, keys, dtype=torch.bool)
    key_mask[1, 0] = False
    config = attention_config(model.model.language_model)
    mask = causal_mask(config, 2, queries, keys, key_mask, torch.zeros(1))
    allowed = mask if mask.dtype == torch.bool else mask == 0
    for sample in range(2):
        for i in range(queries):
            column = keys - queries + i
            if key_mask[sample, column]:  # what a query in a hole sees does not matter
                expected = [bool(key_mask[sample, j]) and j <= column for j in range(keys)]
                assert allowed[sample, 0, i].tolist() == expected


def test_wrappers_stand_beside_the_kernels():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert wrap_attention("sdpa") == wrap_attention("elva_sdpa") == "elva_sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before is sdpa_attention_forward
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        assert "elva_sdpa" in registry.valid_keys()  # without the second the mask is silently None
    assert ALL_MASK_ATTENTION_FUNCTIONS["elva_sdpa"] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def test_a_text_model_beside_ours_keeps_its_kernel():
    model = deep_model()
    text = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config))
    assert text.config._attn_implementation == "sdpa"
    assert all(layer.self_attn.config._attn_implementation == "sdpa" for layer in text.model.layers)


def test_the_model_goes_on_naming_what_the_user_asked_for(tmp_path):
    for name in ("sdpa", "eager"):
        model = ElvaForCausalLM._from_config(deep_model().config, attn_implementation=name)
        assert model.config._attn_implementation == name
        assert model.model.language_model.config._attn_implementation == name
        assert kernel_name(attention_config(model.model.language_model)) == name
    model.save_pretrained(tmp_path)
    assert "elva_eager" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = ElvaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert kernel_name(attention_config(loaded.model.language_model)) == "eager"
    twin = copy.deepcopy(loaded)
    twin.set_attn_implementation("sdpa")
    assert kernel_name(attention_config(loaded.model.language_model)) == "eager"
    assert kernel_name(attention_config(twin.model.language_model)) == "sdpa"


def test_the_attention_of_the_decoder_alone_cannot_be_changed():
    """Its layers would keep the old wrapper, and masks would be made for the new one."""
    model = deep_model()
    model.model.language_model.set_attn_implementation("eager")
    with pytest.raises(ConfigurationError, match=r"set_attn_implementation\('eager'\) of the whole model"):
        model(**movies(BUSY, dtype=torch.float32), merge_schedule=MIXED)


@torch.no_grad()
def test_a_bare_decoder_can_be_switched_between_kernels():
    model = deep_model(text={"initializer_range": 0.05})
    inputs = movies(BUSY, dtype=torch.float32)
    first = rows_of(model(**inputs, merge_schedule=MIXED).logits, inputs)
    model.set_attn_implementation("eager")
    eager = rows_of(model(**inputs, merge_schedule=MIXED).logits, inputs)
    model.set_attn_implementation("sdpa")
    again = rows_of(model(**inputs, merge_schedule=MIXED).logits, inputs)
    for one, two, three in zip(first, eager, again, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=3e-6)
        assert torch.equal(one, three)
