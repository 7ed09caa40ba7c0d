"""Video-Panda: a causal text decoder behind a Spatio-Temporal Alignment Block."""

from __future__ import annotations

from elva_hf.modeling_elva import ElvaForCausalLM, ElvaModel
from elva_hf.siblings.video_panda.alignment_video_panda import SpatioTemporalAlignment
from elva_hf.siblings.video_panda.configuration_video_panda import VideoPandaConfig


class VideoPandaModel(ElvaModel):
    """The decoder without its language-model head: tokens and pixels to hidden states."""

    config: VideoPandaConfig
    config_class = VideoPandaConfig
    patch_embed_class = SpatioTemporalAlignment


class VideoPandaForCausalLM(ElvaForCausalLM):
    """Video-Panda with a language-model head: answers in text about text and video."""

    config: VideoPandaConfig
    config_class = VideoPandaConfig
    base_model_class = VideoPandaModel
