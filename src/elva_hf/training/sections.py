"""Sections of a recipe as strict dataclasses; which values the paper has is in the files of `training/recipes/`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from elva_hf.data.mixtures import DataSource
from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.lora import LoraOptions

WEIGHT_SOURCES = ("path", "text_model", "preset")
"""Where the weights of a model come from; one replaces another."""

PARTS = ("patch_embed", "image_tower", "aggregator", "projector", "guidance", "language_model", "lm_head")
"""Names that `trainable` takes; the second to the fourth are parts of the first in Mavors."""


@dataclass(frozen=True)
class ModelSection:
    """The model, and what of it is for training only.

    Args:
        path: Checkpoint of ours to start from.
        text_model: Text model to put a fresh visual front end on (Hub id or folder).
        image_tower: SigLIP image tower that a fresh Mavors starts from, beside `text_model` (Hub id or folder).
        architecture: What is built on a text model or a preset: `elva`, `mavors` or `video-panda`; a path says itself.
        preset: Fresh random weights of a shape: `elva-1.5b`, `elva-7b`, `elva-7b-hd`, `tiny`; a sibling has its own.
        shape: Preset that a plan counts with while the weights are not at hand.
        tokenizer: Of a preset; the toy world's if None.
        dtype: Of the weights; float32 is what mixed precision and ZeRO keep a master copy of.
        attn_implementation: As in transformers.
        merge_schedule: Where tokens merge from this stage on (section 3.1); None keeps the checkpoint's.
        gradient_checkpointing: Recompute activations in the backward pass.
        config: Other fields of the configuration, of a fresh model.
    """

    path: str | None = None
    text_model: str | None = None
    image_tower: str | None = None
    architecture: str = "elva"
    preset: str | None = None
    shape: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    merge_schedule: str | list | dict | None = None
    gradient_checkpointing: bool = False
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoSection:
    """Frames of a video and their size; None keeps the model's.

    The saved model and processor take over the edges. How many frames they take of a video stays as it was: at
    inference that is the hybrid of section 3.4, not the number that is trained on.

    Args:
        longest_edge: Ceiling of the longest side in pixels.
        low_res_longest_edge: The same for low-resolution frames.
        num_frames: Frames, all at high resolution; or the next two, or `fps`.
        num_high_res_frames: High-resolution frames.
        num_low_res_frames: Low-resolution frames.
        fps: Frames per second of video.
        max_chunks: The most chunks of a video, of Mavors.
        sub_images: Whether images are cut into sub-images, of Mavors.
    """

    longest_edge: int | None = None
    low_res_longest_edge: int | None = None
    num_frames: int | None = None
    num_high_res_frames: int | None = None
    num_low_res_frames: int | None = None
    fps: float | None = None
    max_chunks: int | None = None
    sub_images: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What is given, as options of the video processor."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class GuidanceSection:
    """The losses of section 3.2 and their teacher.

    Args:
        teacher: Vision encoder (Hub id or folder); None if all its features are in `cache`.
        revision: Of the teacher, on the Hub.
        layer: Hidden state it is read at; -2 is the penultimate layer (section 3.2).
        cache: Folder of features written by `elva teach`.
        tube_weight: Weight of L_MSE (Eq. 4); 0 for none.
        frame_weight: Weight of L_Con (Eq. 4); 0 for none.
        patch_weight: Weight of Video-Panda's distillation (its Eq. 19); 0 for none. Needs a teacher, not a cache.
        patch_loss: `"cosine"` or `"mse"` (its Table 5).
        mask_same_video: Whether frames of the same video are no negatives of each other.
        grad_cache: Whether L_Con sees the whole step's frames, not a micro-batch's, for a second forward pass.
        teacher_dtype: Of the teacher's weights.
    """

    teacher: str | None = None
    revision: str | None = None
    layer: int = -2
    cache: str | None = None
    tube_weight: float = 1.0
    frame_weight: float = 1.0
    patch_weight: float = 0.0
    patch_loss: Literal["cosine", "mse"] = "cosine"
    mask_same_video: bool = False
    grad_cache: bool = False
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


@dataclass(frozen=True)
class PreferenceSection:
    """Direct preference optimisation instead of L_Gen; the rows of `data` are pairs (`training.preference`).

    Args:
        beta: How far the model may go from what it was.
    """

    beta: float = 0.1


@dataclass(frozen=True)
class DataSection:
    """What is trained on.

    Args:
        sources: Data sets by name; their `path` may be empty in a file that is still to be filled in.
        packing: `"shared_prefix"` answers all questions about a video in one row, each seeing the video and itself.
        group_by_length: Whether batches hold rows of similar length.
        streaming: Whether sources are read from front to back instead of by index.
        max_bad_fraction: Share of samples that may be unreadable before the run stops.
        num_workers: Processes that load data, for each GPU.
        pad_to_multiple_of: Length of batches.
    """

    sources: dict[str, DataSource]
    packing: Literal["none", "shared_prefix"] = "none"
    group_by_length: bool = False
    streaming: bool = False
    max_bad_fraction: float = 0.01
    num_workers: int = 4
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class TrainingSection:
    """How it is trained: names of `transformers.TrainingArguments`, and `batch_size`, `warmup_ratio`.

    Args:
        batch_size: Samples of an optimiser step, over all GPUs and micro-batches.
        learning_rates: Other learning rates of some parts, by the names that `trainable` takes.
        lr_scheduler_kwargs: As in `TrainingArguments`, for example the lowest rate of `cosine_with_min_lr`.
        warmup_ratio: Share of the steps in which the learning rate rises.
        optim: None for AdamW, fused where there is a GPU.
    """

    batch_size: int
    per_device_train_batch_size: int
    learning_rate: float
    learning_rates: dict[str, float] = field(default_factory=dict)
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_ratio: float = 0.0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    weight_decay: float = 0.0
    optim: str | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1.0e-8
    max_grad_norm: float = 1.0
    bf16: bool = True
    tf32: bool | None = None
    use_cpu: bool = False
    seed: int = 0
    deepspeed: str | None = None
    save_steps: int = 500
    save_total_limit: int | None = 3
    logging_steps: int = 10
    report_to: str = "none"
    max_nonfinite_steps: int = 10
    ddp_timeout: int = 1800
    torch_compile: bool = False


@dataclass(frozen=True)
class Stage:
    """One training run from a model to a model."""

    name: str
    model: ModelSection
    data: DataSection
    training: TrainingSection
    video: VideoSection = VideoSection()
    guidance: GuidanceSection | None = None
    preference: PreferenceSection | None = None
    trainable: Literal["all"] | list[str] = "all"
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        _check_trainable(self)
        _check_training(self.training)
        given = [name for name in WEIGHT_SOURCES if getattr(self.model, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"model.{' and model.'.join(given)} are given; keep one of them.")
        if self.model.image_tower is not None and self.model.text_model is None:
            raise ConfigurationError(
                f"model.image_tower={self.model.image_tower} goes with a fresh model on model.text_model; write "
                "image_tower: null."
            )
        _check_fractions(self.data)
        _check_frames(self.video)
        if self.guidance is not None:
            _check_guidance(self.guidance)
        if self.preference is not None:
            _check_preference(self)

    def accumulation_steps(self, num_processes: int) -> int:
        """Micro-batches of an optimiser step on each GPU.

        Raises:
            ConfigurationError: The global batch is no multiple of what all GPUs take at a time.
        """
        training = self.training
        at_once = num_processes * training.per_device_train_batch_size
        if training.batch_size % at_once:
            raise ConfigurationError(
                f"training.batch_size={training.batch_size} is no multiple of {num_processes} processes x "
                f"training.per_device_train_batch_size={training.per_device_train_batch_size} = {at_once}; "
                "change the latter or the number of processes."
            )
        return training.batch_size // at_once

    def missing(self) -> list[str]:
        """Dotted fields that must be filled in before training: weights, teacher, paths of the data."""
        empty = [] if any(getattr(self.model, name) for name in WEIGHT_SOURCES) else ["model.path"]
        if self.guidance is not None and self.guidance.teacher is None and self.guidance.cache is None:
            empty.append("guidance.teacher")
        for name, source in self.data.sources.items():
            if source.is_missing:
                empty.append(f"data.sources.{name}.path")
        return empty if self.data.sources else [*empty, "data.sources.NAME.path"]


def _check_trainable(stage: Stage) -> None:
    if stage.trainable == "all":
        return
    unknown = [name for name in stage.trainable if name not in PARTS]
    if unknown or not stage.trainable:
        raise ConfigurationError(f"trainable={stage.trainable}: expected all, or a list of {', '.join(PARTS)}.")
    if stage.lora is not None:
        raise ConfigurationError("trainable and lora are both given; modules_to_save of lora says what else trains.")


def _check_guidance(guidance: GuidanceSection) -> None:
    if not (guidance.tube_weight or guidance.frame_weight or guidance.patch_weight):
        raise ConfigurationError(
            "guidance.tube_weight and guidance.frame_weight are both 0, and patch_weight too; write guidance: null."
        )
    if guidance.patch_weight and guidance.teacher is None and guidance.cache is not None:
        raise ConfigurationError("guidance.patch_weight needs guidance.teacher: a cache has no features of patches.")


def _check_preference(stage: Stage) -> None:
    if not stage.preference.beta > 0:
        raise ConfigurationError(f"preference.beta={stage.preference.beta}: expected more than 0.")
    if stage.guidance is not None or stage.data.streaming or stage.data.packing != "shared_prefix":
        raise ConfigurationError(
            "preference goes with data.packing=shared_prefix, and neither with guidance nor with data.streaming."
        )


def _check_training(training: TrainingSection) -> None:
    for name in ("batch_size", "per_device_train_batch_size", "learning_rate", "save_steps", "logging_steps"):
        if getattr(training, name) <= 0:
            raise ConfigurationError(f"training.{name}={getattr(training, name)}: expected more than 0.")
    for part, rate in training.learning_rates.items():
        if part not in PARTS or isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
            raise ConfigurationError(
                f"training.learning_rates.{part}={rate!r}: expected a rate above 0 for one of {', '.join(PARTS)}."
            )
    if not 0 <= training.warmup_ratio < 1:
        raise ConfigurationError(f"training.warmup_ratio={training.warmup_ratio}: expected 0 or more, below 1.")
    if training.max_steps <= 0 and training.max_steps != -1:
        raise ConfigurationError(f"training.max_steps={training.max_steps}: expected more than 0, or -1 for epochs.")


def _check_frames(video: VideoSection) -> None:
    pair = "num_high_res_frames and num_low_res_frames"
    ways = {pair: video.num_high_res_frames is not None or video.num_low_res_frames is not None}
    ways |= {"num_frames": video.num_frames is not None, "fps": video.fps is not None}
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise ConfigurationError(f"video: {' and '.join(given)} are given; keep one way to count frames.")


def _check_fractions(data: DataSection) -> None:
    if not 0 <= data.max_bad_fraction < 1:
        raise ConfigurationError(f"data.max_bad_fraction={data.max_bad_fraction}: expected 0 or more, below 1.")
    if data.num_workers < 0:
        raise ConfigurationError(f"data.num_workers={data.num_workers}: expected 0 or more.")
