"""Table 3: `<FRAME>` and `<LINE>` that look at their patches, against two constants, and against a wider naive one."""

from claims.protocol import Budget, Claim, Variant

NAIVE_DIM = 183
"""Width at which the naive embedding has the parameters of the video one, within 0.01 %."""

CLAIM = Claim(
    name="patch_embedding",
    title="Video against naive patch embedding",
    paper="Table 3 of the paper: the video patch embedding answers better than the naive one",
    variants=(
        Variant("video"),
        Variant("naive", {"patch_embed_type": "naive"}),
        Variant(
            "naive, wider",
            {"patch_embed_type": "naive", "patch_embed_dim": NAIVE_DIM, "patch_embed_num_heads": 1},
        ),
    ),
    pairs=(("video", "naive"), ("video", "naive, wider")),
    columns=("color", "shape", "pattern", "where", "count", "digit", "motion", "needle", "when", "order"),
    budget=Budget(steps=800),
    notes="No variant has a teacher.",
)
