"""A procedural world of short labelled videos, small enough to learn on a CPU.

Coloured, textured shapes stand, move or appear on a grid of 4x4 cells; a handwritten digit may lie among them, and one
frame may flash white. Every fact a question asks for is visible in at least two frames (the flash excepted), so no
other event can hide it. A cell is 16 px: one patch of the model and one macroblock of H.264. Objects sit in cells with
a small jitter and their texture keeps its phase on the screen; bars are 4 px wide and change only the luminance, so all
of it survives yuv420p.

    scene = sample_scene(7, split="test")
    frames = render(scene)            # (8, 64, 64, 3) uint8
    for q in questions(scene): ...    # q.task, q.text, q.answer

Scenes are pure functions of split and seed; splits never share a scene, and test and demo digits are never trained on.
"""

import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike, fspath
from typing import Any, BinaryIO, Literal, TypeVar

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from elva_hf.errors_elva import ElvaError

Split = Literal["train", "validation", "test", "demo"]
Choice = TypeVar("Choice")

SPLITS: tuple[str, ...] = ("train", "validation", "test", "demo")
SEEDS_PER_SPLIT = 2**40
FRAME_SIZE = 64
CELL_SIZE = 16
GRID_SIZE = FRAME_SIZE // CELL_SIZE
OBJECT_SIZE = 13
BAR_WIDTH = 4
MIN_EVENT_FRAMES = 6  # shorter scenes are still: an event needs two frames before it and two after

IMAGE_TASKS: tuple[str, ...] = ("color", "shape", "pattern", "where", "count", "digit")
TASKS: tuple[str, ...] = (*IMAGE_TASKS, "motion", "needle", "when", "order", "moving", "rel")

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "green": (40, 190, 60),
    "blue": (65, 95, 250),
    "yellow": (240, 220, 50),
    "purple": (185, 60, 220),
    "cyan": (50, 210, 225),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
PATTERNS: tuple[str, ...] = ("plain", "rows", "columns", "checks")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
MOTIONS: tuple[str, ...] = (*DIRECTIONS, "still")
PLACES: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
NUMBERS: tuple[str, ...] = ("one", "two", "three")
RELATIONS: dict[str, tuple[int, int]] = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
NONE = "none"
STAGGERED_SHARE = 0.5
HELD_OUT_LOOKS: frozenset[tuple[str, str, str]] = frozenset(
    (color, shape, PATTERNS[(i + j) % len(PATTERNS)])
    for i, color in enumerate(COLORS)
    for j, shape in enumerate(SHAPES)
)
"""Colour, shape and pattern of things that no training scene shows: of each coloured shape one pattern in four.

Every pair of the three is seen in training, so what is new is the combination; and a thing is seldom named by more than
one of the three, so no answer to a question's words is ruled out by training.
"""

_ABSENT_SHARE = 0.1  # colour and shape questions about something that is not there
_DIGIT_SHARE = 0.6
_FLASH_SHARE = 0.5
_STILL_SHARE = 0.25


@dataclass(frozen=True)
class SceneObject:
    """One shape: its look, and its cell (row, column) in every frame; it is visible from frame `entry` on."""

    shape: str
    color: str
    pattern: str
    motion: str
    cells: tuple[tuple[int, int], ...]
    entry: int = 0
    jitter: tuple[int, int] = (0, 0)
    brightness: float = 1.0


