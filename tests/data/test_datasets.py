"""Data sets: bad clips are replaced by fixed others and written down, too many stop, streams resume."""

import json
import pickle
from itertools import pairwise
from multiprocessing import get_context

import pytest
import torch
from saved_elva import build_checkpoint, draw_frames, write_clip
from torch.utils.data import DataLoader

from elva_hf.chat_elva import CHAT_TEMPLATE
from elva_hf.data.collator import ElvaCollator
from elva_hf.data.datasets import (
    MAX_TRIES,
    ElvaDataset,
    ElvaStream,
    TooManyBadSamples,
    append_line,
    describe_row,
    substitutes,
    transform_patches,
)
from elva_hf.data.encoding import encode_row
from elva_hf.errors_elva import ConfigurationError, ElvaError, TrainingError, VideoError
from elva_hf.processing_elva import ElvaProcessor


@pytest.fixture(scope="module")
def processor():
    return build_checkpoint()[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{i}.mp4", draw_frames(i, num_frames=2, height=32, width=32)) for i in range(6)]


@pytest.fixture
def rows(clips):
    return [make_row(path, f"row {i}") for i, path in enumerate(clips)]


def make_row(path, name):
    content = [{"type": "video", "path": str(path)}, {"type": "text", "text": f"what is in {name}?"}]
    return {"id": name, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": name}]}


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(one, other):
    return (one.index, one.sample_id) == (other.index, other.sample_id) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("input_ids", "labels", "pixel_values_videos")
    )


def test_a_data_set_gives_the_encoded_rows(processor, rows):
    dataset = ElvaDataset(rows, processor, num_frames=1)
    assert len(dataset) == 6
    for i, one in enumerate(rows):
        assert same(dataset[i], encode_row(one, processor, index=i, num_frames=1))
    assert dataset[-1].index == 5
    with pytest.raises(IndexError):
        dataset[6]
    assert dataset.bad_samples.counts == (7, 0)


def test_a_bad_clip_is_replaced_and_written_down(processor, rows, tmp_path):
    rows[2] = make_row(tmp_path / "gone.mp4", "row 2")
    log = tmp_path / "out" / "bad_samples.jsonl"
    dataset = ElvaDataset(rows, processor, bad_samples_path=log, seed=4)
    sample = dataset[2]
    assert sample.index != 2
    assert same(sample, dataset[sample.index])
    (line,) = read_log(log)
    assert line.pop("error").startswith(f"'{tmp_path}/gone.mp4' does not exist")
    wanted = {"index": 2, "epoch": 0, "id": "row 2", "path": str(tmp_path / "gone.mp4"), "reason": "not_found"}
    assert line == {**wanted, "replaced_by": sample.index}
    assert dataset.bad_samples.counts == (3, 1)
    again = ElvaDataset(rows, processor, bad_samples_path=log, seed=4)
    assert same(again[2], sample)
    chosen = set()
    for epoch in range(20):
        again.set_epoch(epoch)
        chosen.add(again[2].index)
    assert len(chosen) > 1  # another epoch, another substitute
    assert 2 not in chosen
    assert {line["epoch"] for line in read_log(log)[1:]} == set(range(20))


def test_what_replaces_a_row_is_decided_by_seed_epoch_and_index():
    drawn = list(substitutes(3, 10, seed=1, epoch=2))
    assert len(drawn) == MAX_TRIES + 1
    assert drawn[0] == 3
    assert drawn == list(substitutes(3, 10, seed=1, epoch=2))
    assert all(one != other for one, other in pairwise(drawn))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert drawn != list(substitutes(3, 10, **other))
    firsts = [list(substitutes(0, 1000, seed=seed, epoch=0))[1] for seed in range(200)]
    assert len(set(firsts)) > 150
    assert list(substitutes(0, 1, seed=0, epoch=0)) == [0] * (MAX_TRIES + 1)
    assert {next(iter(list(substitutes(0, 2, seed=seed, epoch=0))[1:])) for seed in range(9)} == {1}


class Rows(list):
    """Rows of which some cannot be read."""

    def __init__(self, rows, errors):
        super().__init__(rows)
        self.errors = errors

    def __getitem__(self, index):
        if index in self.errors:
            raise self.errors[index]
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(5, "Input/output error", "/data/a.mp4"), {"path": "/data/a.mp4", "reason": "OSError"}),
        (VideoError("cut", reason="damaged", source="b.mp4"), {"path": "b.mp4", "reason": "damaged"}),
        (ElvaError("odd"), {"path": None, "reason": "ElvaError"}),
    ],
)
def test_rows_that_cannot_be_read_are_bad_samples(processor, rows, tmp_path, error, expected):
    log = tmp_path / "bad.jsonl"
    dataset = ElvaDataset(Rows(rows, {1: error}), processor, bad_samples_path=log)
    assert dataset[1].index != 1
    (line,) = read_log(log)
    assert {key: line[key] for key in expected} == expected
    assert line["error"] == str(error)


