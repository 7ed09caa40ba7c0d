import math

import pytest
import torch
from tiny_elva import PIXELS, RAGGED, batch_inputs, embed_in_a_loop, tiny_config
from torch import nn

from elva_hf.configuration_elva import ElvaConfig
from elva_hf.embedding_elva import ElvaPatchEmbedding, segment_attention, segment_softmax
from elva_hf.modeling_elva import ElvaModel


def attend_in_a_loop(query, keys, values, segments, num_segments):
    """One softmax over the members of each segment and head, in float64, in plain loops."""
    rows = []
    for segment in range(num_segments):
        members = [p for p in range(len(segments)) if segments[p] == segment]
        heads = []
        for head in range(query.shape[0]):
            scores = torch.stack([query[head] @ keys[p, head] for p in members]) / math.sqrt(query.shape[1])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(w * values[p, head] for w, p in zip(weights, members, strict=True)))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("sizes", [(1,), (3, 1, 4), (2, 2, 2, 7)])
def test_segment_attention_equals_a_loop_forward_and_backward(sizes):
    segments = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[torch.randperm(sum(sizes))]
    inputs = leaf(2, 3), leaf(sum(sizes), 2, 3), leaf(sum(sizes), 2, 3)
    fast = segment_attention(*inputs, segments, len(sizes))
    slow = attend_in_a_loop(*inputs, segments.tolist(), len(sizes))
    assert fast.dtype == torch.float64  # the sums inside are float32, so the tolerance is too
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(slow)
    for got, expected in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_segment_softmax_survives_large_scores_and_sums_to_one():
    scores = torch.tensor([[1e4], [1e4], [-1e4], [0.0], [88.0]])
    segments = torch.tensor([0, 0, 1, 2, 2])
    weights = segment_softmax(scores, segments, 3)
    torch.testing.assert_close(weights, torch.tensor([[0.5], [0.5], [1.0], [0.0], [1.0]]))


def test_segments_of_equal_members_return_the_member():
    values = torch.randn(1, 2, 4).expand(5, 2, 4)
    out = segment_attention(torch.randn(2, 4), torch.randn(5, 2, 4), values, torch.tensor([0, 0, 1, 1, 1]), 2)
    torch.testing.assert_close(out, values[:2])


def test_sums_are_float32_in_bfloat16():
    """2048 equal values average to themselves; a bfloat16 sum of them stalls at 256 times the value."""
    keys = torch.zeros(2048, 1, 1, dtype=torch.bfloat16)
    out = segment_attention(keys[0], keys, torch.ones_like(keys), torch.zeros(2048, dtype=torch.long), 1)
    assert out.dtype == torch.bfloat16
    assert out.item() == 1.0


@pytest.mark.parametrize("patch_embed_type, millions", [("video", 9.2), ("naive", 6.1)])
def test_parameter_counts_at_hidden_3584_are_those_of_the_paper(patch_embed_type, millions):
    config = ElvaConfig.from_preset("elva-7b", patch_embed_type=patch_embed_type)
    with torch.device("meta"):
        embedding = ElvaPatchEmbedding(config, config.text_config.hidden_size)
    count = sum(p.numel() for p in embedding.parameters())
    pixel, out = (3 * 28**2 + 1) * 1024, (1024 + 1) * 3584
    cross = 3 * (1024 + 1) * 1024 if patch_embed_type == "video" else 0
    assert count == pixel + out + cross + 2 * 1024
    assert round(count / 1e6, 1) == millions


def build(**overrides):
    torch.manual_seed(0)
    model = ElvaModel(tiny_config(**overrides))
    nn.init.normal_(model.patch_embed.pixel_proj.bias)  # zero biases would hide a missing one
    if model.patch_embed.cross_attention is not None:
        for projection in ("q_proj", "k_proj", "v_proj"):
            nn.init.normal_(getattr(model.patch_embed.cross_attention, projection).bias)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"patch_embed_type": "naive"},
        {"patch_embed_norm": True},
        {"patch_embed_residual": False},
        {"patch_embed_output_projection": True},
        {"patch_embed_positions": 3},
        {"patch_embed_type": "naive", "patch_embed_positions": 3},
        {"patch_embed_num_heads": 1, "patch_embed_norm": True, "patch_embed_output_projection": True},
    ],
    ids=str,
)
def test_the_patch_embedding_equals_a_loop_over_frames_and_rows(overrides):
    model = build(**overrides)
    inputs = batch_inputs(RAGGED, "right")
    geometry = model._geometry(inputs["input_ids"], None, None, torch.empty(len(inputs["pixel_values_videos"]), 16))
    embedding = model.patch_embed
    got = embedding(embedding.encode_pixels(inputs["pixel_values_videos"]), geometry)
    expected = embed_in_a_loop(embedding, inputs["pixel_values_videos"], inputs["input_ids"], model.config)
    for fast, slow in zip(got, expected, strict=True):
        torch.testing.assert_close(fast, slow.float(), rtol=1e-4, atol=1e-5)


def test_frame_and_line_tokens_see_only_their_own_patches():
    model = build()
    inputs = batch_inputs(RAGGED)
    patches = inputs["pixel_values_videos"].requires_grad_()
    geometry = model._geometry(inputs["input_ids"], None, None, torch.empty(len(patches), 16))
    _, frames, lines = model.patch_embed(model.patch_embed.encode_pixels(patches), geometry)
    for tokens, owners in ((frames, geometry.patch_frame), (lines, geometry.patch_line)):
        for i in range(len(tokens)):
            (gradient,) = torch.autograd.grad(tokens[i].sum(), patches, retain_graph=True)
            assert torch.equal(gradient.abs().sum(1) > 0, owners == i)


def test_the_naive_embedding_gives_every_frame_the_same_token():
    model = build(patch_embed_type="naive")
    inputs = batch_inputs(RAGGED)
    patches = inputs["pixel_values_videos"]
    geometry = model._geometry(inputs["input_ids"], None, None, torch.empty(len(patches), 16))
    _, frames, lines = model.patch_embed(model.patch_embed.encode_pixels(patches), geometry)
    assert len(frames.unique(dim=0)) == len(lines.unique(dim=0)) == 1
    assert not torch.equal(frames[0], lines[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_cast_to_the_dtype_of_the_weights(dtype):
    model = build().to(dtype)
    assert model.patch_embed.encode_pixels(torch.randn(3, PIXELS)).dtype == dtype


def test_every_parameter_gets_a_gradient():
    model = build(patch_embed_norm=True, patch_embed_output_projection=True, patch_embed_positions=3)
    inputs = batch_inputs(RAGGED)
    model(**inputs).last_hidden_state.pow(2).mean().backward()
    missing = [name for name, p in model.patch_embed.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == ["cross_attention.k_proj.bias"] or missing == []  # a softmax ignores a shift of all its scores
