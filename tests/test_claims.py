"""benchmarks/claims/: verdicts are what hand computation says, finished runs are not made again, the scripts run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

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
        from claims import guidance, patch_embedding, protocol, report, run, runs, trainer

        yield SimpleNamespace(
            protocol=protocol,
            runs=runs,
            trainer=trainer,
            report=report,
            run=run,
            guidance=guidance.CLAIM,
            patch_embedding=patch_embedding.CLAIM,
        )


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
    claim = replace(claims.guidance, budget=replace(claims.guidance.budget, steps=3))
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
    ]
    assert replace(run).key == run.key
    keys = {run.key, *(other.key for other in others)}
    monkeypatch.setattr(claims.runs, "VERSION", protocol.VERSION + 1)
    assert len({*keys, run.key}) == len(others) + 2


def test_a_claim_goes_on_where_it_stopped(claims, protocol, tmp_path):
    path, runs, made = tmp_path / "sub" / "claim.jsonl", make_runs(claims), []

    def train(variant, seed, budget, device):
        made.append((variant.name, seed))
        if len(made) == 4:
            raise KeyboardInterrupt
        return curve_of(protocol, [0.1 * len(made)], parameters=seed)

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


WORKER = """
import torch
from claims.protocol import Curve

def train(variant, seed, budget, device):
    if (variant.name, seed) == ("+mse", 0):
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


# The trainer


def spy_on_training(trainer, patch):
    """Lists of every batch that a run is updated with, of its learning-rate factors and of its models."""
    batches, factors, models = [], [], []
    update, build = trainer._update, trainer.build_model

    def watch(model, batch, optimizers, factor):
        batches.append(batch)
        factors.append(factor)
        update(model, batch, optimizers, factor)

    def keep(*args):
        models.append(build(*args))
        return models[-1]

    patch.setattr(trainer, "_update", watch)
    patch.setattr(trainer, "build_model", keep)
    return batches, factors, models


@pytest.fixture(scope="module")
def trained(claims, trainer, budget):
    """Curves, batches and models of two guided variants and of another seed."""
    gen, mse = claims.guidance.variants[:2]
    with pytest.MonkeyPatch.context() as patch:
        batches, factors, models = spy_on_training(trainer, patch)
        curves = [trainer.train(variant, seed, budget, "cpu") for variant, seed in ((gen, 3), (mse, 3), (gen, 4))]
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
    fresh = trainer.build_model(claims.guidance.variants[1], 3, tokenizer)
    assert gen.guidance is None and mse.config.guidance["frame_weight"] == 0
    before, after = (next(model.guidance.tube_head.parameters()) for model in (fresh, mse))
    assert not torch.equal(before, after)
    start = trainer.build_model(claims.guidance.variants[0], 3, tokenizer).state_dict()
    assert all(torch.equal(start[name], value) for name, value in fresh.state_dict().items() if name in start)


def test_the_teachers_tubes_and_frames_are_means_of_its_patches(trainer, budget, tokenizer):
    scenes = [trainer.draw_scene(seed, 6, "train", 0.0) for seed in range(2)]
    rows = [trainer.ask(scene, 3, tokenizer, 16) for scene in scenes]
    batch, segments = trainer.make_batch(rows, tokenizer.pad_token_id, "cpu")
    model = elva_hf.ElvaForCausalLM.from_pretrained(elva_hf.tiny_checkpoint())
    geometry = read_geometry(model.model.token_kinds(batch["input_ids"]))
    patches = torch.cat([row.teacher.flatten(0, 2) for row in rows])
    torch.testing.assert_close(batch["teacher_tubes"], tubes_of_patches(patches, geometry))
    assert batch["teacher_frames"].shape == (12, 29)
    torch.testing.assert_close(batch["teacher_frames"][7], rows[1].teacher[1].flatten(0, 1).mean(0))
    assert segments.max() == 3 and (segments == -1).sum() == (batch["input_ids"] == tokenizer.pad_token_id).sum()


