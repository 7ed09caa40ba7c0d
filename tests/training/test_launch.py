"""Shipped launch configurations: read by accelerate and DeepSpeed themselves, and run on two processes."""

import json
from importlib import resources

import pytest
import torch
import yaml
from launching import launch, launch_environment
from safetensors.torch import load_file
from toy_runs import read_log, save_teacher, small, toy_source
from transformers import AutoModelForCausalLM

import elva_hf
from elva_hf.training.recipe import find_recipe, read_recipe
from elva_hf.training.run import train

LAUNCH = resources.files("elva_hf.training") / "launch"
STEPS = 3


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_accelerate_reads_a_configuration_whole(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = str(LAUNCH / f"{name}.yaml")
    read = load_config_from_file(path).to_dict()
    for key, value in yaml.safe_load((LAUNCH / f"{name}.yaml").read_text()).items():
        assert read[key] == value, key
    assert read["mixed_precision"] == "bf16"


def test_accelerate_hands_fsdp_of_the_second_version_down():
    environment = launch_environment(LAUNCH / "fsdp2.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert "ACCELERATE_USE_FSDP" not in launch_environment(LAUNCH / "ddp.yaml")


def test_deepspeed_takes_the_configuration_that_transformers_fills_in(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    from elva_hf.training.run import find_deepspeed

    values = json.loads((LAUNCH / "zero2.json").read_text())
    filled = HfTrainerDeepSpeedConfig(find_deepspeed("zero2"))
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, bf16=True, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(arguments, None, num_training_steps=10)
    read = DeepSpeedConfig(filled.config)
    assert read.zero_optimization_stage == 2  # Table 7
    assert read.zero_config.contiguous_gradients
    assert read.bfloat16_config.enabled
    assert read.gradient_clipping == 1.0
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (2, 4)
    assert "optimizer" not in values  # AdamW is transformers', with the recipe's values


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


PAPER = ["stage1_spatial", "stage2_spatiotemporal", "stage3_sft"]


def write_stages(folder):
    """The paper's three recipes as one file, each from the model of the one before."""
    stages = []
    for name in PAPER:
        values = yaml.safe_load(find_recipe(name).read_text())
        del values["size"], values["variants"]
        stages.append({**values, "name": name})
    (folder / "paper.yaml").write_text(yaml.safe_dump({"model": {"preset": "tiny"}, "stages": stages}))
    return str(folder / "paper.yaml")


def arguments(folder, teacher, per_device):
    changes = {"per_device_train_batch_size": per_device, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1}
    source = toy_source(num_videos=512, num_frames=2, single_share=1.0)
    teachers = [f"stages.{name}.guidance.teacher={teacher}" for name in PAPER[:2]]
    return [*small(folder, **changes), *teachers, source]


def test_sharded_processes_save_the_adapter_that_one_saves(tmp_path):
    def lora(folder, per_device):
        changes = {"per_device_train_batch_size": per_device, "max_steps": STEPS, "save_steps": 2, "logging_steps": 1}
        source = toy_source(num_videos=512, num_frames=2, single_share=1.0)
        return [*small(folder, **changes), f"model.path={elva_hf.tiny_checkpoint()}", "lora.lora_dropout=0.0", source]

    one = train(read_recipe("lora", lora(tmp_path / "one", 16)))
    launch(LAUNCH / "fsdp2.yaml", "lora", *lora(tmp_path / "two", 8))
    two = tmp_path / "two" / "model"
    single, double = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert single.keys() == double.keys()
    for key in single:
        torch.testing.assert_close(double[key], single[key], rtol=0, atol=2e-4, msg=key)
    assert AutoModelForCausalLM.from_pretrained(two).peft_config


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains_in_all_three_stages(name, teacher, tmp_path):
    recipe = write_stages(tmp_path)
    one = train(read_recipe(recipe, arguments(tmp_path / "one", teacher, 16)))
    printed = launch(LAUNCH / f"{name}.yaml", recipe, *arguments(tmp_path / "two", teacher, 8))
    assert printed.count("2 x 8 x 1 (processes x micro-batch x accumulation)") == 3
    two = tmp_path / "two" / "model"
    for stage in (*PAPER[:2], "."):
        single, double = (load_file(tmp_path / side / stage / "model" / "model.safetensors") for side in ("one", "two"))
        assert single.keys() == double.keys()
        for key in single:
            torch.testing.assert_close(double[key], single[key], rtol=0, atol=2e-4, msg=f"{stage}: {key}")
        for before, after in zip(read_log(tmp_path / "one" / stage), read_log(tmp_path / "two" / stage), strict=True):
            for key in ("loss_gen",) if stage == "." else ("loss_gen", "loss_mse", "loss_con"):
                assert after[key] == pytest.approx(before[key], rel=1e-3), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two" / PAPER[1] / "model").guidance is not None
    last = AutoModelForCausalLM.from_pretrained(two)
    assert (last.guidance, last.config.merge_schedule) == (None, "paper")
    assert one.name == two.name
