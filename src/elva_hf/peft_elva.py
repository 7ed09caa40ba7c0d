"""Where LoRA acts by default: what PEFT is told of our model types, once PEFT is there."""

import sys

LORA_TARGETS = r"(.*\.)?language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
"""Regular expression of PEFT's `target_modules`: every linear layer of the decoder's attention and MLP.

ELVA's patch embedding has a `q_proj` of its own, which a bare name would hit; `lm_head` may be tied to the embedding.
"""


def register_lora_targets(model_type: str = "elva") -> None:
    """Give PEFT its default targets for a model type, if PEFT has been imported; an entry that is there stays."""
    constants = sys.modules.get("peft.utils.constants")
    targets = getattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", None)
    if targets is not None:
        targets.setdefault(model_type, LORA_TARGETS)
