"""Chunks, sizes of frames and sub-images of Mavors, as plain numbers."""

import math

import pytest

from elva_hf.errors_elva import ConfigurationError
from elva_hf.siblings.mavors.chunks_mavors import (
    POSITION_UNIT,
    count_chunk_tokens,
    cut_boxes,
    fit_size,
    image_boxes,
    partition_image,
    place_chunks,
    playback_stride,
    split_chunks,
)

ASPECTS = [  # notes of the lead: aspect, source, resized, tokens of a chunk, of 32 chunks, of 60 chunks
    ((1000, 1000), (392, 392), 196, 6272, 11760),
    ((1600, 1200), (448, 336), 192, 6144, 11520),
    ((1920, 1080), (504, 280), 180, 5760, 10800),
    ((1080, 1920), (280, 504), 180, 5760, 10800),
    ((2520, 1080), (588, 252), 189, 6048, 11340),
    ((2000, 1000), (532, 280), 190, 6080, 11400),
    ((5000, 500), (1204, 112), 172, 5504, 10320),
]

IMAGES = [  # width, height; columns, rows; thumbnail; sub-images; tokens (no cap, as in the paper)
    ((336, 280), (1, 1), (336, 280), None, 120),
    ((640, 480), (1, 1), (448, 336), None, 192),
    ((1000, 1000), (3, 2), (392, 392), (308, 476), 1318),
    ((1920, 1080), (5, 3), (504, 280), (392, 364), 2910),
    ((4032, 3024), (9, 9), (448, 336), (448, 336), 15744),
]


SIZES = [(w, h) for w in range(200, 3001, 20) for h in range(200, 3001, 20) if max(w, h) <= 3 * min(w, h)]


def fit(width, height):
    rows, columns = fit_size(height, width, image_size=384, multiple=28)
    return columns, rows


