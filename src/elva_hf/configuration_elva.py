"""ElvaConfig: every number of the paper that belongs to a model, each with its section.

Numbers of training (learning rates, batch sizes, data) belong to the recipes. What the paper leaves
open is listed with its reason in `docs/paper-gaps.md`.
"""

# No `from __future__ import annotations` here: @strict does not check a type that is a string.
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .errors_elva import ConfigurationError
from .layout_elva import FrameLayout
from .peft_elva import register_lora_targets
from .schedule_elva import MergeSchedule, check_similarity_threshold, check_target_ratio, plain_schedule

SPECIAL_TOKENS = {
    "video_start_token": "<|vision_start|>",
    "video_end_token": "<|vision_end|>",
    "video_token": "<video>",
    "frame_token": "<FRAME>",
    "line_token": "<LINE>",
    "image_token": "<image>",
}
"""Config key (without `_id`) of each special token, and its default spelling (section 3.1)."""

TOKEN_ID_FIELDS = tuple(f"{name}_id" for name in SPECIAL_TOKENS)

VIDEO_FIELDS = ("patch_size", "longest_edge", "low_res_longest_edge", "num_high_res_frames", "num_low_res_frames")
"""Fields that a configuration and a video processor share."""

GUIDANCE_DEFAULTS = {
    "tube_weight": 1.0,  # of L_MSE in Eq. 4
    "frame_weight": 1.0,  # of L_Con in Eq. 4
    "logit_scale_init": math.log(1 / 0.07),  # log tau of Eq. 3; CLIP's
    "mask_same_video": False,
    "patch_weight": 0.0,  # of Video-Panda's distillation, its Eq. 19
    "patch_loss": "cosine",  # or "mse", its Table 5
}
"""Fields of `ElvaConfig.guidance` and their defaults; `teacher_width` has none."""


PATCH_LOSSES = ("cosine", "mse")
"""How a patch is compared with the teacher's: minus the cosine, or the mean squared error."""


