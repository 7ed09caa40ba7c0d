"""The Spatio-Temporal Alignment Block of Video-Panda: pixels to decoder embeddings without an encoder (section 3.1).

Sections, equations and tables are those of the Video-Panda paper. Letters: `P` visual tokens, `W` patches of the window
of one, `T` frames of a video, `F` frames and `V` videos of a batch, `d` width, `D` width of the decoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from elva_hf.embedding_elva import ZeroLinear, segment_attention
from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import VisualGeometry
from elva_hf.siblings.video_panda.configuration_video_panda import VideoPandaConfig


class Clips(NamedTuple):
    """Clips of one shape: frames of one grid of a video, in time order.

    Args:
        tokens: `(C, T, rows * cols)` the visual tokens of each clip.
        grid: Rows and columns.
    """

    tokens: Tensor
    grid: tuple[int, int]


def find_clips(geometry: VisualGeometry) -> list[Clips]:
    """Group the visual tokens of a batch into clips; each video is alone, so none sees another."""
    host = geometry.host or geometry
    video = torch.zeros_like(host.frame_rows).scatter(0, host.patch_frame, host.patch_video)
    sizes = host.frame_rows * host.frame_columns
    starts = sizes.cumsum(0) - sizes
    frames_of: dict[tuple[int, int, int], list[int]] = {}
    shapes = zip(video.tolist(), host.frame_rows.tolist(), host.frame_columns.tolist(), strict=True)
    for frame, key in enumerate(shapes):
        frames_of.setdefault(key, []).append(frame)
    alike: dict[tuple[int, int, int], list[list[int]]] = {}
    for (_, rows, cols), frames in frames_of.items():
        alike.setdefault((len(frames), rows, cols), []).append(frames)
    device = geometry.patch_index.device
    return [
        Clips((starts[torch.tensor(frames)][..., None] + torch.arange(rows * cols)).to(device), (rows, cols))
        for (_, rows, cols), frames in alike.items()
    ]


def window_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Let a query attend to the few keys of its window.

    Args:
        query: `(P, H, h)`, or `(1, H, h)` for one query in all windows.
        keys: `(P, W, H, h)`.
        values: `(P, W, H, h)`.

    Returns:
        `(P, H, h)`; sums and softmax at least in float32.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    scores = (keys.to(wide) * query.to(wide)[:, None]).sum(-1) * query.shape[-1] ** -0.5
    return (values.to(wide) * scores.softmax(1)[..., None]).sum(1).to(values.dtype)


class StabAttention(nn.Module):
    """P_q, P_k and P_v of Eq. 4, in heads; with the reference's norms and output projection unless switched off."""

    def __init__(self, config: VideoPandaConfig, *, bias: bool = False):
        super().__init__()
        width, reference = config.stab_dim, config.reference_blocks
        self.num_heads = config.stab_num_heads
        self.query_scale = self.num_heads**-0.5 if config.attention_scale == "width" else 1.0
        self.query_norm = nn.LayerNorm(width) if reference else nn.Identity()
        self.key_norm = nn.LayerNorm(width) if reference else nn.Identity()
        self.q_proj = nn.Linear(width, width, bias=bias and reference)
        self.k_proj = nn.Linear(width, width, bias=bias and reference)
        self.v_proj = nn.Linear(width, width, bias=bias and reference)
        self.o_proj = nn.Linear(width, width) if reference else nn.Identity()

    def project(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(..., d)` and keys `(..., d)` to `(..., H, h)`; attention scales by the root of `h` itself."""
        keys = self.key_norm(keys)
        q = self.q_proj(self.query_norm(query)) * self.query_scale
        return tuple(part.unflatten(-1, (self.num_heads, -1)) for part in (q, self.k_proj(keys), self.v_proj(keys)))

    def attend_segments(self, query: Tensor, keys: Tensor, segments: Tensor, num_segments: int) -> Tensor:
        """One query `(d,)` over each segment of keys `(N, d)`: `(S, d)`."""
        attended = segment_attention(*self.project(query, keys), segments, num_segments)
        return self.o_proj(attended.flatten(1))

    def attend_frames(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Queries `(F, n, d)` over the keys `(F, m, d)` of their frame: `(F, n, d)`."""
        parts = (part.transpose(1, 2) for part in self.project(queries, keys))
        return self.o_proj(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class LocalSpatioTemporalEncoding(nn.Module):
    """LSTE: a bottleneck of convolutions over time, and the dynamic position encoding of UniFormer (Eqs. 2-3).

    Borders in time and space are zeros, so any number of frames goes, and the borders give places to the encoding. The
    last convolution of Eq. 2 starts at zero.
    """

    def __init__(self, config: VideoPandaConfig):
        super().__init__()
        width, inner = config.stab_dim, config.lste_dim
        self.norm = nn.LayerNorm(width) if config.reference_blocks else nn.Identity()
        self.reduce = nn.Linear(width, inner)  # 1 x 1 x 1
        self.temporal = nn.Conv3d(inner, inner, (3, 1, 1), padding=(1, 0, 0), groups=inner)
        self.restore = ZeroLinear(inner, width)  # 1 x 1 x 1
        self.position = nn.Conv3d(width, width, 3, padding=1, groups=width)  # DPE

    def forward(self, clips: Tensor) -> Tensor:
        """Encode clips `(C, T, h, w, d)`; the same shape comes back."""
        inner = _convolve(self.temporal, self.reduce(self.norm(clips)))
        clips = clips + self.restore(inner)
        return clips + _convolve(self.position, clips)


def _convolve(convolution: nn.Conv3d, clips: Tensor) -> Tensor:
    return convolution(clips.movedim(-1, 1)).movedim(1, -1)


class LocalSpatialDownsampling(nn.Module):
    """LSD: a learnable query, the same everywhere, attends to each window of patches (Eqs. 5-7)."""

    def __init__(self, config: VideoPandaConfig):
        super().__init__()
        self.attention = StabAttention(config)
        self.query = nn.Parameter(torch.empty(config.stab_dim)) if config.lsd_query == "learned" else None

    def reset_own_parameters(self, config: VideoPandaConfig) -> None:
        """Draw the query."""
        if self.query is not None:
            init.normal_(self.query, std=config.initializer_range)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows `(P, W, d)` to `(P, d)`; a pooled query is added to what it sees, as the reference does."""
        pooled = windows.mean(1) if self.query is None else None
        query = self.query[None] if pooled is None else pooled
        seen = self.attention.o_proj(window_attention(*self.attention.project(query, windows)).flatten(1))
        return seen if pooled is None else pooled + seen


class AveragePool(nn.Module):
    """The mean of each window, for LSD (Tables 4 and 9); of a window of one patch, the patch."""

    def forward(self, windows: Tensor) -> Tensor:
        """Windows `(P, W, d)` to `(P, d)`."""
        return windows.mean(1)


class SummaryQuery(nn.Module):
    """One learnable query that sums up each segment of tokens: FSRA each frame (Eqs. 8-10), GSTRA each video.

    Args:
        config: Of the model.
        mlp_ratio: Width over d of an MLP after the attention, with a norm before and a residual round it; 0 for none.
        bias: Whether the projections of the attention have one.
    """

    def __init__(self, config: VideoPandaConfig, *, mlp_ratio: int = 0, bias: bool = False):
        super().__init__()
        self.attention = StabAttention(config, bias=bias)
        self.query = nn.Parameter(torch.empty(config.stab_dim))
        self.mlp = stab_mlp(config, mlp_ratio) if mlp_ratio else None

    def reset_own_parameters(self, config: VideoPandaConfig) -> None:
        """Draw the query."""
        init.normal_(self.query, std=config.initializer_range)

    def forward(self, tokens: Tensor, segments: Tensor, num_segments: int) -> Tensor:
        """Tokens `(N, d)`, of segment `(N,)` each, to `(S, d)`."""
        summary = self.attention.attend_segments(self.query, tokens, segments, num_segments)
        return summary if self.mlp is None else summary + self.mlp(summary)


class PerceiverResampler(nn.Module):
    """Learned latents attend to the patches of a frame, for LSD (Table 9).

    A frame of `n` tokens takes the first `n` latents, so that it has as many tokens as its ids say.
    """

    def __init__(self, config: VideoPandaConfig):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.resampler_latents, config.stab_dim))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attention": StabAttention(config), "mlp": stab_mlp(config, 4)})
            for _ in range(config.resampler_depth)
        )

    def reset_own_parameters(self, config: VideoPandaConfig) -> None:
        """Draw the latents."""
        init.normal_(self.latents, std=config.initializer_range)

    def forward(self, frames: Tensor, num_tokens: int) -> Tensor:
        """Frames `(F, m, d)` of patches to `(F, num_tokens, d)`.

        Raises:
            ConfigurationError: There are fewer latents than tokens.
        """
        if num_tokens > len(self.latents):
            raise ConfigurationError(
                f"a frame has {num_tokens} tokens and the resampler {len(self.latents)} latents; take smaller frames "
                "(longest_edge) or raise resampler_latents."
            )
        latents = self.latents[:num_tokens].expand(len(frames), -1, -1)
        for layer in self.layers:
            latents = latents + layer["attention"].attend_frames(latents, frames)
            latents = latents + layer["mlp"](latents)
        return latents


def stab_mlp(config: VideoPandaConfig, ratio: int) -> nn.Sequential:
    """Norm, linear, GELU, linear."""
    width = config.stab_dim
    norm = nn.LayerNorm(width) if config.reference_blocks else nn.Identity()
    return nn.Sequential(norm, nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Fusion(nn.Module):
    """Context tokens of the frames from what sums up each frame and its video (Eq. 14); alpha starts at a half."""

    def __init__(self, config: VideoPandaConfig):
        super().__init__()
        width = config.stab_dim
        self.alpha = nn.Parameter(torch.empty(width)) if config.fsra and config.gstra else None
        self.norm = nn.LayerNorm(width) if config.reference_blocks else nn.Identity()
        self.proj = nn.Linear(width, width)

    def reset_own_parameters(self, config: VideoPandaConfig) -> None:
        """Set alpha."""
        if self.alpha is not None:
            init.zeros_(self.alpha)

    def forward(self, frames: Tensor | None, videos: Tensor | None) -> Tensor:
        """F_s `(F, d)` and, for each frame, G_st `(F, d)`; one of them may be missing."""
        fused = videos if frames is None else frames
        if self.alpha is not None:
            alpha = self.alpha.sigmoid()
            fused = alpha * frames + (1 - alpha) * videos
        return self.proj(self.norm(fused))


class SpatioTemporalAlignment(nn.Module):
    """STAB: patches, LSTE, LSD, FSRA, GSTRA, fusion, row tokens and the projector (section 3.1, Figure 3)."""

    def __init__(self, config: VideoPandaConfig, hidden_size: int):
        super().__init__()
        width = config.stab_dim
        self.patch_size, self.window_size = config.stab_patch_size, config.window_size
        self.downsamples_first = config.downsampling_position == "before_lste"
        self.patch_proj = nn.Linear(3 * self.patch_size**2, width, bias=False)  # f_patch of Eq. 1
        self.lste = LocalSpatioTemporalEncoding(config) if config.lste else None
        self.downsampling = {
            "lsd": LocalSpatialDownsampling,
            "perceiver": PerceiverResampler,
        }.get(config.downsampling, lambda _: AveragePool())(config)
        self.fsra = SummaryQuery(config) if config.fsra else None
        self.gstra = SummaryQuery(config, mlp_ratio=config.global_mlp_ratio, bias=True) if config.gstra else None
        self.fusion = Fusion(config)
        self.row_token = nn.Parameter(torch.empty(width)) if config.row_tokens else None
        self.projector = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def reset_own_parameters(self, config: VideoPandaConfig) -> None:
        """Draw the row token."""
        if self.row_token is not None:
            init.normal_(self.row_token, std=config.initializer_range)

    def encode_pixels(self, pixel_values_videos: Tensor) -> Tensor:
        """Eq. 1: `(P, 3 * patch_size**2)` normalised pixels to `(P, W * d)`, the patches of each window in order."""
        size, window = self.patch_size, self.window_size
        pixels = pixel_values_videos.to(self.patch_proj.weight.dtype)
        pixels = pixels.view(-1, 3, window, size, window, size).permute(0, 2, 4, 1, 3, 5)
        return self.patch_proj(pixels.flatten(3)).flatten(1)

    def forward(self, features: Tensor, geometry: VisualGeometry) -> tuple[Tensor, Tensor, Tensor]:
        """Embed patches, frames and rows.

        Args:
            features: `(P, W * d)` from `encode_pixels`, in the order of the patch tokens.
            geometry: Video, frame and row of every visual token.

        Returns:
            `(P, D)` visual tokens, `(F, D)` context tokens and `(L, D)` row tokens, `(0, D)` without those (Eq. 17).
        """
        clips = find_clips(geometry)
        windows = features.unflatten(1, (self.window_size**2, -1))
        if self.downsamples_first:
            windows = self.downsampling(windows)[:, None]
        if self.lste is not None:
            windows = self._encode(windows, clips)
        if self.downsamples_first:
            tokens = windows[:, 0]
        elif isinstance(self.downsampling, PerceiverResampler):
            tokens = self._resample(windows, clips)
        else:
            tokens = self.downsampling(windows)
        context = self.fusion(self._sum_up_frames(tokens, geometry), self._sum_up_videos(windows, geometry))
        rows = tokens[:0] if self.row_token is None else self.row_token.expand(geometry.num_lines, -1)
        visual = torch.cat([tokens, context, rows])
        return self.projector(visual).split([len(tokens), len(context), len(rows)])

    def _encode(self, windows: Tensor, clips: list[Clips]) -> Tensor:
        """LSTE over the patches of each clip, taken out of their windows and put back."""
        side = int(windows.shape[1] ** 0.5)
        encoded = torch.empty_like(windows)
        for tokens, (rows, cols) in clips:
            clip = windows[tokens].unflatten(2, (rows, cols)).unflatten(4, (side, side))
            clip = self.lste(clip.transpose(3, 4).flatten(2, 3).flatten(3, 4))
            clip = clip.unflatten(3, (cols, side)).unflatten(2, (rows, side)).transpose(3, 4)
            encoded = encoded.index_copy(0, tokens.flatten(), clip.reshape(-1, side * side, clip.shape[-1]))
        return encoded

    def _resample(self, windows: Tensor, clips: list[Clips]) -> Tensor:
        """The latents of each frame, in the places of its tokens."""
        tokens = torch.empty_like(windows[:, 0])
        for members, (rows, cols) in clips:
            frames = windows[members.flatten(0, 1)].flatten(1, 2)
            latents = self.downsampling(frames, rows * cols)
            tokens = tokens.index_copy(0, members.flatten(), latents.flatten(0, 1))
        return tokens

    def _sum_up_frames(self, tokens: Tensor, geometry: VisualGeometry) -> Tensor | None:
        """F_s `(F, d)` of Eq. 10, or None without FSRA."""
        return None if self.fsra is None else self.fsra(tokens, geometry.patch_frame, geometry.num_frames)

    def _sum_up_videos(self, windows: Tensor, geometry: VisualGeometry) -> Tensor | None:
        """G_st of Eq. 13 for each frame `(F, d)`, over all patches of its video, or None without GSTRA."""
        if self.gstra is None:
            return None
        host = geometry.host or geometry
        num_videos = int(host.patch_video.max()) + 1
        segments = geometry.patch_video.repeat_interleave(windows.shape[1])
        videos = self.gstra(windows.flatten(0, 1), segments, num_videos)
        frame_video = torch.zeros_like(geometry.frame_rows).scatter(0, geometry.patch_frame, geometry.patch_video)
        return videos[frame_video]
