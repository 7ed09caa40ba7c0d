"""Batches of like length: every sample once, the same on every rank, and little padding."""

import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from saved_elva import build_checkpoint, draw_frames, write_clip
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import Trainer, TrainingArguments

from elva_hf.data import batching
from elva_hf.data.batching import (
    UNREADABLE,
    LengthGroupedSampler,
    PlannedLengths,
    TokenBudgetBatchSampler,
    cut_batches,
    fill_steps,
    fingerprint_rows,
    permute,
    plan_index,
)
from elva_hf.data.collator import ElvaCollator
from elva_hf.data.encoding import encode_row, plan_row
from elva_hf.errors_elva import ConfigurationError, ElvaError


@pytest.fixture(scope="module")
def processor():
    return build_checkpoint()[1]


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
    grouped = list(BatchSampler(LengthGroupedSampler(ragged, 8), 8, False))
    assert padded_share(ragged, plain) > 0.45
    assert padded_share(ragged, grouped) < 0.05


def test_every_sample_comes_once_an_epoch_in_an_order_of_seed_and_epoch(ragged):
    sampler = LengthGroupedSampler(ragged, 16, seed=1)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(ragged))), epoch
        assert list(sampler) == orders[-1]
    assert len(sampler) == len(ragged)
    assert orders[0] != orders[1]
    assert list(LengthGroupedSampler(ragged, 16, seed=1)) == orders[0]
    assert list(LengthGroupedSampler(ragged, 16, seed=2)) != orders[0]


def test_steps_are_not_sorted_by_length(ragged):
    steps = list(BatchSampler(LengthGroupedSampler(ragged, 16), 16, True))
    means = np.array([np.mean([ragged[i] for i in step]) for step in steps])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.25


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_get_batches_of_like_length_and_as_many(ragged, ranks):
    per_device = 4
    order = LengthGroupedSampler(ragged, per_device * ranks, seed=3)
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


def test_a_resumed_run_goes_on_with_the_batches_it_has_not_seen(ragged):
    def loader():
        return DataLoader(range(len(ragged)), 8, sampler=LengthGroupedSampler(ragged, 8, seed=5), collate_fn=list)

    whole = list(loader())
    assert list(skip_first_batches(loader(), 100)) == whole[100:]


@pytest.mark.parametrize(("batch_size", "window"), [(0, 50), (8, 0), (2.5, 50)])
def test_sizes_that_cannot_be_are_refused(ragged, batch_size, window):
    with pytest.raises(ConfigurationError, match="whole number"):
        LengthGroupedSampler(ragged, batch_size, window=window)


def test_a_trainer_takes_the_sampler_and_sees_less_padding(processor, tmp_path):
    rows = [make_row(i, num_frames=1 + 7 * (i % 2)) for i in range(16)]
    seen = {}

    class Grouped(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            lengths = PlannedLengths(rows, processor)
            return LengthGroupedSampler(lengths, 2) if self.args.run_name == "grouped" else RandomSampler(rows)

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


# Planned lengths.


def test_lengths_are_those_of_the_samples(processor):
    rows = [make_row(i) for i in range(6)]
    lengths = PlannedLengths(rows, processor, num_frames=3)
    assert len(lengths) == 6
    chosen = np.array([4, 0, 4, 2])
    assert lengths(chosen).tolist() == [len(encode_row(rows[i], processor, num_frames=3)) for i in chosen]


def count_plans(monkeypatch):
    planned = []

    def plan(row, *args, **options):
        planned.append(row["id"])
        return plan_row(row, *args, **options)

    monkeypatch.setattr(batching, "plan_row", plan)
    return planned


def test_only_a_window_is_planned_ahead_and_nothing_twice(processor, monkeypatch):
    planned = count_plans(monkeypatch)
    rows = [make_row(i) for i in range(24)]
    lengths = PlannedLengths(rows, processor)
    sampler = LengthGroupedSampler(lengths, 2, window=3)
    order = list(islice(sampler, 5))
    assert len(planned) == len(set(planned)) == 6
    assert list(islice(sampler, 24))[:5] == order
    assert len(planned) == len(set(planned)) == 24


def test_lengths_are_kept_in_a_file_that_belongs_to_the_data(processor, monkeypatch, tmp_path):
    planned = count_plans(monkeypatch)
    rows = [make_row(i) for i in range(8)]
    every = np.arange(8)
    first = PlannedLengths(rows, processor, folder=tmp_path)
    expected = first(every).tolist()
    assert isinstance(first._lengths, np.memmap)
    planned.clear()
    assert PlannedLengths(rows, processor, folder=tmp_path)(every).tolist() == expected
    assert not planned
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]
    shorter = PlannedLengths(rows, processor, folder=tmp_path, num_frames=1)(every).tolist()
    assert shorter != expected
    assert len(planned) == 8
    assert PlannedLengths(rows[:7], processor, folder=tmp_path)(every[:7]).tolist() == expected[:7]
    first.path.write_bytes(first.path.read_bytes()[:40])  # a cut file is made anew
    assert PlannedLengths(rows, processor, folder=tmp_path)(every).tolist() == expected


