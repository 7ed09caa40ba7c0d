"""Steps without finite gradients are skipped to the bit, recorded, and stop a run that has nothing else."""

import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from elva_hf.errors_elva import ConfigurationError, TrainingError
from elva_hf.training.nonfinite import FINITE, NONFINITE, RECORD_NAME, ZERO, NonFiniteGuard, gradient_state

sys.path.insert(0, str(Path(__file__).parent))
from killed_runs import T, digest, trainer

SHORT = {"max_steps": 6, "save_strategy": "no"}


class Spoiled(Trainer):
    """Multiplies the loss of chosen micro-batches, counted from 0, and keeps what `ElvaTrainer` keeps."""

    factors = {}
    known = True

    def get_batch_samples(self, *args):
        batches = super().get_batch_samples(*args)
        if self.known:
            start = self.state.global_step * 4
            self.last_sample_ids = list(range(start, start + 4))
        return batches

    def compute_loss(self, *args, **kwargs):
        self.seen = getattr(self, "seen", self.state.global_step * self.args.gradient_accumulation_steps - 1) + 1
        return super().compute_loss(*args, **kwargs) * self.factors.get(self.seen, 1.0)

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.known:
            self.last_grad_norm = norm
        return norm


class Plain(Spoiled):
    known = False


class States(TrainerCallback):
    """Digests of the parameters and of the optimizer's state after each step."""

    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.found.append((digest(model.state_dict()), digest(optimizer.state_dict()["state"])))


def guarded(folder, factors, kind=Spoiled, *, max_consecutive=10, connect=True, **options):
    guard, states = NonFiniteGuard(max_consecutive), States()
    made = trainer(folder, kind, callbacks=[guard, states], **{**SHORT, **options})
    made.factors = factors
    if connect:
        guard.set_trainer(made)
    return made, guard, states.found


def records(folder):
    path = Path(folder) / RECORD_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("gradients", "state"),
    [
        ([[1.0, -2.0], [0.0]], FINITE),
        ([[0.0, -0.0], [0.0]], ZERO),
        ([[1.0, math.nan], [0.0]], NONFINITE),
        ([[1.0], [math.inf]], NONFINITE),
        ([[1.0], [-math.inf]], NONFINITE),
        ([[3e38, 3e38], [3e38]], FINITE),
        ([[1e-45], [0.0]], FINITE),
        ([[], [2.0]], FINITE),
        ([[]], ZERO),
        ([], ZERO),
    ],
)
def test_the_state_of_gradients_does_not_overflow(gradients, state):
    assert int(gradient_state([torch.tensor(values) for values in gradients])) == state


@pytest.mark.parametrize(
    ("factor", "clip", "optimizer"),
    [
        (math.nan, 1.0, "adamw_torch"),
        (math.inf, 1.0, "adamw_torch"),
        (-math.inf, 0.0, "adamw_torch"),
        (math.nan, 0.0, "adamw_torch_fused"),
        (1e38, 1.0, "adamw_torch_fused"),  # finite; its norm is not, and clipping makes zeros of it
        (math.inf, 1.0, "adafactor"),
        (math.nan, 1.0, "sgd"),
    ],
)
def test_a_spoiled_step_changes_nothing(tmp_path, factor, clip, optimizer):
    """The second micro-batch of steps 3 and 4 is spoiled."""
    options = {"max_grad_norm": clip, "optim": optimizer, "weight_decay": 0.1}
    made, guard, states = guarded(tmp_path, {5: factor, 7: factor}, **options)
    made.train()
    assert states[1] == states[2] == states[3]
    assert len(set(states)) == 4
    assert guard.skipped_steps == 2
    assert guard.consecutive == 0
    assert [record["step"] for record in records(tmp_path)] == [3, 4]
    assert made.state.global_step == 6
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def test_without_the_guard_one_spoiled_step_ruins_the_model(tmp_path):
    made = trainer(tmp_path, Spoiled, **SHORT)
    made.factors = {5: math.nan}
    made.train()
    assert not any(parameter.isfinite().all() for parameter in made.model.parameters() if parameter.requires_grad)


def test_a_guard_with_nothing_to_do_changes_nothing(tmp_path):
    made, guard, states = guarded(tmp_path / "with", {})
    made.train()
    without = States()
    trainer(tmp_path / "without", Spoiled, callbacks=[without], **SHORT).train()
    assert states == without.found
    assert guard.skipped_steps == 0
    assert not (tmp_path / "with" / RECORD_NAME).exists()


def test_the_record_names_step_reason_samples_and_losses(tmp_path, caplog):
    made, _, _ = guarded(tmp_path, {2: math.nan, 7: 1e38})
    with caplog.at_level(logging.WARNING):
        made.train()
    first, second = records(tmp_path)
    assert first | {"ranks": None} == {
        "step": 2,
        "reason": "the gradients hold inf or NaN",
        "skipped_steps": 1,
        "consecutive": 1,
        "ranks": None,
    }
    (rank,) = first["ranks"]
    assert rank["sample_ids"] == [4, 5, 6, 7]
    assert len(rank["losses"]) == 2
    assert all(isinstance(loss, float) for loss in rank["losses"])  # of the model; the factor came after
    assert second["step"] == 4
    assert second["skipped_steps"] == 2
    assert "step 2 is skipped: the gradients hold inf or NaN; sample ids 4, 5, 6, 7" in caplog.text


