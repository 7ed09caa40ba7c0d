"""benchmarks/claims/: verdicts are what hand computation says, variants see the same, runs go on."""

import copy
import importlib
import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import elva_hf
from elva_hf.data.collator import pad_samples
from elva_hf.data.packing import IGNORED
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import questions
from elva_hf.geometry_elva import read_geometry
from elva_hf.training.losses import tubes_of_patches

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAMP = {"commit": "abc", "date": "2026-01-02", "device": "a CPU", "python": "3", "torch": "2", "transformers": "5"}
STAMP["command"] = "python it"


@pytest.fixture(scope="module")
def claims():
    """The modules of `benchmarks/claims/`, imported as its script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = "grading guidance hard_scenes hurting merging patch_embedding protocol reduction runs scenes stages"
        names += " trainer worlds"
        yield SimpleNamespace(**{name: importlib.import_module(f"claims.{name}") for name in names.split()})


@pytest.fixture(scope="module")
def protocol(claims):
    return claims.protocol


@pytest.fixture(scope="module")
def trainer(claims):
    return claims.trainer


@pytest.fixture(scope="module")
def budget(protocol):
    return protocol.Budget(2, 2, (1,), 3, evaluate_every=1, validation_scenes=3, test_scenes=2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_toy_tokenizer()


# The protocol


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ([0.1, 0.5, 0.89, 0.8], None),
        ([0.1, 0.9, 0.85, 0.95], 200),
        ([0.1, 0.9, 0.84, 0.95], 400),
        ([0.95, 0.2, 0.95, 0.8], None),
        ([0.9, 1.0, 1.0, 1.0], 100),
    ],
)
def test_a_level_is_reached_where_it_is_kept(protocol, shares, wanted):
    assert protocol.steps_to_level([100, 200, 300, 400], shares) == wanted


def test_runs_that_never_reach_a_level_count_with_their_budget(protocol):
    assert protocol.restricted_mean([100, None, 300], 800) == pytest.approx(400)


def curve_of(protocol, shares, tokens=None, test=None, parameters=7):
    steps = tuple(range(100, 100 * len(shares) + 1, 100))
    tokens = tokens or tuple(10 * step for step in steps)
    return protocol.Curve(steps, tuple(tokens), {"a": tuple(shares)}, {"a": test or shares[-1]}, parameters)


def test_equal_tokens_are_those_of_the_shorter_run(protocol):
    cheap = curve_of(protocol, [0.2, 0.4, 0.6], tokens=[100, 200, 300])
    dear = curve_of(protocol, [0.1, 0.5, 0.9], tokens=[200, 400, 600])
    assert protocol.shares_at_equal_tokens(cheap, dear, "a") == pytest.approx((0.6, 0.3))
    assert protocol.shares_at_equal_tokens(dear, cheap, "a") == pytest.approx((0.3, 0.6))
    assert protocol.share_at_tokens([200, 400], [0.1, 0.5], 199) is None
    assert protocol.share_at_tokens([200, 400], [0.1, 0.5], 401) is None


def test_differences_are_taken_within_a_seed(protocol):
    assert protocol.paired_differences({1: 0.5, 0: 0.9}, {0: 0.6, 1: 0.4}) == pytest.approx([0.3, 0.1])
    with pytest.raises(ValueError, match=r"seeds \[0, 1\] and \[0, 2\] do not pair"):
        protocol.paired_differences({0: 1, 1: 1}, {0: 1, 2: 1})


def test_the_bootstrap_resamples_seeds(protocol):
    values = [0.1, 0.4, -0.2, 0.3, 0.0]
    rng = np.random.default_rng(0)
    picks = rng.integers(5, size=(10_000, 5)).tolist()
    means = sorted(math.fsum(values[i] for i in pick) / 5 for pick in picks)
    low, high = protocol.bootstrap_interval(values)
    assert means[249] <= low <= means[250] and means[9749] <= high <= means[9750]
    assert protocol.bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)  # a quarter of all resamples has one value alone


def test_students_interval_is_that_of_the_tables(protocol):
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert protocol.t_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    with pytest.raises(ValueError, match="give no interval"):
        protocol.t_interval([1.0])


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.10, 0.12, 0.09, 0.11, 0.10], "confirmed"),
        ([-0.10, -0.12, -0.09, -0.11, -0.10], "contradicted"),
        ([0.1, -0.1, 0.05, -0.02, 0.0], "not seen"),
        ([0.01, 0.01, 0.01, 0.01, 0.5], "not seen"),  # the bootstrap alone would confirm it
        ([0.0, 0.0, 0.0, 0.0, 0.0], "not seen"),
        ([1e-17, 2e-17, 1e-17, 1e-17, 2e-17], "not seen"),
    ],
)
def test_a_verdict_needs_both_intervals(protocol, differences, verdict):
    found = protocol.compare(differences)
    assert found.verdict == verdict
    assert found.mean == pytest.approx(np.mean(differences), abs=1e-9)
    low, high = found.t_interval
    same = max(differences) - min(differences) < 1e-9
    assert found.visible == (None if same else pytest.approx((high - low) / 2))


# Runs


def make_runs(claims, seeds=2):
    claim = replace(claims.guidance.CLAIM, budget=replace(claims.guidance.CLAIM.budget, steps=3))
    return claims.runs.plan_runs(claim, seeds)


def test_the_key_of_a_run_changes_with_what_is_run(claims, protocol, monkeypatch):
    run = make_runs(claims)[0]
    others = [
        replace(run, seed=1),
        replace(run, device="cuda"),
        replace(run, variant=replace(run.variant, config={"patch_embed_type": "naive"})),
        replace(run, variant=replace(run.variant, guidance={"tube_weight": 1.0})),
        replace(run, budget=replace(run.budget, learning_rate=1e-3)),
        replace(run, claim="other"),
        replace(run, base=run),
        replace(run, base=replace(run, seed=1)),
    ]
    assert replace(run, keeps_weights=True).key == run.key
    keys = {run.key, *(other.key for other in others)}
    monkeypatch.setattr(claims.runs, "VERSION", protocol.VERSION + 1)
    assert len({*keys, run.key}) == len(others) + 2


def test_a_claim_goes_on_where_it_stopped(claims, protocol, tmp_path):
    path, runs, made = tmp_path / "sub" / "claim.jsonl", make_runs(claims), []

    def train(run, folder):
        assert folder == path.parent
        made.append((run.variant.name, run.seed))
        if len(made) == 4:
            raise KeyboardInterrupt
        return curve_of(protocol, [0.1 * len(made)], parameters=run.seed)

    asked = [(run.variant.name, run.seed) for run in runs]
    with pytest.raises(KeyboardInterrupt):
        claims.runs.finish_runs(runs, path, train, stamp=STAMP)
    assert made == asked[:4]
    assert len(path.read_text().splitlines()) == 3 and list(path.parent.iterdir()) == [path]
    lines = claims.runs.finish_runs(runs, path, train, stamp=STAMP)
    assert made == asked[:4] + asked[3:]
    assert claims.runs.finish_runs(runs, path, train, stamp=STAMP) == lines and len(made) == len(asked) + 1
    assert [(line["variant"]["name"], line["seed"]) for line in lines] == asked
    assert all(line.items() >= STAMP.items() for line in lines)
    assert protocol.Curve.from_dict(lines[0]["curve"]) == curve_of(protocol, [0.1], parameters=0)


def test_what_two_claims_share_is_trained_once(claims, protocol, tmp_path):
    budget, made = protocol.Budget(5), []
    none = protocol.Variant("gen", teacher="looks+place")
    mse = protocol.Variant("+mse", guidance={"tube_weight": 1.0}, teacher="looks+place")

    def finish(name, *variants, stamp=STAMP, **fields):
        claim = protocol.Claim(name, "", "", variants, (), (), replace(budget, **fields))
        runs = claims.runs.plan_runs(claim, 2)
        return claims.runs.finish_runs(runs, tmp_path / f"{name}.jsonl", train, stamp=stamp)

    def train(run, folder):
        made.append((run.claim, run.variant.name, run.seed))
        return curve_of(protocol, [0.01 * len(made)])

    first = finish("first", none, mse)
    made.clear()
    later = {**STAMP, "commit": "def"}
    unguided = replace(none, name="no teacher", teacher="looks")  # whom nobody asks
    other = replace(mse, name="other teacher", teacher="looks")
    lines = finish("second", unguided, other, replace(mse, name="guided"), stamp=later)
    assert made == [("second", "other teacher", 0), ("second", "other teacher", 1)]
    assert [line["curve"] for line in lines[::3]] == [line["curve"] for line in first[::2]]
    assert lines[0]["commit"] == "abc" and lines[1]["commit"] == "def" and lines[0]["made_for"] == "first"
    assert [line["variant"]["name"] for line in lines[:3]] == ["no teacher", "other teacher", "guided"]
    made.clear()
    finish("third", none, batch_size=3)
    finish("fourth", none, stamp={**STAMP, "device": "a GPU"})
    finish("fifth", replace(none, share=0.5), replace(none, config={"patch_embed_type": "naive"}))
    assert len(made) == 8


WORKER = """
import torch
from claims.protocol import Curve