def complete_guidance(guidance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Check `ElvaConfig.guidance` and fill in its defaults.

    Raises:
        ConfigurationError: A field is unknown, missing or of the wrong type, or nothing would be learned.
    """
    if guidance is None:
        return None
    if not isinstance(guidance, Mapping):
        raise ConfigurationError(f"guidance={guidance!r}: expected None or a dict such as {{'teacher_width': 1152}}.")
    known = ("teacher_width", *GUIDANCE_DEFAULTS)
    if unknown := sorted(map(str, guidance.keys() - set(known))):
        raise ConfigurationError(f"guidance has unknown fields {', '.join(unknown)}; known are {', '.join(known)}.")
    complete = {**GUIDANCE_DEFAULTS, **guidance}
    width = complete.get("teacher_width")
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ConfigurationError(f"guidance: teacher_width={width!r}; expected the width of the teacher's features.")
    for name in ("tube_weight", "frame_weight", "patch_weight", "logit_scale_init"):
        value = complete[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (name.endswith("weight") and value < 0):
            raise ConfigurationError(f"guidance: {name}={value!r}; expected a finite number, for a weight at least 0.")
    if not isinstance(complete["mask_same_video"], bool):
        raise ConfigurationError(f"guidance: mask_same_video={complete['mask_same_video']!r}; expected true or false.")
    if complete["patch_loss"] not in PATCH_LOSSES:
        raise ConfigurationError(
            f"guidance: patch_loss={complete['patch_loss']!r}; expected one of {', '.join(PATCH_LOSSES)}."
        )
    if complete["tube_weight"] == complete["frame_weight"] == complete["patch_weight"] == 0:
        raise ConfigurationError(
            "guidance: both weights are 0, and patch_weight too, which teaches nothing; use guidance=None."
        )
    return {name: complete[name] for name in known}


_COMPLETED = {"merge_schedule": plain_schedule, "guidance": complete_guidance}  # what a field holds of what it is given


@strict
class VideoDecoderConfig(PreTrainedConfig):
    """What the configuration of every system here holds: a causal text decoder, visual tokens, merging, guidance.

    Args:
        text_config: Configuration of the decoder, any Llama-like `model_type`.
        patch_size: Side in pixels of the square that one visual token stands for.
        merge_schedule: Where tokens merge (section 3.1): `"none"`, `"paper"`, `"table5"`, a list of steps, or the
            fields of a `MergeSchedule`.
        similarity_threshold: tau of Eq. 1 (section 3.1), of the presets' shallow merges.
        target_ratio: Kept over input tokens of the presets' deep merges; "50%" in section 3.1.
        longest_edge: Ceiling of a frame's longest side in pixels (section 4: 448 in pretraining, 672 in SFT, 1344 HD).
        low_res_longest_edge: The same for low-resolution frames (section 4: 336).
        num_high_res_frames: High-resolution frames of a video at inference (section 4: 32).
        num_low_res_frames: Low-resolution frames of a video at inference (section 4: 32).
        video_start_token_id: Token before the first frame of a video or image.
        video_end_token_id: Token after the last frame of a video or image.
        video_token_id: Token that stands for one patch; also the placeholder in text.
        frame_token_id: `<FRAME>`, at the start of each frame (section 3.1).
        line_token_id: `<LINE>`, at the end of each row of patches (section 3.1).
        image_token_id: Placeholder of an image in text; the processor always expands it.
        guidance: How a vision teacher guides training (section 3.2), or None: `teacher_width`, the weights
            `tube_weight` (L_MSE) and `frame_weight` (L_Con) of Eq. 4, `logit_scale_init` (logarithm of tau of Eq. 3)
            and `mask_same_video` (whether frames of one video are no negatives of each other); `patch_weight` and
            `patch_loss` (`"cosine"` or `"mse"`) of Video-Panda's distillation, patch by patch.

    Raises:
        ConfigurationError: A value no model can have.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    patch_size: int = 28
    merge_schedule: str | list | dict | MergeSchedule = "none"
    similarity_threshold: float | int = 0.6
    target_ratio: float | int = 0.5
    longest_edge: int = 672
    low_res_longest_edge: int = 336
    num_high_res_frames: int = 32
    num_low_res_frames: int = 32
    video_start_token_id: int = 151652
    video_end_token_id: int = 151653
    video_token_id: int = 151646
    frame_token_id: int = 151647
    line_token_id: int = 151648
    image_token_id: int = 151649
    guidance: dict | None = None
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True
        self.validate_architecture()  # @strict runs it too, but wraps the error in one of its own

    def __setattr__(self, key: str, value: Any) -> None:
        if key in _COMPLETED:
            value = _COMPLETED[key](value)
        super().__setattr__(key, value)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; PEFT, which reads a configuration through this, learns the default LoRA targets."""
        register_lora_targets(self.model_type)
        return super().to_dict()

    def resolve_merge_schedule(self, value: Any = None) -> MergeSchedule:
        """The merge schedule for this decoder, with this configuration's threshold and ratio in a preset.

        Args:
            value: What `merge_schedule` may be, for one call; None means the configuration's own.

        Raises:
            ConfigurationError: `value` is no schedule, or needs a deeper decoder.
        """
        return MergeSchedule.resolve(
            self.merge_schedule if value is None else value,
            self.text_config.num_hidden_layers,
            self.similarity_threshold,
            self.target_ratio,
        )

    def validate_architecture(self) -> None:
        """Check what the types of the fields cannot say; run at construction."""
        check_similarity_threshold(self.similarity_threshold)
        check_target_ratio(self.target_ratio)
        self.resolve_merge_schedule()
        self.check_positive("patch_size", "longest_edge", "low_res_longest_edge")
        ids = [getattr(self, name) for name in TOKEN_ID_FIELDS]
        if len(set(ids)) != len(ids):
            raise ConfigurationError(
                f"special token ids must differ, got {dict(zip(TOKEN_ID_FIELDS, ids, strict=True))}."
            )

    def check_positive(self, *names: str) -> None:
        """Refuse fields below 1.

        Raises:
            ConfigurationError: There is one.
        """
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)}: expected a positive number.")

    @property
    def special_token_ids(self) -> list[int]:
        """Ids a model must never generate: all visual tokens and the image placeholder."""
        return [getattr(self, name) for name in TOKEN_ID_FIELDS]

    @property
    def video_options(self) -> dict[str, Any]:
        """What a video processor must be told to make this model's inputs."""
        return {name: getattr(self, name) for name in VIDEO_FIELDS}

    def square_grid(self, longest_edge: int) -> tuple[int, int]:
        """Rows and columns of patches of a large square frame whose sides may have so many pixels."""
        side = longest_edge // self.patch_size
        return side, side

    def frame_counts(self, options: Mapping[str, Any]) -> tuple[int, int] | None:
        """High- and low-resolution frames of a long video read with these options of a processor; None by `fps`."""
        if "num_frames" in options:
            return options["num_frames"], 0
        if "fps" in options:
            return None
        names = ("num_high_res_frames", "num_low_res_frames")
        high, low = (options.get(name, getattr(self, name)) for name in names)
        return high, low

    @property
    def frame_layout(self) -> FrameLayout:
        """Which tokens a frame has beside its patches."""
        return FrameLayout()

    @property
    def input_similarity_threshold(self) -> float | None:
        """Above which similarity patches merge before the decoder, whatever its schedule; None if none do."""
        return None

    @property
    def pixels_per_token(self) -> int:
        """Width of a row of `pixel_values_videos`: all values of the pixels that one visual token stands for."""
        return 3 * self.patch_size**2

    def arrange_pixels(self, pixels: Any) -> Any:
        """The rows of `pixel_values_videos` of a video, from the pixels of each token of each frame.

        Args:
            pixels: `(T, n, 3 * patch_size**2)`, all frames of one grid.
        """
        return pixels.flatten(0, 1)

    def patch_embed_flops(self, videos: Sequence[Sequence[tuple[int, int]]]) -> int:
        """FLOPs from pixels to decoder embeddings, two for each multiplication with addition.

        Args:
            videos: Per video, rows and columns of each frame.
        """
        raise NotImplementedError(f"{type(self).__name__} does not count its patch embedding")

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Fields of each preset, by name."""
        return {}

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Build the configuration of a model of the paper (section 4), or the shipped tiny one.

        Args:
            name: A key of `presets()`; for ELVA `"elva-1.5b"`, `"elva-7b"`, `"elva-7b-hd"` or `"tiny"`.
            **overrides: Fields to change.

        Raises:
            ConfigurationError: `name` is no preset.
        """
        presets = cls.presets()
        if name not in presets:
            raise ConfigurationError(f"preset {name!r} is not known; choose one of {', '.join(presets)}.")
        return cls(**{**copy.deepcopy(presets[name]), **overrides})


@strict
class ElvaConfig(VideoDecoderConfig):
    """Configuration of an ELVA model: a causal text decoder and the patch embedding in front of it.

    Fields that are not named here are those of `VideoDecoderConfig`. The decoder is a Qwen2 if no other is named
    (section 4); `patch_size` 28 is derived from the token counts of Table 6.

    Args:
        patch_embed_type: `"video"` with the cross-attention of section 3.1, `"naive"` without it (Table 3).
        patch_embed_dim: Width between the two linear layers. 1024 is derived from "9M parameters" (section 3.1).
        patch_embed_num_heads: Attention heads of the cross-attention; must divide `patch_embed_dim`.
        patch_embed_residual: Whether the `<FRAME>` / `<LINE>` query is added to what it attends to.
        patch_embed_norm: Whether patches and queries pass a LayerNorm before the cross-attention.
        patch_embed_output_projection: Whether the cross-attention has an output projection.
        patch_embed_positions: Learned row and column embeddings added to patches: the number of rows and
            columns in the tables, or 0 for none. Not in the paper.
        patch_embed_positions_std: Standard deviation of those tables at the start. Patch features grow to a few units
            in training; tables far below that are not heard.

    Raises:
        ConfigurationError: A value no model can have.

    Example:
        >>> ElvaConfig.from_preset("elva-7b").text_config.hidden_size
        3584
    """

    model_type = "elva"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")}

    patch_embed_type: str = "video"
    patch_embed_dim: int = 1024
    patch_embed_num_heads: int = 16
    patch_embed_residual: bool = True
    patch_embed_norm: bool = False
    patch_embed_output_projection: bool = False
    patch_embed_positions: int = 0
    patch_embed_positions_std: float | int = 0.02

    def validate_architecture(self) -> None:
        """Check what the types of the fields cannot say; run at construction."""
        super().validate_architecture()
        if self.patch_embed_type not in ("video", "naive"):
            raise ConfigurationError(f"patch_embed_type={self.patch_embed_type!r}: expected 'video' or 'naive'.")
        self.check_positive("patch_embed_dim")
        if self.patch_embed_dim % self.patch_embed_num_heads:
            raise ConfigurationError(
                f"patch_embed_num_heads={self.patch_embed_num_heads} does not divide "
                f"patch_embed_dim={self.patch_embed_dim}; choose a divisor."
            )

    def patch_embed_flops(self, videos: Sequence[Sequence[tuple[int, int]]]) -> int:
        """FLOPs of the patch embedding (section 3.1): its linear maps, and the scores of `<FRAME>` and `<LINE>`."""
        frames = [grid for video in videos for grid in video]
        if not frames:
            return 0
        patches = sum(rows * cols for rows, cols in frames)
        specials = len(frames) + sum(rows for rows, _ in frames)
        width = self.patch_embed_dim
        into, out = self.pixels_per_token * width, width * self.text_config.hidden_size
        queries = 2  # <FRAME> and <LINE>
        if self.patch_embed_type == "naive":
            return 2 * (patches * into + (patches + queries) * out)
        projections = (queries + 2 * patches + specials * self.patch_embed_output_projection) * width**2
        scores = queries * patches * width
        return 2 * (patches * into + projections + scores + (patches + specials) * out)

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Fields of each preset, by name."""
        return PRESETS


_QWEN2_1_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
_QWEN2_7B = {
    **_QWEN2_1_5B,
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
_TINY = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "elva-1.5b": {"text_config": _QWEN2_1_5B},
    "elva-7b": {"text_config": _QWEN2_7B},
    "elva-7b-hd": {"text_config": _QWEN2_7B, "longest_edge": 1344},
    "tiny": {
        "text_config": _TINY,
        "patch_size": 16,
        "patch_embed_dim": 128,
        "patch_embed_num_heads": 4,
        "longest_edge": 64,
        "low_res_longest_edge": 32,
        "num_high_res_frames": 8,
        "num_low_res_frames": 0,
        "video_start_token_id": 506,
        "video_end_token_id": 507,
        "video_token_id": 508,
        "frame_token_id": 509,
        "line_token_id": 510,
        "image_token_id": 511,
    },
}
