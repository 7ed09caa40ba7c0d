"""Faults of the procedural world's training: its teacher, its optimiser, its held-out looks and its stages."""

from .fault import Fault

TEACHER = "tests/data/test_toy_teacher.py"
ROWS = "tests/data/test_toy_rows.py"
MUON = "tests/training/test_muon.py"
LOSSES = "tests/training/test_losses.py"
STAGES = "tests/training/test_toy.py"
TABLE = "tests/evaluation/test_toy_world_table.py"

TOY = (
    Fault(
        "training shows the looks that are held out",
        "data/toy_world.py",
        'if split == "train" and (color',
        'if split == "demo" and (color',
        (ROWS, "-k", "every_other_look"),
    ),
    Fault(
        "rows and columns of a patch change places in the teacher",
        "data/toy_teacher.py",
        "np.concatenate([rows, columns], -1)",
        "np.concatenate([columns, rows], -1)",
        (TEACHER, "-k", "place_says"),
    ),
    Fault(
        "what has moved is counted backwards",
        "data/toy_teacher.py",
        "(row - y) / 2, (column - x) / 2",
        "(y - row) / 2, (column - x) / 2",
        (TEACHER, "-k", "time_tells"),
    ),
    Fault(
        "a flash counts as busy",
        "data/toy_teacher.py",
        " & ~flash[:, None, None]",
        " | flash[:, None, None]",
        (TEACHER, "-k", "busy_patches"),
    ),
    Fault(
        "embeddings go to Muon",
        "training/muon.py",
        'weight.ndim == 2 and ".layers." in name',
        "weight.ndim == 2",
        (MUON, "-k", "go_to_muon"),
    ),
    Fault(
        "a scheduler is not heard",
        "training/muon.py",
        "[group for part in self.parts for group in part.param_groups], {})",
        "[dict(group) for part in self.parts for group in part.param_groups], {})",
        (MUON, "-k", "scheduler"),
    ),
    Fault(
        "in float32 Muon forgets the shape of a matrix",
        "training/muon.py",
        "-rate * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))",
        "-rate",
        (MUON, "-k", "is_torchs"),
    ),
    Fault(
        "in float32 Muon looks no step ahead",
        "training/muon.py",
        'update = weight.grad.lerp(momentum, group["momentum"])',
        "update = momentum",
        (MUON, "-k", "is_torchs"),
    ),
    Fault(
        "a high matrix is made orthogonal as if it were wide",
        "training/muon.py",
        "wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T\n    wide = wide /",
        "wide = matrix\n    wide = wide /",
        (MUON, "-k", "of_torch"),
    ),
    Fault(
        "bfloat16 on a CPU that has none of it is not pointed out",
        "training/run.py",
        "if on_cpu and training.bf16 and not cpu_multiplies_bfloat16():",
        "if on_cpu and training.bf16 and cpu_multiplies_bfloat16():",
        ("tests/training/test_run.py", "-k", "pointed_out"),
    ),
    Fault(
        "elva doctor praises bfloat16 where there is none",
        "cli/machine.py",
        'yield "bfloat16", "usable" if cpu_multiplies_bfloat16() else slow',
        'yield "bfloat16", "usable"',
        ("tests/cli/test_cli.py", "-k", "doctor_says"),
    ),
    Fault(
        "patch alignment does not weigh",
        "training/losses.py",
        "return (errors * weights).sum() / weights.sum()",
        "return errors.mean() + 0 * weights.sum()",
        (LOSSES, "-k", "weighted_error"),
    ),
    Fault(
        "weights to start from lose their schedule",
        "training/toy.py",
        "        model.set_merge_schedule(saved.config.merge_schedule)\n",
        "",
        (STAGES, "-k", "bring_their_merge"),
    ),
    Fault(
        "questions of a row see each other while merging",
        "data/collator.py",
        '"segment_ids": segments}',
        '"segment_ids": segments.clamp(max=1)}',
        (STAGES, "-k", "many_questions_merge"),
    ),
    Fault(
        "nobody is told what merging costs",
        "evaluation/toy_world.py",
        "score.array < KEPT_BY_MERGING * score.unmerged",
        "score.array < KEPT_BY_MERGING * score.unmerged - 1",
        (TABLE, "-k", "97_hundredths"),
    ),
)
