"""Where merging costs: fast motion, small objects, drifting light, by schedule; the weights are those of Figure 3."""

from dataclasses import replace

from claims import merging
from claims.hard_scenes import CONDITIONS, HARD_TASKS
from claims.protocol import Claim, Reduction, Variant

SCHEDULES = {
    "none": "none",
    "paper": "paper",
    "table5": "table5",
    "late": {"steps": [{"layer": 3, "target_ratio": 0.5}]},
}

CLAIM = Claim(
    name="hurting",
    title="Where merging costs",
    paper="The paper does not say where merging costs; section 3.1 gives the thresholds, Table 5 the ratios",
    variants=tuple(
        Variant(name, base=merging.BASE, tuned=False, reduction=Reduction("merge", schedule=schedule))
        for name, schedule in SCHEDULES.items()
    ),
    pairs=tuple(("none", name) for name in SCHEDULES if name != "none"),
    columns=tuple(f"{task}, {condition}" for task in HARD_TASKS for condition in CONDITIONS),
    budget=replace(merging.CLAIM.budget, world="hard", validation_scenes=50, test_scenes=250, tuning_steps=0),
    bases=merging.CLAIM,
    notes=(
        "Nothing is trained: weights that never merged answer with merging switched on. Easy is two frames a cell, "
        "fast one frame a cell, small 5 px instead of 13, drift changing light and a camera that trembles by 1 px; one "
        "object, the same scenes and questions under each condition. A difference is what the schedule loses: "
        "confirmed means that it loses something. A third of the training scenes were of these four kinds."
        " The paper has AdamW."
    ),
)
