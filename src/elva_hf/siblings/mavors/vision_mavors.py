"""From the pixels of chunks to decoder embeddings: IVE, compression, IFA and projector (Figure 4).

Letters: `R` rows of pixels, `n` tokens, `C` chunks, `D` width of the tower, `P` patches pooled into a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from elva_hf.geometry_elva import VisualGeometry
from elva_hf.siblings.mavors.aggregator_mavors import ChunkLayout, MavorsAggregator
from elva_hf.siblings.mavors.chunks_mavors import POSITION_UNIT
from elva_hf.siblings.mavors.compression_mavors import CompressedTokens, compress_tokens
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.encoder_mavors import MavorsChunkEncoder, join_squares, split_squares
from elva_hf.siblings.mavors.rows_mavors import DIGITS, HEADER, find_tokens, read_frames, read_positions

TOKENS_AT_ONCE = 1024
"""Tokens whose pixels go through the 3-D convolution together; bounds the memory of their copies, changes no result."""


@dataclass(frozen=True)
class Sequences:
    """The chunks of a batch and the sequences they form, all on the host.

    A sequence is a video, the thumbnail of an image or one of its sub-images: what the aggregator sees together.

    Args:
        grids: Per chunk rows and columns of tokens.
        positions: `(C,)` int64 position of each chunk, from `place_chunks`.
        first: Number of the first chunk of each sequence, and at the end the number of chunks.
    """

    grids: list[tuple[int, int]]
    positions: Tensor
    first: list[int]

    @classmethod
    def read(cls, features: Tensor, geometry: VisualGeometry) -> Sequences:
        """Read them from the geometry of the tokens and the positions that the features carry.

        A chunk at position 0, or in another video than the one before, starts a sequence.
        """
        if isinstance(geometry, ChunkGeometry):
            return geometry.sequences
        host = geometry.host or geometry
        grids = list(zip(host.frame_rows.tolist(), host.frame_columns.tolist(), strict=True))
        sizes = (host.frame_rows * host.frame_columns).cumsum(0)
        starts = nn.functional.pad(sizes, (1, 0))[:-1]
        positions = read_positions(features[starts.to(features.device), -DIGITS:])
        videos = host.patch_video[starts]
        begins = (positions == 0) | (videos != nn.functional.pad(videos, (1, 0), value=-1)[:-1])
        return cls(grids, positions, [*begins.nonzero().squeeze(1).tolist(), len(grids)])

    @property
    def chunk_tokens(self) -> list[int]:
        """Tokens of each chunk."""
        return [rows * columns for rows, columns in self.grids]

    @property
    def chunk_counts(self) -> list[int]:
        """Chunks of each sequence."""
        return [end - start for start, end in pairwise(self.first)]

    @property
    def chunk_lengths(self) -> list[list[int]]:
        """Tokens of each chunk of each sequence."""
        return self.split(self.chunk_tokens)

    def split(self, of_chunks: list[int]) -> list[list[int]]:
        """What each chunk has, sequence by sequence."""
        return [of_chunks[start:end] for start, end in pairwise(self.first)]

    @property
    def numbers(self) -> Tensor:
        """`(C,)` sequence of each chunk."""
        return torch.arange(len(self.first) - 1).repeat_interleave(torch.tensor(self.chunk_counts))

    def runs(self) -> Iterator[tuple[tuple[int, int], int]]:
        """Grids of neighbouring chunks that are alike, and how many chunks there are of each."""
        for grid, alike in groupby(self.grids):
            yield grid, len(list(alike))

    def token_positions(self, rope: str) -> Tensor:
        """`(n,)` float64 position of each token for the aggregator, in chunks, or in tokens of its sequence."""
        if rope == "token":
            return torch.cat([torch.arange(sum(chunks)) for chunks in self.chunk_lengths]).double()
        return (self.positions.double() / POSITION_UNIT).repeat_interleave(torch.tensor(self.chunk_tokens))


@dataclass(frozen=True)
class ChunkGeometry(VisualGeometry):
    """Where every visual token stands, in which each sequence is a video of its own.

    Args:
        sequences: The chunks; None in the host's copy.
    """

    sequences: Sequences | None = None

    @classmethod
    def split(cls, geometry: VisualGeometry, features: Tensor) -> ChunkGeometry:
        """Let no tube go from a sub-image to another: they show different places."""
        sequences = Sequences.read(features, geometry)
        host = geometry.host or geometry
        number = sequences.numbers[host.patch_frame]
        places = torch.stack([number, host.tube_ids.flatten()[host.patch_index]])
        _, tubes = places.unique(dim=1, return_inverse=True)
        ids = host.tube_ids.flatten().index_copy(0, host.patch_index, tubes).view_as(host.tube_ids)
        host = replace(host, patch_video=number, tube_ids=ids, host=None)
        moved = host.to(geometry.tube_ids.device)
        return cls(**{field.name: getattr(moved, field.name) for field in fields(moved)}, sequences=sequences)


class MavorsVisionEncoder(nn.Module):
    """All of Mavors before the decoder; takes the place of ELVA's patch embedding."""

    def __init__(self, config: MavorsConfig, hidden_size: int):
        super().__init__()
        vision = config.vision_config
        if vision._attn_implementation is None:  # the tower is no model of its own, which transformers would ask
            vision._attn_implementation = config._attn_implementation
        self.pool_size = config.pool_size
        self.rope = config.ifa_rope
        self.by_chunk = config.ifa_causality == "chunk"
        self.config = config
        self.encoder = MavorsChunkEncoder(vision, config.chunk_frames, config.pool_size, config.short_chunk)
        self.aggregator = MavorsAggregator(
            vision,
            config.ifa_num_layers,
            config.num_ifa_heads,
            config.ifa_intermediate_size or vision.intermediate_size,
            config.ifa_rope_theta,
        )
        self.projector = nn.Sequential(
            nn.Linear(vision.hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def encode_pixels(self, pixel_values_videos: Tensor) -> Tensor:
        """Eq. 1, which needs no geometry.

        Args:
            pixel_values_videos: `(R, 3 * s * s + HEADER)`, see `rows_mavors`.

        Returns:
            `(n, P * D + DIGITS)`: the patches of each token, and its chunk's position.

        Raises:
            PlaceholderError: Rows are missing or out of order.
        """
        starts, counts = find_tokens(read_frames(pixel_values_videos))
        runs, lengths = counts.unique_consecutive(return_counts=True)
        rows = pixel_values_videos.split((runs * lengths).tolist())
        features = [
            self.encoder.patch_embedding(split_squares(part[..., :-HEADER], self.pool_size)).flatten(1)
            for tokens, frames in zip(rows, runs.tolist(), strict=True)
            for part in tokens.unflatten(0, (-1, frames)).split(TOKENS_AT_ONCE)
        ]
        places = pixel_values_videos[starts.to(pixel_values_videos.device), -DIGITS:]
        return torch.cat([torch.cat(features), places.to(features[0].dtype)], 1)

    def forward(self, features: Tensor, geometry: VisualGeometry) -> tuple[Tensor, Tensor, Tensor]:
        """Embed all tokens; there are no `<FRAME>` and `<LINE>` tokens.

        Args:
            features: `(n, P * D + DIGITS)` from `encode_pixels`, in the order of the tokens.
            geometry: Chunk and grid of every token.

        Returns:
            `(n, hidden_size)`, and twice `(0, hidden_size)`.
        """
        sequences = Sequences.read(features, geometry)
        hidden, _ = self.encode_chunks(features, sequences)
        return hidden, hidden[:0], hidden[:0]

    def encode_chunks(self, features: Tensor, sequences: Sequences) -> tuple[Tensor, CompressedTokens | None]:
        """The same for sequences already read.

        Returns:
            `(n, hidden_size)`, where a token that was merged reads the one that stands for it, and what merged; None
            without compression.
        """
        hidden = self._encode_patches(features[:, :-DIGITS], sequences)
        positions = sequences.token_positions(self.rope)
        threshold = self.config.chunk_similarity_threshold
        if threshold is None:
            layout = ChunkLayout(sequences.chunk_lengths, self.by_chunk)
            return self.projector(self.aggregator(hidden, positions, layout)), None
        tokens = [chunks[0] for chunks in sequences.chunk_lengths]
        merged = compress_tokens(hidden, sequences.chunk_counts, tokens, threshold)
        kept = merged.kept.cpu()
        chunk_of_token = torch.arange(len(sequences.grids)).repeat_interleave(torch.tensor(sequences.chunk_tokens))
        left = chunk_of_token[kept].bincount(minlength=len(sequences.grids)).tolist()
        layout = ChunkLayout(sequences.split(left), self.by_chunk)
        embedded = self.projector(self.aggregator(merged.hidden, positions[kept], layout))
        return embedded[merged.new_index], merged

    def _encode_patches(self, patches: Tensor, sequences: Sequences) -> Tensor:
        """`(n, P * D)` to `(n, D)`: the tower, all neighbouring chunks of one grid together."""
        parts, start = [], 0
        for (rows, columns), count in sequences.runs():
            end = start + count * rows * columns
            squares = patches[start:end].unflatten(1, (self.pool_size**2, -1)).unflatten(0, (count, rows * columns))
            frames = join_squares(squares, rows, columns)
            parts.append(self.encoder(frames, rows * self.pool_size, columns * self.pool_size).flatten(0, 1))
            start = end
        return torch.cat(parts)
