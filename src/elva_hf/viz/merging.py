"""Pictures of a merge map: what merged into what, drawn over the frames, and the tokens of each layer beside it.

Colour is run length: how many input frames one token stands for. A patch that keeps its token is drawn in full; one
that merged away is dimmed and carries the outline of what stands for it, with how many frames off that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elva_hf.errors_elva import ElvaError
from elva_hf.frames_elva import FULL_LAYOUT
from elva_hf.layout_elva import FrameLayout

if TYPE_CHECKING:
    from torch import Tensor

    from elva_hf.merging_elva import MergeMap

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, width, height

BACKGROUND, PANEL, RULE = (16, 19, 27), (25, 29, 40), (58, 65, 84)
INK, FAINT, ACCENT = (235, 238, 245), (148, 157, 177), (255, 167, 66)
PATCHES, OTHERS = (158, 176, 214), (74, 83, 106)
RAMP = ((99, 128, 222), (33, 158, 166), (98, 202, 98), (253, 231, 37))  # brighter at each stop, readable without hue
TITLE, TEXT, SMALL = 26, 17, 14
MARGIN, GAP, LEGEND = 28, 20, (400, 114)


@dataclass(frozen=True)
class PatchFates:
    """What became of the patches of one frame.

    Args:
        sizes: `(rows, columns)` run length of the token that stands for each patch.
        shifts: `(rows, columns)` how many frames later that token is; 0 where it is the patch's own.
    """

    sizes: np.ndarray
    shifts: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """`(rows, columns)` bool: the patch still has its token."""
        return self.shifts == 0


@dataclass(frozen=True)
class MergeView:
    """All that a picture shows.

    Args:
        frames: Per frame `(H, W, 3)` uint8, as the model saw it.
        fates: Per frame, what became of its patches.
        captions: Per frame, what to write under it.
        layer_tokens: Tokens entering each layer.
        steps: Layer of each merge step, and what it does in a few words; layer 0 for what merged before the decoder.
        layer: The layer after whose merge `fates` was read.
        title: One line.
        notes: Further lines under the title.
        merged_before: Tokens of the input that do not enter layer 0, as they merged before it.
    """

    frames: Sequence[np.ndarray]
    fates: Sequence[PatchFates]
    captions: Sequence[str]
    layer_tokens: Sequence[int]
    steps: dict[int, str]
    layer: int
    title: str
    notes: Sequence[str] = ()
    merged_before: int = 0

    @property
    def input_tokens(self) -> int:
        """Tokens before any merge."""
        return self.layer_tokens[0] + self.merged_before

    @cached_property
    def num_patches(self) -> int:
        """Patches of all frames."""
        return sum(fates.kept.size for fates in self.fates)

    @cached_property
    def num_kept(self) -> int:
        """Patches that still have a token."""
        return sum(int(fates.kept.sum()) for fates in self.fates)

    @cached_property
    def longest(self) -> int:
        """The longest run."""
        return max(int(fates.sizes.max()) for fates in self.fates)

    @property
    def summary(self) -> str:
        """What is left, in one line."""
        share = self.num_kept / self.num_patches
        where = f"at layer {self.layer}" if self.layer else "before the decoder"
        return f"{self.num_kept} of {self.num_patches} patches left ({share:.0%}) after the merge {where}"


def read_fates(
    merge_map: MergeMap,
    grids: Sequence[tuple[int, int]],
    step: int = -1,
    sample: int = 0,
    layout: FrameLayout = FULL_LAYOUT,
) -> list:
    """What became of every patch of a sample, as `PatchFates` per frame.

    Args:
        merge_map: What `output_merge_map=True` returns.
        grids: Per frame of the sample, or per chunk of frames, rows and columns of patches.
        step: Which merge step, as an index into `merge_map.layers`.
        sample: Row of the batch.
        layout: How a frame is written in tokens.

    Raises:
        ElvaError: The merge map is of other frames.
    """
    frames = merge_map.frame_index
    frames = frames[sample].cpu() if frames is not None else None
    counts = [] if frames is None else frames[frames >= 0].bincount().tolist()
    expected = [layout.count(grid) for grid in grids]
    if counts != expected:
        raise ElvaError(
            f"the merge map has frames of {counts} tokens, and the grids make {expected}; give its own grids."
        )
    survivors, sizes = merge_map.survivors[step][sample].cpu(), merge_map.token_sizes(step)[sample].cpu()
    fates = []
    for number, (rows, columns) in enumerate(grids):
        tokens = (frames == number).nonzero().squeeze(1)
        places = tokens[int(layout.frame_token) :].view(rows, columns + layout.line_token)[:, :columns]
        heirs = survivors[places]  # without the <FRAME> and the <LINE> of each row, where these are no patches
        fates.append(PatchFates(sizes[heirs].numpy(), (frames[heirs] - number).numpy()))
    return fates


def restore_frames(
    patches: Tensor, grids: Sequence[tuple[int, int]], mean: Sequence[float], std: Sequence[float]
) -> list[np.ndarray]:
    """Undo the video processor: the frames as the model sees them.

    Args:
        patches: `(P, 3 * patch_size**2)` of `pixel_values_videos`, all frames in order.
        grids: Per frame, rows and columns of patches.
        mean: Per channel, as in the processor.
        std: Per channel, likewise.

    Returns:
        Per frame `(rows * patch_size, columns * patch_size, 3)` uint8.
    """
    side = math.isqrt(patches.shape[1] // 3)
    colors = patches.float().cpu().numpy().reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    pixels = ((colors * np.array(std) + np.array(mean)) * 255).round().clip(0, 255).astype(np.uint8)
    frames = np.split(pixels, np.cumsum([rows * columns for rows, columns in grids])[:-1])
    return [
        frame.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
        for frame, (rows, columns) in zip(frames, grids, strict=True)
    ]


def run_color(size: int, longest: int) -> Color:
    """Colour of a run length, from blue for 1 to yellow for `longest`, by its logarithm."""
    place = (math.log(size) / math.log(longest) if longest > 1 else 0.0) * (len(RAMP) - 1)
    below = min(int(place), len(RAMP) - 2)
    return blend(RAMP[below], RAMP[below + 1], place - below)


def blend(one: Color, other: Color, share: float) -> Color:
    """`one` with a `share` of `other` in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))


