"""The teacher of section 3.2: a frozen vision encoder that looks at exactly the student's pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import VisualGeometry
from elva_hf.training.losses import VisualTargets, frame_clips
from elva_hf.training.towers import (
    Tower,
    clip_lengths,
    fingerprint,
    load_tower,
    prepare_frames,
    run_tower,
    three_channels,
)

FRAMES_PER_CHUNK = 32
"""Frames that an image tower sees at once; bounds memory, changes nothing else."""

_WHERE = ("path", "revision")  # of a spec: where the weights came from, which the fingerprint says better


@dataclass(frozen=True)
class TeacherSpec:
    """All that decides a teacher's features; two teachers with equal specs give equal ones.

    Args:
        path: Folder or Hub id of the checkpoint.
        revision: Of the Hub.
        fingerprint: Hash of the tower's weights as saved.
        layer: Hidden state that is read, counted from the last: -2 for the penultimate.
        kind: `"image"` or `"video"`.
        image_size: Height and width of the tower's frames in pixels.
        grid: Rows and columns of its map.
        width: Features of a place.
        image_mean: Of pixels in [0, 1], per channel.
        image_std: Likewise.
        tubelet: Frames that share one map; 1 for an image tower.
        resample: How frames are resized: `"bicubic"` or `"bilinear"`.
    """

    path: str
    revision: str | None
    fingerprint: str
    layer: int
    kind: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    width: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    tubelet: int = 1
    resample: str = "bicubic"

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TeacherSpec:
        """Read what `to_dict` gave."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def differences(self, other: TeacherSpec) -> list[str]:
        """What of another teacher gives other features, in words: `"layer -2 against -3"`."""
        names = [field.name for field in fields(self) if field.name not in _WHERE]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs]


