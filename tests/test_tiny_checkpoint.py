"""The checkpoint that ships: small, complete, loadable everywhere, and right about its demo clip."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline
from typer.testing import CliRunner

import elva_hf
from elva_hf.cli import app
from elva_hf.data.toy_world import questions, render, sample_scene
from elva_hf.evaluation.toy_world import evaluate, format_table, missed_bars, read_scores

TINY = elva_hf.tiny_checkpoint()
DEMO = json.loads((TINY / "demo.json").read_text())


@pytest.fixture(scope="module")
def ask():
    return pipeline("video-text-to-text", model=str(TINY))


def test_it_is_small_and_holds_no_pickle():
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert {"model.safetensors", "config.json", "processor_config.json", "README.md", "demo.mp4"} <= {
        p.name for p in files
    }


def test_it_answers_every_demo_question_right(ask):
    for question, answer in DEMO["questions"]:
        assert ask(str(TINY / "demo.mp4"), question) == [{"generated_text": answer}], question


def test_it_carries_a_schedule_that_merges_most_patches(ask):
    schedule = ask.model.config.resolve_merge_schedule()
    assert ask.model.config.merge_schedule == "paper" and [step.layer for step in schedule.steps] == [1, 2, 3]
    frames = render(sample_scene(DEMO["seed"], split="demo"))
    inputs = ask.processor(videos=[frames], text="<video>What color is it?", return_tensors="pt")
    with torch.no_grad():
        tokens = ask.model(**inputs, use_cache=True).past_key_values.tokens_per_layer[:, 0].tolist()
        plain = ask.model(**inputs, use_cache=True, merge_schedule="none").past_key_values
    assert tokens[0] == plain.get_seq_length()
    assert tokens[3] <= tokens[1] < tokens[0] - 128 // 2  # of 8 frames of 16 patches
    assert sum(tokens) / len(tokens) < 0.55 * tokens[0]


def test_elva_demo_prints_every_question_answer_count_and_time():
    result = CliRunner().invoke(app, ["demo"], prog_name="elva")
    assert result.exit_code == 0, result.stderr
    for question, answer in DEMO["questions"]:
        assert re.search(rf"question  {re.escape(question)}\nanswer    {answer}\ntokens .*\ntime .*", result.stdout)


def test_the_demo_clip_is_a_held_out_scene():
    scene = sample_scene(DEMO["seed"], split="demo")
    asked = {(question.text, question.answer) for question in questions(scene)}
    assert {tuple(pair) for pair in DEMO["questions"]} <= asked


def test_the_answer_depends_on_the_video(ask):
    text = "Is there a white flash?"
    answers = set()
    for seed in range(12):
        scene = sample_scene(seed, split="validation")
        wanted = next(question.answer for question in questions(scene) if question.text == text)
        assert ask(render(scene), text)[0]["generated_text"] == wanted
        answers.add(wanted)
    assert answers == {"yes", "no"}


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🎈 balloon", "<div>&amp;</div>", "\x00\x7f tab\t"])
def test_its_tokenizer_takes_any_text(text):
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_loads_in_bfloat16_and_answers(ask):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    half = pipeline("video-text-to-text", model=model, processor=AutoProcessor.from_pretrained(TINY))
    question, answer = DEMO["questions"][0]
    assert half(str(TINY / "demo.mp4"), question)[0]["generated_text"] == answer


def test_its_card_has_hub_metadata_and_both_baselines():
    card = (TINY / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "video-text-to-text"
    assert "blind" in card and "swapped" in card and "seed" in card


def test_a_small_held_out_table_is_near_the_card():
    """60 questions a task: each share within four standard errors of the card's."""
    model, processor = elva_hf.ElvaForCausalLM.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    scores = evaluate(model, processor, num_questions=60)
    card = {score.task: score for score in read_scores(TINY / "held_out.json")}
    assert len(format_table(scores).splitlines()) == 2 + len(scores)
    for score in scores:
        for column in ("array", "mp4", "single", "swapped"):
            share, wanted = getattr(score, column), getattr(card[score.task], column)
            if share is not None:
                margin = 4 * (max(wanted * (1 - wanted), 0.02) / 60) ** 0.5
                assert share == pytest.approx(wanted, abs=margin), (score.task, column)


def test_the_card_table_meets_every_bar():
    scores = read_scores(TINY / "held_out.json")
    assert all(score.num_questions >= 500 for score in scores)
    assert missed_bars(scores) == []


def test_the_exported_folder_loads_with_remote_code_where_the_package_was_not_imported():
    code = (
        "from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(TINY)!r}, trust_remote_code=True);"
        "print(type(m).__module__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "elva_hf.modeling_elva", result.stderr[-2000:]
