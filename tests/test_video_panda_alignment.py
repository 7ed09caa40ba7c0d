"""The alignment block: sizes and costs of the paper, and the equations in plain loops."""

import math

import pytest
import torch
from tiny_elva import pixels, video, words
from tiny_video_panda import VARIANTS, double_panda, relaid, tiny_panda
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elva_hf import geometry_elva as geo
from elva_hf.errors_elva import ConfigurationError
from elva_hf.siblings.video_panda.alignment_video_panda import SpatioTemporalAlignment
from elva_hf.siblings.video_panda.configuration_video_panda import ABLATIONS, VideoPandaConfig
from elva_hf.siblings.video_panda.modeling_video_panda import VideoPandaForCausalLM

KINDS = {"s": geo.VIDEO_START, "e": geo.VIDEO_END, ".": geo.PATCH, "F": geo.FRAME, "L": geo.LINE}


def square_video(config, num_frames=8):
    """Geometry of a video of square frames as large as a configuration allows."""
    side = config.longest_edge // config.patch_size
    text = "s" + num_frames * config.frame_layout.write((side, side), "F", "L", ".") + "e"
    return geo.read_geometry(torch.tensor([[KINDS[letter] for letter in text]]), None, config.frame_layout)


def measure(ablation=None, **overrides):
    """Parameters, multiply-accumulates and tokens at 8 frames of 448x448, projector included, on no device."""
    config = VideoPandaConfig.from_preset("video-panda-7b", ablation, **overrides)
    geometry = square_video(config)
    with torch.device("meta"):
        block = SpatioTemporalAlignment(config, config.text_config.hidden_size)
        patches = torch.empty(geometry.num_patches, config.pixels_per_token)
    with FlopCounterMode(display=False) as counter:
        parts = block(block.encode_pixels(patches), geometry.to(torch.device("meta")))
    tokens = sum(map(len, parts))
    assert tokens == geometry.tube_ids.numel() - 2
    return sum(p.numel() for p in block.parameters()), counter.get_total_flops() / 2 / 1e9, tokens


@pytest.fixture(scope="module")
def default():
    return measure()


def test_the_vision_part_has_45_million_parameters_and_the_cost_of_table_3(default):
    parameters, macs, tokens = default
    assert (parameters, tokens) == (45_067_602, 2184)
    assert macs == pytest.approx(103.29, rel=0.005)


def test_a_pooled_query_has_the_references_parameters_and_the_printed_105_5(default):
    parameters, macs, _ = measure(lsd_query="pooled")
    assert parameters == 45_066_578
    assert macs == pytest.approx(105.44, rel=0.005)
    assert macs == pytest.approx(105.5, rel=0.005)  # Table 3


def test_the_equations_alone_stay_a_quarter_short_of_45_million():
    """A bias of the patch convolution, which the paper does not name, would add 1,024."""
    parameters, _, _ = measure(reference_blocks=False, global_mlp_ratio=0)
    assert parameters == 33_503_570


@pytest.mark.parametrize(
    "ablation, parameters, macs, tokens",
    [
        ("without-row-tokens", -1_024, -2.68, -128),
        ("without-fsra", -4_201_472, -4.32, 0),
        ("without-gstra", -12_600_320, -17.21, 0),
        ("without-lste", -1_431_890, -11.69, 0),
        ("without-gstra-and-lste", -14_032_210, -28.89, 0),
        ("lsd-before-lste", 0, -21.66, 0),
        ("average-pool", -4_200_448, -19.34, 0),
        ("half-resolution", -4_200_448, -44.7, 0),
        ("perceiver", 8_459_264, -33.83, 520 - 2184),
    ],
)
def test_an_ablation_costs_what_it_leaves_out(default, ablation, parameters, macs, tokens):
    changed = measure(ablation)
    assert changed[0] - default[0] == parameters
    assert changed[1] - default[1] == pytest.approx(macs, abs=0.03)
    assert changed[2] - default[2] == tokens