class VisualTeacher:
    """A frozen vision encoder of transformers: SigLIP, SigLIP2, CLIP, VideoPrism or V-JEPA 2.

    It is no module, so it is never part of a student, of its optimiser or of its checkpoints. Frames are resized, whole
    picture to whole picture, to the tower's own size; autocast does not reach it. A video tower sees the frames of a
    video together, in clips of at most as many as it was trained on; the frames of a tubelet share its map, and a last
    tubelet that is not full is filled with the last frame.

    Args:
        tower: From `load_tower`.
        spec: What it is.
    """

    def __init__(self, tower: Tower, spec: TeacherSpec):
        self.tower = tower
        self.spec = spec

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        layer: int = -2,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        revision: str | None = None,
    ) -> VisualTeacher:
        """Load the vision tower of a checkpoint; of a whole model nothing else is kept.

        Args:
            path: Folder or Hub id.
            layer: Index in `hidden_states`; -2 is the penultimate.
            dtype: To compute in; as saved if None.
            device: Where to; the host if None.
            revision: Of the Hub.

        Raises:
            ConfigurationError: A kind of checkpoint that is not known, or a layer that it does not have.
            CheckpointError: It cannot be read, or lacks weights.
        """
        tower = load_tower(str(path), revision)
        spec = _describe(tower, str(path), revision, layer)
        if dtype is not None:
            tower.model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return cls(tower, spec).to(device or "cpu")

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.tower.model.parameters()).device

    def to(self, device: torch.device | str) -> VisualTeacher:
        """Move it, and return it."""
        self.tower.model.to(device)
        return self

    @torch.no_grad()
    def features(self, frames: Tensor | Sequence[Tensor]) -> Tensor:
        """Features of one video.

        Args:
            frames: `(T, 3, H, W)`, or `T` of `(3, H, W)` of any sizes; uint8, or floats in [0, 1].

        Returns:
            `(T, h, w, D)` in the tower's dtype, on its device.

        Raises:
            ConfigurationError: Floats outside [0, 1].
        """
        listed = [frame.to(self.device) for frame in frames]
        with torch.autocast(self.device.type, enabled=False):
            if self.spec.kind == "image":
                starts = range(0, len(listed), FRAMES_PER_CHUNK)
                return torch.cat([self._run(listed[start : start + FRAMES_PER_CHUNK]) for start in starts])
            maps, start = [], 0
            for length in clip_lengths(len(listed), self.tower.max_frames, self.spec.tubelet):
                clip = listed[start : start + length]
                full = [*clip, *[clip[-1]] * (-length % self.spec.tubelet)]
                maps.append(self._run(full).repeat_interleave(self.spec.tubelet, 0)[:length])
                start += length
            return torch.cat(maps)

    def each(self, videos: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
        """Features of videos one after another; an image tower takes the frames of short ones together.

        Args:
            videos: Frames of each, as `features` takes them; read as they are needed.

        Yields:
            `(T, h, w, D)` of each.
        """
        waiting: list[Sequence[Tensor]] = []
        for video in videos:
            waiting.append(video)
            if self.spec.kind == "video" or sum(map(len, waiting)) >= FRAMES_PER_CHUNK:
                yield from self._together(waiting)
                waiting = []
        yield from self._together(waiting)

    def _together(self, videos: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        frames = [frame for video in videos for frame in video]
        return self.features(frames).split([len(video) for video in videos]) if frames else ()

    def _run(self, frames: Sequence[Tensor]) -> Tensor:
        pixels = prepare_frames(frames, self.tower.pixels)
        return run_tower(self.tower, pixels, self.tower.num_states + self.spec.layer)


def frames_from_patches(
    pixel_values_videos: Tensor,
    geometry: VisualGeometry,
    patch_size: int,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
) -> list[list[Tensor]]:
    """The frames of a batch, bit for bit as they were before `ElvaVideoProcessor` normalised and cut them.

    So a teacher sees whatever flips and crops the student sees.

    Args:
        pixel_values_videos: `(P, 3 * patch_size**2)` as the processor gives it; half precision will do.
        geometry: Where its patches stand.
        patch_size: Side of a patch in pixels.
        image_mean: Of the student's processor.
        image_std: Likewise.

    Returns:
        Per video its frames, `(3, H, W)` uint8.

    Raises:
        ConfigurationError: Values that this mean and deviation cannot have given.
    """
    patches = denormalize(pixel_values_videos, image_mean, image_std)
    host = geometry.host or geometry
    grids = list(zip(host.frame_rows.tolist(), host.frame_columns.tolist(), strict=True))
    starts = host.patch_frame.new_tensor([0, *(rows * cols for rows, cols in grids[:-1])]).cumsum(0)
    videos: dict[int, list[Tensor]] = {}
    for video, start, (rows, cols) in zip(host.patch_video[starts].tolist(), starts.tolist(), grids, strict=True):
        frame = unpatchify(patches[start : start + rows * cols], rows, cols, patch_size)
        videos.setdefault(video, []).append(frame)
    return list(videos.values())


def unpatchify(patches: Tensor, rows: int, cols: int, patch_size: int) -> Tensor:
    """Put a frame together again, the inverse of `patchify`.

    Args:
        patches: `(rows * cols, C * patch_size**2)`; inside a patch channel, row, column.
        rows: Rows of patches.
        cols: Patches in a row.
        patch_size: Side of a patch in pixels.

    Returns:
        `(C, rows * patch_size, cols * patch_size)`.
    """
    cut = patches.reshape(rows, cols, -1, patch_size, patch_size)
    return cut.permute(2, 0, 3, 1, 4).reshape(-1, rows * patch_size, cols * patch_size)


def denormalize(patches: Tensor, mean: float | Sequence[float], std: float | Sequence[float]) -> Tensor:
    """Bring normalised pixel values back to the 8 bits they came from.

    Args:
        patches: `(P, 3 * patch_size**2)`, channel first; uint8 is returned as it is.
        mean: Of values in [0, 1], one or one per channel.
        std: Likewise.

    Returns:
        `(P, 3 * patch_size**2)` uint8.

    Raises:
        ConfigurationError: Values that this mean and deviation cannot have given.
    """
    if patches.dtype == torch.uint8:
        return patches
    mean, std = (torch.tensor(three_channels(values), device=patches.device)[:, None] for values in (mean, std))
    values = patches.float().unflatten(1, (3, -1)).mul(std).add_(mean).mul_(255).flatten(1)
    levels = values.round()
    tolerance = 0.02 if patches.dtype in (torch.float32, torch.float64) else 0.45  # of a level; half a level is a tie
    off = (values - levels).abs_().max() if values.numel() else values.new_zeros(())
    if not (off <= tolerance and levels.min() >= 0 and levels.max() <= 255):
        raise ConfigurationError(
            f"pixel values are up to {float(off):.3g} of an 8-bit level off: they were not normalised with mean "
            f"{mean.flatten().tolist()} and std {std.flatten().tolist()}; give image_mean and image_std of the "
            "student's video processor."
        )
    return levels.to(torch.uint8)


@torch.no_grad()
def teacher_targets(
    teacher: VisualTeacher,
    pixel_values_videos: Tensor,
    geometry: VisualGeometry,
    *,
    patch_size: int,
    image_mean: float | Sequence[float] = 0.5,
    image_std: float | Sequence[float] = 0.5,
    with_patches: bool = False,
) -> VisualTargets:
    """What the losses of section 3.2 compare the student with.

    Args:
        teacher: Runs on its own device.
        pixel_values_videos: `(P, 3 * patch_size**2)` of the batch.
        geometry: Where its patches stand.
        patch_size: Side of a patch in pixels.
        image_mean: Of the student's processor.
        image_std: Likewise.
        with_patches: Whether each frame's map is wanted too, average-pooled to the student's grid of that frame.

    Returns:
        Per clip the teacher's map averaged over its frames, per frame the mean over its map; float32.
    """
    videos = frames_from_patches(pixel_values_videos, geometry, patch_size, image_mean, image_std)
    frame_clip = frame_clips(geometry)[0].tolist()
    host = geometry.host or geometry
    grids = list(zip(host.frame_rows.tolist(), host.frame_columns.tolist(), strict=True))
    tubes, frames, patches, first = [], [], [], 0
    for maps in teacher.each(videos):
        of_video = summarize(maps, frame_clip[first : first + len(maps)])
        tubes.append(of_video.tubes)
        frames.append(of_video.frames)
        if with_patches:
            patches += map(pool_map, maps, grids[first : first + len(maps)])
        first += len(maps)
    return VisualTargets(torch.cat(tubes), torch.cat(frames), torch.cat(patches) if with_patches else None)


def pool_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pool a map to another grid of the same picture; a finer one repeats its places.

    Args:
        features: `(h, w, D)`.
        grid: Rows and columns.

    Returns:
        `(rows * columns, D)` float32.
    """
    return F.adaptive_avg_pool2d(features.float().permute(2, 0, 1), grid).flatten(1).T


def summarize(maps: Tensor, frame_clip: Sequence[Any]) -> VisualTargets:
    """Average a video's maps over the frames of each clip, and over places for each frame.

    Args:
        maps: `(T, h, w, D)` features of one video.
        frame_clip: Clip of each frame, by anything that tells clips apart, such as its patch grid.
    """
    clips = list(dict.fromkeys(frame_clip))
    values = maps.float()
    members = [[number for number, clip in enumerate(frame_clip) if clip == wanted] for wanted in clips]
    return VisualTargets(tubes=torch.stack([values[chosen].mean(0) for chosen in members]), frames=values.mean((1, 2)))


def _describe(tower: Tower, path: str, revision: str | None, layer: int) -> TeacherSpec:
    states = tower.num_states
    if not -states <= layer < states:
        raise ConfigurationError(
            f"layer {layer} is none of teacher {path}: it has {states} hidden states, from {-states} to {states - 1}; "
            "-2 is the penultimate."
        )
    return TeacherSpec(
        path=path,
        revision=revision,
        fingerprint=fingerprint(tower.model),
        layer=layer if layer < 0 else layer - states,
        kind=tower.family.kind,
        image_size=tower.pixels.image_size,
        grid=tower.grid,
        width=tower.width,
        image_mean=tower.pixels.mean,
        image_std=tower.pixels.std,
        tubelet=tower.tubelet,
        resample=tower.pixels.resample,
    )
