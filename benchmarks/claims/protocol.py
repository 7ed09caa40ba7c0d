"""What a claim is, how its variants are compared, and when it counts as confirmed; fixed before anything is run.

A seed sets initialisation, videos and questions, and every variant of a seed sees the same videos and questions in the
same order: variants are compared by their differences within a seed, and `n` is the number of seeds, never of
questions. Differences are positive in the paper's direction.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

VERSION = 1
"""Part of the key of every run: raise it when trainer, world or evaluation change, and all runs are made anew."""

SEEDS = 5
LEVEL, FLOOR = 0.90, 0.85
CONFIDENCE = 0.95
RESAMPLES = 10_000

CONFIRMED, CONTRADICTED, NOT_SEEN = "confirmed", "contradicted", "not seen"


REDUCTIONS = ("merge", "pool", "drop")


@dataclass(frozen=True)
class Phase:
    """A part of a training.

    Args:
        share: Of the steps.
        frames: Frames of the videos of a step, one entry after another; 1 for images.
    """

    share: float
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Reduction:
    """What leaves the decoder fewer patches, in training and in evaluation.

    Args:
        kind: `"merge"` inside the decoder (`merge_schedule`), `"pool"` neighbouring frames after the patch embedding,
            or `"drop"` whole frames there.
        ratio: Share of the patches that is left, mean over the layers. Merging takes it in one ratio step, and what
            enters the layers before that is not merged.
        layer: At whose input that step merges.
        schedule: A `merge_schedule` instead of ratio and layer.

    Raises:
        ValueError: The kind is none of these.
    """

    kind: str
    ratio: float = 1.0
    layer: int = 1
    schedule: Any = None

    def __post_init__(self):
        if self.kind not in REDUCTIONS:
            raise ValueError(f"reduction {self.kind!r}: expected one of {', '.join(REDUCTIONS)}.")


@dataclass(frozen=True)
class Variant:
    """One of the models that a claim compares.

    Args:
        name: In tables.
        config: Fields of `ElvaConfig` that differ from the preset; added to those of the base.
        guidance: Weights `tube_weight` and `frame_weight` of Eq. 4; None for L_Gen alone.
        teacher: Of the guidance, by its name in `claims.teachers`.
        phases: Frames by share of the steps; the budget's for all steps if there are none.
        share: Of the budget's steps that it trains.
        base: Variant with whose last weights of the same seed it begins; it is evaluated at step 0, and then tuned.
        tuned: Whether a variant with a base trains at all.
        reduction: Of patches.
        sampling: What the world makes of it.

    Raises:
        ValueError: Guidance and reduction are given together, or phases that do not fill the training.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    guidance: Mapping[str, float] | None = None
    teacher: str = "looks"
    phases: tuple[Phase, ...] = ()
    share: float = 1.0
    base: str | None = None
    tuned: bool = True
    reduction: Reduction | None = None
    sampling: str = ""

    def __post_init__(self):
        if self.guidance is not None and self.reduction is not None:
            raise ValueError(f"variant {self.name!r}: a teacher knows all patches; give guidance or a reduction.")
        total = sum(phase.share for phase in self.phases)
        if self.phases and abs(total - 1) > 1e-6:
            raise ValueError(f"variant {self.name!r}: shares of its phases add up to {total:g}; expected 1.")


@dataclass(frozen=True)
class Budget:
    """What every variant of a claim is given.

    Args:
        steps: Optimiser steps.
        batch_size: Videos in a step.
        frames: Frames of the videos of a step, one entry after another; 1 for images. Evaluated at the largest.
        questions: Questions of a video.
        single_share: Share of scenes with one object.
        optimizer: `"adamw"`, or `"muon"` for the matrices of the decoder's layers and AdamW for the rest.
        learning_rate: Of AdamW.
        muon_learning_rate: Of Muon, unscaled.
        warmup: Steps of linear warm-up.
        tail_share: Share of the steps, the last, over which the learning rate falls linearly to 0.
        evaluate_every: Steps between evaluations.
        validation_scenes: Scenes of an evaluation.
        test_scenes: Scenes of the one evaluation on the test split, after the last step.
        world: Of the videos, by its name in `claims.worlds`.
        tuning_steps: Optimiser steps of a variant with a base.
        tuning_rate: Share of the learning rates that tuning begins with.
    """

    steps: int
    batch_size: int = 16
    frames: tuple[int, ...] = (8,)
    questions: int = 8
    single_share: float = 0.35
    optimizer: str = "muon"
    learning_rate: float = 2e-3
    muon_learning_rate: float = 0.015
    warmup: int = 50
    tail_share: float = 0.3
    evaluate_every: int = 100
    validation_scenes: int = 150
    test_scenes: int = 500
    world: str = "scenes"
    tuning_steps: int = 0
    tuning_rate: float = 0.3