def test_there_is_a_test_for_each_ablation():
    [mark] = [mark for mark in test_an_ablation_costs_what_it_leaves_out.pytestmark if mark.name == "parametrize"]
    assert {case[0] for case in mark.args[1]} == set(ABLATIONS)


@pytest.mark.parametrize("ablation", [None, *ABLATIONS])
def test_the_ledger_counts_what_torch_counts(ablation):
    """But for the weighted sums over segments and windows, which are no matrix products to torch."""
    config = VideoPandaConfig.from_preset("video-panda-7b", ablation)
    side = config.longest_edge // config.patch_size
    _, macs, _ = measure(ablation)
    assert config.patch_embed_flops([8 * [(side, side)]]) / 2e9 == pytest.approx(macs, rel=0.001)


# The equations ----------------------------------------------------------------------------------------------------


def geometry_of(model, samples):
    """Of a batch of samples written in ELVA's tokens, on a model's layout."""
    longest = max(map(len, samples))
    rows = [relaid(ids, model.config.frame_layout) for ids in samples]
    ids = torch.tensor([row + (longest - len(row)) * [0] for row in rows])
    return model.model.read_geometry(ids)


def embed(model, samples, patches):
    block = model.model.patch_embed
    return block(block.encode_pixels(patches), geometry_of(model, samples))


def attend(attention, query, keys):
    """Eq. 4 head by head; query `(d,)`, keys `(n, d)`."""
    query, keys = attention.query_norm(query), attention.key_norm(keys)
    heads = zip(
        attention.q_proj(query).chunk(attention.num_heads),
        attention.k_proj(keys).chunk(attention.num_heads, -1),
        attention.v_proj(keys).chunk(attention.num_heads, -1),
        strict=True,
    )
    by_width = attention.query_scale != 1
    seen = [(k @ q / math.sqrt(len(query) if by_width else len(q))).softmax(0) @ v for q, k, v in heads]
    return attention.o_proj(torch.cat(seen))


def encode_in_a_loop(lste, patches):
    """Eqs. 2-3 for one video `(T, h, w, d)`, one place at a time."""
    inner = lste.reduce(lste.norm(patches))
    padded = nn.functional.pad(inner, (0, 0, 0, 0, 0, 0, 1, 1))
    weight = lste.temporal.weight[:, 0, :, 0, 0]
    mixed = torch.stack([(padded[t : t + 3] * weight.T[:, None, None]).sum(0) for t in range(len(inner))])
    encoded = patches + lste.restore(mixed + lste.temporal.bias)
    padded = nn.functional.pad(encoded, (0, 0, 1, 1, 1, 1, 1, 1))
    position = torch.zeros_like(encoded) + lste.position.bias
    for t, row, column in torch.cartesian_prod(*3 * [torch.arange(3)]).tolist():
        shifted = padded[t:, row:, column:][: encoded.shape[0], : encoded.shape[1], : encoded.shape[2]]
        position = position + shifted * lste.position.weight[:, 0, t, row, column]
    return encoded + position


def downsample_in_a_loop(model, encoded, rows, cols):
    """Eqs. 5-7, or the mean, window by window of `(T, h, w, d)`."""
    side, block = model.config.window_size, model.model.patch_embed.downsampling
    tokens = torch.empty(len(encoded), rows, cols, encoded.shape[-1], dtype=encoded.dtype)
    for t, i, j in torch.cartesian_prod(*map(torch.arange, tokens.shape[:3])).tolist():
        window = encoded[t, side * i : side * i + side, side * j : side * j + side].flatten(0, 1)
        tokens[t, i, j] = window.mean(0)
        if model.config.downsampling == "lsd":
            pooled = block.query is None
            seen = attend(block.attention, tokens[t, i, j] if pooled else block.query, window)
            tokens[t, i, j] = tokens[t, i, j] + seen if pooled else seen
    return tokens


