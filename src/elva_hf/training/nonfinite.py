"""Skip optimizer steps whose gradients are not finite, say which samples they came from, and stop when they do not end.

transformers hides such steps: `logging_nan_inf_filter=True` replaces the loss in the log, and the step is taken.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from elva_hf.errors_elva import ConfigurationError, TrainingError

logger = logging.getLogger(__name__)

RECORD_NAME = "nonfinite_steps.jsonl"
"""File in the run folder with one line per skipped step."""

ZERO, FINITE, NONFINITE = range(3)
MAX_LOSSES = 4096
IDS_SHOWN = 8


def gradient_state(gradients: Iterable[Tensor]) -> Tensor:
    """0-dim integer: `ZERO` if all entries are 0, `NONFINITE` if any is inf or NaN, else `FINITE`; no sync."""
    local = [_local(gradient) for gradient in gradients]
    local = [gradient for gradient in local if gradient.numel()]
    if not local:
        return torch.tensor(ZERO)
    largest = get_total_norm(local, norm_type=math.inf)  # a 2-norm would overflow on large finite gradients
    return torch.where(largest.isfinite(), (largest > 0).long() * FINITE, NONFINITE)


class NonFiniteGuard(TrainerCallback, ExportableState):
    """Skip every optimizer step whose accumulated gradients hold inf or NaN, on all ranks together.

    The parameters and the optimizer's state stay as they are, to the bit; the schedule moves on with `global_step`. A
    step whose gradients clipping made all zero, because their norm overflowed, is skipped too. Each skipped step is a
    line in `nonfinite_steps.jsonl`: step, reason, and per rank the sample ids and the loss of each micro-batch. Counts
    are logged as `skipped_steps` and survive a resume. Costs one pass over the gradients and one sync per step.

    Works in a plain `Trainer` through `add_callback`; with `set_trainer` it also knows the sample ids
    (`trainer.last_sample_ids`), the norm before clipping (`trainer.last_grad_norm`), and lets the logged loss recover
    after a NaN. Set `logging_nan_inf_filter=False`, or the log hides what happened. DeepSpeed steps inside backward:
    there its own overflow check skips (the schedule waits, too), and this counts, records and stops.

    Args:
        max_consecutive: Skipped steps in a row after which training stops with `TrainingError`.
    """

    def __init__(self, max_consecutive: int = 10):
        if isinstance(max_consecutive, bool) or not isinstance(max_consecutive, int) or max_consecutive < 1:
            raise ConfigurationError(f"max_consecutive is {max_consecutive!r}, expected an integer of at least 1")
        self.max_consecutive = max_consecutive
        self.skipped_steps = 0
        self.consecutive = 0
        self._trainer: Trainer | None = None
        self._losses: deque[Tensor] = deque(maxlen=MAX_LOSSES)
        self._hook: Any = None

    def set_trainer(self, trainer: Trainer) -> None:
        """Give the guard the trainer, of which callbacks are not told."""
        self._trainer = trainer

    def state(self) -> dict[str, Any]:
        return {
            "args": {"max_consecutive": self.max_consecutive},
            "attributes": {"skipped_steps": self.skipped_steps, "consecutive": self.consecutive},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        kept = kept[0] if isinstance(kept, list) and kept else kept
        counts = kept["attributes"] if kept else {}
        self.skipped_steps, self.consecutive = counts.get("skipped_steps", 0), counts.get("consecutive", 0)
        if args.logging_nan_inf_filter:
            logger.warning("logging_nan_inf_filter=True replaces NaN losses in the log; set it to False to see them")
        optimizer = kwargs.get("optimizer")
        if _steps_in_backward(optimizer) and not hasattr(optimizer.optimizer, "overflow"):
            raise ConfigurationError(
                f"DeepSpeed's {type(optimizer.optimizer).__name__} does not check for overflow, so NonFiniteGuard "
                "cannot skip its steps: use ZeRO with bf16 or fp16, or leave the guard out"
            )
        self._unhook()
        self._hook = kwargs["model"].register_forward_hook(self._keep_loss)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._unhook()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._losses.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        reason = self._reason_to_skip(args, model, optimizer)
        if reason is None:
            self.consecutive = 0
            return
        for parameter in _parameters(model, optimizer):
            parameter.grad = None  # optimizers leave such parameters and their state alone
        self.skipped_steps += 1
        self.consecutive += 1
        self._report(args, state.global_step + 1, reason)

    def _report(self, args: TrainingArguments, step: int, reason: str) -> None:
        losses = [_as_json(loss.item()) for loss in self._losses]
        ranks = _from_all_ranks({"sample_ids": getattr(self._trainer, "last_sample_ids", None), "losses": losses})
        shown, path = _shown([rank["sample_ids"] for rank in ranks]), Path(args.output_dir) / RECORD_NAME
        if args.process_index == 0:
            counts = {"skipped_steps": self.skipped_steps, "consecutive": self.consecutive}
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                line = {"step": step, "reason": reason, **counts, "ranks": ranks}
                file.write(json.dumps(line, allow_nan=False, default=str) + "\n")
            logger.warning("step %d is skipped: %s; %s", step, reason, shown)
        if self.consecutive >= self.max_consecutive:
            self._unhook()
            raise TrainingError(
                f"{self.consecutive} optimizer steps in a row were skipped, the last is step {step}: {reason}; {shown};"
                f" all are listed in {path}; leave out bad samples or lower learning_rate, then resume from the last "
                "checkpoint"
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        logs["skipped_steps"] = state.log_history[-1]["skipped_steps"] = self.skipped_steps
        if self._trainer is not None:
            self._trainer._tr_loss.zero_()  # transformers resets it by subtraction, and NaN - NaN is NaN

    def _reason_to_skip(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> str | None:
        if _steps_in_backward(optimizer):
            return "DeepSpeed found inf or NaN in the gradients" if optimizer.step_was_skipped else None
        gradients = (parameter.grad for parameter in _parameters(model, optimizer) if parameter.grad is not None)
        found = gradient_state(gradients).to(args.device)
        if _is_distributed():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        found = int(found)  # the step's one sync
        if found == NONFINITE:
            return "the gradients hold inf or NaN"
        if found == ZERO and args.max_grad_norm > 0 and not self._norm_is_finite():
            return "clipping left gradients of 0: their norm overflowed, or the loss has none"
        return None

    def _norm_is_finite(self) -> bool:
        norm = getattr(self._trainer, "last_grad_norm", None)
        return norm is not None and math.isfinite(float(norm))

    def _keep_loss(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if module.training:
            loss = outputs.get("loss") if hasattr(outputs, "get") else None
            if isinstance(loss, Tensor):
                self._losses.append(loss.detach().clone())  # the Trainer scales it in place

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


def _parameters(model: nn.Module, optimizer: Any) -> list[nn.Parameter]:
    groups = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return list({id(parameter): parameter for parameter in (*model.parameters(), *groups)}.values())


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient  # FSDP2 shards


def _steps_in_backward(optimizer: Any) -> bool:
    return type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _from_all_ranks(value: Any) -> list[Any]:
    if not _is_distributed():
        return [value]
    values = distributed.get_world_size() * [None]
    distributed.all_gather_object(values, value)
    return values


def _as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _shown(sample_ids: list[list[Any] | None]) -> str:
    known = [sample for samples in sample_ids for sample in samples or ()]
    if not known:
        return "the sample ids are not known"
    more = f" and {len(known) - IDS_SHOWN} more" if len(known) > IDS_SHOWN else ""
    return f"sample ids {', '.join(map(str, known[:IDS_SHOWN]))}{more}"