def train(run, folder):
    if (run.variant.name, run.seed) == ("+mse", 0):
        raise FloatingPointError("diverged")
    return Curve((1,), (1,), {}, {}, torch.get_num_threads())
"""


def test_processes_have_one_thread_and_a_failed_run_leaves_no_line(claims, tmp_path, monkeypatch):
    (tmp_path / "claims_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of the processes, if they did not choose
    import claims_worker

    path, runs = tmp_path / "claim.jsonl", make_runs(claims, 1)[:3]
    with pytest.raises(FloatingPointError, match="diverged"):
        claims.runs.finish_runs(runs, path, claims_worker.train, jobs=2, stamp=STAMP)
    lines = claims.runs.read_lines(path).values()
    assert "gen" in {line["variant"]["name"] for line in lines} and len(lines) <= 2
    assert {line["curve"]["parameters"] for line in lines} == {1}
    assert "+mse" not in {line["variant"]["name"] for line in lines}


def test_bases_are_made_before_what_begins_with_them(claims, protocol, tmp_path):
    variants = tuple(protocol.Variant(name, base=base) for name, base in (("b", "a"), ("a", None), ("c", "a")))
    claim = protocol.Claim("it", "", "", variants, (), (), protocol.Budget(5, tuning_steps=2))
    plan, made = claims.runs.plan_runs(claim, 2), []

    def train(run, folder):
        made.append((run.variant.name, run.seed))
        if run.keeps_weights:
            path = claims.runs.weights_path(folder, run)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return curve_of(protocol, [0.5])

    lines = claims.runs.finish_runs(plan, tmp_path / "it.jsonl", train, stamp=STAMP)
    assert made[:2] == [("a", 0), ("a", 1)] and sorted(made[2:]) == [("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert [line["variant"]["name"] for line in lines] == ["b", "a", "c"] * 2
    other = replace(claim, name="other", variants=(protocol.Variant("d", base="a", tuned=False),), bases=claim)
    more = claims.runs.plan_runs(other, 3)
    claims.runs.finish_runs(more, tmp_path / "other.jsonl", train, stamp=STAMP)
    assert made[6:] == [("a", 2), ("d", 0), ("d", 1), ("d", 2)]  # two bases were there
    assert len(claims.runs.read_lines(tmp_path / "other.jsonl")) == 3


def test_a_base_that_does_not_exist_is_named(protocol):
    with pytest.raises(ValueError, match="'b' begins with 'x'; known are b"):
        protocol.Claim("it", "", "", (protocol.Variant("b", base="x"),), (), (), protocol.Budget(5))


def test_steps_of_a_variant_follow_its_phases(protocol):
    budget = protocol.Budget(10, frames=(8,), tuning_steps=3)
    phases = (protocol.Phase(0.3, (1,)), protocol.Phase(0.7, (1, 8)))
    assert protocol.frames_of_steps(protocol.Variant("a"), budget) == [8] * 10
    assert protocol.frames_of_steps(protocol.Variant("a", share=0.5), budget) == [8] * 5
    found = protocol.frames_of_steps(protocol.Variant("a", phases=phases), budget)
    assert found[:3] == [1, 1, 1] and len(found) == 10 and set(found[3:]) == {1, 8}
    assert protocol.count_steps(protocol.Variant("a", base="b"), budget) == 3
    assert protocol.count_steps(protocol.Variant("a", base="b", tuned=False), budget) == 0
    with pytest.raises(ValueError, match=r"add up to 0\.7"):
        protocol.Variant("a", phases=phases[1:])


# The worlds


def test_orders_of_steps_see_the_same_videos(claims):
    budget = replace(claims.stages.CLAIM.budget, steps=8, batch_size=2)
    spatial, joint, video = claims.stages.CLAIM.variants
    world = claims.worlds.WORLDS["scenes"]

    def seen(variant, seed=0):
        steps = claims.protocol.count_steps(variant, budget)
        return [(s.seed, s.num_frames) for step in range(steps) for s in world.draw(budget, seed, step, variant)]

    assert seen(spatial) != seen(joint) and Counter(seen(spatial)) == Counter(seen(joint))
    assert max(Counter(seen(joint)).values()) == 1
    assert {frames for _, frames in seen(video)} == {8}
    assert set(seen(video)) & set(seen(joint))
    tuned = replace(video, base="x")
    budget = replace(budget, tuning_steps=8)
    assert not set(seen(tuned)) & {*seen(video), *seen(video, 1), *seen(tuned, 1)}


def test_stages_have_equal_tokens(claims, tokenizer):
    claim, world = claims.stages.CLAIM, claims.worlds.WORLDS["scenes"]
    budget = replace(claim.budget, batch_size=1, steps=200)
    tokens = []
    for variant in (claim.variants[0], claim.variants[2]):
        drawn = [world.draw(budget, 0, i, variant)[0] for i in range(claims.protocol.count_steps(variant, budget))]
        tokens.append(sum(len(world.ask(scene, 8, tokenizer, 16, variant).sample) for scene in drawn))
    assert tokens[0] == pytest.approx(tokens[1], rel=0.02)


def test_hard_scenes_differ_in_the_condition_alone(claims):
    world, budget = claims.worlds.WORLDS["hard"], claims.hurting.CLAIM.budget
    rows = world.held_out(budget, "test", 40, None)
    frames = {
        name: [claims.hard_scenes.draw_hard(row) for row in rows if row.condition == name]
        for name in claims.hard_scenes.CONDITIONS
    }
    easy, fast = ([row.scene for row in rows if row.condition == name] for name in ("easy", "fast"))
    moving = 0
    for slow, quick in zip(easy, fast, strict=True):
        for one, other in zip(slow.objects, quick.objects, strict=True):
            assert list(dict.fromkeys(one.cells)) == list(dict.fromkeys(other.cells))
            for thing, interval in ((one, 2), (other, 1)):
                changes = [i for i in range(1, 8) if thing.cells[i] != thing.cells[i - 1]]
                assert all(b - a == interval for a, b in itertools.pairwise(changes))
                assert not changes or (changes[0] >= 2 and changes[-1] <= 6)
            moving += one.motion != "still"
    assert 20 < moving < 40
    for big, small in zip(frames["easy"], frames["small"], strict=True):
        changed = (big != small).any(-1).sum((1, 2))
        assert (changed > 20).all() and (changed < 170).all()  # 13 x 13 px at most
    for still, drifting in zip(frames["easy"], frames["drift"], strict=True):
        assert np.abs(still.mean((1, 2, 3)) - drifting.mean((1, 2, 3))).max() > 0.2


def test_every_third_training_scene_is_hard(claims, tokenizer):
    world, budget = claims.worlds.WORLDS["mixed"], replace(claims.merging.CLAIM.budget, frames=(8,))
    variant = claims.protocol.Variant("it")
    drawn = [scene for step in range(3) for scene in world.draw(budget, 0, step, variant)]
    hard = Counter(getattr(scene, "condition", None) for scene in drawn)
    assert hard == {None: 32, "easy": 4, "fast": 4, "small": 4, "drift": 4}
    for scene in (scene for scene in drawn if hasattr(scene, "condition")):
        assert scene.scene.split == "train"
        tasks = {column.split(",")[0] for column in world.ask(scene, 99, tokenizer, 16, variant).columns}
        assert {"digit", "motion", "color"} <= tasks and ("pattern" in tasks) == (scene.condition != "small")
    assert not any(hasattr(scene, "condition") for scene in world.held_out(budget, "test", 9, variant))


def test_conditions_are_asked_the_same(claims, tokenizer):
    world, budget = claims.worlds.WORLDS["hard"], claims.hurting.CLAIM.budget
    asked = [world.ask(row, 8, tokenizer, 16, None) for row in world.held_out(budget, "test", 2, None)]
    for easy, fast in zip(asked[:2], asked[2:4], strict=True):
        assert torch.equal(easy.sample.labels, fast.sample.labels)
    columns = {column for row in asked for column in row.columns}
    assert columns == set(claims.hurting.CLAIM.columns)
    assert world.blind(budget, 50, 50).keys() == columns


# The trainer


def spy_on_training(trainer, patch):
    """Lists of every batch that a run is updated with, of its learning-rate factors and of its models."""
    batches, factors, models = [], [], []
    update, build = trainer.update, trainer.build_model

    def watch(model, batch, optimizers, factor, variant):
        batches.append(batch)
        factors.append(factor)
        return update(model, batch, optimizers, factor, variant)

    def keep(*args):
        models.append(build(*args))
        return models[-1]

    patch.setattr(trainer, "update", watch)
    patch.setattr(trainer, "build_model", keep)
    return batches, factors, models


@pytest.fixture(scope="module")
def trained(claims, trainer, budget, tmp_path_factory):
    """Curves, batches and models of two variants, one of them guided, and of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    gen, mse = claims.guidance.CLAIM.variants[:2]
    with pytest.MonkeyPatch.context() as patch:
        batches, factors, models = spy_on_training(trainer, patch)
        plan = [claims.runs.Run("it", variant, seed, budget) for variant, seed in ((gen, 3), (mse, 3), (gen, 4))]
        curves = [trainer.train(run, folder) for run in plan]
    assert not list(folder.iterdir())
    return SimpleNamespace(curves=curves, batches=batches, factors=factors, models=models)