def resample_in_a_loop(model, encoded, rows, cols):
    """The latents of each frame `(T, h, w, d)`, one at a time, over all its patches."""
    block, tokens = model.model.patch_embed.downsampling, []
    for frame in encoded:
        latents = block.latents[: rows * cols]
        for layer in block.layers:
            seen = [attend(layer["attention"], latent, frame.flatten(0, 1)) for latent in latents]
            latents = latents + torch.stack(seen)
            latents = latents + layer["mlp"](latents)
        tokens.append(latents.view(rows, cols, -1))
    return torch.stack(tokens)


def context_in_a_loop(block, frame, video):
    """Eqs. 8-10 and 14 for one frame."""
    context = video
    if block.fsra is not None:
        context = attend(block.fsra.attention, block.fsra.query, frame.flatten(0, 1))
        alpha = 1 if block.fusion.alpha is None else block.fusion.alpha.sigmoid()
        context = context if video is None else alpha * context + (1 - alpha) * video
    return block.fusion.proj(block.fusion.norm(context))


def embed_one_video(model, patches, num_frames, rows, cols):
    """Figure 3 for one video, as the paper writes it: the projected sequence of Eq. 17, frame by frame."""
    block, size = model.model.patch_embed, model.config.stab_patch_size
    side = model.config.patch_size
    pictures = patches.view(num_frames, rows, cols, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    pictures = pictures.reshape(num_frames, 3, rows * side, cols * side)
    weight = block.patch_proj.weight.view(-1, 3, size, size)
    encoded = nn.functional.conv2d(pictures, weight, stride=size).permute(0, 2, 3, 1)  # Eq. 1
    before = model.config.downsampling_position == "before_lste"
    if before:
        encoded = downsample_in_a_loop(model, encoded, rows, cols)
    encoded = encoded if block.lste is None else encode_in_a_loop(block.lste, encoded)
    downsample = resample_in_a_loop if model.config.downsampling == "perceiver" else downsample_in_a_loop
    tokens = encoded if before else downsample(model, encoded, rows, cols)
    video = None
    if block.gstra is not None:
        video = attend(block.gstra.attention, block.gstra.query, encoded.flatten(0, 2))
        video = video if block.gstra.mlp is None else video + block.gstra.mlp(video)
    sequence = []
    for frame in tokens:
        sequence.append(context_in_a_loop(block, frame, video))
        for row in frame:
            sequence += [*row, *([] if block.row_token is None else [block.row_token])]
    return block.projector(torch.stack(sequence))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_the_block_is_its_equations(variant, num_frames):
    model = double_panda(variant)
    if model.model.patch_embed.fusion.alpha is not None:
        nn.init.normal_(model.model.patch_embed.fusion.alpha)
    ids = video(*num_frames * [(2, 3)])
    patches = pixels(ids).double()
    geometry = geometry_of(model, [ids])
    parts = embed(model, [ids], patches)
    where = torch.cat([geometry.patch_index, geometry.frame_index, geometry.line_index])
    flat = torch.cat(parts)[where.argsort()]
    torch.testing.assert_close(flat, embed_one_video(model, patches, num_frames, 2, 3), rtol=1e-10, atol=1e-10)


VIDEOS = (video((2, 2), (2, 2)), video((2, 2)), video((1, 3), (1, 3)), video((2, 2), (2, 2), (1, 1)), video((2, 2)))
"""Of the same and of other grids and lengths; the fourth holds clips of two grids."""


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_video_sees_itself_and_no_other(variant):
    """Not in its sample, and not in its batch."""
    model = double_panda(variant)
    drawn = [pixels(ids, i).double() for i, ids in enumerate(VIDEOS)]
    samples = [VIDEOS[0] + words(2) + VIDEOS[1] + VIDEOS[2], words(3), VIDEOS[3] + VIDEOS[4]]
    together = embed(model, samples, torch.cat(drawn))
    alone = [embed(model, [ids], patches) for ids, patches in zip(VIDEOS, drawn, strict=True)]
    for part, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(parts), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_every_frame_hears_of_the_last_one_through_gstra_alone():
    """Frames far apart in time: LSTE reaches two frames, once in time and once in the position encoding."""
    ids, patches = video(*8 * [(2, 2)]), pixels(video(*8 * [(2, 2)])).double()
    other = patches.clone()
    other[-4:] += 1
    for variant, heard in (("paper", True), ("without-gstra", False)):
        model = double_panda(variant)
        (tokens, context, _), (tokens_after, context_after, _) = (embed(model, [ids], p) for p in (patches, other))
        moved = (tokens - tokens_after).abs().amax(1).view(8, 4).amax(1) > 1e-9
        assert moved.tolist() == 5 * [False] + 3 * [True]
        assert bool((context - context_after)[0].abs().max() > 1e-9) == heard


@torch.no_grad()
def test_lste_starts_as_its_position_encoding_and_alpha_at_a_half():
    block = VideoPandaForCausalLM(tiny_panda().config).model.patch_embed
    assert not block.lste.restore.weight.any() and not block.lste.restore.bias.any()
    assert block.lste.position.weight.any() and block.lste.reduce.weight.any()
    assert torch.equal(block.fusion.alpha.sigmoid(), torch.full((16,), 0.5))
    for drawn in (block.row_token, block.downsampling.query, block.fsra.query, block.gstra.query):
        assert 0.1 < drawn.std() < 0.6


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_the_block_learns(variant):
    model = tiny_panda(variant)
    block = model.model.patch_embed
    ids = video((2, 3), (2, 3), (1, 1))
    (torch.cat(embed(model, [ids], pixels(ids))) ** 2).sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is None] == []
    still = {name for name, p in block.named_parameters() if not p.grad.any()}
    assert {name for name in still if "k_proj.bias" not in name} == set()  # the same for all keys: no weight changes


