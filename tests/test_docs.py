"""What the documents show is run: README's Python blocks, its commands, the names the changelog gives."""

import re
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

import elva_hf
from elva_hf.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_of_the_readme_run(tmp_path, monkeypatch, capsys):
    shutil.copy(elva_hf.tiny_checkpoint() / "demo.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.strip() in ("yes", "no")


def test_the_commands_of_the_readme_exist_with_their_options():
    commands = get_command(app).commands
    shown = re.findall(r"^elva (\S+)(.*)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(shown) >= 3
    for name, rest in shown:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, name


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