def test_variants_of_a_seed_see_the_same_videos_in_the_same_order(trained):
    one, other, next_seed = (trained.batches[i : i + 2] for i in (0, 2, 4))
    for name in ("input_ids", "labels", "pixel_values_videos"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True))
        assert not torch.equal(one[0][name], one[1][name])
    pixels = {tuple(batch["pixel_values_videos"].sum(1).tolist()) for batch in (*one, *next_seed)}
    assert len(pixels) == 4


def test_a_curve_counts_real_tokens_and_every_evaluation(trained, tokenizer):
    curve = trained.curves[0]
    tokens = [int((batch["input_ids"] != tokenizer.pad_token_id).sum()) for batch in trained.batches[:2]]
    assert curve.steps == (1, 2) and curve.tokens == (tokens[0], sum(tokens))
    assert curve.test and all(len(shares) == 2 for shares in curve.accuracy.values())
    assert curve.parameters == sum(weight.numel() for weight in trained.models[0].parameters())
    assert curve.parameters == trained.curves[1].parameters  # task heads are not counted


def test_only_guided_variants_learn_from_the_teacher(claims, trainer, trained, tokenizer):
    gen, mse, _ = trained.models
    fresh = trainer.build_model(claims.guidance.CLAIM.variants[1], 3, tokenizer)
    assert gen.guidance is None and mse.config.guidance["frame_weight"] == 0
    before, after = (next(model.guidance.tube_head.parameters()) for model in (fresh, mse))
    assert not torch.equal(before, after)
    start = trainer.build_model(claims.guidance.CLAIM.variants[0], 3, tokenizer).state_dict()
    assert all(torch.equal(start[name], value) for name, value in fresh.state_dict().items() if name in start)