def test_a_perceiver_has_no_more_tokens_than_latents():
    model = tiny_panda("perceiver", resampler_latents=5)
    ids = video((2, 3))
    with pytest.raises(ConfigurationError, match="6 tokens and the resampler 5 latents"):
        embed(model, [ids], pixels(ids))


@pytest.mark.parametrize(
    "fields, words_of_error",
    [
        ({"patch_size": 27}, "patch_size=27 is no multiple of stab_patch_size=14"),
        ({"downsampling": "max"}, "downsampling='max': expected one of lsd"),
        ({"downsampling": "none"}, "set patch_size=14"),
        ({"downsampling": "perceiver"}, "set row_tokens=False"),
        ({"fsra": False, "gstra": False}, "keep one of them"),
        ({"stab_num_heads": 7}, "does not divide stab_dim=1024"),
        ({"lste_reduction": 0.5}, "lste_reduction=0.5: expected 1 to stab_dim"),
        ({"global_mlp_ratio": -1}, "expected 0 or more"),
        ({"stab_dim": 0}, "stab_dim=0"),
    ],
)
def test_what_no_model_can_be_is_refused(fields, words_of_error):
    with pytest.raises(ConfigurationError, match=words_of_error):
        VideoPandaConfig(**fields)


def test_presets_and_ablations_go_by_name():
    assert VideoPandaConfig.from_preset("video-panda-7b").num_high_res_frames == 8
    assert VideoPandaConfig.from_preset("video-panda-7b", "half-resolution").longest_edge == 224
    assert VideoPandaConfig.from_preset("video-panda-tiny", "perceiver").patch_size == 32
    for name in ("elva-7b", "7b"):
        with pytest.raises(ConfigurationError, match="choose one of video-panda-7b"):
            VideoPandaConfig.from_preset(name)
    with pytest.raises(ConfigurationError, match="choose one of without-row-tokens"):
        VideoPandaConfig.from_preset("video-panda-7b", "without-eyes")
