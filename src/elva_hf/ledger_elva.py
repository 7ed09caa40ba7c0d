"""The token ledger: what a merge schedule costs in tokens, FLOPs and bytes, known before anything runs.

Plain numbers in, plain numbers out. A ratio step removes a number of tokens that geometry alone decides; a threshold
step depends on the pixels, so it has bounds: every tube merged to its floor, or nothing merged. A plan is of one
sample, one row of a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .configuration_elva import ElvaConfig, VideoDecoderConfig
from .errors_elva import ConfigurationError
from .frames_elva import FULL_LAYOUT, NUM_BORDER_TOKENS, Grid, spread_high_frames, tokens_per_frame
from .layout_elva import FrameLayout
from .merging_elva import count_removals
from .schedule_elva import MergeSchedule

ATTENTION_COUNTS = ("causal", "full")
"""`"causal"`: each query with the keys up to its own, what is needed. `"full"`: with all keys, what `torch` counts."""

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds(Generic[T]):
    """The least and the most something can be; the same where geometry alone decides."""

    minimum: T
    maximum: T

    @property
    def is_exact(self) -> bool:
        """Whether both are the same."""
        return self.minimum == self.maximum


@dataclass(frozen=True)
class Flops:
    """Floating point operations, two for each multiplication with addition; only products of matrices count.

    Args:
        patch_embed: Pixels to decoder embeddings, once for all frames.
        linear: Projections and MLPs of all decoder layers.
        attention: Queries with keys and weights with values, all layers.
        lm_head: Hidden states to logits.
    """

    patch_embed: int
    linear: int
    attention: int
    lm_head: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.patch_embed + self.linear + self.attention + self.lm_head


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that decide what a decoder of Llama's form costs: gated MLPs, grouped keys and values.

    Args:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_heads: Query heads.
        num_key_value_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocab_size: Rows of the language-model head.
        bytes_per_value: Of keys and values in the cache.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_value: int

    @classmethod
    def from_config(cls, text_config: Any, dtype: str | torch.dtype | None = None) -> DecoderShape:
        """Read the shape of a text model.

        Args:
            text_config: Configuration of a decoder of Llama's form.
            dtype: Of keys and values; the configuration's own if None, and bfloat16 if it has none.

        Raises:
            ConfigurationError: The decoder has another form.
        """
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        missing = [name for name in needed if not isinstance(getattr(text_config, name, None), int)]
        if missing:
            raise ConfigurationError(
                f"a {getattr(text_config, 'model_type', type(text_config).__name__)!r} decoder has no whole number for "
                f"{', '.join(missing)}; the ledger counts decoders of Llama's form."
            )
        dtype = dtype or getattr(text_config, "dtype", None) or torch.bfloat16
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        heads = text_config.num_attention_heads
        return cls(
            num_layers=text_config.num_hidden_layers,
            hidden_size=text_config.hidden_size,
            intermediate_size=text_config.intermediate_size,
            num_heads=heads,
            num_key_value_heads=getattr(text_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            vocab_size=text_config.vocab_size,
            bytes_per_value=dtype.itemsize,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of the linear maps of a layer: each token meets each of them once."""
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token's key and value take in the cache of a layer."""
        return 2 * self.num_key_value_heads * self.head_dim * self.bytes_per_value

    def linear_flops(self, layers: Sequence[int]) -> int:
        """Of projections and MLPs, for the tokens that enter each layer."""
        return 2 * self.layer_weights * sum(layers)

    def attention_flops(self, layers: Sequence[int], attention: str = "causal") -> int:
        """Of attention in one sample, for its tokens in each layer; sliding windows are counted as if they saw all.

        Raises:
            ConfigurationError: `attention` is none of `ATTENTION_COUNTS`.
        """
        if attention not in ATTENTION_COUNTS:
            raise ConfigurationError(f"attention={attention!r}: expected one of {', '.join(ATTENTION_COUNTS)}.")
        pairs = sum(tokens * (tokens + 1) // 2 if attention == "causal" else tokens**2 for tokens in layers)
        return 4 * pairs * self.num_heads * self.head_dim

    def lm_head_flops(self, num_logits: int) -> int:
        """Of the language-model head, applied to so many positions."""
        return 2 * self.hidden_size * self.vocab_size * num_logits


@dataclass(frozen=True)
class TokenPlan:
    """What a prompt costs: tokens per frame and, if a model is known, per layer, with FLOPs and bytes of the prefill.

    Args:
        grids: Per video or image, rows and columns of patches of each frame.
        text_tokens: Tokens of text, without the two borders of each video.
        shape: The decoder; None if no configuration was given.
        schedule: What merges where; None likewise.
        layers: Tokens that enter each decoder layer, after the merge at its input; None likewise.
        patch_embed_flops: FLOPs from pixels to embeddings; 0 without a configuration.
        layout: How a frame is written in tokens.
    """

    grids: tuple[tuple[Grid, ...], ...]
    text_tokens: int
    shape: DecoderShape | None = None
    schedule: MergeSchedule | None = None
    layers: tuple[Bounds[int], ...] | None = None
    patch_embed_flops: int = 0
    layout: FrameLayout = FULL_LAYOUT

    @property
    def tokens_per_frame(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each frame of each video, with `<FRAME>` and `<LINE>`."""
        return tuple(tokens_per_frame(video, self.layout) for video in self.grids)

    @property
    def num_frames(self) -> int:
        """Frames of all videos."""
        return sum(len(video) for video in self.grids)

    @property
    def num_patches(self) -> int:
        """Patches of all frames: the tokens that may merge."""
        return sum(rows * cols for video in self.grids for rows, cols in video[:: self.layout.chunk_size])

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of all frames, without borders: the count of Table 6."""
        return sum(map(sum, self.tokens_per_frame))

    @property
    def num_tokens(self) -> int:
        """Positions in the context: frames, borders and text."""
        return self.num_visual_tokens + NUM_BORDER_TOKENS * len(self.grids) + self.text_tokens

    @property
    def flops(self) -> Bounds[Flops]:
        """FLOPs up to the first token of an answer: causal attention, logits of the last position only."""
        return self.count_flops()

    @property
    def kv_cache_bytes(self) -> Bounds[int]:
        """Bytes of all keys and values. A batch is padded to its longest row, stage by stage."""
        shape, _ = self._known()
        return self._bound(lambda layers: sum(layers) * shape.kv_bytes_per_token)

    def count_flops(self, num_logits: int | None = 1, attention: str = "causal") -> Bounds[Flops]:
        """FLOPs by another convention.

        Args:
            num_logits: Positions the language-model head is applied to; None for every token that is left.
            attention: One of `ATTENTION_COUNTS`.

        Raises:
            ConfigurationError: The plan knows no model, or `attention` is not known.
        """
        shape, _ = self._known()
        return self._bound(
            lambda layers: Flops(
                patch_embed=self.patch_embed_flops,
                linear=shape.linear_flops(layers),
                attention=shape.attention_flops(layers, attention),
                lm_head=shape.lm_head_flops(layers[-1] if num_logits is None else num_logits),
            )
        )

    def without_merging(self) -> TokenPlan:
        """The same prompt with the schedule `"none"`."""
        _, layers = self._known()
        return replace(self, schedule=MergeSchedule(), layers=(layers[0],) * len(layers))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON: bounds are `{"minimum": ..., "maximum": ...}`."""
        plan = {
            "tokens_per_frame": [list(video) for video in self.tokens_per_frame],
            "num_frames": self.num_frames,
            "num_patches": self.num_patches,
            "num_visual_tokens": self.num_visual_tokens,
            "text_tokens": self.text_tokens,
            "num_tokens": self.num_tokens,
        }
        if self.schedule is None or self.layers is None:
            return plan
        flops = self.flops
        return {
            **plan,
            "merge_schedule": self.schedule.to_dict(),
            "tokens_per_layer": [asdict(layer) for layer in self.layers],
            "flops": {
                name: {**asdict(bound), "total": bound.total}
                for name, bound in (("minimum", flops.minimum), ("maximum", flops.maximum))
            },
            "kv_cache_bytes": asdict(self.kv_cache_bytes),
        }

    def _known(self) -> tuple[DecoderShape, tuple[Bounds[int], ...]]:
        if self.shape is None or self.layers is None:
            raise ConfigurationError(
                "this plan was made without a model, so it knows tokens only; pass config=model.config."
            )
        return self.shape, self.layers

    def _bound(self, count: Callable[[list[int]], T]) -> Bounds[T]:
        _, layers = self._known()
        return Bounds(count([layer.minimum for layer in layers]), count([layer.maximum for layer in layers]))


def plan_tokens(
    videos: Sequence[Sequence[tuple[int, int]]],
    config: VideoDecoderConfig | None = None,
    merge_schedule: Any = None,
    text_tokens: int = 0,
    layout: FrameLayout | None = None,
) -> TokenPlan:
    """Plan a prompt from the patch grids of its frames.

    Args:
        videos: Per video or image, rows and columns of patches of each frame.
        config: The model; without it only tokens are counted.
        merge_schedule: Instead of the configuration's own: a preset, steps, or a `MergeSchedule`.
        text_tokens: Tokens of text, without the two borders of each video.
        layout: How a frame is written in tokens; the model's if None, and ELVA's without a model.

    Raises:
        ConfigurationError: A schedule that the model cannot have, or a schedule without a model.

    Example:
        >>> plan = plan_tokens([[(12, 12)] * 32], ElvaConfig.from_preset("elva-7b"), "table5")
        >>> [plan.layers[layer].maximum for layer in (0, 1, 3, 14)]
        [5026, 2722, 1570, 994]
    """
    if isinstance(text_tokens, bool) or not isinstance(text_tokens, int) or text_tokens < 0:
        raise ConfigurationError(f"text_tokens={text_tokens!r}: expected the number of text tokens, 0 or more.")
    grids = tuple(tuple(Grid(*grid) for grid in video) for video in videos)
    layout = layout or (FULL_LAYOUT if config is None else config.frame_layout)
    plan = TokenPlan(grids, text_tokens, layout=layout)
    if config is None:
        if merge_schedule is not None:
            raise ConfigurationError("a merge_schedule needs a model to merge in; pass config=model.config.")
        return plan
    schedule = config.resolve_merge_schedule(merge_schedule)
    shape = DecoderShape.from_config(config.text_config, config.dtype)
    written = [video[:: layout.chunk_size] for video in grids]
    groups = [group for video in written for group in count_groups(video, schedule.window, schedule.max_run)]
    others = plan.num_tokens - plan.num_patches
    fewest, most = (
        [others + patches for patches in _walk_layers(groups, schedule, shape.num_layers, thresholds_merge)]
        for thresholds_merge in (True, False)
    )
    layers = tuple(Bounds(*both) for both in zip(fewest, most, strict=True))
    return replace(
        plan, shape=shape, schedule=schedule, layers=layers, patch_embed_flops=config.patch_embed_flops(grids)
    )


def exact_plan(plan: TokenPlan, tokens_per_layer: Tensor | Sequence[int]) -> TokenPlan:
    """Replace the bounds of a plan by what a run really kept.

    Args:
        plan: Of the same videos and model.
        tokens_per_layer: `(num_layers,)`, or `(num_layers, 1)`: `cache.tokens_per_layer`, one column for one sample.
            After `generate()` it holds the answer too, and so do the figures; the language-model head has then run
            once for each new token, which `count_flops(num_logits=...)` takes.

    Returns:
        The plan with both bounds the same, and the text tokens that layer 0 saw.

    Raises:
        ConfigurationError: The counts belong to another model, another video, or several samples.
    """
    _, planned = plan._known()
    counts = torch.as_tensor(tokens_per_layer)
    if counts.ndim == 2 and counts.shape[1] == 1:
        counts = counts[:, 0]
    if tuple(counts.shape) != (len(planned),):
        raise ConfigurationError(
            f"tokens_per_layer has shape {tuple(counts.shape)}; expected ({len(planned)},), one count for each layer "
            "of one sample. For sample i give column i: cache.tokens_per_layer[:, i]."
        )
    kept = counts.tolist()
    text_tokens = plan.text_tokens + kept[0] - plan.num_tokens
    if text_tokens < 0:
        raise ConfigurationError(
            f"the run saw {kept[0]} tokens, fewer than the {plan.num_tokens - plan.text_tokens} that the plan's videos "
            "take; give the plan and the cache of the same input."
        )
    return replace(plan, text_tokens=text_tokens, layers=tuple(Bounds(tokens, tokens) for tokens in kept))


def count_groups(
    video: Sequence[tuple[int, int]], window: int | None = None, max_run: int | None = None
) -> list[tuple[int, int]]:
    """Patches of a video, or of each of its windows, and the fewest that merging can leave.

    Args:
        video: Rows and columns of each frame, in time order.
        window: Frames from one border to the next that no merge crosses.
        max_run: The most frames one token may stand for.

    Returns:
        Per group its patches and its floor: one token per place of each grid, and per `max_run` frames of that grid.

    Example:
        >>> count_groups([(2, 2), (1, 1), (2, 2), (2, 2)], max_run=2)
        [(13, 9)]
    """
    groups = []
    for start in range(0, len(video), window or len(video)):
        frames = Counter((rows, cols) for rows, cols in video[start : start + window if window else None])
        patches = sum(rows * cols * count for (rows, cols), count in frames.items())
        runs = {grid: -(-count // (max_run or count)) for grid, count in frames.items()}
        groups.append((patches, sum(rows * cols * runs[rows, cols] for rows, cols in frames)))
    return groups


def _walk_layers(
    groups: Sequence[tuple[int, int]], schedule: MergeSchedule, num_layers: int, thresholds_merge: bool
) -> Iterator[int]:
    """Patches that enter each layer, if every threshold step merges all it may, or nothing."""
    inputs, floors = [patches for patches, _ in groups], [floor for _, floor in groups]
    patches = inputs
    for layer in range(num_layers):
        step = schedule.step_at(layer)
        if step is not None and step.target_ratio is not None:
            removals = count_removals(patches, inputs, floors, step.target_ratio, schedule.ratio_of)
            patches = [now - removed for now, removed in zip(patches, removals, strict=True)]
        elif step is not None and thresholds_merge and step.similarity_threshold < 1:  # no similarity exceeds 1
            patches = floors
        yield sum(patches)


TABLE5_TEXT_TOKENS = 290
"""Text beside the video, borders included: derived, 285 to 301 give all digits of 75, 146 and 289 T without merging."""

TABLE5_EDGES = {"high": 336, "low": 168}
"""Sides of the square frames: derived, 157 and 43 tokens fit the slopes of Table 5 without merging and with `+ HR`."""

TABLE5_HIGH_SHARE = 4
"""With `+ HR` one frame in so many is of high resolution: derived likewise."""


def plan_table5(config: ElvaConfig, num_frames: int, merge_schedule: Any = "none", hybrid: bool = False) -> TokenPlan:
    """The prompt of a row of Table 5.

    Args:
        config: The model; the paper's is `ElvaConfig.from_preset("elva-7b")`.
        num_frames: 32, 64 or 128.
        merge_schedule: `"none"`, or for `+ Merge` a schedule.
        hybrid: `+ HR`.
    """
    high = spread_high_frames(num_frames, num_frames // TABLE5_HIGH_SHARE if hybrid else num_frames)
    sides = {role: edge // config.patch_size for role, edge in TABLE5_EDGES.items()}
    video = [(sides["high" if is_high else "low"],) * 2 for is_high in high]
    return plan_tokens([video], config, merge_schedule, TABLE5_TEXT_TOKENS - NUM_BORDER_TOKENS)


def table5_flops(plan: TokenPlan) -> Bounds[int]:
    """FLOPs as Table 5 counts them: all linear maps, the head on every token that is left, and no attention.

    Derived: so counted, the encoder-free rows come out as printed, 75, 146 and 289 T; causal attention would add 6, 22
    and 83 T. Profilers that look at modules count so.
    """
    flops = plan.count_flops(num_logits=None)
    return Bounds(*(bound.total - bound.attention for bound in (flops.minimum, flops.maximum)))