def test_the_teachers_tubes_and_frames_are_means_of_its_patches(claims, trainer, tokenizer):
    rows = [ask(claims, claims.scenes.draw_scene(seed, 6, "train", 0.0), 3, tokenizer) for seed in range(2)]
    batch = trainer.make_batch(rows, tokenizer.pad_token_id, "cpu")
    seen = trainer.see(rows, "looks", 16, None, "cpu")
    model = elva_hf.ElvaForCausalLM.from_pretrained(elva_hf.tiny_checkpoint())
    geometry = read_geometry(model.model.token_kinds(batch["input_ids"]))
    features = [trainer.teachers.features("looks", row.frames, 16, None) for row in rows]
    patches = torch.from_numpy(np.concatenate([part.reshape(-1, 29) for part in features]))
    torch.testing.assert_close(seen["teacher_tubes"], tubes_of_patches(patches, geometry))
    assert seen["teacher_frames"].shape == (12, 29)
    wanted = torch.from_numpy(features[1][1].reshape(-1, 29).mean(0))
    torch.testing.assert_close(seen["teacher_frames"][7], wanted)


def ask(claims, scene, number, tokenizer):
    return claims.worlds.WORLDS["scenes"].ask(scene, number, tokenizer, 16, claims.protocol.Variant("it"))