def test_other_rows_and_options_have_another_fingerprint(processor):
    rows = [make_row(i) for i in range(3)]
    own = fingerprint_rows(rows, processor, {})
    assert own == fingerprint_rows([make_row(i) for i in range(3)], build_checkpoint()[1], {})
    other = build_checkpoint()[1]
    other.video_processor.longest_edge = 32
    others = [
        fingerprint_rows([*rows[:2], make_row(9)], processor, {}),
        fingerprint_rows(rows[:2], processor, {}),
        fingerprint_rows(rows, processor, {"num_frames": 2}),
        fingerprint_rows(rows, other, {}),
    ]
    assert len({own, *others}) == 5

    class Named(list):
        fingerprint = "of its own"

        def __getitem__(self, index):
            raise AssertionError("read")

    assert fingerprint_rows(Named(rows), processor, {}) != fingerprint_rows(Named(rows[:2]), processor, {})


def test_a_row_that_cannot_be_read_has_a_length_all_the_same(processor, tmp_path):
    gone = make_row(0)
    gone["messages"][0]["content"][0] = {"type": "video", "path": str(tmp_path / "gone.mp4")}

    class Broken(list):
        def __getitem__(self, index):
            if index == 2:
                raise ElvaError("odd")
            return super().__getitem__(index)

    rows = Broken([make_row(0), gone, None])
    assert PlannedLengths(rows, processor)(np.arange(3)).tolist()[1:] == [UNREADABLE, UNREADABLE]
    with pytest.raises(TypeError):
        plan_index([make_row(0)], None, {"a": 1}, "x")


@pytest.mark.slow
def test_worker_processes_plan_ahead(processor, tmp_path):
    paths = [write_clip(tmp_path / f"{i}.mp4", draw_frames(i, num_frames=1 + i)) for i in range(4)]
    rows = [make_row(i) for i in range(4)]
    for row, path in zip(rows, paths, strict=True):
        row["messages"][0]["content"][0] = {"type": "video", "path": str(path)}
    lengths = PlannedLengths(rows, processor, num_workers=1)
    lengths.prepare(np.arange(3))
    assert len(lengths._pending) > 0
    assert lengths(np.arange(4)).tolist() == [plan_row(row, processor) for row in rows]
    assert not lengths._pending
    lengths.close()


# As many samples as fit.


@pytest.mark.parametrize("ranks", [1, 3])
def test_batches_keep_to_their_tokens_and_ranks_step_together(ragged, ranks):
    max_tokens = 12_000
    shards = [
        list(TokenBudgetBatchSampler(ragged, max_tokens, seed=2, window=500, num_replicas=ranks, rank=rank))
        for rank in range(ranks)
    ]
    assert len({len(shard) for shard in shards}) == 1
    batches = [batch for shard in shards for batch in shard]
    repeated = [i for i in set.union(*map(set, batches)) if sum(i in batch for batch in batches) > 1]
    assert len(repeated) <= (ranks > 1)  # the last window is one sample, which every rank gets
    assert all(max(ragged[i] for i in batch) * len(batch) <= max_tokens for batch in batches)
    assert {i for batch in batches for i in batch} == set(range(len(ragged)))
    assert padded_share(ragged, batches) < 0.05
    for step in zip(*shards, strict=True):
        longest = [max(ragged[i] for i in batch) for batch in step]
        assert max(longest) <= 2.5 * min(longest)
    sampler = TokenBudgetBatchSampler(ragged, max_tokens, seed=2, window=500, num_replicas=ranks)
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
        TokenBudgetBatchSampler(ragged, **{"max_tokens": 5000, **options})


def test_lengths_of_a_budget_may_be_planned(processor):
    rows = [make_row(i) for i in range(12)]
    lengths = PlannedLengths(rows, processor)
    batches = list(TokenBudgetBatchSampler(lengths, 150, window=6))
    assert sorted(i for batch in batches for i in batch) == list(range(12))
    collator = ElvaCollator(processor)
    assert all(collator([rows[i] for i in batch])["input_ids"].numel() <= 150 for batch in batches)
    assert json.dumps(batches)  # plain numbers
