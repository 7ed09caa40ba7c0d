"""VideoPandaConfig: every number of the Video-Panda paper that belongs to a model, and the options of its ablations.

Sections, equations and tables are those of the Video-Panda paper. What it leaves open is listed with its reason in
`docs/video-panda.md`.
"""

# No `from __future__ import annotations` here: @strict does not check a type that is a string.
from collections.abc import Sequence
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import SubConfigSpec

from elva_hf.configuration_elva import PRESETS as ELVA_PRESETS
from elva_hf.configuration_elva import VideoDecoderConfig
from elva_hf.errors_elva import ConfigurationError
from elva_hf.layout_elva import FrameLayout

CHOICES = {
    "downsampling": ("lsd", "average_pool", "none", "perceiver"),
    "downsampling_position": ("after_lste", "before_lste"),
    "lsd_query": ("learned", "pooled"),
    "attention_scale": ("head", "width"),
}
"""What the fields that are words may be."""


@strict
class VideoPandaConfig(VideoDecoderConfig):
    """Configuration of Video-Panda: a causal text decoder and the Spatio-Temporal Alignment Block in front of it.

    Fields that are not named here are those of `VideoDecoderConfig`. `patch_size` is the side of what one visual token
    stands for: the paper's patch of 14 pixels (`stab_patch_size`) times the side of LSD's window, 2 (Eq. 6).

    Args:
        stab_patch_size: p of Eq. 1, side of a patch in pixels; `patch_size` must be a multiple of it.
        stab_dim: d of Eq. 1, width of the block. 1024 is derived from "45M parameters".
        stab_num_heads: Heads of all attentions of the block (Eq. 4); must divide `stab_dim`.
        attention_scale: `"head"` divides scores by the root of a head's width, `"width"` by that of d (Eq. 4).
        lste: Whether there is Local Spatio-Temporal Encoding (Eqs. 2-3); without it L_st = P (Table 4).
        lste_reduction: d over the channels between LSTE's first and last convolution: 1.5 gives 682, which fits the
            FLOPs of Table 3.
        downsampling: `"lsd"` (Eqs. 5-7), `"average_pool"` (Table 4), `"none"` (Table 9, half resolution: a token for
            each patch), `"perceiver"` (Table 9: learned latents attend to the frame; there are no row tokens).
        downsampling_position: `"after_lste"`, or `"before_lste"` (Table 8).
        lsd_query: `"learned"`, one vector for all windows (Eq. 5), or `"pooled"`, the mean of the window.
        resampler_latents: Most tokens of a frame with `downsampling="perceiver"`.
        resampler_depth: Its layers.
        fsra: Whether frames are summed up (Eqs. 8-10); without it a context token is the projected G_st (Table 4).
        gstra: Whether the video is (Eqs. 11-13); without it a context token is the projected F_s (Table 4).
        row_tokens: Whether a row token closes each row (Eq. 15, Table 4).
        reference_blocks: Whether attentions have norms, an output projection and, in GSTRA, biases, LSTE and f_proj a
            norm; without them the block is what the equations say and nothing else.
        global_mlp_ratio: Width of the MLP after GSTRA's attention over d; 0 for none.

    Raises:
        ConfigurationError: A value no model can have.

    Example:
        >>> config = VideoPandaConfig.from_preset("video-panda-7b", "without-row-tokens")
        >>> config.text_config.hidden_size, config.frame_layout.count((16, 16))
        (4096, 257)
    """

    model_type = "video_panda"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    longest_edge: int = 448
    low_res_longest_edge: int = 224
    num_high_res_frames: int = 8
    num_low_res_frames: int = 0
    stab_patch_size: int = 14
    stab_dim: int = 1024
    stab_num_heads: int = 8
    attention_scale: str = "head"
    lste: bool = True
    lste_reduction: float | int = 1.5
    downsampling: str = "lsd"
    downsampling_position: str = "after_lste"
    lsd_query: str = "learned"
    resampler_latents: int = 64
    resampler_depth: int = 1
    fsra: bool = True
    gstra: bool = True
    row_tokens: bool = True
    reference_blocks: bool = True
    global_mlp_ratio: int = 4

    def validate_architecture(self) -> None:
        """Check what the types of the fields cannot say; run at construction."""
        super().validate_architecture()
        self.check_positive("stab_patch_size", "stab_dim", "stab_num_heads", "resampler_latents", "resampler_depth")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}.")
        if self.stab_dim % self.stab_num_heads:
            raise ConfigurationError(
                f"stab_num_heads={self.stab_num_heads} does not divide stab_dim={self.stab_dim}; choose a divisor."
            )
        if not 1 <= self.lste_reduction <= self.stab_dim:
            raise ConfigurationError(f"lste_reduction={self.lste_reduction}: expected 1 to stab_dim={self.stab_dim}.")
        if self.global_mlp_ratio < 0:
            raise ConfigurationError(f"global_mlp_ratio={self.global_mlp_ratio}: expected 0 or more.")
        if not (self.fsra or self.gstra):
            raise ConfigurationError(
                "fsra=False and gstra=False leave nothing for the context token; keep one of them."
            )
        self._check_downsampling()

    def _check_downsampling(self) -> None:
        if self.patch_size % self.stab_patch_size:
            raise ConfigurationError(
                f"patch_size={self.patch_size} is no multiple of stab_patch_size={self.stab_patch_size}, the patches "
                "that a visual token stands for."
            )
        if self.downsampling == "none" and self.window_size > 1:
            raise ConfigurationError(
                f'downsampling="none" makes a token of each patch: set patch_size={self.stab_patch_size}.'
            )
        if self.downsampling == "perceiver" and self.row_tokens:
            raise ConfigurationError("a perceiver's latents have no rows; set row_tokens=False.")
        if self.downsampling == "perceiver" and self.downsampling_position == "before_lste":
            raise ConfigurationError(
                'a perceiver\'s latents have no places for LSTE; set downsampling_position="after_lste".'
            )

    @property
    def window_size(self) -> int:
        """Patches along a side of what one visual token stands for: 2 in Eq. 6."""
        return self.patch_size // self.stab_patch_size

    @property
    def lste_dim(self) -> int:
        """Channels between LSTE's first and last convolution."""
        return int(self.stab_dim / self.lste_reduction)

    @property
    def video_options(self) -> dict[str, Any]:
        """What a video processor must be told to make this model's inputs."""
        return {**super().video_options, "row_tokens": self.row_tokens}

    @property
    def frame_layout(self) -> FrameLayout:
        """`<FRAME>` stands for the context token of a frame (Eq. 16), `<LINE>` for the row token, if there is one."""
        return FrameLayout(line_token=self.row_tokens)

    def patch_embed_flops(self, videos: Sequence[Sequence[tuple[int, int]]]) -> int:
        """FLOPs of the block and its projector: linear maps and convolutions, two for each multiply-accumulate.

        Args:
            videos: Per video, rows and columns of visual tokens of each frame.
        """
        frames = [grid for video in videos for grid in video]
        tokens = sum(rows * cols for rows, cols in frames)
        width, window = self.stab_dim, self.window_size**2
        patches, hidden = tokens * window, self.text_config.hidden_size
        before = self.downsampling_position == "before_lste"
        encoded = tokens if before else patches  # what LSTE and GSTRA see
        square, output = width**2, int(self.reference_blocks)
        macs = patches * 3 * self.stab_patch_size**2 * width
        macs += self.lste * encoded * (2 * width * self.lste_dim + 3 * self.lste_dim + 27 * width)
        if self.downsampling == "lsd":
            queries = tokens if self.lsd_query == "pooled" else 1
            macs += (2 * patches + queries + output * tokens) * square + 2 * patches * width
        if self.downsampling == "perceiver":
            keys = sum((rows * cols) ** 2 for rows, cols in frames) * window
            macs += self.resampler_depth * ((2 * patches + (2 + 2 * 4) * tokens) * square + 2 * keys * width)
        if self.fsra:
            macs += (2 * tokens + 1 + output * len(frames)) * square + 2 * tokens * width
        if self.gstra:
            each = (output + 2 * self.global_mlp_ratio) * len(videos)
            macs += (2 * encoded + 1 + each) * square + 2 * encoded * width
        specials = len(frames) + self.row_tokens * sum(rows for rows, _ in frames)
        macs += len(frames) * square + (tokens + specials) * (width * hidden + hidden**2)
        return 2 * macs

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Fields of each preset, by name."""
        return PRESETS

    @classmethod
    def from_preset(cls, name: str, ablation: str | None = None, **overrides: Any) -> Self:
        """Build the configuration of the paper's model, of one of its ablations, or a tiny one.

        Args:
            name: `"video-panda-7b"` or `"video-panda-tiny"`.
            ablation: A key of `ABLATIONS`, a row of Tables 4, 8 and 9.
            **overrides: Fields to change.

        Raises:
            ConfigurationError: There is no such preset or ablation.
        """
        if ablation is None:
            return super().from_preset(name, **overrides)
        if ablation not in ABLATIONS:
            raise ConfigurationError(f"ablation {ablation!r} is not known; choose one of {', '.join(ABLATIONS)}.")
        config = super().from_preset(name)
        fields = ABLATIONS[ablation]
        scale = fields.get("window_size")
        own = {key: value for key, value in fields.items() if key != "window_size"}
        if scale is not None:
            own["patch_size"] = scale * config.stab_patch_size
        if ablation == "half-resolution":
            own["longest_edge"] = config.longest_edge // 2
        return super().from_preset(name, **{**own, **overrides})


_VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
_TOKEN_IDS = ("video_start", "video_end", "video", "frame", "line", "image")

PRESETS: dict[str, dict[str, Any]] = {
    "video-panda-7b": {
        "text_config": {**_VICUNA_7B, "vocab_size": 32000 + len(_TOKEN_IDS)},
        **{f"{name}_token_id": 32000 + i for i, name in enumerate(_TOKEN_IDS)},
    },
    "video-panda-tiny": {
        **{name: value for name, value in ELVA_PRESETS["tiny"].items() if not name.startswith("patch_embed")},
        "patch_size": 16,
        "stab_patch_size": 8,
        "stab_dim": 96,
        "stab_num_heads": 4,
        "low_res_longest_edge": 32,
        "initializer_range": 0.1,  # 1 / sqrt(width); 0.02 suits widths of some thousand
    },
}

ABLATIONS: dict[str, dict[str, Any]] = {
    "without-row-tokens": {"row_tokens": False},
    "without-fsra": {"fsra": False},
    "without-gstra": {"gstra": False},
    "without-lste": {"lste": False},
    "without-gstra-and-lste": {"gstra": False, "lste": False},
    "lsd-before-lste": {"downsampling_position": "before_lste"},
    "average-pool": {"downsampling": "average_pool"},
    "half-resolution": {"downsampling": "none", "window_size": 1},
    "perceiver": {"downsampling": "perceiver", "row_tokens": False, "window_size": 4},
}
"""Rows of Tables 4, 8 and 9 by name; `window_size` is in patches and sets `patch_size`."""
