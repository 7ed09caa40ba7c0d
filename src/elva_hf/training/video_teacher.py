"""The video-pretrained image towers of Table 4: an image tower and a text tower learn clips and their captions.

A clip is the mean of what the image tower makes of its frames; the loss is symmetric InfoNCE over the pairs of a
micro-batch on all processes, as the paper trains its towers with BERT on WebVid and HD-VILA. The result is a plain
checkpoint of transformers, whose image tower `VisualTeacher` loads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from elva_hf.chat_elva import check_conversation, take_media
from elva_hf.data.batching import ShuffledSampler
from elva_hf.data.datasets import BAD, BadSamples, describe_row, substitutes
from elva_hf.data.mixtures import Mixture
from elva_hf.errors_elva import CheckpointError, ConfigurationError, ElvaError
from elva_hf.training.checkpoints import SafeCheckpoints, last_complete_checkpoint
from elva_hf.training.losses import frame_contrastive_loss
from elva_hf.training.nonfinite import NonFiniteGuard
from elva_hf.training.run_folder import BAD_SAMPLES, check_same_run, start_over, write_record
from elva_hf.training.sections import DataSection, ModelSection, Stage, TrainingSection
from elva_hf.training.towers import PixelSettings, find_family, load_tower, prepare_frames, read_pixel_settings
from elva_hf.video_processing_elva import ElvaVideoProcessor

logger = logging.get_logger(__name__)

MAX_LOGIT_SCALE = 100.0
PROCESSORS = {"SiglipVisionModel": "SiglipImageProcessor", "CLIPVisionModel": "CLIPImageProcessor"}
"""Towers that can be trained, and the image processor that their checkpoint names."""


@dataclass(frozen=True)
class VideoTeacherRecipe:
    """Body of a recipe of `kind: video_teacher`.

    Args:
        data: Rows of one clip (or image) and what the assistant says of it, its caption.
        training: How; L_Con's negatives are the `per_device_train_batch_size` clips of all GPUs.
        model: A whole SigLIP or CLIP, or a vision-text-dual-encoder; or else the next two.
        vision_model: Image tower, SigLIP or CLIP.
        text_model: Text tower, a BERT for example.
        projection_dim: Width in which the two towers meet; of a whole model its own.
        num_frames: Frames of a clip.
        max_text_length: Tokens of a caption; longer ones are cut, which is said once.
        logit_scale_init: Log of the scale of cosines at the start; the checkpoint's own if None.
        gradient_checkpointing: Recompute activations in the backward pass.
        resume: `"auto"` goes on from the last complete checkpoint, `"never"` starts over.
    """

    data: DataSection
    training: TrainingSection
    model: str | None = None
    vision_model: str | None = None
    text_model: str | None = None
    projection_dim: int = 512
    num_frames: int = 8
    max_text_length: int = 64
    logit_scale_init: float | None = None
    gradient_checkpointing: bool = False
    resume: str = "auto"

    def __post_init__(self) -> None:
        pair = self.vision_model is not None and self.text_model is not None
        if (self.model is None) != pair or (self.model is not None and (self.vision_model or self.text_model)):
            raise ConfigurationError("give model, or vision_model and text_model; one of the two.")
        for name in ("projection_dim", "num_frames", "max_text_length"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if self.resume not in ("auto", "never"):
            raise ConfigurationError(f"resume={self.resume!r}: expected auto or never.")
        if self.data.streaming:
            raise ConfigurationError("data.streaming: a video teacher reads its rows by index; write false.")

    @property
    def stage(self) -> Stage:
        """What it shares with other recipes."""
        model = ModelSection(path=self.model, gradient_checkpointing=self.gradient_checkpointing)
        return Stage(name="video_teacher", model=model, data=self.data, training=self.training)


def train_video_teacher(recipe: VideoTeacherRecipe, output_dir: Path) -> Path:
    """Train an image tower on clips and their captions.

    Args:
        recipe: What to train, on what, how.
        output_dir: For checkpoints and the model.

    Returns:
        The folder `model` in it: model, tokenizer and pixel settings, usable as `teacher`.

    Raises:
        ConfigurationError: A recipe that cannot be run.
        CheckpointError: Weights or checkpoints that cannot be loaded.
    """
    from transformers import set_seed

    from elva_hf.training.run import explained_workers, is_main_process, num_processes, save_model, training_arguments

    output_dir = Path(output_dir)
    if recipe.resume == "never":
        start_over(recipe.stage, output_dir, remove=is_main_process())
    arguments = training_arguments(recipe.stage, output_dir)
    with arguments.main_process_first(desc="looking for what is there"):
        checkpoint = last_complete_checkpoint(output_dir) if recipe.resume == "auto" else None
        if checkpoint is not None:
            check_same_run(recipe, output_dir, num_processes())
    rows = Mixture(recipe.data.sources, seed=recipe.training.seed, shuffle=False)
    set_seed(recipe.training.seed)
    model, tokenizer, pixels = load_dual_encoder(recipe)
    clips = ClipCaptions(
        rows,
        pixels,
        num_frames=recipe.num_frames,
        seed=recipe.training.seed,
        bad_samples=BadSamples(output_dir / BAD_SAMPLES, recipe.data.max_bad_fraction, min_samples=100),
    )
    trainer = ClipCaptionTrainer(
        model=model,
        args=arguments,
        train_dataset=clips,
        data_collator=ClipCaptionCollator(tokenizer, recipe.max_text_length),
        callbacks=[NonFiniteGuard(recipe.training.max_nonfinite_steps)],
    )
    if trainer.is_world_process_zero():
        write_record(recipe, output_dir, num_processes())
    with explained_workers():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return save_model(trainer, _Settings(tokenizer, pixels, model), output_dir / "model")


def load_dual_encoder(recipe: VideoTeacherRecipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PixelSettings]:
    """The two towers of a recipe, the tokenizer of the text tower, and what the image tower expects of pixels.

    Raises:
        ConfigurationError: An image tower that is neither SigLIP's nor CLIP's.
        CheckpointError: Weights that cannot be loaded.
    """
    vision, text = recipe.model or recipe.vision_model, recipe.model or recipe.text_model
    try:
        config = AutoConfig.from_pretrained(vision)
        config = getattr(config, "vision_config", config)
        family = find_family(config.model_type, vision)
        if family.tower not in PROCESSORS:
            raise ConfigurationError(f"{vision} is a {family.tower}; choose a SigLIP or CLIP image tower.")
        model = AutoModel.from_pretrained(vision) if recipe.model else _join_towers(recipe)
        tokenizer = AutoTokenizer.from_pretrained(text)
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{vision} with {text} cannot be loaded: {error}") from error
    if not hasattr(model, "logit_scale"):
        raise ConfigurationError(f"model={vision} has no text tower; give it as vision_model, with a text_model.")
    model.float().requires_grad_(True)
    if getattr(model, "logit_bias", None) is not None:
        model.logit_bias.requires_grad_(False)  # InfoNCE does not depend on it, so it never has a gradient
    if recipe.logit_scale_init is not None:
        nn.init.constant_(model.logit_scale, recipe.logit_scale_init)
    size = config.image_size
    pixels = read_pixel_settings(vision, None, family, (size, size))
    return model, tokenizer, pixels


class ClipCaptions(Dataset):
    """Clips as an image tower takes them, with their captions; a bad one is replaced as in `ElvaDataset`.

    Args:
        rows: Chat rows with one video or image each; what the assistant says is the caption.
        pixels: Of the tower.
        num_frames: Of a clip.
        seed: Of the substitutes.
        bad_samples: Takes rows that cannot be used.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        pixels: PixelSettings,
        *,
        num_frames: int,
        seed: int,
        bad_samples: BadSamples,
    ):
        self.rows, self.pixels, self.seed, self.bad_samples = rows, pixels, seed, bad_samples
        self.epoch = 0
        edge = 2 * max(pixels.image_size)  # more than the tower's, so that little of a wide picture's height is lost
        self.processor = ElvaVideoProcessor(patch_size=1, longest_edge=edge, num_frames=num_frames)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        candidates = substitutes(index, len(self), seed=self.seed, epoch=0)
        for candidate, following in pairwise(candidates):
            row: Any = None
            try:
                row = self.rows[candidate]
                clip = self.encode(row)
            except BAD as error:
                facts = describe_row(row, error, index=candidate, epoch=0)
                self.bad_samples.add(error, **facts, replaced_by=following)
                last = error
            else:
                self.bad_samples.count()
                return clip
        raise self.bad_samples.stop("the last of them one after another", last) from last

    def encode(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`frames` `(T, 3, H, W)` and `caption` of a row.

        Raises:
            ElvaError: It has no caption, or not one clip.
            VideoError: The clip cannot be read.
        """
        source, is_image, caption = read_clip(row)
        with self.processor.open([source], images=[is_image]) as (video,):
            _, frames = video.read(video.sample())
        return {"frames": prepare_frames(frames, self.pixels), "caption": caption}

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is."""
        self.epoch = epoch


def read_clip(row: Mapping[str, Any]) -> tuple[Any, bool, str]:
    """The clip of a row, whether it is an image, and its caption: what the assistant says, turns joined by blanks.

    Raises:
        ElvaError: It has no caption, or not one clip.
    """
    chat = check_conversation(row["messages"], join_texts=True)
    spoken = [message.get("content") for message in chat if message["role"] == "assistant"]
    media = take_media([chat])
    found = [(source, kind == "image") for kind, (sources,) in media.items() for source in sources]
    texts = [
        content if isinstance(content, str) else " ".join(block["text"] for block in content) for content in spoken
    ]
    caption = " ".join(text.strip() for text in texts if text and text.strip())
    if len(found) != 1 or not caption:
        raise ElvaError(
            f"a pair is one clip and its caption; this row has {len(found)} clips and says {caption!r:.40}."
        )
    return *found[0], caption


class ClipCaptionCollator:
    """Puts clips and captions together as a batch.

    Args:
        tokenizer: Of the text tower.
        max_length: Tokens that every caption is padded to, as SigLIP was trained, or cut to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        captions = [item["caption"] for item in items]
        longest = max(len(ids) for ids in self.tokenizer(captions, truncation=False)["input_ids"])
        if longest > self.max_length:
            logger.warning_once(f"captions of more than max_text_length={self.max_length} tokens are cut to it.")
        text = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            padding_side="right",
            return_tensors="pt",
        )
        return {
            **text,
            "pixel_values": torch.cat([item["frames"] for item in items]),
            "frames_per_clip": torch.tensor([len(item["frames"]) for item in items]),
        }


class ClipCaptionTrainer(SafeCheckpoints, Trainer):
    """HF Trainer whose model is a dual encoder and whose loss is InfoNCE between clips and captions."""

    loss_is_scaled_for_ga = False

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> ShuffledSampler:
        return ShuffledSampler(self.train_dataset, seed=self.args.seed)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        towers = {name: value for name, value in inputs.items() if name != "frames_per_clip"}
        log_scale = self.accelerator.unwrap_model(model).logit_scale
        with torch.no_grad():
            log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        outputs = model(**towers)
        loss = clip_caption_loss(
            outputs.image_embeds, outputs.text_embeds, inputs["frames_per_clip"], log_scale.float().exp()
        )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            log_scale = self.accelerator.unwrap_model(self.model).logit_scale
            logs["logit_scale"] = round(float(log_scale.detach().exp()), 4)
        super().log(logs, *args, **kwargs)


def clip_caption_loss(
    frame_embeds: Tensor, text_embeds: Tensor, frames_per_clip: Tensor, logit_scale: Tensor, group: Any = None
) -> Tensor:
    """Symmetric InfoNCE between the frame means of clips and their captions, over all processes.

    Args:
        frame_embeds: `(F, D)` of the frames of all clips, in order.
        text_embeds: `(B, D)` of their captions.
        frames_per_clip: `(B,)`, whose sum is F.
        logit_scale: What cosines are multiplied by.
        group: See `frame_contrastive_loss`.
    """
    clip = torch.arange(len(text_embeds), device=frame_embeds.device)
    clip = clip.repeat_interleave(frames_per_clip, output_size=len(frame_embeds))
    sums = torch.zeros(len(text_embeds), frame_embeds.shape[1], device=frame_embeds.device)
    means = sums.index_add(0, clip, frame_embeds.float()) / frames_per_clip[:, None]
    return frame_contrastive_loss(means, text_embeds, logit_scale, group=group)


@dataclass(frozen=True)
class _Settings:
    """What stands beside the weights of a saved model."""

    tokenizer: PreTrainedTokenizerBase
    pixels: PixelSettings
    model: PreTrainedModel

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        height, width = self.pixels.image_size
        vision = self.model.config.vision_config
        fields = {
            "image_processor_type": PROCESSORS[find_family(vision.model_type, str(folder)).tower],
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 3 if self.pixels.resample == "bicubic" else 2,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.pixels.mean),
            "image_std": list(self.pixels.std),
        }
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _join_towers(recipe: VideoTeacherRecipe) -> PreTrainedModel:
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    vision, text = load_tower(recipe.vision_model).model, AutoModel.from_pretrained(recipe.text_model)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=recipe.projection_dim
    )
    return VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)