def draw_rows(claims, tokenizer, count, number=6, frames=8):
    scenes = [claims.scenes.draw_scene(seed, frames, "validation", 0.3) for seed in range(count)]
    return [ask(claims, scene, number, tokenizer) for scene in scenes]


@pytest.fixture(scope="module")
def tiny():
    model = elva_hf.ElvaForCausalLM.from_pretrained(elva_hf.tiny_checkpoint(), dtype=torch.float32)
    model.set_merge_schedule("none")
    return model


def test_an_answer_is_right_where_it_is_right_on_a_row_of_its_own(claims, trainer, protocol, tokenizer, tiny):
    rows, expected = draw_rows(claims, tokenizer, 6), {}
    tiny = copy.deepcopy(tiny)
    tiny.model.patch_embed.positions.data.zero_()  # it answers everything else right
    for row in rows:
        for task, single in zip(row.columns, row.sample.unpack(), strict=True):
            inputs = pad_samples([single], tokenizer.pad_token_id)
            labels = inputs.pop("labels")[:, 1:]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                guesses = tiny(**inputs, pixel_values_videos=single.pixel_values_videos).logits[:, :-1].argmax(-1)
            right = bool(((guesses == labels) | (labels == IGNORED)).all())
            for column in (task, f"{task}/{row.num_objects}"):
                expected.setdefault(column, []).append(right)
    scores = trainer.evaluate(tiny, rows, tokenizer.pad_token_id, protocol.Variant("it"), "cpu", batch_size=4)
    assert scores.shares == {column: pytest.approx(np.mean(values)) for column, values in expected.items()}
    assert 0 < sum(map(sum, expected.values())) < sum(map(len, expected.values()))
    assert tiny.training and scores.visual_share == 1


