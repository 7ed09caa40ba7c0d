"""Table 3: `<FRAME>` and `<LINE>` that look at their patches, against two constants."""

from claims.guidance import PHASES, TEACHER
from claims.protocol import Budget, Claim, Variant

NAIVE = {"patch_embed_type": "naive"}
WIDER = {"patch_embed_dim": 183, "patch_embed_num_heads": 1}
"""Fields with which the naive embedding has the parameters of the video one, within 0.01 %; no variant has them yet."""

GUIDANCE = {"tube_weight": 1.0, "frame_weight": 0.0}

CLAIM = Claim(
    name="patch_embedding",
    title="Video against naive patch embedding",
    paper="Table 3 of the paper: the video patch embedding answers better than the naive one",
    variants=tuple(
        Variant(name, config, guidance=GUIDANCE, teacher=TEACHER, phases=PHASES)
        for name, config in {"video": {}, "naive": NAIVE}.items()
    ),
    pairs=(("video", "naive"),),
    columns=("color", "pattern", "count", "digit", "where/1", "motion/1", "when"),
    budget=Budget(steps=450, single_share=0.5, evaluate_every=50),
    notes=(
        "Both are guided by L_MSE from the same hand-made teacher, which knows looks and place. The naive embedding "
        "has fewer parameters, see the table. Images come before clips; the paper has AdamW."
    ),
)
