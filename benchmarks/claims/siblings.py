"""ELVA, Video-Panda and Mavors in front of one decoder: no paper compares them, so there is no verdict."""

from claims.guidance import PHASES, TEACHER
from claims.protocol import Budget, Claim, Variant

DECODER = {"num_hidden_layers": 6}
"""What the decoder of the shipped checkpoint's recipe has otherwise than the tiny preset."""

POSITIONS = {"patch_embed_positions": 8, "patch_embed_positions_std": 2.0}
"""What the patch embedding of that recipe has; both siblings tell places apart by themselves."""

INITIALIZER_RANGE = 0.1
"""1 / sqrt(width) of what stands before the decoder, and what the tiny presets of both siblings have. With the usual
0.02 Video-Panda, with six maps in series, knows no colour after 400 steps (docs/LOG.md)."""

GUIDANCE = {"tube_weight": 1.0, "frame_weight": 0.0}

CLAIM = Claim(
    name="siblings",
    title="Three ways to see a video",
    paper="No paper compares ELVA, Video-Panda and Mavors at an equal decoder: no claim, no verdict",
    variants=tuple(
        Variant(
            name,
            {**fields, "text_config": DECODER, "initializer_range": INITIALIZER_RANGE},
            guidance=GUIDANCE,
            teacher=TEACHER,
            phases=PHASES,
        )
        for name, fields in {
            "elva": {"preset": "tiny", **POSITIONS},
            "video-panda": {"preset": "video-panda-tiny"},
            "mavors": {"preset": "mavors-tiny"},
        }.items()
    ),
    pairs=(("elva", "video-panda"), ("elva", "mavors"), ("video-panda", "mavors")),
    columns=("color", "shape", "pattern", "digit", "count", "where/1", "motion/1", "moving", "needle", "when", "order"),
    budget=Budget(steps=400, single_share=0.5),
    notes=(
        "All three have the decoder of the shipped checkpoint's recipe and L_MSE from one hand-made teacher, which "
        "knows looks and place; Mavors' paper has no teacher and Video-Panda's compares patch by patch. Nothing starts "
        "from trained weights, so Mavors has no image tower to inflate. Muon steps the matrices of Mavors' tower too. "
        "Images come before clips."
    ),
)
