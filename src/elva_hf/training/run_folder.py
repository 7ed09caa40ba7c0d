"""What a run leaves in its folder beside checkpoints: the fields it ran with, which a later resume must have too."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.recipe import differences
from elva_hf.training.sections import Stage

if TYPE_CHECKING:
    from elva_hf.training.video_teacher import VideoTeacherRecipe

logger = logging.getLogger(__name__)

RECORD = "recipe.json"
"""Fields of a stage as it runs, and by how many processes."""

BAD_SAMPLES = "bad_samples.jsonl"
"""Clips that could not be read."""

MODEL = "model"
"""Folder of the finished model and its processor."""

FREE_TO_CHANGE = (
    "resume",
    "data.num_workers",
    "training.save_steps",
    "training.save_total_limit",
    "training.logging_steps",
    "training.report_to",
    "training.ddp_timeout",
)
"""What may differ when a run goes on from a checkpoint; anything else would make it another run."""


def write_record(stage: Stage | VideoTeacherRecipe, folder: Path, num_processes: int) -> None:
    """Write down what runs in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(_record(stage, num_processes), indent=2) + "\n")


def check_same_run(stage: Stage | VideoTeacherRecipe, folder: Path, num_processes: int) -> None:
    """Refuse to go on with a run of other fields.

    A stream's workers have rows of their own each, so their number is one of its fields. Another number of processes
    changes the order of rows that are grouped by length, and is warned of.

    Raises:
        ConfigurationError: Naming the fields.
    """
    record = folder / RECORD
    if not record.is_file():
        return
    before, now = json.loads(record.read_text()), json.loads(json.dumps(_record(stage, num_processes)))
    changed = differences(before, now)
    began_with = before.get("num_processes")
    harmless = {*FREE_TO_CHANGE, "num_processes"}
    if not (folder / MODEL).is_dir() and began_with is not None:
        if stage.data.streaming:
            harmless -= {"data.num_workers", "num_processes"}
        elif began_with != num_processes and stage.data.group_by_length:
            logger.warning(
                "%s was begun by %s processes and goes on with %s: of this epoch some samples may come twice, some not",
                folder,
                began_with,
                num_processes,
            )
    wrong = [path for path in changed if path not in harmless]
    if wrong:
        raise ConfigurationError(
            f"{folder} holds a run of other fields ({', '.join(wrong)}); give another output_dir, or resume=never to "
            "start over."
        )


def start_over(stage: Stage, folder: Path, *, remove: bool) -> None:
    """Remove what another run left in a folder, or a later resume would take it for this one's.

    Args:
        stage: Whose weights must not come from there.
        folder: Of the run.
        remove: Whether this process does it; all of them check.

    Raises:
        ConfigurationError: `model.path` would be removed.
    """
    from elva_hf.training.checkpoints import PARTIAL
    from elva_hf.training.nonfinite import RECORD_NAME as SKIPPED_STEPS

    left = [folder / name for name in (MODEL, PARTIAL, RECORD, BAD_SAMPLES, SKIPPED_STEPS)]
    left += folder.glob("checkpoint-*")
    source = None if stage.model.path is None else Path(stage.model.path).resolve()
    if source is not None and any(source.is_relative_to(path.resolve()) for path in left):
        raise ConfigurationError(
            f"model.path={stage.model.path} lies in {folder}, which resume=never clears; give another output_dir."
        )
    for path in left if remove else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _record(stage: Stage | VideoTeacherRecipe, num_processes: int) -> dict[str, Any]:
    return {**asdict(stage), "num_processes": num_processes}
