"""What `training.py` measures: model, teacher and batch at each size, and optimiser steps in one process."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from measuring import Meter
from random_elva import Clip, make_model, make_size
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.utils import is_flash_attn_2_available

from elva_hf import ElvaConfig
from elva_hf.data.collator import pad_samples
from elva_hf.data.encoding import EncodedSample
from elva_hf.training.guidance import GuidanceHook
from elva_hf.training.losses import generative_loss
from elva_hf.training.teacher import VisualTeacher

Row = dict[str, Any]

IGNORED = -100
LEARNING_RATE = 4e-5  # of stages 1 and 2 (Table 7)
NUM_QUESTIONS = 8  # of a packed row


@dataclass(frozen=True)
class Scale:
    """A model, a teacher, and the batch they train on.

    Args:
        config: Of the student.
        teacher: Fields of a SigLIP tower's configuration.
        batch_size: Clips in a step.
        frames: Of a clip.
        grid: Rows and columns of patches of a frame.
        question: Tokens before an answer.
        caption: Tokens of the answer about a clip.
        answer: Tokens of each answer of a packed row.
        matmul: Side of the matrices whose product says what the device can do.
    """

    config: ElvaConfig
    teacher: dict[str, int]
    batch_size: int
    frames: int
    grid: tuple[int, int]
    question: int
    caption: int
    answer: int
    matmul: int


def _tower(hidden: int, intermediate: int, layers: int, heads: int, image_size: int, patch_size: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }


def make_scale(name: str) -> Scale:
    """`"tiny"` (for tests), `"small"` (for a CPU) or `"1.5b"` (the paper's stage 2 with SigLIP-so400m, for a GPU)."""
    if name == "tiny":
        tower = _tower(16, 32, 3, 2, image_size=28, patch_size=14)
        return Scale(make_size("tiny").config, tower, 2, 3, (3, 4), question=3, caption=4, answer=3, matmul=64)
    if name == "small":
        tower = _tower(192, 768, 6, 3, image_size=224, patch_size=16)
        return Scale(make_size("small").config, tower, 2, 4, (6, 8), question=20, caption=60, answer=10, matmul=1024)
    tower = _tower(1152, 4304, 27, 16, image_size=384, patch_size=14)
    config = ElvaConfig.from_preset("elva-1.5b")
    return Scale(config, tower, 4, 16, (9, 16), question=30, caption=200, answer=20, matmul=8192)


SIZES = ("tiny", "small", "1.5b")


@dataclass(frozen=True)
class Setting:
    """How every variant of a run is measured."""

    size: str
    device: str
    threads: int
    batch_size: int
    warmup: int
    steps: int
    processes: int

    def make(self) -> Scale:
        """The scale, after making this process like the others."""
        torch.set_num_threads(self.threads)
        return replace(make_scale(self.size), batch_size=self.batch_size)


@dataclass(frozen=True)
class Variant:
    """A way to take training steps; the defaults are what the others are compared with.

    Args:
        attention: `attn_implementation`.
        merge_schedule: What merges inside the decoder.
        guidance: `"none"`, `"cached"` targets in the batch, or `"teacher"` on the fly; L_MSE and L_Con.
        checkpointing: Whether activations are computed again in the backward pass.
        optimizer: `"fused"` or `"foreach"` AdamW on float32 weights under bf16 autocast, or `"zero2"` of DeepSpeed.
        logits: `"labels"` for logits where labels are, `"all"` for `(B, N, vocab)`.
        rows: `"clips"`, or eight questions about one clip in `"one"` row or in `"eight"`.
        vocab_size: Of the student; the scale's own if None.
    """

    attention: str = "sdpa"
    merge_schedule: str = "none"
    guidance: str = "none"
    checkpointing: bool = False
    optimizer: str = "fused"
    logits: str = "labels"
    rows: str = "clips"
    vocab_size: int | None = None

    def obstacle(self, device: str) -> str | None:
        """Why it cannot run here."""
        if self.attention == "flash_attention_2" and not (device == "cuda" and is_flash_attn_2_available()):
            return "needs CUDA and flash-attn"
        if self.optimizer == "zero2" and not (device == "cuda" and importlib.util.find_spec("deepspeed")):
            return "needs CUDA and deepspeed"
        return None


def make_clip(scale: Scale, text_tokens: int, seed: int) -> tuple[list[int], Tensor]:
    """Ids of a clip and the words after it, and its patches as the processor gives them: 8 bits, normalised."""
    clip = Clip(scale.frames * (scale.grid,), text_tokens + 2, seed=seed)  # two borders
    patches = clip.pixels(scale.config, torch.float32)
    levels = ((patches / 4 + 0.5).clamp(0, 1) * 255).round()
    return clip.ids(scale.config), levels / 127.5 - 1


def make_batch(scale: Scale, variant: Variant) -> dict[str, Tensor]:
    """A batch on the host."""
    if variant.rows != "clips":
        return make_questions(scale, variant.rows == "one")
    clips = [make_clip(scale, scale.question + scale.caption, seed) for seed in range(scale.batch_size)]
    ids = torch.tensor([row for row, _ in clips])
    labels = ids.clone()
    labels[:, : -scale.caption] = IGNORED
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return {**batch, "pixel_values_videos": torch.cat([patches for _, patches in clips])}


def make_questions(scale: Scale, packed: bool) -> dict[str, Tensor]:
    """Eight questions about one clip, as one row or as eight."""
    turn = scale.question + scale.answer
    ids, patches = make_clip(scale, NUM_QUESTIONS * turn, seed=0)
    prefix = len(ids) - NUM_QUESTIONS * turn
    segments = torch.zeros(len(ids), dtype=torch.long)
    segments[prefix:] = torch.arange(1, NUM_QUESTIONS + 1).repeat_interleave(turn)
    ids = torch.tensor(ids)
    asked = torch.arange(NUM_QUESTIONS * turn) % turn < scale.question
    labels = torch.cat([torch.full((prefix,), IGNORED), ids[prefix:].masked_fill(asked, IGNORED)])
    sample = EncodedSample(ids, labels, patches, (scale.frames * (scale.grid,),), segments)
    samples = [sample] if packed else sample.unpack()
    return {**pad_samples(samples, 0), "pixel_values_videos": torch.cat([one.pixel_values_videos for one in samples])}


def cached_targets(scale: Scale) -> dict[str, Tensor]:
    """What a cache of teacher features would add to a batch."""
    tower, clips = scale.teacher, scale.batch_size
    side = tower["image_size"] // tower["patch_size"]
    generator = torch.Generator().manual_seed(1)
    tubes = torch.randn(clips, side, side, tower["hidden_size"], generator=generator)
    frames = torch.randn(clips * scale.frames, tower["hidden_size"], generator=generator)
    return {"teacher_tubes": tubes.bfloat16(), "teacher_frames": frames.bfloat16()}


def save_teacher(setting: Setting, folder: str) -> None:
    """Write a tower with random weights."""
    scale = setting.make()
    with torch.device(setting.device):
        SiglipVisionModel(SiglipVisionConfig(**scale.teacher)).bfloat16().save_pretrained(folder)


@dataclass
class Trainee:
    """A model with its optimiser and its batch.

    Args:
        model: In training mode; the engine with DeepSpeed.
        optimizer: None with DeepSpeed, whose engine has it.
        batch: On the host.
        variant: How steps are taken.
        device: Where they are taken.
        guards: Kept alive.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    batch: dict[str, Tensor]
    variant: Variant
    device: str
    guards: list[Any] = field(default_factory=list)

    def step(self) -> Tensor:
        """A whole optimiser step, from the batch on the host; returns the loss."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.batch.items()}
        if self.optimizer is None:
            loss = self.model(**batch).loss
            self.model.backward(loss)
            self.model.step()
            return loss.detach()
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's loss, or that of all logits."""
        if self.variant.logits == "labels":
            return self.model(**batch).loss
        labels = batch.pop("labels")
        return generative_loss(self.model.lm_head(self.model.model(**batch).last_hidden_state), labels)

    @property
    def held_bytes(self) -> int:
        """Bytes between steps: weights, and what the optimiser keeps."""
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *kept] if isinstance(tensor, Tensor))


