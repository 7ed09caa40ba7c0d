"""Trains one variant on a world, and says what it can answer on the way.

A loop of its own on `ElvaForCausalLM`, with the package's rows, packing and guidance: bf16 autocast (none on a CPU
without products of such matrices), a learning rate that is flat after its warm-up and falls linearly at the end. Which
videos and questions a step holds depends on the seed, the step, the budget and the order that the variant's phases
give, and on nothing else of the variant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from claims import teachers
from claims.grading import count_right, swap_videos
from claims.protocol import Budget, Curve, Variant, count_steps
from claims.reduction import read
from claims.runs import Run, teachers_folder, weights_path
from claims.world import Asked
from claims.worlds import WORLDS
from claims.writing import rewrite
from elva_hf.architectures_elva import read_preset
from elva_hf.data.collator import pad_samples, shared_prefix_mask
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.training.guidance import GuidanceHook
from elva_hf.training.losses import generative_loss
from elva_hf.training.muon import MuonWithAdamW
from elva_hf.training.precision import faster_dtype
from elva_hf.training.toy import build_config

CLIP_NORM = 1.0
ADAM_BETAS = (0.9, 0.98)


# Batches


def make_batch(rows: Sequence[Asked], pad_token_id: int, device: str) -> dict[str, Tensor]:
    """`input_ids`, `labels`, `position_ids`, `segment_ids`, each `(B, N)`, and `pixel_values_videos` of rows."""
    batch = pad_samples([row.sample for row in rows], pad_token_id)
    del batch["attention_mask"]
    batch["pixel_values_videos"] = torch.cat([row.sample.pixel_values_videos for row in rows])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def see(rows: Sequence[Asked], teacher: str, patch_size: int, folder: Path | None, device: str) -> dict[str, Tensor]:
    """A teacher's `teacher_tubes` `(B, h, w, W)` and `teacher_frames` `(F, W)` of rows."""
    seen = [torch.from_numpy(teachers.features(teacher, row.frames, patch_size, folder)) for row in rows]
    return {
        "teacher_tubes": torch.stack([video.mean(0) for video in seen]).to(device),
        "teacher_frames": torch.cat([video.mean((1, 2)) for video in seen]).to(device),
    }


# Model and optimiser


def build_model(variant: Variant, seed: int, tokenizer: PreTrainedTokenizerBase) -> ElvaForCausalLM:
    """A fresh model with the variant's fields, and its task heads if it has a teacher.

    The fields may have `preset`, `"tiny"` if not, which names ELVA or a sibling; and `text_config`, fields of the
    decoder's that differ from the preset's.
    """
    torch.manual_seed(seed)
    fields = dict(variant.config)
    preset, text = fields.pop("preset", "tiny"), fields.pop("text_config", {})
    system, _ = read_preset(preset)
    config = build_config(system, {"preset": preset, "config": fields, "text_config": text}, tokenizer)
    model = system.causal_lm(config)
    if variant.guidance is not None:
        model.set_guidance({"teacher_width": teachers.width(variant.teacher), **variant.guidance})
    return model


def count_parameters(model: nn.Module) -> int:
    """Parameters without the task heads, which only training needs."""
    return sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("guidance."))


