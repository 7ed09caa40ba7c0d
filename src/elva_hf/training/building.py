"""What a stage trains: model, processor, and which parameters, from the fields of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from elva_hf.architectures_elva import ARCHITECTURES, Architecture, find_architecture
from elva_hf.configuration_elva import VideoDecoderConfig
from elva_hf.errors_elva import CheckpointError, ConfigurationError, ElvaError
from elva_hf.guidance_elva import check_frame_features
from elva_hf.modeling_elva import ElvaForCausalLM, add_special_tokens
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.training.lora import add_lora, load_kwargs
from elva_hf.training.sections import GuidanceSection, ModelSection, Stage

PART_MODULES = {  # what stands before what holds it
    "image_tower": "model.patch_embed.encoder.",
    "aggregator": "model.patch_embed.aggregator.",
    "projector": "model.patch_embed.projector.",
    "patch_embed": "model.patch_embed.",
    "language_model": "model.language_model.",
    "lm_head": "lm_head.",
    "guidance": "guidance.",
}


def architecture_of(model: ModelSection) -> Architecture:
    """That of the checkpoint to start from, if it is at hand, or else the one named.

    Raises:
        CheckpointError: The checkpoint is of no system of ours.
        ConfigurationError: There is no such architecture.
    """
    if model.path is None or not Path(model.path).is_dir():
        return find_architecture(model.architecture)
    config = _load(AutoConfig.from_pretrained, model.path)
    if config.model_type.replace("_", "-") not in ARCHITECTURES:
        raise CheckpointError(f"{model.path} is a {config.model_type!r} model, not one of {', '.join(ARCHITECTURES)}.")
    return find_architecture(config.model_type)


def read_config(model: ModelSection) -> VideoDecoderConfig | None:
    """Configuration of a model before its weights are loaded; None if it is not at hand and no shape is named.

    Raises:
        CheckpointError: `path` is a folder without a checkpoint of ours.
        ConfigurationError: There is no such preset, or a field that no model can have.
    """
    system = architecture_of(model)
    if model.path is not None and Path(model.path).is_dir():
        return with_schedule(_load(AutoConfig.from_pretrained, model.path), model)
    if model.text_model is not None and Path(model.text_model).is_dir():
        config = system.config(text_config=_load(AutoConfig.from_pretrained, model.text_model), **model.config)
        return with_schedule(config, model)
    preset = model.preset or model.shape
    return None if preset is None else with_schedule(system.config.from_preset(preset, **model.config), model)


def with_schedule(config: VideoDecoderConfig, model: ModelSection) -> VideoDecoderConfig:
    """The configuration with the section's merge schedule, if it has one.

    Raises:
        ConfigurationError: A schedule that this decoder cannot have.
    """
    if model.merge_schedule is not None:
        config.resolve_merge_schedule(model.merge_schedule)
        config.merge_schedule = model.merge_schedule
    return config


def check_folder(name: str | None) -> None:
    """Refuse a folder that is not there, before anything else is read.

    Args:
        name: A folder, or `OWNER/NAME` of the Hub.

    Raises:
        CheckpointError: It is no folder, and nothing that the Hub could have.
    """
    if name is None or Path(name).is_dir():
        return
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"there is no folder {name}; check model.path, or run the stage before it first.")


def build_processor(stage: Stage) -> ElvaProcessor:
    """The processor of a stage's model, with the stage's longest edges.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    model, system = stage.model, architecture_of(stage.model)
    if model.path is not None:
        processor = _load(system.processor.from_pretrained, model.path)
    elif model.preset is not None and model.tokenizer is None:
        from elva_hf.data.toy_tokenizer import build_toy_tokenizer

        config = system.config.from_preset(model.preset, **model.config)
        processor = system.processor.from_tokenizer(build_toy_tokenizer(), **config.video_options)
    else:
        name = model.text_model or model.tokenizer
        shape = (model.preset,) if model.preset else ()
        config = (system.config.from_preset if shape else system.config)(*shape, **model.config)
        processor = system.processor.from_tokenizer(_load(AutoTokenizer.from_pretrained, name), **config.video_options)
    for name in ("longest_edge", "low_res_longest_edge"):
        edge = getattr(stage.video, name)
        if edge is not None:
            setattr(processor.video_processor, name, edge)
    processor.video_processor.resolve_options(**stage.video.options)
    return processor


