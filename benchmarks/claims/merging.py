"""Figure 3: merging inside the decoder against pooling and dropping before it, as trained and after tuning."""

from claims.protocol import Budget, Claim, Phase, Reduction, Variant

RATIOS = {"3/4": 3 / 4, "1/2": 1 / 2, "3/8": 3 / 8}
"""Shares of the patches, mean over 4 layers; the first layer alone has 1/4 of what there is without merging."""

TUNED = "1/2"
"""The one share that is tuned too."""

KINDS = ("merge", "pool", "drop")
BASE = "unmerged"
UNMERGED = Variant(
    BASE,
    guidance={"tube_weight": 1.0, "frame_weight": 0.0},
    teacher="looks+place",
    phases=(Phase(0.35, (1,)), Phase(0.65, (8,))),
)
"""Weights that never saw a reduction, with which the others begin."""

CLAIM = Claim(
    name="merging",
    title="Merging against pooling and dropping",
    paper="Figure 3 of the paper: at equal tokens, merging keeps more than pooling, without training and after it",
    variants=(
        UNMERGED,
        Variant("unmerged, tuned", base=BASE),
        *(
            Variant(f"{kind} {name}", base=BASE, tuned=name == TUNED, reduction=Reduction(kind, ratio))
            for name, ratio in RATIOS.items()
            for kind in KINDS
        ),
    ),
    pairs=tuple((f"merge {name}", f"{kind} {name}") for name in RATIOS for kind in KINDS[1:]),
    columns=("color", "pattern", "digit", "where/1", "motion/1", "when"),
    budget=Budget(steps=500, single_share=0.5, tuning_steps=100, evaluate_every=50, world="mixed"),
    notes=(
        "Every other variant begins with the weights of `unmerged`, which saw images, then clips and never a "
        "reduction; figures before tuning are those of these weights with the reduction switched on; 1/2 alone is "
        "tuned. The paper has AdamW. Shares are of patches, mean over the 4 layers, layer 0 included, which merging "
        "cannot touch: merging to 1/2 leaves a third from layer 1 on. The paper's 1/4 and 1/8 cannot be had of 4 "
        "layers in this count. Merging and pooling keep `<FRAME>` and `<LINE>` of every frame, dropping does not. A "
        "third of the training scenes are the hard ones of the claim on what merging costs, which begins with the "
        "same weights."
    ),
)
