"""What the benchmarks run on: ELVA models with random weights, and made-up clips whose frames resemble each other.

Times, bytes and token counts of such models are real; nothing they answer means anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from elva_hf import ElvaConfig
from elva_hf.frames_elva import spread_high_frames

Grid = tuple[int, int]

_SPECIAL_IDS = {
    "video_start_token_id": 3,
    "video_end_token_id": 4,
    "video_token_id": 5,
    "frame_token_id": 6,
    "line_token_id": 7,
    "image_token_id": 8,
}
_WORD_IDS = (16, 64)  # below every vocabulary, above the special tokens


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }


@dataclass(frozen=True)
class Size:
    """A model, the clips that suit it, and the layers at which four halvings sit."""

    config: ElvaConfig
    halvings: tuple[int, ...]
    frames: int = 128
    batch_frames: int = 32
    high_grid: Grid = (12, 12)  # 336 pixels in patches of 28: 157 tokens a frame
    low_grid: Grid = (6, 6)  # 168 pixels: 43 tokens
    text_tokens: int = 290  # borders of the video among them, as in Table 5
    mlp_shape: tuple[int, int, int] = (1536, 8960, 20112)  # hidden and intermediate size, tokens


def make_size(name: str) -> Size:
    """`"tiny"` (for tests), `"small"` or `"0.5b"` (for a CPU), `"1.5b"` or `"7b"` (the paper's, for a GPU)."""
    if name == "tiny":
        text = _qwen2(hidden=32, intermediate=64, layers=8, heads=4, kv_heads=2, vocab=64)
        config = ElvaConfig(text_config=text, patch_size=4, patch_embed_dim=32, patch_embed_num_heads=2, **_SPECIAL_IDS)
        return Size(config, (1, 3, 5, 7), 8, 4, (4, 4), (2, 2), text_tokens=12, mlp_shape=(256, 1024, 4096))
    if name == "small":
        text = _qwen2(hidden=512, intermediate=2816, layers=12, heads=8, kv_heads=2, vocab=8192)
        return Size(ElvaConfig(text_config=text, **_SPECIAL_IDS), (1, 3, 6, 9))
    if name == "0.5b":  # the shape of Qwen2-0.5B
        text = _qwen2(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocab=151936)
        config = ElvaConfig(text_config={**text, "tie_word_embeddings": True}, **_SPECIAL_IDS)
        return Size(config, (1, 6, 12, 18))
    return Size(ElvaConfig.from_preset(f"elva-{name}"), (1, 7, 13, 19))


SIZES = ("tiny", "small", "0.5b", "1.5b", "7b")


@dataclass(frozen=True)
class Clip:
    """A made-up clip and the words after it.

    Every place draws, from each frame to the next of its grid, how similar the two are: a cosine, uniform
    between the two ends of `similarity`. Links are independent, so how many a threshold merges is the share
    of that interval above it: a property of the clip, not a finding.
    """

    grids: tuple[Grid, ...]
    text_tokens: int
    similarity: tuple[float, float] = (0.2, 1.0)
    seed: int = 0

    @classmethod
    def of(cls, size: Size, frames: int, *, hybrid: bool = False, **fields: Any) -> Clip:
        """A clip of high-resolution frames, or of a quarter of them and three quarters of low-resolution ones."""
        high = spread_high_frames(frames, frames // 4 if hybrid else frames)
        grids = tuple(size.high_grid if is_high else size.low_grid for is_high in high)
        return cls(grids, **{"text_tokens": size.text_tokens, **fields})

    def ids(self, config: ElvaConfig) -> list[int]:
        """The video between its borders, then random words."""
        ids = [config.video_start_token_id]
        for rows, columns in self.grids:
            row = columns * [config.video_token_id] + [config.line_token_id]
            ids += [config.frame_token_id, *(rows * row)]
        words = torch.randint(*_WORD_IDS, (self.text_tokens - 2,), generator=self._generator())
        return [*ids, config.video_end_token_id, *words.tolist()]

    def pixels(self, config: ElvaConfig, dtype: torch.dtype) -> Tensor:
        """`(P, 3 * patch_size**2)` patches with mean 0 and variance 1."""
        generator, width = self._generator(), 3 * config.patch_size**2
        last: dict[Grid, Tensor] = {}
        patches = []
        for grid in self.grids:
            shape = (grid[0] * grid[1], width)
            fresh = torch.randn(shape, generator=generator)
            cosine = torch.empty(shape[0], 1).uniform_(*self.similarity, generator=generator)
            last[grid] = cosine * last[grid] + (1 - cosine**2).sqrt() * fresh if grid in last else fresh
            patches.append(last[grid].to(dtype))
        return torch.cat(patches)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def make_model(config: ElvaConfig, device: str, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """An `ElvaForCausalLM` with the same random weights each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()


def make_inputs(clips: list[Clip], config: ElvaConfig, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A left-padded batch, as the processor gives it."""
    rows = [clip.ids(config) for clip in clips]
    longest = max(map(len, rows))
    ids = torch.tensor([(longest - len(row)) * [0] + row for row in rows], device=device)
    mask = torch.tensor([(longest - len(row)) * [0] + len(row) * [1] for row in rows], device=device)
    pixels = torch.cat([clip.pixels(config, dtype) for clip in clips]).to(device)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}
