"""The Triton kernels of the merge against the pure functions, and the rule that chooses between them.

On CUDA the kernels run as compiled (`gpu`). Elsewhere they run in Triton's interpreter, which has to be asked for
before triton is imported: `test_the_kernels_in_tritons_interpreter` runs this file again in a process that does. A
program takes the interpreter a millisecond, so the rows are short.
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from merging_cases import BUSY, MIXED, SCHEDULES, deep_model, gradients, movies

from elva_hf import fusion_elva, merging_elva
from elva_hf.merging_elva import link_tubes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
NEEDS_TRITON = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 64, 1300)
"""Below a block, a block, and more than the largest with a rest."""

DEVICE = pytest.param("cpu") if INTERPRETED else pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_TRITON])

where_kernels_run = pytest.mark.parametrize("device", [DEVICE])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@NEEDS_TRITON
def test_the_kernels_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__, "-k", "cpu"]
    ran = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout and "skipped" not in ran.stdout


@pytest.fixture
def fused(monkeypatch):
    """Kernels wherever the tensors are."""
    monkeypatch.setattr(fusion_elva, "fuses", lambda hidden: True)
    return fusion_elva


def row(lengths, width, dtype, device, alone=3, seed=0):
    """A row of tubes of these lengths, shuffled among tokens that never merge, and its links."""
    generator = torch.Generator().manual_seed(seed)
    tubes = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    tubes = torch.cat([tubes, -1 - torch.arange(alone)])
    tubes = tubes[torch.randperm(len(tubes), generator=generator)]
    hidden = torch.randn(len(tubes), width, generator=generator) + torch.randn(width, generator=generator)
    return hidden.to(device, dtype), link_tubes(tubes.to(device))


def merge_runs_of(links, merged, survivor="last"):
    """Survivors where the links in `merged` (in the order of the tubes) merge, and how many are left."""
    merge = merged & links.has_next
    return merging_elva.find_survivors(merge, links, survivor), len(merge) - int(merge.sum())


def assert_merged_alike(found, expected, dtype):
    """Means to a unit of the last place (the interpreter cuts bfloat16 off), everything else exactly."""
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2**-7}[dtype]
    assert found[0].dtype == expected[0].dtype == dtype
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=bound, atol=bound / 8)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_similarity_is_the_references(fused, device, dtype, width):
    hidden, links = row([1, 2, 4], width, dtype, device)
    expected = merging_elva.similarity_to_next(hidden, links)
    found = fused.similarity_to_next(hidden, links)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found == -torch.inf, ~links.has_next)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@where_kernels_run
def test_similarity_at_the_edges_is_the_references(fused, device):
    """Equal rows are at most 1, a row of zeros resembles nothing, NaN stays NaN, and gradients do not pass."""
    torch.manual_seed(0)
    twins = torch.randn(30, 37).repeat_interleave(2, 0).to(device)
    links = link_tubes(torch.arange(30, device=device).repeat_interleave(2))
    similarity = fused.similarity_to_next(twins.requires_grad_(), links)
    assert similarity[::2].max() == 1 and similarity[::2].min() > 0.99999 and not similarity.requires_grad
    odd = torch.tensor([[0.0, 0], [0, 0], [1, 0], [1, 0], [torch.nan, 0], [1, 1]], device=device)
    links = link_tubes(torch.zeros(6, dtype=torch.long, device=device))
    found, expected = fused.similarity_to_next(odd, links), merging_elva.similarity_to_next(odd, links)
    assert found[:3].tolist() == [0, 0, 1]
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().sum() == 2


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("survivor", ["last", "first"])
@pytest.mark.parametrize("width, share", [(1300, 1.0), (64, 0.5), (5, 0.0)])
def test_means_are_the_references(fused, device, dtype, survivor, width, share):
    """Runs of every length up to 5, sizes from earlier merges, all, some or no links merged."""
    for seed in range(2):
        hidden, links = row([1, 2, 3, 4, 5], width, dtype, device, alone=2, seed=seed)
        merge = (torch.rand(len(hidden), generator=torch.Generator().manual_seed(seed)) < share).to(device)
        survivors, kept = merge_runs_of(links, merge, survivor)
        sizes = torch.randint(1, 9, (len(hidden),)).float().to(device)
        expected = merging_elva.merge_tokens(hidden, sizes, survivors, kept)
        found = fused.merge_tokens(hidden, sizes, survivors, kept, links)
        assert_merged_alike(found, expected, dtype)
        alone = torch.bincount(survivors, minlength=len(hidden))[found[2]] == 1
        assert torch.equal(found[0][alone], hidden[found[2]][alone])
        if share == 1:
            assert kept == 5 + 2


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tokens_and_huge_ones_keep_their_exact_values(fused, device, dtype):
    hidden, links = row([6, 1], 70, dtype, device)
    order = links.order[-7:]
    hidden[order[:6]] = hidden[order[0]].clone()
    hidden[order[6]] = torch.finfo(dtype).max
    survivors, kept = merge_runs_of(links, links.has_next)
    merged, *_ = fused.merge_tokens(hidden, torch.full((10,), 3.0, device=device), survivors, kept, links)
    assert torch.equal(merged, hidden[survivors.unique()])


@where_kernels_run
def test_rows_that_are_not_contiguous(fused, device):
    wide, links = row([4, 3], 200, torch.float32, device)
    survivors, kept = merge_runs_of(links, links.has_next)
    sizes = torch.ones(len(wide), device=device)
    for hidden in (wide[:, 7:97], wide[:, ::2], wide.t().contiguous().t()):
        assert not hidden.is_contiguous()
        expected = merging_elva.similarity_to_next(hidden, links)
        torch.testing.assert_close(fused.similarity_to_next(hidden, links), expected, rtol=0, atol=1e-6)
        expected = merging_elva.merge_tokens(hidden, sizes, survivors, kept)
        assert_merged_alike(fused.merge_tokens(hidden, sizes, survivors, kept, links), expected, torch.float32)


@where_kernels_run
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_rows_without_tubes(fused, device, tokens):
    hidden, links = row([], 6, torch.float32, device, alone=tokens)
    similarity = fused.similarity_to_next(hidden, links)
    assert similarity.tolist() == tokens * [-torch.inf]
    survivors, kept = merge_runs_of(links, links.has_next)
    merged, sizes, index, places = fused.merge_tokens(hidden, torch.ones(tokens, device=device), survivors, kept, links)
    assert torch.equal(merged, hidden) and sizes.tolist() == tokens * [1]
    assert index.tolist() == places.tolist() == list(range(tokens))


@where_kernels_run
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_mean_is_the_references(fused, device, dtype):
    hidden, links = row([1, 2, 5, 3], 33, dtype, device)
    survivors, kept = merge_runs_of(links, links.has_next)
    sizes = torch.randint(1, 9, (len(hidden),)).float().to(device)
    weights = torch.randn(kept, 33, device=device)

    def gradient(merge, *more):
        leaf = hidden.clone().requires_grad_()
        merged = merge(leaf, sizes, survivors, kept, *more)
        assert merged[0].requires_grad and not any(part.requires_grad for part in merged[1:])
        (merged[0].float() * weights).sum().backward()
        return leaf.grad

    found, expected = gradient(fused.merge_tokens, links), gradient(merging_elva.merge_tokens)
    assert found.dtype == dtype
    bound = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


@where_kernels_run
@pytest.mark.parametrize("schedule", ["paper", "first"])
def test_a_model_merges_with_the_kernels_as_without(monkeypatch, device, schedule):
    """Logits and every gradient; no similarity of this batch is a threshold to within rounding."""
    model = deep_model().to(device)
    inputs = {name: value.to(device) for name, value in movies(BUSY[1:2], dtype=torch.float32).items()}

    def run():
        model.zero_grad()
        out = model(**inputs, merge_schedule=SCHEDULES[schedule], use_cache=True)
        out.logits.float().square().mean().backward()
        return out, gradients(model)

    with fusion_elva.reference_merging():
        expected, expected_gradients = run()
    monkeypatch.setattr(fusion_elva, "fuses", lambda hidden: True)
    found, found_gradients = run()
    assert torch.equal(found.past_key_values.tokens_per_layer, expected.past_key_values.tokens_per_layer)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for name, gradient in found_gradients.items():
        scale = max(float(expected_gradients[name].abs().max()), 1e-3)
        assert float((gradient - expected_gradients[name]).abs().max()) < 1e-3 * scale, name


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the gpu tests compile the kernels")
@NEEDS_TRITON
@pytest.mark.parametrize("pointer", ["*bf16", "*fp32"])
def test_the_kernels_compile_without_a_gpu(pointer):
    """To machine code, as for rows of a width that is a multiple of 16: rows are read 16 bytes at a time."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elva_hf import kernels_elva

    types = {"has_next": "*i1", "row_stride": "i32", "width": "i32", "BLOCK": "constexpr", "column_stride": "constexpr"}
    types |= dict.fromkeys(("hidden", "merged"), pointer)
    types |= dict.fromkeys(("similarity", "token_sizes", "sizes"), "*fp32")
    for kernel in (kernels_elva._similarity_kernel, kernels_elva._merge_kernel):
        signature = {name: types.get(name, "*i64") for name in kernel.arg_names}
        place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
        aligned = {place[name]: [["tt.divisibility", 16]] for name in signature if signature[name] != "constexpr"}
        constants = {place["BLOCK"]: kernels_elva.MAX_BLOCK, place["column_stride"]: 1}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = compile_kernel(source, target=GPUTarget("cuda", 80, 32))
        assert compiled.asm["cubin"] and "ld.global.v4.b32" in compiled.asm["ptx"]