def build_model(stage: Stage, processor: ElvaProcessor, teacher_width: int | None) -> nn.Module:
    """The model of a stage, with the heads that its losses need and with what does not train frozen.

    Args:
        stage: What to build.
        processor: From `build_processor`.
        teacher_width: Of the teacher's features; None without guidance.

    Raises:
        CheckpointError: Weights that cannot be loaded.
        ConfigurationError: A combination of fields that no model can have.
    """
    section = stage.model
    options = load_kwargs(stage.lora) if stage.lora is not None else {}
    if section.path is not None:
        dtype = getattr(torch, section.dtype)
        system = architecture_of(section)
        model = _load(system.causal_lm.from_pretrained, section.path, dtype=dtype, use_safetensors=True, **options)
    elif section.text_model is not None:
        model = _from_text_model(section, processor)
    else:
        model = _from_preset(section, processor)
    if section.attn_implementation is not None:
        model.set_attn_implementation(section.attn_implementation)
    if section.merge_schedule is not None:
        model.set_merge_schedule(section.merge_schedule)
    for name in ("longest_edge", "low_res_longest_edge"):
        setattr(model.config, name, getattr(processor.video_processor, name))
    if stage.guidance is not None:
        check_frame_features(model.config.frame_layout)
    model.set_guidance(guidance_fields(stage.guidance, teacher_width))
    if stage.lora is not None:
        return add_lora(model, stage.lora, processor.tokenizer)
    freeze(model, stage.trainable)
    return model


def guidance_fields(guidance: GuidanceSection | None, teacher_width: int | None) -> dict[str, Any] | None:
    """`config.guidance` of a recipe's section."""
    if guidance is None:
        return None
    return {
        "teacher_width": teacher_width,
        "tube_weight": guidance.tube_weight,
        "frame_weight": guidance.frame_weight,
        "mask_same_video": guidance.mask_same_video,
        "patch_weight": guidance.patch_weight,
        "patch_loss": guidance.patch_loss,
    }


def freeze(model: nn.Module, trainable: str | list[str]) -> None:
    """Let only the named parts train; a weight that two parts share trains if one of them does.

    Raises:
        ConfigurationError: Nothing is left to train.
    """
    if trainable == "all":
        return
    prefixes = tuple(PART_MODULES[name] for name in trainable)
    trained = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name.startswith(prefixes)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    if not trained:
        raise ConfigurationError(f"trainable={trainable}: this model has no parameter of these parts.")


def _from_text_model(section: ModelSection, processor: ElvaProcessor) -> ElvaForCausalLM:
    fields = {**_ids(processor), **section.config}
    system = architecture_of(section).causal_lm
    if section.image_tower is None:
        model = _load(system.from_text_model, section.text_model, tokenizer=processor.tokenizer, **fields)
    elif not hasattr(system, "from_towers"):
        name = section.architecture
        raise ConfigurationError(f"model.image_tower={section.image_tower}: {name} has no image tower; leave it out.")
    else:
        towers = {"image_tower": section.image_tower, "tokenizer": processor.tokenizer}
        model = _load(system.from_towers, section.text_model, **towers, **fields)
    return _with_vocabulary(model.to(getattr(torch, section.dtype)), processor)


def _from_preset(section: ModelSection, processor: ElvaProcessor) -> ElvaForCausalLM:
    system = architecture_of(section)
    config = system.config.from_preset(section.preset, **{**_ids(processor), **section.config})
    if section.tokenizer is None:
        config.text_config.vocab_size = len(processor.tokenizer)
    model = system.causal_lm(config).to(getattr(torch, section.dtype))
    return _with_vocabulary(model, processor)


def _ids(processor: ElvaProcessor) -> dict[str, int]:
    return add_special_tokens(processor.tokenizer)  # has them all: adds none


def _with_vocabulary(model: ElvaForCausalLM, processor: ElvaProcessor) -> ElvaForCausalLM:
    """Rows for the tokenizer's new tokens; answers end where the model's did and at the end of a turn."""
    tokenizer, generation = processor.tokenizer, model.generation_config
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    known = generation.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    stops = [*known, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    generation.eos_token_id = list(dict.fromkeys(stop for stop in stops if stop is not None))
    generation.pad_token_id = tokenizer.pad_token_id
    return model


def _load(loader: Any, name: str, **options: Any) -> Any:
    """Call a `from_pretrained`; the many ways in which a folder is no checkpoint become one error of one line."""
    try:
        return loader(name, **options)
    except ElvaError:
        raise
    except (OSError, ImportError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot load {name}: {' '.join(str(error).split())}") from error
