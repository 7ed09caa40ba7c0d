"""LoRA and QLoRA: low-rank updates of the decoder, with a visual front end that trains in full.

The defaults are the field's for supervised fine-tuning of a video model: rank 64, alpha twice the rank, every linear
layer of the decoder's attention and MLP. Why, and what was measured with a small rank: `docs/lora.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from elva_hf.errors_elva import ConfigurationError
from elva_hf.peft_elva import LORA_TARGETS

if TYPE_CHECKING:
    from peft import PeftModel

FULL_PRECISION_MODULES = (r"(model\.)?patch_embed", "guidance", "lm_head")
"""What QLoRA never quantises: what trains in full, the task heads, and the head the loss goes through.

transformers matches these from the start of a module's full name, so a bare `patch_embed` would match nothing.
"""


@dataclass(frozen=True)
class LoraOptions:
    """Fields of a recipe's `lora` section; PEFT's names, and what PEFT has no name for.

    Args:
        r: Rank of the update.
        lora_alpha: The update is scaled by `lora_alpha / r`.
        lora_dropout: Dropout in front of the update.
        target_modules: What is updated, as `LoraConfig` takes it; None for `LORA_TARGETS`.
        modules_to_save: Modules that train in full and are saved in the adapter.
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead.
        use_dora: Train magnitude and direction apart (DoRA).
        new_words: Words the text model must learn to say: the embedding rows of their tokens train too.
        quantization: `"nf4"` holds the decoder's weights in 4 bits (QLoRA); None as they are.

    Raises:
        ConfigurationError: A rank or alpha below 1, a dropout outside [0, 1), or an unknown quantization.
    """

    r: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.05
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] = field(default_factory=lambda: ["patch_embed"])
    use_rslora: bool = False
    use_dora: bool = False
    new_words: list[str] = field(default_factory=list)
    quantization: str | None = None

    def __post_init__(self):
        for name in ("r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"lora.{name}={getattr(self, name)}: expected a number of at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigurationError(f"lora.lora_dropout={self.lora_dropout}: expected a share of at least 0, below 1.")
        if self.quantization not in (None, "nf4"):
            raise ConfigurationError(f"lora.quantization={self.quantization!r}: expected null or 'nf4'.")


def lora_config(**overrides: Any) -> Any:
    """A `peft.LoraConfig` for ELVA.

    Args:
        **overrides: Fields of `LoraConfig` that differ from the defaults of `LoraOptions`. `modules_to_save=None`
            freezes the visual front end; `trainable_token_indices=word_token_ids(...)` lets new words be learned.

    Example:
        >>> lora_config(r=16, lora_alpha=32).modules_to_save
        ['patch_embed']
    """
    from peft import LoraConfig

    options = LoraOptions()
    defaults = {
        "task_type": "CAUSAL_LM",
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": LORA_TARGETS,
        "modules_to_save": list(options.modules_to_save),
    }
    return LoraConfig(**{**defaults, **overrides})


def word_token_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Ids of the tokens that spell words, at the start of a text and after a space, each once, sorted."""
    texts = [spelling for word in words for spelling in (word, f" {word}")]
    return sorted({token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]})


def add_lora(model: PreTrainedModel, options: LoraOptions, tokenizer: Any = None) -> PeftModel:
    """Wrap a model in a `PeftModel`: the adapter trains, the rest is frozen.

    The task heads of `config.guidance`, where there are any, train in full beside `modules_to_save`.

    Args:
        model: An `ElvaForCausalLM`, loaded with `load_kwargs(options)`.
        options: What to adapt; a recipe's `lora` section.
        tokenizer: The model's; needed with `new_words`.

    Raises:
        ConfigurationError: `new_words` without a tokenizer, or a quantised model where none is asked for or none where
            one is.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    if options.new_words and tokenizer is None:
        raise ConfigurationError(f"lora.new_words={options.new_words} need the model's tokenizer to become token ids.")
    if bool(options.quantization) != bool(getattr(model, "is_loaded_in_4bit", False)):
        raise ConfigurationError(
            f"lora.quantization={options.quantization!r}, but the model's weights are "
            f"{'not ' if options.quantization else ''}in 4 bits; load it with **load_kwargs(lora)."
        )
    config = _config_for(model, options, tokenizer)
    _check_trainable(model, config.modules_to_save or [])
    if options.quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer's business
    return get_peft_model(model, config)


def _check_trainable(model: PreTrainedModel, modules_to_save: Sequence[str]) -> None:
    """Say what PEFT does not: that a name is no module, or that a module is quantised."""
    for name in modules_to_save:
        found = [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]
        if not found:
            raise ConfigurationError(f"lora.modules_to_save={name!r} is no module of {type(model).__name__}.")
        if any(not parameter.is_floating_point() for module in found for parameter in module.parameters()):
            raise ConfigurationError(
                f"lora.modules_to_save={name!r} is quantised and cannot train; load the model with "
                "quantization_config=elva_hf.training.lora.quantization_config(), which leaves it as it is."
            )


def _config_for(model: PreTrainedModel, options: LoraOptions, tokenizer: Any) -> Any:
    saved = list(options.modules_to_save)
    if getattr(model, "guidance", None) is not None and "guidance" not in saved:
        saved.append("guidance")
    return lora_config(
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules or LORA_TARGETS,
        modules_to_save=saved or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        trainable_token_indices=_rows_of(model, word_token_ids(tokenizer, options.new_words or [])),
    )


def _rows_of(model: PreTrainedModel, ids: list[int]) -> dict[str, list[int]] | None:
    """Rows of the embedding, and of a head that is not tied to it: PEFT looks after one that is."""
    tied = model.config.tie_word_embeddings
    return {name: ids for name in (["embed_tokens"] if tied else ["embed_tokens", "lm_head"])} if ids else None


def quantization_config(**overrides: Any) -> BitsAndBytesConfig:
    """The `BitsAndBytesConfig` of QLoRA: nf4, double quantisation, bfloat16 arithmetic.

    Args:
        **overrides: Fields that differ.
    """
    defaults = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": list(FULL_PRECISION_MODULES),
    }
    return BitsAndBytesConfig(**{**defaults, **overrides})


def load_kwargs(options: LoraOptions) -> dict[str, Any]:
    """What `from_pretrained` needs for these options, beside the path.

    Raises:
        ConfigurationError: 4-bit weights are asked for and bitsandbytes is not installed.
    """
    if not options.quantization:
        return {}
    if not is_bitsandbytes_available():
        raise ConfigurationError(
            f"lora.quantization={options.quantization!r} needs bitsandbytes; run: pip install bitsandbytes"
        )
    return {"quantization_config": quantization_config()}
