import json
import os

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_runs import read_log, save_teacher

from elva_hf.data.datasets import BadSamples
from elva_hf.errors_elva import CheckpointError, ConfigurationError
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.training import run
from elva_hf.training.building import build_model, build_processor
from elva_hf.training.recipe import read_recipe
from elva_hf.training.teacher_cache import TeacherCacheWriter
from elva_hf.training.teaching import RowsToTeach, teach

SOURCE = {"toy": {"format": "toy_world", "options": {"num_videos": 64, "num_frames": 2, "questions_per_video": 2}}}
TRAINING = {
    "batch_size": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-3,
    "max_steps": 4,
    "use_cpu": True,
    "bf16": False,
    "save_steps": 2,
    "logging_steps": 1,
}


def write(folder, **changes):
    values = {
        "model": {"preset": "tiny"},
        "data": {"sources": SOURCE, "num_workers": 0},
        "training": TRAINING,
        "output_dir": str(folder / "out"),
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_nothing_is_loaded_before_all_fields_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "build_model", lambda *args: pytest.fail("built a model"))
    lines = []
    with pytest.raises(ConfigurationError, match=r"fields to be filled in: data.sources.cc3m_coco.path=\.\.\. data"):
        run.train(read_recipe("stage1_spatial", ["training.use_cpu=true"]), lines.append)
    with pytest.raises(ConfigurationError, match="no multiple of"):
        run.train(read_recipe(write(tmp_path), ["training.batch_size=5"]))
    with pytest.raises(ConfigurationError, match="data source clips"):
        missing = f"data.sources={{clips: {{path: {tmp_path}/clips.json}}}}"
        run.train(read_recipe(write(tmp_path), [missing]))
    with pytest.raises(ConfigurationError, match="training"):
        run.train(read_recipe(write(tmp_path), ["training.lr_scheduler_type=slope"]))
    with pytest.raises(CheckpointError, match="cannot load"):
        run.train(read_recipe(write(tmp_path), [f"model.path={tmp_path}"]))
    with pytest.raises(CheckpointError, match="there is no folder /nowhere/model"):
        run.train(read_recipe(write(tmp_path), ["model.path=/nowhere/model"]))
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(tmp_path):
    whole = run.train(read_recipe(write(tmp_path)))
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    stopped = tmp_path / "stopped"
    os.rename(tmp_path / "out", stopped)  # as if it had been killed after step 2
    for name in ("model", "checkpoint-4"):
        os.rename(stopped / name, tmp_path / name)
    resumed = run.train(read_recipe(write(tmp_path), [f"output_dir={stopped}"]))
    assert [line["step"] for line in read_log(stopped)] == [1, 2, 3, 4]
    assert same(weights(resumed), weights(tmp_path / "model"))
    assert whole.name == resumed.name == "model"


def test_a_resume_with_other_fields_is_refused_and_harmless_ones_are_not(tmp_path):
    folder = run.train(read_recipe(write(tmp_path), ["training.max_steps=2"]))
    os.rename(folder, tmp_path / "old")
    with pytest.raises(ConfigurationError, match=r"a run of other fields \(training.learning_rate\); give"):
        run.train(read_recipe(write(tmp_path), ["training.max_steps=2", "training.learning_rate=0.5"]))
    harmless = ["training.max_steps=2", "training.save_steps=1", "training.logging_steps=2"]
    assert same(weights(run.train(read_recipe(write(tmp_path), harmless))), weights(tmp_path / "old"))
    anew = [*harmless, "training.learning_rate=0.5", "resume=never"]
    assert not same(weights(run.train(read_recipe(write(tmp_path), anew))), weights(tmp_path / "old"))


def test_a_path_of_stages_hands_its_model_on_and_resumes_at_the_stage_it_was_in(tmp_path):
    steps = [{"layer": 1, "target_ratio": 0.5}]
    stages = [
        {"name": "first", "trainable": ["patch_embed"]},
        {"name": "second", "model": {"merge_schedule": steps}, "training": {"max_steps": 2}},
    ]
    path = write(tmp_path, stages=stages)
    folder = run.train(read_recipe(path))
    assert folder == tmp_path / "out" / "model"
    first, record = tmp_path / "out" / "first" / "model", json.loads((tmp_path / "out" / run.RECORD).read_text())
    assert record["model"]["path"] == str(first)
    model = ElvaForCausalLM.from_pretrained(folder)
    assert model.config.merge_schedule == steps
    finished = (first / "model.safetensors").stat().st_mtime_ns
    before = weights(folder)
    for name in ("model", "checkpoint-2"):
        os.rename(tmp_path / "out" / name, tmp_path / f"old-{name}")
    assert same(weights(run.train(read_recipe(path))), before)
    assert (first / "model.safetensors").stat().st_mtime_ns == finished


