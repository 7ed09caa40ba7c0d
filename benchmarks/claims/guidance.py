"""Table 2, h to k: L_Gen alone, with L_MSE, with L_Con, and with both."""

from claims.protocol import Budget, Claim, Variant

CLAIM = Claim(
    name="guidance",
    title="Guidance by a teacher",
    paper="Table 2 (h to k) of the paper: L_MSE and L_Con each help L_Gen, and both together help most",
    variants=(
        Variant("gen"),
        Variant("+mse", guidance={"tube_weight": 1.0, "frame_weight": 0.0}),
        Variant("+con", guidance={"tube_weight": 0.0, "frame_weight": 1.0}),
        Variant("+both", guidance={"tube_weight": 1.0, "frame_weight": 1.0}),
    ),
    pairs=(("+mse", "gen"), ("+con", "gen"), ("+both", "gen"), ("+both", "+mse"), ("+both", "+con")),
    columns=("shape", "pattern", "digit", "motion"),
    budget=Budget(steps=700),
    notes=(
        "The teacher is hand-made: 29 numbers a patch that hold what questions about looks need. It favours guidance "
        "by construction, and knows nothing of place or motion."
    ),
)
