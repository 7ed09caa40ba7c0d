"""Trains one variant on the procedural world, and says what it can answer on the way.

A loop of its own on `ElvaForCausalLM`, with the package's rows, packing and guidance: bf16 autocast, a learning rate
that is flat after its warm-up and falls linearly at the end. Which videos and questions a step holds depends on the
seed, the step and the budget, never on the variant.

The teacher is the hand-made one of `elva_hf.data.toy_teacher`, which hands over what questions about looks need.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from claims.protocol import Budget, Curve, Variant
from elva_hf.configuration_elva import ElvaConfig
from elva_hf.data.collator import pad_samples, shared_prefix_mask
from elva_hf.data.encoding import EncodedSample
from elva_hf.data.packing import IGNORED, PADDING, PREFIX
from elva_hf.data.toy_rows import draw_questions
from elva_hf.data.toy_teacher import NUM_FEATURES, toy_teacher_features
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import Scene, blind_optimum, questions, render, sample_scene
from elva_hf.modeling_elva import ElvaForCausalLM, add_special_tokens
from elva_hf.training.guidance import GuidanceHook
from elva_hf.training.toy import encode_turns, frames_to_patches

SCENES_PER_SEED = 10_000_000
CLIP_NORM = 1.0
ADAM_BETAS = (0.9, 0.98)
MUON_MOMENTUM = 0.95


@dataclass(frozen=True)
class Asked:
    """One video with its questions, ready for a batch.

    Args:
        sample: Its tokens and pixels.
        columns: Per question its task.
        num_objects: Of the scene.
        teacher: `(T, rows, columns, 29)` what the teacher sees in it.
    """

    sample: EncodedSample
    columns: tuple[str, ...]
    num_objects: int
    teacher: Tensor


# Data


def draw_scene(seed: int, num_frames: int, split: str, single_share: float) -> Scene:
    """The scene of a seed: with one object in `single_share` of all cases, else with one to three."""
    single = random.Random(seed).random() < single_share
    return sample_scene(seed, num_frames=num_frames, split=split, single=single)


def ask(scene: Scene, number: int, tokenizer: PreTrainedTokenizerBase, patch_size: int) -> Asked:
    """Render a scene and draw its questions, both of its seed alone; all questions share one row's video."""
    frames = render(scene)
    asked = draw_questions(questions(scene), number, random.Random(scene.seed), {})
    grid = (frames.shape[1] // patch_size, frames.shape[2] // patch_size)
    row = encode_turns(tokenizer, len(frames), grid, [(q.text, q.answer) for q in asked])
    ids, labels, segments = list(row.prefix), [IGNORED] * len(row.prefix), [PREFIX] * len(row.prefix)
    for turn, (question, answer) in enumerate(row.turns, start=1):
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
        segments += [turn] * (len(question) + len(answer))
    sample = EncodedSample(
        torch.tensor(ids),
        torch.tensor(labels),
        frames_to_patches(frames, patch_size),
        ((grid,) * len(frames),),
        torch.tensor(segments),
    )
    teacher = torch.from_numpy(toy_teacher_features(frames, patch_size))
    return Asked(sample, tuple(q.task for q in asked), len(scene.objects), teacher)


def draw_step(budget: Budget, seed: int, step: int) -> list[Scene]:
    """The scenes of an optimiser step, the same for every variant; no two seeds share one."""
    first = seed * SCENES_PER_SEED + step * budget.batch_size
    frames = budget.frames[step % len(budget.frames)]
    return [draw_scene(first + i, frames, "train", budget.single_share) for i in range(budget.batch_size)]


def draw_held_out(budget: Budget, split: str, number: int) -> list[Scene]:
    """The scenes of an evaluation, the same for every variant and seed."""
    return [draw_scene(seed, max(budget.frames), split, budget.single_share) for seed in range(number)]


def make_batch(rows: Sequence[Asked], pad_token_id: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of the model with the teacher's features, and which token belongs to which question.

    Rows are short, and a mask of all by all takes half the time of a row's questions one after another.

    Returns:
        What the model takes, with `teacher_tubes` `(B, h, w, 29)` and `teacher_frames` `(F, 29)`; and `(B, N)` 0 for
        the video, 1, 2, ... for the questions, -1 for padding.
    """
    batch = pad_samples([row.sample for row in rows], pad_token_id)
    segments = batch.pop("segment_ids").to(device)
    batch["attention_mask"] = shared_prefix_mask(segments)
    batch["pixel_values_videos"] = torch.cat([row.sample.pixel_values_videos for row in rows])
    batch["teacher_tubes"] = torch.stack([row.teacher.mean(0) for row in rows])
    batch["teacher_frames"] = torch.cat([row.teacher.mean((1, 2)) for row in rows])
    return {name: tensor.to(device) for name, tensor in batch.items()}, segments


# Model and optimiser


def build_model(variant: Variant, seed: int, tokenizer: PreTrainedTokenizerBase) -> ElvaForCausalLM:
    """A fresh model of the `tiny` preset with the variant's fields, and its task heads if it has a teacher."""
    torch.manual_seed(seed)
    config = ElvaConfig.from_preset("tiny", **add_special_tokens(tokenizer), **variant.config)
    config.text_config.vocab_size = len(tokenizer)
    model = ElvaForCausalLM(config)
    if variant.guidance is not None:
        model.set_guidance({"teacher_width": NUM_FEATURES, **variant.guidance})
    return model


def count_parameters(model: nn.Module) -> int:
    """Parameters without the task heads, which only training needs."""
    return sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("guidance."))


def build_optimizers(model: nn.Module, budget: Budget) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the decoder's layers and AdamW for the rest; no weight decay.

    Raises:
        ValueError: The budget names another optimiser.
    """
    if budget.optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer={budget.optimizer!r}: expected 'adamw' or 'muon'.")
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        in_layer = budget.optimizer == "muon" and weight.ndim == 2 and ".layers." in name
        (matrices if in_layer else rest).append(weight)
    adam = torch.optim.AdamW(rest, lr=budget.learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(
        matrices,
        lr=budget.muon_learning_rate,
        momentum=MUON_MOMENTUM,
        weight_decay=0.0,
        adjust_lr_fn="original",
    )
    return [muon, adam]


def rate_factor(step: int, budget: Budget) -> float:
    """What the learning rate is multiplied by in a step: linear warm-up, flat, a linear tail that ends above 0."""
    tail = max(1.0, budget.tail_share * budget.steps)
    return min((step + 1) / max(1, budget.warmup), 1.0, (budget.steps - step) / tail)


# Training and evaluation


def train(variant: Variant, seed: int, budget: Budget, device: str) -> Curve:
    """Train a variant from scratch.

    Args:
        variant: What is trained.
        seed: Of initialisation and data.
        budget: Steps, videos and evaluations.
        device: `"cpu"` or `"cuda"`.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    tokenizer = build_toy_tokenizer()
    model = build_model(variant, seed, tokenizer).to(device).train()
    model.set_attn_implementation("eager" if device == "cpu" else "sdpa")  # eager is the faster one there
    if variant.guidance is not None:
        GuidanceHook().attach(model)
    optimizers = build_optimizers(model, budget)
    patch_size, pad = model.config.patch_size, tokenizer.pad_token_id

    def prepare(scenes: Sequence[Scene]) -> list[Asked]:
        return [ask(scene, budget.questions, tokenizer, patch_size) for scene in scenes]

    held_out = prepare(draw_held_out(budget, "validation", budget.validation_scenes))
    steps, tokens, scores, seen = [], [], [], 0
    for step in range(budget.steps):
        batch, segments = make_batch(prepare(draw_step(budget, seed, step)), pad, device)
        seen += int((segments != PADDING).sum())
        _update(model, batch, optimizers, rate_factor(step, budget))
        if (step + 1) % budget.evaluate_every == 0 or step + 1 == budget.steps:
            steps.append(step + 1)
            tokens.append(seen)
            scores.append(evaluate(model, held_out, pad, device))
    test = prepare(draw_held_out(budget, "test", budget.test_scenes))
    return Curve(
        steps=tuple(steps),
        tokens=tuple(tokens),
        accuracy={column: tuple(score[column] for score in scores) for column in scores[0]},
        test=evaluate(model, test, pad, device),
        parameters=count_parameters(model),
    )


def _update(
    model: nn.Module, batch: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer], factor: float
) -> None:
    guided = model.config.guidance is not None
    inputs = batch if guided else _without_teacher(batch)
    with _autocast(batch):
        loss = model(**inputs, use_cache=False).loss
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}; lower the budget's learning rates.")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    for optimizer in optimizers:
        _step(optimizer, factor)
    model.zero_grad()


