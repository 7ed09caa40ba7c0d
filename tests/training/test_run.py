import importlib.util
import json
import os
import re
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_runs import read_log, save_teacher

import elva_hf
from elva_hf.data.batching import LengthGroupedSampler, ShuffledSampler
from elva_hf.data.datasets import BadSamples, TooManyBadSamples
from elva_hf.errors_elva import CheckpointError, ConfigurationError, TrainingError
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.training import run
from elva_hf.training.building import build_model, build_processor
from elva_hf.training.checkpoints import last_complete_checkpoint
from elva_hf.training.nonfinite import NonFiniteGuard
from elva_hf.training.recipe import read_recipe
from elva_hf.training.run_folder import RECORD, check_same_run, write_record
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
    with pytest.raises(ConfigurationError, match=r"fields to be filled in: guidance\.teacher=\.\.\.$"):
        run.train(read_recipe(write(tmp_path), ["guidance.layer=-2"]))
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


def test_a_seed_decides_what_a_run_ends_with(tmp_path):
    ends = []
    for seed in (5, 5, 6):
        overrides = [f"output_dir={tmp_path / str(len(ends))}", "training.max_steps=1", f"training.seed={seed}"]
        ends.append(weights(run.train(read_recipe(write(tmp_path), overrides))))
        torch.rand(3)
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_a_stopped_run_with_workers_and_dropout_ends_the_same_in_a_later_epoch(tmp_path):
    few = json.dumps({"toy": {"format": "toy_world", "options": {"num_videos": 8, "num_frames": 2}}})  # two steps
    lora = [f"model.path={elva_hf.tiny_checkpoint()}", "lora.r=4", "lora.lora_dropout=0.5", f"data.sources={few}"]
    lora += ["data.num_workers=1", "training.max_steps=4", "training.save_steps=1", "training.save_total_limit=9"]
    run.train(read_recipe(write(tmp_path), lora))
    stopped = tmp_path / "stopped"
    os.rename(tmp_path / "out", stopped)
    for name in ("model", "checkpoint-2", "checkpoint-3", "checkpoint-4"):
        os.rename(stopped / name, tmp_path / name)
    run.train(read_recipe(write(tmp_path), [*lora, f"output_dir={stopped}"]))
    assert [line["loss"] for line in read_log(stopped)] == [line["loss"] for line in read_log(tmp_path)]
    first, second = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (tmp_path, stopped))
    assert same(first, second)


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
    first, record = tmp_path / "out" / "first" / "model", json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["model"]["path"] == str(first)
    model = ElvaForCausalLM.from_pretrained(folder)
    assert model.config.merge_schedule == steps
    finished = (first / "model.safetensors").stat().st_mtime_ns
    before = weights(folder)
    for name in ("model", "checkpoint-2"):
        os.rename(tmp_path / "out" / name, tmp_path / f"old-{name}")
    assert same(weights(run.train(read_recipe(path))), before)
    assert (first / "model.safetensors").stat().st_mtime_ns == finished


def build(tmp_path, *overrides):
    """The stage of a recipe with overrides, and its trainer."""
    (stage,) = read_recipe(write(tmp_path), overrides).stages
    processor = build_processor(stage)
    teacher, cache = run.open_teacher(stage, processor)
    model = build_model(stage, processor, getattr(teacher and teacher.spec, "width", None))
    arguments = run.training_arguments(stage, tmp_path / "out")
    return run.build_trainer(stage, model, processor, arguments, teacher=teacher, cache=cache)


