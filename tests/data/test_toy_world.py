"""The toy world: its answers are checked by an observer that sees only pixels, raw and after the codec."""

import re
import sys
from collections import Counter, defaultdict

import av
import numpy as np
import pytest

from elva_hf.data import toy_world
from elva_hf.data.toy_world import (
    COLORS,
    IMAGE_TASKS,
    PATTERNS,
    SHAPES,
    SPLITS,
    TASKS,
    blind_optimum,
    questions,
    render,
    sample_scene,
    through_codec,
    write_mp4,
)
from elva_hf.errors_elva import ElvaError

KINDS = [{}, {"single": True}, {"num_frames": 1}, {"max_objects": 2}, {"num_frames": 16}]


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(seed, split="test") for seed in range(200)]


def cells_by_color(frames: np.ndarray) -> tuple[dict[str, dict[int, tuple[int, int]]], list[int]]:
    """What an observer sees: for each colour its cell in each frame, and the frames that flash."""
    chroma = {name: np.array(value) - np.mean(value) for name, value in COLORS.items()}
    seen: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    flashes = [t for t, frame in enumerate(frames) if frame.min() > 240]
    for t, row, column in np.ndindex(len(frames), 4, 4):
        cell = frames[t, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1, 3).astype(float)
        colored = cell[np.ptp(cell, axis=1) > 60]
        if len(colored) < 20:
            continue
        direction = (colored - colored.mean(1, keepdims=True)).mean(0)
        similarity = {name: direction @ c / np.linalg.norm(c) for name, c in chroma.items()}
        seen[max(similarity, key=similarity.get)][t] = (row, column)
    return seen, flashes


def observed_motion(track: dict[int, tuple[int, int]]) -> str:
    (y0, x0), (y1, x1) = track[min(track)], track[max(track)]
    signs = {(-1, 0): "up", (1, 0): "down", (0, -1): "left", (0, 1): "right", (0, 0): "still"}
    return signs[int(np.sign(y1 - y0)), int(np.sign(x1 - x0))]


def observed_place(cell: tuple[int, int]) -> str:
    return f"{'top' if cell[0] < 2 else 'bottom'} {'left' if cell[1] < 2 else 'right'}"


def expected_answer(question, scene, seen, flashes) -> str | None:
    """The answer from pixels alone; the scene serves only to translate a shape's name into its colour."""
    color_of = {thing.shape: thing.color for thing in scene.objects}
    named = [
        color_of.get(word, word) for word in re.findall(r"\w+", question.text) if word in COLORS or word in color_of
    ]
    track = seen.get(named[0]) if named else None
    by_entry = sorted(seen, key=lambda name: min(seen[name]))
    match question.task:
        case "color":
            return named[0] if named and track else "none"
        case "count":
            return ("one", "two", "three")[len(seen) - 1]
        case "needle":
            return "yes" if flashes else "no"
        case "when":
            return "none" if not flashes else "early" if flashes[0] < scene.num_frames / 2 else "late"
        case "motion":
            return observed_motion(track)
        case "moving":
            return "no" if observed_motion(track) == "still" else "yes"
        case "where":
            return observed_place(track[min(track) if "start" in question.text else max(track)])
        case "order":
            color = by_entry[0 if "first" in question.text else -1]
            return color if "color" in question.text else next(s for s, c in color_of.items() if c == color)
        case "rel":
            (y0, x0), (y1, x1) = (seen[name][max(seen[name])] for name in named)
            true = {"left of": x0 < x1, "right of": x0 > x1, "above": y0 < y1, "below": y0 > y1}
            return "yes" if next(v for k, v in true.items() if k in question.text) else "no"
    return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codec", [False, True])
def test_answers_are_what_an_observer_of_the_pixels_says(kind, codec):
    for seed in range(60):
        scene = sample_scene(seed, split="test", **kind)
        frames = render(scene)
        seen, flashes = cells_by_color(through_codec(frames) if codec else frames)
        for question in questions(scene):
            expected = expected_answer(question, scene, seen, flashes)
            if question.task not in ("shape", "pattern", "digit"):
                assert question.answer == expected, (seed, question)


def test_shapes_patterns_and_digits_are_answered_as_drawn(scenes):
    for scene in scenes:
        by_name = {name: thing for thing in scene.objects for name in (thing.shape, thing.color)}
        for question in questions(scene):
            words = [word for word in re.findall(r"\w+", question.text) if word in COLORS or word in SHAPES]
            if question.task in ("shape", "pattern"):
                thing = by_name.get(words[0])
                assert question.answer == (getattr(thing, question.task) if thing else "none")
            if question.task == "digit":
                label = scene.digit and toy_world.digit_images()[1][scene.digit.image_index]
                assert question.answer == ("none" if scene.digit is None else str(label))


@pytest.mark.parametrize("crf", [16, 23, 28])
def test_looks_survive_the_codec(scenes, crf):
    """Nearest prototype over every shape, pattern and colour; what is seen must be what was drawn."""
    right = []
    for scene in scenes[:60]:
        frames = through_codec(render(scene), crf=crf)
        frame = next(t for t in (7, 6) if t != scene.flash_frame)
        for thing in scene.objects:
            row, column = thing.cells[frame]
            cell = frames[frame, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].astype(float)
            prototypes = draw_prototypes(scene.background, thing.jitter)
            nearest = min(prototypes, key=lambda look: np.square(prototypes[look] - cell).sum())
            right.append(nearest == (thing.shape, thing.pattern, thing.color))
    assert np.mean(right) > 0.99


