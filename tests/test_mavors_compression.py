"""Token compression between the chunks of Mavors (section 5.4)."""

from itertools import pairwise

import pytest
import torch

from elva_hf.merging_elva import find_survivors
from elva_hf.siblings.mavors import compression_mavors
from elva_hf.siblings.mavors.compression_mavors import compress_tokens, find_places

CHUNKS, TOKENS = [5, 1, 4], [6, 4, 3]


def drifting(seed=0, change=0.7):
    """Tokens of which each place is a walk through the chunks of its video."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for chunks, size in zip(CHUNKS, TOKENS, strict=True):
        now = torch.randn(size, 8, generator=generator, dtype=torch.float64)
        for _ in range(chunks):
            rows.append(now)
            share = change * torch.rand(size, 1, generator=generator, dtype=torch.float64)
            noise = torch.randn(size, 8, generator=generator, dtype=torch.float64)
            now = (1 - share**2).sqrt() * now + share * noise
    return torch.cat(rows)


def loop(hidden, threshold):
    """Runs of alike neighbours, place by place: survivors and their means, from the definition."""
    survivors, start = list(range(len(hidden))), 0
    for chunks, size in zip(CHUNKS, TOKENS, strict=True):
        for place in range(size):
            for chunk in range(1, chunks):
                earlier, later = start + (chunk - 1) * size + place, start + chunk * size + place
                if torch.cosine_similarity(hidden[earlier], hidden[later], dim=0) > threshold:
                    survivors[later] = survivors[earlier]
        start += chunks * size
    kept = sorted(set(survivors))
    means = [hidden[[i for i, survivor in enumerate(survivors) if survivor == token]].mean(0) for token in kept]
    return survivors, kept, torch.stack(means)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.9, 0.97])
def test_compression_equals_a_plain_loop(threshold):
    hidden = drifting()
    survivors, kept, means = loop(hidden, threshold)
    assert 0 < len(kept) < len(hidden)
    compressed = compress_tokens(hidden, CHUNKS, TOKENS, threshold)
    assert compressed.survivors.tolist() == survivors
    assert compressed.kept.tolist() == kept
    torch.testing.assert_close(compressed.hidden, means, atol=1e-12, rtol=0)


def test_the_loop_notices_another_survivor(monkeypatch):
    hidden = drifting()
    survivors, _, _ = loop(hidden, 0.7)
    monkeypatch.setattr(
        compression_mavors, "find_survivors", lambda merge, links, survivor: find_survivors(merge, links, "last")
    )
    assert compress_tokens(hidden, CHUNKS, TOKENS, 0.7).survivors.tolist() != survivors


def test_counts_are_kept():
    hidden = drifting()
    compressed = compress_tokens(hidden, CHUNKS, TOKENS, 0.7)
    assert sum(compressed.lengths) == len(compressed.hidden) == len(compressed.kept)
    assert len(compressed.survivors) == len(hidden)
    borders = [0, 30, 34, 46]
    for video, (start, end) in enumerate(pairwise(borders)):
        inside = [token for token in compressed.kept.tolist() if start <= token < end]
        assert len(inside) == compressed.lengths[video]
        assert all(start <= token < end for token in compressed.survivors[start:end].tolist())


def test_equal_chunks_leave_one_chunk_and_unlike_ones_all():
    still = torch.randn(6, 8).double().repeat(5, 1)
    compressed = compress_tokens(still, [5], [6], 0.99)
    assert compressed.kept.tolist() == list(range(6))
    assert torch.equal(compressed.hidden, still[:6])
    assert compress_tokens(drifting(), CHUNKS, TOKENS, 1.0).lengths == [30, 4, 12]


def test_videos_and_sub_images_never_merge_with_each_other():
    still = torch.ones(12, 8).double()
    assert compress_tokens(still, [1, 1, 1], [4, 4, 4], 0.5).lengths == [4, 4, 4]
    assert find_places([2, 1], [2, 3]).tolist() == [0, 1, 0, 1, 2, 3, 4]


def test_the_earlier_token_stays_so_later_content_stands_earlier():
    hidden = drifting(change=0.3)
    changed = hidden.clone()
    changed[24:30] += 0.1  # the last chunk of the first video
    before, after = (compress_tokens(part, CHUNKS, TOKENS, 0.7) for part in (hidden, changed))
    assert before.kept.tolist() == after.kept.tolist()
    earlier = [i for i, token in enumerate(before.kept.tolist()) if token < 24]
    assert bool((before.hidden[earlier] != after.hidden[earlier]).any())  # no causality with compression


def test_gradients_flow_through_the_means():
    hidden = drifting().requires_grad_()
    weights = torch.randn(8).double()

    def run(hidden):
        return (compress_tokens(hidden, CHUNKS, TOKENS, 0.7).hidden * weights).square().sum()

    assert torch.autograd.gradcheck(run, hidden)
