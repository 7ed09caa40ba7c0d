"""Which answers are right, from the most likely next token at each place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from claims.world import Asked
from elva_hf.data.packing import IGNORED


def count_right(rows: Sequence[Asked], guesses: Tensor, labels: Tensor, segments: Tensor) -> Iterator[tuple[str, bool]]:
    """Columns and whether they were answered right: each question's task, the same by number of objects, and fields.

    Args:
        rows: `B` videos with their questions.
        guesses: `(B, N)` the most likely next token at each place.
        labels: `(B, N)` ids of the answers, -100 elsewhere.
        segments: `(B, N)` 0 for the video, 1, 2, ... for the questions, -1 for padding.
    """
    for row, good in zip(rows, grade(guesses, labels, segments), strict=True):
        for question, (task, tokens) in enumerate(zip(row.columns, good, strict=True)):
            yield task, all(tokens)
            yield f"{task}/{row.num_objects}", all(tokens)
            if row.fields and row.fields[question]:
                named = list(zip(row.fields[question], tokens, strict=True))
                for label in dict.fromkeys(label for label, _ in named if label):
                    yield label.split("#")[0], all(is_right for name, is_right in named if name == label)


def grade(guesses: Tensor, labels: Tensor, segments: Tensor) -> list[list[list[bool]]]:
    """Whether each token of each answer of packed rows is right; arguments as of `count_right`."""
    answers = labels[:, 1:] != IGNORED
    right = (guesses[:, :-1] == labels[:, 1:]).cpu()
    owners = torch.where(answers, segments[:, 1:], -1).cpu()
    return [
        [good[own == number].tolist() for number in range(1, int(own.max()) + 1)]
        for good, own in zip(right, owners, strict=True)
    ]


def swap_videos(rows: Sequence[Asked]) -> list[Asked]:
    """The rows with the video of the next row of the same shape, the last with that of the first."""
    shapes: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        shapes.setdefault(row.sample.grids, []).append(i)
    swapped = list(rows)
    for alike in shapes.values():
        for i, other in zip(alike, [*alike[1:], alike[0]], strict=True):
            pixels = rows[other].sample.pixel_values_videos
            sample = replace(rows[i].sample, pixel_values_videos=pixels)
            swapped[i] = replace(rows[i], sample=sample, frames=rows[other].frames)
    return swapped
