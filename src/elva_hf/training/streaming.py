"""Training on streams: every rank reads its own share, which nothing may cut again."""

from __future__ import annotations

from torch.utils.data import DataLoader

from elva_hf.training.trainer import ElvaTrainer


class StreamLoader(DataLoader):
    """A loader that tells its stream which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is; `Trainer` does."""
        self.dataset.set_epoch(epoch)


class StreamTrainer(ElvaTrainer):
    """`ElvaTrainer` on a stream that shards itself over ranks and workers; accelerate would share out its rows again.

    A resumed run reads over what it has seen.
    """

    def get_train_dataloader(self) -> DataLoader:
        """The loader of this rank's share."""
        arguments = self.args
        return StreamLoader(
            self.train_dataset,
            batch_size=arguments.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory and not arguments.use_cpu,
            drop_last=True,
        )