def test_fields_of_a_recipe_reach_the_trainer_and_its_data(tmp_path):
    fields = {
        "training": {"seed": 7, "max_nonfinite_steps": 3, "warmup_ratio": 0.5, "batch_size": 12},
        "data": {"max_bad_fraction": 0.25, "packing": "shared_prefix", "pad_to_multiple_of": 8},
        "video": {"num_frames": 1, "longest_edge": 32},
        "model": {"attn_implementation": "eager"},
        "guidance": {"teacher": save_teacher(tmp_path / "teacher"), "grad_cache": "true"},
    }
    terms = {"tube_weight": 2.0, "frame_weight": 0.5, "mask_same_video": True}
    fields["guidance"] |= terms
    overrides = [f"{section}.{name}={value}" for section, own in fields.items() for name, value in own.items()]
    trainer = build(tmp_path, *overrides)
    dataset, collator = trainer.train_dataset, trainer.data_collator
    assert trainer.grad_cache
    assert trainer.guidance_hook.teacher is not None
    config = trainer.model.config
    assert terms.items() <= config.guidance.items()
    assert config.longest_edge == trainer.processing_class.video_processor.longest_edge == 32
    assert config.text_config._attn_implementation == "eager"
    assert not trainer.args.logging_nan_inf_filter
    assert trainer.args.gradient_accumulation_steps == 6
    assert trainer.args.get_warmup_steps(4) == 2
    (guard,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, NonFiniteGuard)]
    assert guard.max_consecutive == 3
    assert list(trainer.train_sampler) == list(ShuffledSampler(dataset, seed=7))
    assert dataset.bad_samples.max_fraction == 0.25
    assert dataset.bad_samples.path == tmp_path / "out" / "bad_samples.jsonl"
    assert [len(video) for video in dataset[0].grids] == [1]
    assert (collator.packing, collator.pad_to_multiple_of, collator.sample_ids) == ("shared_prefix", 8, True)
    grouped = build(tmp_path, "data.group_by_length=true", "training.per_device_train_batch_size=4").train_sampler
    assert isinstance(grouped, LengthGroupedSampler)
    assert grouped.batch_size == 4


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
        teach(to_teach, NotAsked(), writer)
    return teacher


class NotAsked:
    """A teacher of whom nothing is left to ask."""

    def each(self, videos):
        assert not list(videos)
        return iter(())


def test_features_of_a_cache_teach_what_the_teacher_itself_teaches(tmp_path):
    live = [f"guidance.teacher={save_teacher(tmp_path / 'teacher')}"]
    spec = teach_toy(write(tmp_path), live, tmp_path / "cache").spec
    assert (spec.width, spec.layer) == (32, -2)
    cached = [f"guidance.cache={tmp_path / 'cache'}"]
    (stage,) = read_recipe(write(tmp_path), cached).stages
    processor = build_processor(stage)
    processor.video_processor.image_mean = [0.25] * 3
    assert run.open_teacher(stage, processor)[1].image_mean == [0.25] * 3
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


def test_starting_over_leaves_nothing_that_a_resume_could_take(tmp_path, monkeypatch):
    folder, records = run.train(read_recipe(write(tmp_path))).parent, ("bad_samples.jsonl", "nonfinite_steps.jsonl")
    for name in records:
        (folder / name).write_text("{}\n")
    anew = ["training.learning_rate=0.5", "training.max_steps=1"]
    with pytest.raises(ConfigurationError, match=r"model\.path=.* lies in .*out, which resume=never clears"):
        run.train(read_recipe(write(tmp_path), [*anew, f"model.path={folder / 'model'}", "resume=never"]))
    assert last_complete_checkpoint(folder).name == "checkpoint-4"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "save_model", interrupt)
        run.train(read_recipe(write(tmp_path), [*anew, "training.max_steps=3", "resume=never"]))
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-3", RECORD}


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_that_was_stopped_in_a_later_epoch_goes_on_with_the_rows_it_has_not_seen(tmp_path, workers):
    with pytest.raises(ConfigurationError, match=r"give training\.max_steps"):
        run.train(read_recipe(write(tmp_path), ["data.streaming=true", "training.max_steps=-1"]))
    few = json.dumps({"toy": {"format": "toy_world", "options": {"num_videos": 8, "num_frames": 2}}})  # two steps
    stream = ["data.streaming=true", f"data.sources={few}", f"data.num_workers={workers}", "training.max_steps=7"]
    stream += ["training.save_steps=3", "training.save_total_limit=9"]
    whole = run.train(read_recipe(write(tmp_path), stream))
    stopped = tmp_path / "stopped"
    os.rename(tmp_path / "out", stopped)
    for name in ("model", "checkpoint-6", "checkpoint-7"):
        os.rename(stopped / name, tmp_path / name)
    before = read_log(tmp_path)
    resumed = run.train(read_recipe(write(tmp_path), [*stream, f"output_dir={stopped}"]))
    assert [line["loss"] for line in read_log(stopped)] == [line["loss"] for line in before]
    assert same(weights(resumed), weights(tmp_path / whole.name))
    assert len({line["loss"] for line in before}) == 7


