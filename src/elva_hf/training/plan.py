"""What a recipe will do, before any weight is loaded: tokens, steps, parameters and memory, and what is missing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from elva_hf.architectures_elva import find_architecture
from elva_hf.configuration_elva import VideoDecoderConfig
from elva_hf.frames_elva import count_video_tokens
from elva_hf.guidance_elva import check_frame_features
from elva_hf.ledger_elva import plan_tokens
from elva_hf.modeling_elva import LOSS_ROWS
from elva_hf.training.building import PART_MODULES, freeze, guidance_fields, read_config, with_schedule
from elva_hf.training.recipe import Recipe, starting_from
from elva_hf.training.sections import Stage

MASTER_BYTES = 16
"""Of a trained parameter: float32 weight, gradient and the two moments of AdamW."""

SIGLIP_WIDTH = 1152  # of SigLIP so400m, the paper's teacher, where none can be read
TEXT_TOKENS = 256  # of a dense caption, for the memory estimate alone


@dataclass(frozen=True)
class StagePlan:
    """Numbers of a stage.

    Args:
        stage: What is planned.
        num_processes: GPUs.
        accumulation_steps: Micro-batches of an optimiser step on each.
        num_samples: Of an epoch; None if nobody says.
        num_steps: Optimiser steps; None likewise.
        config: Of the model; None if neither it nor its shape is known.
        trained: Parameters that train, by part.
        frozen: Parameters that do not.
        tokens: Of a video of square frames, without text: the most it can have; None without a configuration, or
            where `video.fps` sets no most.
        bytes_by_strategy: Estimated peak bytes on a GPU under each way to shard.
    """

    stage: Stage
    num_processes: int
    accumulation_steps: int
    num_samples: int | None
    num_steps: int | None
    config: VideoDecoderConfig | None
    trained: dict[str, int]
    frozen: int
    tokens: int | None
    bytes_by_strategy: dict[str, int]

    def lines(self) -> Iterator[str]:
        """A table for people."""
        stage, training = self.stage, self.stage.training
        yield f"stage     {stage.name}"
        yield f"model     {_describe_source(stage)}"
        if self.config is not None:
            yield f"merging   {_describe_schedule(self.config)}"
        yield f"video     {_describe_video(stage, self.config)}"
        yield f"losses    {_describe_losses(stage)}"
        micro = f"{self.num_processes} x {training.per_device_train_batch_size} x {self.accumulation_steps}"
        yield f"batch     {training.batch_size} samples a step = {micro} (processes x micro-batch x accumulation)"
        if self.tokens is not None:
            total = training.batch_size * self.tokens
            yield f"tokens    at most {self.tokens} a video (square frames, no text), {total} a step"
        elif self.config is not None:
            each, fps = _frame_tokens(stage, self.config), stage.video.fps
            yield f"tokens    {each * fps:g} for each second of a video ({fps:g} square frames of {each}), no most"
        shown = "samples are counted at the start" if self.num_samples is None else f"{self.num_samples} samples"
        epochs = f"{training.num_train_epochs:g} epochs" if training.max_steps < 0 else "max_steps"
        yield f"steps     {'?' if self.num_steps is None else self.num_steps} ({shown}, {epochs})"
        warmup = f"warm-up {training.warmup_ratio:g}"
        yield f"rate      {training.learning_rate:g}, {training.lr_scheduler_type}, {warmup}, seed {training.seed}"
        if self.trained:
            parts = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in self.trained.items())
            yield f"trains    {parts}; frozen {self.frozen / 1e6:.1f}M"
        if self.bytes_by_strategy:
            sizes = ", ".join(f"{name} {size / 1e9:.0f} GB" for name, size in self.bytes_by_strategy.items())
            yield f"memory    about, on each GPU{'' if self.tokens is not None else self._longest_video}: {sizes}"
        for field in stage.missing():
            yield f"missing   {field}"

    @property
    def _longest_video(self) -> str:
        return f", with videos that fill the model's {self.config.text_config.max_position_embeddings} positions"


def plan_recipe(recipe: Recipe, num_processes: int = 1) -> list[StagePlan]:
    """Plan every stage; loads no weights and opens no data.

    Raises:
        ConfigurationError: A stage whose batch cannot be split, or a model that cannot be.
        CheckpointError: A folder that holds no checkpoint.
    """
    plans: list[StagePlan] = []
    for stage in recipe.stages:
        if plans:
            stage = starting_from(stage, recipe.stage_dir(plans[-1].stage.name) / "model")
        config = read_config(stage.model)
        if config is None and plans and plans[-1].config is not None:
            config = with_schedule(copy.deepcopy(plans[-1].config), stage.model)
        plans.append(plan_stage(stage, config, num_processes))
    return plans


def plan_stage(stage: Stage, config: VideoDecoderConfig | None, num_processes: int) -> StagePlan:
    """Plan one stage of a model of this configuration."""
    accumulation = stage.accumulation_steps(num_processes)
    samples = count_samples(stage)
    steps = count_steps(stage, samples)
    if config is None:
        return StagePlan(stage, num_processes, accumulation, samples, steps, None, {}, 0, None, {})
    if stage.guidance is not None:
        check_frame_features(config.frame_layout)
    trained, frozen = count_parameters(stage, config)
    video = square_video(stage, config)
    has_most = config.frame_counts(stage.video.options) is not None
    tokens = count_video_tokens(video, layout=config.frame_layout) if has_most else None
    sizes = estimate_bytes(stage, config, sum(trained.values()), frozen, num_processes)
    return StagePlan(stage, num_processes, accumulation, samples, steps, config, trained, frozen, tokens, sizes)


def count_steps(stage: Stage, samples: int | None) -> int | None:
    """Optimiser steps for so many samples in an epoch."""
    training = stage.training
    if training.max_steps > 0:
        return training.max_steps
    return None if samples is None else -int(-samples * training.num_train_epochs // training.batch_size)


def count_samples(stage: Stage) -> int | None:
    """Samples of an epoch by the recipe's own counts; None where a source states none."""
    total = 0.0
    for source in stage.data.sources.values():
        counts = [count for count in (source.num_samples, source.max_samples) if count is not None]
        if source.format == "toy_world" and not counts:
            counts = [source.options.get("num_videos", 0)]
        if not counts:
            return None
        total += min(counts) * source.repeat
    return round(total)


