"""Teachers of the claims: hand-made ones, and two towers of one architecture that are trained on the world's captions.

Both towers go on from the same weights for equally many steps, by the code of the `teacher_video` recipe: the image
tower on single frames with what they show, the video tower on clips with what happens in them. A clip is the mean of
its frames there, so the video tower can learn whether things move, where they were and which came first, but not which
of two ways they went; and what it says of a patch depends on its frame alone, as with any image tower.

    prepare(["image tower", "video tower"], Path("runs/claims/teachers"), "cpu")   # minutes, once
    features("video tower", frames, 16, Path("runs/claims/teachers"))              # (T, 4, 4, 128)
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from elva_hf.data.toy_teacher import teacher_features, teacher_width
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import (
    FRAME_SIZE,
    GRID_SIZE,
    Scene,
    SceneObject,
    place_name,
    render,
    sample_scene,
    write_mp4,
)
from elva_hf.training.recipe import differences, read_body
from elva_hf.training.run_folder import RECORD
from elva_hf.training.teacher import VisualTeacher

if TYPE_CHECKING:
    from elva_hf.training.video_teacher import VideoTeacherRecipe

HAND_MADE = {
    "looks": ("looks",),
    "looks+place": ("looks", "place"),
    "looks+place+time": ("looks", "place", "time"),
}
"""Hand-made teachers and what they know of a patch."""

TOWER_WIDTH = 128
PATCH_SIZE = FRAME_SIZE // GRID_SIZE
RECIPE = Path(__file__).parent / "recipes" / "towers.yaml"
STANDARD_CLIPS = 100
FIRST_SCENE = 500_000_000_000
"""Scenes of captions: far from those of students, in the training split."""


@dataclass(frozen=True)
class TowerPhase:
    """One training run of a tower.

    Args:
        start: Name of the tower that it goes on from; None for random weights.
        num_frames: Frames of a clip; 1 for images.
        steps: Of the optimiser.
        learning_rate: Peak.
    """

    start: str | None
    num_frames: int
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class TowerPlan:
    """How the towers are trained.

    Args:
        phases: By the name of the tower that a phase makes.
        num_scenes: Captioned scenes of either kind.
        seed: Of the first weights and of the order.
    """

    phases: dict[str, TowerPhase]
    num_scenes: int = 8192
    seed: int = 0


PLAN = TowerPlan(
    {
        "untrained tower": TowerPhase(None, 1, 0, 0.0),
        "base": TowerPhase("untrained tower", 1, 800, 1e-3),
        "image tower": TowerPhase("base", 1, 200, 5e-4),
        "video tower": TowerPhase("base", 8, 200, 5e-4),
    }
)
TOWERS = tuple(PLAN.phases)
QUICK_PLAN = TowerPlan(
    {name: replace(phase, steps=min(phase.steps, 1)) for name, phase in PLAN.phases.items()}, num_scenes=8
)
"""To see whether it runs: towers that have learned nothing."""

FREE = ("num_processes", "model", "data.sources.scenes.path", "training.use_cpu")
"""What may differ between the recipe of a tower that is there and the present one: where files are, and the device."""


# What a teacher sees


def width(name: str) -> int:
    """Numbers a patch of a teacher.

    Raises:
        ValueError: There is no such teacher.
    """
    if name in HAND_MADE:
        return teacher_width(HAND_MADE[name])
    _check_name(name)
    return TOWER_WIDTH


def features(name: str, frames: np.ndarray, patch_size: int, folder: Path | None = None) -> np.ndarray:
    """What a teacher sees in every patch of a video.

    Args:
        name: Of `HAND_MADE` or `TOWERS`.
        frames: `(T, H, W, 3)` uint8; `(T, 64, 64, 3)` for a tower.
        patch_size: Side of a patch; 16 for a tower.
        folder: Of the trained towers, as given to `prepare`.

    Returns:
        `(T, rows, columns, width(name))` float32. A tower's are its hidden states before the last layer, standardised
        over the patches of a fixed set of training scenes.

    Raises:
        ValueError: There is no such teacher, or a tower is asked about another size of frames or patches.
        FileNotFoundError: The tower is not in the folder.
    """
    if name in HAND_MADE:
        return teacher_features(frames, patch_size, HAND_MADE[name])
    _check_name(name)
    if frames.shape[1:3] != (FRAME_SIZE, FRAME_SIZE) or patch_size != PATCH_SIZE:
        raise ValueError(
            f"frames of {frames.shape[1]}x{frames.shape[2]} with patches of {patch_size}: the {name} sees "
            f"{FRAME_SIZE}x{FRAME_SIZE} with patches of {PATCH_SIZE}; choose a hand-made teacher for others."
        )
    if folder is None or not (model := Path(folder) / _slug(name) / "model").is_dir():
        raise FileNotFoundError(f"no {name} in {folder}; train it first: claims.teachers.prepare([{name!r}], folder).")
    teacher, mean, deviation = _load(str(model.resolve()))
    return (_see(teacher, frames) - mean) / deviation


def _check_name(name: str) -> None:
    if name not in TOWERS:
        raise ValueError(f"teacher {name!r}: expected one of {', '.join([*HAND_MADE, *TOWERS])}.")


@lru_cache(maxsize=8)
def _load(model: str) -> tuple[VisualTeacher, np.ndarray, np.ndarray]:
    """A tower, and mean and deviation `(W,)` of its features over the patches of training scenes."""
    teacher = VisualTeacher.from_pretrained(model)
    seen = [_see(teacher, render(sample_scene(seed))) for seed in range(STANDARD_CLIPS)]
    patches = np.concatenate(seen).reshape(-1, teacher.spec.width)
    return teacher, patches.mean(0), patches.std(0) + 1e-3


def _see(teacher: VisualTeacher, frames: np.ndarray) -> np.ndarray:
    return teacher.features(torch.from_numpy(frames).permute(0, 3, 1, 2)).float().numpy()


# Captions


def describe(scene: Scene) -> str:
    """A caption in the words of the world's questions: what is there, where, and in a clip what becomes of it.

    Example:
        >>> describe(sample_scene(0, num_frames=1))
        'red checks ring bottom right, digit 0 top left'
    """
    things = sorted(scene.objects, key=lambda thing: (thing.entry, thing.cells[0]))
    last = max(thing.entry for thing in things)
    said = [f"{thing.color} {thing.pattern} {thing.shape} {_tell(scene, thing, last)}" for thing in things]
    if scene.digit is not None:
        said.append(f"digit {scene.digit.label} {place_name(scene.digit.cell)}")
    if scene.flash_frame is not None:
        said.append(f"flash {'early' if 2 * scene.flash_frame < scene.num_frames else 'late'}")
    return ", ".join(said)


def _tell(scene: Scene, thing: SceneObject, last_entry: int) -> str:
    start, end = place_name(thing.cells[0]), place_name(thing.cells[-1])
    if not scene.has_events:
        return end
    if scene.staggered:
        order = " first" if thing.entry == 0 else " last" if thing.entry == last_entry else ""
        return f"{end} appears{order}"
    return f"still {end}" if thing.motion == "still" else f"move {thing.motion} start {start} end {end}"


def caption_scene(number: int, num_frames: int, split: str = "train") -> Scene:
    """The scene of a caption: every other one has one object, else one to three."""
    return sample_scene(FIRST_SCENE + number, num_frames=num_frames, split=split, single=number % 2 == 0)


def write_captions(folder: Path, num_scenes: int, num_frames: int) -> Path:
    """Write scenes as PNG or mp4 with a table of their captions, whole or not at all; once.

    Args:
        folder: Of the files.
        num_scenes: How many.
        num_frames: Of each; 1 for images.

    Returns:
        The table, JSON lines of messages.
    """
    if (folder / "rows.jsonl").is_file():
        return folder / "rows.jsonl"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"_{folder.name}.", dir=folder.parent))
    with open(partial / "rows.jsonl", "w") as table:
        for number in range(num_scenes):
            scene = caption_scene(number, num_frames)
            kind, file = ("image", f"{number}.png") if num_frames == 1 else ("video", f"{number}.mp4")
            if kind == "image":
                Image.fromarray(render(scene)[0]).save(partial / file)
            else:
                write_mp4(render(scene), partial / file)
            asked = {"role": "user", "content": [{"type": kind, "path": file}]}
            row = {"messages": [asked, {"role": "assistant", "content": describe(scene)}], "id": str(number)}
            table.write(json.dumps(row) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return folder / "rows.jsonl"


# Towers


def prepare(names: Iterable[str], folder: Path, device: str = "cpu", plan: TowerPlan = PLAN) -> None:
    """Train the towers that are not there, and those they go on from; hand-made teachers need nothing.

    Args:
        names: Of teachers.
        folder: Each tower is in `<its name>/model` of it, with underscores, its weights as safetensors.
        device: `"cpu"` or `"cuda"`.
        plan: How they are trained.

    Raises:
        ValueError: There is no such teacher, or a tower is there that was trained with other fields of the recipe.
    """
    for name in names:
        if name not in HAND_MADE:
            _check_name(name)
            _prepare_tower(name, Path(folder).resolve(), device, plan)


def _prepare_tower(name: str, folder: Path, device: str, plan: TowerPlan) -> Path:
    phase, own = plan.phases[name], folder / _slug(name)
    if phase.start is None:
        return _write_untrained(own, plan.seed)
    start = _prepare_tower(phase.start, folder, device, plan)
    recipe = read_tower_recipe(phase, start, folder, device, plan)
    if (own / "model").is_dir():
        _check_trained(recipe, own)
        return own / "model"
    from elva_hf.training.video_teacher import train_video_teacher

    write_captions(Path(recipe.data.sources["scenes"].path).parent, plan.num_scenes, phase.num_frames)
    return train_video_teacher(recipe, own)


def _check_trained(recipe: VideoTeacherRecipe, own: Path) -> None:
    before, now = json.loads((own / RECORD).read_text()), json.loads(json.dumps(asdict(recipe)))
    changed = [field for field in differences(before, now) if field not in FREE]
    if changed:
        raise ValueError(f"{own} holds a tower of other fields ({', '.join(changed)}); remove it to train it anew.")


def read_tower_recipe(phase: TowerPhase, start: Path, folder: Path, device: str, plan: TowerPlan) -> VideoTeacherRecipe:
    """The recipe of the towers with the fields of a phase.

    Args:
        phase: What is trained.
        start: Model that it goes on from.
        folder: Of all towers.
        device: `"cpu"` or `"cuda"`.
        plan: That it belongs to.
    """
    from elva_hf.training.video_teacher import VideoTeacherRecipe

    recipe, _ = read_body(VideoTeacherRecipe, str(RECIPE), [f"model={start}"])
    rows = folder / f"captions-{phase.num_frames}-{plan.num_scenes}" / "rows.jsonl"
    sources = {"scenes": replace(recipe.data.sources["scenes"], path=str(rows), num_samples=plan.num_scenes)}
    training = replace(
        recipe.training,
        max_steps=phase.steps,
        learning_rate=phase.learning_rate,
        seed=plan.seed,
        use_cpu=device == "cpu",
    )
    return replace(recipe, data=replace(recipe.data, sources=sources), training=training, num_frames=phase.num_frames)


def _write_untrained(own: Path, seed: int) -> Path:
    """A SigLIP tower and a BERT with random weights, joined."""
    import transformers

    if (own / "model").is_dir():
        return own / "model"
    own.mkdir(parents=True, exist_ok=True)
    tokenizer = build_toy_tokenizer()
    vision = transformers.SiglipVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=2 * TOWER_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=FRAME_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.VisionTextDualEncoderModel(config)
    partial = Path(tempfile.mkdtemp(prefix="_model.", dir=own))
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    processor = transformers.SiglipImageProcessor(size={"height": FRAME_SIZE, "width": FRAME_SIZE})
    processor.save_pretrained(partial)
    os.replace(partial, own / "model")
    return own / "model"


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def tower_fingerprints(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Hash of the weights of each tower among `names`, for the record of a run."""
    towers = [name for name in names if name in TOWERS]
    return {name: _load(str((Path(folder) / _slug(name) / "model").resolve()))[0].spec.fingerprint for name in towers}