@pytest.mark.parametrize(("source", "size", "tokens", "window", "full"), ASPECTS)
def test_frames_keep_their_aspect_and_give_the_tokens_of_the_table(source, size, tokens, window, full):
    assert fit(*source) == size
    width, height = size
    chunk = count_chunk_tokens(height // 14, width // 14)
    assert chunk == tokens == (width // 28) * (height // 28)
    assert (32 * chunk, 60 * chunk) == (window, full)


def test_pixels_stay_near_those_the_tower_was_trained_on():
    for width in range(100, 1100, 7):
        for scale in (4, 10):
            if not 1 / scale <= width / 1000 <= scale:
                continue
            columns, rows = fit(4 * width, 4000)
            assert abs(columns * rows / 384**2 - 1) < (0.07 if 0.25 <= width / 1000 <= 4 else 0.12)


def test_nothing_is_enlarged_but_for_rounding():
    assert fit(336, 280) == (336, 280)
    assert fit(100, 60) == (112, 56)
    assert fit(5, 3) == (28, 28)
    with pytest.raises(ConfigurationError, match="0x5"):
        fit_size(0, 5, image_size=384, multiple=28)


def test_an_odd_grid_is_pooled_with_a_ceiling():
    assert count_chunk_tokens(27, 27) == 196


@pytest.mark.parametrize(("size", "partition", "thumbnail", "part", "tokens"), IMAGES)
def test_images_are_cut_as_equation_8_says(size, partition, thumbnail, part, tokens):
    width, height = size
    assert partition_image(height, width, image_size=384) == partition
    boxes = image_boxes(height, width, image_size=384, max_sub_images=None, sub_images=True)
    columns, rows = partition
    assert len(boxes) == (1 if part is None else 1 + columns * rows)
    sizes = [fit(box.width, box.height) for box in boxes]
    assert sizes[0] == thumbnail
    assert part is None or set(sizes[1:]) == {part}
    assert sum(width // 28 * (height // 28) for width, height in sizes) == tokens


def test_the_cap_bounds_the_sub_images():
    boxes = image_boxes(3024, 4032, image_size=384, max_sub_images=9, sub_images=True)
    assert len(boxes) == 10
    assert sum(math.prod(fit(box.width, box.height)) // 784 for box in boxes) == 1920
    for width in range(200, 4000, 170):
        for height in range(200, 4000, 130):
            columns, rows = partition_image(height, width, image_size=384, max_sub_images=9)
            assert 1 <= columns * rows <= 9


def test_ties_go_to_more_columns_for_wide_and_square_images_and_to_more_rows_for_high_ones():
    assert partition_image(1000, 1000, image_size=384) == (3, 2)
    assert partition_image(1001, 1000, image_size=384) == (2, 3)


def candidates(height, width):
    """Of Eq. 8, from its definition: pairs of factors, and how far the aspect of each is from the image's."""
    ideal = height * width // 384**2
    counts = range(max(1, ideal - 1), ideal + 2)
    pairs = [(m, count // m) for count in counts for m in range(1, count + 1) if count % m == 0]
    return {(m, n): abs(math.log(width / height) - math.log(m / n)) for m, n in pairs}


def test_partitions_are_those_of_the_definition_and_ties_are_as_many_as_counted():
    ties = 0
    for width, height in SIZES:
        distances = candidates(height, width)
        least = min(distances.values())
        best = [pair for pair, distance in distances.items() if distance < least + 1e-9]
        chosen = partition_image(height, width, image_size=384)
        assert chosen == max(best, key=lambda pair: pair[0] if width >= height else pair[1])
        ties += len(best) > 1
    assert ties == 95


def test_the_partition_of_an_image_on_its_side_is_on_its_side():
    for width in range(200, 3000, 130):
        for height in range(200, 3000, 170):
            if width != height:
                columns, rows = partition_image(height, width, image_size=384)
                assert partition_image(width, height, image_size=384) == (rows, columns)


def test_the_counts_over_many_sizes_are_those_measured_from_the_formula():
    assert len(SIZES) == 14961
    small = [size for size in SIZES if math.prod(size) < 384**2]
    whole = [size for size in SIZES if partition_image(size[1], size[0], image_size=384) == (1, 1)]
    assert (len(small), len(whole) - len(small)) == (228, 256)
    assert set(small) <= set(whole)


def test_sub_images_can_be_left_to_later_stages():
    assert image_boxes(1080, 1920, image_size=384, max_sub_images=9, sub_images=False) == [(0, 0, 1920, 1080)]


def test_parts_cover_an_image_once_row_by_row():
    boxes = cut_boxes(7, 10, 3, 2)
    seen = [(x, y) for left, top, w, h in boxes for y in range(top, top + h) for x in range(left, left + w)]
    assert sorted(seen) == sorted((x, y) for x in range(10) for y in range(7))
    assert [box[:2] for box in boxes] == [(0, 0), (3, 0), (6, 0), (0, 3), (3, 3), (6, 3)]


def test_chunks_hold_16_frames_and_the_last_what_is_left():
    assert split_chunks(960, 16) == [16] * 60
    assert split_chunks(17, 16) == [16, 1]
    assert split_chunks(1, 16) == [1]


def test_long_videos_are_played_faster():
    assert [playback_stride(frames, 960) for frames in (1, 960, 961, 1920, 1921)] == [1, 1, 2, 2, 3]
    for frames in range(1, 4000, 37):
        assert len(range(0, frames, playback_stride(frames, 960))) <= 960


@pytest.mark.parametrize("stride", [1, 3])
def test_chunks_of_an_accelerated_video_keep_their_original_times(stride):
    times = [frame / 2 for frame in range(0, 200 * stride, stride)]
    placed = place_chunks(times, len(times), chunk_frames=16, fps=2)
    assert placed == [chunk * stride * POSITION_UNIT for chunk in range(13)]


def test_chunks_are_placed_by_differences_of_time():
    times = [0.0, 0.4, 1.3, 1.7, 9.0]
    placed = place_chunks(times, 5, chunk_frames=2, fps=2)
    assert placed == [0, 1_300_000, 9_000_000]
    assert place_chunks([time + 86400 for time in times], 5, chunk_frames=2, fps=2) == placed


def test_chunks_without_times_count():
    assert place_chunks(None, 40, chunk_frames=16, fps=2) == [0, POSITION_UNIT, 2 * POSITION_UNIT]
