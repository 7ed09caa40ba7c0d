"""ELVA: a causal text decoder that sees video without a vision encoder (section 3.1)."""

from __future__ import annotations

import copy
import os
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .attention_elva import wrap_decoder
from .cache_elva import adopt_cache, has_merged, has_seen
from .configuration_elva import SPECIAL_TOKENS, TOKEN_ID_FIELDS, ElvaConfig, VideoDecoderConfig
from .decoder_elva import NO_MERGING, can_pack, run_packed, run_padded, sliding_window
from .embedding_elva import ElvaPatchEmbedding
from .errors_elva import CheckpointError, ConfigurationError, PlaceholderError
from .generation_elva import ElvaGenerationMixin
from .geometry_elva import (
    FRAME,
    LINE,
    PATCH,
    VIDEO_END,
    VIDEO_START,
    VisualGeometry,
    read_geometry,
    to_host,
    token_kinds,
    token_kinds_from_embeddings,
)
from .guidance_elva import ElvaGuidance
from .merging_elva import InputMerge
from .outputs_elva import ElvaCausalLMOutputWithPast, ElvaModelOutputWithPast, ElvaVideoFeatures
from .packing_elva import count_questions
from .schedule_elva import MergeSchedule
from .transfer_elva import to_device

LOSS_ROWS = 1024
"""Supervised positions whose logits exist at a time; bounds the memory of the loss."""

MergeScheduleLike = str | list | dict | MergeSchedule


class ElvaPreTrainedModel(PreTrainedModel):
    """What transformers must know of every class here.

    A module that starts otherwise than transformers would have it has `reset_own_parameters(config)`. It must hold
    parameters itself: in packages like this one transformers passes over modules that do not.
    """

    config: VideoDecoderConfig
    config_class = ElvaConfig  # transformers cannot resolve the annotation, here a string
    base_model_prefix = "model"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # the decoder brings its own
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # a prefill with video reads its geometry on the host
    _keys_to_ignore_on_load_unexpected = [r"^guidance\."]  # heads of training that are not wanted here

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_own_parameters"):
            module.reset_own_parameters(self.config)
        if isinstance(module, ElvaGuidance) and module.logit_scale is not None:
            init.constant_(module.logit_scale, module.logit_scale_init)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the decoder gets the wrapper of that attention, which knows packed rows."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, ElvaModel):
                wrap_decoder(module.language_model)

    def set_merge_schedule(self, merge_schedule: MergeScheduleLike) -> None:
        """Set when and how visual tokens merge, for this model and what is saved of it.

        Args:
            merge_schedule: A preset (`"none"`, `"paper"`, `"table5"`), a list of steps, or a `MergeSchedule`.

        Raises:
            ConfigurationError: It is no schedule for a decoder of this depth.
        """
        self.config.resolve_merge_schedule(merge_schedule)
        is_schedule = isinstance(merge_schedule, MergeSchedule)
        self.config.merge_schedule = merge_schedule.to_dict() if is_schedule else merge_schedule


