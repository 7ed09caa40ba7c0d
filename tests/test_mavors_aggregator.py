"""Inter-chunk feature aggregator of Mavors: C-RoPE, causality, how it starts, sizes."""

import pytest
import torch
from mavors_towers import SO400M, tower_config
from torch import nn

from elva_hf.siblings.mavors.aggregator_mavors import (
    ChunkLayout,
    MavorsAggregator,
    attend_causally,
    rotary_table,
    rotate,
)

WIDTH, HEADS = 32, 4
VIDEOS = [[6, 6, 6], [4], [4], [5, 5], [6, 6, 6]]


def aggregator(num_layers=3, seed=0, filled=True):
    torch.manual_seed(seed)
    module = MavorsAggregator(tower_config(), num_layers, HEADS, 40, 10000.0).double()
    if filled:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return module


def tokens(videos=VIDEOS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(map(sum, videos)), WIDTH, generator=generator, dtype=torch.float64)


def noise(count):
    """What a layer norm does not take away again."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def chunk_positions(videos=VIDEOS, stride=1.0):
    return torch.cat([torch.full((size,), i * stride).double() for chunks in videos for i, size in enumerate(chunks)])


def loop_attention(query, key, value, chunks_of_videos, by_chunk):
    """One query at a time, from the definition."""
    seen, start = [], 0
    for chunks in chunks_of_videos:
        ends, end = [], start
        for size in chunks:
            end += size
            ends += [end] * size
        for place in range(start, end):
            keys = slice(start, ends[place - start] if by_chunk else place + 1)
            scores = torch.einsum("hd,khd->hk", query[place], key[keys]) / query.shape[-1] ** 0.5
            seen.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[keys]))
        start = end
    return torch.stack(seen)


@pytest.mark.parametrize("by_chunk", [False, True])
def test_attention_equals_a_plain_loop(by_chunk):
    videos = [*VIDEOS, [3, 0, 2]]  # compression may empty a chunk
    count = sum(map(sum, videos))
    query, key, value = torch.randn(3, count, 2, 8).double()
    actual = attend_causally(query, key, value, ChunkLayout(videos, by_chunk))
    torch.testing.assert_close(actual, loop_attention(query, key, value, videos, by_chunk), atol=1e-12, rtol=0)


@torch.no_grad()
def test_shifting_all_chunk_times_changes_nothing():
    module, hidden, layout = aggregator(), tokens(), ChunkLayout(VIDEOS)
    positions = chunk_positions(stride=1.37)
    expected = module(hidden, positions, layout)
    for shift in (1.0, 1000.0, 86400.25):
        torch.testing.assert_close(module(hidden, positions + shift, layout), expected, atol=1e-10, rtol=0)
    assert float((module(hidden, 2 * positions, layout) - expected).abs().max()) > 1e-3


def test_logits_depend_on_differences_only():
    query, key = torch.randn(2, 7, 2, 72).double()
    positions = torch.tensor([0, 0, 1, 1, 2.5, 40, 3000]).double()

    def logits(positions):
        table = rotary_table(positions, 72, 10000.0)
        return torch.einsum("qhd,khd->hqk", rotate(query, *table), rotate(key, *table))

    torch.testing.assert_close(logits(positions + 86400), logits(positions), atol=1e-10, rtol=0)


def test_angles_are_never_of_half_precision():
    positions = torch.tensor([0.0, 1.0, 4095.5])
    cos, sin = rotary_table(positions.bfloat16(), 8, 10000.0)
    assert cos.dtype == sin.dtype == torch.float64
    states = torch.randn(3, 2, 8).bfloat16()
    exact = rotary_table(positions.double(), 8, 10000.0)
    expected = rotate(states.float(), *exact).bfloat16()
    assert torch.equal(rotate(states, *exact), expected)
    assert rotate(states, *exact).dtype == torch.bfloat16


@torch.no_grad()
def test_a_model_of_half_precision_turns_by_angles_in_float32(monkeypatch):
    from elva_hf.siblings.mavors import aggregator_mavors

    seen = []

    def spy(states, cos, sin):
        seen.extend([cos.dtype, sin.dtype])
        return rotate(states, cos, sin)

    monkeypatch.setattr(aggregator_mavors, "rotate", spy)
    aggregator().bfloat16()(tokens().bfloat16(), chunk_positions(), ChunkLayout(VIDEOS))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("by_chunk", [False, True])
@torch.no_grad()
def test_changing_a_chunk_leaves_earlier_chunks_unchanged(by_chunk):
    module, hidden, layout = aggregator(), tokens(), ChunkLayout(VIDEOS, by_chunk)
    changed = hidden.clone()
    changed[12:18] += noise(6)  # the last chunk of the first video
    before, after = (module(part, chunk_positions(), layout) for part in (hidden, changed))
    torch.testing.assert_close(after[:12], before[:12], atol=0, rtol=0)
    torch.testing.assert_close(after[18:], before[18:], atol=0, rtol=0)  # and other videos
    assert bool((after[12:18] != before[12:18]).any(1).all())


@torch.no_grad()
def test_earlier_chunks_change_later_ones():
    module, hidden, layout = aggregator(), tokens(), ChunkLayout(VIDEOS)
    changed = hidden.clone()
    changed[:6] += noise(6)
    difference = module(changed, chunk_positions(), layout) - module(hidden, chunk_positions(), layout)
    assert bool((difference[:18].abs().amax(1) > 1e-6).all())
    assert not difference[18:].any()


@torch.no_grad()
def test_causality_by_chunk_lets_a_token_see_all_of_its_chunk():
    module, hidden = aggregator(1), tokens()
    changed = hidden.clone()
    changed[5] += noise(1)[0]  # the last token of the first chunk
    for by_chunk in (False, True):
        layout = ChunkLayout(VIDEOS, by_chunk)
        difference = module(changed, chunk_positions(), layout) - module(hidden, chunk_positions(), layout)
        assert bool(difference[:5].any()) == by_chunk


@torch.no_grad()
def test_a_video_alone_equals_its_part_of_a_packed_sequence():
    module, hidden = aggregator(), tokens()
    together = module(hidden, chunk_positions(), ChunkLayout(VIDEOS))
    start = 0
    for chunks in VIDEOS:
        end = start + sum(chunks)
        alone = module(hidden[start:end], chunk_positions([chunks]), ChunkLayout([chunks]))
        torch.testing.assert_close(together[start:end], alone, atol=1e-12, rtol=0)
        start = end


@torch.no_grad()
def test_c_rope_has_no_effect_on_an_image():
    module = aggregator()
    hidden = tokens([[6]])
    layout = ChunkLayout([[6]])
    moved = module(hidden, torch.full((6,), 7.5).double(), layout)
    torch.testing.assert_close(moved, module(hidden, torch.zeros(6).double(), layout), atol=1e-12, rtol=0)


@torch.no_grad()
def test_no_layers_change_nothing():
    hidden = tokens()
    assert aggregator(0)(hidden, chunk_positions(), ChunkLayout(VIDEOS)) is hidden


def test_gradients_reach_every_weight():
    module = aggregator()
    module(tokens(), chunk_positions(), ChunkLayout(VIDEOS)).square().sum().backward()
    dead = {name for name, parameter in module.named_parameters() if not parameter.grad.any()}
    assert not {name for name in dead if not name.endswith("k_proj.bias")}  # without C-RoPE it would cancel


def test_the_paper_size_has_45_718_512_parameters():
    with torch.device("meta"):
        module = MavorsAggregator(tower_config(**SO400M), 3, 16, 4304, 10000.0)
    assert sum(parameter.numel() for parameter in module.parameters()) == 45_718_512
    literal = sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
    )
    assert literal == 11_954_304  # Eqs. 3 to 6 alone
