import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import questions, sample_scene
from elva_hf.errors_elva import ConfigurationError
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.training import toy

STAGE = {
    "name": "smoke",
    "num_frames": 2,
    "max_steps": 12,
    "batch_size": 4,
    "learning_rate": 2.0e-3,
    "warmup_steps": 2,
    "single_share": 0.5,
    "codec_share": 0.5,
    "tube_alignment_weight": 1.0,
}


def write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    recipe = {"preset": "tiny", "seed": 0, "questions_per_video": 2, "stages": [{**STAGE, **changes}]}
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def dataset(seed=0, **changes):
    stage = toy.ToyStage(**{**STAGE, "codec_share": 0.0, **changes})
    options = {"length": 4, "split": "train", "num_questions": 3, "patch_size": 16}
    return toy.ToyDataset(stage, build_toy_tokenizer(), seed=seed, **options)


def test_a_recipe_trains_saves_and_loads_without_its_head(tmp_path):
    toy.main(["--recipe", write(tmp_path), "--out", str(tmp_path / "out")])
    model, report = ElvaForCausalLM.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    stored = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert model.dtype == torch.float32
    assert model.guidance is None
    assert model.config.guidance is None


def test_a_stage_that_merges_trains_and_its_model_keeps_the_schedule(tmp_path):
    steps = [{"layer": 1, "similarity_threshold": 0.6}, {"layer": 3, "target_ratio": 0.5}]
    changes = {"merge_schedule": steps, "tube_alignment_weight": 0.0, "max_steps": 3}
    toy.main(["--recipe", write(tmp_path, **changes), "--out", str(tmp_path / "out")])
    model = ElvaForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.merge_schedule == steps
    assert model.config.resolve_merge_schedule().step_at(3).target_ratio == 0.5


def test_the_shipped_recipe_is_valid():
    recipe, stages = toy.read_recipe("tiny")
    assert recipe["preset"] == "tiny"
    assert [stage.num_frames for stage in stages] == [1, 1, 8, 8, 8, 8, 8]
    assert [stage.merge_schedule is not None for stage in stages] == [False] * 5 + [True] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": "4e-5"}, "learning_rate='4e-5'"),
        ({"num_frame": 2}, "num_frame"),
        ({"max_steps": 1.5}, "max_steps"),
    ],
)
def test_a_wrong_field_is_refused_before_anything_runs(tmp_path, changes, words):
    with pytest.raises(ConfigurationError, match=words):
        toy.read_recipe(write(tmp_path, **changes))


def test_items_depend_on_seed_and_index_alone():
    one, other, different = dataset()[3], dataset()[3], dataset(seed=1)[3]
    assert one["row"] == other["row"]
    assert torch.equal(one["patches"], other["patches"])
    assert not torch.equal(one["patches"], different["patches"])


def test_teacher_and_student_describe_the_same_patches():
    batch = toy.collate([dataset()[0], dataset()[1]], pad_token_id=0)
    assert batch["teacher_features"].shape[0] == batch["pixel_values_videos"].shape[0]


def test_patches_equal_a_loop():
    frames = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    patches = toy.frames_to_patches(frames.numpy(), 16)
    at = 0
    for frame in frames:
        for row in range(2):
            for column in range(3):
                cell = frame[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(2, 0, 1)
                torch.testing.assert_close(patches[at], (cell.flatten().float() / 255 - 0.5) / 0.5)
                at += 1


def test_questions_are_drawn_by_task_without_repetition():
    asked = questions(sample_scene(3))
    drawn = toy.draw_questions(asked, len(asked), random.Random(0), {})
    assert sorted(map(str, drawn)) == sorted(map(str, asked))
    first = [toy.draw_questions(asked, 1, random.Random(i), {"needle": 1e9})[0].task for i in range(20)]
    assert set(first) == {"needle"}


def test_rows_of_many_questions_merge_as_rows_of_one_do():
    """What a question is answered does not depend on the others of its row, merging or not."""
    data = dataset(num_frames=8)
    model = toy.build_model({"preset": "tiny"}, data.tokenizer).eval()
    model.set_merge_schedule([{"layer": 1, "similarity_threshold": 0.3}, {"layer": 2, "target_ratio": 0.5}])
    item = data[0]
    assert len(item["row"].turns) == 3
    alone = [{**item, "row": toy.PackedRow(item["row"].prefix, [turn])} for turn in item["row"].turns]
    with torch.no_grad():
        together = model(**without_labels(toy.collate([item], 0, merges=True))).logits[0]
        start = len(item["row"].prefix)
        for row in alone:
            logits = model(**without_labels(toy.collate([row], 0, merges=True))).logits[0]
            length = logits.shape[0] - len(item["row"].prefix)
            torch.testing.assert_close(together[start : start + length], logits[-length:], atol=2e-4, rtol=1e-3)
            start += length


def without_labels(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "teacher_features")}


@pytest.mark.parametrize("weights", [{"tube_alignment_weight": 0.0}, {"patch_alignment_weight": 1.0}])
def test_a_stage_asks_its_teacher_only_if_it_has_one(weights):
    batch = toy.collate([dataset(**weights)[0]], 0)
    assert ("teacher_features" in batch) == ("patch_alignment_weight" in weights)


def test_a_recipe_with_muon_a_deeper_decoder_and_a_linear_tail_trains(tmp_path):
    changes = {"muon_learning_rate": 1e-2, "decay_share": 0.5, "patch_alignment_weight": 1.0, "num_frames": 8}
    path = write(tmp_path, **changes, max_steps=4)
    recipe = yaml.safe_load(Path(path).read_text())
    recipe |= {"teacher": ["looks", "place", "time"], "text_config": {"num_hidden_layers": 5}}
    recipe["config"] = {"patch_embed_positions": 8, "patch_embed_positions_std": 2.0}
    Path(path).write_text(yaml.safe_dump(recipe))
    toy.main(["--recipe", path, "--out", str(tmp_path / "out")])
    model = ElvaForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert len(model.model.language_model.layers) == model.config.text_config.num_hidden_layers == 5
    assert model.model.patch_embed.positions.std() > 1.5


def test_weights_to_start_from_bring_their_merge_schedule(tmp_path):
    steps = [{"layer": 1, "target_ratio": 0.5}]
    toy.main(["--recipe", write(tmp_path, merge_schedule=steps, max_steps=1), "--out", str(tmp_path / "one")])
    again = [
        "--recipe",
        write(tmp_path, max_steps=1),
        "--weights",
        str(tmp_path / "one" / "model"),
        "--start-at",
        "smoke",
    ]
    toy.main([*again, "--out", str(tmp_path / "two")])
    assert ElvaForCausalLM.from_pretrained(tmp_path / "two" / "model").config.merge_schedule == steps
