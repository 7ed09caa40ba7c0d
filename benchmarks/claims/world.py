"""What a world is to the trainer; those that there are stand in `claims.worlds`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from claims.protocol import Budget, Variant
from elva_hf.data.encoding import EncodedSample


@dataclass(frozen=True)
class Asked:
    """One video with its questions, ready for a batch.

    Args:
        sample: Its tokens and pixels.
        columns: Per question its task.
        num_objects: Of the scene.
        frames: `(T, H, W, 3)` uint8, what is shown; the teacher sees the same.
        fields: Per question and token of its answer the column that the token counts for besides, `""` for none; tokens
            with the same label are one field, whose column is the label up to a `#`. Empty for no such columns.
    """

    sample: EncodedSample
    columns: tuple[str, ...]
    num_objects: int
    frames: np.ndarray
    fields: tuple[tuple[str, ...], ...] = ()


class World(Protocol):
    """Where videos and questions come from; a scene may be anything that `ask` knows."""

    def draw(self, budget: Budget, seed: int, step: int, variant: Variant) -> list[Any]:
        """The scenes of an optimiser step; no two seeds share one, variants of one seed share them all."""

    def held_out(self, budget: Budget, split: str, number: int, variant: Variant) -> list[Any]:
        """The scenes of an evaluation, the same for every variant and seed."""

    def ask(
        self, scene: Any, number: int, tokenizer: PreTrainedTokenizerBase, patch_size: int, variant: Variant
    ) -> Asked:
        """Render a scene and draw so many questions about it, all of which share one row's video."""

    def blind(self, budget: Budget, fitted: int, scored: int) -> dict[str, float]:
        """What the best answerer that never looks reaches per column.

        Args:
            budget: Says which scenes.
            fitted: Training scenes on which its answers are counted.
            scored: Test scenes.
        """
