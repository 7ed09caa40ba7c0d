"""Worlds of the claims: what they ask cannot be answered blind, and each view shows what it is said to show."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from elva_hf.configuration_elva import ElvaConfig
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import COLORS, sample_scene
from elva_hf.training.toy import build_processor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SAMPLINGS = ("8+0", "2+18", "0+24")
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def claims():
    """The modules of `benchmarks/claims/`, imported as its script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from claims import captioning, captions, detail, hybrid, needle, needle_grid, protocol, worlds

        yield SimpleNamespace(
            captioning=captioning.CLAIM,
            captions=captions,
            detail=detail,
            hybrid=hybrid.CLAIM,
            needle=needle,
            needle_grid=needle_grid,
            protocol=protocol,
            worlds=worlds.WORLDS,
        )


@pytest.fixture(scope="module")
def tokenizer():
    return build_toy_tokenizer()


@pytest.fixture(scope="module")
def budget(claims):
    return claims.protocol.Budget(steps=2, batch_size=3, frames=(8,))


def digits_of(thing):
    return {item[0] for item in thing.digits}


# Every world


@pytest.mark.parametrize("name", ["hybrid", "needle", "captions"])
def test_no_two_seeds_or_steps_share_a_scene(claims, budget, name):
    world = claims.worlds[name]
    variant = claims.protocol.Variant("it", sampling="2+18")
    drawn = [world.draw(budget, seed, step, variant) for seed in range(2) for step in range(2)]
    seeds = [scene.seed for scenes in drawn for scene in scenes]
    assert len(set(seeds)) == len(seeds) == 12
    assert world.draw(budget, 1, 1, variant) == drawn[3]


