"""Hierarchical token merging (section 3.1, Eq. 1) as pure tensor functions: decide, then apply.

A token may join the same place of the next frame: a link. Links lie on disjoint paths (tubes), each merged
link removes exactly one token, and a run of merged links becomes one token. All functions work on one packed
row, the tokens of all samples one after another, and know neither a configuration nor a layer. A step is

    links = link_tubes(tube_ids)
    similarity = similarity_to_next(hidden, links)
    merge = merge_above(similarity, threshold)             # or merge_most_similar(similarity, groups, removals)
    survivors = find_survivors(merge, links)
    hidden, token_sizes, kept, new_index = merge_tokens(hidden, token_sizes, survivors, num_kept)

Letters: `B` samples, `N` columns, `n` tokens of the packed row, `m` of them kept, `P` patches, `G` groups,
`F` frames, `D` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors_elva import ElvaError


@dataclass(frozen=True)
class Tubes:
    """What may merge, and what the host knows about it.

    Args:
        ids: `(B, N)` int64, equal for patches at the same place of the same grid of the same video, already cut
            by `cut_tubes`; unique and negative for every other token.
        groups: `(B, N)` int64 group of each patch, `0..G-1` over the batch, -1 elsewhere. A ratio is kept per
            group: a video, or a window of it.
        samples: Sample of each group.
        patches: Patches of each group.
        floors: Distinct tubes of each group; no merge leaves fewer tokens.
        tail: Trailing columns of the batch in which no sample has a patch.
    """

    ids: Tensor
    groups: Tensor
    samples: list[int]
    patches: list[int]
    floors: list[int]
    tail: int


@dataclass(frozen=True)
class TubeLinks:
    """The tokens of a packed row with the members of each tube side by side.

    Args:
        order: `(n,)` token indices sorted by tube; in a tube they keep the order of the sequence.
        has_next: `(n,)` bool, in the order of `order`: the next entry is of the same tube.
    """

    order: Tensor
    has_next: Tensor


@dataclass(frozen=True)
class MergeMap:
    """Who stands for whom after each step.

    Args:
        layers: Decoder layer at whose input each step merged.
        survivors: Per step `(B, N)` int64: position in the sample's row of the token that stands for this one
            after this step and all earlier ones; its own if it stands for itself, -1 for padding.
        frame_index: `(B, N)` frame of each visual token (patch, `<FRAME>`, `<LINE>`) counted in its sample, -1
            elsewhere; None if the frames are not known.
    """

    layers: tuple[int, ...]
    survivors: tuple[Tensor, ...]
    frame_index: Tensor | None = None

    def kept(self, step: int = -1) -> Tensor:
        """`(B, N)` bool: tokens alive after a step."""
        survivors = self.survivors[step]
        return survivors == torch.arange(survivors.shape[1], device=survivors.device)

    def token_sizes(self, step: int = -1) -> Tensor:
        """`(B, N)` int64: input tokens each token stands for after a step; 0 where merged away or padding."""
        survivors = self.survivors[step]
        return torch.zeros_like(survivors).scatter_add(1, survivors.clamp(min=0), (survivors >= 0).long())

    def kept_per_frame(self, step: int = -1) -> list[Tensor]:
        """Visual tokens alive in each frame after a step: `(F,)` int64 for each of the `B` samples.

        Raises:
            ElvaError: The map was made without frames.
        """
        if self.frame_index is None:
            raise ElvaError(
                "this merge map has no frame_index, so its tokens cannot be counted per frame; use token_sizes()."
            )
        alive = self.kept(step)
        frames = [row[row >= 0] for row in self.frame_index]
        return [
            torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=torch.long, device=index.device).index_add(
                0, index, alive_row[row >= 0].long()
            )
            for index, row, alive_row in zip(frames, self.frame_index, alive, strict=True)
        ]


@dataclass(frozen=True)
class InputMerge:
    """Tokens that merged before the decoder: their embeddings are those of their survivors already.

    Args:
        survivors: `(B, N)` int64 flat place, in `B * N`, of the token that stands for each; its own if it stands for
            itself, and for padding.
        tail: Trailing columns of the batch in which nothing has merged.
    """

    survivors: Tensor
    tail: int


def cut_tubes(tube_ids: Tensor, patch_frame: Tensor, window: int | None = None, max_run: int | None = None) -> Tensor:
    """Cut tubes into segments, so that no run can grow beyond them whatever merges later.

    Args:
        tube_ids: `(P,)` tube of each patch, in the order of the sequence.
        patch_frame: `(P,)` frame of each patch, counted in its video.
        window: Frames `0..window-1` of a video, the next `window` of them and so on are kept apart.
        max_run: Each tube is cut after every `max_run` of its members, counted from the start of the window.

    Returns:
        `(P,)` int64 tube segments, dense from 0, ascending with `tube_ids` and then with the frame.
    """
    tubes, order = tube_ids.sort(stable=True)
    position = torch.arange(len(order), device=order.device)
    starts = _differs_from_previous(tubes)
    if window is not None:
        starts = starts | _differs_from_previous(patch_frame[order] // window)
    if max_run is not None:
        first = torch.where(starts, position, 0).cummax(0).values
        starts = (position - first) % max_run == 0
    return torch.empty_like(order).scatter(0, order, starts.cumsum(0) - 1)


def link_tubes(tube_ids: Tensor) -> TubeLinks:
    """Bring the members of each tube side by side.

    Args:
        tube_ids: `(n,)` tube of each token; a tube of its own for a token that never merges.
    """
    tubes, order = tube_ids.sort(stable=True)
    return TubeLinks(order, ~_differs_from_previous(tubes).roll(-1))


def similarity_to_next(hidden: Tensor, links: TubeLinks, chunk: int = 1024) -> Tensor:
    """Cosine similarity of each token with the next of its tube: s of Eq. 1, without gradient.

    Args:
        hidden: `(n, D)` tokens of the packed row.
        links: From `link_tubes`.
        chunk: Rows computed at once; bounds the memory of the float32 copies.

    Returns:
        `(n,)` in the order of `links.order`, at most 1, `-inf` where there is no next; float32 (float64 for float64).
    """
    similarity = torch.full(links.order.shape, -torch.inf, dtype=_sum_dtype(hidden), device=hidden.device)
    with torch.no_grad():
        for start in range(0, len(links.order) - 1, chunk):
            rows = hidden[links.order[start : start + chunk + 1]].to(similarity.dtype)
            norms = rows.square().sum(-1).sqrt()
            dots = (rows[:-1] * rows[1:]).sum(-1)
            scale = (norms[:-1] * norms[1:]).clamp(min=torch.finfo(norms.dtype).tiny)
            similarity[start : start + len(dots)] = dots / scale
    return similarity.clamp(max=1).masked_fill(~links.has_next, -torch.inf)  # rounding can put equal tokens above 1


def merge_above(similarity: Tensor, threshold: float) -> Tensor:
    """Shallow policy (Eq. 1): `(n,)` bool, merge each link whose similarity exceeds the threshold."""
    return similarity > threshold


def merge_most_similar(similarity: Tensor, groups: Tensor, removals: Tensor) -> Tensor:
    """Deep policy (section 3.1): merge the most similar links of each group; needs no host sync.

    Args:
        similarity: `(n,)` from `similarity_to_next`.
        groups: `(n,)` group of each token in the same order, -1 for tokens of no group.
        removals: `(G,)` int64 links to merge in each group, at most as many as it has.

    Returns:
        `(n,)` bool in the same order. Of equal links the earlier ones merge.
    """
    best_first = similarity.sort(descending=True, stable=True).indices
    group, by_group = (groups + 1)[best_first].sort(stable=True)
    order = best_first[by_group]
    quota = torch.cat([removals.new_zeros(1), removals])
    members = torch.zeros_like(quota).index_add(0, group, torch.ones_like(group))
    rank = torch.arange(len(group), device=group.device) - (members.cumsum(0) - members)[group]
    return torch.zeros_like(group, dtype=torch.bool).scatter(0, order, rank < quota[group])


def count_removals(
    patches: list[int], inputs: list[int], floors: list[int], target_ratio: float, ratio_of: str = "current"
) -> list[int]:
    """How many tokens a ratio step removes from each group, from counts the host knows.

    Args:
        patches: Patches each group has now.
        inputs: Patches it had in the input.
        floors: The fewest it can have.
        target_ratio: Kept over what `ratio_of` names.
        ratio_of: `"current"` patches or those of the `"input"`.
    """
    bases = patches if ratio_of == "current" else inputs
    return [
        max(now - max(math.ceil(round(target_ratio * base, 6)), floor), 0)  # 0.1 * 30 is not 3 in floats
        for now, base, floor in zip(patches, bases, floors, strict=True)
    ]


def find_survivors(merge: Tensor, links: TubeLinks, survivor: str = "last") -> Tensor:
    """Follow runs of merged links to the token that stands for each token.

    Args:
        merge: `(n,)` bool in the order of `links.order`: this token and the next of its tube become one.
        links: From `link_tubes`.
        survivor: `"last"` of the run (Eq. 1 drops a token that resembles the next frame) or `"first"`.

    Returns:
        `(n,)` index of the survivor of each token, in the order of the sequence; its own if it merges with nothing.
    """
    position = torch.arange(len(merge), device=merge.device)
    if survivor == "last":
        ends = torch.where(merge, len(merge), position)
        stands = ends.flip(0).cummin(0).values.flip(0)
    else:
        joins_previous = merge.roll(1)  # the last entry never merges, so nothing comes round
        stands = torch.where(joins_previous, 0, position).cummax(0).values
    return torch.empty_like(links.order).scatter(0, links.order, links.order[stands])


def index_survivors(survivors: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number the survivors in the order of the sequence; needs no host sync.

    Args:
        survivors: `(n,)` from `find_survivors`.
        num_kept: `m`, the number of survivors.

    Returns:
        `(n,)` bool survivors, `(m,)` their indices, ascending, and `(n,)` where the survivor of each token will be.
    """
    alive = survivors == torch.arange(len(survivors), device=survivors.device)
    kept = torch.nonzero_static(alive, size=num_kept).squeeze(1)
    return alive, kept, (alive.cumsum(0) - 1)[survivors]