def build_optimizer(model: nn.Module, budget: Budget, share: float = 1.0) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices of the decoder's layers and AdamW for the rest; no weight decay.

    Args:
        model: What it steps.
        budget: Names the optimiser and the rates.
        share: Of the rates.

    Raises:
        ValueError: The budget names another optimiser.
    """
    rate = share * budget.learning_rate
    if budget.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=ADAM_BETAS, weight_decay=0.0)
    if budget.optimizer == "muon":
        return MuonWithAdamW(model, rate, share * budget.muon_learning_rate, betas=ADAM_BETAS)
    raise ValueError(f"optimizer={budget.optimizer!r}: expected 'adamw' or 'muon'.")


def rate_factor(step: int, budget: Budget) -> float:
    """What the learning rate is multiplied by in one of `steps`: linear warm-up, flat, a linear tail to above 0."""
    tail = max(1.0, budget.tail_share * budget.steps)
    return min((step + 1) / max(1, budget.warmup), 1.0, (budget.steps - step) / tail)


# Training and evaluation


@dataclass
class Training:
    """A run under way.

    Args:
        run: What is run.
        model: Its model, on its device.
        tokenizer: Of the toy model.
        folder: Of the finished runs, where bases and teachers are.
    """

    run: Run
    model: ElvaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    folder: Path

    @classmethod
    def start(cls, run: Run, folder: Path) -> Training:
        """Build the model, with the weights of its base if it has one."""
        tokenizer = build_toy_tokenizer()
        model = build_model(run.variant, run.seed, tokenizer)
        if run.base is not None:
            load_base(model, run.base, folder)
        # eager is the faster one on CPU: rows are short, and a mask of all by all takes half the time of a row's
        # questions one after another
        model.set_attn_implementation("eager" if run.device == "cpu" else "sdpa")
        if run.variant.guidance is not None:
            GuidanceHook().attach(model)
        return cls(run, model.to(run.device).train(), tokenizer, folder)

    def ask(self, scenes: Sequence[Any]) -> list[Asked]:
        """Render scenes and ask about them, in ELVA's tokens; `write` turns them into the model's."""
        world, number = WORLDS[self.run.budget.world], self.run.budget.questions
        patch_size = self.model.config.patch_size
        return [world.ask(scene, number, self.tokenizer, patch_size, self.run.variant) for scene in scenes]

    def write(self, rows: Sequence[Asked]) -> list[Asked]:
        """Rows as the model reads them."""
        return [rewrite(row, self.model.config, self.tokenizer) for row in rows]

    def held_out(self, split: str, number: int) -> list[Asked]:
        """Rows of an evaluation."""
        return self.ask(WORLDS[self.run.budget.world].held_out(self.run.budget, split, number, self.run.variant))

    def batch(self, step: int) -> dict[str, Tensor]:
        """What a step learns from."""
        run = self.run
        rows = self.ask(WORLDS[run.budget.world].draw(run.budget, run.seed, step, run.variant))
        batch = make_batch(self.write(rows), self.tokenizer.pad_token_id, run.device)
        if run.variant.guidance is not None:
            towers = teachers_folder(self.folder)
            batch |= see(rows, run.variant.teacher, self.model.config.patch_size, towers, run.device)
        return batch

    def score(self, rows: Sequence[Asked]) -> Score:
        """See `evaluate`; rows as `ask` gives them."""
        return evaluate(self.model, self.write(rows), self.tokenizer.pad_token_id, self.run.variant, self.run.device)


def train(run: Run, folder: Path) -> Curve:
    """Train a variant, from scratch or from its base, which is trained if its weights are not there.

    Args:
        run: What is trained.
        folder: Of the finished runs; weights that other runs begin with are kept in it.

    Raises:
        FloatingPointError: The loss is no longer finite.
        ValueError: Base and variant differ in their parameters.
    """
    training, budget = Training.start(run, folder), run.budget
    total = count_steps(run.variant, budget)
    tuned = run.variant.base is not None
    rates = replace(budget, steps=total, warmup=min(budget.warmup, total // 4))
    optimizer = build_optimizer(training.model, budget, budget.tuning_rate if tuned else 1.0)
    validation = training.held_out("validation", budget.validation_scenes)
    test = training.held_out("test", budget.test_scenes)
    steps, tokens, scores, seen = [], [], [], 0
    untuned = None
    if tuned:
        steps, tokens, scores, untuned = [0], [0], [training.score(validation)], training.score(test)
    for step in range(total):
        seen += update(training.model, training.batch(step), optimizer, rate_factor(step, rates), run.variant)
        if (step + 1) % budget.evaluate_every == 0 or step + 1 == total:
            steps.append(step + 1)
            tokens.append(seen)
            scores.append(training.score(validation))
    if run.keeps_weights:
        save_weights(training.model, weights_path(folder, run))
    last = training.score(test) if total else untuned
    return Curve(
        steps=tuple(steps),
        tokens=tuple(tokens),
        accuracy={column: tuple(score.shares[column] for score in scores) for column in scores[0].shares},
        test=last.shares,
        parameters=count_parameters(training.model),
        visual_share=last.visual_share,
        test_untuned=untuned.shares if tuned else {},
        swapped=training.score(swap_videos(test)).shares,
    )


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights of a model, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}, partial)
    os.replace(partial, path)


def read_weights(run: Run, folder: Path) -> Training:
    """A model with the last weights of a run, which is made if they are not there; to ask, not to train."""
    variant = replace(run.variant, name="reader", base=None)
    return Training.start(Run(run.claim, variant, run.seed, run.budget, run.device, run), folder)


def load_base(model: ElvaForCausalLM, base: Run, folder: Path) -> None:
    """Give a model the weights that its base ended with, but not the base's task heads.

    Raises:
        ValueError: The parameters of the two differ.
    """
    from safetensors.torch import load_file

    path = weights_path(folder, base)
    if not path.exists():
        train(replace(base, keeps_weights=True), folder)
    own = model.state_dict()
    weights = {name: weight for name, weight in load_file(path).items() if not name.startswith("guidance.")}
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != {name: weight.shape for name, weight in own.items() if not name.startswith("guidance.")}:
        raise ValueError(f"{path}: parameters differ from those of the variant that begins with it; use its fields.")
    model.load_state_dict(own | weights)


def update(
    model: ElvaForCausalLM,
    batch: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    factor: float,
    variant: Variant,
) -> int:
    """Learn from a batch once; returns the real tokens that entered the decoder."""
    with _autocast(batch):
        loss, tokens = take_loss(model, batch, variant)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}; lower the budget's learning rates.")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    _step(optimizer, factor)
    model.zero_grad()
    return tokens


def take_loss(model: ElvaForCausalLM, batch: dict[str, Tensor], variant: Variant) -> tuple[Tensor, int]:
    """Loss of a batch, Eq. 4 or L_Gen of what a reduction leaves, and its real tokens."""
    if variant.reduction is None:
        segments = batch["segment_ids"]
        inputs = {name: value for name, value in batch.items() if name != "segment_ids"}
        outputs = model(**inputs, attention_mask=shared_prefix_mask(segments), use_cache=False)
        return outputs.loss, int((segments >= 0).sum())
    reading = read(model, batch, variant.reduction)
    return generative_loss(model.lm_head(reading.hidden), reading.labels), reading.tokens


def _step(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group.setdefault("peak", group["lr"])
        group["lr"] = factor * group["peak"]
    optimizer.step()


def _autocast(batch: dict[str, Tensor]) -> torch.autocast:
    device = batch["input_ids"].device
    return torch.autocast(device.type, torch.bfloat16, enabled=faster_dtype(device) == torch.bfloat16)


@dataclass(frozen=True)
class Score:
    """What a model answers.

    Args:
        shares: Share of right answers per column: per task, per task and number of objects as `"where/2"`, and per
            field of an answer.
        visual_share: Share of the patches that is left, mean over the layers and videos.
    """

    shares: dict[str, float]
    visual_share: float


@torch.no_grad()
def evaluate(
    model: ElvaForCausalLM,
    rows: Sequence[Asked],
    pad_token_id: int,
    variant: Variant,
    device: str,
    batch_size: int = 25,
) -> Score:
    """Answers that are right in every token, given the tokens before it."""
    model.eval()
    right: dict[str, list[bool]] = {}
    share = 0.0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = make_batch(part, pad_token_id, device)
        with _autocast(batch):
            guesses, labels, segments, left = _guess(model, batch, variant)
        share += left * len(part)
        for column, is_right in count_right(part, guesses, labels, segments):
            right.setdefault(column, []).append(is_right)
    model.train()
    return Score({column: float(np.mean(right[column])) for column in sorted(right)}, share / len(rows))


def _guess(model: ElvaForCausalLM, batch: dict[str, Tensor], variant: Variant) -> tuple[Tensor, Tensor, Tensor, float]:
    if variant.reduction is not None:
        reading = read(model, batch, variant.reduction)
        guesses = model.lm_head(reading.hidden).argmax(-1)
        return guesses, reading.labels, reading.segments, reading.visual_share
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "segment_ids")}
    mask = shared_prefix_mask(batch["segment_ids"])
    guesses = model(**inputs, attention_mask=mask, use_cache=False).logits.argmax(-1)
    return guesses, batch["labels"], batch["segment_ids"], 1.0
