"""What the documents show is run: README's Python blocks, its commands, the names the changelog gives."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from toy_runs import save_teacher
from typer.main import get_command

import elva_hf
from elva_hf.cli import app
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.training.toy import build_model, build_processor, save
from elva_hf.training.toy_recipe import read_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked by PEFT
def test_the_python_blocks_of_the_readme_run(tmp_path, monkeypatch, capsys):
    shutil.copy(elva_hf.tiny_checkpoint() / "demo.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.splitlines()[0] in ("yes", "no")
    assert (tmp_path / "runs" / "mine" / "checkpoint-1" / "adapter_model.safetensors").exists()


def test_the_loop_of_the_training_page_runs_and_logs_what_it_says(tmp_path, monkeypatch):
    shutil.copy(elva_hf.tiny_checkpoint() / "demo.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "path" / "to" / "siglip")
    (block,) = blocks("python", (ROOT / "docs" / "training.md").read_text())
    namespace = {}
    exec(compile(block, "training.md", "exec"), namespace)
    said = block.splitlines()[-1].partition("# ")[2].split(", ")
    assert set(said) <= set(namespace["trainer"].state.log_history[0])
    assert said[0] == "loss" and len(said) == 5


def test_the_block_of_the_page_on_mavors_runs(tmp_path, monkeypatch):
    recipe, _ = read_recipe("mavors_tiny")
    tokenizer = build_toy_tokenizer()
    model = build_model(recipe, tokenizer)
    save(model, tmp_path / "model")
    build_processor(tokenizer, model.config).save_pretrained(tmp_path / "model")
    for name in ("clip.mp4", "film.mp4"):
        shutil.copy(elva_hf.tiny_checkpoint() / "demo.mp4", tmp_path / name)
    Image.new("RGB", (96, 64), "red").save(tmp_path / "page.png")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python", (ROOT / "docs" / "mavors.md").read_text())
    exec(compile(block, "mavors.md", "exec"), {"path": "model"})


def test_the_block_of_the_page_on_video_panda_runs():
    (block,) = blocks("python", (ROOT / "docs" / "video-panda.md").read_text())
    namespace = {}
    exec(compile(block, "video-panda.md", "exec"), namespace)
    assert namespace["model"].config.model_type == "video_panda"


def find_command(words):
    command = get_command(app)
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_the_commands_of_a_page_exist_with_their_options(page):
    shown = re.findall(r"^elva (.*)$", "\n".join(blocks("sh", (ROOT / page).read_text())), re.MULTILINE)
    assert len(shown) >= 3 or page not in ("README.md", "docs/training.md")
    for line in shown:
        line = line.partition("#")[0]
        options = {option for parameter in find_command(line.split()).params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[\w-]+", line)) <= options | {"--help"}, line


def test_the_make_targets_of_the_documents_exist():
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\bmake (\w+)`|^make (\w+)", text, re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    assert {first or second for first, second in named} <= targets


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_the_links_of_the_readme_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_changelog_names_every_public_class():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    classes = [
        "ElvaConfig",
        "ElvaModel",
        "ElvaForCausalLM",
        "ElvaProcessor",
        "ElvaVideoProcessor",
        "ElvaPipeline",
        "ElvaError",
    ]
    assert [name for name in classes if name not in changelog] == []
