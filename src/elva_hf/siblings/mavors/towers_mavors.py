"""Weights of a SigLIP image tower -> those of the chunk encoder, its 2-D kernels repeated along time (section 3.3)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import SiglipVisionConfig

from elva_hf.errors_elva import CheckpointError
from elva_hf.siblings.mavors.encoder_mavors import MavorsChunkEncoder

_ANCHOR = "embeddings.patch_embedding.weight"  # every tower has it, and nothing else does
_PARTS = ("embeddings.", "encoder.", "post_layernorm.")
_RENAMED = {
    "embeddings.patch_embedding.": "patch_embedding.",
    "embeddings.position_embedding.": "position_embedding.",
}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def find_tower(name: str | os.PathLike) -> Path:
    """A file or folder as it is, or else the configuration and weights of that name from the Hub.

    Raises:
        CheckpointError: There is neither.
    """
    path = Path(name)
    if path.exists() or str(name).count("/") != 1:
        return path
    try:
        return Path(snapshot_download(str(name), allow_patterns=["config.json", _WEIGHTS, _INDEX, "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {name}: {' '.join(str(error).split())}") from error


def read_tower_config(folder: str | os.PathLike) -> SiglipVisionConfig:
    """Read the configuration of a SigLIP checkpoint's image tower.

    Args:
        folder: Of a whole SigLIP, whose tower is under `vision_config`, or of an image tower alone; or its Hub id.

    Raises:
        CheckpointError: There is none, or it is of another kind of model.
    """
    path = find_tower(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give the folder of a SigLIP checkpoint.") from error
    tower = fields.get("vision_config", fields)
    kinds = (fields.get("model_type"), tower.get("model_type", "siglip_vision_model"))
    if kinds not in (("siglip", "siglip_vision_model"), ("siglip_vision_model", "siglip_vision_model")):
        raise CheckpointError(f"{path} is of model_type {kinds[0]!r}; expected 'siglip' or 'siglip_vision_model'.")
    tower.pop("model_type", None)
    return SiglipVisionConfig(**tower)


def read_tower_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the weights of an image tower, under the names of `SiglipVisionModel` without any prefix.

    Args:
        path: A safetensors file of a whole SigLIP or of its tower alone, with or without the prefix `vision_model.`
            that older files have; or a folder with such a file, or with an index of several; or a Hub id.

    Raises:
        CheckpointError: No such file, no tower in it, or two.
    """
    files = _weight_files(find_tower(path))
    places = {name: file for file in files for name in _names(file)}
    anchors = [name for name in places if name.endswith(_ANCHOR)]
    if len(anchors) != 1:
        raise CheckpointError(
            f"{path} holds {len(anchors)} tensors named *{_ANCHOR}; expected the one of a SigLIP image tower."
        )
    prefix = anchors[0].removesuffix(_ANCHOR)
    wanted = {name: name.removeprefix(prefix) for name in places if name.startswith(prefix)}
    wanted = {name: bare for name, bare in wanted.items() if bare.startswith(_PARTS) and "position_ids" not in bare}
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            weights |= {bare: opened.get_tensor(name) for name, bare in wanted.items() if places[name] == file}
    return weights


def inflate_tower(weights: Mapping[str, Tensor], chunk_frames: int) -> dict[str, Tensor]:
    """Repeat the 2-D kernels along time, and rename what the chunk encoder calls otherwise; nothing is divided.

    Args:
        weights: Of a `SiglipVisionModel`, its pooling head left out.
        chunk_frames: `F`.
    """
    inflated = {}
    for name, weight in weights.items():
        if name == _ANCHOR:
            weight = weight[:, :, None].repeat(1, 1, chunk_frames, 1, 1)
        old = next((old for old in _RENAMED if name.startswith(old)), "")
        inflated[_RENAMED.get(old, "") + name.removeprefix(old)] = weight
    return inflated


def load_tower(encoder: MavorsChunkEncoder, weights: Mapping[str, Tensor]) -> None:
    """Give the chunk encoder the weights of an image tower.

    Args:
        encoder: Of the same sizes.
        weights: From `read_tower_weights`, or the `state_dict` of a `SiglipVisionModel` without its head.

    Raises:
        CheckpointError: Weights are missing, of other shapes, or belong to nothing.
    """
    inflated = inflate_tower(weights, encoder.patch_embedding.weight.shape[2])
    own = {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}
    given = {name: tuple(weight.shape) for name, weight in inflated.items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} tensors of the image tower do not fit; {name} is {given.get(name, 'missing')}, expected "
            f"{own.get(name, 'no such tensor')}. Build the model with this tower's own vision_config."
        )
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(inflated[name])


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of weights ({error}).") from error
        if any(os.path.basename(name) != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder; expected plain file names.")
        return [path / name for name in sorted(names)]
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    raise CheckpointError(f"{path} holds neither {_WEIGHTS} nor {_INDEX}; give a safetensors file or its folder.")


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors ({error}).") from error
