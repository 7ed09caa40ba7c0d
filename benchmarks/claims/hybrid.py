"""Table 6: few frames at high resolution, many at low, or some of each, for the same number of visual tokens."""

from claims.protocol import Budget, Claim, Variant

CLAIM = Claim(
    name="hybrid",
    title="Hybrid resolution at equal tokens",
    paper="Table 6 of the paper: some frames at high and more at low resolution answer better than either alone",
    variants=(
        Variant("hybrid", sampling="2+18"),
        Variant("high only", sampling="8+0"),
        Variant("low only", sampling="0+24"),
    ),
    pairs=(("hybrid", "high only"), ("hybrid", "low only")),
    columns=("detail", "order", "both"),
    budget=Budget(steps=400, world="hybrid"),
    notes=(
        "Clips have 60 frames of 64 px; low resolution is 32 px, and every variant has 168 visual tokens, <FRAME> and "
        "<LINE> included. Detail is a digit in the finest texture: given its cells, a support vector machine reads it "
        "in 1.00 of the clips at high and in 0.17 at low resolution (chance 0.10). Order is the first or last color of "
        "3 or 4 events of three frames: one who sees the chosen frames, and guesses what they miss, names it in 0.57 "
        "of the cases with 8 frames and always with 20 or 24. So hybrid can at best equal high only in detail and low "
        "only in order; column both is one answer that holds a color and the digit. Digits stand still: two frames "
        "show them as well as eight. Ceilings: probe_detail and order_ceiling of benchmarks/claims/detail.py."
    ),
)
