"""Video-Panda's distillation: each patch comes close to the same patch of a teacher (its Eq. 19 and Table 5)."""

from __future__ import annotations

from torch import Tensor

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.losses import negative_cosine_loss


def distillation_loss(student: Tensor, teacher: Tensor, kind: str = "cosine") -> Tensor:
    """Video-Panda's distillation as its Table 5 varies it, mean over patches.

    Args:
        student: `(P, D)` features.
        teacher: `(P, D)` features to come close to.
        kind: `"cosine"` (Eq. 19) or `"mse"`, the squared error, mean over features too.

    Raises:
        ConfigurationError: The numbers of patches or features differ.
    """
    if student.shape != teacher.shape:
        raise ConfigurationError(
            f"student features are {tuple(student.shape)} and teacher features {tuple(teacher.shape)}; a patch of one "
            "must be a patch of the other."
        )
    if kind == "cosine":
        return negative_cosine_loss(student, teacher)
    return (student - teacher.to(student)).square().sum() / max(student.numel(), 1)