# Reductions


@pytest.mark.parametrize("kind", ["merge", "pool", "drop"])
def test_a_reduction_to_everything_changes_nothing(claims, trainer, protocol, tokenizer, tiny, kind):
    batch = trainer.make_batch(draw_rows(claims, tokenizer, 3), tokenizer.pad_token_id, "cpu")
    with torch.no_grad():
        plain, tokens = trainer.take_loss(tiny.train(), batch, protocol.Variant("it"))
        variant = protocol.Variant("it", reduction=protocol.Reduction(kind, 1.0))
        same, same_tokens = trainer.take_loss(tiny, batch, variant)
        less = protocol.Variant("it", reduction=protocol.Reduction(kind, 0.5))
        other, fewer = trainer.take_loss(tiny, batch, less)
    assert float(same) == pytest.approx(float(plain), rel=1e-4) and same_tokens == tokens
    assert abs(float(other) - float(plain)) > 1e-3
    assert tokens - fewer == {"merge": 0, "pool": 3 * 64, "drop": 3 * 84}[kind]


@pytest.mark.parametrize(
    ("kind", "ratio", "share"),
    [
        ("merge", 0.5, (128 + 5 * 52) / 768),
        ("merge", 0.375, (128 + 5 * 32) / 768),
        ("pool", 0.375, 0.375),
        ("drop", 0.5, 0.5),
    ],
)
def test_the_share_of_patches_is_a_mean_over_layers(claims, trainer, protocol, tokenizer, tiny, kind, ratio, share):
    variant = protocol.Variant("it", reduction=protocol.Reduction(kind, ratio))
    score = trainer.evaluate(tiny, draw_rows(claims, tokenizer, 3), tokenizer.pad_token_id, variant, "cpu", 2)
    assert score.visual_share == pytest.approx(share)


def test_merged_answers_are_those_of_rows_of_their_own(claims, trainer, protocol, tokenizer, tiny):
    reduction = protocol.Reduction("merge", 0.4)
    row = draw_rows(claims, tokenizer, 5)[4]
    batch = trainer.make_batch([row], tokenizer.pad_token_id, "cpu")
    with torch.no_grad():
        reading = claims.reduction.read(tiny, batch, reduction)
        for number, single in enumerate(row.sample.unpack(), start=1):
            inputs = pad_samples([single], tokenizer.pad_token_id)
            alone = tiny.model(
                **{name: inputs[name] for name in ("input_ids", "attention_mask")},
                pixel_values_videos=single.pixel_values_videos,
                merge_schedule=claims.reduction.merge_schedule(reduction, tiny.config.text_config.num_hidden_layers),
            ).last_hidden_state
            own = reading.hidden[reading.segments == number]
            torch.testing.assert_close(own, alone[0, -len(own) :], atol=1e-4, rtol=1e-4)