@pytest.mark.parametrize("name", ["hybrid", "needle"])
def test_splits_share_no_scene_and_no_training_digit(claims, budget, name):
    world, variant = claims.worlds[name], claims.protocol.Variant("it", sampling="2+18")
    held_out = {split: world.held_out(budget, split, 200, variant) for split in SPLITS}
    cells = {split: [[cell for _, cell in scene.digits] for scene in scenes] for split, scenes in held_out.items()}
    digits = {split: set().union(*map(digits_of, scenes)) for split, scenes in held_out.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not digits[one] & digits[other]
        same = sum(bool(own) and own == its for own, its in zip(cells[one], cells[other], strict=True))
        assert same < 10  # of few digits, some stand alike by chance


def test_splits_share_no_grain(claims):
    detail = claims.detail
    clips = [replace(detail.draw_clip(6, "train"), split=split, digits=(), events=()) for split in SPLITS]
    frames = [detail.render(clip, [(0, True)])[0] for clip in clips]
    assert (frames[0] != frames[1]).any() and (frames[0] != frames[2]).any() and (frames[1] != frames[2]).any()


def test_a_blind_answerer_is_near_chance(claims, budget):
    shares = claims.worlds["hybrid"].blind(budget, 3000, 1500)
    assert shares["detail"] == pytest.approx(1 / 10, abs=0.03)
    assert shares["order"] == pytest.approx(1 / 6, abs=0.03)
    assert shares["both"] < 0.04
    assert claims.worlds["needle"].blind(budget, 3000, 1500)["needle"] == pytest.approx(1 / 6, abs=0.04)


def test_a_blind_captioner_is_near_chance(claims, budget):
    shares = claims.worlds["captions"].blind(replace(budget, single_share=1.0), 1500, 700)
    assert shares["caption"] < 0.02
    assert shares["caption/color/1"] == pytest.approx(1 / 6, abs=0.05)
    assert shares["caption/pattern"] == pytest.approx(1 / 4, abs=0.06)
    assert shares["caption/shape"] == pytest.approx(1 / 5, abs=0.05)
    assert shares["caption/place"] == pytest.approx(1 / 4, abs=0.06)
    assert shares["caption/motion"] < 0.5


@pytest.mark.parametrize("name", ["hybrid", "needle", "captions"])
def test_columns_of_the_rows_have_a_blind_share(claims, budget, tokenizer, name):
    world, variant = claims.worlds[name], claims.protocol.Variant("it", sampling="2+18")
    rows = [world.ask(scene, 8, tokenizer, 16, variant) for scene in world.held_out(budget, "test", 6, variant)]
    columns = {column for row in rows for column in row.columns}
    columns |= {label.split("#")[0] for row in rows for labels in row.fields for label in labels} - {""}
    assert columns <= world.blind(budget, 60, 60).keys()
    assert {f"{column}/{row.num_objects}" for row in rows for column in row.columns} <= world.blind(
        budget, 60, 60
    ).keys()


# Detail and order


def test_variants_of_the_hybrid_claim_have_equal_tokens(claims, tokenizer):
    clip = claims.detail.draw_clip(5, "test")
    lengths = set()
    for variant in claims.hybrid.variants:
        sample = claims.worlds["hybrid"].ask(clip, 8, tokenizer, 16, variant).sample
        lengths.add((claims.detail.count_tokens(variant.sampling), len(sample)))
    assert len(lengths) == 1
    assert lengths.pop()[0] == 168
    assert {variant.sampling for variant in claims.hybrid.variants} == set(SAMPLINGS)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_clip_is_laid_out_as_the_processor_does_it(claims, tokenizer, sampling):
    detail = claims.detail
    clip = detail.draw_clip(3, "validation")
    high, low = detail.read_sampling(sampling)
    config = ElvaConfig.from_preset("tiny", num_high_res_frames=high, num_low_res_frames=low)
    processor = build_processor(tokenizer, config)
    whole = np.stack(detail.render(clip, [(frame, True) for frame in range(detail.NUM_FRAMES)]))
    wanted = processor(text="<|im_start|>user\n<video>", videos=[whole], return_tensors="pt")
    asked = claims.worlds["hybrid"].ask(clip, 8, tokenizer, 16, claims.protocol.Variant("it", sampling=sampling))
    prefix = asked.sample.input_ids[asked.sample.segment_ids == 0]
    assert torch.equal(prefix, wanted["input_ids"][0])
    torch.testing.assert_close(asked.sample.pixel_values_videos, wanted["pixel_values_videos"], atol=1e-5, rtol=0)


def test_only_full_resolution_shows_the_digit(claims):
    assert claims.detail.probe_detail(True, 200) > 0.9
    assert claims.detail.probe_detail(False, 200) < 0.3


def test_few_frames_miss_events_and_many_do_not(claims):
    clips = [claims.detail.draw_clip(seed, "test") for seed in range(400)]
    ceilings = {sampling: claims.detail.order_ceiling(sampling, clips) for sampling in SAMPLINGS}
    assert ceilings["2+18"] == ceilings["0+24"] == 1
    assert 0.45 < ceilings["8+0"] < 0.65


def test_an_event_shows_its_color_in_its_frames_only(claims):
    detail = claims.detail
    clip = detail.draw_clip(11, "train")
    frames = detail.render(clip, [(frame, True) for frame in range(detail.NUM_FRAMES)])
    for event in clip.events:
        area = tuple(slice(32 * place, 32 * place + 32) for place in event.quadrant)
        shown = [number for number, frame in enumerate(frames) if (frame[area] == COLORS[event.color]).all()]
        assert shown == list(range(event.start, event.start + detail.EVENT_FRAMES))
    starts = [event.start for event in clip.events]
    assert starts == sorted(starts)
    answers = [question.answer for question in detail.ask_clip(clip)]
    first, last = clip.events[0].color, clip.events[-1].color
    assert answers == [str(clip.label), first, last, f"{first} {clip.label}"]


def test_a_sampling_that_is_none_is_named(claims):
    with pytest.raises(ValueError, match=r"'8': expected frames at high and at low resolution"):
        claims.detail.read_sampling("8")


# The needle


@pytest.mark.parametrize("num_frames", [8, 33])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_one_frame_at_its_depth_shows_the_needle(claims, num_frames, depth):
    hay = claims.needle.draw_haystack(4, num_frames, "test", depth)
    frames = claims.needle.render(hay)
    colored = [number for number, frame in enumerate(frames) if (frame.max(-1) != frame.min(-1)).any()]
    assert colored == [hay.needle_frame]
    assert tuple(frames[hay.needle_frame, 32 * hay.quadrant[0], 32 * hay.quadrant[1]]) == COLORS[hay.color]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_needles_of_a_depth_lie_on_even_and_odd_frames_beside_it(claims, depth):
    frames = [claims.needle.draw_haystack(seed, 16, "test", depth).needle_frame for seed in range(200)]
    exact = round(depth * 15)
    assert set(frames) == {exact, exact + 1 if depth < 0.5 else exact - 1}
    assert 60 < frames.count(exact) < 140
    assert {claims.needle.draw_haystack(seed, 1, "test", depth).needle_frame for seed in range(20)} == {0}


def test_haystacks_of_a_seed_differ_in_depth_alone(claims):
    start, end = (claims.needle.draw_haystack(9, 8, "test", depth) for depth in (0.0, 1.0))
    assert replace(start, needle_frame=end.needle_frame) == end and end.needle_frame - start.needle_frame in (5, 7)
    with pytest.raises(ValueError, match=r"depth=1\.5; expected"):
        claims.needle.draw_haystack(9, 8, "test", 1.5)


def test_the_grid_is_filled_and_drawn(claims, tmp_path):
    stamp = {"kind": "measured", "command": "python it", "device": "a CPU", "commit": "abc", "date": "2026-01-02"}
    grid = claims.needle_grid
    result = grid.measure(tmp_path / "runs", tmp_path / "out", device="cpu", jobs=1, stamp=stamp, quick=True)
    saved = json.loads((tmp_path / "out" / "needle-grid.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert set(saved["mean"]) == set(grid.WAYS)
    assert np.shape(saved["mean"]["merged to 1/2"]) == (2, len(grid.DEPTHS))
    page = (tmp_path / "out" / "needle-grid.md").read_text()
    assert page == grid.make_page(saved)
    assert saved["summary"] in page
    assert Image.open(tmp_path / "out" / "needle-grid.png").size[0] > 400


def test_the_title_of_a_heat_map_is_not_cut(claims):
    grid = claims.needle_grid
    result = {"lengths": [8], "depths": [0.0], "trained_frames": [8], "chance": 1 / 6, "mean": {"all": [[1.0]]}}
    ink = np.asarray(grid.draw_grid(result).convert("L")) < 128
    assert ink[:44].any() and not ink[:44, -20:].any()


def test_a_heat_map_is_read_from_left_to_right_and_from_top_to_bottom(claims):
    grid = claims.needle_grid
    result = {"lengths": [8, 32], "depths": [0.0, 1.0], "trained_frames": [8, 16], "chance": 1 / 6}
    image = grid.draw_grid({**result, "mean": {"all": [[1.0, 1.0], [0.0, 0.0]]}})
    corners = [image.getpixel((84 + 62 * column + 6, 104 + 46 * row + 6)) for column in range(2) for row in range(2)]
    assert corners == [grid._GOOD, grid._GOOD, grid._BAD, grid._BAD]


# Captions


def test_a_caption_names_objects_in_order_of_appearance(claims):
    scenes = [sample_scene(seed) for seed in range(300)]
    late = next(scene for scene in scenes if scene.staggered and len(scene.objects) == 3)
    clauses = claims.captions.caption(late).answer.split(", ")
    assert [clause.split()[0] for clause in clauses] == [
        thing.color for thing in sorted(late.objects, key=lambda thing: thing.entry)
    ]
    still = next(scene for scene in scenes if not scene.staggered and len(scene.objects) == 3)
    starts = [thing.cells[0] for thing in claims.captions.name_objects(still)]
    assert starts == sorted(starts)


def test_every_token_of_a_caption_has_its_field(claims, tokenizer):
    for seed in range(40):
        scene = sample_scene(seed)
        answer, labels = claims.captions.caption(scene).answer, claims.captions.label_tokens(scene)
        ids = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert len(ids) == len(labels)
        things = claims.captions.name_objects(scene)
        for number, thing in enumerate(things):
            words = {
                field: " ".join(
                    tokenizer.decode(token).strip()
                    for token, label in zip(ids, labels, strict=True)
                    if label == f"caption/{field}#{number}"
                )
                for field in claims.captions.FIELDS
            }
            assert words == claims.captions.read_fields(thing)
            assert (words["color"], words["shape"], words["motion"]) == (thing.color, thing.shape, thing.motion)


def test_columns_of_the_captioning_claim_are_columns_of_its_world(claims):
    claim = claims.captioning
    known = claims.worlds[claim.budget.world].blind(claim.budget, 60, 60)
    assert set(claim.columns) <= known.keys()
    assert [variant.name for variant in claim.variants if variant.base is None] == ["unmerged"]


def test_the_caption_is_the_last_question(claims, budget, tokenizer):
    world, variant = claims.worlds["captions"], claims.protocol.Variant("it")
    row = world.ask(world.held_out(budget, "test", 1, variant)[0], 8, tokenizer, 16, variant)
    assert row.columns.count("caption") == 1 and row.columns[-1] == "caption"
    labels = row.sample.labels[row.sample.segment_ids == len(row.columns)]
    assert int((labels != -100).sum()) == len(row.fields[-1])
    assert not any(row.fields[:-1])
