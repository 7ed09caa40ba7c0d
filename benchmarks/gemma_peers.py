"""Gemma4Unified, which has no encoder either: its front end on ELVA's decoder, and the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pipelines import AUDIO, IMAGE, VIDEO, EncoderFlops, Pipeline, seeded
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


class FrontEndLM(nn.Module):
    """Gemma4Unified's own vision embedder in front of a Qwen2 decoder."""

    def __init__(self, text_config: Any, vision_config: Any, dtype: torch.dtype, attention: str):
        super().__init__()
        from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

        self.embed_vision = Gemma4UnifiedVisionEmbedder(vision_config, text_config).to(dtype)
        self.language = AutoModelForCausalLM.from_config(text_config, dtype=dtype, attn_implementation=attention)

    def embed(self, input_ids: Tensor, pixel_values_videos: Tensor, video_position_ids: Tensor) -> Tensor:
        """`(B, N, D)` embeddings of text and video."""
        text = self.language.get_input_embeddings()(input_ids)
        visual = self.embed_vision(pixel_values_videos, video_position_ids, return_dict=True).pooler_output
        return text.masked_scatter((input_ids == VIDEO)[..., None], visual.to(text.dtype))

    def forward(self, input_ids: Tensor, pixel_values_videos: Tensor, video_position_ids: Tensor, **kwargs: Any) -> Any:
        embeddings = self.embed(input_ids, pixel_values_videos, video_position_ids)
        return self.language(inputs_embeds=embeddings, **kwargs)

    @property
    def generation_config(self) -> Any:
        """The decoder's."""
        return self.language.generation_config

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, pixel_values_videos: Tensor, video_position_ids: Tensor, **kwargs: Any
    ) -> Any:
        """As the decoder generates; without the prompt."""
        embeddings = self.embed(input_ids, pixel_values_videos, video_position_ids)
        return self.language.generate(inputs_embeds=embeddings, **kwargs)


@dataclass(frozen=True)
class GemmaFrontEnd(Pipeline):
    """Gemma4Unified's front end, two linear maps over patches of 48 pixels, on the same decoder.

    Args:
        grid: Rows and columns of patches of a frame.
    """

    grid: tuple[int, int] = (7, 10)

    front_end = "embed_vision"

    @property
    def width(self) -> int:
        """Values of a patch."""
        return 3 * (3 * self.scale.gemma_patch) ** 2

    def build(self, device: str, dtype: torch.dtype, attention: str) -> nn.Module:
        torch.manual_seed(0)
        hidden = self.scale.text.hidden_size
        vision = AutoConfig.for_model(
            "gemma4_unified_vision",
            patch_size=self.scale.gemma_patch,
            mm_embed_dim=hidden,
            output_proj_dims=hidden,
        )
        with torch.device(device):
            return FrontEndLM(self.scale.text, vision, dtype, attention).eval()

    def visual_tokens(self, frames: int) -> int:
        return frames * self.grid[0] * self.grid[1]

    def pixels(self, clips: int, frames: int, dtype: torch.dtype) -> dict[str, Tensor]:
        rows, columns = (torch.arange(count) for count in self.grid)
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)
        clip = torch.randn(frames, len(places), self.width, generator=seeded())
        return {
            "pixel_values_videos": clip.to(dtype).repeat(clips, 1, 1),
            "video_position_ids": places.expand(clips * frames, -1, -1).clone(),
        }

    def encoder_flops(self, frames: int) -> EncoderFlops:
        hidden = self.scale.text.hidden_size
        return EncoderFlops(2 * self.visual_tokens(frames) * (self.width * hidden + hidden**2))


@dataclass(frozen=True)
class Gemma4Unified(GemmaFrontEnd):
    """Gemma4Unified itself at the decoder's sizes: five layers in six see a window, and a frame sees itself whole.

    A word stands between frames, as its time marks do; they are taken from the text.
    """

    front_end = "model.embed_vision"

    def build(self, device: str, dtype: torch.dtype, attention: str) -> nn.Module:
        return Pipeline.build(self, device, dtype, attention)

    @property
    def sees_all(self) -> list[bool]:
        """Per layer, whether it has no window."""
        count = self.scale.shape().num_layers
        return [(layer + 1) % 6 == 0 or layer == count - 1 for layer in range(count)]

    def config(self) -> Any:
        scale, shape = self.scale, self.scale.shape()
        text = {
            "model_type": "gemma4_unified_text",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "global_head_dim": shape.head_dim,
            "sliding_window": scale.gemma_window,
            "layer_types": ["full_attention" if whole else "sliding_attention" for whole in self.sees_all],
            "tie_word_embeddings": scale.text.tie_word_embeddings,
        }
        width = {"mm_embed_dim": shape.hidden_size, "output_proj_dims": shape.hidden_size}
        return AutoConfig.for_model(
            "gemma4_unified",
            text_config=text,
            vision_config={"patch_size": scale.gemma_patch, **width},
            audio_config=None,
            video_token_id=VIDEO,
            image_token_id=IMAGE,
            audio_token_id=AUDIO,
            tie_word_embeddings=scale.text.tie_word_embeddings,
        )

    def inputs(self, frames: int, clips: int, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = super().inputs(frames, clips, dtype)
        per_frame, ids = self.visual_tokens(1), inputs["input_ids"]
        start, video, end, words = ids.split((1, frames * per_frame, 1, ids.shape[1] - frames * per_frame - 2), 1)
        if words.shape[1] < frames - 1:
            raise ValueError(f"{frames} frames: {words.shape[1]} words are too few to stand between them.")
        marks, words = words[:, : frames - 1], words[:, frames - 1 :]
        marked = torch.cat([video.unflatten(1, (frames, per_frame)), nn.functional.pad(marks, (0, 1))[..., None]], 2)
        ids = torch.cat([start, marked.flatten(1)[:, :-1], end, words], 1)
        counts = torch.full((clips,), frames)
        return {
            **inputs,
            "input_ids": ids,
            "mm_token_type_ids": 2 * (ids == VIDEO).long(),
            "num_frames_per_video": counts,
        }

    def attention_flops(self, frames: int, layers: Sequence[int], attention: str) -> int:
        shape, tokens, window = self.scale.shape(), layers[0], self.scale.gemma_window
        if attention == "full":
            return shape.attention_flops(layers, attention)
        near, per_frame = min(tokens, window), self.visual_tokens(1)
        pairs = near * (near + 1) // 2 + (tokens - near) * window + frames * per_frame * (per_frame - 1) // 2
        windowed = len(layers) - sum(self.sees_all)
        whole = shape.attention_flops(sum(self.sees_all) * [tokens], attention)
        return whole + 4 * windowed * pairs * shape.num_heads * shape.head_dim

    def kv_bytes(self, frames: int) -> int:
        tokens, held = self.layers(frames)[0], self.scale.gemma_window - 1
        kept = sum(tokens if whole else min(tokens, held) for whole in self.sees_all)
        return kept * self.scale.shape().kv_bytes_per_token
