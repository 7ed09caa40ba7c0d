"""Samples with teacher features, a collator and training arguments, for the tests of guided training."""

from types import SimpleNamespace

import torch
from clips_elva import byte_tokenizer
from tiny_elva import PAD, pixels, tiny_model, video, words
from transformers import TrainingArguments

from elva_hf.training.guidance import GuidanceCallback

WIDTH = 6
GUIDANCE = {"teacher_width": WIDTH}
LAYOUTS = (
    [[(2, 2), (2, 2), (1, 1)], [(1, 2)]],
    [[(1, 3), (1, 3)]],
    [],
    [[(2, 1)], [(2, 1), (2, 1)], [(1, 1)]],
    [],
    [[(3, 2), (1, 2), (3, 2), (1, 2)]],
    [[(2, 2)]],
    [[(1, 1), (1, 1)], [(2, 2)]],
)
"""Frames' grids of the videos of each sample: none, one or several, of one or several grids."""


def eight_bits(patches, mean=0.5, std=0.5):
    """Pixels as a processor with this mean and deviation gives them; a teacher gets their 8 bits back."""
    return None if patches is None else (((patches + 2) * 64).clamp(0, 255).round() / 255 - mean) / std


def sample(number, layout):
    """One training sample: ids, labels of the last words, pixels, and what a teacher would say."""
    ids = words(1 + number % 3, number)
    for grids in layout:
        ids += video(*grids) + words(1, 7 * number)
    answer = words(2 + 2 * (number % 4), 50 + number)
    generator = torch.Generator().manual_seed(number)
    clips = sum(len(set(grids)) for grids in layout)
    frames = sum(len(grids) for grids in layout)
    return {
        "ids": ids + answer,
        "labels": len(ids) * [-100] + answer,
        "pixels": eight_bits(pixels(ids, number)),
        "tubes": torch.randn(clips, 2, 2, WIDTH, generator=generator),
        "frames": torch.randn(frames, WIDTH, generator=generator),
        "number": number,
    }


SAMPLES = [sample(i, layout) for i, layout in enumerate(LAYOUTS)]


def collate(samples, targets=True):
    """A right-padded batch with the keys of a guided step."""
    longest = max(len(item["ids"]) for item in samples)
    drawn = [item["pixels"] for item in samples if item["pixels"] is not None]
    batch = {
        "input_ids": torch.tensor([item["ids"] + (longest - len(item["ids"])) * [PAD] for item in samples]),
        "labels": torch.tensor([item["labels"] + (longest - len(item["ids"])) * [-100] for item in samples]),
        "sample_ids": torch.tensor([item["number"] for item in samples]),
    }
    lengths = torch.tensor([len(item["ids"]) for item in samples])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    if drawn:
        batch["pixel_values_videos"] = torch.cat(drawn)
        if targets:
            batch["teacher_tubes"] = torch.cat([item["tubes"] for item in samples])
            batch["teacher_frames"] = torch.cat([item["frames"] for item in samples])
    return batch


def collate_without_targets(samples):
    return collate(samples, targets=False)


def guided_model(guidance=None, seed=0, **options):
    """A tiny model with task heads, in training mode."""
    return tiny_model(seed=seed, guidance={**GUIDANCE, **(guidance or {})}, **options).train()


def arguments(folder, **options):
    """Two steps of plain gradient descent over the samples in order, every step logged."""
    fields = {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**fields, **options})


TAKEN_BY_TRL = (
    *("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "logging_steps"),
    *("train_sampling_strategy", "save_strategy", "report_to", "remove_unused_columns", "use_cpu", "disable_tqdm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_pin_memory", "fp16"),
    "ddp_find_unused_parameters",
)


def sft_trainer(model, args, hook, **options):
    """TRL's trainer over the samples with the settings of `arguments`; its rows are the numbers of the samples."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(
            **{name: getattr(args, name) for name in TAKEN_BY_TRL},
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False,
            bf16=False,
            max_length=None,
        ),
        train_dataset=Dataset.from_list([{"number": number} for number in range(len(SAMPLES))]),
        data_collator=lambda rows: collate([SAMPLES[row["number"]] for row in rows]),
        processing_class=byte_tokenizer(),
        callbacks=[GuidanceCallback(hook)],
        **options,
    )


class DrawnTeacher:
    """Stands for a `VisualTeacher`: a fixed random projection of each frame's mean colours on a 2x2 grid."""

    def __init__(self, width=WIDTH):
        self.spec = SimpleNamespace(width=width)
        self.projection = torch.randn(3, width, generator=torch.Generator().manual_seed(9))
        self.calls = 0

    def to(self, device):
        return self

    def each(self, videos):
        for frames in videos:
            self.calls += 1
            colors = torch.stack([frame.float().mean((1, 2)) / 255 for frame in frames])
            yield (colors @ self.projection)[:, None, None].expand(-1, 2, 2, -1)
