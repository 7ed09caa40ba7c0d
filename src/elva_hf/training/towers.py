"""Vision towers of transformers: how each family is loaded, fed and read.

EVA-CLIP, of Table 4, is not in transformers, so it is not here; a SigLIP or CLIP tower stands in for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from elva_hf.errors_elva import CheckpointError, ConfigurationError
from elva_hf.video_processing_elva import patchify

logger = hf_logging.get_logger(__name__)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which image processors store
PROCESSOR_FILES = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class TowerFamily:
    """A family of vision encoders.

    Args:
        tower: Class of the tower in transformers.
        model_types: Configurations that hold one, the tower's own and those of whole models.
        kind: `"image"` for one frame at a time, `"video"` for frames together.
        mean: Published default, of pixels in [0, 1], for a checkpoint without the settings of its processor.
        std: Likewise.
        resample: Likewise.
        num_class_tokens: Tokens before those of the patches.
    """

    tower: str
    model_types: tuple[str, ...]
    kind: str
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bicubic"
    num_class_tokens: int = 0


FAMILIES: tuple[TowerFamily, ...] = (
    TowerFamily("SiglipVisionModel", ("siglip", "siglip_vision_model"), "image"),
    TowerFamily("Siglip2VisionModel", ("siglip2", "siglip2_vision_model"), "image", resample="bilinear"),
    TowerFamily("CLIPVisionModel", ("clip", "clip_vision_model"), "image", CLIP_MEAN, CLIP_STD, num_class_tokens=1),
    TowerFamily(
        "VideoPrismVisionModel", ("videoprism", "videoprism_vision_model"), "video", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    ),
    TowerFamily("VJEPA2Model", ("vjepa2",), "video", IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
)


@dataclass(frozen=True)
class PixelSettings:
    """What a tower expects of pixels in [0, 1].

    Args:
        image_size: Height and width.
        mean: Subtracted, per channel.
        std: Divided by, per channel.
        resample: `"bicubic"` or `"bilinear"`, with antialiasing.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: str


@dataclass(frozen=True)
class Tower:
    """A loaded vision tower and its geometry.

    Args:
        family: How to feed and read it.
        model: The module, frozen and in eval mode.
        config: Its own configuration.
        pixels: What it expects of pixels.
        grid: Rows and columns of its map.
        tubelet: Frames that share one map.
        max_frames: Most frames it was trained to see together; None for a tower of images.
        num_states: Length of its `hidden_states`.
    """

    family: TowerFamily
    model: nn.Module
    config: Any
    pixels: PixelSettings
    grid: tuple[int, int]
    tubelet: int
    max_frames: int | None
    num_states: int

    @property
    def width(self) -> int:
        """Features of a place."""
        return self.config.hidden_size


def load_tower(path: str, revision: str | None = None) -> Tower:
    """Load the vision tower of a checkpoint, in the dtype it was saved in; nothing else of it is kept.

    Args:
        path: Folder or Hub id: a tower of its own, or a whole SigLIP, CLIP, VideoPrism or dual-encoder model.
        revision: Of the Hub.

    Raises:
        ConfigurationError: The checkpoint is of a kind that is not known.
        CheckpointError: It cannot be read, or lacks weights of the tower.
    """
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"teacher {path} cannot be read: {_first_line(error)}") from error
    config = getattr(whole, "vision_config", None) or whole
    family = find_family(whole.model_type if config is whole else config.model_type, path)
    model = _load_model(family, path, revision, config, whole.model_type)
    grid, tubelet, max_frames, image_size = _read_geometry(family, config)
    return Tower(
        family=family,
        model=model.requires_grad_(False).eval(),
        config=config,
        pixels=read_pixel_settings(path, revision, family, image_size),
        grid=grid,
        tubelet=tubelet,
        max_frames=max_frames,
        num_states=1 + _num_layers(config),
    )


