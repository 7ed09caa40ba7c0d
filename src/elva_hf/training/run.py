"""Run a recipe: check it whole, then stage by stage build, train, save.

A finished stage leaves `model` in its folder, with the processor; a run that is started again goes on from the last
complete checkpoint of the stage it was in.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from elva_hf.architectures_elva import find_architecture
from elva_hf.data.collator import ElvaCollator
from elva_hf.data.datasets import ElvaDataset, ElvaStream
from elva_hf.data.mixtures import Mixture, StreamingMixture
from elva_hf.errors_elva import ConfigurationError, ElvaError
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.training.building import PART_MODULES, build_model, build_processor, check_folder
from elva_hf.training.plan import StagePlan, count_steps, plan_recipe
from elva_hf.training.precision import cpu_multiplies_bfloat16
from elva_hf.training.recipe import Recipe, starting_from
from elva_hf.training.run_folder import BAD_SAMPLES, MODEL, check_same_run, start_over, write_record
from elva_hf.training.sections import Stage

logger = logging.getLogger(__name__)


def train(recipe: Recipe, report: Callable[[str], None] | None = None) -> Path:
    """Train every stage of a recipe.

    Args:
        recipe: From `read_recipe`.
        report: Takes the lines of the plan; nothing is said if None.

    Returns:
        The folder of the last model and its processor.

    Raises:
        ConfigurationError: Fields that are missing or cannot be; found before any weight is loaded.
        CheckpointError: Weights or checkpoints that cannot be loaded or written.
    """
    for plan in check(recipe):
        for line in plan.lines() if report is not None and is_main_process() else ():
            report(line)
    folder: Path | None = None
    for stage in recipe.stages:
        if folder is not None:
            stage = starting_from(stage, folder)
        folder = train_stage(stage, recipe.stage_dir(stage.name), resume=recipe.resume == "auto")
    return folder


def check(recipe: Recipe) -> list[StagePlan]:
    """Everything that can be known before weights are loaded: fields, splits, shapes, data, folders.

    Raises:
        ConfigurationError: Naming the file and the field.
    """
    check_processes()
    plans = plan_recipe(recipe, num_processes())
    missing = [
        field
        for i, stage in enumerate(recipe.stages)
        for field in stage.missing()
        if field != "model.path" or i == 0  # a later stage starts from the one before
    ]
    if missing:
        fields = " ".join(f"{field}=..." for field in dict.fromkeys(missing))
        raise ConfigurationError(f"{recipe.where}: fields to be filled in: {fields}")
    check_folder(recipe.stages[0].model.path)
    for i, stage in enumerate(recipe.stages):
        rows = open_rows(stage)
        if not stage.data.streaming:  # what is there, not what the recipe expects
            plans[i] = replace(plans[i], num_samples=len(rows), num_steps=count_steps(stage, len(rows)))
        training_arguments(stage, recipe.stage_dir(stage.name))
        if stage.lora is not None:
            _require("peft", "LoRA")
    return plans


def train_stage(stage: Stage, folder: Path, *, resume: bool = True) -> Path:
    """Train one stage into a folder.

    Args:
        stage: With its weights' source filled in.
        folder: For checkpoints, logs and `model`.
        resume: Whether to go on from the folder's last complete checkpoint, or to return its model if it is finished.

    Returns:
        The folder of the model and its processor.

    Raises:
        ConfigurationError: The folder holds another run.
        CheckpointError: Weights or checkpoints that cannot be loaded or written.
    """
    from transformers import set_seed

    from elva_hf.training.checkpoints import last_complete_checkpoint

    finished = folder / MODEL
    if not resume:
        start_over(stage, folder, remove=is_main_process())
    arguments = training_arguments(stage, folder)  # starts the process group, which the checks below need
    with arguments.main_process_first(desc="looking for what is there"):
        checkpoint = last_complete_checkpoint(folder) if resume else None
        if resume and (finished.is_dir() or checkpoint is not None):
            check_same_run(stage, folder, num_processes())
    if resume and finished.is_dir():
        logger.info("%s is finished; nothing to do", finished)
        return finished
    set_seed(stage.training.seed)
    processor = build_processor(stage)
    teacher, cache = open_teacher(stage, processor)
    spec = cache.spec if teacher is None and cache is not None else getattr(teacher, "spec", None)
    model = build_model(stage, processor, getattr(spec, "width", None))
    trainer = build_trainer(stage, model, processor, arguments, teacher=teacher, cache=cache)
    if trainer.is_world_process_zero():
        write_record(stage, folder, num_processes())
    with explained_workers():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return save_model(trainer, processor, finished)


def build_trainer(
    stage: Stage, model: Any, processor: Any, arguments: Any, *, teacher: Any = None, cache: Any = None
) -> Any:
    """The `ElvaTrainer` of a stage, with its data and callbacks."""
    from elva_hf.training.nonfinite import NonFiniteGuard
    from elva_hf.training.preference import PreferenceTrainer
    from elva_hf.training.streaming import StreamTrainer
    from elva_hf.training.trainer import ElvaTrainer

    data, folder = stage.data, Path(arguments.output_dir)
    options = {
        "seed": stage.training.seed,
        "max_bad_fraction": data.max_bad_fraction,
        "bad_samples_path": folder / BAD_SAMPLES,
        **stage.video.options,
    }
    rows = open_rows(stage)
    dataset = ElvaStream(rows, processor, **options) if data.streaming else ElvaDataset(rows, processor, **options)
    collator = ElvaCollator(
        processor,
        packing=data.packing,
        sample_ids=True,
        teacher_cache=cache,
        pad_to_multiple_of=data.pad_to_multiple_of,
        **stage.video.options,
    )
    kind, own = (StreamTrainer if data.streaming else ElvaTrainer), {}
    if stage.preference is not None:
        kind, own = PreferenceTrainer, {"beta": stage.preference.beta}
    return kind(
        **own,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[NonFiniteGuard(stage.training.max_nonfinite_steps)],
        teacher=teacher,
        grad_cache=stage.guidance is not None and stage.guidance.grad_cache,
        train_sampler=_sampler(stage, dataset, processor, folder),
        learning_rates={PART_MODULES[part]: rate for part, rate in stage.training.learning_rates.items()},
    )


def open_rows(stage: Stage) -> Any:
    """The rows of a stage's sources, mixed.

    Raises:
        ConfigurationError: A source that cannot be opened.
    """
    sources = list(stage.data.sources.values())
    if not stage.data.streaming:
        return Mixture(sources, seed=stage.training.seed, shuffle=False)  # samplers shuffle, and know rows by place
    if stage.training.max_steps < 0:
        raise ConfigurationError("data.streaming=true has no length; give training.max_steps.")
    rank = int(os.environ.get("RANK", "0"))
    return StreamingMixture(sources, seed=stage.training.seed, rank=rank, world_size=num_processes(), even=True)


def open_teacher(stage: Stage, processor: Any) -> tuple[Any, Any]:
    """The teacher on the fly, or the cache of its features; a teacher named beside a cache is only compared with it.

    Raises:
        ConfigurationError: The cache is of another teacher, layer or patch size.
    """
    guidance = stage.guidance
    if guidance is None:
        return None, None
    from elva_hf.training.teacher import VisualTeacher
    from elva_hf.training.teacher_cache import TeacherCache

    teacher = cache = None
    if guidance.teacher is not None:
        dtype = torch.float32 if stage.training.use_cpu else getattr(torch, guidance.teacher_dtype)
        teacher = VisualTeacher.from_pretrained(
            guidance.teacher, layer=guidance.layer, dtype=dtype, revision=guidance.revision
        )
    if guidance.cache is not None:
        pixels = processor.video_processor
        cache = TeacherCache(guidance.cache, image_mean=pixels.image_mean, image_std=pixels.image_std)
        cache.check(None if teacher is None else teacher.spec, pixels.patch_size)
        return None, cache
    return teacher, None


def training_arguments(stage: Stage, folder: Path) -> Any:
    """`transformers.TrainingArguments` of a stage.

    Raises:
        ConfigurationError: A value that they refuse, or accelerate is not installed.
    """
    from transformers import TrainingArguments

    _require("accelerate", "training")
    if stage.training.deepspeed is not None:
        _require("deepspeed", f"training.deepspeed={stage.training.deepspeed}", "deepspeed")
    training, on_cpu = stage.training, stage.training.use_cpu or not torch.cuda.is_available()
    own = ("batch_size", "warmup_ratio", "optim", "deepspeed", "max_nonfinite_steps", "torch_compile", "learning_rates")
    given = {name: value for name, value in asdict(training).items() if name not in own}
    given["use_cpu"] = on_cpu
    given["tf32"] = None if on_cpu else training.tf32
    if on_cpu and training.bf16 and not cpu_multiplies_bfloat16():
        logger.warning("this CPU has no products of bfloat16 matrices; training.bf16=false is some ten times faster")
    options = {
        "gradient_accumulation_steps": stage.accumulation_steps(num_processes()),
        "warmup_steps": training.warmup_ratio,  # below 1: a share of the steps
        "optim": training.optim or ("adamw_torch" if on_cpu else "adamw_torch_fused"),
        "deepspeed": find_deepspeed(training.deepspeed),
        "torch_compile": training.torch_compile,
        "activation_checkpointing": stage.model.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_num_workers": stage.data.num_workers,
        "dataloader_persistent_workers": False,  # with them a resumed run draws another random number in its next epoch
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": False,
        "prediction_loss_only": True,
        "save_strategy": "steps",
        "disable_tqdm": True,
    }
    try:
        return TrainingArguments(output_dir=str(folder), **given, **options)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigurationError(f"training: {' '.join(str(error).split())}") from error


def find_deepspeed(name: str | None) -> str | None:
    """Path of a DeepSpeed configuration: a shipped name such as `zero2`, or a path.

    Raises:
        ConfigurationError: There is none.
    """
    if name is None:
        return None
    shipped = resources.files("elva_hf.training") / "launch" / f"{name}.json"
    path = Path(str(shipped)) if shipped.is_file() else Path(name)
    if not path.is_file():
        raise ConfigurationError(f"training.deepspeed={name}: neither a file nor a shipped name; zero2 is one.")
    return str(path)


def save_model(trainer: Any, processor: Any, folder: Path) -> Path:
    """Save model and processor, whole or not at all; every process calls it."""
    partial = folder.with_name("_model")
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model)  # whole on the first process
        if trainer.is_world_process_zero() and hasattr(trainer.model, "peft_config"):
            trainer.model.save_pretrained(partial, state_dict=state)
        elif trainer.is_world_process_zero():
            unsharded(trainer.model, state).save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        processor.save_pretrained(partial)
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, which no model needs
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def unsharded(model: Any, state: dict[str, torch.Tensor]) -> ElvaForCausalLM:
    """A model of whole tensors for one whose parameters are shards.

    Args:
        model: The sharded one.
        state: Its gathered weights.
    """
    with torch.device("meta"):
        whole = find_architecture(model.config.model_type).causal_lm(copy.deepcopy(model.config))
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole


@contextmanager
def explained_workers() -> Iterator[None]:
    """Bring an error of ours in a process that loads data back to its line, of which PyTorch makes a traceback."""
    try:
        yield
    except ElvaError as error:
        text = str(error)
        if not text.startswith("Caught "):
            raise
        line = text.rstrip().rpartition("\n")[2]  # module.Class: message
        raise type(error)(line.partition(": ")[2]) from error


def num_processes() -> int:
    """Processes that train together, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def check_processes() -> None:
    """Refuse one process with several GPUs, which transformers would use by copying the model in every step.

    Raises:
        ConfigurationError: It is so.
    """
    if num_processes() == 1 and torch.cuda.device_count() > 1:
        raise ConfigurationError(
            f"{torch.cuda.device_count()} GPUs and one process: start with accelerate launch or torchrun "
            "(docs/training.md), or set CUDA_VISIBLE_DEVICES=0."
        )


def _sampler(stage: Stage, dataset: Any, processor: Any, folder: Path) -> Any:
    """The order of the rows; rows of one length together, if the recipe asks for it."""
    if stage.data.streaming:
        return None
    from elva_hf.data.batching import LengthGroupedSampler, PlannedLengths, ShuffledSampler

    seed, workers = stage.training.seed, stage.data.num_workers
    if not stage.data.group_by_length:
        return ShuffledSampler(dataset, seed=seed)
    lengths = PlannedLengths(dataset.rows, processor, folder=folder, num_workers=workers, **stage.video.options)
    at_once = num_processes() * stage.training.per_device_train_batch_size
    return LengthGroupedSampler(dataset, lengths, at_once, seed=seed)


def _require(package: str, what: str, install: str = '"elva-hf[train]"') -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ConfigurationError(f"{what} needs {package}; pip install {install}.")