def make_trainee(setting: Setting, variant: Variant, teacher: str) -> Trainee:
    """Build everything on the device."""
    scale = setting.make()
    config = copy.deepcopy(scale.config)
    config.text_config.vocab_size = variant.vocab_size or config.text_config.vocab_size
    if variant.guidance != "none":
        config.guidance = {"teacher_width": scale.teacher["hidden_size"]}
    dtype = torch.bfloat16 if variant.optimizer == "zero2" else torch.float32
    model = make_model(config, setting.device, dtype, variant.attention).train()
    model.set_merge_schedule(variant.merge_schedule)
    if variant.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the second name is that of transformers before 5.23
    batch, guards = make_batch(scale, variant), []
    if variant.guidance == "cached":
        batch.update(cached_targets(scale))
    if variant.guidance != "none":
        seer = VisualTeacher.from_pretrained(teacher, device=setting.device) if variant.guidance == "teacher" else None
        guards.append(GuidanceHook(seer))
        guards[0].attach(model)
    if setting.device == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    adamw = {"fused": True} if variant.optimizer != "foreach" else {"foreach": True}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, **adamw)
    if variant.optimizer == "zero2":
        model, optimizer = start_deepspeed(model, optimizer, scale.batch_size), None
    return Trainee(model, optimizer, batch, variant, setting.device, guards)