def find_family(model_type: str, path: str) -> TowerFamily:
    """The family of a model type.

    Raises:
        ConfigurationError: None has it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ConfigurationError(
        f"teacher {path} has model_type {model_type!r}, which is no known vision tower; choose a checkpoint of one of "
        f"{known} (EVA-CLIP is not in transformers)."
    )


def run_tower(tower: Tower, pixels: Tensor, state: int) -> Tensor:
    """A hidden state of a tower, as maps.

    Args:
        tower: From `load_tower`.
        pixels: `(T, 3, H, W)` normalised frames of the tower's size; for a video tower one clip of whole tubelets.
        state: Index in `hidden_states`, from 0.

    Returns:
        `(T / tubelet, h, w, D)`.
    """
    run = {"Siglip2VisionModel": _run_naflex, "VideoPrismVisionModel": _run_videoprism, "VJEPA2Model": _run_vjepa2}
    return run.get(tower.family.tower, _run_image)(tower, pixels, state).unflatten(1, tower.grid)


def prepare_frames(frames: Sequence[Tensor], settings: PixelSettings) -> Tensor:
    """Resize frames to a tower's size, whole picture to whole picture, and normalise them.

    Args:
        frames: `(3, H, W)` each, uint8 or floats in [0, 1]; of any sizes.
        settings: What the tower expects.

    Returns:
        `(T, 3, *image_size)` float32. Resized values are rounded to 8 bits, as image processors do.

    Raises:
        ConfigurationError: Floats outside [0, 1].
    """
    device = frames[0].device
    out = torch.empty(len(frames), 3, *settings.image_size, device=device)
    for size in dict.fromkeys(frame.shape for frame in frames):
        chosen = [number for number, frame in enumerate(frames) if frame.shape == size]
        values = _unit_range(torch.stack([frames[number] for number in chosen]))
        if tuple(size[-2:]) != settings.image_size:
            values = F.interpolate(values, settings.image_size, mode=settings.resample, antialias=True)
            values = (values * 255).round_().clamp_(0, 255).div_(255)
        out[chosen] = values
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (settings.mean, settings.std))
    return out.sub_(mean).div_(std)


def clip_lengths(num_frames: int, max_frames: int, tubelet: int) -> list[int]:
    """Cut a video into clips that a tower can see at once: as few as may be, of whole tubelets, as even as may be.

    Args:
        num_frames: Frames of the video.
        max_frames: Most frames of a clip.
        tubelet: Frames of a tubelet.

    Returns:
        Frames of each clip; the last may end within a tubelet.
    """
    tubelets = math.ceil(num_frames / tubelet)
    num_clips = math.ceil(tubelets / max(max_frames // tubelet, 1))
    lengths = [tubelet * (tubelets // num_clips + (clip < tubelets % num_clips)) for clip in range(num_clips)]
    lengths[-1] -= tubelets * tubelet - num_frames
    return lengths


def fingerprint(model: nn.Module) -> str:
    """Hash of a module's weights as they are: names, dtypes, shapes, bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_pixel_settings(
    path: str, revision: str | None, family: TowerFamily, image_size: tuple[int, int]
) -> PixelSettings:
    """What a checkpoint's processor does to pixels; its family's published default, with a warning, if it has none.

    Raises:
        ConfigurationError: The processor resizes in a way that torch has not.
    """
    fields = _processor_fields(path, revision)
    if fields is None:
        logger.warning_once(
            f"teacher {path} has no preprocessor_config.json; its pixels are prepared by the published default of "
            f"{family.tower}: mean {family.mean}, std {family.std}, {family.resample}."
        )
        return PixelSettings(image_size, family.mean, family.std, family.resample)
    resample = fields.get("resample", family.resample)
    resample = RESAMPLES.get(resample, resample)
    if resample not in RESAMPLES.values():
        raise ConfigurationError(f"teacher {path} resizes with resample={resample!r}; known are 2 and 3: {RESAMPLES}.")
    scale = 255 * fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 255.0
    mean, std = fields.get("image_mean", family.mean), fields.get("image_std", family.std)
    if not fields.get("do_normalize", True):
        mean, std = 0.0, 1.0
    mean, std = (tuple(value / scale for value in three_channels(values)) for values in (mean, std))
    return PixelSettings(image_size, mean, std, resample)


def three_channels(values: float | Sequence[float]) -> tuple[float, ...]:
    """One value for each channel."""
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(map(float, values))


def _processor_fields(path: str, revision: str | None) -> Mapping[str, Any] | None:
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES:
        file = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            continue
        with open(file, encoding="utf-8") as stream:
            fields = json.load(stream)
        nested = fields.get("video_processor") or fields.get("image_processor")
        if nested is not None or name != "processor_config.json":
            return nested or fields
    return None


