"""Merge schedules (section 3.1): at which decoder layers tokens merge, by which policy, and how far.

The shallow policy merges what is more similar than a threshold; the deep one merges the most similar pairs until a
ratio is reached. The paper gives both (0.6 and 50%) but not the layers: see `docs/paper-gaps.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from .errors_elva import ConfigurationError

PRESETS = ("none", "paper", "table5")
"""`"paper"`: thresholds at layers 1 and 3, a ratio at half depth. `"table5"`: a ratio at all three."""

_POLICIES = ("similarity_threshold", "target_ratio")
_CHOICES = {"ratio_of": ("current", "input"), "survivor": ("last", "first")}


@dataclass(frozen=True)
class MergeStep:
    """A merge at the input of a decoder layer; exactly one of the two policies is set.

    Args:
        layer: Decoder layer, from 1.
        similarity_threshold: Merge pairs of higher cosine similarity (tau of Eq. 1). Above 1 nothing merges.
        target_ratio: Merge the most similar pairs until this share of a video's patches is left.

    Raises:
        ConfigurationError: A value no step can have.
    """

    layer: int
    similarity_threshold: float | None = None
    target_ratio: float | None = None

    def __post_init__(self):
        if not _is_count(self.layer):
            raise ConfigurationError(
                f"merge step layer={self.layer!r}: expected an integer from 1; the input of layer 0 cannot merge."
            )
        given = [name for name in _POLICIES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigurationError(
                f"merge step at layer {self.layer}: expected exactly one of {' and '.join(_POLICIES)}, "
                f"got {' and '.join(given) or 'neither'}."
            )
        check_similarity_threshold(self.similarity_threshold)
        check_target_ratio(self.target_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The step as JSON, without the policy that is not set."""
        return {key.name: getattr(self, key.name) for key in fields(self) if getattr(self, key.name) is not None}


@dataclass(frozen=True)
class MergeSchedule:
    """All merges of a decoder. Falsy if there are none.

    Args:
        steps: `MergeStep`s or their dicts, layers strictly increasing, thresholds before ratios.
        ratio_of: What a ratio is a share of: the `"current"` patches of a video, or those of the `"input"`.
        max_run: The most frames of the input that one token may stand for. Without it a slow drift merges without end.
        window: Frames of a video from one border to the next that no merge crosses.
        survivor: The token of a run that stays: the `"last"` (Eq. 1) or the `"first"`.

    Raises:
        ConfigurationError: A value or an order of steps no schedule can have.

    Example:
        >>> MergeSchedule.resolve("paper", num_layers=28).steps[-1]
        MergeStep(layer=14, similarity_threshold=None, target_ratio=0.5)
    """

    steps: tuple[MergeStep, ...] = ()
    ratio_of: str = "current"
    max_run: int | None = None
    window: int | None = None
    survivor: str = "last"

    def __post_init__(self):
        object.__setattr__(self, "steps", _read_steps(self.steps))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"merge schedule {name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, choices))}."
                )
        for name in ("max_run", "window"):
            if getattr(self, name) is not None and not _is_count(getattr(self, name)):
                raise ConfigurationError(
                    f"merge schedule {name}={getattr(self, name)!r}: expected a number of frames from 1, or None."
                )
        for before, step in zip(self.steps, self.steps[1:], strict=False):
            if step.layer <= before.layer:
                raise ConfigurationError(
                    f"merge steps at layers {[step.layer for step in self.steps]}: expected strictly increasing layers."
                )
            if before.similarity_threshold is None and step.target_ratio is None:
                raise ConfigurationError(
                    f"merge step at layer {step.layer} has a similarity_threshold after the target_ratio at layer "
                    f"{before.layer}; thresholds belong in the shallow layers, ratios below them."
                )

    def __bool__(self) -> bool:
        return bool(self.steps)

    def step_at(self, layer: int) -> MergeStep | None:
        """The merge at the input of `layer`, if there is one."""
        return next((step for step in self.steps if step.layer == layer), None)

    def to_dict(self) -> dict[str, Any]:
        """The schedule as JSON; `resolve` gives it back."""
        return plain_schedule({key.name: getattr(self, key.name) for key in fields(self)})

    @classmethod
    def resolve(
        cls, value: Any, num_layers: int, similarity_threshold: float = 0.6, target_ratio: float = 0.5
    ) -> MergeSchedule:
        """Make the schedule that `value` means for a decoder of `num_layers` layers.

        Args:
            value: None, a preset name, a list of steps, a dict of this class' fields (its `steps` may name a preset),
                or a schedule.
            num_layers: Layers of the decoder.
            similarity_threshold: Of the presets' threshold steps.
            target_ratio: Of the presets' ratio steps.

        Raises:
            ConfigurationError: `value` is no schedule, or needs more layers.
        """
        value = {} if value is None else plain_schedule(value)
        if not isinstance(value, dict):
            value = {"steps": value}
        _check_keys(value, cls, "merge schedule")
        steps = value.get("steps", ())
        if isinstance(steps, str):
            steps = _preset_steps(steps, num_layers, similarity_threshold, target_ratio)
        schedule = cls(**{**value, "steps": steps})
        if schedule and schedule.steps[-1].layer >= num_layers:
            raise ConfigurationError(
                f"merge step at layer {schedule.steps[-1].layer}: the decoder has {num_layers} layers, "
                f"so the last layer that can merge its input is {num_layers - 1}."
            )
        return schedule


