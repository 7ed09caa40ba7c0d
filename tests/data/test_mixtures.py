"""Mixtures: what an epoch holds, in which order, and how a stream is shared and resumed."""

import json
import pickle
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from torch.utils.data import DataLoader

from elva_hf.data.mixtures import DataSource, Mixture, StreamingMixture
from elva_hf.data.rows import RowError, check_row, media_blocks
from elva_hf.data.shuffling import Permutation, RandomStream, pick_spread
from elva_hf.data.sources import check_filled, epoch_counts
from elva_hf.errors_elva import ConfigurationError, ElvaError


def chat(number):
    return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"Answer {number}."}]}


def write(path, count):
    path.write_text("".join(json.dumps(chat(number)) + "\n" for number in range(count)))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {name: write(folder / f"{name}.jsonl", count) for name, count in (("a", 40), ("b", 15), ("c", 3))}


def sources(files, **fields):
    """A source for each file; `a={"repeat": 2}` gives one fields of its own."""
    return [DataSource(name, path, **fields.get(name, {})) for name, path in files.items()]


def ids(rows):
    return [row["id"] for row in rows]


def epoch(mixture, number=0):
    mixture.set_epoch(number)
    return ids(mixture[i] for i in range(len(mixture)))


def joined(parts):
    return list(chain.from_iterable(parts))


def per_source(names):
    return Counter(name.split("/")[0] for name in names)


# Orders


@pytest.mark.parametrize("size", [1, 2, 3, 7, 255, 256, 257, 1000, 4099])
def test_a_permutation_holds_every_number_once_and_depends_on_its_key(size):
    order = [Permutation(size, "seed", 1)[i] for i in range(size)]
    assert sorted(order) == list(range(size))
    assert order == [Permutation(size, "seed", 1)[i] for i in range(size)]
    if size > 5:
        assert order != [Permutation(size, "seed", 2)[i] for i in range(size)]
        assert order != list(range(size))
    with pytest.raises(IndexError):
        Permutation(size)[size]


def test_orders_are_the_same_on_every_machine():
    assert [Permutation(10, 0, "a")[i] for i in range(10)] == [4, 5, 2, 7, 1, 0, 9, 6, 3, 8]
    assert [Permutation(10**6, 0, "a")[i] for i in range(4)] == [718901, 416458, 499152, 996171]
    assert RandomStream("a", 1).below(10**6) == 925843


