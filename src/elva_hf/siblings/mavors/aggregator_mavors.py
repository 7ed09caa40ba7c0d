"""Inter-chunk feature aggregator (section 3.4): causal attention among the chunks of a video, with C-RoPE.

The sequence is packed: the tokens of all videos, one video after another; a video sees itself only, and each sub-image
of an image is a video of one chunk. Letters: `n` tokens, `D` width, `d` width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from elva_hf.embedding_elva import ZeroLinear


@dataclass(frozen=True)
class ChunkLayout:
    """How a packed sequence falls into videos and chunks, known on the host.

    Args:
        chunk_lengths: Per video the tokens of each chunk; compression may leave a chunk none.
        by_chunk: Whether a token sees all of its own chunk (`ifa_causality="chunk"`), or only what stands before it.
    """

    chunk_lengths: Sequence[Sequence[int]]
    by_chunk: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each video."""
        return [sum(chunks) for chunks in self.chunk_lengths]


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of R in Eq. 4.

    Args:
        positions: `(n,)` where each token is, in chunks; any real numbers.
        head_dim: `d`.
        theta: Base of the frequencies.

    Returns:
        Both `(n, d / 2)` float64: times of hours need their digits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by their positions, in float32 or float64.

    Args:
        states: `(n, heads, d)`.
        cos: `(n, d / 2)` from `rotary_table`.
        sin: Likewise.

    Returns:
        `(n, heads, d)` in the dtype of `states`.
    """
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    first, second = states.to(dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(states.dtype)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, layout: ChunkLayout) -> Tensor:
    """Causal attention in each video (Eqs. 4 to 6), without a mask of all tokens by all tokens.

    Args:
        query: `(n, heads, d)`, and so `key`, `value`.
        key: Turned likewise.
        value: Not turned.
        layout: Where the videos and chunks are.

    Returns:
        `(n, heads, d)`.
    """
    if layout.by_chunk:
        return _attend_by_chunk(query, key, value, layout)
    runs = [(length, len(list(same))) for length, same in groupby(layout.lengths)]
    sizes = [length * count for length, count in runs]
    seen = []
    for (_, count), *states in zip(runs, *(part.split(sizes) for part in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in states)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(seen)


def _attend_by_chunk(query: Tensor, key: Tensor, value: Tensor, layout: ChunkLayout) -> Tensor:
    seen, start = [], 0
    for chunks in layout.chunk_lengths:
        end = start
        for length in chunks:
            q, k, v = query[end : end + length], key[start : end + length], value[start : end + length]
            end += length
            out = nn.functional.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in (q, k, v)))
            seen.append(out[0].transpose(0, 1))
        start = end
    return torch.cat(seen)


class MavorsAttention(nn.Module):
    """Projections around `attend_causally`; the output projection starts at zero.

    Args:
        width: `D`.
        num_heads: Heads; must divide `width` into an even `d`.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.head_dim = width // num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = ZeroLinear(width, width)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: ChunkLayout) -> Tensor:
        """`(n, D)` to `(n, D)`."""
        query, key, value = (
            project(hidden).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend_causally(rotate(query, *rotary), rotate(key, *rotary), value, layout).flatten(1))


class MavorsMLP(nn.Module):
    """Two linear layers; the second starts at zero."""

    def __init__(self, width: int, intermediate_size: int, activation: str):
        super().__init__()
        self.activation = ACT2FN[activation]
        self.fc1 = nn.Linear(width, intermediate_size)
        self.fc2 = ZeroLinear(intermediate_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class MavorsAggregatorLayer(GradientCheckpointingLayer):
    """A pre-norm block like the tower's; as it starts, it changes nothing, which is L_Inter = 0 of Table 3."""

    def __init__(self, config: SiglipVisionConfig, num_heads: int, intermediate_size: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = MavorsAttention(width, num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MavorsMLP(width, intermediate_size, config.hidden_act)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], layout: ChunkLayout) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), rotary, layout)
        return hidden + self.mlp(self.layer_norm2(hidden))


class MavorsAggregator(nn.Module):
    """IFA: L_Inter blocks.

    Args:
        config: Of the tower.
        num_layers: L_Inter; 0 leaves all to the decoder (Table 3).
        num_heads: Heads of each block.
        intermediate_size: Width of each block's MLP.
        theta: Base of C-RoPE's frequencies.
    """

    def __init__(
        self, config: SiglipVisionConfig, num_layers: int, num_heads: int, intermediate_size: int, theta: float
    ):
        super().__init__()
        self.head_dim = config.hidden_size // num_heads
        self.theta = theta
        self.layers = nn.ModuleList(
            MavorsAggregatorLayer(config, num_heads, intermediate_size) for _ in range(num_layers)
        )

    def forward(self, hidden: Tensor, positions: Tensor, layout: ChunkLayout) -> Tensor:
        """Let the chunks of each video see those before them.

        Args:
            hidden: `(n, D)`.
            positions: `(n,)` float64 on the host, where each token is, in chunks.
            layout: Where the videos and chunks are.
        """
        table = rotary_table(positions, self.head_dim, self.theta)
        rotary = tuple(part.to(_angle_dtype(hidden)).to(hidden.device) for part in table)
        for layer in self.layers:
            hidden = layer(hidden, rotary, layout)
        return hidden


def _angle_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