def test_only_the_named_parts_train(tmp_path):
    overrides = ["trainable=[patch_embed]", "training.max_steps=2"]
    (stage,) = read_recipe(write(tmp_path), overrides).stages
    after = weights(run.train(read_recipe(write(tmp_path), overrides)))
    from transformers import set_seed

    set_seed(0)
    before = build_model(stage, build_processor(stage), None).state_dict()
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed
    assert all(key.startswith("model.patch_embed.") for key in changed)


def teach_toy(recipe, overrides, folder):
    """The recipe's teacher, and a cache of what it says of the recipe's rows."""
    (stage,) = read_recipe(recipe, overrides).stages
    processor, rows = build_processor(stage), run.open_rows(stage)
    teacher, cache = run.open_teacher(stage, processor)
    assert cache is None
    with TeacherCacheWriter(folder, teacher.spec, processor.video_processor.patch_size) as writer:
        to_teach = RowsToTeach(rows, range(len(rows)), processor, BadSamples(None, 0, 1), **stage.video.options)
        assert teach(to_teach, teacher, writer).added == 64
    return teacher


def test_features_of_a_cache_teach_what_the_teacher_itself_teaches(tmp_path):
    live = [f"guidance.teacher={save_teacher(tmp_path / 'teacher')}"]
    spec = teach_toy(write(tmp_path), live, tmp_path / "cache").spec
    assert (spec.width, spec.layer) == (32, -2)
    cached = [f"guidance.cache={tmp_path / 'cache'}"]
    logs = {}
    for name, overrides in {"live": live, "cached": cached}.items():
        run.train(read_recipe(write(tmp_path), [*overrides, f"output_dir={tmp_path / name}"]))
        logs[name] = read_log(tmp_path / name)
    for one, other in zip(logs["live"], logs["cached"], strict=True):
        for loss in ("loss_gen", "loss_mse", "loss_con"):
            assert other[loss] == pytest.approx(one[loss], rel=5e-3), loss  # features are kept in float16
    assert len({entry["loss_mse"] for entry in logs["live"]}) == len({entry["loss_con"] for entry in logs["live"]}) == 4


def test_a_cache_of_another_teacher_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    live = [f"guidance.teacher={save_teacher(tmp_path / 'teacher')}"]
    teach_toy(write(tmp_path), live, tmp_path / "cache")
    monkeypatch.setattr(run, "build_model", lambda *args: pytest.fail("weights were loaded"))
    overrides = [*live, "guidance.layer=-3", f"guidance.cache={tmp_path / 'cache'}"]
    with pytest.raises(ConfigurationError, match=r"is of teacher .*layer -2.*asked for is .*\(layer -2 against -3\)"):
        run.train(read_recipe(write(tmp_path), overrides))


def test_a_text_model_becomes_a_model_that_sees(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from elva_hf.data.toy_tokenizer import build_toy_tokenizer

    tokenizer = build_toy_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    text = Qwen2ForCausalLM(config)
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    model = {"text_model": str(tmp_path / "text"), "config": {"patch_size": 16, "patch_embed_dim": 32}}
    model["config"] |= {"patch_embed_num_heads": 2, "longest_edge": 64, "low_res_longest_edge": 32}
    path = write(tmp_path, model=model, trainable=["patch_embed"], training={**TRAINING, "max_steps": 1})
    built = ElvaForCausalLM.from_pretrained(run.train(read_recipe(path)))
    kept = text.model.layers[0].mlp.up_proj.weight
    assert torch.equal(built.model.language_model.layers[0].mlp.up_proj.weight, kept)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in built.generation_config.eos_token_id


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # PEFT's
def test_lora_trains_and_leaves_an_adapter(tmp_path):
    base = run.train(read_recipe(write(tmp_path), ["training.max_steps=1"]))
    lora = [f"model.path={base}", "lora.r=4", "lora.lora_alpha=8", f"output_dir={tmp_path / 'lora'}"]
    folder = run.train(read_recipe(write(tmp_path), lora))
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "processor_config.json").is_file()
    assert not (folder / "model.safetensors").exists()


def test_streaming_needs_a_number_of_steps_and_trains(tmp_path):
    streaming = ["data.streaming=true"]
    with pytest.raises(ConfigurationError, match=r"give training\.max_steps"):
        run.train(read_recipe(write(tmp_path), [*streaming, "training.max_steps=-1"]))
    run.train(read_recipe(write(tmp_path), streaming))
    assert [line["step"] for line in read_log(tmp_path / "out")] == [1, 2, 3, 4]


def test_several_gpus_and_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"2 GPUs and one process: .*accelerate launch"):
        run.check(read_recipe(write(tmp_path)))


def test_a_shipped_deepspeed_configuration_is_found_by_name(tmp_path):
    assert run.find_deepspeed("zero2").endswith("zero2.json")
    assert run.find_deepspeed(None) is None
    with pytest.raises(ConfigurationError, match=r"training\.deepspeed=zero9"):
        run.find_deepspeed("zero9")
