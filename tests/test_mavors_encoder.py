"""Intra-chunk vision encoder of Mavors: Eq. 1 keeps its promise, positions, pooling, sizes."""

import pytest
import torch
from mavors_towers import FRAMES, PATCH, SIDE, SO400M, chunk_encoder, image, patches, tower, tower_config
from torch import nn

from elva_hf.siblings.mavors import encoder_mavors
from elva_hf.siblings.mavors.encoder_mavors import (
    MavorsChunkEncoder,
    chunk_kernel,
    embed_chunks,
    join_squares,
    pool_tokens,
    resize_positions,
    split_squares,
)

GRIDS = [(SIDE // PATCH, SIDE // PATCH), (4, 10), (9, 5)]
"""The tower's own grid, a wide and a high one."""


def still(rows, columns, frames=FRAMES, dtype=torch.float64):
    """A chunk of equal frames, and the image they show."""
    frame = image(rows, columns, dtype)
    return patches(frame).expand(1, frames, -1, -1), frame


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_a_chunk_of_equal_frames_gives_the_towers_last_hidden_state(rows, columns, dtype, bound):
    source = tower(dtype)
    pixels, frame = still(rows, columns, dtype=dtype)
    expected = source(frame, interpolate_pos_encoding=True).last_hidden_state
    assert float(source.embeddings.patch_embedding.bias.abs().min()) > 0
    assert relative(chunk_encoder(source).encode_pixels(pixels, rows, columns), expected) <= bound


@torch.no_grad()
def test_equation_1_read_literally_would_not(monkeypatch):
    def literally(pixels, weight, bias, short_chunk="repeat"):
        return embed_chunks(pixels, weight, bias / FRAMES, short_chunk)

    source = tower()
    pixels, frame = still(*GRIDS[0])
    monkeypatch.setattr(encoder_mavors, "embed_chunks", literally)
    expected = source(frame).last_hidden_state
    assert relative(chunk_encoder(source).encode_pixels(pixels, *GRIDS[0]), expected) > 0.1


@torch.no_grad()
def test_without_a_bias_both_readings_agree_so_tests_must_fill_it(monkeypatch):
    source = tower()
    nn.init.zeros_(source.embeddings.patch_embedding.bias)
    pixels, frame = still(*GRIDS[0])
    encoder = chunk_encoder(source)
    monkeypatch.setattr(
        encoder_mavors, "embed_chunks", lambda pixels, weight, bias, short: embed_chunks(pixels, weight, bias / FRAMES)
    )
    assert relative(encoder.encode_pixels(pixels, *GRIDS[0]), source(frame).last_hidden_state) <= 1e-10


@pytest.mark.parametrize("short_chunk", ["repeat", "mean"])
@torch.no_grad()
def test_an_image_equals_its_16_copies(short_chunk):
    encoder = chunk_encoder(short_chunk=short_chunk)
    copies, _ = still(4, 6)
    assert_same(encoder.encode_pixels(copies[:, :1], 4, 6), encoder.encode_pixels(copies, 4, 6))


@torch.no_grad()
def test_an_image_equals_its_copies_after_training_too():
    encoder = chunk_encoder()
    nn.init.normal_(encoder.patch_embedding.weight, std=0.1)  # every frame has a kernel of its own now
    copies, _ = still(4, 6)
    assert_same(encoder.encode_pixels(copies[:, :1], 4, 6), encoder.encode_pixels(copies, 4, 6))


@torch.no_grad()
def test_a_short_chunk_equals_one_whose_last_frame_is_repeated():
    encoder = chunk_encoder()
    nn.init.normal_(encoder.patch_embedding.weight, std=0.1)
    frames = torch.stack([patches(image(4, 6, seed=seed)) for seed in range(5)])[None]
    padded = torch.cat([frames, frames[:, -1:].expand(-1, FRAMES - 5, -1, -1)], 1)
    assert_same(encoder.encode_pixels(frames, 4, 6), encoder.encode_pixels(padded, 4, 6))


@torch.no_grad()
def test_a_masked_mean_divides_by_the_frames_there_are():
    encoder = chunk_encoder(short_chunk="mean")
    frames = torch.stack([patches(image(4, 6, seed=seed)) for seed in range(3)])[None]
    expected = encoder.patch_embedding(frames.mean(1, keepdim=True))  # inflated: the kernels are equal
    torch.testing.assert_close(encoder.patch_embedding(frames), expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_patch_embedding_is_a_3d_convolution():
    torch.manual_seed(0)
    weight, bias = torch.randn(8, 3, 5, PATCH, PATCH).double(), torch.randn(8).double()
    video = torch.randn(2, 3, 5, 4 * PATCH, 6 * PATCH).double()
    expected = nn.functional.conv3d(video, weight, stride=(5, PATCH, PATCH)) / 5 + bias[:, None, None, None]
    frames = [torch.stack([patches(clip[:, t][None]) for t in range(5)]) for clip in video]
    actual = embed_chunks(torch.stack(frames), weight, bias)
    torch.testing.assert_close(actual, expected.flatten(2).transpose(1, 2), atol=1e-10, rtol=0)


@torch.no_grad()
def test_inflated_and_untrained_the_encoder_is_blind_to_the_order_of_frames():
    frames = torch.stack([patches(image(4, 6, seed=seed)) for seed in range(FRAMES)])[None]
    shuffled = frames[:, torch.randperm(FRAMES)]
    encoder = chunk_encoder()
    assert_same(encoder.encode_pixels(shuffled, 4, 6), encoder.encode_pixels(frames, 4, 6))
    nn.init.normal_(encoder.patch_embedding.weight, std=0.1)
    assert float((encoder.encode_pixels(shuffled, 4, 6) - encoder.encode_pixels(frames, 4, 6)).abs().max()) > 1e-3


def test_the_kernel_of_fewer_frames_holds_the_weight_of_all():
    weight = torch.randn(8, 3, FRAMES, PATCH, PATCH).double()
    for frames in (1, 7, FRAMES):
        kernel = chunk_kernel(weight, frames).unflatten(1, (frames, 3, PATCH, PATCH))
        torch.testing.assert_close(kernel.sum(1), weight.mean(2))


def test_positions_keep_the_towers_own_grid_and_are_resized_as_transformers_does():
    source = tower()
    table = source.embeddings.position_embedding.weight
    assert resize_positions(table, 6, 6) is table
    expected = source.embeddings.interpolate_pos_encoding(torch.empty(1, 40, 32), 4 * PATCH, 10 * PATCH)[0]
    torch.testing.assert_close(resize_positions(table, 4, 10), expected, atol=0, rtol=0)


def test_a_half_precision_table_is_resized_in_float32():
    table = torch.randn(36, 8).bfloat16()
    resized = resize_positions(table, 4, 10)
    assert resized.dtype == torch.bfloat16
    torch.testing.assert_close(resized, resize_positions(table.float(), 4, 10).bfloat16(), atol=0, rtol=0)


def test_pooling_averages_what_a_square_has():
    grid = torch.arange(15.0).view(1, 15, 1)  # 3 rows of 5
    squares = [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], [10, 11], [12, 13], [14]]
    expected = [sum(square) / len(square) for square in squares]
    assert pool_tokens(grid, 3, 5).flatten().tolist() == expected


def test_squares_of_tokens_are_cut_into_the_patches_of_the_frame():
    frame = image(4, 6)
    squares = nn.functional.unfold(frame, 2 * PATCH, stride=2 * PATCH)[0].T
    assert torch.equal(join_squares(split_squares(squares)[None], 2, 3)[0], patches(frame))


def test_gradients_reach_every_weight():
    encoder = chunk_encoder()
    encoder(encoder.patch_embedding(torch.randn(2, 3, 24, 3 * PATCH**2).double()), 4, 6).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@torch.no_grad()
def test_chunks_encoded_together_equal_chunks_alone(monkeypatch):
    monkeypatch.setattr(encoder_mavors, "CHUNKS_AT_ONCE", 2)
    encoder = chunk_encoder()
    chunks = encoder.patch_embedding(torch.randn(5, 3, 24, 3 * PATCH**2).double())
    alone = torch.cat([encoder(chunk[None], 4, 6) for chunk in chunks])
    torch.testing.assert_close(encoder(chunks, 4, 6), alone, atol=1e-12, rtol=0)


def test_the_paper_size_has_423_147_888_parameters():
    config = tower_config(**SO400M)
    with torch.device("meta"):
        encoder = MavorsChunkEncoder(config, 16, 2, "repeat")
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert count == 423_147_888
    assert encoder.patch_embedding.weight.numel() - 1152 * 3 * 14 * 14 == 10_160_640  # what inflation adds
