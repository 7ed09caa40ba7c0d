"""Index tensors to the device: few copies, none of which the host waits for, and nothing changes on the way."""

import copy

import flash_reference
import pytest
import torch
from generating import GREEDY
from merging_cases import BUSY, LAYERS, MIXED, SCHEDULES, deep_model, double_model, movie, movies, positions, without
from tiny_elva import words
from torch.utils._python_dispatch import TorchDispatchMode

from elva_hf import attention_elva, decoder_elva, geometry_elva, modeling_elva, packing_elva, tokens_elva
from elva_hf.transfer_elva import pack_bytes, to_device, unpack_bytes

MODULES = (attention_elva, geometry_elva, modeling_elva, packing_elva, tokens_elva)
RATIOS = SCHEDULES["ratios"]


class Copies(TorchDispatchMode):
    """Shapes of what is copied to another device, and names of all operations."""

    def __init__(self):
        super().__init__()
        self.moved, self.called = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.called.append(function.overloadpacket.__name__)
        if function is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.moved.append((args[0].dtype, args[0].device.type, out.device.type))
        return out


@pytest.fixture
def buffered(monkeypatch):
    """Lets every transfer go through a buffer, as on CUDA; notes how many tensors each had."""
    transfers = []

    def through_a_buffer(tensors, device):
        given = [tensor for tensor in tensors if tensor is not None]
        if not given:
            return list(tensors)
        transfers.append(len(given))
        moved = iter(unpack_bytes(*pack_bytes(given), given))
        return [tensor if tensor is None else next(moved) for tensor in tensors]

    for module in MODULES:
        monkeypatch.setattr(module, "to_device", through_a_buffer)
    return transfers


def some_tensors():
    return [
        torch.arange(5),
        torch.tensor([True, False, True]),
        None,
        torch.randn(2, 3, dtype=torch.float64),
        torch.tensor(7, dtype=torch.int32),
        torch.empty(0, 4),
        torch.arange(12, dtype=torch.int16).view(3, 4).T,
        torch.randn(3).to(torch.bfloat16),
    ]


def test_a_buffer_gives_back_what_went_in():
    given = [tensor for tensor in some_tensors() if tensor is not None]
    buffer, starts = pack_bytes(given)
    assert buffer.dtype == torch.uint8 and all(start % 16 == 0 for start in starts)
    for found, expected in zip(unpack_bytes(buffer, starts, given), given, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_on_a_cpu_nothing_is_copied():
    given = some_tensors()
    assert all(found is tensor for found, tensor in zip(to_device(given, torch.device("cpu")), given, strict=True))


def test_many_tensors_are_one_copy():
    with Copies() as copies:
        moved = to_device(some_tensors(), torch.device("meta"))
    assert copies.moved == [(torch.uint8, "cpu", "meta")]
    for found, tensor in zip(moved, some_tensors(), strict=True):
        assert (found is None) == (tensor is None)
        if tensor is not None:
            assert (found.shape, found.dtype, found.device.type) == (tensor.shape, tensor.dtype, "meta")


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["none", "ratios", "window and max_run"])
def test_a_prefill_copies_once_for_what_it_reads_and_once_or_twice_a_stage(monkeypatch, schedule):
    """On a meta device: geometry, tubes, layout; then at most the budget and the places of each stage."""
    model = deep_model()
    inputs = movies(BUSY, dtype=torch.float32)
    kinds = model.model.token_kinds(inputs["input_ids"])
    entry = (kinds + 8 * (inputs["attention_mask"] == 0)).to(torch.int8)
    for module in (geometry_elva, decoder_elva, tokens_elva):
        monkeypatch.setattr(module, "to_host", lambda tensor: entry)
    meta = {name: value.to("meta") for name, value in inputs.items()}
    model = model.to("meta")
    with Copies() as copies:
        model(**meta, merge_schedule=SCHEDULES[schedule], use_cache=True)
    steps = len(model.config.resolve_merge_schedule(SCHEDULES[schedule]).steps)
    geometry, layout, tubes, stages, budgets = 1, 1, min(steps, 1), 1 + steps, steps
    assert len(copies.moved) == geometry + layout + tubes + stages + budgets
    assert set(copies.moved) == {(torch.uint8, "cpu", "meta")}


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", flash_reference.NAME])
@pytest.mark.parametrize("schedule", ["ratios", "paper", "window and max_run"])
def test_what_goes_through_a_buffer_changes_nothing(monkeypatch, request, schedule, kernel):
    if kernel == flash_reference.NAME:
        flash_reference.install(monkeypatch)
    model = deep_model()
    model.set_attn_implementation(kernel)
    inputs = movies(BUSY, dtype=torch.float32)
    expected = model(**inputs, merge_schedule=SCHEDULES[schedule], use_cache=True)
    transfers = request.getfixturevalue("buffered")
    found = model(**inputs, merge_schedule=SCHEDULES[schedule], use_cache=True)
    assert transfers and torch.equal(found.logits, expected.logits)
    for one, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_flash_attention_copies_equal_lengths_once(monkeypatch, buffered):
    packing = attention_elva._flash_kwargs([3, 4], [3, 4], torch.device("cpu"))
    assert buffered == [1] and packing["cu_seq_lens_q"] is packing["cu_seq_lens_k"]
    packing = attention_elva._flash_kwargs([3, 4], [5, 4], torch.device("cpu"))
    assert buffered == [1, 2]
    assert packing["cu_seq_lens_q"].tolist() == [0, 3, 7] and packing["cu_seq_lens_k"].tolist() == [0, 5, 9]


