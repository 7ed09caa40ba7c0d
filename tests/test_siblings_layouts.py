"""Frames written without tokens of their own for `<FRAME>` or `<LINE>`: the ids still tell every grid."""

import itertools

import pytest
import torch

from elva_hf import geometry_elva as geo
from elva_hf.errors_elva import PlaceholderError
from elva_hf.frames_elva import count_video_tokens
from elva_hf.layout_elva import FrameLayout
from elva_hf.placeholders_elva import VisualTokens

KINDS = {"t": geo.TEXT, "s": geo.VIDEO_START, "e": geo.VIDEO_END, ".": geo.PATCH, "F": geo.FRAME, "L": geo.LINE}
LAYOUTS = [FrameLayout(*flags) for flags in itertools.product((True, False), repeat=2)]
SAMPLES = (
    ["tt", [(2, 3), (2, 3), (1, 1)], "t"],
    [[(1, 4)], "t", [(4, 1), (1, 2)], [(2, 1)]],
    ["ttt"],
    [[(2, 1), (2, 1), (3, 2)]],
)
BY_PLACE = ("patch_frame", "patch_line", "patch_row", "patch_column", "patch_video")
BY_FRAME = ("line_frame", "frame_rows", "frame_columns")


def write(sample, layout):
    """A sample as one letter for each token; a list of grids is a video."""
    return "".join(
        part if isinstance(part, str) else "s" + "".join(layout.write(grid, "F", "L", ".") for grid in part) + "e"
        for part in sample
    )


def kinds_of(layout, side="left"):
    """`(B, N)` kinds and mask of SAMPLES."""
    texts = [write(sample, layout) for sample in SAMPLES]
    longest = max(map(len, texts))
    pad = str.rjust if side == "left" else str.ljust
    rows = [pad(text, longest, "#") for text in texts]
    kinds = torch.tensor([[KINDS.get(letter, geo.TEXT) for letter in row] for row in rows])
    return kinds, torch.tensor([[int(letter != "#") for letter in row] for row in rows])


def test_the_ways_to_write_a_frame():
    written = [layout.write((2, 3), "F", "L", ".") for layout in LAYOUTS]
    assert written == ["F...L...L", "FL..L..", "F..L...L", "F..L.."]
    assert [layout.count((2, 3)) for layout in LAYOUTS] == [len(text) for text in written]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_geometry_of_the_full_one(layout, side):
    full = geo.read_geometry(*kinds_of(FrameLayout(), side))
    kinds, mask = kinds_of(layout, side)
    read = geo.read_geometry(kinds, mask, layout)
    for name in (*BY_PLACE, *BY_FRAME):
        assert torch.equal(getattr(read, name), getattr(full, name)), name
    assert torch.equal(read.patch_index, geo.find_patches(kinds, layout).flatten().nonzero()[:, 0])
    frames, lines = ((kinds == kind).flatten().nonzero()[:, 0] for kind in (geo.FRAME, geo.LINE))
    assert torch.equal(read.frame_index, frames if layout.frame_token else frames[:0])
    assert torch.equal(read.line_index, lines if layout.line_token else lines[:0])
    assert torch.equal(read.valid, mask.bool()) and read.tube_ids.shape == kinds.shape
    for ours, theirs in ((read.tubes(), full.tubes()), (read.tubes(window=2), full.tubes(window=2))):
        assert (ours.patches, ours.floors, ours.samples) == (theirs.patches, theirs.floors, theirs.samples)
        for name in ("ids", "groups"):
            assert torch.equal(
                getattr(ours, name).flatten()[read.patch_index], getattr(theirs, name).flatten()[full.patch_index]
            )
    own = read.tube_ids.flatten()
    assert own.unique().numel() == own.numel() - (
        read.num_patches - full.tube_ids.flatten()[full.patch_index].unique().numel()
    )
    numbers = read.frame_numbers.flatten()
    assert torch.equal(numbers[read.patch_index], full.frame_numbers.flatten()[full.patch_index])
    visual = torch.isin(kinds, torch.tensor([geo.PATCH, geo.FRAME, geo.LINE])).flatten()
    assert torch.equal(numbers >= 0, visual)


@pytest.mark.parametrize(
    "layout, text, position",
    [
        (FrameLayout(True, False), "tsFL.tL.e", 2),
        (FrameLayout(True, False), "tsFL.L..e", 2),
        (FrameLayout(True, False), "tFL.L.", 1),
        (FrameLayout(False, False), "tsL.e", 2),
        (FrameLayout(False, False), "sF.L..e", 1),
        (FrameLayout(False, True), "sF.L..L.e", 1),
    ],
)
def test_a_frame_that_is_cut_or_ragged_is_refused_where_it_stands(layout, text, position):
    kinds = torch.tensor([[KINDS["t"]] * len(text), [KINDS[letter] for letter in text]])
    with pytest.raises(PlaceholderError, match=f"sample 1, token {position}: a visual token stands outside"):
        geo.read_geometry(kinds, None, layout)


def test_text_alone_has_no_geometry_in_any_layout():
    assert all(geo.read_geometry(torch.zeros(2, 5, dtype=torch.long), None, layout) is None for layout in LAYOUTS)


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_of_a_video_has_the_tokens_counted(layout, chunk_size):
    """A chunk of frames is written once; the last may be short."""
    layout = layout._replace(chunk_size=chunk_size)
    tokens = VisualTokens(".", "I", "F", "L", "s", "e", layout)
    grids = 7 * [(2, 3)]
    text = tokens.expand(grids)
    assert len(text) == count_video_tokens(grids, layout=layout) == 2 + -(-7 // chunk_size) * layout.count((2, 3))
    assert len(tokens.expand(grids, [f"{i}" for i in range(7)])) == len(text) + -(-7 // chunk_size)
