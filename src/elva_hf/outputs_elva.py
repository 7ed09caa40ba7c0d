"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .merging_elva import MergeMap


@dataclass
class ElvaVideoFeatures(BaseModelOutputWithPooling):
    """Output of `get_video_features`.

    Args:
        pooler_output: Tuple of `(patches, patch_embed_dim)` tensors.
        pixel_values_videos: `(P, 3 * patch_size**2)` what was encoded, for an assistant model to encode itself.
    """

    pixel_values_videos: Tensor | None = None


@dataclass
class ElvaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `ElvaModel`, at the input's length: a merged token reads the token that stands for it.

    Args:
        merge_map: Who stands for whom after each merge; with `output_merge_map=True` only.
    """

    merge_map: MergeMap | None = None


@dataclass
class ElvaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `ElvaForCausalLM`, at the input's length.

    Args:
        merge_map: Who stands for whom after each merge; with `output_merge_map=True` only.
    """

    merge_map: MergeMap | None = None
