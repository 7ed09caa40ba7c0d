"""benchmarks/siblings.py, mavors_order.py, Mavors' needle grid: all models see the same, and pages say what ran."""

import importlib
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from elva_hf.data.packing import IGNORED
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.training.toy import build_processor
from elva_hf.training.toy_recipe import read_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAMP = {"kind": "measured", "command": "python it", "device": "a CPU", "commit": "abc", "date": "2026-01-02"}
STAMP |= {"python": "3", "torch": "2", "transformers": "5"}
MODULES = "siblings mavors_order claims.needle_grid claims.protocol claims.runs claims.siblings claims.trainer"
MODULES += " claims.worlds claims.writing measuring"


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        found = {name.replace(".", "_"): importlib.import_module(name) for name in MODULES.split()}
        patch.setattr(found["siblings"], "provenance", lambda device: STAMP)
        patch.setattr(found["mavors_order"], "provenance", lambda device: STAMP)
        yield SimpleNamespace(**found)


@pytest.fixture(scope="module")
def tokenizer():
    return build_toy_tokenizer()


def variants(scripts):
    return {variant.name: variant for variant in scripts.claims_siblings.CLAIM.variants}


def ask(scripts, tokenizer, num_frames=8, number=3, seed=0):
    budget = scripts.claims_protocol.Budget(1, frames=(num_frames,))
    world = scripts.claims_worlds.WORLDS["scenes"]
    scenes = world.held_out(budget, "test", seed + 1, None)
    return world.ask(scenes[seed], number, tokenizer, 16, None)


def build(scripts, name, tokenizer, **fields):
    variant = variants(scripts)[name]
    return scripts.claims_trainer.build_model(
        replace(variant, config={**variant.config, **fields}), seed=0, tokenizer=tokenizer
    )


# Rows for each model


def test_the_three_have_the_decoder_of_the_shipped_recipe(scripts, tokenizer):
    recipe, _ = read_recipe("tiny")
    assert recipe["text_config"] == scripts.claims_siblings.DECODER
    assert recipe["config"] == scripts.claims_siblings.POSITIONS
    decoders = []
    for name in variants(scripts):
        model = build(scripts, name, tokenizer)
        assert model.config.model_type.replace("_", "-") == name
        decoders.append({key: weight.shape for key, weight in model.model.language_model.named_parameters()})
        assert model.config.text_config.num_hidden_layers == 6
    assert decoders[0] == decoders[1] == decoders[2]


@pytest.mark.parametrize("num_frames", [1, 6, 8])
@pytest.mark.parametrize(
    ("name", "fields"), [("elva", {}), ("video-panda", {}), ("video-panda", {"row_tokens": False}), ("mavors", {})]
)
def test_a_row_is_what_the_models_processor_writes(scripts, tokenizer, name, fields, num_frames):
    config = build(scripts, name, tokenizer, **fields).config
    row = ask(scripts, tokenizer, num_frames)
    written = scripts.claims_writing.rewrite(row, config, tokenizer).sample
    processor = build_processor(tokenizer, config)
    expected = processor(text="<video>", videos=row.frames, num_frames=num_frames, return_tensors="pt")
    torch.testing.assert_close(written.pixel_values_videos, expected["pixel_values_videos"], atol=1e-6, rtol=0)
    start, end = (
        int((written.input_ids == token).nonzero())
        for token in (config.video_start_token_id, config.video_end_token_id)
    )
    assert written.input_ids[start : end + 1].tolist() == expected["input_ids"][0].tolist()
    answers = row.sample.labels != IGNORED
    assert written.labels[written.labels != IGNORED].tolist() == row.sample.labels[answers].tolist()
    asked, kept = written.segment_ids > 0, row.sample.segment_ids > 0
    assert written.input_ids[asked].tolist() == row.sample.input_ids[kept].tolist()
    assert written.segment_ids[asked].tolist() == row.sample.segment_ids[kept].tolist()
    assert (written.labels[~asked] == IGNORED).all()


def test_frames_of_two_grids_are_refused(scripts, tokenizer):
    row = ask(scripts, tokenizer)
    (frames,) = row.sample.grids
    mixed = replace(row, sample=replace(row.sample, grids=((*frames[:-1], (2, 2)),)))
    with pytest.raises(ValueError, match="MavorsConfig takes one grid"):
        scripts.claims_writing.rewrite(mixed, build(scripts, "mavors", tokenizer).config, tokenizer)


