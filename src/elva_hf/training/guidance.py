"""The losses of a vision teacher (section 3.2), attached to a model by hooks: one place for every trainer.

The hooks work inside the forward of DDP, FSDP and PEFT, so they need no trainer of ours: `GuidanceCallback` installs
them under `transformers.Trainer` and TRL's `SFTTrainer`, `GuidanceHook.attach` in a loop of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import VisualGeometry
from elva_hf.guidance_elva import check_frame_features
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.training.components import ComponentMeans, world_size
from elva_hf.training.distillation import distillation_loss
from elva_hf.training.grad_cache import FrameFeatures
from elva_hf.training.hooks import CarryGradient, HookHandle
from elva_hf.training.losses import (
    LossComponents,
    VisualTargets,
    frame_clips,
    frame_contrastive_loss,
    tube_alignment_loss,
)
from elva_hf.training.teacher import VisualTeacher, teacher_targets

logger = logging.get_logger(__name__)

BATCH_KEYS = (
    "teacher_tubes",
    "teacher_frames",
    "teacher_patches",
    "num_videos_in_batch",
    "frame_gradients",
    "logit_scale_gradient",
    "frame_loss",
    "sample_ids",
)
"""Keys of a batch that the model's forward never sees."""

WEIGHT_OF = {"loss_mse": "tube_weight", "loss_con": "frame_weight", "loss_distill": "patch_weight"}
"""Field of `config.guidance` that weighs each term."""


@dataclass
class _Call:
    """One forward of the guided model."""

    keys: dict[str, Any] = field(default_factory=dict)
    is_open: bool = False  # whether the forward of the whole model is running
    is_scaled: bool = False  # whether the model's loss is already divided by the labels of the whole step
    is_bypassed: bool = False  # whether the trainer makes its own loss of what the model returns
    terms: LossComponents | None = None
    logit_scale: Tensor | None = None