def test_dropped_frames_are_not_seen(claims, trainer, protocol, tokenizer, tiny):
    batch = trainer.make_batch(draw_rows(claims, tokenizer, 1), tokenizer.pad_token_id, "cpu")
    reduction = protocol.Reduction("drop", 0.25)  # frames 3 and 7 are left
    with torch.no_grad():
        before = claims.reduction.read(tiny, batch, reduction).hidden
        pixels = batch["pixel_values_videos"].view(8, 16, -1).clone()
        pixels[[0, 1, 2, 4, 5, 6]] = 0.5
        after = claims.reduction.read(tiny, {**batch, "pixel_values_videos": pixels.flatten(0, 1)}, reduction).hidden
        pixels[3] = 0.5
        other = claims.reduction.read(tiny, {**batch, "pixel_values_videos": pixels.flatten(0, 1)}, reduction).hidden
    torch.testing.assert_close(before, after)
    assert (other - after).abs().max() > 1e-2


def test_what_no_reduction_can_do_is_said(claims, trainer, protocol, tokenizer, tiny):
    with pytest.raises(ValueError, match=r"cannot leave 0\.25"):
        claims.reduction.merge_schedule(protocol.Reduction("merge", 0.25), 4)
    with pytest.raises(ValueError, match="reduction 'prune': expected one of merge"):
        protocol.Reduction("prune")
    with pytest.raises(ValueError, match="give guidance or a reduction"):
        protocol.Variant("it", guidance={}, reduction=protocol.Reduction("pool", 0.5))
    rows = [*draw_rows(claims, tokenizer, 1), *draw_rows(claims, tokenizer, 1, frames=6)]
    batch = trainer.make_batch(rows, tokenizer.pad_token_id, "cpu")
    with pytest.raises(ValueError, match="differ in frames or grid"):
        claims.reduction.read(tiny, batch, protocol.Reduction("pool", 0.5))


def test_tuning_goes_on_from_the_weights_of_its_base(claims, trainer, protocol, budget, tmp_path):
    variants = (
        protocol.Variant("base", {"patch_embed_type": "naive"}, guidance={"tube_weight": 1.0, "frame_weight": 0.0}),
        protocol.Variant("same", base="base", tuned=False),
        protocol.Variant("pool", base="base", reduction=protocol.Reduction("pool", 1.0)),
    )
    budget = replace(budget, frames=(8,), tuning_steps=2)
    claim = protocol.Claim("it", "", "", variants, (), (), budget)
    base, same, pool = claims.runs.plan_runs(claim, 1)
    assert pool.variant.config == base.variant.config
    with pytest.MonkeyPatch.context() as patch:
        batches, _, models = spy_on_training(trainer, patch)
        curve = trainer.train(same, tmp_path)  # trains the base
        stored = claims.runs.weights_path(tmp_path, base).read_bytes()
        finished = trainer.train(base, tmp_path)
        tuned = trainer.train(pool, tmp_path)
    assert len(batches) == 6 and list(tmp_path.rglob("*.partial")) == []
    assert claims.runs.weights_path(tmp_path, base).read_bytes() == stored
    assert curve.steps == (0,) and curve.test == curve.test_untuned == finished.test
    assert curve.accuracy == {column: shares[-1:] for column, shares in finished.accuracy.items()}
    assert tuned.steps == (0, 1, 2) and tuned.tokens[0] == 0 and finished.test_untuned == {}
    weights = [model.model.patch_embed.special_tokens for model in models]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    wider = replace(pool, variant=replace(pool.variant, config={"patch_embed_type": "video"}))
    with pytest.raises(ValueError, match="parameters differ"):
        trainer.train(wider, tmp_path)


# Grading


def test_an_answer_is_wrong_if_any_of_its_tokens_is(claims):
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7, 8, -100]])
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 2, -1]])
    guesses = torch.tensor([[0, 5, 6, 0, 7, 9, 0, 0]])  # the first answer whole, the second but for its end
    assert claims.grading.grade(guesses, labels, segments) == [[[True, True], [True, False]]]
    row = SimpleNamespace(columns=("a", "b"), num_objects=2, fields=())
    found = list(claims.grading.count_right([row], guesses, labels, segments))
    assert found == [("a", True), ("a/2", True), ("b", False), ("b/2", False)]
    row.fields = ((), ("c/x#0", "c/x#1"))
    assert list(claims.grading.count_right([row], guesses, labels, segments))[4:] == [("c/x", True), ("c/x", False)]
    row.fields = ((), ("c/x#0", "c/x#0"))
    assert list(claims.grading.count_right([row], guesses, labels, segments))[4:] == [("c/x", False)]
    row.fields = ((), ("c/x#0", ""))
    assert list(claims.grading.count_right([row], guesses, labels, segments))[4:] == [("c/x", True)]


