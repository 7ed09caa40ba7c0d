"""Chunks of a video, the size of a frame and the sub-images of an image, as plain numbers (sections 3.3 and 3.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from elva_hf.errors_elva import ConfigurationError

POSITION_UNIT = 1_000_000
"""Parts of a chunk in which positions are counted: whole numbers, which no cast to half precision can round."""


class Box(NamedTuple):
    """A part of an image: pixels from its left and upper edge, width and height."""

    left: int
    top: int
    width: int
    height: int


def fit_size(
    height: int, width: int, *, image_size: int, multiple: int, longest_edge: int | None = None
) -> tuple[int, int]:
    """Choose the size of a frame: its aspect, as many pixels as the tower was trained on, never enlarged (section 3.5).

    Args:
        height: Pixels of the source.
        width: Pixels of the source.
        image_size: Side of the tower's square training images in pixels, R_v.
        multiple: What the sides are rounded to, half up: patches that are pooled into one token, in pixels.
        longest_edge: Most pixels the longer side may have, a multiple of `multiple`; None for no limit.

    Returns:
        `(height, width)`; a side shorter than `multiple` gets that.

    Example:
        >>> fit_size(1080, 1920, image_size=384, multiple=28)
        (280, 504)
    """
    if height < 1 or width < 1:
        raise ConfigurationError(f"a frame of {height}x{width} pixels has no size; both sides must be at least 1.")
    scale = min(1.0, image_size / math.sqrt(height * width))
    if longest_edge is not None:
        scale = min(scale, longest_edge / max(height, width))
    rows, columns = (max(1, math.floor(side * scale / multiple + 0.5)) for side in (height, width))
    return rows * multiple, columns * multiple


def count_chunk_tokens(rows: int, columns: int, pool_size: int = 2) -> int:
    """Tokens of a chunk whose frames have so many rows and columns of patches: n_V / 4 (section 3.3), rounded up.

    Example:
        >>> [count_chunk_tokens(28, 28), count_chunk_tokens(20, 36)]
        [196, 180]
    """
    return math.ceil(rows / pool_size) * math.ceil(columns / pool_size)


def split_chunks(num_frames: int, chunk_frames: int) -> list[int]:
    """Frames of each chunk of a video: `chunk_frames`, and what is left in the last (section 3.3).

    Example:
        >>> split_chunks(40, 16)
        [16, 16, 8]
    """
    full, rest = divmod(num_frames, chunk_frames)
    return [chunk_frames] * full + [rest] * (rest > 0)


def playback_stride(num_frames: int, max_frames: int) -> int:
    """Of a video of so many frames, keep one in how many, so that at most `max_frames` are left (section 3.5).

    Example:
        >>> [playback_stride(frames, 960) for frames in (960, 961, 3000)]
        [1, 2, 4]
    """
    return max(1, math.ceil(num_frames / max_frames))


def place_chunks(times: Sequence[float] | None, num_frames: int, *, chunk_frames: int, fps: float) -> list[int]:
    """Where the chunks of a video are in time, for C-RoPE: from the true time of each one's first frame (section 3.4).

    Args:
        times: Time of each frame in seconds; None where a source has no times: its chunks are then 0, 1, 2, ...
        num_frames: Frames of the video.
        chunk_frames: Frames of a chunk, F.
        fps: Frames per second at which chunks follow one another without a gap.

    Returns:
        Per chunk its distance from the first, in units of `1 / POSITION_UNIT` of a chunk: 0, 1, 2, ... chunks for a
        video at `fps`, 0, a, 2a, ... for one played a times faster. They increase even where times do not.

    Example:
        >>> place_chunks([frame / 2 for frame in range(40)], 40, chunk_frames=16, fps=2)
        [0, 1000000, 2000000]
    """
    firsts = range(0, num_frames, chunk_frames)
    if times is None:
        return [first // chunk_frames * POSITION_UNIT for first in firsts]
    placed: list[int] = []
    for first in firsts:
        position = round((times[first] - times[0]) * fps / chunk_frames * POSITION_UNIT)
        placed.append(max(position, placed[-1] + 1) if placed else 0)
    return placed


def partition_image(height: int, width: int, *, image_size: int, max_sub_images: int | None = None) -> tuple[int, int]:
    """Choose columns and rows of sub-images by Eq. 8: about as many as the image has times the tower's pixels.

    Of N_s - 1, N_s and N_s + 1 sub-images, those from 1 to `max_sub_images` are tried. The comparison is exact; of two
    partitions equally far from the image's aspect, a wide or square image takes more columns and a high one more rows.

    Args:
        height: Pixels of the image.
        width: Pixels of the image.
        image_size: Side of the tower's square training images in pixels, R_v.
        max_sub_images: The most there may be; None for no limit, as in the paper.

    Returns:
        `(columns, rows)`, m* and n*; `(1, 1)` is the whole image.

    Example:
        >>> partition_image(1080, 1920, image_size=384)
        (5, 3)
    """
    if height < 1 or width < 1:
        raise ConfigurationError(f"an image of {height}x{width} pixels has no parts; both sides must be at least 1.")
    ideal = height * width // image_size**2
    most = ideal + 1
    if max_sub_images is not None:
        ideal, most = min(ideal, max_sub_images), max(1, max_sub_images)
    counts = [count for count in (ideal - 1, ideal, ideal + 1) if 1 <= count <= most]
    pairs = [(m, count // m) for count in counts for m in range(1, count + 1) if count % m == 0]

    def distance(pair: tuple[int, int]) -> tuple[Fraction, int]:
        columns, rows = pair
        stretch = Fraction(width * rows, height * columns)  # of a part against a square
        return max(stretch, 1 / stretch), -columns if width >= height else -rows

    return min(pairs, key=distance)


def cut_boxes(height: int, width: int, columns: int, rows: int) -> list[Box]:
    """Cut an image into parts of equal size but for rounding, row by row; one part is the whole image."""
    lefts = [column * width // columns for column in range(columns + 1)]
    tops = [row * height // rows for row in range(rows + 1)]
    return [
        Box(lefts[column], tops[row], lefts[column + 1] - lefts[column], tops[row + 1] - tops[row])
        for row in range(rows)
        for column in range(columns)
    ]


def image_boxes(height: int, width: int, *, image_size: int, max_sub_images: int | None, sub_images: bool) -> list[Box]:
    """What of an image goes through the encoder: the whole as thumbnail, then its sub-images if there are several.

    Args:
        height: Pixels of the image.
        width: Pixels of the image.
        image_size: See `partition_image`.
        max_sub_images: Likewise.
        sub_images: Whether sub-images are taken at all; the paper does from stage 2 on.
    """
    whole = [Box(0, 0, width, height)]
    if not sub_images:
        return whole
    columns, rows = partition_image(height, width, image_size=image_size, max_sub_images=max_sub_images)
    return whole if columns * rows == 1 else whole + cut_boxes(height, width, columns, rows)