@dataclass(frozen=True)
class SceneDigit:
    """A handwritten digit: its label, which of the 1797 scikit-learn images it is, and its cell."""

    label: int
    image_index: int
    cell: tuple[int, int]
    jitter: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """Everything about one video; `render` draws it and `questions` asks about it."""

    seed: int
    split: str
    num_frames: int
    single: bool
    objects: tuple[SceneObject, ...]
    digit: SceneDigit | None
    flash_frame: int | None
    background: int

    @property
    def has_events(self) -> bool:
        """Whether the scene is long enough to move, flash and appear."""
        return self.num_frames >= MIN_EVENT_FRAMES

    @property
    def staggered(self) -> bool:
        """Whether objects appear one after the other."""
        return any(thing.entry for thing in self.objects)


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer, one or two words."""

    task: str
    text: str
    answer: str


# Sampling. Only `random()` of the standard generator is used: its stream is promised never to change.


def _generator(seed: int, split: str, purpose: str) -> random.Random:
    if split not in SPLITS:
        raise ElvaError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise ElvaError(f"seed {seed} is outside its split; use 0 <= seed < {SEEDS_PER_SPLIT}")
    stream = 2 * (SPLITS.index(split) * SEEDS_PER_SPLIT + seed) + (purpose == "questions")
    return random.Random(stream)


def _pick(rng: random.Random, options: Sequence[Choice]) -> Choice:
    return options[int(rng.random() * len(options))]


def _pick_distinct(rng: random.Random, options: Sequence[Choice], count: int) -> list[Choice]:
    rest = list(options)
    return [rest.pop(int(rng.random() * len(rest))) for _ in range(count)]


def sample_scene(
    seed: int,
    *,
    num_frames: int = 8,
    split: Split = "train",
    max_objects: int = 3,
    single: bool = False,
    staggered_share: float = STAGGERED_SHARE,
) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: Any integer from 0 below `SEEDS_PER_SPLIT`; each split has its own scenes.
        num_frames: 1 for an image. From `MIN_EVENT_FRAMES` on things move, appear and flash; shorter videos are still.
        split: One of `SPLITS`. Validation digits differ from training ones, test and demo digits from both.
        max_objects: 1 to 3; the number of shapes is uniform from 1 to this.
        single: Exactly one shape, and no `count` question.
        staggered_share: Share of clips with several shapes in which these appear one after the other.
    """
    if num_frames < 1 or not 1 <= max_objects <= len(NUMBERS):
        raise ElvaError(
            f"num_frames={num_frames}, max_objects={max_objects}; use num_frames >= 1 and 1 <= max_objects <= 3"
        )
    rng = _generator(seed, split, "scene")
    count = 1 if single else 1 + int(rng.random() * max_objects)
    has_events = num_frames >= MIN_EVENT_FRAMES
    free = {(row, column) for row in range(GRID_SIZE) for column in range(GRID_SIZE)}
    staggered = has_events and count > 1 and rng.random() < staggered_share
    entries = _entry_frames(rng, count, num_frames) if staggered else [0] * count
    objects = []
    for shape, color, entry in zip(
        _pick_distinct(rng, SHAPES, count), _pick_distinct(rng, tuple(COLORS), count), entries, strict=True
    ):
        motion = _pick_motion(rng) if has_events and not staggered else "still"
        motion, cells = _pick_path(rng, motion, num_frames, free)
        jitter = (int(rng.random() * 4) - 1, int(rng.random() * 4) - 1)
        brightness = 0.88 + 0.12 * rng.random()
        pattern = _pick(rng, PATTERNS)
        if split == "train" and (color, shape, pattern) in HELD_OUT_LOOKS:  # drawn of the seed: the stream goes on
            pattern = PATTERNS[(PATTERNS.index(pattern) + 1 + seed % (len(PATTERNS) - 1)) % len(PATTERNS)]
        objects.append(SceneObject(shape, color, pattern, motion, cells, entry, jitter, brightness))
    return Scene(
        seed=seed,
        split=split,
        num_frames=num_frames,
        single=single,
        objects=tuple(objects),
        digit=_pick_digit(rng, split, free),
        flash_frame=_pick_flash(rng, num_frames) if has_events else None,
        background=10 + int(rng.random() * 25),
    )


def _entry_frames(rng: random.Random, count: int, num_frames: int) -> list[int]:
    """Frames of appearance, the first 0, in random order, at least two apart and two before the end."""
    entries = [0]
    for later in range(count - 2, -1, -1):
        first, last = entries[-1] + 2, num_frames - 2 - 2 * later
        entries.append(first + int(rng.random() * (last - first + 1)))
    return _pick_distinct(rng, entries, count)


def _pick_motion(rng: random.Random) -> str:
    return "still" if rng.random() < _STILL_SHARE else _pick(rng, tuple(DIRECTIONS))