def start_deepspeed(model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int) -> nn.Module:
    """DeepSpeed's engine under the shipped ZeRO-2 settings, alone on one GPU."""
    import deepspeed

    settings = json.loads((resources.files("elva_hf.training") / "launch" / "zero2.json").read_text())
    settings["bf16"] = {"enabled": True}
    settings["gradient_clipping"] = 1.0
    settings["gradient_accumulation_steps"] = 1
    settings["train_batch_size"] = settings["train_micro_batch_size_per_gpu"] = batch_size
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    torch.distributed.init_process_group("nccl", init_method=f"file://{meeting}", rank=0, world_size=1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def run_steps(setting: Setting, variant: Variant, teacher: str = "") -> Row:
    """Measure some optimiser steps after a warm-up; figures are of one step."""
    try:
        trainee = make_trainee(setting, variant, teacher)
        for _ in range(setting.warmup):
            trainee.step()
        held = trainee.held_bytes
        with Meter(setting.device) as meter:
            losses = [trainee.step() for _ in range(setting.steps)]
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    loss = float(losses[-1])
    if loss != loss:
        raise RuntimeError(f"the loss of {variant} is not a number; figures of such steps would mean nothing.")
    tokens = trainee.batch["attention_mask"].sum()
    figures = meter.figures()
    return {
        "seconds": figures["seconds"] / setting.steps,
        "wall_seconds": figures["wall_seconds"] / setting.steps,
        "held_bytes": held,
        "peak_bytes": figures["peak_bytes"],
        "tokens": int(tokens),
        "samples": len(trainee.batch["input_ids"]),
        "supervised": int((trainee.batch["labels"] != IGNORED).sum()),
        "loss": loss,
    }


def run_matmul(setting: Setting) -> Row:
    """Measure bf16 products of square matrices: FLOP/s that this device can reach."""
    side = setting.make().matmul
    left, right = torch.randn(2, side, side, device=setting.device).bfloat16()
    repeats = 20
    for _ in range(3):
        left @ right
    with Meter(setting.device, memory=False) as meter:
        for _ in range(repeats):
            left @ right
    return {"seconds": meter.seconds, "flops_per_second": repeats * 2 * side**3 / meter.seconds}
