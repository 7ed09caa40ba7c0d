"""Runs of recipes on the toy world, for the tests: overrides that make any recipe small, and a random teacher."""

import json
from pathlib import Path

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel


def save_teacher(folder):
    """A small SigLIP with random weights, wide enough apart that frames differ."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
    )
    model = SiglipVisionModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "patch_embedding" in name or "position_embedding" in name:
                parameter.mul_(4 if "patch" in name else 0.2)
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    fields = {"image_processor_type": "SiglipImageProcessor", "size": size, "image_mean": [0.5] * 3}
    Path(folder, "preprocessor_config.json").write_text(json.dumps({**fields, "image_std": [0.5] * 3}))
    return Path(folder)


def toy_source(**options):
    return f"data.sources={json.dumps({'toy': {'format': 'toy_world', 'options': options}})}"


def small(folder, **changes):
    """Overrides with which a recipe of the paper runs on a CPU; `changes` are fields of `training`."""
    training = {
        "use_cpu": "true",
        "bf16": "false",
        "batch_size": 16,
        "per_device_train_batch_size": 16,
        "logging_steps": 5,
        "learning_rate": 3e-3,
        **changes,
    }
    return [
        "video.longest_edge=64",
        "data.num_workers=0",
        "model.gradient_checkpointing=false",
        f"output_dir={folder}",
        *(f"training.{name}={value}" for name, value in training.items()),
    ]


def read_log(folder):
    """Log lines of training of the last checkpoint in a folder."""
    last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [line for line in history if "loss" in line]