def count_steps(variant: Variant, budget: Budget) -> int:
    """Optimiser steps of a variant; 0 for one that is only evaluated."""
    if variant.base is None:
        return round(variant.share * budget.steps)
    return budget.tuning_steps if variant.tuned else 0


def frames_of_steps(variant: Variant, budget: Budget) -> list[int]:
    """Frames of the videos of each step."""
    steps, frames, done = count_steps(variant, budget), [], 0.0
    for phase in variant.phases or (Phase(1.0, budget.frames),):
        done += phase.share
        frames += [phase.frames[step % len(phase.frames)] for step in range(len(frames), round(done * steps))]
    return frames


@dataclass(frozen=True)
class Claim:
    """What the paper says, and how it is tried here.

    Args:
        name: Of its files.
        title: Of its page.
        paper: Where the paper says it.
        variants: What is compared.
        pairs: Names of the variant that the paper finds better and of the one it is better than.
        columns: Columns of the evaluation on which the verdict is given, named before the runs.
        budget: Of every run.
        notes: What a reader must know of the trial, in sentences.
        bases: The claim among whose variants the bases are; this one if None.

    Raises:
        ValueError: A base is none of its variants.
    """

    name: str
    title: str
    paper: str
    variants: tuple[Variant, ...]
    pairs: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    budget: Budget
    notes: str = ""
    bases: Claim | None = None

    def __post_init__(self):
        for variant in self.variants:
            if variant.base is not None:
                self.base_of(variant)

    def base_of(self, variant: Variant) -> Variant:
        """The variant that another one begins with."""
        known = {candidate.name: candidate for candidate in (self.bases or self).variants}
        if variant.base not in known:
            raise ValueError(f"variant {variant.name!r} begins with {variant.base!r}; known are {', '.join(known)}.")
        return known[variant.base]


@dataclass(frozen=True)
class Curve:
    """What one run reached.

    Args:
        steps: Optimiser steps at each of `E` evaluations, ascending; from 0 on for a variant with a base.
        tokens: Real tokens, padding not counted, that had passed the decoder by then.
        accuracy: Per column `E` shares on the validation split.
        test: Per column the share on the test split, after the last step.
        parameters: Of the model, without what only training needs.
        visual_share: Share of the patches that is left, measured on the test split, mean over the layers.
        test_untuned: As `test`, before the first step; empty for a variant without base.
        swapped: As `test`, each question asked about the next scene's video.
    """

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    accuracy: Mapping[str, tuple[float, ...]]
    test: Mapping[str, float]
    parameters: int
    visual_share: float = 1.0
    test_untuned: Mapping[str, float] = field(default_factory=dict)
    swapped: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Curve:
        """Of what `to_dict` gave, or of what JSON made of it."""
        lists = {"steps": tuple(values["steps"]), "tokens": tuple(values["tokens"])}
        accuracy = {name: tuple(shares) for name, shares in values["accuracy"].items()}
        return cls(**{**values, **lists, "accuracy": accuracy})


# Curves


def steps_to_level(
    steps: Sequence[int], shares: Sequence[float], level: float = LEVEL, floor: float = FLOOR
) -> int | None:
    """Steps of the first evaluation at `level` or above that none under `floor` follows; None where there is none.

    Args:
        steps: `E` optimiser steps, ascending.
        shares: `E` accuracies.
        level: What must be reached.
        floor: What must be kept from then on.
    """
    for i, (step, share) in enumerate(zip(steps, shares, strict=True)):
        if share >= level and all(later >= floor for later in shares[i + 1 :]):
            return step
    return None