def test_an_answer_is_right_where_it_is_right_on_a_row_of_its_own(trainer, tokenizer):
    model = elva_hf.ElvaForCausalLM.from_pretrained(elva_hf.tiny_checkpoint(), dtype=torch.float32)
    model.set_merge_schedule("none")
    scenes = [trainer.draw_scene(seed, 8, "validation", 0.3) for seed in range(6)]
    rows = [trainer.ask(scene, 6, tokenizer, 16) for scene in scenes]
    expected = {}
    for row in rows:
        for task, single in zip(row.columns, row.sample.unpack(), strict=True):
            inputs = pad_samples([single], tokenizer.pad_token_id)
            labels = inputs.pop("labels")[:, 1:]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                guesses = model(**inputs, pixel_values_videos=single.pixel_values_videos).logits[:, :-1].argmax(-1)
            right = bool(((guesses == labels) | (labels == IGNORED)).all())
            for column in (task, f"{task}/{row.num_objects}"):
                expected.setdefault(column, []).append(right)
    scores = trainer.evaluate(model, rows, tokenizer.pad_token_id, "cpu", batch_size=4)
    assert scores == {column: pytest.approx(np.mean(values)) for column, values in expected.items()}
    assert 0 < sum(map(sum, expected.values())) < sum(map(len, expected.values()))
    assert model.training


def test_an_answer_is_wrong_if_any_of_its_tokens_is(trainer):
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7, 8, -100]])
    segments = torch.tensor([[0, 1, 1, 1, 2, 2, 2, -1]])
    guesses = torch.tensor([[0, 5, 6, 0, 7, 9, 0, 0]])  # the first answer whole, the second but for its end
    assert trainer.grade(guesses, labels, segments) == [[True, False]]
    guesses[0, 5] = 8
    assert trainer.grade(guesses, labels, segments) == [[True, True]]


@pytest.mark.parametrize(("optimizer", "steps"), [("adamw", 80), ("muon", 40)])
def test_a_batch_is_learned_by_heart(trainer, protocol, budget, tokenizer, optimizer, steps):
    budget = replace(budget, optimizer=optimizer)
    model = trainer.build_model(protocol.Variant("it"), 0, tokenizer).train()
    optimizers = trainer.build_optimizers(model, budget)
    rows = [trainer.ask(scene, 3, tokenizer, 16) for scene in trainer.draw_step(budget, 0, 0)]
    batch, _ = trainer.make_batch(rows, tokenizer.pad_token_id, "cpu")
    assert not any(trainer.evaluate(model, rows, tokenizer.pad_token_id, "cpu").values())
    for _ in range(steps):
        trainer._update(model, batch, optimizers, 1.0)
    assert set(trainer.evaluate(model, rows, tokenizer.pad_token_id, "cpu").values()) == {1.0}
    groups = [sum(weight.numel() for weight in opt.param_groups[0]["params"]) for opt in optimizers]
    assert len(groups) == 1 + (optimizer == "muon") and sum(groups) == sum(w.numel() for w in model.parameters())
    if optimizer == "muon":
        assert groups[0] == sum(
            weight.numel() for weight in model.model.language_model.layers.parameters() if weight.ndim == 2
        )


def test_an_optimiser_that_is_not_known_is_named(trainer, budget):
    with pytest.raises(ValueError, match="optimizer='sgd': expected"):
        trainer.build_optimizers(torch.nn.Linear(1, 1), replace(budget, optimizer="sgd"))


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
    video, naive, wider = (
        trainer.count_parameters(trainer.build_model(variant, 0, tokenizer))
        for variant in claims.patch_embedding.variants
    )
    assert naive < 0.96 * video and abs(wider - video) < 1e-3 * video


def test_blind_shares_are_those_of_the_commonest_answers(trainer, budget):
    budget = replace(budget, frames=(1, 6), single_share=0.3)
    counts = {}
    for seed in range(60):
        for question in questions(trainer.draw_scene(seed, 6, "train", 0.3)):
            answers = counts.setdefault(question.text, {})
            answers[question.answer] = answers.get(question.answer, 0) + 1
    right = []
    for seed in range(40):
        scene = trainer.draw_scene(seed, 6, "test", 0.3)
        if len(scene.objects) == 2:
            for question in questions(scene):
                if question.task == "count":
                    answers = counts[question.text]
                    right.append(max(answers, key=answers.get) == question.answer)
    shares = trainer.blind_shares(budget, 60, 40)
    assert shares["count/2"] == pytest.approx(np.mean(right))
    assert 0 < shares["count"] < 1 and "motion/1" in shares


# The report


