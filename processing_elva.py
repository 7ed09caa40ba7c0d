"""Hub entry point: the installed package, by the name that a checkpoint's `auto_map` asks for."""

from elva_hf import (
    ElvaProcessor,
    ElvaVideoProcessor,
    MavorsProcessor,
    MavorsVideoProcessor,
    VideoPandaProcessor,
    VideoPandaVideoProcessor,
)

__all__ = [
    "ElvaProcessor",
    "ElvaVideoProcessor",
    "MavorsProcessor",
    "MavorsVideoProcessor",
    "VideoPandaProcessor",
    "VideoPandaVideoProcessor",
]