def test_a_nan_of_the_model_itself_is_recorded_as_a_string(tmp_path):
    made, _, _ = guarded(tmp_path, {})

    def spoil(module, inputs, outputs):
        if made.state.global_step == 1:
            outputs.last_hidden_state = outputs.last_hidden_state * math.nan

    handle = made.model.model.register_forward_hook(spoil)
    made.train()
    handle.remove()
    (record,) = records(tmp_path)
    assert record["ranks"][0]["losses"] == ["nan", "nan"]


def test_a_plain_trainer_is_guarded_too_but_knows_no_samples(tmp_path):
    made, guard, states = guarded(tmp_path, {2: math.nan, 6: 1e38}, Plain, connect=False)
    made.train()
    assert guard.skipped_steps == 2
    assert states[0] == states[1]
    assert states[2] == states[3]
    assert [record["ranks"][0]["sample_ids"] for record in records(tmp_path)] == [None, None]
    assert records(tmp_path)[1]["reason"].startswith("clipping left gradients of 0")


def test_true_zeros_are_a_step_like_any_other_where_the_norm_is_known(tmp_path):
    zeros = dict.fromkeys((4, 5), 0.0)
    made, guard, states = guarded(tmp_path / "known", zeros)
    made.train()
    assert guard.skipped_steps == 0
    assert states[1] != states[2]  # the moments moved on
    _, guard, _ = unknown = guarded(tmp_path / "unknown", zeros, Plain)
    unknown[0].train()
    assert guard.skipped_steps == 1


@pytest.mark.parametrize("known", [True, False])
def test_it_stops_after_so_many_in_a_row_and_names_the_samples_and_the_file(tmp_path, known):
    factors = {2: math.nan} | dict.fromkeys(range(6, 20), math.inf)
    made, guard, states = guarded(tmp_path, factors, Spoiled if known else Plain, max_consecutive=3)
    with pytest.raises(TrainingError) as caught:
        made.train()
    message = str(caught.value)
    assert "3 optimizer steps in a row were skipped, the last is step 6: the gradients hold inf or NaN" in message
    assert ("sample ids 20, 21, 22, 23" if known else "the sample ids are not known") in message
    assert str(tmp_path / RECORD_NAME) in message
    assert "\n" not in message
    assert [record["consecutive"] for record in records(tmp_path)] == [1, 1, 2, 3]
    assert guard.skipped_steps == 4
    assert states[2] == states[-1]
    assert not made.model._forward_hooks


def test_skipped_steps_are_logged_and_the_loss_is_not_replaced(tmp_path):
    made, _, _ = guarded(tmp_path, {2: math.nan, 6: math.inf})
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in log] == [0, 1, 1, 2, 2, 2]
    assert [math.isfinite(entry["loss"]) for entry in log] == [True, False, True, False, True, True]
    assert math.isnan(log[1]["loss"]) and math.isinf(log[3]["loss"])


def test_the_filter_that_replaces_losses_is_warned_of(tmp_path, caplog):
    made, _, _ = guarded(tmp_path, {2: math.nan}, logging_nan_inf_filter=True)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert "logging_nan_inf_filter=True replaces NaN losses" in caplog.text
    assert all(
        math.isfinite(entry["loss"]) for entry in made.state.log_history if "loss" in entry
    )  # as transformers does


@pytest.mark.parametrize("restore", [False, True])
def test_counts_survive_a_resume_and_start_anew_with_a_run(tmp_path, restore):
    class Saved(T, Spoiled):
        pass

    options = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": restore}
    factors = {4: math.nan, 6: math.nan, 8: math.nan}
    made, _, _ = guarded(tmp_path, factors, Saved, **options, max_consecutive=3)
    made.factors = dict(list(factors.items())[:2])

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    made.add_callback(Stop())
    made.train()
    resumed, _, _ = guarded(tmp_path, factors, Saved, **options, max_consecutive=3)
    with pytest.raises(TrainingError, match="3 optimizer steps in a row were skipped, the last is step 5"):
        resumed.train(resume_from_checkpoint=True)
    assert [record["skipped_steps"] for record in records(tmp_path)] == [1, 2, 3]
    made.factors = {}
    made.pop_callback(Stop)
    made.train()
    assert made.state.log_history[-2]["skipped_steps"] == 0


def test_a_guard_refuses_a_count_that_is_none():
    for count in (0, -1, 2.5, True, None):
        with pytest.raises(ConfigurationError, match="max_consecutive"):
            NonFiniteGuard(count)
