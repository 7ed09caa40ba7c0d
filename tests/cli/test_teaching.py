"""`elva teach`: from rows to a folder that training reads."""

import json

import pytest
import torch
import transformers
from command_line import fails, rows, run, succeeds
from saved_elva import draw_frames, write_clip
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from elva_hf.cli.teaching import read_rank
from elva_hf.data.collator import ElvaCollator
from elva_hf.data.mixtures import DataSource, Mixture
from elva_hf.errors_elva import CheckpointError, ConfigurationError
from elva_hf.geometry_elva import read_geometry
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.training.teacher import VisualTeacher, teacher_targets
from elva_hf.training.teacher_cache import TeacherCache


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**shape, image_size=32, patch_size=8)
    transformers.SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five rows: four videos, of which two rows share one; one row of text."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for number in range(5):
        content = [{"type": "text", "text": "What color is it?"}]
        if number < 4:
            clip = write_clip(folder / f"{number % 3}.mp4", draw_frames(number % 3))
            content.insert(0, {"type": "video", "path": clip.name})
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        lines.append(json.dumps({"messages": messages, "id": f"row-{number}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def teach(data, folder, tower, out, *more):
    return succeeds("teach", "--data", data, "--model", folder, "--teacher", tower, "--out", out, *more)


def test_videos_are_taught_once_and_counted(data, folder, tower, tmp_path):
    text = teach(data, folder, tower, tmp_path)
    assert rows(text, "videos")[0].startswith("4: 3 taught, 1 there already; ")
    assert rows(text, "cache") == [f"{tmp_path}: 3 videos. Train with guidance.cache={tmp_path}"]
    assert rows(text, "teacher") == [f"{tower}, layer -2: 4x4 places of 32 features"]
    written = sum(path.stat().st_size for path in tmp_path.glob("shard-*"))
    assert f"{written / 1000:.3g} kB written" in text
    again = teach(data, folder, tower, tmp_path)
    assert rows(again, "videos") == ["4: 0 taught, 4 there already; 0 B written"]


def test_training_reads_what_the_teacher_says_of_the_same_pixels(data, folder, tower, tmp_path):
    """Hybrid videos: two clips each, the low-resolution one first."""
    teach(data, folder, tower, tmp_path, "--workers", 1, "--high", 2, "--low", 4)
    processor = ElvaProcessor.from_pretrained(folder)
    chats = [Mixture([DataSource("toy", str(data))])[i] for i in range(5)]
    options = {"num_high_res_frames": 2, "num_low_res_frames": 4}
    batch = ElvaCollator(processor, teacher_cache=TeacherCache(tmp_path), **options)(chats)
    model = ElvaForCausalLM.from_pretrained(folder).model
    geometry = read_geometry(model.token_kinds(batch["input_ids"]), batch["attention_mask"])
    teacher = VisualTeacher.from_pretrained(tower)
    targets = teacher_targets(teacher, batch["pixel_values_videos"], geometry, patch_size=16)
    assert batch["teacher_tubes"].shape == (8, 4, 4, 32) and batch["teacher_frames"].shape == (24, 32)
    torch.testing.assert_close(batch["teacher_tubes"].float(), targets.tubes, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch["teacher_frames"].float(), targets.frames, rtol=2e-3, atol=2e-3)


def test_frame_options_are_those_of_training(data, folder, tower, tmp_path):
    teach(data, folder, tower, tmp_path, "--frames", 2)
    processor = ElvaProcessor.from_pretrained(folder)
    cache, chats = TeacherCache(tmp_path), Mixture([DataSource(data.name, str(data))], seed=0)
    chat = next(chats[i] for i in range(5) if chats[i]["id"].endswith("row-1"))
    assert ElvaCollator(processor, teacher_cache=cache, num_frames=2)([chat])["teacher_frames"].shape == (2, 32)
    with pytest.raises(
        CheckpointError, match="the row was taught with 2 frames of 4x4 patches, and has 8 frames of 4x4"
    ):
        ElvaCollator(processor, teacher_cache=cache)([chat])


def test_processes_share_the_rows(data, folder, tower, tmp_path, monkeypatch):
    texts = [teach(data, folder, tower, tmp_path, "--rank", rank, "--world", 3) for rank in (0, 1)]
    assert len(TeacherCache(tmp_path)) < 3
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    texts.append(teach(data, folder, tower, tmp_path))
    assert len(TeacherCache(tmp_path)) == 3
    assert all(f"process {rank} of 3" in text for rank, text in enumerate(texts))
    assert sum(int(rows(text, "videos")[0].split(":")[0]) for text in texts) == 4


def test_rank_and_world_are_checked(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert read_rank(None, None) == (0, 1)
    assert read_rank(2, 3) == (2, 3)
    with pytest.raises(ConfigurationError, match="rank 3 is none of 3"):
        read_rank(3, 3)
    with pytest.raises(ConfigurationError, match="go together"):
        read_rank(1, None)


def test_a_row_that_cannot_be_read_is_written_down_and_passed_over(data, folder, tower, tmp_path):
    broken = data.with_name("broken.jsonl")
    line = json.loads(data.read_text().splitlines()[0])
    line["messages"][0]["content"][0]["path"], line["id"] = "lost.mp4", "lost"
    broken.write_text(data.read_text() + json.dumps(line) + "\n")
    text = teach(broken, folder, tower, tmp_path)
    assert rows(text, "bad") == [f"1 of 6 rows: see {tmp_path / 'bad_samples-00000.jsonl'}"]
    entry = json.loads((tmp_path / "bad_samples-00000.jsonl").read_text())
    assert entry["id"].endswith("lost") and entry["reason"] == "not_found"
    assert len(TeacherCache(tmp_path)) == 3


RECIPE = """
model: {{path: {folder}}}
guidance: {{teacher: {tower}, layer: -3, cache: {cache}}}
data:
  sources: {{toy: {{path: {data}, repeat: 2.0}}}}
video: {{num_frames: 3}}
training: {{batch_size: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-3, max_steps: 2, use_cpu: true}}
"""


def test_a_recipe_says_what_is_taught_and_overrides_and_flags_change_it(data, folder, tower, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, tower=tower, cache=tmp_path / "cache", data=data))
    text = succeeds("teach", recipe)
    assert rows(text, "videos")[0].startswith("4: 3 taught")  # each row once, whatever `repeat` says
    cache = TeacherCache(tmp_path / "cache")
    assert cache.spec.layer == -3
    other = succeeds("teach", recipe, "guidance.layer=-1", "--out", tmp_path / "other")
    assert rows(other, "videos")[0].startswith("4: 3 taught")
    assert TeacherCache(tmp_path / "other").spec.layer == -1
    assert "layer -3, " in fails("teach", recipe, "--layer", "-2") and (tmp_path / "cache").is_dir()
    changed = succeeds("teach", recipe, "video.num_frames=2")
    assert rows(changed, "videos")[0].startswith("4: 3 taught") and len(TeacherCache(tmp_path / "cache")) == 6


def test_mistakes_are_one_line(data, folder, tower, tmp_path):
    assert "name a RECIPE, or rows with --data" in fails("teach")
    assert "one of them" in fails("teach", "tiny", "--data", data)
    assert "--data needs --model DIR" in fails("teach", "--data", data)
    assert "no teacher: give --teacher" in fails("teach", "--data", data, "--model", folder)
    assert "give --out DIR" in fails("teach", "--data", data, "--model", folder, "--teacher", tower)
    common = ("teach", "--data", data, "--model", folder, "--out", tmp_path / "c")
    assert "model_type 'elva'" in fails(*common, "--teacher", folder)
    assert "cannot be read" in fails(*common, "--teacher", tmp_path)
    assert "dtype 'float64'" in fails(*common, "--teacher", tower, "--dtype", "float64")
    assert run(*common, "--teacher", tower, "--rank", "-1").exit_code == 2


def test_a_recipe_without_guidance_has_nothing_to_teach(data, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(folder=folder, tower="x", cache="y", data=data)
    recipe.write_text("\n".join(line for line in text.splitlines() if not line.startswith("guidance")))
    assert "no stage with guidance" in fails("teach", recipe)
