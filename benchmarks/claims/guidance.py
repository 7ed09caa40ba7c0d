"""Table 2, h to k: L_Gen alone, with L_MSE, with L_Con, and with both."""

from claims.protocol import Budget, Claim, Phase, Variant

TEACHER = "looks+place"
PHASES = (Phase(0.35, (1,)), Phase(0.65, (8,)))

CLAIM = Claim(
    name="guidance",
    title="Guidance by a teacher",
    paper="Table 2 (h to k) of the paper: L_MSE and L_Con each help L_Gen, and both together help most",
    variants=tuple(
        Variant(name, guidance=weights, teacher=TEACHER, phases=PHASES)
        for name, weights in {
            "gen": None,
            "+mse": {"tube_weight": 1.0, "frame_weight": 0.0},
            "+con": {"tube_weight": 0.0, "frame_weight": 1.0},
            "+both": {"tube_weight": 1.0, "frame_weight": 1.0},
        }.items()
    ),
    pairs=(("+mse", "gen"), ("+con", "gen"), ("+both", "gen"), ("+both", "+mse"), ("+both", "+con")),
    columns=("color", "pattern", "digit", "where/1", "motion/1", "when"),
    budget=Budget(steps=450, single_share=0.5, evaluate_every=50),
    notes=(
        "The teacher is hand-made: numbers of a patch that hold what questions about looks need, and its row and "
        "column. It favours guidance by construction, and knows nothing of motion. Images come before clips, as in the "
        "paper; the paper has AdamW."
    ),
)