@pytest.mark.parametrize("error", [RuntimeError("a fault of the program"), MemoryError(), KeyboardInterrupt()])
def test_faults_of_the_program_are_not_taken_for_bad_samples(processor, rows, tmp_path, error):
    dataset = ElvaDataset(Rows(rows, {1: error}), processor, bad_samples_path=tmp_path / "bad.jsonl")
    with pytest.raises(type(error)):
        dataset[1]
    assert not (tmp_path / "bad.jsonl").exists()


def test_without_a_file_to_write_to_a_bad_sample_is_an_error(processor, rows, tmp_path):
    rows[0] = make_row(tmp_path / "gone.mp4", "row 0")
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        ElvaDataset(rows, processor)[0]


def test_too_many_bad_samples_stop_the_run_and_name_the_file(processor, rows, tmp_path):
    rows[0] = make_row(tmp_path / "gone.mp4", "row 0")
    log = tmp_path / "bad.jsonl"
    dataset = ElvaDataset(rows, processor, bad_samples_path=log, max_bad_fraction=0.2, min_samples=20)
    for _ in range(9):  # 18 samples seen, 9 of them bad: too few to judge
        dataset[0]
    with pytest.raises(TooManyBadSamples, match=r"1[01] of 2[01] samples are bad") as caught:
        for _ in range(3):
            dataset[0]
    assert isinstance(caught.value, TrainingError)
    for part in (str(log), "max_bad_fraction=0.2", "gone.mp4"):
        assert part in str(caught.value)
    assert len(read_log(log)) == dataset.bad_samples.counts[1]


def test_a_share_of_bad_samples_at_the_limit_goes_on(processor, rows, tmp_path):
    rows[0] = make_row(tmp_path / "gone.mp4", "row 0")
    options = {"bad_samples_path": tmp_path / "bad.jsonl", "min_samples": 1}
    dataset = ElvaDataset(rows, processor, max_bad_fraction=0.5, **options)
    dataset[1]
    dataset[0]  # 1 of 2, and then 1 of 3
    with pytest.raises(TooManyBadSamples):
        ElvaDataset(rows, processor, max_bad_fraction=0.0, **options)[0]


def test_a_data_set_of_nothing_but_bad_samples_stops(processor, tmp_path):
    rows = [make_row(tmp_path / f"{i}.mp4", str(i)) for i in range(40)]
    dataset = ElvaDataset(rows, processor, bad_samples_path=tmp_path / "bad.jsonl", max_bad_fraction=1.0)
    with pytest.raises(TooManyBadSamples, match=f"the last {MAX_TRIES} of them one after another"):
        dataset[0]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_bad_samples_are_counted_over_all_workers(processor, rows, tmp_path, context):
    rows[0] = make_row(tmp_path / "gone.mp4", "row 0")
    log = tmp_path / "bad.jsonl"
    dataset = ElvaDataset(rows, processor, bad_samples_path=log, max_bad_fraction=0.9)
    options = {"collate_fn": ElvaCollator(processor, sample_ids=True), "multiprocessing_context": context}
    loader = DataLoader(dataset, 1, num_workers=2, persistent_workers=True, **options)
    first = torch.cat([made["sample_ids"] for made in loader])
    assert dataset.bad_samples.counts == (7, 1)
    assert len(read_log(log)) == 1
    if context == "spawn":
        return
    dataset.set_epoch(3)  # workers that live on see it
    again = torch.cat([made["sample_ids"] for made in loader])
    assert dataset.bad_samples.counts == (14, 2)
    assert read_log(log)[1]["epoch"] == 3
    expected = next(iter(list(substitutes(0, 6, seed=0, epoch=3))[1:]))
    assert (first[0], again[0]) == (list(substitutes(0, 6, seed=0, epoch=0))[1], expected)


