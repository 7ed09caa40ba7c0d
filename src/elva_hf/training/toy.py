"""Train a small ELVA on the procedural world with HF `Trainer`, on a CPU if need be.

python -m elva_hf.training.toy --recipe tiny --out runs/tiny
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from elva_hf.architectures_elva import Architecture, find_architecture
from elva_hf.configuration_elva import VideoDecoderConfig
from elva_hf.data.collator import IGNORED, PackedRow, pack_rows
from elva_hf.data.toy_rows import draw_questions, name_some_by_shape
from elva_hf.data.toy_teacher import busy_patches, teacher_features, teacher_width
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import STAGGERED_SHARE, TASKS, questions, render, sample_scene, through_codec
from elva_hf.errors_elva import ConfigurationError
from elva_hf.frames_elva import FULL_LAYOUT
from elva_hf.geometry_elva import VisualGeometry
from elva_hf.layout_elva import FrameLayout
from elva_hf.modeling_elva import ElvaForCausalLM, add_special_tokens
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.training.losses import patch_alignment_loss, tube_alignment_loss, tubes_of_patches
from elva_hf.training.muon import MuonWithAdamW
from elva_hf.training.precision import faster_dtype
from elva_hf.training.toy_recipe import ToyStage, read_recipe
from elva_hf.video_processing_elva import patchify

logger = logging.getLogger(__name__)

NUM_FRAMES = 8
"""Frames of a clip of the world, unless a stage says otherwise."""


def frames_to_patches(frames: np.ndarray, patch_size: int) -> Tensor:
    """Cut `(T, H, W, 3)` uint8 frames into `(T * rows * columns, 3 * patch_size**2)` normalised patches."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([patchify(frame, patch_size) for frame in pixels])


