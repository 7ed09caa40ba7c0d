"""Recipes of the procedural world: stages, and what each shows and learns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from elva_hf.data.toy_world import STAGGERED_SHARE
from elva_hf.errors_elva import ConfigurationError


@dataclass(frozen=True)
class ToyStage:
    """One stage of a toy recipe: what is shown, for how long, and how it is learned.

    Args:
        name: Name in logs.
        num_frames: Frames of a video; 1 for images.
        max_steps: Optimiser steps.
        batch_size: Videos in a step.
        learning_rate: Peak, of AdamW.
        warmup_steps: Steps of linear warm-up.
        single_share: Share of scenes with one object.
        codec_share: Share of videos that pass through H.264 on their way.
        tube_alignment_weight: Weight of L_MSE (Eq. 2) to the hand-made teacher; 0 for none.
        focus: Tasks asked more often than the others, and how many times as often.
        stop_after: Steps after which the stage ends, short of `max_steps`, which still shapes the schedule.
        first_seed: Scene of the stage's first video.
        questions_per_video: Questions asked about a video, instead of the recipe's number.
        merge_schedule: What merges inside the decoder, from this stage on (section 3.3: in the last stage).
        muon_learning_rate: Peak of Muon for the matrices of the layers; None for AdamW alone, as the paper has it.
        weight_decay: Of Muon's matrices.
        decay_share: Share of the steps, the last, over which the learning rate falls linearly to 0; None for a cosine.
        patch_alignment_weight: Weight of the same error for every patch by itself (`patch_alignment_loss`).
        busy_weight: How much more a patch that shows a coloured thing counts there, beside 1 for any patch.
        staggered_share: Share of clips with several shapes in which these appear one after the other.
        shape_name_share: Share of the questions that name their object by its shape alone, beside those drawn so.
    """

    name: str
    num_frames: int
    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    single_share: float
    codec_share: float
    tube_alignment_weight: float
    focus: dict[str, float] | None = None
    stop_after: int | None = None
    first_seed: int = 0
    questions_per_video: int | None = None
    merge_schedule: str | list | None = None
    muon_learning_rate: float | None = None
    weight_decay: float = 0.0
    decay_share: float | None = None
    patch_alignment_weight: float = 0.0
    busy_weight: float = 4.0
    staggered_share: float = STAGGERED_SHARE
    shape_name_share: float = 0.0

    @property
    def is_guided(self) -> bool:
        """Whether the stage has a teacher."""
        return self.tube_alignment_weight > 0 or self.patch_alignment_weight > 0


def read_recipe(name_or_path: str) -> tuple[dict[str, Any], list[ToyStage]]:
    """Read a toy recipe: a name of `training/recipes/` or a path.

    Raises:
        ConfigurationError: A field is unknown, missing or of the wrong type.
    """
    packaged = resources.files("elva_hf.training.recipes") / f"{name_or_path}.yaml"
    text = packaged.read_text() if packaged.is_file() else Path(name_or_path).read_text()
    recipe = yaml.safe_load(text)
    recipe.pop("kind", None)
    stages = [_read_stage(stage, name_or_path) for stage in recipe.pop("stages")]
    return recipe, stages


def _read_stage(values: dict[str, Any], where: str) -> ToyStage:
    names = {field.name: field for field in fields(ToyStage)}
    if unknown := values.keys() - names.keys():
        raise ConfigurationError(f"{where}: stage has unknown fields {sorted(unknown)}; known are {sorted(names)}.")
    for name, value in values.items():
        wanted = str(names[name].type)
        if wanted in ("int", "float") and not isinstance(value, (int, float) if wanted == "float" else int):
            raise ConfigurationError(f"{where}: {name}={value!r} is no {wanted}; write floats as 4.0e-5.")
    return ToyStage(**values)
