"""What the papers say about each claim: quoted words, quoted figures, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass

ELVA = "ELVA paper"
MAVORS = "Mavors paper"


@dataclass(frozen=True)
class Quote:
    """One claim of a paper.

    Args:
        claim: Name of the trial in `claims/`.
        title: Of its section.
        letter: The one that the claim goes by.
        source: Table, figure or section.
        words: Quoted sentences.
        header: Of the quoted figures; empty where the text gives none.
        rows: The quoted figures.
        remark: What we add to the quotation, in sentences.
    """

    claim: str
    title: str
    letter: str
    source: str
    words: tuple[str, ...]
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    remark: str = ""


PATCH_EMBEDDING = Quote(
    "patch_embedding",
    "Video against naive patch embedding",
    "a",
    f"{ELVA}, Table 3",
    (
        "the block improves performance for both short and long video tasks, with a particularly significant "
        "enhancement in long video tasks, yielding an average improvement of 2.53%",
    ),
    ("Arch", "Cross-attn", "Params.", "MSVD", "VideoMME"),
    (("Naive PEL", "no", "6M", "48.7", "39.6"), ("Video PEL", "yes", "9M", "49.9", "42.2")),
    "The two differ by 1.2 and 2.6 in the table (derived), and by half in parameters.",
)
GUIDANCE = Quote(
    "guidance",
    "Guidance by a teacher",
    "b1",
    f"{ELVA}, Table 2 (h to k)",
    (
        "the join of MSE loss",
        "enhances general visual capabilities, while contrastive loss contributes to improved more video understanding",
        "yields the best overall performance, demonstrating the value of integrating multiple complementary objectives",
    ),
    ("Pre-Training Objective", "GQA", "SEED-I", "MSVD", "VideoMME"),
    (
        ("(h) L_Gen", "42.2", "40.0", "45.8", "37.9"),
        ("(i) L_Gen + L_MSE", "43.6", "42.6", "47.1", "38.1"),
        ("(j) L_Gen + L_Con", "42.4", "41.0", "47.4", "38.5"),
        ("(k) L_Gen + L_MSE + L_Con", "44.4", "44.8", "48.0", "38.5"),
    ),
)
TEACHER_KIND = Quote(
    "teacher_kind",
    "A teacher of video against a teacher of images",
    "b2",
    f"{ELVA}, Table 4",
    (
        "the visual features derived from pretrained video encoders improve performance by an average of approximately "
        "one point per task",
    ),
    ("Encoder", "Video Pretrained", "MSVD-QA", "VideoMME"),
    (
        ("EVACLIP-g", "no", "46.1", "36.8"),
        ("EVACLIP-g", "yes", "47.1", "38.4"),
        ("Siglip-so-400M", "no", "47.4", "41.0"),
        ("Siglip-so-400M", "yes", "49.9", "42.2"),
    ),
    "The mean of the four differences in the table is 1.6 points (derived).",
)
MERGING = Quote(
    "merging",
    "Merging against pooling and dropping",
    "c",
    f"{ELVA}, Figure 3",
    (
        "as the token compression ratio increases, the pooling method results in a substantial decrease in long-video "
        "performance, whereas ST-Merge maintains performance and only exhibits a slight degradation beyond a certain "
        "compression threshold",
    ),
    remark="The text gives no figures for it. Dropping frames is our addition.",
)
HYBRID = Quote(
    "hybrid",
    "Hybrid resolution",
    "d",
    f"{ELVA}, Table 6",
    (
        "increasing the number of low-resolution frames while keeping the number of high-resolution frames fixed "
        "significantly enhances the model's capability to process long videos, resulting in a 5.9% performance "
        "improvement on the VideoMME and 3.2% MLVU benchmarks",
        "with an equivalent frame number, hybrid resolution outperforms high-res with a half token length",
    ),
    ("High-Res", "Low-Res", "#Input Tokens", "VideoMME", "MLVU"),
    (
        ("8", "16", "5976", "42.9", "44.1"),
        ("8", "32", "7144", "43.0", "45.2"),
        ("16", "0", "9616", "37.1", "42.2"),
        ("16", "8", "10200", "42.6", "43.5"),
        ("16", "16", "10784", "43.0", "45.4"),
        ("32", "0", "19232", "42.7", "43.8"),
    ),
    "5.9 and 3.2 are 16 + 16 frames over 16 + 0; 16 + 16 over 32 + 0 is +0.3 and +1.6 at .56 of the tokens (derived).",
)
STAGES = Quote(
    "stages",
    "Images first, then video",
    "e",
    f"{ELVA}, Figure 4",
    (
        "MSVD performance improves more rapidly during Stage 1, while VideoMME exhibits significant gains only in "
        "Stage 2",
    ),
    remark="The text gives no figures for it, and no run that trains on both from the start.",
)
HURTING = Quote(
    "hurting",
    "Where merging hurts",
    "f1",
    f"{ELVA}, section 4.2",
    ("ST-Merge maintains performance and only exhibits a slight degradation beyond a certain compression threshold",),
    remark="The paper does not say on which videos merging costs.",
)
CAPTIONING = Quote(
    "captioning",
    "Whether captions suffer from merging",
    "f2",
    f"{MAVORS}, appendix F",
    (
        "as token compression increases up to 60%, there is negligible impact on Video QA performance, while "
        "performance on Captioning tasks degrades progressively",
    ),
    remark="ELVA says nothing of captions under merging.",
)
CLAIMS = (PATCH_EMBEDDING, GUIDANCE, TEACHER_KIND, MERGING, HYBRID, STAGES, HURTING, CAPTIONING)

NEEDLE = Quote(
    "needle-grid",
    "A needle in a long video",
    "needle",
    f"{MAVORS}, appendix D",
    (
        "perfect accuracy is achieved within the model's training window length (32 chunks)",
        "Mavors maintains strong accuracy even as the number of chunks increases beyond this window",
    ),
)
