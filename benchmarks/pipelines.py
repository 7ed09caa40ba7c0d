"""What `table5_efficiency.py` runs: sizes, the common setting, what a pipeline is, and ELVA's. Others: `peers.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from random_elva import Clip, Size, make_inputs, make_model, make_size
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from elva_hf.ledger_elva import DecoderShape, TokenPlan, plan_tokens

Row = dict[str, Any]

START, END, VIDEO, IMAGE, AUDIO = 3, 4, 5, 8, 9  # ids that every vocabulary has
WORDS = (16, 64)


@dataclass(frozen=True)
class Tower:
    """A vision transformer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    gated: bool = False
    full_attention: tuple[int, ...] = ()  # of Qwen2.5-VL: layers without windows

    @property
    def layer_weights(self) -> int:
        """Weights of the linear maps of a layer."""
        return self.hidden_size * (4 * self.hidden_size + (3 if self.gated else 2) * self.intermediate_size)

    def config(self, **fields: Any) -> Row:
        """Fields of its configuration."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return {**{name: getattr(self, name) for name in names}, **fields}


@dataclass(frozen=True)
class Scale:
    """A decoder, the towers that go with it, and the work.

    Args:
        size: The decoder as ELVA has it, frames and text.
        clip: Tower of LLaVA-NeXT-Video: CLIP-ViT-L/14-336.
        siglip: Tower of VideoLLaMA3: SigLIP-so400m/14.
        qwen: Tower of Qwen2.5-VL.
        matmul: Side of the matrices whose product says what the device can do.
    """

    size: Size
    clip: Tower = Tower(1024, 4096, 24, 16)
    siglip: Tower = Tower(1152, 4304, 27, 16)
    qwen: Tower = Tower(1280, 3420, 32, 16, gated=True, full_attention=(7, 15, 23, 31))
    gemma_patch: int = 16  # three by three of them are a token
    gemma_window: int = 1024  # tokens that most layers of Gemma4Unified see
    matmul: int = 8192

    @property
    def text(self) -> Any:
        """Configuration of the decoder."""
        return self.size.config.text_config

    @property
    def side(self) -> int:
        """Pixels of a frame's side."""
        return self.size.high_grid[0] * self.size.config.patch_size

    @property
    def patch(self) -> int:
        """Pixels of a tower patch's side: half of ELVA's, 14 at full size."""
        return self.size.config.patch_size // 2

    @property
    def patches(self) -> int:
        """Tower patches of a frame: 576 at full size."""
        return (self.side // self.patch) ** 2

    def shape(self, dtype: torch.dtype = torch.bfloat16) -> DecoderShape:
        """What the decoder costs."""
        return DecoderShape.from_config(self.text, dtype)


def make_scale(name: str) -> Scale:
    """The scale of one of `random_elva.SIZES`."""
    size = make_size(name)
    if name == "tiny":
        tower = Tower(32, 64, 2, 2)
        qwen = replace(tower, gated=True, full_attention=(1,))
        return Scale(size, tower, tower, qwen, gemma_patch=2, gemma_window=64, matmul=64)
    return Scale(size, matmul=8192 if name == "7b" else 1024)


@dataclass(frozen=True)
class ModelSetting:
    """How every variant of a run is measured: what all scripts over models with random weights have in common."""

    size: str
    device: str
    dtype: str
    attention: str
    threads: int
    processes: int

    def make(self) -> Scale:
        """The scale, after making this process like the others."""
        torch.set_num_threads(self.threads)
        return make_scale(self.size)


def seeded() -> torch.Generator:
    """A generator that gives the same numbers each time."""
    return torch.Generator().manual_seed(0)


@dataclass(frozen=True)
class EncoderFlops:
    """FLOPs from pixels to decoder embeddings."""

    linear: int
    attention: int = 0


@dataclass(frozen=True)
class Pipeline:
    """A model over a video and text: how it is built, fed and counted.

    Args:
        scale: Sizes of everything.
        note: What a reader must know about the row.
    """

    scale: Scale
    note: str = ""

    front_end: ClassVar[str]  # the module whose return ends the front end

    @property
    def generates(self) -> bool:
        """Whether generation says more than another row's."""
        return True

    @property
    def merges(self) -> bool:
        """Whether tokens merge inside the decoder."""
        return False

    def build(self, device: str, dtype: torch.dtype, attention: str) -> nn.Module:
        """The model with random weights."""
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(self.config(), dtype=dtype, attn_implementation=attention)
        return model.eval()

    def config(self) -> Any:
        """Of the model."""
        raise NotImplementedError

    def visual_tokens(self, frames: int) -> int:
        """Tokens of a clip."""
        raise NotImplementedError

    def pixels(self, clips: int, frames: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Frames as the model takes them."""
        raise NotImplementedError

    def encoder_flops(self, frames: int) -> EncoderFlops:
        """What the front end costs for a clip."""
        raise NotImplementedError

    def text_tokens(self, frames: int) -> int:
        """Text beside a clip, its borders included."""
        return self.scale.size.text_tokens

    def layers(self, frames: int) -> list[int]:
        """Tokens that enter each decoder layer."""
        return self.scale.shape().num_layers * [self.visual_tokens(frames) + self.text_tokens(frames)]

    def attention_flops(self, frames: int, layers: Sequence[int], attention: str) -> int:
        """Of the decoder, `"causal"` or `"full"` as `torch` counts it."""
        return self.scale.shape().attention_flops(layers, attention)

    def kv_bytes(self, frames: int) -> int:
        """Keys and values that the cache holds after the prefill of a clip."""
        return sum(self.layers(frames)) * self.scale.shape().kv_bytes_per_token

    def inputs(self, frames: int, clips: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch on the host: each row a clip between its borders, then words."""
        words = torch.randint(*WORDS, (clips, self.text_tokens(frames) - 2), generator=seeded())
        video = [START, *self.visual_tokens(frames) * [VIDEO], END]
        ids = torch.cat([torch.tensor(video).expand(clips, -1), words], 1)
        return {"input_ids": ids, **self.pixels(clips, frames, dtype)}

    def prefill(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Logits, whose last position gives the first token, and the cache."""
        outputs = model(**inputs, use_cache=True, logits_to_keep=1)
        return outputs.logits, outputs.past_key_values


@dataclass(frozen=True)
class Elva(Pipeline):
    """ELVA under a merge schedule, all frames high or a quarter of them."""

    merge_schedule: Any = "none"
    hybrid: bool = False

    front_end = "model.patch_embed"

    def build(self, device: str, dtype: torch.dtype, attention: str) -> nn.Module:
        model = make_model(self.scale.size.config, device, dtype, attention)
        model.set_merge_schedule(self.merge_schedule)
        return model

    @property
    def merges(self) -> bool:
        return self.merge_schedule != "none"

    def clip(self, frames: int, seed: int = 0) -> Clip:
        """A made-up clip."""
        return Clip.of(self.scale.size, frames, hybrid=self.hybrid, seed=seed)

    def plan(self, frames: int) -> TokenPlan:
        """Tokens by layer; what a threshold keeps is known only afterwards."""
        size = self.scale.size
        return plan_tokens([self.clip(frames).grids], size.config, self.merge_schedule, size.text_tokens - 2)

    def visual_tokens(self, frames: int) -> int:
        return self.plan(frames).num_visual_tokens

    def layers(self, frames: int) -> list[int]:
        plan = self.plan(frames)
        if not all(layer.is_exact for layer in plan.layers):
            raise ValueError(f"what {self.merge_schedule!r} keeps depends on the pixels; derive a schedule of ratios.")
        return [layer.maximum for layer in plan.layers]

    def encoder_flops(self, frames: int) -> EncoderFlops:
        return EncoderFlops(self.plan(frames).patch_embed_flops)

    def inputs(self, frames: int, clips: int, dtype: torch.dtype) -> dict[str, Tensor]:
        made = [self.clip(frames, seed) for seed in range(clips)]
        return make_inputs(made, self.scale.size.config, "cpu", dtype)