class ElvaModel(ElvaPreTrainedModel):
    """The decoder without its language-model head: tokens and pixels to hidden states.

    A sibling replaces `patch_embed_class`: a module made of `(config, hidden_size)` whose `encode_pixels(pixels)` gives
    features, one row for each patch token, and whose `forward(features, geometry)` gives the embeddings of patches
    `(P, D)`, frames `(F, D)` and rows `(L, D)`; of tokens that its layout does not have, `(0, D)`.
    """

    patch_embed_class: type[nn.Module] = ElvaPatchEmbedding

    def __init__(self, config: ElvaConfig):
        super().__init__(config)
        config.resolve_merge_schedule()  # one given to from_pretrained has not been checked yet
        self.language_model = AutoModel.from_config(config.text_config)
        wrap_decoder(self.language_model)
        self.patch_embed = self.patch_embed_class(config, config.text_config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: Tensor, patches_per_video: list[int] | None = None, **kwargs: Any
    ) -> ElvaVideoFeatures:
        """Encode pixels as far as no geometry is needed: the first linear of the patch embedding.

        Args:
            pixel_values_videos: `(P, 3 * patch_size**2)` normalised patches of all videos, in order.
            patches_per_video: Patches of each video, to return them apart; one tensor if None.

        Returns:
            `pooler_output`: tuple of `(patches, patch_embed_dim)` tensors.
        """
        self._check_pixels(pixel_values_videos)
        features = self.patch_embed.encode_pixels(pixel_values_videos)
        return ElvaVideoFeatures(
            last_hidden_state=features,
            pooler_output=features.split(patches_per_video or [features.shape[0]]),
            pixel_values_videos=pixel_values_videos,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        merge_schedule: MergeScheduleLike | None = None,
        output_merge_map: bool = False,
        segment_ids: Tensor | None = None,
        positions_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ElvaModelOutputWithPast:
        """Run the decoder over text and video.

        Args:
            input_ids: `(B, N)` token ids; geometry is read from them.
            pixel_values_videos: `(P, 3 * patch_size**2)` one row for each patch token of `input_ids`, in order.
            attention_mask: `(B, N)` 1 for a real token, or a ready 4-D mask.
            position_ids: `(B, N)` position of each token.
            past_key_values: Keys and values of earlier tokens.
            inputs_embeds: `(B, N, D)` instead of `input_ids`; visual tokens hold the rows of their special token.
            mm_encoder_outputs: Output of `get_video_features` under the key `"video"`, instead of pixels.
            use_cache: Whether to return keys and values.
            merge_schedule: Overrides `config.merge_schedule`; on a filled cache, for the new tokens only.
            output_merge_map: Whether to return, and keep in the cache, who merged into whom.
            segment_ids: `(B, N)` for rows of one prefix and many questions: 0 for the prefix, which holds the videos,
                then 1, 2, ...; a question sees the prefix and itself only. Give `position_ids` that start again after
                the prefix. Needs no cache and no mask of all by all, and goes with merging.
            positions_to_keep: Return `last_hidden_state` of the last so many positions, or of these; 0 for all.
            **kwargs: Passed to the decoder.

        Raises:
            PlaceholderError: Pixels and patch tokens do not match, or a frame is malformed.
            ConfigurationError: `merge_schedule` is no schedule for this decoder, or cannot be had together with
                attention weights, a 4-D mask, this cache or this decoder.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise PlaceholderError("give exactly one of input_ids and inputs_embeds.")
        columns = _read_columns(positions_to_keep)
        if has_merged(past_key_values):
            past_key_values = adopt_cache(past_key_values, self.config.text_config.num_hidden_layers)
        features = self._video_features(pixel_values_videos, mm_encoder_outputs)
        tokens = input_ids if input_ids is not None else inputs_embeds
        is_step = _is_step(tokens, features, past_key_values)
        schedule = NO_MERGING if is_step else self.config.resolve_merge_schedule(merge_schedule)
        geometry = self._geometry(input_ids, inputs_embeds, past_key_values, features, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        merged = None
        if geometry is not None:
            inputs_embeds, merged = self._place_visual_embeddings(inputs_embeds, features, geometry)
        elif self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._unused_patch_embedding(inputs_embeds)
        inputs = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        can_merge = geometry is not None and geometry.num_patches > 0
        packs = can_merge and (
            schedule or merged is not None or has_merged(past_key_values) or self._packs_unmerged(inputs, kwargs)
        )
        if not packs and not has_merged(past_key_values) and segment_ids is None:
            outputs = self.language_model(**inputs, use_cache=use_cache, **kwargs)
            if columns is not None:
                outputs["last_hidden_state"] = outputs.last_hidden_state[:, columns]
            return ElvaModelOutputWithPast(**outputs)
        states = self._take_output_flags(attention_mask, kwargs)
        if not can_merge and segment_ids is None:
            outputs = run_padded(self.language_model, **inputs, columns=columns, output_hidden_states=states, **kwargs)
        else:
            outputs = run_packed(
                self.language_model,
                **inputs,
                use_cache=use_cache,
                frame_index=geometry.frame_numbers if output_merge_map and can_merge else None,
                **self._read_rows(inputs, geometry, schedule, segment_ids),
                merged=merged,
                columns=columns,
                output_hidden_states=states,
                output_merge_map=output_merge_map,
                **kwargs,
            )
        return ElvaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            merge_map=outputs.merge_map,
        )

    def _read_rows(
        self,
        inputs: dict[str, Any],
        geometry: VisualGeometry | None,
        schedule: MergeSchedule,
        segment_ids: Tensor | None,
    ) -> dict[str, Any]:
        """What a packed forward must know of its rows on the host: padding, what may merge, and questions."""
        host = None if geometry is None else geometry.host or geometry
        can_merge = host is not None and host.num_patches > 0
        rows = {
            "schedule": schedule,
            "tubes": geometry.tubes(schedule.window, schedule.max_run) if schedule and can_merge else None,
            "valid": None if host is None else host.valid,
        }
        if segment_ids is None:
            return rows
        if host is None:
            mask, shape = inputs["attention_mask"], inputs["inputs_embeds"].shape[:2]
            rows["valid"] = torch.ones(shape, dtype=torch.bool) if mask is None else to_host(mask != 0)
        visual = None if host is None else torch.cat([host.patch_index, host.frame_index, host.line_index])
        return {**rows, "questions": count_questions(to_host(segment_ids), rows["valid"], visual)}

    def _packs_unmerged(self, inputs: dict[str, Any], kwargs: dict[str, Any]) -> bool:
        """Whether a forward with video but without merging runs packed, which spares its padding."""
        text = self.language_model.config
        mask = inputs["attention_mask"]
        plain_mask = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        return plain_mask and can_pack(text) and sliding_window(text) is None and not self._wants("attentions", kwargs)

    def _wants(self, what: str, kwargs: dict[str, Any]) -> bool | int | list[int]:
        given = kwargs.get(f"output_{what}")
        return getattr(self.language_model.config, f"output_{what}", False) if given is None else given

    def _take_output_flags(self, attention_mask: Any, kwargs: dict[str, Any]) -> bool | int | list[int]:
        """Take out of `kwargs` which hidden states are wanted; refuse what merged tokens cannot give."""
        if self._wants("attentions", kwargs):
            raise ConfigurationError(
                "output_attentions=True cannot be had of merged tokens: every layer sees other keys. Use "
                "merge_schedule='none'."
            )
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
            raise ConfigurationError(
                "merging needs an attention_mask of shape (B, N) and makes its own masks from it; got "
                f"{tuple(getattr(attention_mask, 'shape', ()))}. Use merge_schedule='none' for a mask of your own."
            )
        states = self._wants("hidden_states", kwargs)
        for name in ("output_attentions", "output_hidden_states"):
            kwargs.pop(name, None)
        return states

    def _check_pixels(self, pixels: Tensor) -> None:
        size, width = self.config.patch_size, self.config.pixels_per_token
        if pixels.ndim != 2 or pixels.shape[1] != width or not pixels.is_floating_point():
            raise PlaceholderError(
                f"pixel_values_videos has shape {tuple(pixels.shape)} and dtype {pixels.dtype}; expected floating "
                f"point, (num_patches, {width}) for patch_size={size}. Use this checkpoint's processor."
            )

    def _video_features(self, pixels: Tensor | None, mm_encoder_outputs: dict | None) -> Tensor | None:
        encoded = (mm_encoder_outputs or {}).get("video")
        if pixels is not None and encoded is not None:
            raise PlaceholderError("give pixel_values_videos or mm_encoder_outputs, not both.")
        if encoded is not None:
            return torch.cat(list(encoded.pooler_output))
        if pixels is None:
            return None
        self._check_pixels(pixels)
        return self.patch_embed.encode_pixels(pixels)

    def _geometry(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: Cache | None,
        features: Tensor | None,
        attention_mask: Tensor | None = None,
    ) -> VisualGeometry | None:
        """Read the geometry and check it against the pixels; a decode step of one token is not read at all."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        if _is_step(tokens, features, cache):
            return None
        has_rows = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        mask = attention_mask[:, -tokens.shape[1] :] if has_rows else None
        geometry = self.read_geometry(input_ids, inputs_embeds, mask)
        num_patches = 0 if geometry is None else geometry.num_patches
        num_features = 0 if features is None else features.shape[0]
        if num_patches != num_features:
            raise PlaceholderError(
                f"{num_patches} patch tokens in the input but pixels for {num_features}. Pass input_ids and "
                "pixel_values_videos from the same processor call; with a filled cache, pass the pixels of the new "
                "videos only."
            )
        return geometry

    def read_geometry(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> VisualGeometry | None:
        """Where every visual token of a batch stands; see `geometry_elva.read_geometry`.

        Args:
            input_ids: As in `token_kinds`.
            inputs_embeds: Likewise.
            attention_mask: `(B, N)`, 0 for padding.

        Raises:
            PlaceholderError: A frame is malformed.
        """
        return read_geometry(self.token_kinds(input_ids, inputs_embeds), attention_mask, self.config.frame_layout)

    def token_kinds(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Kinds of the tokens of a batch, for `read_geometry`, from ids or else from embeddings.

        Args:
            input_ids: `(B, N)` token ids, or None.
            inputs_embeds: `(B, N, D)`, in which visual tokens hold the rows of their special token.

        Returns:
            `(B, N)` int64 kinds.
        """
        config = self.config
        ids = {
            VIDEO_START: config.video_start_token_id,
            VIDEO_END: config.video_end_token_id,
            PATCH: config.video_token_id,
            FRAME: config.frame_token_id,
            LINE: config.line_token_id,
        }
        if input_ids is not None:
            return token_kinds(input_ids, ids)
        table = self.get_input_embeddings()
        rows = table(to_device([torch.tensor(list(ids.values()))], inputs_embeds.device)[0]).to(inputs_embeds.dtype)
        return token_kinds_from_embeddings(inputs_embeds, dict(zip(ids, rows, strict=True)))

    def _unused_patch_embedding(self, inputs_embeds: Tensor) -> Tensor:
        """Zero, through every parameter of the patch embedding: DDP waits for the gradient of each, video or not."""
        one_patch = torch.tensor([[VIDEO_START, FRAME, PATCH, LINE, VIDEO_END]])
        geometry = read_geometry(one_patch).to(inputs_embeds.device)
        pixels = inputs_embeds.new_zeros(1, self.config.pixels_per_token)
        embeddings = torch.cat(self.patch_embed(self.patch_embed.encode_pixels(pixels), geometry))
        return (embeddings.sum() * 0.0).to(inputs_embeds.dtype)

    def _place_visual_embeddings(
        self, inputs_embeds: Tensor, features: Tensor, geometry: VisualGeometry
    ) -> tuple[Tensor, InputMerge | None]:
        """Put the embeddings of visual tokens in their places; with them what merged on the way, which ELVA has not."""
        features = features.to(inputs_embeds.device)
        embeddings = torch.cat(self.patch_embed(features, geometry)).to(inputs_embeds.dtype)
        where = torch.cat([geometry.patch_index, geometry.frame_index, geometry.line_index])
        return inputs_embeds.flatten(0, 1).index_copy(0, where, embeddings).view_as(inputs_embeds), None


class ElvaForCausalLM(ElvaPreTrainedModel, ElvaGenerationMixin):
    """ELVA with a language-model head: answers in text about text and video.

    A sibling replaces `base_model_class`.
    """

    base_model_class: type[ElvaModel] = ElvaModel
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ElvaConfig):
        super().__init__(config)
        self.model = self.base_model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.guidance = None if config.guidance is None else ElvaGuidance(config)
        self.post_init()
        self.generation_config.suppress_tokens = config.special_token_ids

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def set_guidance(self, guidance: dict[str, Any] | None) -> None:
        """Add, replace or remove the task heads of a vision teacher (section 3.2); do it before making an optimiser.

        Heads that the new guidance has too, at the same width, keep their weights: the next stage goes on with them.

        Args:
            guidance: What `ElvaConfig.guidance` may be; None removes the heads.

        Raises:
            ConfigurationError: `guidance` is malformed.
        """
        old = self.guidance.state_dict() if self.guidance is not None else {}
        self.config.guidance = guidance
        self.guidance = None
        if self.config.guidance is None:
            return
        heads = ElvaGuidance(self.config)
        heads.apply(self._init_weights)
        new = heads.state_dict()
        heads.load_state_dict(new | {k: v for k, v in old.items() if k in new and v.shape == new[k].shape})
        self.guidance = heads.to(self.device, self.dtype)

    def get_video_features(self, pixel_values_videos: Tensor, **kwargs: Any) -> ElvaVideoFeatures:
        """See `ElvaModel.get_video_features`."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        merge_schedule: MergeScheduleLike | None = None,
        output_merge_map: bool = False,
        **kwargs: Any,
    ) -> ElvaCausalLMOutputWithPast:
        """Run the decoder and the head.

        Arguments as in `ElvaModel.forward`, and:

        Args:
            labels: `(B, N)` token ids to predict, -100 where there is nothing to learn (L_Gen of Eq. 4). The loss
                computes logits where a label is, and nowhere else.
            logits_to_keep: Compute logits for the last so many positions, or for these positions; 0 for all.
                In training mode with labels there are none: `(B, N, vocab)` would be most of the memory.
        """
        needs_all = labels is not None or self.training  # guidance reads the states of patches
        outputs = self.model(
            input_ids=input_ids,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            merge_schedule=merge_schedule,
            output_merge_map=output_merge_map,
            positions_to_keep=0 if needs_all else logits_to_keep,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        logits, loss = None, None
        if labels is None or not self.training:
            columns = _read_columns(logits_to_keep) if needs_all else None
            logits = self.lm_head(hidden if columns is None else hidden[:, columns])
        if labels is not None:
            shifted = kwargs.get("shift_labels")
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if shifted is None else shifted
            loss = self.generative_loss(hidden, targets, kwargs.get("num_items_in_batch"))
        return ElvaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            merge_map=outputs.merge_map,
        )

    def generative_loss(
        self, hidden: Tensor, shift_labels: Tensor, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of the next token where there is a label (L_Gen of Eq. 4), without logits anywhere else.

        Args:
            hidden: `(B, N, D)` last hidden states.
            shift_labels: `(B, N)` token each position has to predict, -100 where there is nothing to learn.
            num_items_in_batch: What the sum is divided by; the labels of this batch if None.

        Returns:
            A scalar; zero, with a gradient, if there is no label.
        """
        targets = shift_labels.flatten().to(hidden.device)
        learned = (targets != -100).nonzero().squeeze(1)
        rows, targets = hidden.flatten(0, 1)[learned], targets[learned]
        count = num_items_in_batch if num_items_in_batch is not None else max(len(learned), 1)
        if not len(learned):
            return self.lm_head(hidden[:, :0]).sum()  # DDP waits for the gradient of every weight

        def part_of_loss(rows: Tensor, targets: Tensor) -> Tensor:
            return self.loss_function(
                logits=self.lm_head(rows)[None],
                labels=None,
                shift_labels=targets[None],
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=count,
            )

        if len(learned) <= LOSS_ROWS:
            return part_of_loss(rows, targets)
        parts = zip(rows.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        return torch.stack([checkpoint(part_of_loss, *part, use_reentrant=False) for part in parts]).sum()

    @classmethod
    def from_text_model(
        cls, path_or_model: str | os.PathLike | PreTrainedModel, tokenizer: Any = None, **config: Any
    ) -> Self:
        """Put a fresh visual front end on an existing text model.

        The decoder keeps its weights; the patch embedding and the rows of new tokens are random, so the
        model must be trained before it can see.

        Args:
            path_or_model: A causal language model, or what `AutoModelForCausalLM.from_pretrained` takes.
            tokenizer: Its tokenizer; missing special tokens are added to it. Needed unless `config` names every id.
            **config: Fields of the model's configuration.

        Raises:
            CheckpointError: The model has no decoder embeddings of the usual form.
            ConfigurationError: Neither a tokenizer nor the special token ids are given.
        """
        text = path_or_model
        if not isinstance(text, PreTrainedModel):
            text = AutoModelForCausalLM.from_pretrained(text, use_safetensors=True)
        ids = add_special_tokens(tokenizer) if tokenizer is not None else {}
        missing = [name for name in TOKEN_ID_FIELDS if name not in {**ids, **config}]
        if missing:
            raise ConfigurationError(f"give the model's tokenizer, or set {', '.join(missing)}.")
        if getattr(text, "base_model", text) is text or text.get_output_embeddings() is None:
            raise CheckpointError(f"{type(text).__name__} is no causal language model with a head; cannot build on it.")
        config = cls.config_class(text_config=copy.deepcopy(text.config), **{**ids, **config})
        model = cls(config).to(text.dtype)
        model.model.language_model.load_state_dict(text.base_model.state_dict())
        model.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
        model.tie_weights()
        if max(config.special_token_ids) >= text.config.vocab_size:
            model.resize_token_embeddings(max(config.special_token_ids) + 1)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, getattr(text.generation_config, name))
        return model


def _is_step(tokens: Tensor, features: Tensor | None, cache: Cache | None) -> bool:
    """Whether a forward is a decode step: one token that follows others."""
    return features is None and tokens.shape[1] == 1 and has_seen(cache)


def _read_columns(keep: int | Tensor) -> slice | Tensor | None:
    """Index of the last so many columns, or of these; None for all."""
    if isinstance(keep, int):
        return slice(-keep, None) if keep else None
    return keep


def add_special_tokens(tokenizer: Any) -> dict[str, int]:
    """Add the visual tokens a tokenizer lacks; returns the id of each under its config key."""
    have = tokenizer.get_vocab()
    new = [token for token in SPECIAL_TOKENS.values() if token not in have]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
