"""Planned lengths: those of the samples, a window at a time, never twice, kept in a file that belongs to the data."""

from itertools import islice

import numpy as np
import pytest
from saved_elva import build_checkpoint, draw_frames, write_clip

from elva_hf.data import lengths as lengths_of
from elva_hf.data.batching import LengthGroupedSampler
from elva_hf.data.datasets import ElvaDataset
from elva_hf.data.encoding import encode_row, plan_row
from elva_hf.data.lengths import UNREADABLE, PlannedLengths, fingerprint_rows, plan_index
from elva_hf.errors_elva import ElvaError


@pytest.fixture(scope="module")
def processor():
    return build_checkpoint()[1]


def make_row(number, num_frames=None):
    frames = num_frames or 1 + number % 7
    content = [
        {"type": "video", "video": draw_frames(number, num_frames=frames, height=32, width=32)},
        {"type": "text", "text": "what? " * (1 + number % 3)},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    return {"id": str(number), "messages": messages}


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

    monkeypatch.setattr(lengths_of, "plan_row", plan)
    return planned


def test_only_a_window_is_planned_ahead_and_nothing_twice(processor, monkeypatch):
    planned = count_plans(monkeypatch)
    rows = [make_row(i) for i in range(24)]
    lengths = PlannedLengths(rows, processor)
    sampler = LengthGroupedSampler(ElvaDataset(rows, processor), lengths, 2, window=3)
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
    templated = build_checkpoint()[1]
    templated.chat_template = templated.chat_template.replace("<|im_start|>", "<|im_start|> ")
    others = [
        fingerprint_rows(rows, templated, {}),
        fingerprint_rows([*rows[:2], make_row(9)], processor, {}),
        fingerprint_rows(rows[:2], processor, {}),
        fingerprint_rows(rows, processor, {"num_frames": 2}),
        fingerprint_rows(rows, other, {}),
    ]
    assert len({own, *others}) == 6

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