def test_errors_of_workers_can_be_read(processor, rows, tmp_path):
    rows[0] = make_row(tmp_path / "gone.mp4", "row 0")
    strict = DataLoader(ElvaDataset(rows, processor), 1, collate_fn=ElvaCollator(processor), num_workers=1)
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        list(strict)
    options = {"bad_samples_path": tmp_path / "bad.jsonl", "max_bad_fraction": 0.0, "min_samples": 1}
    few = DataLoader(ElvaDataset(rows, processor, **options), 1, collate_fn=ElvaCollator(processor), num_workers=1)
    with pytest.raises(TooManyBadSamples, match=r"bad\.jsonl"):
        list(few)
    error = TooManyBadSamples("1 of 2")
    assert str(pickle.loads(pickle.dumps(error))) == "1 of 2"


def test_lines_of_many_processes_do_not_mix(tmp_path):
    path = tmp_path / "lines.jsonl"
    context = get_context("fork")
    writers = [context.Process(target=write_lines, args=(path, letter)) for letter in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 400
    assert {line for line in lines} == {json.dumps(letter * 3000) for letter in "abcd"}


def write_lines(path, letter):
    for _ in range(100):
        append_line(path, json.dumps(letter * 3000))


def test_odd_rows_are_described_as_they_are():
    described = describe_row(None, ElvaError("x"), index=1, epoch=0)
    assert described == {"index": 1, "epoch": 0, "id": None, "path": None}
    for row in ({"messages": 3}, {"messages": [None]}, {"messages": [{"content": [None, {"type": "video"}]}]}, "text"):
        assert describe_row(row, ElvaError("x"), index=1, epoch=0)["path"] is None
    error = ElvaError("x")
    error.file, error.line, error.row_id = "rows.json", 7, "a"
    described = describe_row(None, error, index=1, epoch=0)
    assert (described["path"], described["line"], described["id"]) == ("rows.json", 7, "a")


@pytest.mark.parametrize("kind", [ElvaDataset, ElvaStream])
@pytest.mark.parametrize(
    ("options", "match"),
    [({"max_bad_fraction": 1.5}, "max_bad_fraction"), ({"min_samples": 0}, "min_samples"), ({"fpss": 2}, "fps")],
)
def test_options_that_cannot_be_are_refused_at_once(kind, processor, rows, options, match):
    with pytest.raises(ConfigurationError, match=match):
        kind(rows, processor, **options)
    plain = CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    with pytest.raises(ConfigurationError, match="endgeneration"):
        kind(rows, ElvaProcessor(processor.tokenizer, processor.video_processor, chat_template=plain))


# Changes to frames.


def test_frames_that_are_not_changed_give_the_same_patches(processor, rows):
    content = [{"type": "image", "image": draw_frames(1, num_frames=1)[0]}, *rows[0]["messages"][0]["content"]]
    rows[0]["messages"][0]["content"] = content
    hybrid = {"num_high_res_frames": 1, "num_low_res_frames": 1, "low_res_longest_edge": 16}
    seen = []

    def look(frames, generator):
        seen.append(tuple(frames.shape))
        assert 0 <= frames.min() <= frames.max() <= 1
        return frames

    plain = encode_row(rows[0], processor, **hybrid)
    made = ElvaDataset(rows, processor, transform=look, **hybrid)[0]
    torch.testing.assert_close(made.pixel_values_videos, plain.pixel_values_videos, atol=1e-6, rtol=0)
    assert seen == [(1, 3, 64, 64), (1, 3, 16, 16), (1, 3, 32, 32)]


def test_flipped_frames_are_those_of_a_flipped_video(processor):
    frames = draw_frames(3, num_frames=2)
    samples = []
    for video in (frames, frames[:, :, ::-1].copy()):
        row = make_row("", "x")
        row["messages"][0]["content"][0] = {"type": "video", "video": video}
        samples.append(encode_row(row, processor))
    options = processor.video_processor.resolve_options()
    flipped = transform_patches(samples[0], lambda images, _: images.flip(-1), torch.Generator(), options)
    torch.testing.assert_close(flipped, samples[1].pixel_values_videos, atol=1e-6, rtol=0)


def test_random_changes_are_decided_by_seed_epoch_and_index(processor, rows):
    def noise(frames, generator):
        return frames + torch.rand(frames.shape, generator=generator)

    def drawn(seed, epoch, index):
        dataset = ElvaDataset(rows, processor, seed=seed, transform=noise)
        dataset.set_epoch(epoch)
        return dataset[index].pixel_values_videos

    assert torch.equal(drawn(0, 0, 0), drawn(0, 0, 0))
    assert not torch.equal(drawn(0, 0, 0), drawn(1, 0, 0))
    assert not torch.equal(drawn(0, 0, 0), drawn(0, 1, 0))
    wrong = ElvaDataset(rows, processor, transform=lambda frames, _: frames[:, :, 1:], bad_samples_path="never.jsonl")
    with pytest.raises(ConfigurationError, match="keep the shape"):
        wrong[0]


# Streams.


class Stream:
    """Rows one after another, which knows where it is and goes on after a row that cannot be read."""

    def __init__(self, rows):
        self.rows, self.place, self.epoch = rows, 0, None

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        self.step, self.first = (1, 0) if info is None else (info.num_workers, info.id)
        return self

    def __next__(self):
        number = self.first + self.step * self.place
        if number >= len(self.rows):
            self.place = 0
            raise StopIteration
        self.place += 1
        return self.rows[number]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_a_stream_leaves_out_what_is_bad_and_writes_it_down(processor, rows, tmp_path):
    rows[1] = make_row(tmp_path / "gone.mp4", "row 1")
    log = tmp_path / "bad.jsonl"
    broken = Stream(Rows(rows, {3: ElvaError("odd")}))
    stream = ElvaStream(broken, processor, bad_samples_path=log, max_bad_fraction=0.5)
    stream.set_epoch(2)
    assert [sample.sample_id for sample in stream] == ["row 0", "row 2", "row 4", "row 5"]
    assert broken.epoch == 2
    first, second = read_log(log)
    assert (first["id"], first["reason"], first["epoch"]) == ("row 1", "not_found", 2)
    assert (second["id"], second["error"]) == (None, "odd")
    assert stream.bad_samples.counts == (6, 2)
    with pytest.raises(ElvaError, match="odd"):
        list(ElvaStream(Stream(Rows(rows[:1] + rows[2:], {2: ElvaError("odd")})), processor))


def test_a_stream_that_ends_with_an_error_does_not_end_without_a_word(processor, rows, tmp_path):
    def generator():
        yield rows[0]
        raise ElvaError("odd")

    stream = ElvaStream(generator(), processor, bad_samples_path=tmp_path / "bad.jsonl", max_bad_fraction=1.0)
    with pytest.raises(ElvaError, match="odd"):
        list(stream)


def test_a_stream_of_bad_samples_stops(processor, tmp_path):
    rows = [make_row(tmp_path / f"{i}.mp4", str(i)) for i in range(200)]
    options = {"bad_samples_path": tmp_path / "bad.jsonl"}
    with pytest.raises(TooManyBadSamples, match="one after another"):
        list(ElvaStream(rows, processor, max_bad_fraction=1.0, **options))
    assert len(read_log(tmp_path / "bad.jsonl")) == MAX_TRIES


def test_bad_samples_far_apart_do_not_stop_a_stream(processor, rows, tmp_path):
    count = 2 * (MAX_TRIES + 1)
    broken = Stream(Rows(rows[:1] * count, {i: ElvaError("odd") for i in range(1, count, 2)}))
    stream = ElvaStream(broken, processor, bad_samples_path=tmp_path / "bad.jsonl", max_bad_fraction=0.5)
    assert len(list(stream)) == MAX_TRIES + 1
    assert stream.bad_samples.counts == (count, MAX_TRIES + 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_resumed_where_it_was(processor, rows, num_workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        stream = ElvaStream(Stream(rows), processor)
        return stateful.StatefulDataLoader(
            stream, 1, collate_fn=ElvaCollator(processor), num_workers=num_workers, snapshot_every_n_steps=1
        )

    whole = [made["input_ids"].tolist() for made in loader()]
    assert len(whole) == 6
    begun = loader()
    seen = [made["input_ids"].tolist() for _, made in zip(range(3), begun, strict=False)]
    state = begun.state_dict()
    resumed = loader()
    resumed.load_state_dict(json.loads(json.dumps(state, default=str)) if num_workers == 0 else state)
    rest = [made["input_ids"].tolist() for made in resumed]
    assert seen + rest == whole
