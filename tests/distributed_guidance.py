"""One of several processes that train: `python distributed_guidance.py FOLDER`, with torchrun's environment.

Runs every case of `CASES` in the same process group and saves what `test_distributed.py` compares.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from guided_elva import SAMPLES, arguments, collate, guided_model, sft_trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from elva_hf.training.guidance import GuidanceCallback, GuidanceHook
from elva_hf.training.trainer import ElvaTrainer

NO_CONTRAST, NO_TUBES = {"frame_weight": 0.0}, {"tube_weight": 0.0}
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
}

CASES = {
    "ddp 2x1": {"batch": (2, 1), "guidance": NO_CONTRAST},
    "ddp 1x2": {"batch": (1, 2), "guidance": NO_CONTRAST},
    "ddp contrast": {"batch": (2, 1)},
    "ddp grad cache 2x1": {"batch": (2, 1), "grad_cache": True},
    "ddp grad cache 1x2": {"batch": (1, 2), "grad_cache": True},
    "ddp plain trainer": {"batch": (2, 1), "guidance": NO_TUBES, "plain": True},
    "ddp trl": {"batch": (2, 1), "guidance": NO_TUBES, "trl": True},
    "ddp lora": {"batch": (2, 1), "lora": True},
    "fsdp2 2x1": {"batch": (2, 1), "options": FSDP2},
    "fsdp2 grad cache 1x2": {"batch": (1, 2), "grad_cache": True, "options": FSDP2},
}


def build(folder, batch, guidance=None, plain=False, trl=False, lora=False, grad_cache=False, options=None):
    """A trainer over all samples; gradients of every parameter are expected in every step."""
    model = guided_model(guidance).double()
    if lora:
        from peft import LoraConfig, get_peft_model

        saved = ["patch_embed", "guidance"]
        model = get_peft_model(
            model, LoraConfig(target_modules=["v_proj"], modules_to_save=saved, init_lora_weights=False)
        )
        model = model.double()
    size, steps = batch
    fields = {
        "model": model,
        "args": arguments(
            folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            ddp_find_unused_parameters=False,
            **(options or {}),
        ),
        "train_dataset": SAMPLES,
        "data_collator": collate,
    }
    if trl:
        return sft_trainer(model, fields["args"], GuidanceHook())
    if options is FSDP2:  # accelerate leaves a model whole where it sees processes on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if plain:
        return Trainer(**fields, callbacks=[GuidanceCallback(GuidanceHook())])
    return ElvaTrainer(**fields, grad_cache=grad_cache)


def result(trainer):
    """Trained parameters by name, and what was logged of each step."""
    trained = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            trained[name] = whole.detach().clone()
    return {
        "parameters": trained,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def main(folder):
    torch.set_num_threads(1)
    results = {}
    for name, case in CASES.items():
        if "trl" in case and find_spec("trl") is None:
            continue
        AcceleratorState._reset_state()
        trainer = build(folder / "run", **case)
        trainer.train()
        sharded = [key for key, module in trainer.model_wrapped.named_modules() if isinstance(module, FSDPModule)]
        results[name] = {**result(trainer), "wrapper": type(trainer.model_wrapped).__name__, "sharded": sharded}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