# the rule


def tensor_like(is_cuda=True, dtype=torch.bfloat16):
    return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, get_device=lambda: 0)


def test_kernels_run_on_cuda_in_the_three_dtypes_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(fusion_elva, "_has_triton", lambda: True)
    monkeypatch.setattr(fusion_elva, "_compiles_for", lambda device: True)
    assert all(fusion_elva.fuses(tensor_like(dtype=dtype)) for dtype in DTYPES)
    assert not fusion_elva.fuses(tensor_like(is_cuda=False))
    assert not fusion_elva.fuses(tensor_like(dtype=torch.float64))
    with fusion_elva.reference_merging():
        assert not fusion_elva.fuses(tensor_like())
    assert fusion_elva.fuses(tensor_like())
    monkeypatch.setattr(fusion_elva, "_compiles_for", lambda device: False)
    assert not fusion_elva.fuses(tensor_like())
    monkeypatch.setattr(fusion_elva, "_has_triton", lambda: False)
    monkeypatch.setattr(fusion_elva, "_compiles_for", lambda device: pytest.fail("asked without need"))
    assert not fusion_elva.fuses(tensor_like())


def test_a_kernel_that_fails_is_heard(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("out of shared memory")

    monkeypatch.setattr(fusion_elva, "fuses", lambda hidden: True)
    monkeypatch.setitem(sys.modules, "elva_hf.kernels_elva", Broken())
    monkeypatch.setattr("elva_hf.kernels_elva", Broken(), raising=False)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        deep_model()(**movies(BUSY[:1], dtype=torch.float32), merge_schedule=MIXED)


def test_a_merge_without_cuda_never_imports_the_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "elva_hf.kernels_elva", None)  # whoever imports it gets an ImportError
    monkeypatch.delattr("elva_hf.kernels_elva", raising=False)
    links = link_tubes(torch.zeros(3, dtype=torch.long))
    assert fusion_elva.similarity_to_next(torch.ones(3, 2), links)[:2].tolist() == [1, 1]
    merged = fusion_elva.merge_tokens(torch.ones(3, 2), torch.ones(3), torch.tensor([2, 2, 2]), 1, links)
    assert merged[1].tolist() == [3]
    monkeypatch.setattr(fusion_elva, "fuses", lambda hidden: True)
    with pytest.raises(ImportError):
        fusion_elva.similarity_to_next(torch.ones(3, 2), links)


@pytest.mark.gpu
@NEEDS_TRITON
@torch.no_grad()
def test_a_merge_on_cuda_uses_the_kernels(monkeypatch):
    from elva_hf import kernels_elva

    calls = []
    for name in ("similarity_to_next", "merge_runs"):
        call = getattr(kernels_elva, name)
        monkeypatch.setattr(kernels_elva, name, lambda *args, c=call, n=name: calls.append(n) or c(*args))
    model = deep_model().cuda()
    inputs = {name: value.cuda() for name, value in movies(BUSY, dtype=torch.float32).items()}
    model(**inputs, merge_schedule=SCHEDULES["ratios"])
    assert calls == 3 * ["similarity_to_next", "merge_runs"]
    with fusion_elva.reference_merging():
        model(**inputs, merge_schedule=SCHEDULES["ratios"])
    assert len(calls) == 6