def square_video(stage: Stage, config: VideoDecoderConfig) -> list[tuple[int, int]]:
    """Grids of a video of square frames at the stage's ceilings.

    Where `video.fps` sets no most, the video and a caption fill the model's positions.
    """
    high, low = (_square_grid(stage, config, name) for name in ("longest_edge", "low_res_longest_edge"))
    room = config.text_config.max_position_embeddings - TEXT_TOKENS
    filling = max(1, room // _frame_tokens(stage, config)), 0
    num_high, num_low = config.frame_counts(stage.video.options) or filling
    return [high] * num_high + [low] * num_low


def _square_grid(stage: Stage, config: VideoDecoderConfig, edge: str) -> tuple[int, int]:
    return config.square_grid(stage.video.options.get(edge, getattr(config, edge)))


def _frame_tokens(stage: Stage, config: VideoDecoderConfig) -> int:
    """Tokens of a large square frame."""
    return config.frame_layout.count(_square_grid(stage, config, "longest_edge"))


def count_parameters(stage: Stage, config: VideoDecoderConfig) -> tuple[dict[str, int], int]:
    """Parameters that train, by part, and the number of those that do not; counted on a model without storage."""
    with torch.device("meta"):
        model: Any = find_architecture(config.model_type).causal_lm(config)
        if stage.guidance is not None:
            model.set_guidance(guidance_fields(stage.guidance, SIGLIP_WIDTH))
    if stage.lora is None:
        freeze(model, stage.trainable)
        own = dict(PART_MODULES)
    else:
        from elva_hf.training.lora import add_lora

        plain = replace(stage.lora, new_words=[], quantization=None)  # the rows of a few words are not counted
        model = add_lora(model, plain)
        own = {"lora": ".lora_", **{name: f".{name}." for name in (*stage.lora.modules_to_save, "guidance")}}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part, mark in own.items() if mark in name or name.startswith(mark)), "other")
            trained[part] = trained.get(part, 0) + parameter.numel()
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return trained, frozen


