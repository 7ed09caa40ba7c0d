"""MavorsConfig: the numbers of Mavors' paper that belong to a model, each with its section."""

# No `from __future__ import annotations` here: @strict does not check a type that is a string.
import copy
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.configuration_utils import SubConfigSpec

from elva_hf.configuration_elva import PRESETS as ELVA_PRESETS
from elva_hf.configuration_elva import TOKEN_ID_FIELDS, VideoDecoderConfig
from elva_hf.errors_elva import ConfigurationError
from elva_hf.layout_elva import FrameLayout
from elva_hf.schedule_elva import check_similarity_threshold
from elva_hf.siblings.mavors.chunks_mavors import fit_size, place_chunks
from elva_hf.siblings.mavors.rows_mavors import HEADER, MAX_CHUNK_FRAMES, arrange_rows

_CHOICES = {"ifa_rope": ("chunk", "token"), "ifa_causality": ("token", "chunk"), "short_chunk": ("repeat", "mean")}


@strict
class MavorsConfig(VideoDecoderConfig):
    """Configuration of a Mavors model: a causal text decoder, an inflated image tower and an aggregator of chunks.

    Fields that are not named here are those of `VideoDecoderConfig`; `patch_size` is the side of what one token stands
    for, `pool_size` patches of the tower, and `<FRAME>` and `<LINE>` are ids of patches, not tokens of their own.

    Args:
        vision_config: The image tower, a SigLIP's (section 3.3); its `image_size` is R_v and its pooling head unused.
        chunk_frames: Frames of a chunk, F (section 5.1).
        pool_size: Side of the squares of patches that become one token (section 3.3).
        short_chunk: What stands for the frames that the last chunk of a video lacks: `"repeat"` its last frame, or
            `"mean"` nothing, and Eq. 1 divides by the frames there are.
        ifa_num_layers: L_Inter (section 5.1; 0 to 5 in Table 3).
        ifa_num_attention_heads: Heads of these layers; the tower's if None.
        ifa_intermediate_size: Width of their MLPs; the tower's if None.
        ifa_rope: `"chunk"` for C-RoPE (Eq. 4), `"token"` for standard rotary positions (Table 4).
        ifa_rope_theta: Base of their frequencies.
        ifa_causality: `"token"` for causal attention as in a decoder, `"chunk"` to let a token see all of its chunk.
        chunk_similarity_threshold: Tokens of neighbouring chunks that are more alike merge before these layers (section
            5.4); None for no compression.
        fps: Frames per second at which a video is read, and which C-RoPE takes for no gap.
        max_chunks: The most chunks of a video; a longer one is played faster (Appendix D: 60, in training 32).
        sub_images: Whether an image goes in as a thumbnail and sub-images (section 3.5), from stage 2 on.
        max_sub_images: The most sub-images of an image; None for no limit, as in the paper.

    Raises:
        ConfigurationError: A value no model can have.

    Example:
        >>> MavorsConfig.from_preset("mavors-7b").vision_config.hidden_size
        1152
    """

    model_type = "mavors"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(config_class=SiglipVisionConfig),
    }

    vision_config: dict | PreTrainedConfig | None = None
    chunk_frames: int = 16
    pool_size: int = 2
    short_chunk: str = "repeat"
    ifa_num_layers: int = 3
    ifa_num_attention_heads: int | None = None
    ifa_intermediate_size: int | None = None
    ifa_rope: str = "chunk"
    ifa_rope_theta: float | int = 10000.0
    ifa_causality: str = "token"
    chunk_similarity_threshold: float | int | None = None
    fps: float | int = 2.0
    max_chunks: int = 60
    sub_images: bool = True
    max_sub_images: int | None = 9
    longest_edge: int = 1792

    def __post_init__(self, **kwargs: Any):
        if self.vision_config is None:
            self.vision_config = copy.deepcopy(SO400M)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check what the types of the fields cannot say; run at construction."""
        super().validate_architecture()
        self.check_positive("chunk_frames", "pool_size", "max_chunks", "ifa_rope_theta", "head_dim")
        check_similarity_threshold(self.chunk_similarity_threshold)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: expected {' or '.join(map(repr, choices))}.")
        if self.chunk_frames > MAX_CHUNK_FRAMES:
            raise ConfigurationError(f"chunk_frames={self.chunk_frames}: expected at most {MAX_CHUNK_FRAMES}.")
        if not self.fps > 0 or self.ifa_num_layers < 0:
            raise ConfigurationError(
                f"fps={self.fps}, ifa_num_layers={self.ifa_num_layers}: expected above 0, and from 0."
            )
        if self.max_sub_images is not None and self.max_sub_images < 1:
            raise ConfigurationError(f"max_sub_images={self.max_sub_images}: expected 1 or more, or None for no limit.")
        side = self.vision_config.patch_size * self.pool_size
        if self.patch_size != side:
            raise ConfigurationError(
                f"patch_size={self.patch_size}: a token stands for {self.pool_size}x{self.pool_size} patches of "
                f"{self.vision_config.patch_size} pixels, so it must be {side}."
            )
        width = self.vision_config.hidden_size
        if width % self.num_ifa_heads or self.head_dim % 2:
            raise ConfigurationError(
                f"ifa_num_attention_heads={self.num_ifa_heads}: the tower's width {width} must split into heads of "
                "even width; choose another divisor."
            )

    @property
    def num_ifa_heads(self) -> int:
        """Heads of the aggregator."""
        return self.ifa_num_attention_heads or self.vision_config.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of a head of the aggregator."""
        return self.vision_config.hidden_size // self.num_ifa_heads

    @property
    def video_options(self) -> dict[str, Any]:
        """What a video processor must be told to make this model's inputs."""
        shared = ("patch_size", "longest_edge", "low_res_longest_edge", "chunk_frames", "max_chunks", "sub_images")
        fields = {name: getattr(self, name) for name in (*shared, "max_sub_images")}
        return {**fields, "image_size": self.vision_config.image_size, "playback_fps": self.fps}

    def square_grid(self, longest_edge: int) -> tuple[int, int]:
        """Rows and columns of tokens of a large square frame: the tower's own size, whatever the ceiling."""
        edge = min(longest_edge, self.vision_config.image_size)
        sides = fit_size(edge, edge, image_size=edge, multiple=self.patch_size)
        return sides[0] // self.patch_size, sides[1] // self.patch_size

    def frame_counts(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """Frames of the most chunks that a video may have, or as many of them as are asked for."""
        most = options.get("max_chunks", self.max_chunks) * self.chunk_frames
        return min(options.get("num_frames", most), most), 0

    @property
    def frame_layout(self) -> FrameLayout:
        """A chunk is written as its patches alone."""
        return FrameLayout(frame_token=False, line_token=False, chunk_size=self.chunk_frames)

    @property
    def input_similarity_threshold(self) -> float | None:
        """Above which similarity tokens of neighbouring chunks merge before the aggregator."""
        return self.chunk_similarity_threshold

    @property
    def pixels_per_token(self) -> int:
        """Width of a row of `pixel_values_videos`: the pixels of one frame that a token stands for, and their place."""
        return 3 * self.patch_size**2 + HEADER

    def arrange_pixels(self, pixels: Any) -> Any:
        """Rows chunk by chunk, in each token by token; chunks follow one another without a gap."""
        positions = place_chunks(None, len(pixels), chunk_frames=self.chunk_frames, fps=self.fps)
        return arrange_rows(pixels, self.chunk_frames, positions)

    def patch_embed_flops(self, videos: Sequence[Sequence[tuple[int, int]]]) -> int:
        """FLOPs of tower, aggregator and projector, two for each multiplication with addition.

        Every chunk is counted with all its frames, and every token with those of its video before it.

        Args:
            videos: Per video, rows and columns of tokens of each frame.
        """
        total = 0
        for video in videos:
            tokens = [rows * columns for rows, columns in video[:: self.chunk_frames]]
            total += sum(map(self._chunk_macs, tokens)) + self._sequence_macs(sum(tokens))
        return 2 * total

    def _chunk_macs(self, tokens: int) -> int:
        """Multiply-accumulates of the tower for one chunk."""
        vision, patches = self.vision_config, tokens * self.pool_size**2
        width = vision.hidden_size
        convolution = patches * self.chunk_frames * 3 * vision.patch_size**2 * width
        linear = patches * (4 * width**2 + 2 * width * vision.intermediate_size)
        return convolution + vision.num_hidden_layers * (linear + 2 * patches**2 * width)

    def _sequence_macs(self, tokens: int) -> int:
        """Multiply-accumulates of aggregator and projector for the tokens of one video."""
        width, hidden = self.vision_config.hidden_size, self.text_config.hidden_size
        intermediate = self.ifa_intermediate_size or self.vision_config.intermediate_size
        linear = tokens * (4 * width**2 + 2 * width * intermediate)
        seen = tokens * (tokens + 1) // 2
        return self.ifa_num_layers * (linear + 2 * seen * width) + tokens * (width * hidden + hidden**2)

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """Fields of each preset, by name: `"mavors-7b"` (section 5.1) and `"mavors-tiny"`."""
        return PRESETS


SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
"""SigLIP-so400m-patch14-384; the paper names no SigLIP."""

PRESETS: dict[str, dict[str, Any]] = {
    "mavors-7b": {
        "text_config": {**ELVA_PRESETS["elva-7b"]["text_config"], "max_position_embeddings": 32768},
        "vision_config": SO400M,
    },
    "mavors-tiny": {
        "text_config": ELVA_PRESETS["tiny"]["text_config"],
        "vision_config": {
            **SO400M,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
        },
        "patch_size": 16,
        "chunk_frames": 4,
        "longest_edge": 256,
        "initializer_range": 0.1,  # 1 / sqrt(width); 0.02 suits widths of some thousand
        "low_res_longest_edge": 32,
        **{name: ELVA_PRESETS["tiny"][name] for name in TOKEN_ID_FIELDS},
    },
}
