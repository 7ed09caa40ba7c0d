"""Where merging costs in a caption: colour, pattern, shape, place and motion of each clause, by schedule."""

from claims.captions import COLUMN, FIELDS
from claims.hurting import SCHEDULES
from claims.merging import BASE, UNMERGED
from claims.protocol import Budget, Claim, Reduction, Variant

CLAIM = Claim(
    name="captioning",
    title="Where merging costs in a caption",
    paper="The paper does not say where merging costs; section 3.1 gives the thresholds, Table 5 the ratios",
    variants=(
        UNMERGED,
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
