"""Intra-chunk vision encoder (section 3.3): a chunk of frames through a 3-D convolution, a ViT and 2x2 pooling.

Inflated from a SigLIP tower, a chunk of equal frames gives the features of the one image. Letters: `C` chunks, `T`
frames of a chunk, `F` frames a full chunk has, `h`, `w` rows and columns of patches, `p` side of a patch, `D` width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, SiglipVisionConfig
from transformers import initialization as init
from transformers.models.siglip.modeling_siglip import SiglipEncoder

CHUNKS_AT_ONCE = 8
"""Chunks that go through the ViT together; bounds its memory, changes no result."""


def chunk_kernel(weight: Tensor, num_frames: int, short_chunk: str = "repeat") -> Tensor:
    """The kernel of Eq. 1 for a chunk of so many frames, divided by F: what each frame adds to a patch.

    Args:
        weight: `(D, 3, F, p, p)`, as inflated; the division is not in it.
        num_frames: `T`, from 1 to `F`.
        short_chunk: What stands for the frames a short chunk lacks: `"repeat"` its last frame, `"mean"` nothing, and
            the sum is divided by `T`.

    Returns:
        `(D, T * 3 * p * p)`: frame, channel, row, column.
    """
    slices = weight.transpose(1, 2)
    full = slices.shape[1]
    if short_chunk == "mean":
        slices, full = slices[:, :num_frames], num_frames
    elif num_frames < full:
        last = slices[:, num_frames - 1 :].sum(1, keepdim=True)
        slices = torch.cat([slices[:, : num_frames - 1], last], 1)
    return slices.flatten(1) / full


def embed_chunks(pixels: Tensor, weight: Tensor, bias: Tensor, short_chunk: str = "repeat") -> Tensor:
    """Eq. 1: Conv(C) / F, the bias added after the division, for F copies of an image must give its own features.

    Args:
        pixels: `(C, T, h * w, 3 * p * p)` normalised patches.
        weight: `(D, 3, F, p, p)`.
        bias: `(D,)`.
        short_chunk: See `chunk_kernel`.

    Returns:
        `(C, h * w, D)`.
    """
    kernel = chunk_kernel(weight, pixels.shape[1], short_chunk)
    return nn.functional.linear(pixels.to(weight.dtype).transpose(1, 2).flatten(2), kernel, bias)


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Resize a square table of position embeddings to a grid (Eq. 7), bicubic with half pixels as in transformers.

    Args:
        table: `(P_v * P_v, D)`.
        rows: `P_H`.
        columns: `P_W`.

    Returns:
        `(rows * columns, D)`; the table itself where the grid is its own.
    """
    side = round(len(table) ** 0.5)
    if (rows, columns) == (side, side):
        return table
    square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    if table.dtype != torch.float64:
        square = square.float()
    resized = nn.functional.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(table.dtype)


def pool_tokens(hidden: Tensor, rows: int, columns: int, pool_size: int = 2) -> Tensor:
    """Average the patches of each square of a grid; a square cut by the border averages what it has (section 3.3).

    Args:
        hidden: `(C, rows * columns, D)`.
        rows: Of patches.
        columns: Likewise.
        pool_size: Side of a square in patches.

    Returns:
        `(C, tokens, D)`, row by row.
    """
    grid = hidden.transpose(1, 2).unflatten(2, (rows, columns))
    pooled = nn.functional.avg_pool2d(grid, pool_size, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2)


def split_squares(pixels: Tensor, pool_size: int = 2) -> Tensor:
    """Cut the square of pixels that a token stands for into the patches of the tower.

    Args:
        pixels: `(..., 3 * s * s)`; inside a square channel, row, column.
        pool_size: Side of a square in patches.

    Returns:
        `(..., pool_size**2, 3 * p * p)` with `p = s / pool_size`, row by row.
    """
    side = round((pixels.shape[-1] // 3) ** 0.5) // pool_size
    squares = pixels.unflatten(-1, (3, pool_size, side, pool_size, side))
    return squares.movedim((-4, -2), (-5, -4)).flatten(-5, -4).flatten(-3)


def join_squares(features: Tensor, rows: int, columns: int) -> Tensor:
    """Put the patches of the squares of a frame in the order of the frame.

    Args:
        features: `(C, rows * columns, pool_size**2, D)`, row by row.
        rows: Of squares.
        columns: Likewise.

    Returns:
        `(C, rows * columns * pool_size**2, D)`, row by row.
    """
    side = round(features.shape[2] ** 0.5)
    return features.unflatten(1, (rows, columns)).unflatten(3, (side, side)).transpose(2, 3).flatten(1, 4)


class MavorsPatchEmbedding(nn.Module):
    """The 3-D convolution of Eq. 1 as weights: a kernel for each frame of a chunk, and a bias.

    Args:
        config: Of the tower.
        chunk_frames: `F`.
        short_chunk: See `chunk_kernel`.
    """

    def __init__(self, config: SiglipVisionConfig, chunk_frames: int, short_chunk: str):
        super().__init__()
        side = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, chunk_frames, side, side))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))
        self.short_chunk = short_chunk

    def reset_own_parameters(self, config: PreTrainedConfig) -> None:
        """Draw kernels that no tower has been loaded into."""
        init.normal_(self.weight, std=config.initializer_range)
        init.zeros_(self.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """See `embed_chunks`."""
        return embed_chunks(pixels, self.weight, self.bias, self.short_chunk)


class MavorsChunkEncoder(nn.Module):
    """IVE: the inflated tower without its pooling head, then 2x2 pooling.

    Args:
        config: Of the tower, as transformers has it.
        chunk_frames: Frames of a full chunk, F.
        pool_size: Side of the squares that are pooled, in patches.
        short_chunk: See `chunk_kernel`.
    """

    def __init__(self, config: SiglipVisionConfig, chunk_frames: int, pool_size: int, short_chunk: str):
        super().__init__()
        self.pool_size = pool_size
        self.patch_embedding = MavorsPatchEmbedding(config, chunk_frames, short_chunk)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.hidden_size)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Encode chunks of one grid.

        Args:
            patches: `(C, rows * columns, D)` from `patch_embedding`, row by row.
            rows: Rows of patches of a frame.
            columns: Columns of patches of a frame.

        Returns:
            `(C, tokens, D)` tokens of each chunk, row by row.
        """
        parts = [self.encode_patches(part, rows, columns) for part in patches.split(CHUNKS_AT_ONCE)]
        return pool_tokens(torch.cat(parts), rows, columns, self.pool_size)

    def encode_patches(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """The same before pooling, `(C, rows * columns, D)`: the tower's last hidden state."""
        hidden = patches + resize_positions(self.position_embedding.weight, rows, columns)
        return self.post_layernorm(self.encoder(inputs_embeds=hidden).last_hidden_state)

    def encode_pixels(self, pixels: Tensor, rows: int, columns: int) -> Tensor:
        """`encode_patches` from pixels, `(C, T, rows * columns, 3 * p * p)`; an image is a chunk of one frame."""
        return self.encode_patches(self.patch_embedding(pixels), rows, columns)