@pytest.fixture
def result(claims, protocol, tmp_path):
    """Of two variants and three seeds, whose figures are easy to know."""
    claim = protocol.Claim(
        "it",
        "A title",
        "Table 9",
        (protocol.Variant("ours"), protocol.Variant("theirs")),
        (("ours", "theirs"),),
        ("a",),
        protocol.Budget(300),
    )

    def train(variant, seed, budget, device):
        gap = 0.0 if variant.name == "ours" else 0.1 + seed / 100
        return curve_of(protocol, [0.5, 0.95 - gap, 0.98 - gap], test=0.97 - gap, parameters=len(variant.name))

    lines = claims.runs.finish_runs(claims.runs.plan_runs(claim, 3), tmp_path / "it.jsonl", train, stamp=STAMP)
    lines[0]["commit"] = "def"
    return claims.report.summarise(claim, lines, {"a": 0.25, "b": 0.1}, "20 scenes", "python it")


def test_a_result_holds_differences_within_seeds(result):
    (pair,) = result["comparisons"]
    assert pair["final accuracy"]["differences"] == pytest.approx([0.1, 0.11, 0.12])
    assert pair["accuracy at equal tokens"]["differences"] == pytest.approx([0.1, 0.11, 0.12])
    assert pair["steps saved"]["differences"] == [100, 100, 100]  # 200 against the whole budget
    assert pair["final accuracy"]["verdict"] == "confirmed"
    ours, theirs = result["variants"]
    assert ours["steps_to_level"] == {"a": [200, 200, 200]} and theirs["steps_to_level"] == {"a": [None] * 3}
    assert ours["curve"]["mean"] == pytest.approx([0.5, 0.95, 0.98])
    assert theirs["curve"]["mean"] == pytest.approx([0.5, 0.84, 0.87])
    assert result["commit"] == "abc, def"


def test_a_page_names_where_its_figures_come_from(claims, result, tmp_path):
    claims.report.write(result, tmp_path / "out")
    files = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in files.values()} == {f"claims-it{end}" for end in (".json", ".md", ".png")}
    text = files[".md"].read_text()
    assert json.loads(files[".json"].read_text()) == result
    assert claims.report.render(result) == text
    words = " ".join(text.split())
    for part in (
        "Commit abc, def; 2026-01-02; a CPU",
        "3 seeds (0, 1, 2), 300 steps of 16 videos",
        "8 frames, optimiser",
    ):
        assert part in words
    assert "| ours | 4 | 300 | 3000 | 0.97 | 0.97 to 0.97 | 200.0 | 3 of 3 |" in text
    assert "| blind | - | - | - | 0.25 |" in text
    assert "| ours over theirs | steps saved | +100 | +100 to +100 | +100 to +100 | - | confirmed |" in text
    assert "| a | 0.25 | 0.97 | 0.86 | +0.09 to +0.13 |" in text
    assert Image.open(files[".png"]).size[0] > 400


def test_published_pages_are_made_from_their_numbers(claims):
    for path in (BENCHMARKS / "results").glob("claims-*.json"):
        result = json.loads(path.read_text())
        assert claims.report.render(result) == path.with_suffix(".md").read_text()
        assert result["kind"] == "measured" and len(result["seeds"]) >= 5


# The script


def test_quick_runs_every_claim_and_leaves_nothing(claims, tmp_path, monkeypatch, capsys):
    written = {}

    def watch(result, folder):
        claims.report.write(result, folder)
        written[result["name"]] = (result, (folder / f"claims-{result['name']}.md").read_text())

    monkeypatch.setattr(claims.run, "write", watch)
    monkeypatch.setattr(claims.run, "provenance", lambda device: {**STAMP, "kind": "measured"})
    monkeypatch.chdir(tmp_path)
    before = sorted((BENCHMARKS / "results").iterdir())
    claims.run.main(["--quick", "--jobs", "1"])
    assert written.keys() == claims.run.CLAIMS.keys()
    for result, text in written.values():
        assert len(result["variants"]) == 2 and result["budget"]["steps"] == 3 and result["seeds"] == [0]
        assert "no verdict" in text and "confirmed |" not in text
        assert result["variants"][0]["curve"]["steps"] == [2, 3]
    assert not list(tmp_path.iterdir()) and sorted((BENCHMARKS / "results").iterdir()) == before


def test_an_unknown_claim_is_named(claims, capsys):
    with pytest.raises(SystemExit):
        claims.run.main(["figure_9"])
    assert "no claim is called figure_9" in capsys.readouterr().err


def test_columns_of_a_claim_are_columns_of_the_world(claims, trainer):
    known = trainer.blind_shares(claims.patch_embedding.budget, 50, 50).keys()
    for claim in claims.run.CLAIMS.values():
        names = {variant.name for variant in claim.variants}
        assert known >= set(claim.columns) and names.issuperset(sum(claim.pairs, ()))
