"""Make a saved checkpoint ready for the Hub: entry points, `auto_map` for every head, model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from elva_hf.errors_elva import CheckpointError

ENTRY_POINTS = ("configuration_elva.py", "modeling_elva.py", "processing_elva.py")

AUTO_MAP = {
    "AutoConfig": "configuration_elva.ElvaConfig",
    "AutoModel": "modeling_elva.ElvaModel",
    "AutoModelForCausalLM": "modeling_elva.ElvaForCausalLM",
    "AutoModelForImageTextToText": "modeling_elva.ElvaForCausalLM",
    "AutoModelForMultimodalLM": "modeling_elva.ElvaForCausalLM",
}


def export_hub_files(folder: str | os.PathLike, card: Mapping[str, Any] | None = None) -> list[Path]:
    """Add to a saved checkpoint what lets `trust_remote_code=True` run the installed package.

    The three entry points only import elva_hf, so no second copy of the code lives on a hub; where the
    package is missing, transformers names it.

    Args:
        folder: A folder written by `model.save_pretrained` and `processor.save_pretrained`.
        card: Fields of the model card; a README.md is rendered from them if given.

    Returns:
        The files written.

    Raises:
        CheckpointError: The folder holds no model or no processor of ours.
    """
    folder = Path(folder)
    for name in ("config.json", "processor_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; save the model and the processor there first.")
    written = [Path(shutil.copy(resources.files(__name__) / name, folder / name)) for name in ENTRY_POINTS]
    written.append(_update_json(folder / "config.json", {"auto_map": AUTO_MAP}))
    processor = json.loads((folder / "processor_config.json").read_text())
    video = {
        **processor.get("video_processor", {}),
        "auto_map": {"AutoVideoProcessor": "processing_elva.ElvaVideoProcessor"},
    }
    fields = {"auto_map": {"AutoProcessor": "processing_elva.ElvaProcessor"}, "video_processor": video}
    written.append(_update_json(folder / "processor_config.json", fields))
    if card is not None:
        path = folder / "README.md"
        path.write_text(render_card(card))
        written.append(path)
    return written


def render_card(fields: Mapping[str, Any]) -> str:
    """Fill the template of a checkpoint's model card (`model_card.md`).

    Raises:
        CheckpointError: A field of the template is missing.
    """
    template = Template((resources.files(__name__) / "model_card.md").read_text())
    try:
        return template.substitute(fields)
    except KeyError as error:
        known = sorted(template.get_identifiers())
        raise CheckpointError(f"the model card needs the field {error}; its fields are {', '.join(known)}.") from None


def _update_json(path: Path, fields: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=2) + "\n")
    return path
