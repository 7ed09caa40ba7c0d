"""Make a saved checkpoint ready for the Hub: entry points, `auto_map` for every head, model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from elva_hf.architectures_elva import find_architecture
from elva_hf.errors_elva import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINTS = ("configuration_elva.py", "modeling_elva.py", "processing_elva.py")

TRAINING_WEIGHTS = "guidance."
"""Prefix of the weights that only training needs: the task heads of a vision teacher."""

HEADS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def auto_map(architecture: str) -> dict[str, str]:
    """`auto_map` of a checkpoint's configuration: which class of which entry point each Auto class loads.

    Args:
        architecture: Name of a system, or its `model_type`.

    Raises:
        ConfigurationError: There is no such system.
    """
    system = find_architecture(architecture)
    heads = {head: f"modeling_elva.{system.causal_lm.__name__}" for head in HEADS}
    return {
        "AutoConfig": f"configuration_elva.{system.config.__name__}",
        "AutoModel": f"modeling_elva.{system.model.__name__}",
        **heads,
    }


AUTO_MAP = auto_map("elva")


def export_hub_files(folder: str | os.PathLike, card: Mapping[str, Any] | None = None) -> list[Path]:
    """Add to a saved checkpoint what lets `trust_remote_code=True` run the installed package.

    The three entry points only import elva_hf, so no second copy of the code lives on a hub; where the
    package is missing, transformers names it. The task heads of a vision teacher, which a training checkpoint holds,
    are taken out.

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
    written += drop_training_weights(folder)
    model_type = json.loads((folder / "config.json").read_text()).get("model_type", "elva")
    system, known = find_architecture(model_type), {"auto_map": auto_map(model_type)}
    written.append(_update_json(folder / "config.json", known, without=("guidance",)))
    processor = json.loads((folder / "processor_config.json").read_text())
    video = {
        **processor.get("video_processor", {}),
        "auto_map": {"AutoVideoProcessor": f"processing_elva.{system.video_processor.__name__}"},
    }
    fields = {"auto_map": {"AutoProcessor": f"processing_elva.{system.processor.__name__}"}, "video_processor": video}
    written.append(_update_json(folder / "processor_config.json", fields))
    if card is not None:
        path = folder / "README.md"
        path.write_text(render_card(card))
        written.append(path)
    return written


def drop_training_weights(folder: str | os.PathLike) -> list[Path]:
    """Rewrite the weight files of a checkpoint without the task heads of a vision teacher.

    Each file is replaced by its successor in one step: an interrupted export can be run again.

    Args:
        folder: Where `model.save_pretrained` wrote safetensors, in one file or several.

    Returns:
        The files rewritten; none if there are no such weights.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if any(map(_is_dropped, names)):
                files[path] = {name: file.get_tensor(name) for name in names}, file.metadata()
    dropped = [tensor for weights, _ in files.values() for name, tensor in weights.items() if _is_dropped(name)]
    written = _drop_from_index(folder / "model.safetensors.index.json", dropped)
    for path, (weights, metadata) in files.items():
        kept = {name: tensor for name, tensor in weights.items() if not _is_dropped(name)}
        if not kept:
            path.unlink()
            continue
        new = path.with_name(f".{path.name}.new")
        save_file(kept, new, metadata=metadata)
        os.replace(new, path)
        written.append(path)
    return written


def _is_dropped(name: str) -> bool:
    return name.startswith(TRAINING_WEIGHTS)


def _drop_from_index(index: Path, dropped: list[Tensor]) -> list[Path]:
    """Take weights out of the index of a checkpoint in several files."""
    content = json.loads(index.read_text()) if index.is_file() else {"weight_map": {}}
    kept = {name: file for name, file in content["weight_map"].items() if not _is_dropped(name)}
    if len(kept) == len(content["weight_map"]):
        return []
    sums = {
        "total_parameters": sum(tensor.numel() for tensor in dropped),
        "total_size": sum(tensor.numel() * tensor.element_size() for tensor in dropped),
    }
    for key in sums.keys() & content.get("metadata", {}).keys():
        content["metadata"][key] -= sums[key]
    new = index.with_name(f".{index.name}.new")
    new.write_text(json.dumps({**content, "weight_map": kept}, indent=2) + "\n")
    os.replace(new, index)
    return [index]


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


def _update_json(path: Path, fields: Mapping[str, Any], without: Sequence[str] = ()) -> Path:
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: content[key] for key in content if key not in without}, indent=2) + "\n")
    return path
