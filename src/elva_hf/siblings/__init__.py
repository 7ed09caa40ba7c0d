"""Other systems that see video in the way of ELVA's interface: same tokens, same merging, same calls.

A sibling is a front end. Everything behind it is ELVA's own, by inheritance from `ElvaModel` and `ElvaForCausalLM`, so
that nothing is written twice: the decoder packed or padded, merging by `merge_schedule`, caches, generate() with beams
and assistants, the loss, saving and loading, LoRA, gradient checkpointing, guidance, the pipeline. What a sibling adds:

- A configuration, a `VideoDecoderConfig`: `pixels_per_token`, the width of a row of `pixel_values_videos` (one row for
  each visual token that has pixels, so that samples and beams are split by counting tokens); `frame_layout`, which
  tokens a frame has; `patch_embed_flops`; `presets()`.
- A front end, `Model.patch_embed_class`: `encode_pixels(pixels)` as far as no geometry is needed, one row per token;
  `forward(features, geometry)` gives the embeddings of patches, frames and rows. Geometry comes from the token ids
  alone, as ELVA's does. `reset_own_parameters(config)` draws what is no weight of a linear layer.
- `ForCausalLM.base_model_class`, and in its video processor `layout`.

Tokens: what a sibling puts before the patches of a frame stands under `<FRAME>`, what closes a row under `<LINE>`.
Where it has no such token, the id marks a patch (`layout_elva.FrameLayout`), because the ids must still tell the grid.
Frames that become one visual unit (`chunk_size`) are written once, as one frame of the geometry.
"""