def plain_schedule(value: Any) -> Any:
    """Replace every `MergeSchedule` and `MergeStep` in a schedule, however it is written, by its dict."""
    if isinstance(value, MergeSchedule | MergeStep):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [plain_schedule(item) for item in value]
    if isinstance(value, dict):
        return {key: plain_schedule(item) for key, item in value.items()}
    return value


def check_similarity_threshold(value: float | None) -> None:
    """Raise a ConfigurationError unless `value` is None or a threshold some pairs fail: a number above -1."""
    if value is not None and not (_is_finite(value) and value > -1):
        raise ConfigurationError(
            f"similarity_threshold={value!r}: expected a number above -1; cosine similarity lies between -1 and 1."
        )


def check_target_ratio(value: float | None) -> None:
    """Raise a ConfigurationError unless `value` is None or a share above 0, at most 1."""
    if value is not None and not (_is_finite(value) and 0 < value <= 1):
        raise ConfigurationError(
            f"target_ratio={value!r}: expected kept / input tokens, above 0 and at most 1 (1 merges nothing)."
        )


def _preset_steps(name: str, num_layers: int, similarity_threshold: float, target_ratio: float) -> list[MergeStep]:
    if name not in PRESETS:
        raise ConfigurationError(
            f"merge_schedule={name!r} is not known; choose one of {', '.join(PRESETS)}, or give a list of steps."
        )
    if name == "none":
        return []
    deep = max(num_layers // 2, 3)
    if deep >= num_layers:
        raise ConfigurationError(
            f"merge_schedule={name!r} merges at three layers and needs a decoder of at least 4; this one has "
            f"{num_layers}. Give a list of steps instead."
        )
    shallow = (1, min(3, deep - 1))
    policy = {"similarity_threshold": similarity_threshold} if name == "paper" else {"target_ratio": target_ratio}
    return [*(MergeStep(layer, **policy) for layer in shallow), MergeStep(deep, target_ratio=target_ratio)]


def _read_steps(steps: Any) -> tuple[MergeStep, ...]:
    if not isinstance(steps, list | tuple):
        raise ConfigurationError(
            f"merge schedule steps={steps!r}: expected a list of steps such as "
            '{"layer": 1, "similarity_threshold": 0.6}, or through MergeSchedule.resolve the name of a preset '
            f"({', '.join(PRESETS)})."
        )
    return tuple(step if isinstance(step, MergeStep) else _read_step(step) for step in steps)


def _read_step(step: Any) -> MergeStep:
    if not isinstance(step, dict) or "layer" not in step:
        raise ConfigurationError(
            f"merge step {step!r}: expected a dict such as {{'layer': 1, 'similarity_threshold': 0.6}}."
        )
    _check_keys(step, MergeStep, "merge step")
    return MergeStep(**step)


def _check_keys(given: dict[str, Any], kind: type, what: str) -> None:
    known = [key.name for key in fields(kind)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ConfigurationError(
            f"{what} has no {', '.join(map(repr, unknown))}; its keys are {', '.join(map(repr, known))}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
