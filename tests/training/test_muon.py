"""MuonWithAdamW: who trains what, and that it behaves as one optimiser."""

import copy

import pytest
import torch
from tiny_elva import tiny_model

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.muon import MuonWithAdamW


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
