"""`elva init` and `elva export`: make a checkpoint from a text model, and make one ready for the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elva_hf.cli import loading
from elva_hf.cli.application import busy
from elva_hf.errors_elva import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elva_hf.architectures_elva import Architecture
    from elva_hf.modeling_elva import ElvaForCausalLM
    from elva_hf.processing_elva import ElvaProcessor


def init(
    text_model: Annotated[
        str, typer.Argument(metavar="TEXT_MODEL", help="Folder or Hub id of a causal language model.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    architecture: Annotated[
        str, typer.Option(help="What to build round the text model: elva, mavors or video-panda.")
    ] = "elva",
    image_tower: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a SigLIP whose image tower a mavors model starts from; random without."),
    ] = None,
) -> None:
    """Build an untrained video model on a text model.

    Writes the model, its processor and the files the Hub needs to OUT. The text model's weights are kept; the visual
    front end and the new tokens are random, so the result must be trained before it can see.
    """
    from elva_hf.architectures_elva import find_architecture
    from elva_hf.hub import export_hub_files

    system = find_architecture(architecture)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already; name a new folder or empty this one.")
    if image_tower is not None and not hasattr(system.causal_lm, "from_towers"):
        raise ConfigurationError(f"--image-tower: {architecture} has no image tower; leave it out.")
    model, processor = build_from_text_model(text_model, system, image_tower)
    with busy(f"writing {out}"):
        model.save_pretrained(out)
        processor.save_pretrained(out)
        export_hub_files(out)
    parameters = sum(p.numel() for p in model.parameters())
    fresh = sum(p.numel() for p in model.model.patch_embed.parameters())
    if image_tower is not None:
        fresh -= sum(p.numel() for p in model.model.patch_embed.encoder.parameters())
    fresh = f"{fresh / 1e6:.1f}M of them a random visual front end to be trained"
    print(f"{out}: {parameters / 1e6:.1f}M parameters, {fresh}.")


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with a saved model and processor.")],
) -> None:
    """Make a saved checkpoint ready for the Hub.

    Adds the files with which `trust_remote_code=True` runs the installed package, takes out what only training needs
    (the task heads of a vision teacher), and prints the names of the files written.
    """
    from elva_hf.hub import export_hub_files

    for path in export_hub_files(folder):
        print(path)


def build_from_text_model(
    text_model: str, system: Architecture, image_tower: str | None = None
) -> tuple[ElvaForCausalLM, ElvaProcessor]:
    """Load a text model and its tokenizer, and an image tower; returns the model and the processor built on them.

    Raises:
        CheckpointError: They cannot be loaded.
    """
    from transformers import AutoTokenizer

    with loading.explained(text_model):
        tokenizer = AutoTokenizer.from_pretrained(text_model)
        processor = system.processor.from_tokenizer(tokenizer, **system.config().video_options)
        if image_tower is None:
            model = system.causal_lm.from_text_model(text_model, tokenizer=processor.tokenizer)
        else:
            model = system.causal_lm.from_towers(text_model, image_tower, tokenizer=processor.tokenizer)
            processor = system.processor.from_tokenizer(tokenizer, **model.config.video_options)
    if len(processor.tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(processor.tokenizer))
    model.generation_config.eos_token_id = _stop_tokens(model.generation_config.eos_token_id, processor.tokenizer)
    return model, processor


def _stop_tokens(eos_token_id: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where an answer ends: at what ends the text model's, and at the end of a ChatML turn."""
    known = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    return list(dict.fromkeys([*known, tokenizer.convert_tokens_to_ids("<|im_end|>")]))
