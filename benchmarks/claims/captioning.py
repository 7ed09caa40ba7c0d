"""Where merging costs in a caption: colour, pattern, shape, place and motion of each clause, by schedule."""

from claims.captions import COLUMN, FIELDS
from claims.hurting import SCHEDULES
from claims.protocol import Budget, Claim, Phase, Reduction, Variant

BASE = "unmerged"

CLAIM = Claim(
    name="captioning",
    title="Where merging costs in a caption",
    paper="The paper does not say where merging costs; section 3.1 gives the thresholds, Table 5 the ratios",
    variants=(
        Variant(
            BASE,
            guidance={"tube_weight": 1.0, "frame_weight": 0.0},
            teacher="looks+place",
            phases=(Phase(0.35, (1,)), Phase(0.65, (8,))),
        ),
        *(
            Variant(name, base=BASE, tuned=False, reduction=Reduction("merge", schedule=schedule))
            for name, schedule in SCHEDULES.items()
        ),
    ),
    pairs=tuple(("none", name) for name in SCHEDULES if name != "none"),
    columns=(COLUMN, *(f"{COLUMN}/{field}" for field in FIELDS)),
    budget=Budget(steps=500, single_share=0.7, world="captions"),
    notes=(
        "Weights that never merged caption with merging switched on: colour, pattern, shape, place and motion of each "
        "object in order of appearance. A field is right where all its words are, given the words before it, so "
        "that a wrong field spoils no other; column caption is the whole. Confirmed means that a schedule loses."
        " The paper has AdamW."
    ),
)