def restricted_mean(steps: Sequence[int | None], budget: int) -> float:
    """Mean of steps to a level, a run that never reached it counted with its budget: at most what the true mean is."""
    return float(np.mean([budget if value is None else min(value, budget) for value in steps]))


def share_at_tokens(tokens: Sequence[int], shares: Sequence[float], wanted: int) -> float | None:
    """Accuracy after so many tokens, on the line between evaluations; None outside of them.

    Args:
        tokens: `E` token counts, ascending.
        shares: `E` accuracies.
        wanted: Tokens.
    """
    if not tokens[0] <= wanted <= tokens[-1]:
        return None
    return float(np.interp(wanted, tokens, shares))


def shares_at_equal_tokens(one: Curve, other: Curve, column: str) -> tuple[float | None, float | None]:
    """Validation accuracy of two runs after the tokens of the one that saw fewer.

    The other one is read in the midst of its curve, where its learning rate has not fallen yet; to be fair to it, give
    it a budget that ends there.
    """
    wanted = min(one.tokens[-1], other.tokens[-1])
    first, second = (share_at_tokens(curve.tokens, curve.accuracy[column], wanted) for curve in (one, other))
    return first, second


# Differences between variants


@dataclass(frozen=True)
class Comparison:
    """One outcome of two variants over seeds; positive is the paper's direction.

    Args:
        differences: One for each seed.
        mean: Of the differences.
        bootstrap: Ends of the percentile interval over resampled seeds.
        t_interval: Ends of Student's interval.
        verdict: `"confirmed"`, `"contradicted"` or `"not seen"`.
        visible: The smallest difference that could have been seen: half the width of the wider interval; None where
            all differences are the same, which says nothing about the next seed.
    """

    differences: tuple[float, ...]
    mean: float
    bootstrap: tuple[float, float]
    t_interval: tuple[float, float]
    verdict: str
    visible: float | None


def paired_differences(better: Mapping[int, float], worse: Mapping[int, float]) -> list[float]:
    """Differences within each seed, in order of seeds.

    Raises:
        ValueError: The seeds of the two are not the same.
    """
    if better.keys() != worse.keys():
        raise ValueError(
            f"seeds {sorted(better)} and {sorted(worse)} do not pair; run the seeds that are missing, differences are "
            "taken within a seed."
        )
    return [better[seed] - worse[seed] for seed in sorted(better)]


def bootstrap_interval(differences: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over resampled seeds; too narrow for few of them, so read it beside Student's."""
    values = np.asarray(differences, float)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[draws].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Student's interval of the mean.

    Raises:
        ValueError: There are fewer than two differences.
    """
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        raise ValueError(f"{n} seed(s) give no interval; run at least 2 (--seeds).")
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(differences, ddof=1) / n**0.5)
    mean = float(np.mean(differences))
    return mean - half, mean + half


def judge(intervals: Sequence[tuple[float, float]]) -> str:
    """Confirmed where every interval lies above 0, contradicted where every one lies below it, else not seen."""
    if all(low > 0 for low, _ in intervals):
        return CONFIRMED
    return CONTRADICTED if all(high < 0 for _, high in intervals) else NOT_SEEN


def compare(differences: Sequence[float]) -> Comparison:
    """Mean, both intervals and verdict of paired differences, to 9 decimals: rounding errors decide nothing.

    Raises:
        ValueError: There are fewer than two.
    """
    differences = np.round(differences, 9).tolist()
    student = t_interval(differences)
    resampled = bootstrap_interval(differences)
    half = max(high - low for low, high in (resampled, student)) / 2
    return Comparison(
        differences=tuple(differences),
        mean=float(np.mean(differences)),
        bootstrap=resampled,
        t_interval=student,
        verdict=judge((resampled, student)),
        visible=half if any(a != b for a, b in itertools.pairwise(differences)) else None,
    )