def estimate_bytes(
    stage: Stage, config: VideoDecoderConfig, trained: int, frozen: int, num_processes: int
) -> dict[str, int]:
    """Estimated peak bytes on a GPU: weights, gradients, AdamW and activations of a micro-batch; DPO's reference, too.

    Activations are those of `square_video` and a caption: what gradient checkpointing keeps of each layer and one layer
    in full, or all layers in full, and the rows of logits that the loss has at a time. Fragmentation, the teacher and
    buffers of communication come on top.
    """
    if stage.preference is not None and stage.lora is None:
        frozen += frozen + trained  # the reference is a copy of the model
    text, size = config.text_config, 2 if stage.training.bf16 else 4
    layers = plan_tokens([square_video(stage, config)], config, None, TEXT_TOKENS).layers
    rows = [stage.training.per_device_train_batch_size * layer.maximum for layer in layers]
    full = size * (10 * text.hidden_size + 4 * text.intermediate_size)
    if stage.model.gradient_checkpointing:
        activations = sum(rows) * size * text.hidden_size + max(rows) * full
    else:
        activations = sum(rows) * full
    activations += 3 * 4 * LOSS_ROWS * text.vocab_size
    still = frozen * (0.5 if stage.lora is not None and stage.lora.quantization else 4)
    states = {
        "DDP": trained * MASTER_BYTES + still,
        "ZeRO-2": 2 * (trained + frozen) + trained * (MASTER_BYTES - 2) / num_processes,
        "FSDP2": (trained * MASTER_BYTES + still) / num_processes,
    }
    if num_processes == 1:
        states = {"one GPU": states["DDP"]}
    return {name: round(state + activations) for name, state in states.items()}


def _describe_source(stage: Stage) -> str:
    model = stage.model
    for name in ("path", "text_model", "preset"):
        if getattr(model, name) is not None:
            return f"{getattr(model, name)} ({name}{', LoRA' if stage.lora is not None else ''})"
    return "that of the stage before"


def _describe_schedule(config: VideoDecoderConfig) -> str:
    steps = config.resolve_merge_schedule().steps
    what = [
        f"above similarity {step.similarity_threshold:g} at layer {step.layer}"
        if step.target_ratio is None
        else f"to {100 * step.target_ratio:g} % at layer {step.layer}"
        for step in steps
    ]
    return ", ".join(what) or "none"


def _describe_video(stage: Stage, config: VideoDecoderConfig | None) -> str:
    options = stage.video.options
    if config is not None:
        options = {"longest_edge": config.longest_edge, **options}
    return (
        ", ".join(f"{name}={value if isinstance(value, bool) else f'{value:g}'}" for name, value in options.items())
        or "the model's own frames"
    )


def _describe_losses(stage: Stage) -> str:
    guidance = stage.guidance
    if stage.preference is not None:
        return f"DPO, beta {stage.preference.beta:g}"
    if guidance is None:
        return "L_Gen"
    terms = [("L_MSE", guidance.tube_weight), ("L_Con", guidance.frame_weight), ("L_distill", guidance.patch_weight)]
    shown = [name if weight == 1 else f"{weight:g} {name}" for name, weight in terms if weight]
    teacher = guidance.cache if guidance.teacher is None else guidance.teacher
    return " + ".join(["L_Gen", *shown]) + f", teacher {teacher}, layer {guidance.layer}"