def _pick_path(
    rng: random.Random, motion: str, num_frames: int, free: set[tuple[int, int]]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A path over free cells, which it takes; another way, or none, where a crowded grid has no room for this one."""
    others = [direction for direction in DIRECTIONS if direction != motion]
    for way in [] if motion == "still" else [motion, *_pick_distinct(rng, others, len(others))]:
        row_step, column_step = DIRECTIONS[way]
        steps = 2 + int(rng.random() * 2)
        paths = [
            path
            for row, column in sorted(free)
            if free.issuperset(path := [(row + i * row_step, column + i * column_step) for i in range(steps + 1)])
        ]
        if paths:
            path = _pick(rng, paths)
            free.difference_update(path)
            return way, tuple(path[i] for i in _step_counts(rng, steps, num_frames))
    cell = _pick(rng, sorted(free))
    free.remove(cell)
    return "still", (cell,) * num_frames


def _step_counts(rng: random.Random, steps: int, num_frames: int) -> list[int]:
    """How many steps are done in each frame: none in the first two frames, all in the last two."""
    longest = (num_frames - 4) // max(steps - 1, 1)
    interval = min(1 + int(rng.random() * 2), longest)
    start = 2 + int(rng.random() * (num_frames - 3 - (steps - 1) * interval))
    return [min(max((frame - start) // interval + 1, 0), steps) for frame in range(num_frames)]


def _pick_digit(rng: random.Random, split: str, free: set[tuple[int, int]]) -> SceneDigit | None:
    if rng.random() >= _DIGIT_SHARE:
        return None
    label = int(rng.random() * 10)
    image_index = _pick(rng, digit_indices(split)[label])
    jitter = (int(rng.random() * 3) - 1, int(rng.random() * 3) - 1)
    return SceneDigit(label, image_index, _pick(rng, sorted(free)), jitter)


def _pick_flash(rng: random.Random, num_frames: int) -> int | None:
    """The flashing frame: in the first or the last three eighths, never in between."""
    if rng.random() >= _FLASH_SHARE:
        return None
    offset = int(rng.random() * (3 * num_frames // 8))
    return offset if rng.random() < 0.5 else num_frames - 1 - offset


# Drawing


@lru_cache(maxsize=1)
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The `(1797, 16, 16)` uint8 digit images, each pixel doubled, and their `(1797,)` labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ElvaError(
            "the toy world draws scikit-learn's handwritten digits, and scikit-learn is not installed; "
            'run: pip install "elva-hf[train]"'
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = np.minimum(images.reshape(-1, 8, 8) * 16, 255).astype(np.uint8)
    return images.repeat(2, axis=1).repeat(2, axis=2), labels


@lru_cache(maxsize=len(SPLITS))
def digit_indices(split: str) -> tuple[tuple[int, ...], ...]:
    """Indices of a split's digit images by label: of every twelve images one validates and two test."""
    labels = digit_images()[1]
    residues = {"validation": {3}, "test": {0, 6}, "demo": {0, 6}}.get(split, set(range(12)) - {0, 3, 6})
    kept = [index for index in range(len(labels)) if index % 12 in residues]
    return tuple(tuple(index for index in kept if labels[index] == label) for label in range(10))


@lru_cache(maxsize=1)
def _shape_masks() -> dict[str, np.ndarray]:
    """A `(OBJECT_SIZE, OBJECT_SIZE)` bool mask per shape."""
    y, x = np.mgrid[:OBJECT_SIZE, :OBJECT_SIZE] - OBJECT_SIZE // 2
    radius = np.hypot(y, x)
    return {
        "circle": radius < 6.6,
        "square": np.maximum(abs(y), abs(x)) <= 5,
        "triangle": abs(x) <= (y + 6) / 2,
        "cross": np.minimum(abs(y), abs(x)) <= 2,
        "ring": (radius < 6.6) & (radius > 3),
    }


@lru_cache(maxsize=1)
def _luminances() -> dict[str, np.ndarray]:
    """A `(CELL_SIZE, CELL_SIZE)` brightness map per pattern, the same in every cell of the screen."""
    y, x = np.mgrid[:CELL_SIZE, :CELL_SIZE] // BAR_WIDTH % 2
    dark = {"plain": 0 * y, "rows": y, "columns": x, "checks": y ^ x}
    return {pattern: np.where(mask, 0.5, 1.0) for pattern, mask in dark.items()}


def render(scene: Scene, colors: Mapping[str, tuple[int, int, int]] = COLORS) -> np.ndarray:
    """Draw a scene as `(T, 64, 64, 3)` uint8 frames, RGB; `colors` may know more than the world does."""
    noise = np.random.Generator(np.random.PCG64(scene.seed))
    shape = (scene.num_frames, FRAME_SIZE, FRAME_SIZE)
    grain = noise.integers(0, 7, shape[1:], dtype=np.uint8) + noise.integers(0, 4, shape, dtype=np.uint8)
    frames = np.repeat((grain + np.uint8(scene.background))[..., None], 3, axis=-1)
    if scene.digit is not None:
        _draw_digit(frames, scene.digit)
    for thing in scene.objects:
        _draw_object(frames, thing, colors)
    if scene.flash_frame is not None:
        frames[scene.flash_frame] = 255
    return frames


def _draw_digit(frames: np.ndarray, digit: SceneDigit) -> None:
    image = digit_images()[0][digit.image_index]
    top, left = (CELL_SIZE * place + offset for place, offset in zip(digit.cell, digit.jitter, strict=True))
    rows, columns = (slice(max(start, 0), min(start + CELL_SIZE, FRAME_SIZE)) for start in (top, left))
    image = image[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    np.maximum(frames[:, rows, columns], image, out=frames[:, rows, columns])


def _draw_object(frames: np.ndarray, thing: SceneObject, colors: Mapping[str, tuple[int, int, int]] = COLORS) -> None:
    mask = _shape_masks()[thing.shape]
    top, left = thing.jitter[0] + 1, thing.jitter[1] + 1
    luminance = _luminances()[thing.pattern][top : top + OBJECT_SIZE, left : left + OBJECT_SIZE]
    pixels = luminance[mask][:, None] * (thing.brightness * np.array(colors[thing.color]))
    pixels = pixels.astype(np.uint8)
    for frame in range(thing.entry, len(frames)):
        y, x = CELL_SIZE * thing.cells[frame][0] + top, CELL_SIZE * thing.cells[frame][1] + left
        frames[frame, y : y + OBJECT_SIZE, x : x + OBJECT_SIZE][mask] = pixels


# Asking


def questions(scene: Scene) -> list[Question]:
    """Every kind of question a scene can be asked, task by task; the wording is drawn from the scene's seed.

    An image is asked `IMAGE_TASKS` only. Where the thing asked for can be absent, the answer is then "none".
    """
    rng = _generator(scene.seed, scene.split, "questions")
    asked = [*_ask_looks(rng, scene), *_ask_places(rng, scene)]
    if not scene.single:
        asked.append(Question("count", "How many shapes are there?", NUMBERS[len(scene.objects) - 1]))
    asked.append(Question("digit", "What digit is shown?", NONE if scene.digit is None else str(scene.digit.label)))
    if scene.has_events:
        asked += [
            *_ask_flash(rng, scene),
            *_ask_motion(rng, scene),
            *_ask_order(rng, scene),
            *_ask_relation(rng, scene),
        ]
    return asked


def _name(rng: random.Random, thing: SceneObject) -> str:
    return _pick(rng, (f"the {thing.shape}", f"the {thing.color} shape", f"the {thing.color} {thing.shape}"))


def _ask_looks(rng: random.Random, scene: Scene) -> Iterable[Question]:
    for thing in scene.objects:
        yield Question("color", f"What color is the {thing.shape}?", thing.color)
        yield Question("shape", f"What shape is {thing.color}?", thing.shape)
        yield Question("pattern", f"What pattern is on {_name(rng, thing)}?", thing.pattern)
    if rng.random() < _ABSENT_SHARE * len(scene.objects):
        shape = _pick(rng, sorted(set(SHAPES) - {thing.shape for thing in scene.objects}))
        yield Question("color", f"What color is the {shape}?", NONE)
    if rng.random() < _ABSENT_SHARE * len(scene.objects):
        color = _pick(rng, sorted(set(COLORS) - {thing.color for thing in scene.objects}))
        yield Question("shape", f"What shape is {color}?", NONE)


def place_name(cell: tuple[int, int]) -> str:
    """The quarter of the screen that a cell (row, column) lies in."""
    return PLACES[2 * (cell[0] >= GRID_SIZE // 2) + (cell[1] >= GRID_SIZE // 2)]


def _ask_places(rng: random.Random, scene: Scene) -> Iterable[Question]:
    for thing in scene.objects:
        endings = [("", -1)] if thing.motion == "still" else []
        if scene.has_events:
            endings += [(" at the end", -1)] + [(" at the start", 0)] * (thing.entry == 0)
        ending, frame = _pick(rng, endings)
        yield Question("where", f"Where is {_name(rng, thing)}{ending}?", place_name(thing.cells[frame]))


def _ask_flash(rng: random.Random, scene: Scene) -> Iterable[Question]:
    flash = scene.flash_frame
    yield Question("needle", "Is there a white flash?", "no" if flash is None else "yes")
    if flash is not None or rng.random() < 1 / 3:  # else "none" would outnumber both other answers
        answer = NONE if flash is None else "early" if 2 * flash < scene.num_frames else "late"
        yield Question("when", "Does the flash come early or late?", answer)


def _ask_motion(rng: random.Random, scene: Scene) -> Iterable[Question]:
    if scene.staggered:
        return
    for thing in scene.objects:
        yield Question("motion", f"Which way does {_name(rng, thing)} move?", thing.motion)
        still = thing.motion == "still"
        if still or rng.random() < _STILL_SHARE / (1 - _STILL_SHARE):  # "yes" as often as "no"
            yield Question("moving", f"Does {_name(rng, thing)} move?", "no" if still else "yes")


def _ask_order(rng: random.Random, scene: Scene) -> Iterable[Question]:
    if not scene.staggered:
        return
    for word, pick in (("first", min), ("last", max)):
        thing = pick(scene.objects, key=lambda candidate: candidate.entry)
        kind = _pick(rng, ("color", "shape"))
        yield Question("order", f"What {kind} appears {word}?", getattr(thing, kind))


def _ask_relation(rng: random.Random, scene: Scene) -> Iterable[Question]:
    still = [thing for thing in scene.objects if thing.motion == "still"]
    if len(still) < 2:
        return
    one, other = _pick_distinct(rng, still, 2)
    differing = [
        (words, sign * (one.cells[0][axis] - other.cells[0][axis]))
        for words, (axis, sign) in RELATIONS.items()
        if one.cells[0][axis] != other.cells[0][axis]
    ]
    words, distance = _pick(rng, differing)
    yield Question("rel", f"Is the {one.shape} {words} the {other.shape}?", "yes" if distance > 0 else "no")


def vocabulary() -> tuple[list[str], list[str]]:
    """All words the world answers with, and all words it asks with, each sorted and without punctuation."""
    answers = [*COLORS, *SHAPES, *PATTERNS, *MOTIONS, *NUMBERS, NONE, "yes", "no", "early", "late", *"0123456789"]
    answers += [word for place in PLACES for word in place.split()]
    asked = (
        "What color is the shape pattern on Where at end start How many shapes are there digit shown Is a white flash "
        "Does come early or late Which way does move appears first last left of right above below"
    )
    return sorted(set(answers)), sorted({*asked.split(), *COLORS, *SHAPES})


def blind_optimum(train: Iterable[Scene], test: Iterable[Scene]) -> dict[str, float]:
    """Accuracy per task of the best answerer that never looks: the commonest answer to each question string.

    Args:
        train: Scenes the answers are counted on.
        test: Scenes they are scored on; a question never counted is answered wrong.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in train:
        for question in questions(scene):
            counts[question.text][question.answer] += 1
    constant = {text: answers.most_common(1)[0][0] for text, answers in counts.items()}
    right: dict[str, list[bool]] = defaultdict(list)
    for scene in test:
        for question in questions(scene):
            right[question.task].append(constant.get(question.text) == question.answer)
    return {task: sum(right[task]) / len(right[task]) for task in TASKS if right[task]}


# Encoding


def write_mp4(frames: np.ndarray, path: str | PathLike[str], fps: int = 4, *, crf: int = 16) -> None:
    """Write `(T, H, W, 3)` uint8 frames as an H.264 mp4 in yuv420p; the same frames give the same bytes.

    Args:
        frames: RGB, sides even.
        path: Where to write.
        fps: Frames per second.
        crf: x264's quality, 0 (lossless) to 51; 16 keeps every texture of this world.
    """
    _encode(frames, fspath(path), fps, crf)


def through_codec(frames: np.ndarray, *, fps: int = 4, crf: int = 16) -> np.ndarray:
    """The frames as an mp4 gives them back: encoded in memory as `write_mp4` does, then decoded.

    Args:
        frames: `(T, H, W, 3)` uint8, RGB, sides even.
        fps: Frames per second.
        crf: x264's quality, 0 (lossless) to 51.

    Returns:
        `(T, H, W, 3)` uint8.
    """
    buffer = io.BytesIO()
    _encode(frames, buffer, fps, crf)
    buffer.seek(0)
    reformatter = VideoReformatter()
    with av.open(buffer) as container:
        container.streams.video[0].thread_count = 1
        decoded = (reformatter.reformat(frame, format="rgb24") for frame in container.decode(video=0))
        return np.stack([frame.to_ndarray() for frame in decoded])


def _encode(frames: np.ndarray, target: str | BinaryIO, fps: int, crf: int) -> None:
    # The fastest preset: these clips are tiny, and one reformatter for all frames saves a third of the time.
    options = {"crf": str(crf), "preset": "ultrafast", "tune": "zerolatency", "threads": "1"}
    reformatter = VideoReformatter()
    with av.open(target, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(reformatter.reformat(picture, format="yuv420p")))
        container.mux(stream.encode())