def _load_model(family: TowerFamily, path: str, revision: str | None, config: Any, whole_type: str) -> nn.Module:
    import transformers

    inside = whole_type == "videoprism"  # its tower sits two levels down, where from_pretrained does not look
    loaded = transformers.VideoPrismClipModel if inside else getattr(transformers, family.tower)
    options = {} if inside else {"config": config}
    with _without_load_report():
        model, info = loaded.from_pretrained(path, revision=revision, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise CheckpointError(
            f"teacher {path} lacks {len(info['missing_keys'])} weights of {family.tower}, such as "
            f"{min(info['missing_keys'])}; give a checkpoint that holds the whole vision tower."
        )
    if inside:
        return model.video_model.vision_model
    if family.tower == "VJEPA2Model":
        model.predictor = nn.Identity()  # never run, and as large as a small tower
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Weights of a text tower are left out on purpose; no table of them."""
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.ERROR)
    try:
        yield
    finally:
        report.setLevel(level)


def _read_geometry(family: TowerFamily, config: Any) -> tuple[tuple[int, int], int, int | None, tuple[int, int]]:
    """Grid, tubelet, most frames at once, and size of a frame."""
    if family.tower == "Siglip2VisionModel":
        rows, patch = math.isqrt(config.num_patches), _pair(config.patch_size)
        return (rows, rows), 1, None, (rows * patch[0], rows * patch[1])
    if family.tower == "VideoPrismVisionModel":
        size, (tubelet, *patch), frames = _pair(config.image_size), config.tubelet_size, config.num_frames
    elif family.tower == "VJEPA2Model":
        size, patch = _pair(config.crop_size), _pair(config.patch_size)
        tubelet, frames = config.tubelet_size, config.frames_per_clip
    else:
        size, patch, tubelet, frames = _pair(config.image_size), _pair(config.patch_size), 1, None
    return (size[0] // patch[0], size[1] // patch[1]), tubelet, frames, size


def _num_layers(config: Any) -> int:
    layers = getattr(config, "num_hidden_layers", None)
    return config.num_spatial_layers + config.num_temporal_layers if layers is None else layers


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _unit_range(frames: Tensor) -> Tensor:
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    least, most = frames.aminmax()
    if not (least >= 0 and most <= 1):
        raise ConfigurationError(
            f"frames for a teacher hold values from {float(least):.3g} to {float(most):.3g}; give uint8, or floats in "
            "[0, 1]."
        )
    return frames.float()


def _run_image(tower: Tower, pixels: Tensor, state: int) -> Tensor:
    outputs = tower.model(pixels.to(tower.model.dtype), output_hidden_states=[state])
    return outputs.hidden_states[state][:, tower.family.num_class_tokens :]


def _run_naflex(tower: Tower, pixels: Tensor, state: int) -> Tensor:
    """Its own patch input: `(T, n, P * P * 3)`, channel last within a patch."""
    size = tower.config.patch_size
    patches = torch.stack([patchify(frame, size) for frame in pixels])
    patches = patches.unflatten(2, (3, size * size)).transpose(2, 3).flatten(2)
    outputs = tower.model(
        patches.to(tower.model.dtype),
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device),
        spatial_shapes=torch.tensor([tower.grid] * len(patches)),
        output_hidden_states=[state],
    )
    return outputs.hidden_states[state]


def _run_vjepa2(tower: Tower, pixels: Tensor, state: int) -> Tensor:
    outputs = tower.model(pixels[None].to(tower.model.dtype), skip_predictor=True, output_hidden_states=[state])
    return outputs.hidden_states[state].unflatten(1, (-1, math.prod(tower.grid))).squeeze(0)


def _run_videoprism(tower: Tower, pixels: Tensor, state: int) -> Tensor:
    """States of the spatial layers are frame by frame, those of the temporal ones place by place, the last flat."""
    config = tower.config
    outputs = tower.model(
        pixels[None].to(tower.model.dtype),
        interpolate_pos_encoding=True,  # of as many frames as there are
        output_hidden_states=[state],
    )
    values = outputs.hidden_states[state]
    if state <= config.num_spatial_layers:
        return values
    if state < tower.num_states - 1:
        return values.transpose(0, 1)
    return values.unflatten(1, (-1, math.prod(tower.grid))).squeeze(0)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
