"""Rows of one video and many questions through the decoder with fewer patches: merged, pooled or dropped.

Patches are counted, and marks are not: merging and pooling keep `<FRAME>` and `<LINE>` of every frame, dropping leaves
out those of its frames. A mean stands at the position of its last member, a frame that is left where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pooling import Pooling, embed, pooling_matrix
from torch import Tensor

from claims.protocol import Reduction
from elva_hf.data.collator import shared_prefix_mask
from elva_hf.geometry_elva import read_geometry

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What the decoder made of a batch.

    Args:
        hidden: `(B, N, D)` last hidden states.
        labels: `(B, N)` ids of the answers, -100 elsewhere.
        segments: `(B, N)` 0 for the video, 1, 2, ... for the questions, -1 for padding.
        visual_share: Share of the patches that is left, mean over the layers.
        tokens: Real tokens that entered the decoder.
    """

    hidden: Tensor
    labels: Tensor
    segments: Tensor
    visual_share: float
    tokens: int


def read(model: Any, batch: Batch, reduction: Reduction) -> Reading:
    """Run a batch of rows through the decoder.

    Args:
        model: An `ElvaForCausalLM`.
        batch: `input_ids`, `labels`, `position_ids`, `segment_ids`, each `(B, N)`, and `pixel_values_videos`.
        reduction: Of the patches.

    Raises:
        ValueError: Rows to be pooled whose videos differ in frames or grid, or a ratio that cannot be had.
    """
    if reduction.kind == "merge":
        return _read_merged(model, batch, reduction)
    return _read_pooled(model, batch, reduction)


def merge_schedule(reduction: Reduction, num_layers: int) -> Any:
    """The schedule of a merging: one ratio step that leaves the ratio in the mean over all layers.

    Raises:
        ValueError: The layers before the step have more than that.
    """
    if reduction.schedule is not None:
        return reduction.schedule
    layer, wanted = reduction.layer, num_layers * reduction.ratio
    left = (wanted - layer) / (num_layers - layer)
    if left <= 0:
        raise ValueError(
            f"merging at layer {layer} of {num_layers} cannot leave {reduction.ratio:g} of the patches in the mean "
            f"over layers; expected more than {layer / num_layers:g}."
        )
    return {"steps": [{"layer": layer, "target_ratio": left}]}


def _read_merged(model: Any, batch: Batch, reduction: Reduction) -> Reading:
    num_layers = model.config.text_config.num_hidden_layers
    segments = batch["segment_ids"]
    outputs = model.model(
        input_ids=batch["input_ids"],
        pixel_values_videos=batch["pixel_values_videos"],
        attention_mask=(segments >= 0).long(),
        position_ids=batch["position_ids"],
        segment_ids=segments,
        merge_schedule=merge_schedule(reduction, num_layers),
        output_merge_map=True,
        use_cache=False,
    )
    patches = batch["input_ids"] == model.config.video_token_id
    entering, alive = [], int(patches.sum())
    merges = dict(zip(outputs.merge_map.layers, range(num_layers), strict=False)) if outputs.merge_map else {}
    for layer in range(num_layers):
        if layer in merges:
            alive = int((outputs.merge_map.kept(merges[layer]) & patches).sum())
        entering.append(alive)
    share = sum(entering) / (num_layers * entering[0])
    return Reading(outputs.last_hidden_state, batch["labels"], segments, share, int((segments >= 0).sum()))


def _read_pooled(model: Any, batch: Batch, reduction: Reduction) -> Reading:
    ids, segments = batch["input_ids"], batch["segment_ids"]
    length = int((segments[0] == 0).sum())
    if bool((ids[:, :length] != ids[0, :length]).any()) or bool((segments == 0)[:, length:].any()):
        raise ValueError("rows whose videos differ in frames or grid cannot be pooled together; use one of each.")
    geometry = read_geometry(model.model.token_kinds(ids[:1]).cpu())
    frames = max(1, round(reduction.ratio * geometry.num_frames))
    drops = reduction.kind == "drop"
    matrix, last = pooling_matrix(geometry, length, Pooling(frames, marks=drops))
    matrix, last = matrix.to(ids.device), last.to(ids.device)
    embedded = embed(model, ids, batch["pixel_values_videos"])
    kept = torch.cat([last, torch.arange(length, ids.shape[1], device=ids.device)])
    if drops:
        embedded = embedded[:, kept]
    else:
        with torch.autocast(ids.device.type, enabled=False):
            means = matrix.to(embedded.dtype) @ embedded[:, :length]
        embedded = torch.cat([means, embedded[:, length:]], 1)
    segments = segments[:, kept]
    outputs = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=shared_prefix_mask(segments),
        position_ids=batch["position_ids"][:, kept],
        use_cache=False,
    )
    share = frames / geometry.num_frames
    return Reading(outputs.last_hidden_state, batch["labels"][:, kept], segments, share, int((segments >= 0).sum()))
