"""Training on streams: every rank reads its own share, which nothing may cut again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from torch.utils.data import DataLoader, IterableDataset

from elva_hf.data.datasets import ElvaStream
from elva_hf.data.encoding import EncodedSample
from elva_hf.errors_elva import TrainingError
from elva_hf.training.trainer import ElvaTrainer


class EndlessStream(IterableDataset):
    """A stream, epoch after epoch: one for a `Trainer`, which resumes by counting batches from the first.

    Args:
        stream: Its epochs differ in order.
    """

    def __init__(self, stream: ElvaStream):
        self.stream = stream

    def __iter__(self) -> Iterator[EncodedSample]:
        for epoch in count():
            is_empty = True
            for sample in self.stream.read(epoch):
                is_empty = False
                yield sample
            if is_empty:
                raise TrainingError(
                    "a process that loads data has no row of its own; lower data.num_workers, or set "
                    "data.streaming=false for so few rows."
                )


class StreamTrainer(ElvaTrainer):
    """`ElvaTrainer` on a stream that shards itself over ranks and workers; accelerate would share out its rows again.

    A resumed run reads over what it has seen.
    """

    def get_train_dataloader(self) -> DataLoader:
        """The loader of this rank's share."""
        arguments = self.args
        return DataLoader(
            EndlessStream(self.train_dataset),
            batch_size=arguments.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory and not arguments.use_cpu,
        )