def test_frames_are_shuffled_inside_their_chunk(scripts, tokenizer):
    shuffle = scripts.claims_writing.shuffle_frames
    rows = [ask(scripts, tokenizer, num_frames=6, seed=seed) for seed in range(4)]
    for row in rows:
        row.frames[:, 0, 0, 0] = np.arange(6)  # the number of the frame
    orders = []
    for row, mixed in zip(rows, shuffle(rows, 4, seed=1), strict=True):
        order = mixed.frames[:, 0, 0, 0].tolist()
        assert sorted(order[:4]) == [0, 1, 2, 3] != order[:4] and sorted(order[4:]) == [4, 5] != order[4:]
        frames = row.sample.pixel_values_videos.unflatten(0, (6, -1))
        assert torch.equal(mixed.sample.pixel_values_videos, frames[order].flatten(0, 1))
        assert torch.equal(mixed.sample.input_ids, row.sample.input_ids)
        orders.append(tuple(order))
    assert len(set(orders)) > 1
    assert [tuple(row.frames[:, 0, 0, 0]) for row in shuffle(rows, 4, seed=1)] == orders
    assert [tuple(row.frames[:, 0, 0, 0]) for row in shuffle(rows, 4, seed=2)] != orders
    alone = shuffle(rows[:1], 1, seed=1)[0]
    assert np.array_equal(alone.frames, rows[0].frames)


# The table


@pytest.mark.parametrize(("name", "tokens"), [("elva", 168), ("video-panda", 168), ("mavors", 32)])
def test_costs_are_those_of_what_the_processor_writes(scripts, tokenizer, name, tokens):
    model = build(scripts, name, tokenizer)
    cost = scripts.siblings.count_costs(variants(scripts)[name], 8)
    ids = scripts.siblings.show_clip(model, 8)["input_ids"][0]
    special = [getattr(model.config, f"{kind}_token_id") for kind in ("video", "frame", "line")]
    assert cost["visual_tokens"] == tokens == int(torch.isin(ids, torch.tensor(special)).sum())
    assert cost["text_tokens"] == len(ids) - tokens - 2
    assert cost["vision_parameters"] == sum(weight.numel() for weight in model.model.patch_embed.parameters())
    heads = sum(weight.numel() for weight in model.guidance.parameters())
    assert cost["parameters"] == sum(weight.numel() for weight in model.parameters()) - heads
    assert cost["flops"]["total"] == sum(value for key, value in cost["flops"].items() if key != "total")
    assert cost["flops"]["patch_embed"] == model.config.patch_embed_flops([[(4, 4)] * 8])


def test_the_script_runs_all_three_and_keeps_nothing(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()}
    scripts.siblings.main(["--quick"], call=lambda function, *arguments: function(*arguments))
    page = capsys.readouterr().out
    for name in variants(scripts):
        assert f"\n| {name} | " in page and f"\n- {name}: config preset " in page
    assert "nothing is kept" in page and "1 seeds, 3 steps of 2" in page
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARKS / "results").iterdir()} == before


def test_differences_are_told_without_a_verdict(scripts, tmp_path):
    protocol, claim = scripts.claims_protocol, scripts.claims_siblings.CLAIM
    shares = {"elva": 0.9, "video-panda": 0.7, "mavors": 0.5}

    def train(run, folder):
        final = {column: shares[run.variant.name] + run.seed / 50 for column in claim.columns}
        return protocol.Curve(
            (400,), (10,), {name: (value,) for name, value in final.items()}, final, 7, 1.0, {}, final
        )

    plan = scripts.claims_runs.plan_runs(claim, 2)
    lines = scripts.claims_runs.finish_runs(
        plan, tmp_path / "it.jsonl", train, stamp=STAMP, prepare=lambda *names: None
    )
    blind = dict.fromkeys(claim.columns, 0.25)
    result = scripts.siblings.without_verdicts(scripts.siblings.summarise(claim, lines, blind, "some scenes", "it"))
    assert "verdict" not in json.dumps(result["comparisons"])
    flops = {"patch_embed": 2_000_000, "total": 5_000_000}
    cost = {"vision_parameters": 1234, "parameters": 5678, "visual_tokens": 32, "text_tokens": 9, "flops": flops}
    cost["first_token"] = {"seconds": {"median": 0.012, "min": 0.011, "max": 0.013}, "of_first": 0.5}
    result |= {"on": "cpu", "repeats": 3, "rounds": 2, "cost": dict.fromkeys(shares, cost)}
    page = scripts.siblings.make_page(json.loads(json.dumps(result)))
    row = "| mavors | 1,234 | 5,678 | 32 | 2.0 | 5.0 | 12.0 (11.0 to 13.0) | 0.50 | 0.510 | 0.50 to 0.52 | 0.51 |"
    assert row in page
    assert "| mean | 0.25 | 0.91 | 0.71 | 0.51 | +0.20 (+0.20 to +0.20) | +0.40 (+0.40 to +0.40) |" in page
    assert "confirmed at" not in page and "not seen" not in page


# The order inside a chunk