def test_every_number_is_as_likely_at_every_place():
    size, keys = 300, 3000
    drawn = np.array([[Permutation(size, key)[i] for i in (0, 1, 299)] for key in range(keys)])
    expected = keys / 10
    for column in drawn.T:
        counts = np.bincount(column // 30, minlength=10)
        assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.06
    order = np.array([Permutation(4000, "k")[i] for i in range(4000)])
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06 and abs(np.corrcoef(order, range(4000))[0, 1]) < 0.06


def test_a_large_order_costs_no_memory():
    order = Permutation(7_000_000, 3)
    assert len(pickle.dumps(order)) < 1000
    assert len({order[i] for i in range(5000)}) == 5000


def test_numbers_that_are_spread_are_distinct_in_order_and_random():
    for count, size in ((1, 1), (3, 3), (7, 20), (99, 100), (50, 1000)):
        picked = [pick_spread(i, count, size, "k") for i in range(count)]
        assert sorted(set(picked)) == picked and picked[0] >= 0 and picked[-1] < size
    assert {pick_spread(0, 1, 10, key) for key in range(200)} == set(range(10))


# What an epoch holds


def test_an_epoch_holds_every_row_as_often_as_it_is_repeated(files):
    mixture = Mixture(sources(files, b={"repeat": 2.0}, c={"repeat": 3}))
    names = epoch(mixture)
    assert len(mixture) == 40 + 30 + 9
    counts = Counter(names)
    assert {counts[f"a/{i}"] for i in range(40)} == {1} and {counts[f"b/{i}"] for i in range(15)} == {2}
    assert {counts[f"c/{i}"] for i in range(3)} == {3} and len(counts) == 58


def test_weights_share_out_as_many_rows_as_there_are(files):
    mixture = Mixture(sources(files, a={"weight": 1}, b={"weight": 2.0}, c={"weight": 1}))
    names = epoch(mixture)
    assert len(names) == 58 and per_source(names) == {"a": 15, "b": 29, "c": 14}
    assert max(Counter(names).values()) == 5  # 14 rows of 3
    assert set(Counter(name for name in names if name[0] == "b").values()) == {1, 2}


def test_a_source_that_is_not_seen_whole_goes_on_in_the_next_epoch(files):
    mixture = Mixture(sources(files, a={"repeat": 0.25}))
    seen = [[name for name in epoch(mixture, number) if name[0] == "a"] for number in range(8)]
    assert [len(names) for names in seen] == 8 * [10]
    for passes in (seen[:4], seen[4:]):
        assert Counter(joined(passes)) == Counter(f"a/{i}" for i in range(40))
    assert sorted(seen[0]) != sorted(seen[4])


def test_a_part_of_a_source_is_always_the_same_part(files):
    parts = []
    for number in range(3):
        names = epoch(Mixture(sources(files, a={"max_samples": 12})), number)
        parts.append(sorted(name for name in names if name[0] == "a"))
    assert parts[0] == parts[1] == parts[2] and len(set(parts[0])) == 12
    other_seed = epoch(Mixture(sources(files, a={"max_samples": 12}), 1))
    assert parts[0] == sorted(name for name in other_seed if name[0] == "a")
    assert len(Mixture(sources(files, a={"max_samples": 1000}))) == 58


def test_the_order_depends_on_seed_and_epoch_alone(files):
    first, again, other = (Mixture(sources(files), seed) for seed in (0, 0, 1))
    names = epoch(first)
    assert names == epoch(again) and names != epoch(other) and names != epoch(first, 1)
    assert sorted(names) == sorted(epoch(first, 1)) == sorted(epoch(other))
    first.set_epoch(0)
    assert [first[i]["id"] for i in (5, 57, -1, 5)] == [names[i] for i in (5, 57, -1, 5)]
    with pytest.raises(IndexError):
        first[58]
    assert len(set(per_source(names[:20]))) > 1


def test_without_shuffling_a_place_holds_the_same_row_in_every_epoch(files):
    mixture = Mixture(sources(files, a={"repeat": 0.5}, b={"repeat": 2}), shuffle=False)
    names = epoch(mixture)
    assert names == epoch(mixture, 3) and [name[0] for name in names] == 20 * ["a"] + 30 * ["b"] + 3 * ["c"]
    assert set(Counter(names[20:50]).values()) == {2}


def test_fingerprints_tell_mixtures_apart(files):
    prints = {
        Mixture(sources(files, **options), seed, shuffle=shuffle).fingerprint
        for options, seed, shuffle in (({}, 0, True), ({}, 1, True), ({}, 0, False), ({"a": {"repeat": 2}}, 0, True))
    }
    assert len(prints) == 4
    assert Mixture(sources(files)).fingerprint == Mixture(sources(files)).fingerprint


def test_workers_that_persist_see_the_epoch_change(files):
    mixture = Mixture(sources(files))
    loader = DataLoader(mixture, batch_size=None, num_workers=1, persistent_workers=True)
    first = ids(loader)
    mixture.set_epoch(1)
    assert first == epoch(mixture, 0)
    mixture.set_epoch(1)
    second = ids(loader)
    assert second != first and second == epoch(mixture, 1)


def test_rows_of_a_mixture_are_named_and_good(files):
    mixture = Mixture({source.name: source for source in sources(files)})
    row = mixture[0]
    assert check_row(row) == row
    name, number = row["id"].split("/")
    assert name in files and row["messages"][1]["content"] == f"Answer {number}."


def test_data_in_memory_stand_for_a_path(files):
    mixture = Mixture([DataSource("list")], data={"list": [chat(0), chat(1)]})
    assert sorted(epoch(mixture)) == ["list/0", "list/1"]


def test_the_toy_world_is_a_source():
    options = {"num_videos": 4, "num_frames": 2, "questions_per_video": 2}
    source = DataSource("toy", format="toy_world", split="validation", options=options, video={"num_frames": 2})
    row = Mixture([source])[0]
    assert check_row(row)["independent_turns"] is True and len(row["messages"]) == 4
    (block,) = media_blocks(row)
    assert block["video"].shape == (2, 64, 64, 3) and block["num_frames"] == 2
    again = Mixture([source])[0]
    assert again["id"] == row["id"] and np.array_equal(media_blocks(again)[0]["video"], block["video"])
    apart = Mixture([DataSource("toy", format="toy_world", options=options, independent_turns=False)])[0]
    assert "independent_turns" not in apart


# What is refused


def test_sources_without_a_path_are_all_listed():
    with pytest.raises(ConfigurationError) as caught:
        Mixture([DataSource("webvid"), DataSource("toy", format="toy_world"), DataSource("valor")])
    message = str(caught.value)
    assert "without a path: webvid, valor." in message
    assert message.endswith("data.sources.webvid.path=... data.sources.valor.path=...")
    with pytest.raises(ConfigurationError, match="two data sources are named 'a'"):
        check_filled([DataSource("a", "x"), DataSource("a", "y")])
    with pytest.raises(ConfigurationError, match="at least one data source"):
        Mixture([])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": ""}, "has the name ''; give text"),
        ({"format": "lava"}, "a: format is 'lava'; known are messages, llava, .*, toy_world"),
        ({"num_samples": 0}, "num_samples is 0; give a whole number, 1 or more"),
        ({"max_samples": 2.5}, "max_samples is 2.5"),
        ({"weight": -1.0}, "weight is -1.0; give a number, 0 or more"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"repeat": 0}, "repeat is 0; leave the source out"),
        ({"repeat": None}, "repeat is None"),
        ({"weight": 1.0, "repeat": 2}, "weight and repeat exclude each other"),
        ({"options": {"datset": "x"}}, "options has 'datset'; known are dataset"),
        ({"format": "toy_world", "options": {"videos": 3}}, "options has 'videos'; known are num_videos"),
        ({"video": {"num_frames": 0}}, "a: 0 frames asked for"),
        ({"video": {"frames": 8}}, "a: a video has the unknown key 'frames'"),
    ],
)
def test_fields_that_no_source_can_have_are_refused(fields, words):
    with pytest.raises(ConfigurationError, match=words):
        DataSource(**{"name": "a", **fields})