def _step(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group.setdefault("peak", group["lr"])
        group["lr"] = factor * group["peak"]
    optimizer.step()


def _without_teacher(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if not name.startswith("teacher_")}


def _autocast(batch: dict[str, Tensor]) -> torch.autocast:
    return torch.autocast(batch["input_ids"].device.type, torch.bfloat16)


@torch.no_grad()
def evaluate(
    model: nn.Module, rows: Sequence[Asked], pad_token_id: int, device: str, batch_size: int = 25
) -> dict[str, float]:
    """Share of answers that are right in every token, given the tokens before it.

    Returns:
        Per task, and per task and number of objects as `"where/2"`.
    """
    model.eval()
    right: dict[str, list[bool]] = {}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch, segments = make_batch(part, pad_token_id, device)
        labels = batch.pop("labels")
        with _autocast(batch):
            guesses = model(**_without_teacher(batch), use_cache=False).logits.argmax(-1)
        for row, good in zip(part, grade(guesses, labels, segments), strict=True):
            for task, is_right in zip(row.columns, good, strict=True):
                right.setdefault(task, []).append(is_right)
                right.setdefault(f"{task}/{row.num_objects}", []).append(is_right)
    model.train()
    return {column: float(np.mean(right[column])) for column in sorted(right)}


def grade(guesses: Tensor, labels: Tensor, segments: Tensor) -> list[list[bool]]:
    """Whether each answer of packed rows is right.

    Args:
        guesses: `(B, N)` the most likely next token at each place.
        labels: `(B, N)` ids of the answers, -100 elsewhere.
        segments: `(B, N)` 0 for the video, 1, 2, ... for the questions, -1 for padding.
    """
    wrong = (guesses[:, :-1] != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
    return [
        [not bool(bad[own == number].any()) for number in range(1, int(own.max()) + 1)]
        for bad, own in zip(wrong.cpu(), segments[:, 1:].cpu(), strict=True)
    ]


def blind_shares(budget: Budget, fitted: int = 20_000, scored: int = 4_000) -> dict[str, float]:
    """What the best answerer that never looks reaches per column, on test scenes drawn as those of an evaluation."""
    frames, share = max(budget.frames), budget.single_share
    known = [draw_scene(seed, frames, "train", share) for seed in range(fitted)]
    scenes = [draw_scene(seed, frames, "test", share) for seed in range(scored)]
    shares = blind_optimum(known, scenes)
    for count in sorted({len(scene.objects) for scene in scenes}):
        some = [scene for scene in scenes if len(scene.objects) == count]
        shares |= {f"{task}/{count}": value for task, value in blind_optimum(known, some).items()}
    return shares
