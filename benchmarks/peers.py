"""What people run today, on ELVA's decoder: the other pipelines of `table5_efficiency.py`.

All see the same work as ELVA: square frames as ready pixels, and as much text. They are transformers' own classes with
random weights, built from configurations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from gemma_peers import Gemma4Unified, GemmaFrontEnd
from pipelines import END, IMAGE, START, VIDEO, Elva, EncoderFlops, Pipeline, Row, Scale, seeded
from random_elva import Size
from torch import Tensor, nn
from transformers import AutoConfig

from elva_hf.frames_elva import count_frame_tokens


def _text_config(scale: Scale, **changes: Any) -> Row:
    return {**scale.text.to_dict(), **changes}


@dataclass(frozen=True)
class Llava(Pipeline):
    """LLaVA-NeXT-Video: a CLIP tower over each frame, pooled, then two linear maps.

    Args:
        stride: Of the average pooling; 1 leaves every patch.
        all_logits: Whether logits of all positions are made, as the paper's baseline did.
        equal_tokens: Whether text is added until the clip has as many tokens as ELVA's without merging.
    """

    stride: int = 1
    all_logits: bool = False
    equal_tokens: bool = False

    front_end = "model.multi_modal_projector"

    def config(self) -> Any:
        scale = self.scale
        tower = scale.clip.config(
            model_type="clip_vision_model", image_size=scale.side, patch_size=scale.patch, hidden_act="quick_gelu"
        )
        return AutoConfig.for_model(
            "llava_next_video",
            vision_config=tower,
            text_config=_text_config(scale),
            spatial_pool_stride=self.stride,
            video_token_index=VIDEO,
            image_token_index=IMAGE,
            tie_word_embeddings=scale.text.tie_word_embeddings,
        )

    @property
    def generates(self) -> bool:
        return not self.all_logits  # generate() asks for the last position only

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame."""
        return self.scale.patches // self.stride**2

    def visual_tokens(self, frames: int) -> int:
        return frames * self.frame_tokens

    def text_tokens(self, frames: int) -> int:
        missing = count_frame_tokens(self.scale.size.high_grid) - self.frame_tokens if self.equal_tokens else 0
        return self.scale.size.text_tokens + frames * missing

    def pixels(self, clips: int, frames: int, dtype: torch.dtype) -> dict[str, Tensor]:
        clip = torch.randn(1, frames, 3, self.scale.side, self.scale.side, generator=seeded())
        return {"pixel_values_videos": clip.to(dtype).repeat(clips, 1, 1, 1, 1)}

    def encoder_flops(self, frames: int) -> EncoderFlops:
        scale, tower = self.scale, self.scale.clip
        width, hidden, rows = tower.hidden_size, scale.text.hidden_size, scale.patches + 1  # the class token
        linear = (
            scale.patches * 3 * scale.patch**2 * width
            + rows * tower.num_hidden_layers * tower.layer_weights
            + self.frame_tokens * (width * hidden + hidden**2)
        )
        return EncoderFlops(2 * frames * linear, 4 * frames * tower.num_hidden_layers * rows**2 * width)

    def prefill(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        outputs = model(**inputs, use_cache=True, logits_to_keep=0 if self.all_logits else 1)
        return outputs.logits, outputs.past_key_values


@dataclass(frozen=True)
class VideoLlama3(Pipeline):
    """VideoLLaMA3: a SigLIP tower over each frame, two by two patches interpolated to one, then two linear maps."""

    front_end = "model.projector"
    merge: ClassVar[int] = 2

    def config(self) -> Any:
        return AutoConfig.for_model(
            "video_llama_3",
            vision_config=self.scale.siglip.config(patch_size=self.scale.patch),
            text_config=_text_config(self.scale),
            video_token_id=VIDEO,
            image_token_id=IMAGE,
            tie_word_embeddings=self.scale.text.tie_word_embeddings,
        )

    def visual_tokens(self, frames: int) -> int:
        return frames * self.scale.patches // self.merge**2

    def pixels(self, clips: int, frames: int, dtype: torch.dtype) -> dict[str, Tensor]:
        side = self.scale.side // self.scale.patch
        clip = torch.randn(frames * side**2, 3 * self.scale.patch**2, generator=seeded())
        return {
            "pixel_values_videos": clip.to(dtype).repeat(clips, 1),
            "video_grid_thw": torch.tensor(clips * [[frames, side, side]]),
            "video_merge_sizes": torch.tensor(clips * [self.merge]),
        }

    def encoder_flops(self, frames: int) -> EncoderFlops:
        scale, tower = self.scale, self.scale.siglip
        width, hidden = tower.hidden_size, scale.text.hidden_size
        linear = scale.patches * (3 * scale.patch**2 * width + tower.num_hidden_layers * tower.layer_weights)
        linear += scale.patches // self.merge**2 * (width * hidden + hidden**2)
        return EncoderFlops(2 * frames * linear, 4 * frames * tower.num_hidden_layers * scale.patches**2 * width)

    def prefill(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """The head on the last position: the model's own forward has no `logits_to_keep` and makes all logits."""
        outputs = model.model(**inputs, use_cache=True)
        return model.lm_head(outputs.last_hidden_state[:, -1:]), outputs.past_key_values


@dataclass(frozen=True)
class Qwen25VL(Pipeline):
    """Qwen2.5-VL: two frames and two by two patches to a token; windows of 112 pixels in most layers of the tower."""

    front_end = "model.visual"
    pair: ClassVar[int] = 2

    @property
    def window(self) -> int:
        """Tower patches of a window's side: 8, four tokens."""
        return 8 if self.scale.side >= 16 * self.scale.patch else 4

    def config(self) -> Any:
        scale, tower = self.scale, self.scale.qwen
        vision = {
            "depth": tower.num_hidden_layers,
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_heads": tower.num_attention_heads,
            "patch_size": scale.patch,
            "window_size": self.window * scale.patch,
            "out_hidden_size": scale.text.hidden_size,
            "fullatt_block_indexes": list(tower.full_attention),
        }
        pairs = scale.shape().head_dim // 2
        height = 3 * pairs // 8
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [pairs - 2 * height, height, height]}
        return AutoConfig.for_model(
            "qwen2_5_vl",
            vision_config=vision,
            text_config=_text_config(scale, model_type="qwen2_5_vl_text", rope_parameters=rope),
            video_token_id=VIDEO,
            image_token_id=IMAGE,
            vision_start_token_id=START,
            vision_end_token_id=END,
            tie_word_embeddings=scale.text.tie_word_embeddings,
        )

    def visual_tokens(self, frames: int) -> int:
        if frames % self.pair:
            raise ValueError(f"{frames} frames: Qwen2.5-VL takes them in pairs; give an even number.")
        return frames // self.pair * self.scale.patches // 4

    def pixels(self, clips: int, frames: int, dtype: torch.dtype) -> dict[str, Tensor]:
        side = self.scale.side // self.scale.patch
        groups = frames // self.pair
        clip = torch.randn(groups * side**2, 3 * self.pair * self.scale.patch**2, generator=seeded())
        return {
            "pixel_values_videos": clip.to(dtype).repeat(clips, 1),
            "video_grid_thw": torch.tensor(clips * [[groups, side, side]]),
        }

    def encoder_flops(self, frames: int) -> EncoderFlops:
        scale, tower = self.scale, self.scale.qwen
        width, patches = tower.hidden_size, scale.patches
        linear = patches * (3 * self.pair * scale.patch**2 * width + tower.num_hidden_layers * tower.layer_weights)
        linear += patches // 4 * ((4 * width) ** 2 + 4 * width * scale.text.hidden_size)
        whole = len(tower.full_attention)
        pairs = whole * patches**2 + (tower.num_hidden_layers - whole) * patches * self.window**2
        groups = frames // self.pair
        return EncoderFlops(2 * groups * linear, 4 * groups * pairs * width)


SCHEDULES = ("table5", "four halvings", "paper")
"""The first is the one whose FLOPs fit Table 5; the last has thresholds, so what it merges depends on the pixels."""

BASELINE = "llava"
"""The paper-style baseline that ratios are taken to."""

MATERIALISING = "llava-all-logits"
"""The same with logits of every position, as the memory column of Table 5 has it."""

SQUARE_GRID = (8, 8)
"""What Gemma4Unified's video processor makes of a square frame under its budget of 70 tokens: 384 pixels."""


def merge_schedule(name: str, size: Size) -> Any:
    """The schedule of the rows with merging."""
    return [{"layer": layer, "target_ratio": 0.5} for layer in size.halvings] if name == "four halvings" else name


def make_pipelines(scale: Scale, schedule: str = SCHEDULES[0]) -> dict[str, Pipeline]:
    """Every row by its name."""
    merged = merge_schedule(schedule, scale.size)
    return {
        MATERIALISING: Llava(
            scale, "LLaVA-NeXT-Video, 576 tokens a frame; logits of all positions, as in the paper", all_logits=True
        ),
        BASELINE: Llava(scale, "LLaVA-NeXT-Video, 576 tokens a frame (`spatial_pool_stride=1`)"),
        "llava-equal-tokens": Llava(
            scale,
            "the same behind 2x2 pooling, 144 tokens a frame, and 13 more text tokens a frame: as many as `elva`",
            stride=2,
            equal_tokens=True,
        ),
        "videollama3": VideoLlama3(
            scale, "VideoLLaMA3, 144 tokens a frame; the head on the last position, its own forward makes all logits"
        ),
        "qwen2.5-vl": Qwen25VL(scale, "Qwen2.5-VL, 72 tokens a frame; positions counted in one dimension"),
        "gemma4-front-end": GemmaFrontEnd(scale, "Gemma4Unified's vision embedder, 7x10 patches: its whole budget"),
        "gemma4-front-end-square": GemmaFrontEnd(
            scale, "the same with 8x8 patches: what its processor makes of a square frame", SQUARE_GRID
        ),
        "gemma4": Gemma4Unified(
            scale, "Gemma4Unified itself at the decoder's sizes, 7x10 patches; windows in five layers of six"
        ),
        "elva": Elva(scale, "all frames high, no merging"),
        "elva+merge": Elva(scale, f"merging: {schedule}", merged),
        "elva+merge+hybrid": Elva(scale, f"merging: {schedule}; a quarter of the frames high", merged, hybrid=True),
    }