def test_a_stream_goes_on_with_the_workers_it_began_with(tmp_path, monkeypatch, caplog):
    stage = read_recipe(write(tmp_path), ["data.streaming=true"]).stages[0]
    write_record(stage, tmp_path, 2)
    check_same_run(stage, tmp_path, 2)
    more = replace(stage, data=replace(stage.data, num_workers=3))
    for wanted, processes, now in (("num_processes", 1, stage), ("data.num_workers", 2, more)):
        with pytest.raises(ConfigurationError, match=rf"other fields \({wanted}\)"):
            check_same_run(now, tmp_path, processes)
    indexed = replace(stage, data=replace(stage.data, streaming=False, group_by_length=True))
    write_record(indexed, tmp_path, 2)
    check_same_run(replace(indexed, data=replace(indexed.data, num_workers=3)), tmp_path, 2)
    assert not caplog.records
    check_same_run(indexed, tmp_path, 1)
    assert "was begun by 2 processes and goes on with 1" in caplog.text


def test_a_stream_of_fewer_rows_than_workers_says_so(tmp_path):
    one = json.dumps({"toy": {"format": "toy_world", "options": {"num_videos": 1, "num_frames": 2}}})
    overrides = ["data.streaming=true", f"data.sources={one}", "data.num_workers=2"]
    with pytest.raises(TrainingError, match=r"has no row of its own; lower data\.num_workers"):
        run.train(read_recipe(write(tmp_path), overrides))


def test_several_gpus_and_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"2 GPUs and one process: .*accelerate launch"):
        run.check(read_recipe(write(tmp_path)))


def test_a_shipped_deepspeed_configuration_is_found_by_name(tmp_path):
    assert run.find_deepspeed("zero2").endswith("zero2.json")
    assert run.find_deepspeed(None) is None
    with pytest.raises(ConfigurationError, match=r"training\.deepspeed=zero9"):
        run.find_deepspeed("zero9")


@pytest.mark.parametrize(
    ("package", "fields", "install"),
    [("deepspeed", ["training.deepspeed=zero2"], "deepspeed"), ("accelerate", [], '"elva-hf[train]"')],
)
def test_a_package_that_is_missing_is_named_with_what_installs_it(tmp_path, monkeypatch, package, fields, install):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    (stage,) = read_recipe(write(tmp_path), fields).stages
    with pytest.raises(ConfigurationError, match=f"needs {package}; pip install {re.escape(install)}"):
        run.training_arguments(stage, tmp_path)


@pytest.mark.parametrize(
    ("bf16", "has_bfloat16", "warned"), [("true", False, True), ("true", True, False), ("false", False, False)]
)
def test_bfloat16_on_a_cpu_without_it_is_pointed_out(tmp_path, monkeypatch, caplog, bf16, has_bfloat16, warned):
    monkeypatch.setattr(run, "cpu_multiplies_bfloat16", lambda: has_bfloat16)
    (stage,) = read_recipe(write(tmp_path), ["training.use_cpu=true", f"training.bf16={bf16}"]).stages
    assert run.training_arguments(stage, tmp_path).bf16 == (bf16 == "true")
    assert ("training.bf16=false" in caplog.text) == warned


def test_an_error_of_a_process_that_loads_data_is_one_line(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "red"}]}]
    rows += [{**rows[0], "messages": [{**rows[0]["messages"][0], "content": [{"type": "video", "path": "no.mp4"}]}]}]
    rows[1]["messages"].append(rows[0]["messages"][1])
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    source = json.dumps({"rows": {"path": str(tmp_path / "rows.json")}})
    with pytest.raises(TooManyBadSamples) as caught:
        run.train(read_recipe(write(tmp_path), [f"data.sources={source}", "data.num_workers=1"]))
    assert str(caught.value).startswith("16 of 16 samples are bad")
    assert "no.mp4' does not exist" in str(caught.value)
    assert "\n" not in str(caught.value)
