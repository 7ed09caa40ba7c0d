"""ElvaTrainer: HF `Trainer` whose losses do not depend on how a batch is split (section 3.2)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.checkpoints import SafeCheckpoints
from elva_hf.training.components import world_size
from elva_hf.training.grad_cache import contrast_gradients, random_state, set_random_state
from elva_hf.training.guidance import BATCH_KEYS, GuidanceCallback, GuidanceHook, find_student
from elva_hf.training.teacher import VisualTeacher


class ElvaTrainer(SafeCheckpoints, Trainer):
    """HF `Trainer` for ELVA: the losses of `config.guidance` over whole optimiser steps, and their logs.

    L_Gen is a mean over the labels of a step, L_MSE over its videos, on all processes and in all micro-batches.
    L_Con compares the frames of one micro-batch on all processes and is averaged over micro-batches; with `grad_cache`
    it compares the frames of the whole step, at the price of a second forward without gradient.

    Args:
        *args: Of `Trainer`.
        teacher: Gives the features that batches do not bring; never saved, nor part of the model.
        grad_cache: Whether L_Con does not depend on how a step is split (GradCache).
        train_sampler: Order of the samples, instead of what `args` say.
        learning_rates: Other learning rates of parameters whose names begin so, the longest beginning first.
        **kwargs: Of `Trainer`. `processing_class` gives the pixels' mean and deviation for the teacher.

    Raises:
        ConfigurationError: `grad_cache` without L_Con, or a second `GuidanceCallback`.

    Attributes:
        last_sample_ids: Ids of the samples of the current optimiser step on this process, where batches bring them.
        last_grad_norm: Norm of the gradient of the last step, before it was clipped.
    """

    def __init__(
        self,
        *args: Any,
        teacher: VisualTeacher | None = None,
        grad_cache: bool = False,
        train_sampler: Sampler | None = None,
        learning_rates: dict[str, float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.learning_rates = dict(sorted((learning_rates or {}).items(), key=lambda item: -len(item[0])))
        self.grad_cache = grad_cache
        self.train_sampler = train_sampler
        self.last_sample_ids: list[int] = []
        self.last_grad_norm: Tensor | float | None = None
        self._batches: list[dict[str, Any]] = []
        self._random_states: list[list[Tensor]] = []
        guidance = self._guidance
        if grad_cache and (guidance is None or not guidance["frame_weight"]):
            raise ConfigurationError(
                f"grad_cache=True, but config.guidance={guidance} has no L_Con (frame_weight) to cache gradients of."
            )
        if any(isinstance(callback, GuidanceCallback) for callback in self.callback_handler.callbacks):
            raise ConfigurationError("ElvaTrainer brings a GuidanceCallback of its own; leave yours out.")
        processor = getattr(self.processing_class, "video_processor", None)
        pixels = {name: getattr(processor, name, 0.5) for name in ("image_mean", "image_std")}
        self.guidance_hook = GuidanceHook(teacher, **pixels)
        self.add_callback(GuidanceCallback(self.guidance_hook))

    @property
    def _guidance(self) -> dict[str, Any] | None:
        return find_student(self.model)[0].config.guidance

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As `Trainer`'s; its groups are split where parts have learning rates of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.learning_rates:
            names = {id(p): name for name, p in (self.model if model is None else model).named_parameters()}
            split_groups(optimizer, lambda parameter: self._rate_of(names.get(id(parameter), "")))
        return optimizer

    def _rate_of(self, name: str) -> float | None:
        """Learning rate of a parameter, if it has its own; DDP and PEFT write something before its name."""
        return next((rate for start, rate in self.learning_rates.items() if f".{start}" in f".{name}"), None)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """As `Trainer`'s; counts the videos of the whole step and keeps its sample ids."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        ids = [batch.pop("sample_ids") for batch in batches if "sample_ids" in batch]
        self.last_sample_ids = [number for part in ids for number in torch.as_tensor(part).tolist()]
        self.guidance_hook.accumulation_steps = max(len(batches), 1)
        self._batches, self._random_states = [], []
        if batches and self._guidance is not None:
            num_videos = self._count_videos(batches, device)
            for batch in batches:
                batch["num_videos_in_batch"] = num_videos
            self._batches = batches if self.grad_cache else []
        return batches, num_items_in_batch

    def _count_videos(self, batches: list[dict[str, Any]], device: torch.device) -> Tensor:
        start = find_student(self.model)[0].config.video_start_token_id
        count = sum((batch["input_ids"] == start).sum() for batch in batches).to(device)
        return self.accelerator.gather(count).sum() if world_size() > 1 else count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As `Trainer`'s; under GradCache the first of a step runs all its micro-batches without gradient before."""
        if self._batches:
            model.train()
            self._cache_frame_gradients()
        if self._random_states:  # the same dropout as then
            set_random_state(self._random_states.pop(0))
        return super().training_step(model, inputs, num_items_in_batch)

    def _cache_frame_gradients(self) -> None:
        batches, self._batches = self._batches, []
        features = []
        for batch in batches:
            self._random_states.append(random_state())
            inputs = self._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
            features.append(self.guidance_hook.collect(partial(self.model, **inputs, logits_to_keep=1)))
        gradients = contrast_gradients(features, self._guidance["mask_same_video"])
        for batch, gradient, feature in zip(batches, gradients, features, strict=True):
            batch.update(gradient)
            if feature.targets is not None:  # the teacher need not look again
                batch["teacher_tubes"], batch["teacher_frames"] = feature.targets.tubes, feature.targets.frames

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`'s; in evaluation, what is for training alone is left out of the batch."""
        if not model.training:
            inputs = {name: value for name, value in inputs.items() if name not in BATCH_KEYS}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer`'s, with `loss_gen`, `loss_mse`, `loss_con` and `logit_scale` beside `loss`."""
        if "loss" in logs:
            logs.update(self.guidance_hook.log_components(logs))
        super().log(logs, *args, **kwargs)

    def add_callback(self, callback: Any) -> None:
        """As `Trainer`'s; a callback with `set_trainer` is given this trainer."""
        super().add_callback(callback)
        self._introduce()

    def _introduce(self) -> None:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "set_trainer"):
                callback.set_trainer(self)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._introduce()  # to new instances

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Tensor | float | None:
        self.last_grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.last_grad_norm

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        sums = json.dumps(self.guidance_hook.state_dict())
        Path(output_dir, self._sums_name).write_text(sums, encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, self._sums_name)).is_file():
            self.guidance_hook.load_state_dict(json.loads(path.read_text(encoding="utf-8")))

    @property
    def _sums_name(self) -> str:
        return f"guidance_sums_{self.args.process_index}.json"

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        return super()._get_train_sampler(*args, **kwargs) if self.train_sampler is None else self.train_sampler


def split_groups(optimizer: torch.optim.Optimizer, rate_of: Callable[[Tensor], float | None]) -> None:
    """Give some parameters of a fresh optimiser learning rates of their own, in groups that are else the same.

    Args:
        optimizer: Before its first step and its scheduler.
        rate_of: A parameter's own learning rate; None for that of its group.
    """
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            rate = rate_of(parameter)
            by_rate.setdefault(group["lr"] if rate is None else rate, []).append(parameter)
        groups += [{**group, "params": params, "lr": rate} for rate, params in by_rate.items()]
    optimizer.param_groups = groups
