"""What generate() needs of a model that sees video: padding, videos of beams and assistants, masks of static caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_elva import has_merged, has_seen
from .configuration_elva import ElvaConfig
from .errors_elva import PlaceholderError
from .geometry_elva import find_patches
from .outputs_elva import ElvaVideoFeatures


class ElvaGenerationMixin(GenerationMixin):
    """`generate` for a model with a head over a `model` that reads `token_kinds`."""

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs: Any) -> tuple:
        """As `GenerationMixin`'s; visual tokens are never generated, whatever else is suppressed."""
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        suppressed = {*(generation_config.suppress_tokens or ()), *self.config.special_token_ids}
        generation_config.suppress_tokens = sorted(suppressed)
        return generation_config, model_kwargs

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; right-padded prompts are turned to the left first.

        A decoder continues the last position of a row, so padding must stand on the left. Rows of a
        right-padded batch are rotated, which is exact; the returned prompts are then left-padded.
        """
        input_ids, mask = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("attention_mask")
        if kwargs.get("pixel_values_videos") is None:
            kwargs.pop("pixel_values_videos", None)  # transformers would encode the None
        fresh = kwargs.get("position_ids") is None and kwargs.get("past_key_values") is None
        if fresh and input_ids is not None and mask is not None and mask.shape == input_ids.shape:
            kwargs["input_ids"], kwargs["attention_mask"] = turn_padding_left(input_ids, mask)
            inputs = None
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Mend two things in assisted generation: a prefill on a filled cache, and the assistant's own prefill.

        The first would feed the whole prompt again; the second is not announced as the first step and
        would lose its video.
        """
        if is_first_iteration and next_sequence_length is None and has_seen(past_key_values):
            next_sequence_length = input_ids.shape[1] - int(past_key_values.get_seq_length())
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration or (past_key_values is not None and not has_seen(past_key_values)),
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(
        config: ElvaConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Tensor | dict[str, Tensor] | None:
        """Masks for a step with a static cache: ready ones, except where the model makes its own.

        A prefill does. After a merge the cache knows its holes, so the mask of the new tokens will do, which does not
        grow with the answer.
        """
        if is_first_iteration or (attention_mask is not None and attention_mask.ndim != 2):
            return attention_mask
        if has_merged(past_key_values):
            new = None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
            return new if new is None else new.clone(memory_format=torch.contiguous_format)  # strides that stay
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: dict[str, Any], assistant_model: PreTrainedModel | None = None, **kwargs: Any
    ) -> Any:
        """Let an assistant model encode the pixels: its front end has weights of its own."""
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("video")
        pixels = getattr(encoded, "pixel_values_videos", None)
        if isinstance(assistant_model, ElvaGenerationMixin) and pixels is not None:
            own = assistant_model.get_video_features(pixels.to(assistant_model.device))
            model_kwargs = {**model_kwargs, "mm_encoder_outputs": {"video": own}}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat each sample's videos with it; videos whose tokens the cache already holds are dropped."""
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and encoded.get("video") is not None:
            per_sample = self._split_features_by_sample(encoded["video"], input_ids, model_kwargs)
            repeated = [features for features in per_sample for _ in range(expand_size)]
            pixels = getattr(encoded["video"], "pixel_values_videos", None)
            encoded = {"video": ElvaVideoFeatures(pooler_output=repeated, pixel_values_videos=pixels)}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, "mm_encoder_outputs": encoded}

    def _split_features_by_sample(
        self, encoded: BaseModelOutputWithPooling, input_ids: Tensor | None, model_kwargs: dict[str, Any]
    ) -> list[Tensor]:
        features = torch.cat(list(encoded.pooler_output))
        ids = input_ids if input_ids is not None and input_ids.numel() else None
        kinds = self.model.token_kinds(ids, None if ids is not None else model_kwargs.get("inputs_embeds"))
        cache = model_kwargs.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        patches = find_patches(kinds, self.config.frame_layout)
        total, new = patches.sum(1).tolist(), patches[:, seen:].sum(1).tolist()
        if features.shape[0] == sum(new):
            return list(features.split(new))
        if features.shape[0] == sum(total):
            return [part[len(part) - count :] for part, count in zip(features.split(total), new, strict=True)]
        raise PlaceholderError(
            f"pixels for {features.shape[0]} patches, but the prompt has {sum(total)} patch tokens, {sum(new)} of them "
            "not in the cache. Pass input_ids and pixel_values_videos from the same processor call."
        )


def turn_padding_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the rows of a right-padded batch so that their padding stands on the left.

    Args:
        input_ids: `(B, N)`.
        attention_mask: `(B, N)`, 0 for padding.

    Returns:
        Both, rotated row by row; a left-padded batch comes back unchanged.
    """
    length = attention_mask.shape[1]
    trailing = (attention_mask.flip(1) != 0).int().argmax(1)
    order = (torch.arange(length, device=attention_mask.device) - trailing[:, None]) % length
    return input_ids.gather(1, order), attention_mask.gather(1, order)