def paint_overlay(frame: np.ndarray, fates: PatchFates, size: tuple[int, int], longest: int) -> Image.Image:
    """A frame with the fates of its patches: own tokens in full, the rest dimmed, outlines in the colour of the run.

    Args:
        frame: `(H, W, 3)` uint8.
        fates: What became of its patches.
        size: Width and height of the picture.
        longest: Run length of the last colour.
    """
    picture = enlarge(frame, size)
    kept = Image.fromarray(fates.kept.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    picture = Image.composite(picture, _dim(picture), kept)
    draw = ImageDraw.Draw(picture)
    for row, column in np.ndindex(fates.sizes.shape):
        if not fates.kept[row, column]:
            _outline_ghost(draw, fates, (row, column), size, longest)
    for row, column in np.ndindex(fates.sizes.shape):
        if fates.kept[row, column]:
            _outline_survivor(draw, fates, (row, column), size, longest)
    return picture


def enlarge(frame: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A frame at another size; the pixels of a very small one stay sharp."""
    picture = Image.fromarray(frame)
    tiny = size[0] >= 4 * picture.width
    return picture.resize(size, Image.Resampling.NEAREST if tiny else Image.Resampling.BICUBIC)


def _dim(picture: Image.Image) -> Image.Image:
    gray = Image.blend(picture, picture.convert("L").convert("RGB"), 0.6)
    return Image.blend(gray, Image.new("RGB", picture.size, BACKGROUND), 0.6)


def _patch_box(shape: tuple[int, int], place: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel of a patch: left, top, right, bottom."""
    (rows, columns), (row, column), (width, height) = shape, place, size
    left, right = round(column * width / columns), round((column + 1) * width / columns) - 1
    return left, round(row * height / rows), right, round((row + 1) * height / rows) - 1


def _outline_survivor(
    draw: ImageDraw.ImageDraw, fates: PatchFates, place: tuple[int, int], size: tuple[int, int], longest: int
) -> None:
    run = int(fates.sizes[place])
    left, top, right, bottom = box = _patch_box(fates.sizes.shape, place, size)
    side = min(right - left, bottom - top)
    color = run_color(run, longest)
    draw.rectangle(box, outline=color, width=max(1, side // (18 if run > 1 else 28)))
    if run > 1 and side >= 30:
        text, height = str(run), _digits(side)
        width = round(font(height).getlength(text)) + height // 2 + 2
        draw.rectangle((right - width, bottom - height - 6, right, bottom), fill=color)
        write(draw, (right - width / 2, bottom - height / 2 - 3), text, height, BACKGROUND, anchor="mm")


def _outline_ghost(
    draw: ImageDraw.ImageDraw, fates: PatchFates, place: tuple[int, int], size: tuple[int, int], longest: int
) -> None:
    """Draw the borders of a ghost with neighbours of another fate: what went together has one outline, one number."""
    left, top, right, bottom = _patch_box(fates.sizes.shape, place, size)
    side = min(right - left, bottom - top)
    color = _ghost_color(int(fates.sizes[place]), longest)
    thick = 2 if side > 24 else 1
    borders = {
        (0, -1): (left, top, left + thick - 1, bottom),
        (0, 1): (right - thick + 1, top, right, bottom),
        (-1, 0): (left, top, right, top + thick - 1),
        (1, 0): (left, bottom - thick + 1, right, bottom),
    }
    apart = [step for step in borders if not _same_fate(fates, place, (place[0] + step[0], place[1] + step[1]))]
    for step in apart:
        draw.rectangle(borders[step], fill=color)
    if side >= 30 and {(0, -1), (-1, 0)} <= set(apart):
        write(draw, (left + side // 12 + 2, top + side // 12 + 1), f"{fates.shifts[place]:+d}", _digits(side), color)


def _ghost_color(size: int, longest: int) -> Color:
    return blend(run_color(size, longest), BACKGROUND, 0.15)


def _digits(side: int) -> int:
    """Height of the number in a patch of so many pixels."""
    return max(11, min(side // 5, 20))


def _same_fate(fates: PatchFates, one: tuple[int, int], other: tuple[int, int]) -> bool:
    inside = 0 <= other[0] < fates.sizes.shape[0] and 0 <= other[1] < fates.sizes.shape[1]
    return inside and fates.shifts[one] == fates.shifts[other] and fates.sizes[one] == fates.sizes[other]


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size=size)


def write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    color: Color,
    *,
    anchor: str = "la",
    width: float = math.inf,
) -> None:
    """Write one line, shortened with dots where it is wider than `width`; line breaks become spaces."""
    face, text = font(size), " ".join(text.split())
    if face.getlength(text) > width:
        while text and face.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    draw.text(place, text, font=face, fill=color, anchor=anchor)


def draw_layers(draw: ImageDraw.ImageDraw, box: Box, view: MergeView) -> None:
    """The per-layer token plot: tokens entering each layer, patches above the others, and the merge steps."""
    left, upper, width, height = _draw_panel(draw, box, "tokens entering each layer")
    top = _draw_entries(draw, (left, upper), ((PATCHES, "patches"), (OTHERS, "text, <FRAME>, <LINE>")))
    marks = [(0, f"{view.input_tokens} tokens")]
    marks += [(layer, f"{text}: {view.layer_tokens[layer]}") for layer, text in sorted(view.steps.items())]
    floor = upper + height - SMALL - 8
    row = min(SMALL + 6, (floor - top) // (2 * len(marks)))  # the bars keep half of the height
    scale = (floor - top - row * len(marks) - 6) / view.input_tokens
    others, slot = view.input_tokens - view.num_patches, width / len(view.layer_tokens)
    bar = max(1, min(round(slot * 0.72), 72))
    every = _label_every(slot)
    for layer, tokens in enumerate(view.layer_tokens):
        x = round(left + (layer + 0.5) * slot - bar / 2)
        split = floor - round(others * scale)
        if layer == 0:  # what merged before it
            _fill(draw, (x, floor - round(view.input_tokens * scale), x + bar, floor), RULE)
        _fill(draw, (x, floor - round(tokens * scale), x + bar, split), PATCHES)
        _fill(draw, (x, split, x + bar, floor), OTHERS)
        if layer % every == 0:
            write(draw, (x + bar / 2, floor + 6), str(layer), SMALL, FAINT, anchor="ma")
    draw.line((left, floor, left + width, floor), fill=RULE)
    for number, (layer, text) in enumerate(marks):
        x, y = round(left + layer * slot), top + number * row
        color = ACCENT if number and layer == view.layer else FAINT
        if layer:
            _draw_dashes(draw, x, y, floor, color)
        to_right = font(SMALL).getlength(text) + 6 <= left + width - x
        write(draw, (x + 6, y) if to_right else (x - 6, y), text, SMALL, color, anchor="la" if to_right else "ra")


def draw_timeline(draw: ImageDraw.ImageDraw, box: Box, view: MergeView, current: int | None = None) -> None:
    """The patches of each frame as a column: those with a token by run length, the dimmed rest above.

    Args:
        draw: Where to draw.
        box: Left, top, width and height.
        view: What to draw.
        current: The frame to mark.
    """
    left, top, width, height = _draw_panel(draw, box, "patches of each frame, by what became of them")
    floor, tallest = top + height - SMALL - 8, height - SMALL - 8
    slot = width / len(view.fates)
    bar = max(1, min(round(slot * 0.8), 72))
    most = max(fates.kept.size for fates in view.fates)
    every = _label_every(slot)
    for number, fates in enumerate(view.fates):
        x = round(left + (number + 0.5) * slot - bar / 2)
        y = floor
        _fill(draw, (x, floor - round(fates.kept.size / most * tallest), x + bar, floor), RULE)
        done = 0
        for size, count in zip(*np.unique(fates.sizes[fates.kept], return_counts=True), strict=True):
            done += int(count)
            upper = floor - round(done / most * tallest)
            _fill(draw, (x, upper, x + bar, y), run_color(int(size), view.longest))
            y = upper
        if number == current:
            draw.rectangle((x - 3, floor - tallest - 3, x + bar + 2, floor + 2), outline=INK, width=2)
        crowded = current is not None and abs(number - current) < every
        if number == current or (number % every == 0 and not crowded):
            color = INK if number == current else FAINT
            write(draw, (x + bar / 2, floor + 7), str(number + 1), SMALL, color, anchor="ma")


def draw_legend(draw: ImageDraw.ImageDraw, box: Box, view: MergeView) -> None:
    """Run lengths and their colours, and what dimmed patches are."""
    left, top, width, _ = _draw_panel(draw, box, "input frames one token stands for")
    powers = {2**power for power in range(view.longest.bit_length())}
    ticks = range(1, view.longest + 1) if view.longest <= 8 else sorted(powers | {view.longest})
    chip = min(64, (width - 4 * (len(ticks) - 1)) // len(ticks))
    for number, size in enumerate(ticks):
        x = left + number * (chip + 4)
        draw.rectangle((x, top, x + chip - 1, top + 21), fill=run_color(size, view.longest))
        write(draw, (x + chip / 2, top + 11), str(size), TEXT, BACKGROUND, anchor="mm")
    later = all(int(fates.shifts.min()) >= 0 for fates in view.fates)
    text, color = "+2" if later else "-2", _ghost_color(view.longest, view.longest)
    y = top + 32
    draw.rectangle((left, y, left + 33, y + 21), fill=BACKGROUND, outline=color, width=2)
    write(draw, (left + 17, y + 11), text, SMALL, color, anchor="mm")
    meaning = f"merged away; its token is 2 frames {'later' if later else 'earlier'}"
    write(draw, (left + 42, y + 3), meaning, SMALL, FAINT, width=width - 42)


def _fill(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: Color) -> None:
    """Fill from left and top up to, and without, right and bottom; Pillow refuses what is empty."""
    left, top, right, bottom = box
    if left < right and top < bottom:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=color)


def _label_every(slot: float) -> int:
    """Every how many bars a number has room, a power of two."""
    return 2 ** max(0, math.ceil(math.log2(28 / slot)))


def _draw_panel(draw: ImageDraw.ImageDraw, box: Box, title: str) -> Box:
    """A panel with a title; returns the box inside."""
    left, top, width, height = box
    draw.rounded_rectangle((left, top, left + width - 1, top + height - 1), radius=10, fill=PANEL)
    write(draw, (left + 16, top + 11), title, TEXT, INK)
    return left + 16, top + 44, width - 32, height - 56


def _draw_entries(draw: ImageDraw.ImageDraw, corner: tuple[int, int], entries: Sequence[tuple[Color, str]]) -> int:
    """Colours and their names in one row that starts at `corner`; returns where the next row starts."""
    x, y = corner
    for color, name in entries:
        draw.rectangle((x, y + 1, x + 11, y + 12), fill=color)
        write(draw, (x + 18, y), name, SMALL, FAINT)
        x += round(font(SMALL).getlength(name)) + 36
    return y + SMALL + 14


def _draw_dashes(draw: ImageDraw.ImageDraw, x: int, top: int, bottom: int, color: Color) -> None:
    for y in range(top, bottom, 8):
        draw.line((x, y, x, min(y + 4, bottom)), fill=color, width=1)


def draw_page(view: MergeView, number: int) -> Image.Image:
    """One frame of the film: the frame, the merge map over it, the plots; both sides are even."""
    width, height = _fit_area(view, 460 * 460)
    side, middle, strip = 400, max(height + 28, 330), 150
    head = _head_height(view)
    inner = 2 * width + 2 * GAP + side
    page = Image.new("RGB", _even(2 * MARGIN + inner, head + middle + GAP + strip + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(page)
    _draw_head(draw, inner, view)
    frame, fates = view.frames[number], view.fates[number]
    names = (
        ", ".join(filter(None, (f"frame {number + 1} of {len(view.frames)}", view.captions[number]))),
        f"{fates.kept.sum()} of {fates.kept.size} patches still have a token",
    )
    pictures = (enlarge(frame, (width, height)), paint_overlay(frame, fates, (width, height), view.longest))
    for place, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x = MARGIN + place * (width + GAP)
        write(draw, (x, head), name, TEXT, FAINT, width=width)
        page.paste(picture, (x, head + 28))
    draw_layers(draw, (MARGIN + 2 * (width + GAP), head, side, middle), view)
    draw_timeline(draw, (MARGIN, head + middle + GAP, inner, strip), view, number)
    return page


def draw_sheet(view: MergeView) -> Image.Image:
    """All frames with the merge map over them, and the plots below."""
    inner, plots, count = 1560, 320, len(view.frames)
    aspect = view.frames[0].shape[1] / view.frames[0].shape[0]
    columns = min(count, max(4, math.ceil(math.sqrt(count * 1.8 / aspect))), 12)
    width = min((inner - GAP * (columns - 1)) // columns, 440)
    height = round(width / aspect)
    head, cell = _head_height(view), height + 34
    top = head + math.ceil(count / columns) * (cell + GAP)
    page = Image.new("RGB", _even(2 * MARGIN + inner, top + plots + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(page)
    _draw_head(draw, inner, view)
    for number, (frame, fates) in enumerate(zip(view.frames, view.fates, strict=True)):
        x, y = MARGIN + number % columns * (width + GAP), head + number // columns * (cell + GAP)
        page.paste(paint_overlay(frame, fates, (width, height), view.longest), (x, y))
        caption = " · ".join(filter(None, (str(number + 1), view.captions[number])))
        write(draw, (x, y + height + 8), caption, SMALL, FAINT)
        write(draw, (x + width, y + height + 8), f"{fates.kept.sum()}/{fates.kept.size}", SMALL, INK, anchor="ra")
    draw_layers(draw, (MARGIN, top, 600, plots), view)
    draw_timeline(draw, (MARGIN + 600 + GAP, top, inner - 600 - GAP, plots), view)
    return page


def _fit_area(view: MergeView, area: int) -> tuple[int, int]:
    """Width and height of about `area` pixels in the shape of the frames."""
    height, width, _ = view.frames[0].shape
    scale = math.sqrt(area / (height * width))
    return round(width * scale), round(height * scale)


def _even(width: int, height: int) -> tuple[int, int]:
    """The next even sides: yuv420p has no others."""
    return width + width % 2, height + height % 2


def _head_height(view: MergeView) -> int:
    return MARGIN + max(LEGEND[1], 64 + 26 * len(view.notes)) + GAP


def _draw_head(draw: ImageDraw.ImageDraw, inner: int, view: MergeView) -> None:
    """Title, what is left and notes; the legend on the right."""
    width = inner - LEGEND[0] - GAP
    write(draw, (MARGIN, MARGIN), view.title, TITLE, INK, width=width)
    write(draw, (MARGIN, MARGIN + 38), view.summary, TEXT + 2, ACCENT, width=width)
    for row, note in enumerate(view.notes):
        write(draw, (MARGIN, MARGIN + 68 + 26 * row), note, TEXT, FAINT, width=width)
    draw_legend(draw, (MARGIN + inner - LEGEND[0], MARGIN, *LEGEND), view)
