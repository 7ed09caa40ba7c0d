"""Mavors: ELVA's decoder behind an inflated image tower and an aggregator of chunks."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
from torch import Tensor

from elva_hf.merging_elva import InputMerge
from elva_hf.modeling_elva import ElvaForCausalLM, ElvaModel
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.towers_mavors import load_tower, read_tower_config, read_tower_weights
from elva_hf.siblings.mavors.vision_mavors import ChunkGeometry, MavorsVisionEncoder


class MavorsModel(ElvaModel):
    """The decoder without its language-model head: tokens and pixels to hidden states."""

    config: MavorsConfig
    config_class = MavorsConfig
    patch_embed_class = MavorsVisionEncoder

    def _geometry(
        self, input_ids: Any, inputs_embeds: Any, cache: Any, features: Any, attention_mask: Any = None
    ) -> Any:
        geometry = super()._geometry(input_ids, inputs_embeds, cache, features, attention_mask)
        return geometry if geometry is None else ChunkGeometry.split(geometry, features)

    def _place_visual_embeddings(
        self, inputs_embeds: Tensor, features: Tensor, geometry: ChunkGeometry
    ) -> tuple[Tensor, InputMerge | None]:
        features = features.to(inputs_embeds.device)
        embeddings, compressed = self.patch_embed.encode_chunks(features, geometry.sequences)
        places = geometry.patch_index
        placed = inputs_embeds.flatten(0, 1).index_copy(0, places, embeddings.to(inputs_embeds.dtype))
        merged = None
        if compressed is not None:
            own = torch.arange(len(placed), device=places.device)
            survivors = own.index_copy(0, places, places[compressed.survivors]).view(inputs_embeds.shape[:2])
            merged = InputMerge(survivors, geometry.tubes().tail)
        return placed.view_as(inputs_embeds), merged


class MavorsForCausalLM(ElvaForCausalLM):
    """Mavors with a language-model head: answers in text about text and video."""

    config: MavorsConfig
    config_class = MavorsConfig
    base_model_class = MavorsModel

    def load_image_tower(self, path: str | os.PathLike) -> None:
        """Inflate the weights of a SigLIP image tower into the chunk encoder (section 3.3).

        Args:
            path: See `read_tower_weights`.

        Raises:
            CheckpointError: There is no tower, or one of other sizes.
        """
        load_tower(self.model.patch_embed.encoder, read_tower_weights(path))

    @classmethod
    def from_towers(cls, text_model: Any, image_tower: str | os.PathLike, tokenizer: Any = None, **config: Any) -> Self:
        """Build a model from a text model and a SigLIP image tower, as the paper does; the rest is fresh.

        Args:
            text_model: See `from_text_model`.
            image_tower: Folder of a SigLIP checkpoint, whole or its image tower alone.
            tokenizer: See `from_text_model`.
            **config: Fields of `MavorsConfig`.

        Raises:
            CheckpointError: One of the two cannot be used.
            ConfigurationError: Neither a tokenizer nor the special token ids are given.
        """
        vision = read_tower_config(image_tower)
        side = vision.patch_size * config.get("pool_size", MavorsConfig.pool_size)
        fields = {"vision_config": vision.to_dict(), "patch_size": side, **config}
        model = cls.from_text_model(text_model, tokenizer=tokenizer, **fields)
        model.load_image_tower(image_tower)
        return model