def draw_prototypes(background: int, jitter: tuple[int, int]) -> dict[tuple[str, str, str], np.ndarray]:
    prototypes = {}
    for look in ((shape, pattern, color) for shape in SHAPES for pattern in PATTERNS for color in COLORS):
        cell = np.full((1, 16, 16, 3), background + 4, np.uint8)
        shape, pattern, color = look
        thing = toy_world.SceneObject(shape, color, pattern, "still", ((0, 0),), jitter=jitter, brightness=0.94)
        toy_world._draw_object(cell, thing)
        prototypes[look] = cell[0].astype(float)
    return prototypes


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_always_gives_the_same_scene_frames_and_questions(kind):
    for seed in (0, 5, 2**40 - 1):
        one, other = (sample_scene(seed, **kind) for _ in range(2))
        assert one == other
        assert questions(one) == questions(other)
        np.testing.assert_array_equal(render(one), render(other))


def test_frames_have_the_promised_shape(scenes):
    assert render(scenes[0]).shape == (8, 64, 64, 3)
    assert render(sample_scene(0, num_frames=1)).shape == (1, 64, 64, 3)
    assert render(scenes[0]).dtype == np.uint8


def test_splits_share_no_scene_and_no_held_out_digit():
    drawn = {split: [sample_scene(seed, split=split) for seed in range(400)] for split in SPLITS}
    looks = {split: {(s.objects, s.digit, s.flash_frame, s.background) for s in drawn[split]} for split in SPLITS}
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            assert not looks[one] & looks[other]
    images = {split: set(sum(toy_world.digit_indices(split), ())) for split in SPLITS}
    assert images["test"] == images["demo"]
    assert not images["train"] & images["test"]
    assert not images["train"] & images["validation"]
    assert not images["validation"] & images["test"]
    assert len(images["train"] | images["validation"] | images["test"]) == 1797


def test_every_event_leaves_two_frames_on_each_side():
    for seed in range(300):
        for num_frames in (6, 8, 11, 16):
            scene = sample_scene(seed, num_frames=num_frames)
            for thing in scene.objects:
                assert thing.cells[0] == thing.cells[1]
                assert thing.cells[-1] == thing.cells[-2]
                assert thing.entry <= num_frames - 2
                assert (thing.cells[0] == thing.cells[-1]) == (thing.motion == "still")
            entries = sorted(thing.entry for thing in scene.objects)
            assert not scene.staggered or min(np.diff(entries)) >= 2
            taken = [set(thing.cells) for thing in scene.objects] + ([{scene.digit.cell}] if scene.digit else [])
            assert sum(map(len, taken)) == len(set().union(*taken))


def test_an_image_is_asked_only_what_an_image_can_show():
    for num_frames in (1, 5):
        asked = {q.task for seed in range(50) for q in questions(sample_scene(seed, num_frames=num_frames))}
        assert asked == set(IMAGE_TASKS)


def test_a_single_object_scene_has_one_object_and_no_count_question():
    single = [sample_scene(seed, single=True) for seed in range(50)]
    assert {len(scene.objects) for scene in single} == {1}
    assert "count" not in {q.task for scene in single for q in questions(scene)}


def test_mixed_scenes_ask_every_task_in_one_or_two_words(scenes):
    asked = [question for scene in scenes for question in questions(scene)]
    assert {question.task for question in asked} == set(TASKS)
    assert all(1 <= len(question.answer.split()) <= 2 for question in asked)
    for scene in scenes:
        texts = [question.text for question in questions(scene)]
        assert len(texts) == len(set(texts))


def test_answering_without_looking_stays_near_chance():
    train, test = (
        [sample_scene(seed, split=split) for seed in range(n)] for split, n in (("train", 4000), ("test", 1500))
    )
    blind = blind_optimum(train, test)
    limits = dict.fromkeys(("color", "shape", "order"), 0.22) | dict.fromkeys(("pattern", "where", "motion"), 0.3)
    limits |= {"count": 0.4, "digit": 0.45, "when": 0.45, "needle": 0.55, "moving": 0.55, "rel": 0.58}
    assert {task for task in TASKS if blind[task] > limits[task]} == set()


def test_the_blind_optimum_is_the_commonest_answer_of_each_question():
    scenes = [sample_scene(seed) for seed in range(200)]
    answers = Counter(q.answer for scene in scenes for q in questions(scene) if q.task == "digit")
    assert blind_optimum(scenes, scenes)["digit"] == answers.most_common(1)[0][1] / 200
    assert blind_optimum([], scenes)["digit"] == 0


def test_an_mp4_gives_back_every_frame_and_the_same_bytes_every_time(tmp_path, scenes):
    frames = render(scenes[0])
    for name in ("a.mp4", "b.mp4"):
        write_mp4(frames, tmp_path / name, fps=4)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 4)
        decoded = list(container.decode(stream))
    assert [frame.time for frame in decoded] == [t / 4 for t in range(8)]
    pixels = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])
    np.testing.assert_array_equal(pixels, through_codec(frames, fps=4))
    assert np.abs(pixels.astype(int) - frames).mean() < 2.5


@pytest.mark.parametrize(
    "arguments", [{"seed": -1}, {"seed": 2**40}, {"split": "dev"}, {"num_frames": 0}, {"max_objects": 4}]
)
def test_impossible_scenes_are_refused_with_a_reason(arguments):
    with pytest.raises(ElvaError, match="use "):
        sample_scene(**({"seed": 0} | arguments))


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ElvaError, match=r"elva-hf\[train\]"):
        toy_world.digit_images.__wrapped__()
