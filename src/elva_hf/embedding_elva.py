"""The patch embedding: pixels to decoder embeddings, and what `<FRAME>` and `<LINE>` see (section 3.1).

Letters: `P` patches, `F` frames, `L` rows, `S` segments, `H` heads, `d` width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_elva import ElvaConfig, VideoDecoderConfig
from .geometry_elva import VisualGeometry


def segment_softmax(scores: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Softmax over the members of each segment, without padding.

    Args:
        scores: `(P, H)` float32 or float64.
        segments: `(P,)` segment of each row, `0..num_segments-1`.
        num_segments: `S`.

    Returns:
        `(P, H)` weights that sum to 1 over each segment.
    """
    index = segments[:, None].expand_as(scores)
    highest = scores.new_full((num_segments, scores.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, index, scores.detach(), "amax")
    weights = (scores - highest[segments]).exp()
    total = weights.new_zeros(num_segments, scores.shape[1]).index_add(0, segments, weights)
    return weights / total[segments]


def segment_attention(query: Tensor, keys: Tensor, values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Let one query attend to each segment of keys on its own; costs `O(P)`, whatever the segments' sizes.

    Args:
        query: `(H, d)`, the same for every segment.
        keys: `(P, H, d)`.
        values: `(P, H, d)`.
        segments: `(P,)` segment of each key.
        num_segments: `S`.

    Returns:
        `(S, H, d)` in the dtype of `values`; sums and softmax at least in float32.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    scores = torch.einsum("phd,hd->ph", keys.to(wide), query.to(wide)) * query.shape[-1] ** -0.5
    weighted = values.to(wide) * segment_softmax(scores, segments, num_segments)[..., None]
    return weighted.new_zeros(num_segments, *values.shape[1:]).index_add(0, segments, weighted).to(values.dtype)


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero; transformers asks only modules with parameters of their own how they start."""

    def reset_own_parameters(self, config: VideoDecoderConfig) -> None:
        """Set it to zero."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class ElvaCrossAttention(nn.Module):
    """`<FRAME>` queries the patches of its frame, `<LINE>` those of its row; both share the projections."""

    def __init__(self, config: ElvaConfig):
        super().__init__()
        width = config.patch_embed_dim
        self.num_heads = config.patch_embed_num_heads
        self.residual = config.patch_embed_residual
        self.norm = nn.LayerNorm(width) if config.patch_embed_norm else nn.Identity()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width) if config.patch_embed_output_projection else nn.Identity()

    def forward(self, tokens: Tensor, patches: Tensor, segments: tuple[tuple[Tensor, int], ...]) -> list[Tensor]:
        """Attend once per token.

        Args:
            tokens: `(K, width)` learnable queries, one for each entry of `segments`.
            patches: `(P, width)`.
            segments: Per query the `(P,)` segment of each patch and the number of segments.

        Returns:
            Per query `(S, width)`.
        """
        patches, queries = self.norm(patches), self.norm(tokens)
        q = self.q_proj(queries).unflatten(-1, (self.num_heads, -1))
        k = self.k_proj(patches).unflatten(-1, (self.num_heads, -1))
        v = self.v_proj(patches).unflatten(-1, (self.num_heads, -1))
        seen = [self.o_proj(segment_attention(q[i], k, v, *segment).flatten(1)) for i, segment in enumerate(segments)]
        return [token + what for token, what in zip(tokens, seen, strict=True)] if self.residual else seen


class ElvaPatchEmbedding(nn.Module):
    """Pixels to decoder embeddings: patches -> Linear -> (cross-attention) -> Linear (section 3.1).

    With `patch_embed_type="naive"` the two special tokens are constants (Table 3's baseline).
    """

    def __init__(self, config: ElvaConfig, hidden_size: int):
        super().__init__()
        width = config.patch_embed_dim
        self.pixel_proj = nn.Linear(3 * config.patch_size**2, width)
        self.special_tokens = nn.Parameter(torch.empty(2, width))  # <FRAME>, <LINE>
        self.cross_attention = ElvaCrossAttention(config) if config.patch_embed_type == "video" else None
        self.positions = (
            nn.Parameter(torch.empty(2, config.patch_embed_positions, width))
            if (config.patch_embed_positions)
            else None
        )
        self.out_proj = nn.Linear(width, hidden_size)

    def reset_own_parameters(self, config: ElvaConfig) -> None:
        """Draw what is no weight of a linear layer."""
        init.normal_(self.special_tokens, std=config.initializer_range)
        if self.positions is not None:
            init.normal_(self.positions, std=config.patch_embed_positions_std)

    def encode_pixels(self, pixel_values_videos: Tensor) -> Tensor:
        """First linear: `(P, 3 * patch_size**2)` normalised pixels to `(P, width)`; needs no geometry."""
        return self.pixel_proj(pixel_values_videos.to(self.pixel_proj.weight.dtype))

    def forward(self, features: Tensor, geometry: VisualGeometry) -> tuple[Tensor, Tensor, Tensor]:
        """Embed patches, frames and rows.

        Args:
            features: `(P, width)` from `encode_pixels`, in the order of the patch tokens.
            geometry: Frame and row of every patch.

        Returns:
            `(P, D)` patches, `(F, D)` `<FRAME>` and `(L, D)` `<LINE>` embeddings.
        """
        if self.positions is not None:
            features = features + self.positions[0][geometry.patch_row] + self.positions[1][geometry.patch_column]
        if self.cross_attention is None:
            frame, line = self.out_proj(self.special_tokens)
            return self.out_proj(features), frame.expand(geometry.num_frames, -1), line.expand(geometry.num_lines, -1)
        segments = ((geometry.patch_frame, geometry.num_frames), (geometry.patch_line, geometry.num_lines))
        frames, lines = self.cross_attention(self.special_tokens, features, segments)
        return self.out_proj(features), self.out_proj(frames), self.out_proj(lines)
