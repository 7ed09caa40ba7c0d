"""Scenes with a caption among their questions: one clause for each object, in the order in which they appear.

A clause is colour, pattern, shape, place of appearance and motion; objects that appear together are named row by row.
Every word is one token, so that the fields of an answer are found by position: column `"caption"` is the whole answer,
`"caption/shape"` the shapes of its clauses, each given the words before it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from claims.protocol import Budget, Variant
from claims.scenes import Scenes, draw_scene, encode
from claims.world import Asked
from elva_hf.data.toy_rows import draw_questions
from elva_hf.data.toy_world import Question, Scene, SceneObject, place_name, questions, render

QUESTION = "What shapes are there?"
COLUMN = "caption"
FIELDS = ("color", "pattern", "shape", "place", "motion")
SEPARATOR = ","


def name_objects(scene: Scene) -> list[SceneObject]:
    """The objects as a caption names them: by their first frame, then by row and column in it."""
    return sorted(scene.objects, key=lambda thing: (thing.entry, thing.cells[thing.entry]))


def read_fields(thing: SceneObject) -> dict[str, str]:
    """What the clause of an object says, by field."""
    place = place_name(thing.cells[thing.entry])
    return dict(zip(FIELDS, (thing.color, thing.pattern, thing.shape, place, thing.motion), strict=True))


def caption(scene: Scene) -> Question:
    """The question for the caption of a scene, and the caption."""
    clauses = [" ".join(read_fields(thing).values()) for thing in name_objects(scene)]
    return Question(COLUMN, QUESTION, f"{SEPARATOR} ".join(clauses))


def label_tokens(scene: Scene) -> tuple[str, ...]:
    """Per token of the caption the column that it counts for, and after `#` the clause; `""` between clauses."""
    labels: list[str] = []
    for number, thing in enumerate(name_objects(scene)):
        labels += [""] * (number > 0)
        for field, value in read_fields(thing).items():
            labels += [f"{COLUMN}/{field}#{number}"] * len(value.split())
    return (*labels, "")


class Captions(Scenes):
    """Scenes whose last question is for the caption."""

    def ask(
        self, scene: Scene, number: int, tokenizer: PreTrainedTokenizerBase, patch_size: int, variant: Variant
    ) -> Asked:
        """See `World`; the caption is one of the questions."""
        frames = render(scene)
        asked = [*draw_questions(questions(scene), number - 1, random.Random(scene.seed), {}), caption(scene)]
        sample = encode(frames, asked, tokenizer, patch_size)
        fields = ((),) * (len(asked) - 1) + (label_tokens(scene),)
        return Asked(sample, tuple(question.task for question in asked), len(scene.objects), frames, fields)

    def blind(self, budget: Budget, fitted: int, scored: int) -> dict[str, float]:
        """See `World`; of a field it knows what it may depend on among the words before it."""
        frames, share = max(budget.frames), budget.single_share
        counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
        for seed in range(fitted):
            for column, known, value in _given(draw_scene(seed, frames, "train", share)):
                counts[column, known][value] += 1
        constant = {key: values.most_common(1)[0][0] for key, values in counts.items()}
        right: dict[str, list[bool]] = defaultdict(list)
        for seed in range(scored):
            scene = draw_scene(seed, frames, "test", share)
            for column, known, value in _given(scene):
                for name in (column, f"{column}/{len(scene.objects)}"):
                    right[name].append(constant.get((column, known)) == value)
        own = {column: float(np.mean(right[column])) for column in sorted(right)}
        return super().blind(budget, fitted, scored) | own


def _given(scene: Scene) -> Iterator[tuple[str, Hashable, str]]:
    """Columns of the caption with what tells of each, and its value: the same field of clauses before, for a motion
    the place."""
    yield COLUMN, None, caption(scene).answer
    clauses = [read_fields(thing) for thing in name_objects(scene)]
    for number, clause in enumerate(clauses):
        for field in FIELDS:
            known = tuple(earlier[field] for earlier in clauses[:number])
            yield f"{COLUMN}/{field}", (known, clause["place"] if field == "motion" else ""), clause[field]
