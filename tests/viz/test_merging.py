"""Pictures of hand-made merge maps: every patch in its place, every colour and number what the map says."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from elva_hf.errors_elva import ElvaError
from elva_hf.layout_elva import FrameLayout
from elva_hf.merging_elva import MergeMap
from elva_hf.video_processing_elva import normalize, patchify
from elva_hf.viz import merging as viz

GRIDS = ((2, 3), (1, 2), (2, 3), (1, 2), (2, 3))  # high and low resolution by turns
HEADINGS = (
    "input frames one token stands for",
    "tokens entering each layer",
    "patches of each frame, by what became of them",
)
RED, WHITE = (200, 20, 30), (255, 255, 255)


def positions(grids, before):
    """Frame and place of every patch -> its position, and the frame of every visual token."""
    place, frame_of = {}, [-1] * before
    for frame, (rows, columns) in enumerate(grids):
        frame_of.append(frame)
        for row in range(rows):
            for column in range(columns):
                place[frame, row, column] = len(frame_of)
                frame_of.append(frame)
            frame_of.append(frame)  # <LINE>
    return place, frame_of


def merge_map(grids, *steps, before=4, after=3, padding=0):
    """Steps are `{(frame, row, column): frame that holds its token}`, cumulative as in the real map."""
    place, frame_of = positions(grids, before)
    frame_of = [-1] * padding + frame_of + [-1] * after
    survivors = []
    for merged in steps:
        row = [-1] * padding + list(range(padding, len(frame_of)))
        for (frame, *where), heir in merged.items():
            row[place[frame, *where] + padding] = place[heir, *where] + padding
        survivors.append(torch.tensor([row]))
    return MergeMap(tuple(range(1, len(steps) + 1)), tuple(survivors), torch.tensor([frame_of]))


RUNS = {(0, 0, 0): 2, (0, 1, 2): 4, (2, 1, 2): 4, (1, 0, 1): 3}


def test_fates_say_who_stands_for_each_patch():
    fates = viz.read_fates(merge_map(GRIDS, RUNS), GRIDS)
    assert [fate.sizes.tolist() for fate in fates] == [
        [[2, 1, 1], [1, 1, 3]],
        [[1, 2]],
        [[2, 1, 1], [1, 1, 3]],
        [[1, 2]],
        [[1, 1, 1], [1, 1, 3]],
    ]
    assert [fate.shifts.tolist() for fate in fates] == [
        [[2, 0, 0], [0, 0, 4]],
        [[0, 2]],
        [[0, 0, 0], [0, 0, 2]],
        [[0, 0]],
        [[0, 0, 0], [0, 0, 0]],
    ]
    assert fates[0].kept.tolist() == [[False, True, True], [True, True, False]]


def test_fates_of_a_step_and_of_a_sample():
    one = merge_map(GRIDS, {(0, 0, 0): 2}, RUNS)
    other = merge_map(GRIDS, RUNS, {**RUNS, (2, 0, 1): 4}, after=0, padding=3)
    both = MergeMap(
        (1, 2),
        tuple(torch.cat(rows) for rows in zip(one.survivors, other.survivors, strict=True)),
        torch.cat([one.frame_index, other.frame_index]),
    )

    def num_kept(step, sample):
        return sum(int(fates.kept.sum()) for fates in viz.read_fates(both, GRIDS, step, sample))

    assert [num_kept(step, sample) for sample in (0, 1) for step in (0, 1)] == [21, 18, 18, 17]
    assert [viz.read_fates(both, GRIDS, step)[4].sizes[1, 2] for step in (0, 1)] == [1, 3]


@pytest.mark.parametrize("flags", itertools.product((True, False), repeat=2))
def test_fates_are_the_same_however_a_frame_is_written(flags):
    layout, grids = FrameLayout(*flags), 3 * [(2, 3)]
    patches = {".", *("F" * (not layout.frame_token)), *("L" * (not layout.line_token))}
    written = [(frame, letter) for frame, grid in enumerate(grids) for letter in layout.write(grid, "F", "L", ".")]
    places = [i for i, (_, letter) in enumerate(written) if letter in patches]
    survivors = torch.arange(len(written))
    survivors[places[5]] = survivors[places[11]] = places[17]  # the last patch of each frame
    one = MergeMap((1,), (survivors[None],), torch.tensor([[frame for frame, _ in written]]))
    fates = viz.read_fates(one, grids, layout=layout)
    assert [fate.sizes.tolist() for fate in fates] == 3 * [[[1, 1, 1], [1, 1, 3]]]
    assert [fate.shifts[1, 2] for fate in fates] == [2, 1, 0] and fates[0].kept.sum() == 5


def test_the_grids_of_another_video_are_refused():
    with pytest.raises(ElvaError, match=r"frames of \[9, 4, 9, 4, 9\] tokens.*\[9, 9\]"):
        viz.read_fates(merge_map(GRIDS, RUNS), GRIDS[::2][:2])
    with pytest.raises(ElvaError, match="its own grids"):
        viz.read_fates(MergeMap((1,), (torch.zeros(1, 4).long(),), None), GRIDS)


def test_restored_frames_are_those_the_processor_took():
    generator = np.random.default_rng(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.5)
    frames = [generator.integers(0, 256, (rows * 4, columns * 4, 3), np.uint8) for rows, columns in GRIDS]
    patches = torch.cat([patchify(torch.from_numpy(frame).permute(2, 0, 1), 4) for frame in frames])
    restored = viz.restore_frames(normalize(patches, mean, std), GRIDS, mean, std)
    assert all(np.array_equal(one, other) for one, other in zip(frames, restored, strict=True))


def luminance(color):
    linear = [(value / 255) ** 2.2 for value in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("longest", [2, 3, 8, 64, 100])
def test_longer_runs_are_brighter_so_the_colours_can_be_told_without_hue(longest):
    colors = [viz.run_color(size, longest) for size in range(1, longest + 1)]
    assert (colors[0], colors[-1]) == (viz.RAMP[0], viz.RAMP[-1])
    steps = np.diff([luminance(color) for color in colors])
    assert (steps > 0).all()


def test_a_video_in_which_nothing_merged_has_one_colour():
    assert viz.run_color(1, 1) == viz.RAMP[0]


SIZE = (240, 160)  # 80 pixels a patch of a 2 x 3 grid


def overlay(fates, color=RED):
    frame = np.full((16, 24, 3), color, np.uint8)
    return np.asarray(viz.paint_overlay(frame, fates, SIZE, longest=4)).astype(int)


def fates_of(sizes, shifts):
    return viz.PatchFates(np.array(sizes), np.array(shifts))


def test_a_survivor_keeps_its_colours_and_a_ghost_fades():
    picture = overlay(fates_of([[1, 2, 2], [4, 1, 1]], [[0, 1, 1], [0, 0, 0]]))
    assert picture[40, 40].tolist() == list(RED)
    assert picture[120, 40].tolist() == list(RED)
    ghost = picture[40, 140]
    assert luminance(ghost) < luminance(RED) / 2
    assert np.ptp(ghost) < np.ptp(RED) / 2
    assert luminance(ghost) > luminance(viz.BACKGROUND)


def test_outlines_have_the_colour_of_the_run():
    picture = overlay(fates_of([[1, 2, 2], [4, 1, 1]], [[0, 1, 1], [0, 0, 0]]))
    for (x, y), size in {(40, 0): 1, (0, 40): 1, (0, 120): 4, (40, 159): 4, (239, 120): 1}.items():
        assert picture[y, x].tolist() == list(viz.run_color(size, 4)), (x, y)
    for x, y in ((120, 0), (80, 40), (239, 40), (200, 79)):
        assert picture[y, x].tolist() == list(viz.blend(viz.run_color(2, 4), viz.BACKGROUND, 0.15)), (x, y)


def test_ghosts_whose_tokens_are_in_one_frame_share_an_outline():
    inside, apart = ((2, 2), (1, 1)), ((2, 2), (1, 3))
    for shifts, expected in ((inside, False), (apart, True)):
        picture = overlay(fates_of([[1, *shifts[0]], [1, 1, 1]], [[0, *shifts[1]], [0, 0, 0]]))
        border = picture[20:60, 158:162]
        color = viz.blend(viz.run_color(2, 4), viz.BACKGROUND, 0.15)
        assert (border == color).all(-1).any() == expected


@pytest.fixture
def texts(monkeypatch):
    """All that is written."""
    written = []
    write = viz.write

    def listen(draw, place, text, *args, **kwargs):
        written.append(text)
        write(draw, place, text, *args, **kwargs)

    monkeypatch.setattr(viz, "write", listen)
    return written


def test_numbers_tell_the_run_of_a_survivor_and_the_way_to_it(texts):
    overlay(fates_of([[1, 2, 2], [4, 3, 1]], [[0, 1, 1], [0, -2, 0]]))
    assert sorted(texts) == ["+1", "-2", "4"]


def test_patches_too_small_for_numbers_have_none(texts):
    fates = fates_of(np.full((8, 12), 4), np.arange(8 * 12).reshape(8, 12) % 3)
    overlay(fates)
    assert texts == []


def test_small_frames_stay_sharp_and_large_ones_smooth():
    checks = np.zeros((16, 16, 3), np.uint8)
    checks[::2, ::2] = 255
    assert set(np.unique(viz.enlarge(checks, (160, 160)))) == {0, 255}
    assert len(np.unique(viz.enlarge(checks, (40, 40)))) > 2


def view(grids=GRIDS, runs=RUNS, patch=8, **changes):
    fates = viz.read_fates(merge_map(grids, runs), grids)
    frames = [np.full((rows * patch, columns * patch, 3), RED, np.uint8) for rows, columns in grids]
    patches = sum(rows * columns for rows, columns in grids)
    fields = {
        "frames": frames,
        "fates": fates,
        "captions": [f"{number}.00 s" for number in range(len(grids))],
        "layer_tokens": [patches + 30, patches + 30, patches + 30 - len(runs), patches + 30 - len(runs)],
        "steps": {1: "similarity > 0.6", 2: "keep 50 %"},
        "layer": 2,
        "title": "a clip",
    }
    return viz.MergeView(**{**fields, **changes})


def columns_of(picture, color):
    """Pixels of a colour in each column."""
    return (np.asarray(picture) == color).all(-1).sum(0)


def test_the_layer_plot_has_a_bar_for_each_layer_as_high_as_its_tokens():
    picture = Image.new("RGB", (400, 400))
    tokens = [152, 102, 72, 52]
    grids = ((10, 10), (1, 1))
    viz.draw_layers(ImageDraw.Draw(picture), (0, 0, 400, 400), view(grids, {}, layer_tokens=tokens))
    middles = [16 + round((layer + 0.5) * 368 / 4) for layer in range(4)]
    others, patches = (columns_of(picture, color)[middles] for color in (viz.OTHERS, viz.PATCHES))
    assert len(set(others)) == 1
    assert np.allclose((others + patches) / (others + patches)[0], np.array(tokens) / 152, atol=0.02)
    assert others[0] / (others + patches)[0] == pytest.approx(51 / 152, abs=0.02)


def test_the_layer_plot_marks_the_steps_and_the_tokens_after_them(texts):
    picture = Image.new("RGB", (400, 400))
    viz.draw_layers(ImageDraw.Draw(picture), (0, 0, 400, 400), view(layer_tokens=[52, 40, 31, 31]))
    assert {"52 tokens", "similarity > 0.6: 40", "keep 50 %: 31", "0", "1", "2", "3"} <= set(texts)
    shown, other = 16 + 2 * 368 // 4, 16 + 368 // 4
    assert columns_of(picture, viz.ACCENT)[shown] > 50
    assert columns_of(picture, viz.ACCENT)[other] < 20


def test_the_layer_plot_shows_what_merged_before_the_decoder(texts):
    picture = Image.new("RGB", (400, 400))
    steps = {0: "similarity > 0.8", 2: "keep 50 %"}
    tokens = {"layer_tokens": [92, 92, 72, 72], "merged_before": 60}
    one = view(((10, 10), (1, 1)), {}, **tokens, steps=steps, layer=0)
    viz.draw_layers(ImageDraw.Draw(picture), (0, 0, 400, 400), one)
    assert {"152 tokens", "similarity > 0.8: 92", "keep 50 %: 72"} <= set(texts)
    colors = (viz.OTHERS, viz.PATCHES, viz.RULE)
    heights = np.array([columns_of(picture, color)[16 + round(368 / 8)] for color in colors])
    assert np.allclose(heights / heights.sum(), np.array([51, 41, 60]) / 152, atol=0.02)
    assert one.summary == "101 of 101 patches left (100%) after the merge before the decoder"


def test_the_layer_plot_of_a_deep_model_with_many_steps_fits_its_panel(texts):
    steps = {layer: "keep 90 %" for layer in range(1, 80, 4)}
    deep = view(layer_tokens=[52] * 80, steps=steps)
    picture = Image.new("RGB", (400, 330), RED)
    viz.draw_layers(ImageDraw.Draw(picture), (0, 0, 400, 330), deep)
    labels = [int(text) for text in texts if text.isdigit()]
    assert labels == list(range(0, 80, 8))
    assert columns_of(picture, viz.PATCHES).max() > 20


def test_the_timeline_counts_the_patches_of_each_frame_by_run():
    picture = Image.new("RGB", (560, 256))
    viz.draw_timeline(ImageDraw.Draw(picture), (0, 0, 560, 256), view())
    middles = [16 + round((frame + 0.5) * 528 / 5) for frame in range(5)]
    height = columns_of(picture, viz.run_color(1, 3))[middles[0]] / 4  # of one patch: 4 of the first frame's are alone
    counts = {
        1: [4, 1, 4, 1, 5],
        2: [0, 0, 1, 1, 0],
        3: [0, 0, 0, 0, 1],
    }
    for size, expected in counts.items():
        assert np.allclose(columns_of(picture, viz.run_color(size, 3))[middles] / height, expected, atol=0.1), size
    assert np.allclose(columns_of(picture, viz.RULE)[middles] / height, [2, 1, 1, 0, 0], atol=0.1)


def test_the_timeline_marks_the_frame_of_the_page(texts):
    marked = []
    for number in range(5):
        picture = Image.new("RGB", (560, 256))
        viz.draw_timeline(ImageDraw.Draw(picture), (0, 0, 560, 256), view(), number)
        marked.append(np.flatnonzero(columns_of(picture, viz.INK) > 100).mean())
    assert np.allclose(np.diff(marked), 528 / 5, atol=1)


def test_the_numbers_of_a_long_timeline_keep_apart(texts):
    grids = ((1, 1),) * 64
    picture = Image.new("RGB", (560, 256))
    viz.draw_timeline(ImageDraw.Draw(picture), (0, 0, 560, 256), view(grids, {}), 9)
    numbers = [int(text) for text in texts if text.isdigit()]
    assert 10 in numbers and len(numbers) > 8
    assert min(np.diff(numbers)) * 528 / 64 >= 28


def test_the_legend_names_run_lengths_and_the_side_of_the_survivor(texts):
    first = {(2, 0, 0): 0, (4, 0, 0): 0}
    for runs, side in ((RUNS, "later"), (first, "earlier")):
        texts.clear()
        viz.draw_legend(ImageDraw.Draw(Image.new("RGB", (400, 114))), (0, 0, 400, 114), view(runs=runs))
        assert [text for text in texts if text.isdigit()] == ["1", "2", "3"]
        assert f"merged away; its token is 2 frames {side}" in texts
    for length, expected in ((5, "1 2 3 4 5"), (20, "1 2 4 8 16 20")):
        texts.clear()
        runs = {(frame, 0, 0): length - 1 for frame in range(length - 1)}
        shown = view(((1, 1),) * length, runs)
        viz.draw_legend(ImageDraw.Draw(Image.new("RGB", (400, 114))), (0, 0, 400, 114), shown)
        assert [text for text in texts if text.isdigit()] == expected.split()


def test_the_summary_counts_patches():
    assert view().summary == "18 of 22 patches left (82%) after the merge at layer 2"


@pytest.mark.parametrize(
    "grids", [GRIDS, ((1, 1),), ((3, 1),) * 9, ((1, 7),) * 70], ids=["hybrid", "one", "high", "long"]
)
def test_pages_and_sheets_of_any_video_have_even_sides_and_show_every_frame(grids, texts):
    shown = view(grids, {}, notes=["a question"])
    pages = [viz.draw_page(shown, number) for number in (0, len(grids) - 1)]
    assert len({page.size for page in pages}) == 1
    for side in pages[0].size:
        assert side % 2 == 0
    assert {*HEADINGS, "a clip", "a question", shown.summary, f"frame 1 of {len(grids)}, 0.00 s"} <= set(texts)
    texts.clear()
    sheet = viz.draw_sheet(shown)
    assert {*HEADINGS, "a clip", "a question", shown.summary} <= set(texts)
    assert sheet.width % 2 == sheet.height % 2 == 0
    for number, fates in enumerate(shown.fates):
        assert f"{number + 1} · {number}.00 s" in texts
        assert f"{fates.kept.size}/{fates.kept.size}" in texts


def test_a_page_shows_the_frame_beside_its_overlay():
    grids, runs = ((1, 1),) * 2, {(0, 0, 0): 1}
    shown = view(grids, runs)
    pages = [np.asarray(viz.draw_page(shown, number)) for number in (0, 1)]
    full = [(page == RED).all(-1).sum() for page in pages]
    assert full[0] == 460 * 460  # the frame; its overlay is a ghost
    assert 1.5 * full[0] < full[1] < 2 * full[0]


def test_a_line_too_long_for_its_place_ends_in_dots(texts):
    picture = Image.new("RGB", (600, 40))
    viz.write(ImageDraw.Draw(picture), (0, 5), "a very long name of a clip " * 3, 17, WHITE, width=200)
    used = np.flatnonzero(columns_of(picture, WHITE))
    assert 150 < used.max() <= 200
    viz.write(ImageDraw.Draw(picture), (300, 5), "two\nlines", 17, WHITE, width=200)
    assert 310 < np.flatnonzero(columns_of(picture, WHITE)).max() < 400
    assert not (np.asarray(picture)[27:] == WHITE).all(-1).any()