def test_videos_are_swapped_between_rows_of_one_shape(claims, tokenizer):
    rows = [draw_rows(claims, tokenizer, 3, frames=frames)[i] for i, frames in ((0, 8), (0, 1), (1, 8), (2, 8), (1, 1))]
    swapped = claims.grading.swap_videos(rows)
    for row, new, other in zip(rows, swapped, (2, 4, 3, 0, 1), strict=True):
        assert torch.equal(new.sample.pixel_values_videos, rows[other].sample.pixel_values_videos)
        assert torch.equal(new.sample.input_ids, row.sample.input_ids) and new.columns == row.columns
        assert new.frames is rows[other].frames


# The optimisers


@pytest.mark.parametrize(("name", "steps"), [("adamw", 80), ("muon", 40)])
def test_a_batch_is_learned_by_heart(claims, trainer, protocol, budget, tokenizer, name, steps):
    budget, variant = replace(budget, optimizer=name), protocol.Variant("it")
    model = trainer.build_model(variant, 0, tokenizer).train()
    optimizer = trainer.build_optimizer(model, budget)
    world = claims.worlds.WORLDS["scenes"]
    rows = [ask(claims, scene, 3, tokenizer) for scene in world.draw(budget, 0, 0, variant)]
    batch = trainer.make_batch(rows, tokenizer.pad_token_id, "cpu")

    def shares():
        return trainer.evaluate(model, rows, tokenizer.pad_token_id, variant, "cpu").shares

    assert not any(shares().values())
    for _ in range(steps):
        trainer.update(model, batch, optimizer, 1.0, variant)
    assert set(shares().values()) == {1.0}
    groups = [sum(weight.numel() for weight in group["params"]) for group in optimizer.param_groups]
    assert len(groups) == 1 + (name == "muon") and sum(groups) == sum(w.numel() for w in model.parameters())
    if name == "muon":
        assert groups[0] == sum(
            weight.numel() for weight in model.model.language_model.layers.parameters() if weight.ndim == 2
        )


def test_an_optimiser_that_is_not_known_is_named(trainer, budget):
    with pytest.raises(ValueError, match="optimizer='sgd': expected"):
        trainer.build_optimizer(torch.nn.Linear(1, 1), replace(budget, optimizer="sgd"))


def test_the_learning_rate_warms_up_and_falls_at_the_end(trainer, budget):
    budget = replace(budget, steps=100, warmup=10, tail_share=0.2)
    wanted = {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}
    assert {step: trainer.rate_factor(step, budget) for step in wanted} == pytest.approx(wanted)


def test_the_learning_rate_is_a_share_of_its_peak_however_often_it_is_set(trainer):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    for factor in (0.5, 0.5, 1.0):
        trainer._step(optimizer, factor)
        assert optimizer.param_groups[0]["lr"] == 2 * factor


def test_the_wider_naive_embedding_has_the_parameters_of_the_video_one(claims, trainer, tokenizer):
    video, naive = (replace(variant, guidance=None) for variant in claims.patch_embedding.CLAIM.variants[:2])
    wider = replace(naive, config={**naive.config, **claims.patch_embedding.WIDER})
    sizes = [trainer.count_parameters(trainer.build_model(variant, 0, tokenizer)) for variant in (video, naive, wider)]
    assert sizes[1] < 0.96 * sizes[0] and abs(sizes[2] - sizes[0]) < 1e-3 * sizes[0]


def test_blind_shares_are_those_of_the_commonest_answers(claims, budget):
    budget = replace(budget, frames=(1, 6), single_share=0.3)
    draw, counts = claims.scenes.draw_scene, {}
    for seed in range(60):
        for question in questions(draw(seed, 6, "train", 0.3)):
            answers = counts.setdefault(question.text, {})
            answers[question.answer] = answers.get(question.answer, 0) + 1
    right = []
    for seed in range(40):
        scene = draw(seed, 6, "test", 0.3)
        if len(scene.objects) == 2:
            for question in questions(scene):
                if question.task == "count":
                    answers = counts[question.text]
                    right.append(max(answers, key=answers.get) == question.answer)
    shares = claims.worlds.WORLDS["scenes"].blind(budget, 60, 40)
    assert shares["count/2"] == pytest.approx(np.mean(right))
    assert 0 < shares["count"] < 1 and "motion/1" in shares