class ToyDataset(Dataset):
    """Videos of the world with their questions; item `i` depends on the seed and `i` alone.

    Args:
        stage: What to show.
        tokenizer: The world's tokenizer.
        length: Number of videos.
        seed: First scene seed.
        split: Split of the world.
        num_questions: Questions drawn for each video.
        patch_size: Side of a patch.
        aspects: What the teacher knows, as `teacher_features` takes it.

    Attributes:
        layout: How the model's frames are written in tokens; ELVA's unless it is set.
        arrange: Puts the pixels of all frames, `(T, n, W)`, in the order of the model's rows; likewise.
    """

    layout: FrameLayout = FULL_LAYOUT
    arrange: Callable[[Tensor], Tensor] = staticmethod(partial(torch.flatten, start_dim=0, end_dim=1))

    def __init__(
        self,
        stage: ToyStage,
        tokenizer: Any,
        *,
        length: int,
        seed: int,
        split: str,
        num_questions: int,
        patch_size: int,
        aspects: Sequence[str] = ("looks",),
    ):
        self.stage, self.tokenizer, self.length, self.aspects = stage, tokenizer, length, aspects
        self.seed, self.split, self.num_questions, self.patch_size = seed, split, num_questions, patch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(self.seed * 1_000_003 + index)
        single = rng.random() < self.stage.single_share
        scene = sample_scene(
            self.seed + index,
            num_frames=self.stage.num_frames,
            split=self.split,
            single=single,
            staggered_share=self.stage.staggered_share,
        )
        clean = render(scene)
        frames = through_codec(clean) if rng.random() < self.stage.codec_share else clean
        asked = name_some_by_shape(questions(scene), scene, rng, self.stage.shape_name_share)
        asked = draw_questions(asked, self.num_questions, rng, self.stage.focus or {})
        grid = (frames.shape[1] // self.patch_size, frames.shape[2] // self.patch_size)
        return {
            "row": encode_turns(
                self.tokenizer, len(frames), grid, [(q.text, q.answer) for q in asked], layout=self.layout
            ),
            "patches": self.arrange(frames_to_patches(frames, self.patch_size).unflatten(0, (len(frames), -1))),
            "teacher": self._teach(clean),
            "tasks": [q.task for q in asked],
        }

    def _teach(self, frames: np.ndarray) -> Tensor | None:
        if not self.stage.is_guided:
            return None
        features = torch.from_numpy(teacher_features(frames, self.patch_size, self.aspects))
        chunks = [chunk.mean(0) for chunk in features.split(self.layout.chunk_size)]  # a frame, or what stands as one
        return torch.stack(chunks).flatten(0, 2)


def encode_turns(
    tokenizer: Any,
    num_frames: int,
    grid: tuple[int, int],
    turns: Sequence[tuple[str, str]],
    *,
    layout: FrameLayout = FULL_LAYOUT,
) -> PackedRow:
    """Tokenise one video and its questions exactly as the processor does a single chat turn."""
    frames = layout.write(grid, "<FRAME>", "<LINE>", "<video>") * -(-num_frames // layout.chunk_size)
    prefix = encode_text(tokenizer, "<|im_start|>user\n<|vision_start|>" + frames + "<|vision_end|>")
    return PackedRow(
        list(prefix),
        [
            (
                list(encode_text(tokenizer, f"{text}<|im_end|>\n<|im_start|>assistant\n")),
                list(encode_text(tokenizer, f"{answer}<|im_end|>")),
            )
            for text, answer in turns
        ],
    )


@lru_cache(maxsize=4096)
def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text; the world repeats its sentences, so each is tokenised once."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def collate(items: Sequence[dict[str, Any]], pad_token_id: int, *, merges: bool = False) -> dict[str, Any]:
    """Batch the items of a `ToyDataset`; `merges` as in `pack_rows`."""
    batch = {
        **pack_rows([item["row"] for item in items], pad_token_id, merges=merges),
        "pixel_values_videos": torch.cat([item["patches"] for item in items]),
    }
    if items[0]["teacher"] is not None:
        batch["teacher_features"] = torch.cat([item["teacher"] for item in items])
    return batch


class ToyTrainer(Trainer):
    """HF Trainer that adds the stage's alignment to the teacher to the generative loss and logs both."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, stage: ToyStage, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stage = stage
        self.parts: dict[str, list[float]] = {"loss_gen": [], "loss_mse": []}

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        teacher = inputs.pop("teacher_features", None)
        loss, outputs = super().compute_loss(
            model, {**inputs, "output_hidden_states": teacher is not None}, return_outputs=True, **kwargs
        )
        self.parts["loss_gen"].append(loss.item())
        if teacher is not None:
            geometry = model.model.read_geometry(inputs["input_ids"])
            student = model.guidance.tube_head(outputs.hidden_states[-1].flatten(0, 1)[geometry.patch_index])
            error = self._align(student, teacher, geometry)
            self.parts["loss_mse"].append(error.item())
            loss = loss + error
        return (loss, outputs) if return_outputs else loss

    def _align(self, student: Tensor, teacher: Tensor, geometry: VisualGeometry) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        if weight := self.stage.tube_alignment_weight:
            total = total + weight * tube_alignment_loss(student, tubes_of_patches(teacher, geometry), geometry)
        if weight := self.stage.patch_alignment_weight:
            busy = torch.from_numpy(busy_patches(teacher.cpu().numpy())).to(teacher.device)
            total = total + weight * patch_alignment_loss(student, teacher, 1 + self.stage.busy_weight * busy)
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for name, values in self.parts.items():
            if values and "loss" in logs:
                logs[name] = round(sum(values) / len(values), 4)
                values.clear()
        super().log(logs, *args, **kwargs)


class ToyValidation(TrainerCallback):
    """Exact match of teacher-forced greedy answers on the validation split, every so many steps."""

    def __init__(self, dataset: ToyDataset, every: int, pad_token_id: int, out: Path):
        self.dataset, self.every, self.pad_token_id, self.out = dataset, every, pad_token_id, out

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.dataset.stage.stop_after
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            scores = validate(model, self.dataset, self.pad_token_id)
            logger.info("%s step %d %s", self.dataset.stage.name, state.global_step, scores)
            save(model, self.out / "last")


@torch.no_grad()
def validate(model: nn.Module, dataset: ToyDataset, pad_token_id: int, batch_size: int = 20) -> dict[str, float]:
    """Share of answers that are right in every token, per task."""
    model.eval()
    right: dict[str, list[bool]] = {}
    for start in range(0, len(dataset), batch_size):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = collate(items, pad_token_id, merges=bool(model.config.resolve_merge_schedule()))
        labels = batch.pop("labels")
        batch.pop("teacher_features", None)
        guesses = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        wrong = (guesses != labels[:, 1:]) & (labels[:, 1:] != IGNORED)
        for i, item in enumerate(items):
            at = len(item["row"].prefix)
            for task, (question, answer) in zip(item["tasks"], item["row"].turns, strict=True):
                stop = at + len(question) + len(answer)
                right.setdefault(task, []).append(not wrong[i, at - 1 : stop - 1].any())
                at = stop
    model.train()
    return {task: round(float(np.mean(right[task])), 3) for task in TASKS if task in right}


def save(model: ElvaForCausalLM, folder: Path) -> None:
    """Save the student, without the head that only training needs; stored in bfloat16, loaded in float32."""
    state = {name: value.bfloat16() for name, value in model.state_dict().items() if not name.startswith("guidance.")}
    guidance, model.config.guidance = model.config.guidance, None
    model.save_pretrained(folder, state_dict=state)
    model.config.guidance = guidance


def run_stage(model: ElvaForCausalLM, stage: ToyStage, recipe: dict[str, Any], tokenizer: Any, out: Path) -> None:
    """Train one stage through HF Trainer."""
    if stage.merge_schedule is not None:
        model.set_merge_schedule(stage.merge_schedule)
    merges = bool(model.config.resolve_merge_schedule())
    if not torch.cuda.is_available():
        model.set_attn_implementation("eager")  # the faster one for short rows
    common = {
        "num_questions": stage.questions_per_video or recipe["questions_per_video"],
        "patch_size": model.config.patch_size,
        "aspects": recipe.get("teacher", ["looks"]),
    }
    train = ToyDataset(
        stage,
        tokenizer,
        length=stage.max_steps * stage.batch_size,
        seed=recipe["seed"] + stage.first_seed,
        split="train",
        **common,
    )
    as_tested = replace(
        stage,
        staggered_share=STAGGERED_SHARE,
        shape_name_share=0.0,
        tube_alignment_weight=0.0,
        patch_alignment_weight=0.0,
    )
    held_out = ToyDataset(as_tested, tokenizer, length=200, seed=0, split="validation", **common)
    for shown in (train, held_out):
        shown.layout, shown.arrange = model.config.frame_layout, model.config.arrange_pixels
    arguments = TrainingArguments(
        output_dir=str(out / stage.name),
        max_steps=stage.max_steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        **_schedule(stage),
        warmup_steps=stage.warmup_steps,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=faster_dtype("cuda" if torch.cuda.is_available() else "cpu") == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=1,
        seed=recipe["seed"],
        disable_tqdm=True,
    )
    trainer = ToyTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        data_collator=lambda items: collate(items, tokenizer.pad_token_id, merges=merges),
        stage=stage,
        optimizers=(_muon(model, stage), None),
        callbacks=[ToyValidation(held_out, 250, tokenizer.pad_token_id, out)],
    )
    trainer.train()
    model.set_attn_implementation("sdpa")


def _schedule(stage: ToyStage) -> dict[str, Any]:
    """Arguments of HF Trainer: a cosine, or flat with a linear tail."""
    if stage.decay_share is None:
        return {"lr_scheduler_type": "cosine"}
    tail = round(stage.decay_share * stage.max_steps)
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": tail, "decay_type": "linear"},
    }


def _muon(model: nn.Module, stage: ToyStage) -> MuonWithAdamW | None:
    if stage.muon_learning_rate is None:
        return None
    return MuonWithAdamW(model, stage.learning_rate, stage.muon_learning_rate, stage.weight_decay)


def build_config(system: Architecture, recipe: dict[str, Any], tokenizer: Any) -> VideoDecoderConfig:
    """The configuration of a recipe's `preset`, with the tokenizer's ids, its `config` and its `text_config`."""
    config = system.config.from_preset(recipe["preset"], **add_special_tokens(tokenizer), **recipe.get("config", {}))
    text = {**config.text_config.to_dict(), "vocab_size": len(tokenizer), **recipe.get("text_config", {})}
    text.pop("layer_types", None)  # as many as there were layers
    config.text_config = type(config.text_config)(**text)
    return config


def build_model(recipe: dict[str, Any], tokenizer: Any) -> ElvaForCausalLM:
    """A fresh model of the recipe's architecture and preset, with the task head of the teacher attached."""
    system = find_architecture(recipe.get("architecture", "elva"))
    model = system.causal_lm(build_config(system, recipe, tokenizer))
    model.set_guidance({"teacher_width": teacher_width(recipe.get("teacher", ["looks"])), "frame_weight": 0.0})
    generation = model.generation_config
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model


def build_processor(tokenizer: Any, config: VideoDecoderConfig) -> ElvaProcessor:
    """The processor of a toy model: eight frames, all at high resolution."""
    options = config.video_options
    if "num_high_res_frames" not in options:
        options["num_frames"] = NUM_FRAMES  # Mavors reads by frames per second, which arrays have not
    return find_architecture(config.model_type).processor.from_tokenizer(tokenizer, **options)


def stages_from(stages: list[ToyStage], name: str | None) -> list[ToyStage]:
    """The stages from the named one on.

    Raises:
        ConfigurationError: No stage has this name.
    """
    names = [stage.name for stage in stages]
    if name is not None and name not in names:
        raise ConfigurationError(f"the recipe has no stage {name!r}; it has {', '.join(names)}.")
    return stages if name is None else stages[names.index(name) :]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a recipe from its first stage to its last and save the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tiny", help="name in training/recipes, or a path")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the log")
    parser.add_argument("--seed", type=int, help="overrides the recipe's seed")
    parser.add_argument("--start-at", help="first stage to run; the weights are those of --weights")
    parser.add_argument("--weights", type=Path, help="saved model to start from")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe, stages = read_recipe(options.recipe)
    recipe["seed"] = recipe["seed"] if options.seed is None else options.seed
    set_seed(recipe["seed"])
    tokenizer = build_toy_tokenizer()
    model = build_model(recipe, tokenizer)
    if options.weights is not None:
        saved = type(model).from_pretrained(options.weights)
        model.load_state_dict(saved.state_dict(), strict=False)  # all but the task head
        model.set_merge_schedule(saved.config.merge_schedule)
    for stage in stages_from(stages, options.start_at):
        run_stage(model, stage, recipe, tokenizer, options.out)
    save(model, options.out / "model")
    build_processor(tokenizer, model.config).save_pretrained(options.out / "model")


if __name__ == "__main__":
    main()
