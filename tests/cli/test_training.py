import json

import pytest
import yaml
from command_line import fails, succeeds
from typer.main import get_command

from elva_hf.cli import app
from elva_hf.training.recipe import list_recipes

SOURCE = {"toy": {"format": "toy_world", "options": {"num_videos": 8, "num_frames": 2}}}
TRAINING = {
    "batch_size": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-3,
    "max_steps": 1,
    "use_cpu": True,
    "bf16": False,
}


@pytest.fixture
def recipe(tmp_path):
    values = {"model": {"preset": "tiny"}, "data": {"sources": SOURCE, "num_workers": 0}, "training": TRAINING}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_list_names_every_recipe_and_what_it_is():
    lines = succeeds("train", "--list").splitlines()
    assert [line.split()[0] for line in lines] == list(list_recipes())
    assert all(len(line.split()) > 3 for line in lines)
    assert succeeds("train").splitlines() == lines


def test_a_dry_run_shows_the_plan_and_trains_nothing(recipe, tmp_path):
    shown = succeeds("train", recipe, "training.batch_size=8", "--dry-run", "--processes", "2", "--out", tmp_path / "o")
    assert "batch     8 samples a step = 2 x 2 x 2 (processes x micro-batch x accumulation)" in shown
    assert "steps     1 (8 samples, max_steps)" in shown
    assert "DDP" in shown
    assert not (tmp_path / "o").exists()


def test_a_dry_run_names_what_is_missing():
    shown = succeeds("train", "stage2_spatiotemporal", "size=1.5b", "data.sources.valor.path=/x", "--dry-run")
    assert [line for line in shown.splitlines() if line.startswith("missing")] == ["missing   data.sources.webvid.path"]
    assert "runs/stage1_spatial-1.5b/model" in shown


@pytest.mark.parametrize("name", ["tiny", "lora", "qlora", "ablation"])
def test_every_kind_of_recipe_has_a_plan(name):
    assert succeeds("train", name, "--dry-run")


def test_training_prints_its_plan_and_where_the_model_is(recipe, tmp_path):
    shown = succeeds("train", recipe, "--out", tmp_path / "out")
    assert shown.startswith("stage     mine\n")
    assert shown.splitlines()[-1].startswith(f"{tmp_path / 'out' / 'model'}: model and processor.")
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["model_type"] == "elva"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stage9"], "no recipe 'stage9'"),
        (["stage1_spatial", "training.learning_rat=1"], "did you mean learning_rate"),
        (["stage1_spatial", "model.preset=tiny", "training.use_cpu=true"], "fields to be filled in: data.sources"),
        (["tiny", "training.max_steps=1"], "takes output_dir=... and seed=... only"),
        (["stage1_spatial", "--dry-run", "--processes", "7"], "no multiple of 7 processes"),
    ],
)
def test_a_mistake_is_one_line(arguments, words):
    assert words in fails("train", *arguments)


def test_tiny_goes_to_the_trainer_of_the_toy_world(tmp_path, monkeypatch):
    from elva_hf.training import toy

    called = []
    monkeypatch.setattr(toy, "main", called.append)
    shown = succeeds("train", "tiny", "seed=3", "--out", tmp_path)
    assert called == [["--recipe", "tiny", "--out", str(tmp_path), "--seed", "3"]]
    assert shown.startswith(f"{tmp_path / 'model'}: ")


def test_the_command_is_there():
    assert "train" in get_command(app).commands
