"""The tokens of a packed row between two layers of the decoder: packed, merged, and read at the input's length.

Letters: `B` samples, `N` tokens, `n` tokens of a packed row, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .fusion_elva import merge_tokens, similarity_to_next
from .geometry_elva import to_host
from .merging_elva import (
    InputMerge,
    TubeLinks,
    Tubes,
    count_removals,
    find_survivors,
    link_tubes,
    merge_above,
    merge_most_similar,
    relink_survivors,
)
from .packing_elva import BatchLayout
from .schedule_elva import MergeSchedule, MergeStep
from .transfer_elva import to_device


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of a batch between two layers.

    Args:
        hidden: `(n, D)`.
        rotary: Cosines and sines, each `(1, n, head_dim)`; survivors keep the positions they had.
        tubes: `(n,)` tube of each token.
        groups: `(n,)` ratio group of each patch, -1 elsewhere.
        sizes: `(n,)` input tokens each token stands for.
        origins: `(n,)` index each token had in the packed input.
        now: `(n_input,)` where each token of the packed input, or what stands for it, is now.
        lengths: Tokens of each sample.
        patches: Patches of each group.
        links: The tokens side by side in their tubes, if a merge has left them so.
    """

    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    tubes: Tensor | None
    groups: Tensor | None
    sizes: Tensor | None
    origins: Tensor
    now: Tensor
    lengths: list[int]
    patches: list[int]
    links: TubeLinks | None = None


def merge_step(tokens: PackedTokens, step: MergeStep, schedule: MergeSchedule, tubes: Tubes) -> PackedTokens:
    """Merge once; a threshold waits once for the device, a ratio never.

    Args:
        tokens: Before the merge.
        step: Threshold or ratio.
        schedule: Where `ratio_of` and `survivor` are taken from.
        tubes: The host's knowledge of the groups.
    """
    links = link_tubes(tokens.tubes) if tokens.links is None else tokens.links
    similarity = similarity_to_next(tokens.hidden.detach(), links)
    groups = tokens.groups[links.order]
    if step.similarity_threshold is not None:
        merge = merge_above(similarity, step.similarity_threshold)
        found = torch.zeros(len(tubes.patches) + 1, dtype=torch.long, device=merge.device)
        removals = to_host(found.index_add(0, groups + 1, merge.long()))[1:].tolist()
    else:
        removals = count_removals(tokens.patches, tubes.patches, tubes.floors, step.target_ratio, schedule.ratio_of)
        budget = to_device([torch.tensor(removals)], tokens.hidden.device)[0]
        merge = merge_most_similar(similarity, groups, budget)
    if not any(removals):
        return tokens
    lengths = list(tokens.lengths)
    for sample, count in zip(tubes.samples, removals, strict=True):
        lengths[sample] -= count
    survivors = find_survivors(merge, links, schedule.survivor)
    hidden, sizes, kept, places = merge_tokens(tokens.hidden, tokens.sizes, survivors, sum(lengths), links)
    tube_ids = tokens.tubes[kept]
    return PackedTokens(
        hidden=hidden,
        rotary=tuple(part[:, kept] for part in tokens.rotary),
        tubes=tube_ids,
        groups=tokens.groups[kept],
        sizes=sizes,
        origins=tokens.origins[kept],
        now=places[tokens.now],
        lengths=lengths,
        patches=[before - count for before, count in zip(tokens.patches, removals, strict=True)],
        links=relink_survivors(links, survivors, places, tube_ids),
    )


def drop_merged(tokens: PackedTokens, merged: InputMerge, layout: BatchLayout, tubes: Tubes | None) -> PackedTokens:
    """Leave out of a packed row what merged before the decoder; waits once for the device.

    Args:
        tokens: Of the whole input.
        merged: What merged.
        layout: Of the batch.
        tubes: The host's knowledge of the groups, None if nothing merges later.
    """
    here = tokens.now
    places = torch.empty(layout.valid.numel(), dtype=here.dtype, device=here.device)
    places = places.index_copy(0, here if layout.index is None else layout.index, here)
    survivors = places[layout.pack(merged.survivors)]
    alive = survivors == here
    left = to_host(alive)
    kept = torch.nonzero_static(alive, size=int(left.sum())).squeeze(1)
    new_index = (alive.cumsum(0) - 1)[survivors]
    state = replace(
        tokens,
        hidden=tokens.hidden[kept],
        rotary=tuple(part[:, kept] for part in tokens.rotary),
        origins=tokens.origins[kept],
        now=new_index,
        lengths=[int(part.sum()) for part in left.split(tokens.lengths)],
    )
    if tubes is None:
        return state
    groups = tokens.groups[kept]
    return replace(
        state,
        tubes=tokens.tubes[kept],
        groups=groups,
        sizes=torch.zeros_like(tokens.sizes[kept]).index_add(0, new_index, tokens.sizes),
        patches=to_host((groups + 1).bincount(minlength=len(tokens.patches) + 1))[1:].tolist(),
    )


def pack_tokens(
    decoder: PreTrainedModel, inputs_embeds: Tensor, positions: Tensor, layout: BatchLayout, tubes: Tubes | None
) -> PackedTokens:
    """The tokens of a batch as they enter the first layer, padding left out."""
    hidden = layout.pack(inputs_embeds)
    here = torch.arange(len(hidden), device=hidden.device)
    sums = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return PackedTokens(
        hidden=hidden,
        rotary=decoder.rotary_emb(hidden[None], layout.pack(positions.expand(inputs_embeds.shape[:2]))[None]),
        tubes=None if tubes is None else layout.pack(tubes.ids),
        groups=None if tubes is None else layout.pack(tubes.groups),
        sizes=None if tubes is None else torch.ones(len(hidden), dtype=sums, device=hidden.device),
        origins=here,
        now=here,
        lengths=layout.valid.sum(1).tolist(),
        patches=[] if tubes is None else list(tubes.patches),
    )


def restore(state: PackedTokens, layout: BatchLayout) -> Tensor:
    """`(B, N, D)`: every token of the input reads the one that stands for it."""
    merged = state.now is not state.origins
    return layout.unpack(state.hidden[state.now] if merged else state.hidden)


def read_columns(state: PackedTokens, layout: BatchLayout, columns: slice | Tensor, norm: nn.Module) -> Tensor:
    """`(B, kept, D)` after the norm: some columns of the input, each reading the token that stands for it.

    Args:
        state: After the last layer.
        layout: Of the batch.
        columns: Which, as an index of `(B, N)`.
        norm: The decoder's final norm.
    """
    places = layout.unpack(state.now, fill=-1)[:, columns]
    hidden = norm(state.hidden[places.clamp(min=0)])
    return hidden if layout.index is None else hidden.masked_fill(places[..., None] < 0, 0.0)


def survivor_columns(state: PackedTokens, layout: BatchLayout) -> Tensor:
    """`(B, N)` column of the token that stands for each token, -1 for padding."""
    survivors = state.origins[state.now]
    if layout.index is not None:
        survivors = layout.index[survivors]
    return layout.unpack(survivors % layout.valid.shape[1], fill=-1)
