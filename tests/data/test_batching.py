"""Batches of like length: every sample once, the same on every rank, and little padding."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from saved_elva import build_checkpoint, draw_frames
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import Trainer, TrainingArguments

from elva_hf.data import batching
from elva_hf.data.batching import (
    LengthGroupedSampler,
    PlannedLengths,
    ShuffledSampler,
    TokenBudgetBatchSampler,
    cut_batches,
    fill_steps,
    permute,
)
from elva_hf.data.collator import ElvaCollator
from elva_hf.errors_elva import ConfigurationError


@pytest.fixture(scope="module")
def processor():
    return build_checkpoint()[1]


class Numbers:
    """A data set that knows its epoch."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index

    def set_epoch(self, epoch):
        self.epoch = epoch


def grouped(lengths, batch_size, **options):
    return LengthGroupedSampler(Numbers(len(lengths)), lengths, batch_size, **options)


@pytest.fixture(scope="module")
def ragged():
    """Tokens as of a mixture: images, short and long videos."""
    generator = random.Random(0)
    return [generator.choice([45, 280, 70 * generator.randint(4, 64)]) + generator.randint(5, 300) for _ in range(3001)]


def make_row(number, num_frames=None):
    frames = num_frames or 1 + number % 7
    content = [
        {"type": "video", "video": draw_frames(number, num_frames=frames, height=32, width=32)},
        {"type": "text", "text": "what? " * (1 + number % 3)},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return {"id": str(number), "messages": messages}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_number_comes_once_in_a_shuffled_range(size):
    for seed in range(3):
        drawn = permute(np.arange(size), size, seed=seed)
        assert sorted(drawn.tolist()) == list(range(size))
        middle = np.arange(size // 3, size // 2)
        assert drawn[size // 3 : size // 2].tolist() == permute(middle, size, seed=seed).tolist()


def test_a_shuffled_range_is_in_no_order():
    size = 20_000
    orders = [permute(np.arange(size), size, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
        first = np.sort(order[: size // 10]) * 10 / size
        assert np.abs(first - np.arange(size // 10) * 10 / size * 10).max() < 10 * 0.6  # evenly drawn
    assert all((orders[0] != other).mean() > 0.99 for other in orders[1:])
    places = [int(permute(np.array([0]), 1000, seed=seed)[0]) for seed in range(2000)]
    assert 400 < np.mean(places) < 600
    assert len(set(places)) > 800


def padded_share(lengths, batches):
    """Tokens that are padding, of all tokens that are computed."""
    real = sum(lengths[i] for batch in batches for i in batch)
    computed = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    return 1 - real / computed


def test_grouping_saves_most_of_the_padding(ragged):
    torch.manual_seed(0)
    plain = list(BatchSampler(RandomSampler(ragged), 8, False))
    sorted_in = list(BatchSampler(grouped(ragged, 8), 8, False))
    assert padded_share(ragged, plain) > 0.45
    assert padded_share(ragged, sorted_in) < 0.05


def test_every_sample_comes_once_an_epoch_in_an_order_of_seed_and_epoch(ragged):
    sampler = grouped(ragged, 16, seed=1)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(ragged))), epoch
        assert list(sampler) == orders[-1]
    assert len(sampler) == len(ragged)
    assert orders[0] != orders[1]
    assert list(grouped(ragged, 16, seed=1)) == orders[0]
    assert list(grouped(ragged, 16, seed=2)) != orders[0]


def test_steps_are_not_sorted_by_length(ragged):
    steps = list(BatchSampler(grouped(ragged, 16), 16, True))
    means = np.array([np.mean([ragged[i] for i in step]) for step in steps])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.25


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_get_batches_of_like_length_and_as_many(ragged, ranks):
    per_device = 4
    order = grouped(ragged, per_device * ranks, seed=3)
    shards = [
        list(BatchSamplerShard(BatchSampler(order, per_device, False), ranks, rank, even_batches=True))
        for rank in range(ranks)
    ]
    assert len({len(shard) for shard in shards}) == 1
    assert {i for shard in shards for batch in shard for i in batch} == set(range(len(ragged)))
    spread = [
        max(longest) / min(longest)
        for longest in ([max(ragged[i] for i in batch) for batch in step] for step in zip(*shards, strict=True))
    ]
    assert np.mean(spread[:-1]) < 1.1


SAMPLERS = {
    "shuffled": lambda dataset, lengths: ShuffledSampler(dataset, seed=5),
    "grouped": lambda dataset, lengths: LengthGroupedSampler(dataset, lengths, 8, seed=5),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_goes_on_with_the_batches_and_the_epoch_it_has_not_seen(ragged, name, ranks):
    """accelerate tells the epoch to the sampler or to the data set, never to both, and to whom depends on all this."""

    def start(rank):
        dataset = Numbers(len(ragged))
        loader = DataLoader(dataset, 8 // ranks, sampler=SAMPLERS[name](dataset, ragged), collate_fn=list)
        return dataset, prepare_data_loader(loader, num_processes=ranks, process_index=rank, put_on_device=False)

    for rank in range(ranks):
        dataset, loader = start(rank)
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            assert dataset.epoch == epoch
            epochs.append(list(loader))
        assert epochs[0] != epochs[1]
        dataset, loader = start(rank)
        resumed = skip_first_batches(loader, 100)
        resumed.set_epoch(1)
        assert dataset.epoch == 1
        assert list(resumed) == epochs[1][100:]


def test_a_shuffled_epoch_holds_every_sample_once_in_chunks_that_do_not_matter(monkeypatch):
    dataset = Numbers(10_001)
    order = list(ShuffledSampler(dataset, seed=2))
    assert sorted(order) == list(range(10_001))
    assert len(ShuffledSampler(dataset)) == 10_001
    monkeypatch.setattr(batching, "_CHUNK", 77)
    assert list(ShuffledSampler(dataset, seed=2)) == order
    assert list(ShuffledSampler(dataset, seed=3)) != order


def test_lengths_must_be_those_of_the_data_set(ragged):
    with pytest.raises(ConfigurationError, match="3001 lengths for 3 samples"):
        LengthGroupedSampler(Numbers(3), ragged, 8)
    with pytest.raises(ConfigurationError, match="3001 lengths for 3 samples"):
        TokenBudgetBatchSampler(Numbers(3), ragged, 9000)


@pytest.mark.parametrize(("batch_size", "window"), [(0, 50), (8, 0), (2.5, 50)])
def test_sizes_that_cannot_be_are_refused(ragged, batch_size, window):
    with pytest.raises(ConfigurationError, match="whole number"):
        grouped(ragged, batch_size, window=window)


def test_a_trainer_takes_the_sampler_and_sees_less_padding(processor, tmp_path):
    rows = [make_row(i, num_frames=1 + 7 * (i % 2)) for i in range(16)]
    seen = {}

    class Grouped(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            lengths = PlannedLengths(rows, processor)
            return grouped(lengths, 2) if self.args.run_name == "grouped" else RandomSampler(rows)

        def compute_loss(self, model, inputs, **kwargs):
            seen.setdefault(self.args.run_name, []).append(float(inputs["attention_mask"].float().mean()))
            return super().compute_loss(model, inputs, **kwargs)

    for name in ("grouped", "random"):
        options = {"max_steps": 8, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no"}
        arguments = TrainingArguments(
            str(tmp_path), run_name=name, use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **options
        )
        model = build_checkpoint()[0]
        Grouped(model, arguments, train_dataset=rows, data_collator=ElvaCollator(processor)).train()
    assert len(seen["grouped"]) == 8
    assert np.mean(seen["grouped"]) > 0.95 > 0.9 > np.mean(seen["random"])


# As many samples as fit.


@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_keep_to_their_tokens_and_ranks_step_together(ragged, ranks):
    max_tokens = 12_000
    shards = [
        list(
            TokenBudgetBatchSampler(
                Numbers(len(ragged)), ragged, max_tokens, seed=2, window=500, num_replicas=ranks, rank=rank
            )
        )
        for rank in range(ranks)
    ]
    assert len({len(shard) for shard in shards}) == 1
    batches = [batch for shard in shards for batch in shard]
    repeated = [i for i in set.union(*map(set, batches)) if sum(i in batch for batch in batches) > 1]
    assert len(repeated) <= (ranks > 1)  # the last window is one sample, which every rank gets
    assert all(max(ragged[i] for i in batch) * len(batch) <= max_tokens for batch in batches)
    assert {i for batch in batches for i in batch} == set(range(len(ragged)))
    assert padded_share(ragged, batches) < 0.05
    longest = [[max(ragged[i] for i in batch) for batch in step] for step in zip(*shards, strict=True)]
    assert np.mean([max(step) / min(step) for step in longest]) < 1.25
    sampler = TokenBudgetBatchSampler(Numbers(len(ragged)), ragged, max_tokens, seed=2, window=500, num_replicas=ranks)
    assert list(sampler) == shards[0]
    sampler.set_epoch(1)
    assert list(sampler) != shards[0]


def test_batches_are_cut_where_one_more_would_be_too_many():
    assert cut_batches(np.array([1, 1, 2, 3, 3, 6]), 6) == [(0, 3), (3, 5), (5, 6)]
    assert cut_batches(np.array([4]), 4) == [(0, 1)]
    with pytest.raises(ConfigurationError, match="7 tokens, more than max_tokens=6"):
        cut_batches(np.array([1, 7]), 6)


def test_steps_are_filled_by_halving_and_then_by_repeating():
    assert fill_steps([(0, 4), (4, 6)], 1) == [(0, 4), (4, 6)]
    assert fill_steps([(0, 4), (4, 6)], 3) == [(0, 2), (2, 4), (4, 6)]
    assert fill_steps([(0, 1), (1, 2)], 3) == [(0, 1), (1, 2), (1, 2)]
    assert fill_steps([(0, 2)], 4) == [(0, 1), (1, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"rank": 2, "num_replicas": 2}, {"window": 0}])
def test_budgets_that_cannot_be_are_refused(ragged, options):
    with pytest.raises(ConfigurationError):
        TokenBudgetBatchSampler(Numbers(len(ragged)), ragged, **{"max_tokens": 5000, **options})


def test_lengths_of_a_budget_may_be_planned(processor):
    rows = [make_row(i) for i in range(12)]
    lengths = PlannedLengths(rows, processor)
    batches = list(TokenBudgetBatchSampler(Numbers(12), lengths, 150, window=6))
    assert sorted(i for batch in batches for i in batch) == list(range(12))
    collator = ElvaCollator(processor)
    assert all(collator([rows[i] for i in batch])["input_ids"].numel() <= 150 for batch in batches)
    assert json.dumps(batches)  # plain numbers
