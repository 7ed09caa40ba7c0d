"""benchmarks/figure3_toy.py: pooling is what a loop says, answers are generate()'s, and the script runs whole."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import elva_hf
from elva_hf.data.toy_world import render, sample_scene
from elva_hf.evaluation.toy_world import answer_all
from elva_hf.geometry_elva import read_geometry

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = elva_hf.tiny_checkpoint()
NUM_LAYERS = elva_hf.ElvaConfig.from_pretrained(TINY).text_config.num_hidden_layers
SCHEDULES = ("none", "paper", "table5")


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import figure3_toy
        import line_chart

        yield SimpleNamespace(toy=figure3_toy, chart=line_chart)


@pytest.fixture(scope="module")
def toy(scripts):
    return scripts.toy


@pytest.fixture(scope="module")
def model():
    return elva_hf.ElvaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def quiz(toy):
    return toy.draw_quiz(2, "demo")


@pytest.fixture(scope="module")
def batches(toy, quiz, processor):
    return toy.batch_quiz(quiz, "demo", processor.tokenizer, size=5)


@pytest.fixture(scope="module")
def base(toy, model, batches):
    return toy.run(model, batches, toy.BASE)


@pytest.fixture
def video(model, batches):
    """`(N,)` ids of one video of 8 frames of 4x4 patches, and their geometry."""
    ids = batches[0].prefix
    return ids, read_geometry(model.model.token_kinds(ids[None]))


def loop_pooling(model, ids, pooling):
    """Members of each mean, in order of their last, by a plain loop over the tokens."""
    config, groups, frame, row, column = model.config, {}, -1, 0, 0
    for position, token in enumerate(ids.tolist()):
        group = ("own", position)
        if token == config.frame_token_id:
            frame, row, column = frame + 1, 0, 0
            group = ("frame", frame * pooling.frames // 8) if pooling.marks else group
        elif token == config.line_token_id:
            group = ("line", frame * pooling.frames // 8, row) if pooling.marks else group
            row, column = row + 1, 0
        elif token == config.video_token_id:
            group = (frame * pooling.frames // 8, row // pooling.side, column // pooling.side)
            column += 1
        groups.setdefault(group, []).append(position)
    return sorted(groups.values(), key=lambda members: members[-1])


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"frames": 8}, 168),
        ({"frames": 4}, 104),
        ({"frames": 3}, 88),
        ({"frames": 1}, 56),
        ({"frames": 2, "marks": True}, 42),
        ({"side": 2}, 72),
        ({"frames": 4, "side": 2}, 56),
    ],
)
def test_pooling_averages_the_places_it_says_and_keeps_the_last_position(toy, model, video, options, tokens):
    ids, geometry = video
    pooling = toy.Pooling(**options)
    matrix, positions = toy.pooling_matrix(geometry, len(ids), pooling)
    groups = loop_pooling(model, ids, pooling)
    assert positions.tolist() == [members[-1] for members in groups]
    expected = torch.zeros(len(groups), len(ids))
    for weights, members in zip(expected, groups, strict=True):
        weights[members] = 1 / len(members)
    assert torch.equal(matrix, expected)
    assert len(groups) - (len(ids) - toy.visual_tokens(model, ids)) == tokens


def test_what_is_pooled_is_what_the_decoder_is_given(toy, model, batches):
    given = []
    handle = model.model.patch_embed.register_forward_hook(lambda module, args, output: given.append(torch.cat(output)))
    batch = batches[0]
    pixels = torch.cat([toy.frames_to_patches(frames, model.config.patch_size) for frames in batch.frames])
    ids = batch.prefix.expand(len(batch.frames), -1)
    with torch.inference_mode():
        embeddings = toy.embed(model, ids, pixels)
        states = model.model(input_ids=ids, pixel_values_videos=pixels, output_hidden_states=True).hidden_states
    handle.remove()
    assert len(given) == 2 and torch.equal(*given)
    torch.testing.assert_close(embeddings, states[0])


def test_pooling_nothing_changes_no_answer(toy, model, batches, base):
    score = toy.run(model, batches, toy.Setting("all frames", "pool", toy.Pooling(8)))
    assert score.tokens == base.tokens == [168.0] * NUM_LAYERS
    assert all((score.right[name] == base.right[name]).all() for name in base.right)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_question_is_right_where_generate_answers_right(toy, model, processor, quiz, batches, schedule):
    score = toy.run(model, batches, toy.Setting(schedule, "", schedule))
    own = elva_hf.ElvaForCausalLM.from_pretrained(TINY, dtype=torch.float32, merge_schedule=schedule).eval()
    expected = {name: [] for name in score.right}
    for (seed, single), asked in quiz.items():
        frames = render(sample_scene(seed, split="demo", single=single))
        answers = answer_all(own, processor, [(frames, q.text) for q in asked], len(asked), lambda count: None)
        for question, answer in zip(asked, answers, strict=True):
            expected[question.task + toy.LONE * single].append(answer == question.answer)
    assert {name: values.tolist() for name, values in score.right.items()} == expected
    assert 0 < sum(map(sum, expected.values())) < sum(map(len, expected.values()))


def test_tokens_are_those_that_enter_each_layer(toy, model, batches):
    def tokens(how):
        return toy.run(model, batches[:1], toy.Setting("", "", how)).tokens

    rest = NUM_LAYERS - 4
    assert tokens(toy.ratio_steps((1, 0.5), (3, 0.25))) == [168, 104, 104, *[40 + 16] * (1 + rest)]
    assert tokens(toy.Pooling(4)) == [104] * NUM_LAYERS
    assert tokens(toy.ratio_steps((2, 0.25), max_run=2)) == [168, 168, *[104] * (2 + rest)]


def row_of(toy, family, tokens, base=None, **right):
    def score(answers):
        return toy.Score(toy.Setting(family, family), [tokens] * 4, {n: np.array(v, bool) for n, v in answers.items()})

    return score(right).as_row(score(base or right))


def test_what_is_lost_is_counted_on_the_same_questions(toy):
    base = {"a": [1, 1, 1, 0], "b": [1, 1]}
    row = row_of(toy, "merge 1", 100, base, a=[1, 0, 0, 1], b=[1, 0])
    assert row["lost"] == pytest.approx((0.25 + 0.5) / 2)
    error = (np.var([0, 1, 1, -1], ddof=1) / 4 + np.var([0, 1], ddof=1) / 2) ** 0.5 / 2
    assert row["lost_standard_error"] == pytest.approx(error, abs=1e-5)
    assert toy.worst_column(row, row_of(toy, "none", 168, **base)) == ("b", 0.5)


def test_the_choice_is_the_strongest_that_loses_little_everywhere(toy):
    base = row_of(toy, "none", 168, a=[1] * 100, b=[1] * 100)
    good = row_of(toy, "good", 120, a=[0] + [1] * 99, b=[1] * 100)
    weak = row_of(toy, "weak", 140, a=[1] * 100, b=[1] * 100)
    uneven = row_of(toy, "uneven", 60, a=[1] * 100, b=[0, 0] + [1] * 98)
    assert toy.choose([base, weak, good, uneven]) is good
    assert toy.choose([base, weak, good, uneven], tolerance=0.0) is weak
    assert toy.choose([base, uneven]) is base


def test_pooling_is_read_at_equal_tokens(toy):
    rows = [
        row_of(toy, "none", 168, a=[1, 1, 1, 1]),
        row_of(toy, "pool", 104, a=[1, 1, 0, 0]),
        row_of(toy, "pool marks", 120, a=[0, 0, 0, 0]),
        row_of(toy, "merge 1", 136, a=[1, 1, 1, 1]),
        row_of(toy, "preset", 80, a=[1, 1, 1, 1]),
    ]
    assert [toy.pooling_rival(rows, row) for row in rows] == [None, None, None, pytest.approx(0.75), None]


def run_script(toy, folder, *options):
    figure = [
        setting for setting in toy.FIGURE if setting.how == "none" or " 0.5 " in setting.name or " 4 " in setting.name
    ]
    with pytest.MonkeyPatch.context() as patch:
        argv = ["benchmarks/figure3_toy.py", "--questions", "2", "--out", str(folder), *options]
        patch.setattr(sys, "argv", argv)
        patch.setattr(toy, "FIGURE", figure)
        patch.setattr(toy, "OPTIONS", toy.OPTIONS[:2])
        patch.setattr(toy, "CANDIDATES", toy.CANDIDATES[:3])
        toy.main()


def test_the_script_writes_tables_and_a_plot_that_agree(toy, tmp_path):
    run_script(toy, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"figure3-toy.{end}" for end in ("json", "md", "png")]
    result, text = json.loads((tmp_path / "figure3-toy.json").read_text()), (tmp_path / "figure3-toy.md").read_text()
    assert (result["kind"], result["split"], result["questions"], len(result["options"])) == ("measured", "test", 2, 2)
    assert result["figure"][0]["setting"] == "none" and len(result["figure"]) == 7
    for row in result["figure"] + result["options"]:
        assert np.mean(list(row["accuracy"].values())) == pytest.approx(row["mean_accuracy"], abs=1e-4)
        assert np.mean(row["visual_tokens_per_layer"]) == pytest.approx(row["mean_tokens"], abs=0.02)
        assert f"| {row['setting']} | {row['mean_tokens']:.1f} | " in text
    assert Image.open(tmp_path / "figure3-toy.png").size > (800, 400)


def test_the_script_chooses_on_the_validation_split(toy, tmp_path):
    run_script(toy, tmp_path, "--choose", "--name", "choice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choice.json", "choice.md"]
    result = json.loads((tmp_path / "choice.json").read_text())
    assert result["split"] == "validation"
    assert result["chosen"] in [row["setting"] for row in result["candidates"]]


def test_weights_that_were_trained_with_merging_are_called_so(toy):
    assert "neither merging nor pooling" in toy.describe_weights("none")
    assert "favours merging" in toy.describe_weights("paper")


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("figure3-toy*.json")), ids=lambda path: path.stem)
def test_the_published_comparison_is_made_from_its_numbers(toy, path):
    result = json.loads(path.read_text())
    assert toy.render_figure(result) == path.with_suffix(".md").read_text()
    for part, settings in (("figure", toy.FIGURE), ("options", toy.OPTIONS)):
        assert [row["setting"] for row in result[part]] == [setting.name for setting in settings]
    assert result["questions"] >= 200 and result["split"] == "test"


@pytest.mark.parametrize(
    "path", sorted((BENCHMARKS / "results").glob("tiny-schedule*.json")), ids=lambda path: path.stem
)
def test_the_published_choice_is_made_from_its_numbers(toy, path):
    result = json.loads(path.read_text())
    assert toy.render_choice(result) == path.with_suffix(".md").read_text()
    assert result["chosen"] == toy.choose(result["candidates"])["setting"]
    assert result["questions"] >= 500 and result["split"] == "validation"


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 168, [0, 25, 50, 75, 100, 125, 150, 175]), (0.43, 0.9, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]), (3, 3, [3, 4])],
)
def test_ticks_are_round_and_enclose_the_values(scripts, low, high, wanted):
    assert scripts.chart.ticks(low, high) == wanted


def test_a_chart_shows_every_point_where_its_axes_say(scripts):
    chart = scripts.chart
    line = chart.Series("line", [[(0, 0.0), (10, 1.0)]])
    loose = chart.Series("loose", [[(5, 0.75)]], joined=False)
    image = chart.draw_chart("title", "y", ["x"], [line, loose])
    axes = chart._Axes(chart._LEFT, [0, 10], [0, 1])
    for x, y, color in ((0, 0, chart.COLORS[0]), (2.5, 0.25, chart.COLORS[0]), (10, 1, chart.COLORS[0])):
        left, top = axes(x, y)
        assert image.getpixel((round(left), round(top))) == pytest.approx(color, abs=40)
    left, top = axes(5, 0.75)
    ring = [image.getpixel((round(left) + step, round(top))) for step in range(-7, 8)]
    assert min(sum(abs(a - b) for a, b in zip(pixel, chart.COLORS[1], strict=True)) for pixel in ring) < 60