def answer(scripts, model, rows, tokenizer):
    batch = scripts.claims_trainer.make_batch(
        [scripts.claims_writing.rewrite(row, model.config, tokenizer) for row in rows], tokenizer.pad_token_id, "cpu"
    )
    ids = {name: batch[name][:, :40] for name in ("input_ids", "position_ids")}  # the video, and the first words
    with torch.no_grad():
        return model(**ids, pixel_values_videos=batch["pixel_values_videos"], use_cache=False).logits


def test_inflated_kernels_see_images_as_before_and_no_order_inside_a_chunk(scripts, tokenizer):
    model = build(scripts, "mavors", tokenizer).eval()
    clips = [ask(scripts, tokenizer, seed=3)]
    mixed = scripts.claims_writing.shuffle_frames(clips, 4, seed=0)
    images = [ask(scripts, tokenizer, num_frames=1)]
    image, ordered, shuffled = (answer(scripts, model, rows, tokenizer) for rows in (images, clips, mixed))
    assert (ordered - shuffled).abs().max() > 1e-3
    scripts.mavors_order.inflate(model)
    torch.testing.assert_close(answer(scripts, model, images, tokenizer), image, atol=1e-5, rtol=1e-5)
    blind = answer(scripts, model, clips, tokenizer)
    torch.testing.assert_close(answer(scripts, model, mixed, tokenizer), blind, atol=1e-5, rtol=1e-5)


def test_clips_start_from_inflated_weights_and_train_the_kernels_apart(scripts, tmp_path):
    order = scripts.mavors_order
    options = Namespace(seeds=1, device="cpu", jobs=1, quick=True)
    result = order.measure(tmp_path, options, STAMP)
    kernels = {}
    for line in scripts.claims_runs.read_lines(tmp_path / f"{order.NAME}.jsonl").values():
        (path,) = (tmp_path / "weights").glob(f"{line['key']}.*")
        weights = load_file(path)
        kernels[line["variant"]["name"]] = weights["model.patch_embed.encoder.patch_embedding.weight"]
    assert result["chunk_frames"] == kernels["images"].shape[2] == order.CHUNK_FRAMES
    assert torch.equal(kernels["images"], kernels["images"][:, :, :1].expand_as(kernels["images"]))
    assert not torch.equal(kernels["clips"][:, :, 0], kernels["clips"][:, :, 1])
    page = order.make_page(json.loads(json.dumps(result)))
    assert all(f"\n| {column} | " in page for column in result["columns"])
    for state in ("before", "after"):
        assert set(result[state]) == {"in order", "shuffled"}


def test_a_clip_is_one_chunk_so_that_only_the_order_inside_it_tells(scripts, tokenizer):
    claim = scripts.mavors_order.CLAIM
    model = scripts.claims_trainer.build_model(claim.variants[0], 0, tokenizer)
    assert claim.budget.frames == (model.config.chunk_frames,)
    scenes = scripts.claims_worlds.WORLDS["scenes"].held_out(claim.budget, "test", 3, None)
    assert all(scene.has_events for scene in scenes)


def test_the_cost_of_shuffling_is_taken_within_a_seed(scripts):
    assert scripts.mavors_order._cost([0.5], [0.25]) == "+0.25"
    assert scripts.mavors_order._cost([0.5, 0.8], [0.25, 0.55]) == "+0.25 (+0.25 to +0.25)"


# The needle


def test_mavors_needle_grid_is_filled_by_chunks(scripts, tmp_path, tokenizer):
    grid = scripts.claims_needle_grid
    own = grid.GRIDS["mavors"]
    model = scripts.claims_trainer.build_model(own.variant, 0, tokenizer)
    assert model.config.model_type == "mavors" and model.config.chunk_frames == own.chunk_frames
    result = grid.measure(tmp_path, tmp_path, device="cpu", jobs=1, stamp=STAMP, quick=True, grid=own)
    assert set(result["mean"]) == set(own.ways)
    assert np.shape(result["mean"]["merged to 1/2"]) == (2, len(grid.DEPTHS))
    page = (tmp_path / "needle-grid-mavors.md").read_text()
    assert page == grid.make_page(json.loads((tmp_path / "needle-grid-mavors.json").read_text()))
    assert "| all patches | 8 (2 chunks) |" in page and "](needle-grid-mavors.png)" in page
    assert (tmp_path / "needle-grid-mavors.png").exists()


# What is published

PUBLISHED = {"siblings": "siblings", "mavors-order": "mavors_order"}
PUBLISHED |= {name: "claims_needle_grid" for name in ("needle-grid", "needle-grid-mavors")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_page_is_made_from_its_published_numbers(scripts, name):
    results = BENCHMARKS / "results"
    result = json.loads((results / f"{name}.json").read_text())
    assert (results / f"{name}.md").read_text() == getattr(scripts, PUBLISHED[name]).make_page(result)