class GuidanceHook:
    """Adds L_MSE (Eq. 2), L_Con (Eq. 3) and Video-Panda's distillation to a model's loss in training mode (Eq. 4).

    What to learn is in the model's `config.guidance`. The student's features are the last hidden states of the patch
    and `<FRAME>` tokens, through the task heads. Where tokens merge, hidden states come back at the input's length, so
    the feature of a merged patch is that of the patch that survived for it.

    The teacher's features come with the batch (`teacher_tubes` `(C, h, w, W)`, `teacher_frames` `(F, W)`,
    `teacher_patches` `(P, W)`, taken out before the model sees it) or from `teacher`, which sees the student's own
    pixels.

    Args:
        teacher: Run on the fly for batches without features.
        image_mean: Of the student's video processor, to give the teacher its pixels; a number or one per channel.
        image_std: The same.
        accumulation_steps: Micro-batches of an optimiser step. Both losses are averaged over them; with
            `num_videos_in_batch` (videos of the whole step, on all processes) in the batch, L_MSE is a mean over those.
        tokens_over_ranks: Whether the trainer multiplies a loss that is divided by `num_items_in_batch` by the number
            of processes, as `average_tokens_across_devices=True` (the default) does. A loss that is not divided so is
            taken to be divided by `accumulation_steps` before backward, as trainers do.
    """

    def __init__(
        self,
        teacher: VisualTeacher | None = None,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        accumulation_steps: int = 1,
        tokens_over_ranks: bool = True,
    ):
        self.teacher = teacher
        self.image_mean, self.image_std = image_mean, image_std
        self.accumulation_steps = accumulation_steps
        self.tokens_over_ranks = tokens_over_ranks
        self.uses_loss_scaling = False
        self.loss_is_bypassed = False
        self._student: ElvaForCausalLM | None = None
        self._handle: HookHandle | None = None
        self._call = _Call()
        self._collected: list[FrameFeatures] | None = None
        self._means = ComponentMeans()

    def attach(self, model: nn.Module) -> HookHandle:
        """Install the hooks; those of an earlier call are removed.

        Args:
            model: An `ElvaForCausalLM`, or what wraps one: PEFT, DDP, FSDP.

        Raises:
            ConfigurationError: There is no such model inside, or the teacher's width is not that of its heads.
        """
        if self._handle is not None:
            self._handle.remove()
        self._student, outer = find_student(model)
        guidance = self._student.config.guidance
        if guidance is not None:
            self._check_attached(guidance)
        handles = (
            outer.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            self._student.model.register_forward_hook(self._inside, with_kwargs=True),
            outer.register_forward_hook(self._after, prepend=True),  # before FSDP2 sees where backward begins
        )
        self._means = ComponentMeans()
        self._handle = HookHandle([*(handle.remove for handle in handles), self._forget])
        return self._handle

    @property
    def components(self) -> dict[str, Tensor]:
        """Of this process: means of the terms in use over optimiser steps, and the latest tau."""
        return self._means.means

    def take_components(self) -> dict[str, float]:
        """Mean of `components` over all processes, each of which must call this; starts new means."""
        return self._means.take()

    def state_dict(self) -> dict[str, Any]:
        """What `components` are made of, as plain numbers, to go on in the middle of a logging window."""
        return self._means.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._means.load_state_dict(state)

    def log_components(self, logs: Mapping[str, float]) -> dict[str, float]:
        """`take_components` for the logs of a trainer; a loss that it made without our terms is put right."""
        components = self.take_components()
        if self.loss_is_bypassed and components:
            guidance = self._student.config.guidance or {}
            weights = {name: guidance.get(weight) for name, weight in WEIGHT_OF.items()}
            added = sum(weights[name] * components[name] for name in weights if name in components)
            components |= {"loss_gen": logs["loss"], "loss": logs["loss"] + added}
        return components

    def collect(self, forward: Callable[[], Any]) -> FrameFeatures:
        """Run a forward of the attached model without gradient, for both sides of L_Con (GradCache's first pass)."""
        collected = self._collected = []
        try:
            with torch.no_grad():
                forward()
        finally:
            self._collected = None
        return collected[0]

    def _forget(self) -> None:
        self._student, self._handle, self._call = None, None, _Call()

    def _check_attached(self, guidance: dict[str, Any]) -> None:
        if self._student.guidance is None:
            raise ConfigurationError("config.guidance is set, but the model has no heads; use model.set_guidance.")
        width = guidance["teacher_width"]
        if self.teacher is not None:
            check_frame_features(self._student.config.frame_layout)
        if self.teacher is not None and self.teacher.spec.width != width:
            raise ConfigurationError(
                f"the teacher's features are {self.teacher.spec.width} wide, but config.guidance has "
                f"teacher_width={width}; call model.set_guidance with the teacher's width."
            )
        if not any(parameter.requires_grad for parameter in self._student.guidance.parameters()):
            logger.warning("The task heads of config.guidance are frozen; with PEFT, name guidance in modules_to_save.")

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take our keys out of the batch."""
        keys = {name: kwargs.pop(name) for name in BATCH_KEYS if name in kwargs}
        self._call = _Call(keys, is_open=True, is_scaled=kwargs.get("num_items_in_batch") is not None)
        return args, kwargs

    def _inside(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Compute the terms where the model has its hidden states; autocast and gathered parameters are those there."""
        student = self._student
        learns = student.training and (torch.is_grad_enabled() or self._collected is not None)
        if not learns or not self._call.is_open:
            return
        if student.config.guidance is None:
            self._call.terms = LossComponents()
            return
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        geometry = module.read_geometry(ids, embeddings)
        hidden = output[0].flatten(0, 1)
        patches = hidden[:0] if geometry is None else hidden[geometry.patch_index]
        frames = hidden[:0] if geometry is None else hidden[geometry.frame_index]
        patches, frames, scale = student.guidance(patches, frames)
        with torch.autocast(hidden.device.type, enabled=False):
            targets = None if geometry is None else self._targets(geometry, kwargs.get("pixel_values_videos"))
            if self._collected is not None:
                self._collected.append(FrameFeatures(frames, targets, frame_videos(geometry, hidden), scale))
                return
            weights = student.config.guidance
            tubes = self._tube_term(patches, targets, geometry) if weights["tube_weight"] else None
            contrast = None if frames is None else self._frame_term(frames, scale, targets, geometry)
            distill = self._patch_term(patches, targets) if weights["patch_weight"] else None
        self._call.terms = LossComponents(loss_mse=tubes, loss_con=contrast, loss_distill=distill)
        self._call.logit_scale = scale

    def _targets(self, geometry: VisualGeometry, pixels: Tensor | None) -> VisualTargets:
        guidance, keys = self._student.config.guidance, self._call.keys
        needed = {
            "teacher_tubes": guidance["tube_weight"],
            "teacher_frames": guidance["frame_weight"],
            "teacher_patches": guidance["patch_weight"],
        }
        if all(keys.get(name) is not None for name, weight in needed.items() if weight):
            targets = VisualTargets(*(keys.get(name) for name in needed))
        elif self.teacher is not None and pixels is not None:
            patch_size = self._student.config.patch_size
            targets = teacher_targets(
                self.teacher,
                pixels,
                geometry,
                patch_size=patch_size,
                image_mean=self.image_mean,
                image_std=self.image_std,
                with_patches=guidance["patch_weight"] > 0,
            )
        else:
            raise ConfigurationError(
                "config.guidance is set, but the batch has no teacher_tubes and teacher_frames and there is no teacher "
                "to make them from its pixels: pass teacher=VisualTeacher.from_pretrained(...), or a collator with "
                "teacher_cache=TeacherCache(...), which has no features of single patches (patch_weight); "
                "model.set_guidance(None) trains without."
            )
        self._check_width(targets, guidance["teacher_width"])
        return targets

    def _check_width(self, targets: VisualTargets, width: int) -> None:
        named = (
            ("teacher_tubes", targets.tubes),
            ("teacher_frames", targets.frames),
            ("teacher_patches", targets.patches),
        )
        for name, features in named:
            if features is not None and features.shape[-1] != width:
                raise ConfigurationError(
                    f"{name} is {features.shape[-1]} wide, but config.guidance has teacher_width={width}; cache and "
                    "model must be of the same teacher: call model.set_guidance with its width."
                )

    @property
    def _multiplier(self) -> float:
        """What a trainer multiplies the model's loss by before it is summed over micro-batches, averaged over ranks."""
        if self._call.is_bypassed:
            return 1.0
        if not self._call.is_scaled:
            return 1.0 / self.accumulation_steps
        return float(world_size()) if self.tokens_over_ranks else 1.0

    def _tube_term(self, features: Tensor, targets: VisualTargets | None, geometry: VisualGeometry | None) -> Tensor:
        """This micro-batch's part of the step's L_MSE; sums over micro-batches and means over ranks make the whole."""
        num_videos = self._call.keys.get("num_videos_in_batch")
        if targets is None:
            return features.sum()  # of nothing
        loss = tube_alignment_loss(features, like(targets.tubes, features), geometry, num_videos)
        return loss / self.accumulation_steps if num_videos is None else loss * world_size()

    def _frame_term(
        self, features: Tensor, scale: Tensor, targets: VisualTargets | None, geometry: VisualGeometry | None
    ) -> Tensor:
        """The same of L_Con; of cached gradients, a term with the true value and gradient."""
        keys, steps = self._call.keys, self.accumulation_steps
        if keys.get("frame_gradients") is not None:
            gradients = keys["frame_gradients"]
            surrogate = (features.to(gradients.dtype) * gradients).sum()
            surrogate = surrogate + (scale * keys["logit_scale_gradient"]).sum() / steps
            return surrogate - surrogate.detach() + keys["frame_loss"] / steps
        loss = frame_contrastive_loss(
            features,
            features.detach() if targets is None else like(targets.frames, features),
            scale,
            video_ids=frame_videos(geometry, features),
            mask_same_video=self._student.config.guidance["mask_same_video"],
        )
        return loss / steps

    def _patch_term(self, features: Tensor, targets: VisualTargets | None) -> Tensor:
        """The same of the distillation: a mean over the patches of each micro-batch."""
        if targets is None:
            return features.sum()  # of nothing
        kind = self._student.config.guidance["patch_loss"]
        return distillation_loss(features, like(targets.patches, features), kind) / self.accumulation_steps

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Add the terms to the loss."""
        terms = self._call.terms
        if terms is None:
            self._call = _Call()
            return output
        loss = output[0] if isinstance(output, tuple) else output.get("loss")
        guidance = self._student.config.guidance
        if loss is None and guidance is not None:
            raise ConfigurationError(
                "config.guidance adds to the loss that the model returns, and it returned none: give the batch labels, "
                "and the trainer neither label_smoothing_factor nor compute_loss_func, which take them out."
            )
        self._call.is_bypassed = self.loss_is_bypassed = getattr(output, "log_probs", None) is not None
        multiplier = self._multiplier
        if loss is not None:
            parts = replace(terms, loss_gen=loss * multiplier)
            self._means.add(parts, self._call.logit_scale, 1 / self.accumulation_steps)
        if guidance is not None:
            weighted = terms.total(*(guidance[weight] for weight in WEIGHT_OF.values()))
            output = self._add(output, loss, weighted / multiplier)
        self._call = _Call()
        return output

    def _add(self, output: Any, loss: Tensor, term: Tensor) -> Any:
        if isinstance(output, tuple):
            return (loss + term, *output[1:])
        if self._call.is_bypassed:
            if self.uses_loss_scaling:
                raise ConfigurationError("guidance under TRL's trainers needs bf16=True or full precision, not fp16.")
            output.log_probs = CarryGradient.apply(output.log_probs, term)
        else:
            output.loss = loss + term
        return output


class GuidanceCallback(TrainerCallback):
    """Attaches a `GuidanceHook` while a trainer trains, and logs its components.

    They come beside `"loss"` in `trainer.state.log_history` and on the console. Integrations of `report_to` are called
    before a callback of the user and miss them; `ElvaTrainer` adds them to the logs itself, for those too.

    Args:
        hook: What to attach.
    """

    def __init__(self, hook: GuidanceHook):
        self.hook = hook
        self._handle: HookHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any):
        if args.n_gpu > 1:
            raise ConfigurationError(
                f"guidance cannot run under DataParallel on {args.n_gpu} GPUs in one process; launch with torchrun or "
                "accelerate, or make one GPU visible."
            )
        self.hook.accumulation_steps = args.gradient_accumulation_steps
        self.hook.tokens_over_ranks = args.average_tokens_across_devices
        self.hook.uses_loss_scaling = args.fp16
        if self.hook.teacher is not None:
            self.hook.teacher.to(args.device)
        self._handle = self.hook.attach(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        if logs is not None and "loss" in logs:
            components = self.hook.log_components(logs)
            logs.update(components)
            state.log_history[-1].update(components)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        if self._handle is not None:
            self._handle.remove()


def find_student(model: nn.Module) -> tuple[ElvaForCausalLM, nn.Module]:
    """The model inside its wrappers, and the module whose call runs it: PEFT calls its `forward` past its hooks.

    Raises:
        ConfigurationError: There is none.
    """
    outer = None
    for module in model.modules():
        if outer is None and hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
            outer = module
        if isinstance(module, ElvaForCausalLM):
            return module, outer or module
    raise ConfigurationError(f"{type(model).__name__} holds no ElvaForCausalLM; guidance has nothing to attach to.")


def frame_videos(geometry: VisualGeometry | None, like: Tensor) -> Tensor:
    """`(F,)` video of each frame of a batch; empty without one."""
    if geometry is None:
        return torch.zeros(0, dtype=torch.long, device=like.device)
    frame_clip, clip_video = frame_clips(geometry)
    return clip_video[frame_clip]


def like(targets: Tensor, features: Tensor) -> Tensor:
    """Targets on the device of features, in float32, or float64 if the features are."""
    return targets.to(features.device, torch.promote_types(features.dtype, torch.float32))