def relink_survivors(links: TubeLinks, survivors: Tensor, new_index: Tensor, tube_ids: Tensor) -> TubeLinks:
    """Links of what a merge left, without sorting again; needs no host sync.

    Args:
        links: Before the merge.
        survivors: `(n,)` from `find_survivors`.
        new_index: `(n,)` where the survivor of each token now is.
        tube_ids: `(m,)` tube of each token that is left.

    Returns:
        What `link_tubes(tube_ids)` gives.
    """
    stays = survivors[links.order] == links.order
    order = new_index[links.order[torch.nonzero_static(stays, size=len(tube_ids)).squeeze(1)]]
    return TubeLinks(order, ~_differs_from_previous(tube_ids[order]).roll(-1))


def merge_tokens(
    hidden: Tensor, token_sizes: Tensor, survivors: Tensor, num_kept: int, chunk: int = 1024
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace every run by the mean of its members, weighted by what they stand for; needs no host sync.

    The mean is the survivor plus the weighted mean of differences from it, so a token that merges with nothing and
    a run of equal tokens keep their exact values. Sums are float32 (float64 for float64). Differentiable in `hidden`.

    Args:
        hidden: `(n, D)` tokens of the packed row.
        token_sizes: `(n,)` float: input tokens each token stands for.
        survivors: `(n,)` from `find_survivors`.
        num_kept: `m`, the number of survivors.
        chunk: Rows averaged at once; bounds the memory of the float32 copies.

    Returns:
        `(m, D)` tokens in the dtype of `hidden`, `(m,)` their sizes, `(m,)` the indices they had, ascending, and
        `(n,)` where the survivor of each old token now is.
    """
    alive, kept, new_index = index_survivors(survivors, num_kept)
    lost = torch.nonzero_static(~alive, size=len(survivors) - num_kept).squeeze(1)

    dtype = _sum_dtype(hidden)
    sizes = token_sizes.index_select(0, kept).index_add(0, new_index[lost], token_sizes[lost])
    mean = torch.zeros(num_kept, hidden.shape[1], dtype=dtype, device=hidden.device)
    for rows in lost.split(chunk):
        away = hidden.index_select(0, rows).to(dtype) - hidden.index_select(0, survivors[rows]).to(dtype)
        mean.index_add_(0, new_index[rows], away * token_sizes[rows].to(dtype)[:, None])
    mean.div_(sizes.to(dtype)[:, None]).add_(hidden.index_select(0, kept))
    return mean.to(hidden.dtype), sizes, kept, new_index


def _differs_from_previous(values: Tensor) -> Tensor:
    """`(n,)` bool: differs from the entry before it; True for the first."""
    first = torch.ones_like(values[:1], dtype=torch.bool)
    return torch.cat([first, values[1:] != values[:-1]])


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