def test_weights_are_for_all_sources_or_for_none():
    with pytest.raises(ConfigurationError, match="b has no weight, others have"):
        epoch_counts([DataSource("a", weight=1.0), DataSource("b")], [5, 5])
    with pytest.raises(ConfigurationError, match="all weights are 0"):
        epoch_counts([DataSource("a", weight=0.0)], [5])
    assert epoch_counts([DataSource("a", weight=0.0), DataSource("b", weight=3.0)], [5, 5]) == [0, 10]


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"data source webvid: .*none\.json does not exist"):
        Mixture([DataSource("webvid", str(tmp_path / "none.json"))])


def test_a_bad_row_is_an_error_of_its_place_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(chat(0)), '{"id": "x", "messages": []}', json.dumps(chat(2))]))
    mixture = Mixture([DataSource("a", str(path))], shuffle=False)
    rows = []
    for i in range(3):
        try:
            rows.append(mixture[i]["id"])
        except RowError as error:
            rows.append((error.file, error.line, error.row_id))
    assert sorted(rows, key=str) == [("a.jsonl", 2, "x"), "a/0", "a/2"]


# Streams


def test_a_stream_has_the_rows_of_the_mixture_interleaved(files):
    options = {"a": {"max_samples": 12}, "b": {"repeat": 2}}
    stream, mixture = StreamingMixture(sources(files, **options), shuffle_buffer=7), Mixture(sources(files, **options))
    names = ids(stream)
    assert Counter(names) == Counter(epoch(mixture)) and stream.num_rows == len(names) == 45
    assert names != ids(StreamingMixture(sources(files, **options), seed=1, shuffle_buffer=7))
    assert names == ids(stream) == ids(StreamingMixture(sources(files, **options), shuffle_buffer=7))
    assert len(per_source(names[:15])) >= 2 and len(per_source(names[-15:])) >= 2
    stream.set_epoch(1)
    assert sorted(ids(stream)) == sorted(names) and ids(stream) != names


