"""Tiny random Video-Pandas for the tests; samples, padding and pixels are those of `tiny_elva`.

A sample is written in ELVA's tokens; `relaid` writes it as a model's layout does.
"""

import torch
from merging_cases import in_double, positions
from tiny_elva import FRAME, LINE, PATCH, PATCH_SIZE, batch, tiny_text_config, with_pixels

from elva_hf.siblings.video_panda.configuration_video_panda import ABLATIONS, VideoPandaConfig
from elva_hf.siblings.video_panda.modeling_video_panda import VideoPandaForCausalLM

TINY = {
    "patch_size": PATCH_SIZE,
    "stab_patch_size": 2,
    "stab_dim": 16,
    "stab_num_heads": 2,
    "initializer_range": 0.3,
    "video_start_token_id": 3,
    "video_end_token_id": 4,
    "video_token_id": PATCH,
    "frame_token_id": FRAME,
    "line_token_id": LINE,
    "image_token_id": 8,
}
PATCH_SIDES = {"half-resolution": {"stab_patch_size": PATCH_SIZE}, "perceiver": {"stab_patch_size": 1}}
VARIANTS = ("paper", *ABLATIONS, "pooled", "literal")
"""The paper's model, every ablation, and other readings of what it leaves open; tokens are as large in all."""


def variant_fields(variant):
    """Fields of a variant; a visual token stands for PATCH_SIZE pixels in each, so that all see the same pixels."""
    if variant == "literal":
        return {"reference_blocks": False, "global_mlp_ratio": 0, "attention_scale": "width"}
    if variant == "pooled":
        return {"lsd_query": "pooled"}
    fields = {name: value for name, value in ABLATIONS.get(variant, {}).items() if name != "window_size"}
    return {**fields, **PATCH_SIDES.get(variant, {})}


def tiny_panda_config(model_type="llama", text=None, **overrides):
    """Configuration of the paper's model, as small as it goes."""
    return VideoPandaConfig(text_config=tiny_text_config(model_type, **(text or {})), **{**TINY, **overrides})


def tiny_panda(variant="paper", model_type="llama", seed=0, text=None, **overrides):
    """A model whose LSTE does something: its last convolution, which starts at zero, is drawn."""
    config = tiny_panda_config(model_type, text, **{**variant_fields(variant), **overrides})
    torch.manual_seed(seed)
    model = VideoPandaForCausalLM(config).eval()
    lste = model.model.patch_embed.lste
    if lste is not None:
        torch.nn.init.normal_(lste.restore.weight, std=0.3)
    return model


def double_panda(variant="paper", **options):
    """The same in float64, every operation of it."""
    return in_double(tiny_panda(variant, **options))


def relaid(ids, layout):
    """Ids of a sample as a layout without `<LINE>` tokens writes them."""
    if layout.line_token:
        return list(ids)
    written, row = [], []
    for token in ids:
        if token == LINE:
            written += [LINE, *row[1:]]
            row = []
        elif token == PATCH:
            row.append(token)
        else:
            written.append(token)
    return written


def shown(model, samples, draw, side="left", seeds=None):
    """A padded batch for a model: sample `i` with the pixels that `draw(ids, seed)` gives for its ELVA tokens."""
    seeds = range(len(samples)) if seeds is None else seeds
    drawn = [draw(ids, seed) for ids, seed in zip(samples, seeds, strict=True)]
    drawn = [patches.to(model.dtype) for patches in drawn if patches is not None]
    inputs = batch([relaid(ids, model.config.frame_layout) for ids in samples], side)
    inputs["position_ids"] = positions(inputs["attention_mask"])
    return with_pixels(inputs, torch.cat(drawn) if drawn else None)
