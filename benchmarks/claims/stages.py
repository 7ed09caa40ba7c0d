"""Figure 4: images before clips, against both from the start and against clips alone."""

from claims.protocol import Budget, Claim, Phase, Variant

GUIDANCE = {"tube_weight": 1.0, "frame_weight": 0.0}
TOKENS_OF_IMAGE_STEP = 0.385
"""Tokens of a step of images over those of a step of clips: 1733 and 4498 (40 steps of each)."""

SPATIAL, TEMPORAL = ("color", "shape", "pattern", "digit", "where/1"), ("motion/1", "when")

CLAIM = Claim(
    name="stages",
    title="Spatial before temporal",
    paper="Figure 4 of the paper: learning from images first makes learning from videos faster and better",
    variants=(
        Variant("spatial first", guidance=GUIDANCE, teacher="looks+place", phases=(Phase(0.5, (1,)), Phase(0.5, (8,)))),
        Variant("joint", guidance=GUIDANCE, teacher="looks+place", phases=(Phase(1.0, (1, 8)),)),
        Variant("video only", guidance=GUIDANCE, teacher="looks+place", share=(1 + TOKENS_OF_IMAGE_STEP) / 2),
    ),
    pairs=(("spatial first", "joint"), ("spatial first", "video only"), ("joint", "video only")),
    columns=(*SPATIAL, *TEMPORAL),
    budget=Budget(steps=500, single_share=0.5),
    notes=(
        "The first two see the same videos, half of the steps images and half clips, in another order: equal steps and "
        "equal tokens. `video only` sees as many tokens in fewer steps, all of clips. All are asked about clips of 8 "
        f"frames. Spatial columns: {', '.join(SPATIAL)}; temporal: {', '.join(TEMPORAL)}. The paper has AdamW."
    ),
)
