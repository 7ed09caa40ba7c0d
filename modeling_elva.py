"""Hub entry point: the installed package, by the name that a checkpoint's `auto_map` asks for."""

from elva_hf import (
    ElvaForCausalLM,
    ElvaModel,
    ElvaPreTrainedModel,
    MavorsForCausalLM,
    MavorsModel,
    VideoPandaForCausalLM,
    VideoPandaModel,
)

__all__ = [
    "ElvaForCausalLM",
    "ElvaModel",
    "ElvaPreTrainedModel",
    "MavorsForCausalLM",
    "MavorsModel",
    "VideoPandaForCausalLM",
    "VideoPandaModel",
]