@torch.no_grad()
def test_tubes_are_sorted_once(monkeypatch):
    model, sorts = deep_model(), []
    link = tokens_elva.link_tubes
    monkeypatch.setattr(tokens_elva, "link_tubes", lambda ids: sorts.append(1) or link(ids))
    model(**movies(BUSY, dtype=torch.float32), merge_schedule=RATIOS)
    assert len(RATIOS) == 3 and sorts == [1]


@torch.no_grad()
def test_links_after_a_merge_are_those_of_a_new_sort(monkeypatch):
    """In the model, where they are used."""
    model, found = deep_model(), []
    relink = tokens_elva.relink_survivors
    monkeypatch.setattr(
        tokens_elva, "relink_survivors", lambda *args: found.append((relink(*args), args[-1])) or found[-1][0]
    )
    for schedule in ("ratios", "paper", "first", "window and max_run"):
        model(**movies(BUSY, dtype=torch.float32), merge_schedule=SCHEDULES[schedule])
    assert len(found) > 8
    for links, tubes in found:
        expected = tokens_elva.link_tubes(tubes)
        assert torch.equal(links.order, expected.order) and torch.equal(links.has_next, expected.has_next)


@torch.no_grad()
def test_the_first_keys_are_kept_as_they_come():
    """transformers' layer joins them to an empty tensor, which copies the cache of the whole prefill."""
    model = deep_model()
    with Copies() as merging:
        cache = model(**movies(BUSY, dtype=torch.float32), merge_schedule=MIXED, use_cache=True).past_key_values
    with Copies() as uncached:
        model(**movies(BUSY, dtype=torch.float32), merge_schedule=MIXED, use_cache=False)
    assert merging.called.count("cat") <= uncached.called.count("cat") + 4  # of masks, on the host
    expected = [layer.keys.clone() for layer in cache.layers]
    model(input_ids=torch.tensor(5 * [[9]]), past_key_values=cache)
    for layer, keys in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer.keys[:, :, :-1], keys)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["none", "paper"])
def test_only_what_the_head_reads_is_normalised_and_put_back(schedule, side):
    model, norms = deep_model(), []
    model.model.language_model.norm.register_forward_hook(lambda _, args, out: norms.append(out.shape[:-1].numel()))
    inputs = movies(BUSY, side, dtype=torch.float32)
    whole = model(**inputs, merge_schedule=SCHEDULES[schedule]).logits
    for keep in (1, 3, torch.tensor([0, 7, 60])):
        count = keep if isinstance(keep, int) else len(keep)
        kept = slice(-keep, None) if isinstance(keep, int) else keep
        norms.clear()
        logits = model(**inputs, merge_schedule=SCHEDULES[schedule], logits_to_keep=keep).logits
        assert norms == [len(BUSY) * count]
        torch.testing.assert_close(logits, whole[:, kept], rtol=0, atol=2e-6)
        states = model(
            **inputs, merge_schedule=SCHEDULES[schedule], logits_to_keep=keep, output_hidden_states=True
        ).hidden_states
        assert states[-1].shape[1] == whole.shape[1]


@torch.no_grad()
def test_positions_to_keep_are_of_every_way_through_the_model():
    model = double_model().model
    text = movies([words(7), words(4, 1)])
    whole = model(**text).last_hidden_state
    assert torch.equal(model(**text, positions_to_keep=2).last_hidden_state, whole[:, -2:])
    inputs = movies(BUSY)
    whole = model(**inputs, merge_schedule=MIXED).last_hidden_state
    some = model(**inputs, merge_schedule=MIXED, positions_to_keep=torch.tensor([3, 50])).last_hidden_state
    torch.testing.assert_close(some, whole[:, [3, 50]], rtol=0, atol=1e-12)
    cache = model(**inputs, merge_schedule=MIXED, use_cache=True).past_key_values
    step = {"input_ids": torch.tensor(5 * [[9, 10, 11]])}
    last = model(**step, past_key_values=copy.deepcopy(cache), positions_to_keep=1).last_hidden_state
    assert torch.equal(last, model(**step, past_key_values=cache).last_hidden_state[:, -1:])


@torch.no_grad()
def test_a_flash_step_looks_for_holes_once_and_not_in_every_layer(monkeypatch):
    """One answer of the device for all stages, and no search that has to wait for its own result."""
    flash_reference.install(monkeypatch)
    model = double_model()
    model.set_attn_implementation(flash_reference.NAME)
    inputs, waits = movies(BUSY), []
    cache = model(**inputs, merge_schedule=MIXED, use_cache=True).past_key_values
    host = decoder_elva.to_host
    monkeypatch.setattr(decoder_elva, "to_host", lambda tensor: waits.append(tuple(tensor.shape)) or host(tensor))
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, 1, dtype=torch.long)], 1)
    with Copies() as copies:
        model(
            input_ids=torch.tensor(5 * [[9]]),
            attention_mask=mask,
            position_ids=positions(mask)[:, -1:],
            past_key_values=cache,
        )
    stages = 1 + len(model.config.resolve_merge_schedule(MIXED).steps)
    assert waits == [(stages, 5)]
    assert copies.called.count("nonzero") == 0 and copies.called.count("nonzero_static") == stages < LAYERS


@pytest.mark.gpu
def test_a_gpu_copies_without_a_wait():
    """CUDA itself is the judge: a copy the host waits for raises."""
    given = some_tensors()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(given, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, tensor in zip(moved, given, strict=True):
        assert tensor is None or torch.equal(found.cpu(), tensor)


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_makes_the_words_of_the_cpu():
    model = double_model()
    inputs = without(movie(BUSY[0]), "position_ids")
    expected = model.generate(**inputs, **GREEDY, merge_schedule=MIXED)
    found = model.cuda().generate(
        **{name: value.cuda() for name, value in inputs.items()}, **GREEDY, merge_schedule=MIXED
    )
    assert torch.equal(found.cpu(), expected)
