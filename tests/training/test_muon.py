"""MuonWithAdamW: who trains what, and that it behaves as one optimiser."""

import copy

import pytest
import torch
from tiny_elva import tiny_model

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training import precision
from elva_hf.training.muon import MuonWithAdamW, _Muon, orthogonalize


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    return [weight.detach().clone() for weight in model.parameters()]


def test_matrices_of_layers_go_to_muon_and_all_else_to_adamw():
    model = tiny_model()
    optimizer = MuonWithAdamW(model, 1e-3, 1e-2, weight_decay=0.1)
    names = {id(weight): name for name, weight in model.named_parameters()}
    muon, adam = ([names[id(w)] for group in part.param_groups for w in group["params"]] for part in optimizer.parts)
    assert muon and all(".layers." in name and name.endswith("_proj.weight") for name in muon)
    assert not any(name.endswith("_proj.weight") and ".layers." in name for name in adam)
    assert sorted(muon + adam) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_muon_step_moves_a_matrix_the_same_way_in_every_direction():
    model = tiny_model()
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    step(model, MuonWithAdamW(model, 1e-3, 1e-2), 0)
    values = torch.linalg.svdvals((weight - before).float()) / 1e-2
    assert values.min() > 0.6 and values.max() < 1.3  # Newton-Schulz is not exact


def test_a_scheduler_sets_the_rates_of_both():
    model = tiny_model()
    optimizer = MuonWithAdamW(model, 1e-3, 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5)
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [5e-3, 5e-4]
    before = [weight.detach().clone() for weight in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    after = step(model, optimizer, 0)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert scheduler.get_last_lr() == [5e-3, 5e-4]


def test_a_state_that_is_loaded_goes_on_as_the_one_that_was_saved():
    one, other = tiny_model(), tiny_model()
    other.load_state_dict(one.state_dict())
    first, second = (MuonWithAdamW(model, 1e-3, 1e-2) for model in (one, other))
    step(one, first, 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(step(one, first, 1), step(other, second, 1), strict=True))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigurationError, match="no layer"):
        MuonWithAdamW(torch.nn.Linear(2, 2), 1e-3, 1e-2)


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_an_update_is_that_of_torch(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    weight = torch.nn.Parameter(torch.zeros(shape))
    theirs = torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    weight.grad = matrix
    theirs.step()
    [group] = theirs.param_groups
    ours = orthogonalize(matrix.bfloat16(), group["ns_coefficients"], group["ns_steps"], group["eps"])
    expected = -weight.detach() / max(1.0, shape[0] / shape[1]) ** 0.5
    torch.testing.assert_close(ours.float(), expected, rtol=0.0, atol=0.01)
    exact = orthogonalize(matrix.double(), group["ns_coefficients"], group["ns_steps"], group["eps"])
    assert (ours - exact).abs().max() < 0.05
    values = torch.linalg.svdvals(exact)
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_muon_is_torchs_whether_or_not_the_cpu_multiplies_bfloat16(monkeypatch, has_bfloat16):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: has_bfloat16)
    torch.manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 8)) for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.5, "adjust_lr_fn": "original"}
    pair = _Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(3):
        ours.grad = torch.randn(24, 8)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0 if has_bfloat16 else 0.01)
    assert torch.equal(ours, theirs) == has_bfloat16
    states = [optimizer.state_dict()["state"][0] for optimizer in pair]
    assert (
        torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"]) and states[0].keys() == states[1].keys()
    )