def test_a_buffer_of_one_keeps_the_order_of_the_files(files):
    names = ids(StreamingMixture(sources(files), shuffle_buffer=1))
    for name, count in (("a", 40), ("b", 15), ("c", 3)):
        assert [x for x in names if x[0] == name] == [f"{name}/{i}" for i in range(count)]


def test_what_is_not_seen_whole_goes_on_in_the_next_epoch_of_a_stream(files):
    stream = StreamingMixture(sources(files, a={"repeat": 0.25}), shuffle_buffer=5)
    seen = []
    for number in range(4):
        stream.set_epoch(number)
        seen += [name for name in ids(stream) if name[0] == "a"]
    assert Counter(seen) == Counter(f"a/{i}" for i in range(40))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_ranks_share_a_stream_without_overlap_or_loss(files, world_size):
    parts = [ids(StreamingMixture(sources(files), rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert Counter(joined(parts)) == Counter(epoch(Mixture(sources(files))))
    even = [
        ids(StreamingMixture(sources(files), rank=rank, world_size=world_size, even=True)) for rank in range(world_size)
    ]
    assert {len(part) for part in even} == {sum(count // world_size for count in (40, 15, 3))}
    assert max(Counter(joined(even)).values(), default=1) == 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_share_a_stream_without_overlap_or_loss(files, num_workers):
    parts = []
    for rank in range(2):
        stream = StreamingMixture(sources(files), rank=rank, world_size=2)
        parts += ids(DataLoader(stream, batch_size=None, num_workers=num_workers))
    assert Counter(parts) == Counter(epoch(Mixture(sources(files))))


@pytest.mark.parametrize("stop", [0, 1, 6, 29, 57, 58])
def test_a_stream_that_stops_anywhere_goes_on_with_the_rest(files, stop):
    whole = ids(StreamingMixture(sources(files), 3, shuffle_buffer=9))
    stream = StreamingMixture(sources(files), 3, shuffle_buffer=9)
    reading = iter(stream)
    done = [next(reading)["id"] for _ in range(stop)]
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = StreamingMixture(sources(files), 3, shuffle_buffer=9)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.set_epoch(0)
    assert done + ids(resumed) == whole
    assert ids(resumed) == whole  # and the next time from the start
    assert done + ids(reading) == whole  # the first one is none the worse for it


def test_a_state_of_a_later_epoch_is_resumed_in_it(files):
    stream = StreamingMixture(sources(files, a={"repeat": 0.3}), shuffle_buffer=9)
    stream.set_epoch(2)
    whole = ids(stream)
    reading = iter(stream)
    for _ in range(10):
        next(reading)
    resumed = StreamingMixture(sources(files, a={"repeat": 0.3}), shuffle_buffer=9)
    resumed.load_state_dict(stream.state_dict())
    assert ids(resumed) == whole[10:]
    resumed.load_state_dict(stream.state_dict())
    resumed.set_epoch(2)  # as trainers do before every epoch
    assert ids(resumed) == whole[10:]
    resumed.load_state_dict(stream.state_dict())
    resumed.set_epoch(0)
    assert ids(resumed) == ids(StreamingMixture(sources(files, a={"repeat": 0.3}), shuffle_buffer=9))


def test_a_state_of_another_stream_is_refused(files):
    stream = StreamingMixture(sources(files))
    next(iter(stream))
    state = stream.state_dict()
    others = {
        "seed": StreamingMixture(sources(files), 1),
        "num_shards": StreamingMixture(sources(files), rank=0, world_size=2),
        "shuffle_buffer": StreamingMixture(sources(files), shuffle_buffer=5),
        "counts": StreamingMixture(sources(files, a={"repeat": 2})),
    }
    for name, other in others.items():
        other.load_state_dict(state)
        with pytest.raises(ConfigurationError, match=f"the state to resume is of a stream with {name}=.*; resume with"):
            next(iter(other))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_resumes_a_stream_exactly(files, num_workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader():
        stream = StreamingMixture(sources(files), 5, shuffle_buffer=6)
        return stateful.StatefulDataLoader(stream, batch_size=4, num_workers=num_workers, collate_fn=ids)

    whole = list(loader())
    assert Counter(joined(whole)) == Counter(epoch(Mixture(sources(files))))
    for stop in (1, 3, 8):
        first = loader()
        reading = iter(first)
        done = [next(reading) for _ in range(stop)]
        state = pickle.loads(pickle.dumps(first.state_dict()))
        del reading
        second = loader()
        second.load_state_dict(state)
        assert done + list(second) == whole


def test_a_bad_row_does_not_end_a_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(chat(0)), '{"id": "x", "messages": []}', json.dumps(chat(2))]))
    reading, rows = iter(StreamingMixture([DataSource("a", str(path))])), []
    while True:
        try:
            rows.append(next(reading)["id"])
        except RowError as error:
            rows.append(error.line)
        except StopIteration:
            break
    assert sorted(rows, key=str) == [2, "a/0", "a/2"]


def test_options_that_no_stream_can_have_are_refused(files):
    with pytest.raises(ConfigurationError, match="shuffle_buffer is 0; give 1 or more"):
        StreamingMixture(sources(files), shuffle_buffer=0)
    with pytest.raises(ConfigurationError, match="rank is 0 and world_size is None; give both or none"):
        StreamingMixture(sources(files), rank=0)
    with pytest.raises(ConfigurationError, match="rank is 2 of 2; it counts from 0"):
        StreamingMixture(sources(files), rank=2, world_size=2)


class TestTables:
    """Streams of the package datasets, which may be missing."""

    @pytest.fixture(autouse=True)
    def _quiet(self, tmp_path, monkeypatch):
        self.datasets = pytest.importorskip("datasets")
        self.datasets.disable_progress_bars()
        monkeypatch.setattr(self.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def stream(self, files, tmp_path, rank=0, world_size=1, num_samples=20):
        table = self.datasets.Dataset.from_list([chat(number) for number in range(20)])
        if not (tmp_path / "p.parquet").exists():
            table.to_parquet(tmp_path / "p.parquet")
        iterable = table.to_iterable_dataset(num_shards=3)
        given = [DataSource("a", files["a"]), DataSource("p", str(tmp_path / "p.parquet"), repeat=0.5)]
        given.append(DataSource("i", num_samples=num_samples))
        return StreamingMixture(given, shuffle_buffer=6, rank=rank, world_size=world_size, data={"i": iterable})

    def test_they_are_shared_like_files(self, files, tmp_path):
        wanted = Counter(
            [*(f"a/{i}" for i in range(40)), *(f"i/{i}" for i in range(20)), *(f"p/{i}" for i in range(10))]
        )
        assert Counter(ids(self.stream(files, tmp_path))) == wanted
        parts = [ids(self.stream(files, tmp_path, rank, 3)) for rank in range(3)]
        assert Counter(joined(parts)) == wanted
        loader = DataLoader(self.stream(files, tmp_path), batch_size=None, num_workers=2)
        assert Counter(ids(loader)) == wanted

    @pytest.mark.parametrize("stop", [0, 5, 33, 69])
    def test_they_resume_exactly(self, files, tmp_path, stop):
        stream = self.stream(files, tmp_path)
        stream.set_epoch(1)
        whole = ids(stream)
        assert {f"p/{i}" for i in range(10, 20)} <= set(whole)
        reading = iter(stream)
        done = [next(reading)["id"] for _ in range(stop)]
        resumed = self.stream(files, tmp_path)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert done + ids(resumed) == whole

    def test_a_stream_of_unknown_length_must_say_it(self, files, tmp_path):
        with pytest.raises(ConfigurationError, match="i is a stream of unknown length; set num_samples"):
            self.stream(files, tmp_path, num_samples=None)
        with pytest.raises(
            ElvaError, match="data source i ended after 20 rows, and was to have 21; correct its num_sa"
        ):
            ids(self.stream(files, tmp_path, num_samples=21))
        with pytest.raises(ConfigurationError, match="an IterableDataset has no indices; use a StreamingMixture"):
            Mixture([DataSource("i", num_samples=20)], data={"i": self.datasets.IterableDataset.from_generator(list)})
