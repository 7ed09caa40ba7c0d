import json
import multiprocessing
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from elva_hf.errors_elva import CheckpointError, ConfigurationError
from elva_hf.training.teacher import TeacherSpec
from elva_hf.training.teacher_cache import TeacherCache, TeacherCacheWriter, content_key, explain_missing
from elva_hf.video_processing_elva import normalize

SPEC = TeacherSpec(
    path="siglip",
    revision=None,
    fingerprint="0123456789abcdef",
    layer=-2,
    kind="image",
    image_size=(28, 28),
    grid=(4, 4),
    width=8,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
PATCH_SIZE = 4
GRIDS = ((2, 3), (1, 1), (2, 3))


def make_video(number, grids=GRIDS):
    """Patches, tubes and frames of a made-up video."""
    generator = torch.Generator().manual_seed(number)
    patches = torch.randint(0, 256, (sum(r * c for r, c in grids), 3 * PATCH_SIZE**2), generator=generator)
    tubes = torch.randn(len(set(grids)), 4, 4, 8, generator=generator)
    return patches.to(torch.uint8), tubes, torch.randn(len(grids), 8, generator=generator)


def key_of(number, grids=GRIDS):
    return content_key(make_video(number, grids)[0], grids)


def write(folder, numbers, *, grids=GRIDS, teacher=SPEC, patch_size=PATCH_SIZE, **options):
    with TeacherCacheWriter(folder, teacher, patch_size, **options) as writer:
        for number in numbers:
            _, tubes, frames = make_video(number, grids)
            writer.add(key_of(number, grids), tubes, frames, grids, f"row-{number}")
    return writer


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def assert_holds(folder, numbers):
    cache = TeacherCache(folder)
    assert len(cache) == len(numbers)
    for number in numbers:
        _, tubes, frames = make_video(number)
        found = cache.get(key_of(number))
        assert torch.equal(found[0], tubes.half()) and torch.equal(found[1], frames.half())


# writing and reading


def test_what_was_written_is_read_from_any_shard(tmp_path):
    write(tmp_path, range(20), shard_bytes=2000)
    assert len(shards(tmp_path)) > 3
    assert_holds(tmp_path, range(20))


def test_bfloat16_is_kept_as_it_is(tmp_path):
    write(tmp_path, [1], dtype="bfloat16")
    tubes, frames = TeacherCache(tmp_path).get(key_of(1))
    assert tubes.dtype == frames.dtype == torch.bfloat16
    assert torch.equal(tubes, make_video(1)[1].bfloat16())


def test_the_manifest_names_teacher_patch_size_and_format(tmp_path):
    write(tmp_path, [1])
    values = json.loads((tmp_path / "teacher.json").read_text())
    assert (values["format"], values["patch_size"], values["dtype"]) == (1, PATCH_SIZE, "float16")
    assert values["teacher"]["fingerprint"] == SPEC.fingerprint and values["teacher"]["layer"] == -2
    cache = TeacherCache(tmp_path)
    assert cache.spec == SPEC and cache.patch_size == PATCH_SIZE


def test_a_value_beyond_float16_is_refused_and_bfloat16_proposed(tmp_path):
    with TeacherCacheWriter(tmp_path, SPEC, PATCH_SIZE) as writer:
        with pytest.raises(ConfigurationError, match=r"row 7 are not finite in float16; .*--dtype bfloat16"):
            writer.add(key_of(1), torch.full((1, 4, 4, 8), 1e5), torch.ones(3, 8), GRIDS, "row 7")
        assert key_of(1) not in writer
    with pytest.raises(ConfigurationError, match="dtype 'float32'"):
        TeacherCacheWriter(tmp_path, SPEC, PATCH_SIZE, dtype="float32")


# keys


def test_normalised_and_raw_pixels_have_the_same_key(tmp_path):
    write(tmp_path, [1])
    patches, _, _ = make_video(1)
    cache = TeacherCache(tmp_path)
    assert cache.key(patches, GRIDS) == cache.key(normalize(patches, [0.5] * 3, [0.5] * 3), GRIDS) == key_of(1)
    mean, std = [0.48, 0.45, 0.40], [0.26, 0.27, 0.28]
    other = TeacherCache(tmp_path, image_mean=mean, image_std=std)
    assert other.key(normalize(patches, mean, std), GRIDS) == key_of(1)
    with pytest.raises(ConfigurationError, match="8-bit level off"):
        cache.key(normalize(patches, mean, std), GRIDS)


def test_one_level_of_one_pixel_or_another_grid_is_another_key():
    patches, _, _ = make_video(1)
    changed = patches.clone()
    changed[3, 5] ^= 1
    keys = {
        content_key(patches, GRIDS),
        content_key(changed, GRIDS),
        content_key(patches, ((3, 2), (1, 1), (2, 3))),
        content_key(patches, ((1, 1), (2, 3), (2, 3))),
        content_key(patches, [*GRIDS[:2], (1, 3), (1, 3)]),
    }
    assert len(keys) == 5
    assert content_key(patches, [list(grid) for grid in GRIDS]) in keys  # any kind of pair
    assert content_key(patches, [torch.tensor(grid) for grid in GRIDS]) in keys


def test_patches_of_another_size_or_number_are_refused(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(ConfigurationError, match=r"has 12 values, and .* is for patch size 4, which has 48"):
        TeacherCache(tmp_path).key(torch.zeros(13, 12, dtype=torch.uint8), GRIDS)
    with pytest.raises(ConfigurationError, match="13 patches do not fill the grids 1 frames of 3x3"):
        content_key(make_video(1)[0], [(3, 3)])


# resuming, several writers


def test_a_writer_skips_what_is_there(tmp_path):
    write(tmp_path, range(5))
    writer = write(tmp_path, range(8))
    assert writer.num_added == 3 and len(writer) == 8
    assert_holds(tmp_path, range(8))
    assert write(tmp_path, range(8)).num_bytes == 0 and len(shards(tmp_path)) == 2


def test_a_failure_keeps_what_was_done_before_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), TeacherCacheWriter(tmp_path, SPEC, PATCH_SIZE) as writer:
        _, tubes, frames = make_video(1)
        writer.add(key_of(1), tubes, frames, GRIDS)
        raise KeyboardInterrupt
    assert_holds(tmp_path, [1])


def test_half_written_shards_are_no_part_of_the_cache(tmp_path):
    write(tmp_path, [1])
    whole = shards(tmp_path)[0].read_bytes()
    (tmp_path / ".shard-00000-dead.safetensors.unfinished").write_bytes(whole[: len(whole) // 2])
    (tmp_path / ".teacher.json.dead").write_text("{")
    assert_holds(tmp_path, [1])
    write(tmp_path, [2])
    assert_holds(tmp_path, [1, 2])


def test_a_shard_is_not_seen_while_it_is_written(tmp_path, monkeypatch):
    write(tmp_path, [1])
    seen = []

    def look(tensors, path, metadata):
        path.write_bytes(b"half")
        seen.append(len(TeacherCache(path.parent)))
        save_file(tensors, path, metadata)

    monkeypatch.setattr("elva_hf.training.teacher_shards.save_file", look)
    write(tmp_path, [2])
    assert seen == [1]
    assert_holds(tmp_path, [1, 2])


def test_a_full_disk_leaves_whole_shards_only(tmp_path, monkeypatch):
    write(tmp_path, [1])

    def fill(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elva_hf.training.teacher_shards.save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, [2])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert_holds(tmp_path, [1])


def write_in_process(folder, numbers, rank, barrier):
    barrier.wait()
    write(folder, numbers, rank=rank, shard_bytes=1500)


def test_two_processes_write_one_folder_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    parts = range(28), range(16, 40)  # both write some videos
    workers = [
        context.Process(target=write_in_process, args=(tmp_path, part, rank, barrier))
        for rank, part in enumerate(parts)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert_holds(tmp_path, range(40))
    assert {path.name[:11] for path in shards(tmp_path)} == {"shard-00000", "shard-00001"}


# what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": replace(SPEC, layer=-3)}, "layer -2 against -3"),
        ({"teacher": replace(SPEC, path="clip", fingerprint="feed")}, "teacher siglip, .* asked for is teacher clip, "),
        ({"teacher": replace(SPEC, resample="bilinear")}, "resample bicubic against bilinear"),
        ({"patch_size": 28}, "patch_size 4 against 28"),
        ({"dtype": "bfloat16"}, "dtype float16 against bfloat16"),
    ],
)
def test_a_folder_of_another_teacher_is_refused_and_both_are_named(tmp_path, changed, message):
    write(tmp_path, [1])
    with pytest.raises(ConfigurationError, match=message):
        write(tmp_path, [2], **changed)
    assert_holds(tmp_path, [1])


def test_a_cache_checks_a_teacher_and_a_student(tmp_path):
    write(tmp_path, [1])
    cache = TeacherCache(tmp_path)
    cache.check(SPEC, PATCH_SIZE)
    cache.check(replace(SPEC, path="/elsewhere/siglip", revision="main"), PATCH_SIZE)  # the same weights
    cache.check(None, PATCH_SIZE)
    with pytest.raises(ConfigurationError, match=r"layer -2, .*layer -5, .*layer -2 against -5"):
        cache.check(replace(SPEC, layer=-5), PATCH_SIZE)
    with pytest.raises(ConfigurationError, match="patch_size 4 against 28"):
        cache.check(None, 28)


def test_the_same_weights_in_another_place_write_to_the_same_folder(tmp_path):
    write(tmp_path, [1])
    write(tmp_path, [2], teacher=replace(SPEC, path="/elsewhere/siglip", revision="main"))
    assert_holds(tmp_path, [1, 2])


def test_a_shard_of_another_teacher_put_into_the_folder_is_refused(tmp_path):
    write(tmp_path / "one", [1])
    write(tmp_path / "other", [2], teacher=replace(SPEC, fingerprint="feed"))
    stray = shards(tmp_path / "other")[0]
    stray.rename(tmp_path / "one" / stray.name)
    with pytest.raises(ConfigurationError, match="was not written by teacher siglip"):
        TeacherCache(tmp_path / "one")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 1, "teacher": {"unknown": 1}}'])
def test_a_damaged_manifest_is_a_clear_error(tmp_path, content):
    write(tmp_path, [1])
    (tmp_path / "teacher.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"teacher\.json cannot be read"):
        TeacherCache(tmp_path)


def test_a_folder_that_is_no_cache_and_a_later_format_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no teacher cache: it has no teacher\.json"):
        TeacherCache(tmp_path)
    write(tmp_path, [1])
    manifest = tmp_path / "teacher.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="is of format 2"):
        TeacherCache(tmp_path)


@pytest.mark.parametrize("where", [0.01, 0.5, 0.999])
def test_a_cut_shard_is_a_clear_error(tmp_path, where):
    write(tmp_path, range(4))
    shard = shards(tmp_path)[0]
    shard.write_bytes(shard.read_bytes()[: int(where * shard.stat().st_size)])
    for open_folder in (TeacherCache, lambda folder: TeacherCacheWriter(folder, SPEC, PATCH_SIZE)):
        with pytest.raises(CheckpointError, match=f"{shard.name} is damaged .*; delete it and run elva teach again"):
            open_folder(tmp_path)
    shard.unlink()
    write(tmp_path, range(4))
    assert_holds(tmp_path, range(4))


def test_a_flipped_bit_is_found_when_the_video_is_read(tmp_path):
    write(tmp_path, [1])
    shard = shards(tmp_path)[0]
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    cache = TeacherCache(tmp_path)
    with pytest.raises(CheckpointError, match=r"is damaged .its checksum is wrong."):
        cache.get(key_of(1))


# a video that is not there


def test_a_missing_video_says_what_differs_and_how_to_add_it(tmp_path):
    write(tmp_path, [1], grids=((2, 2),) * 4)
    cache = TeacherCache(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"lacks a video of row 'row-9': it was not taught\. Add it with: elva teach"
    ):
        cache.get("0" * 32, grids=((2, 2),) * 4, sample_id="row-9")
    with pytest.raises(
        CheckpointError, match="the row was taught with 4 frames of 2x2 patches, and has 8 frames of 2x2"
    ):
        cache.get("0" * 32, grids=((2, 2),) * 8, sample_id="row-1")
    with pytest.raises(CheckpointError, match="other pixels"):
        cache.get("0" * 32, grids=((2, 2),) * 4, sample_id="row-1")
    with pytest.raises(CheckpointError, match="it has 8 frames, and those taught have 4"):
        cache.get("0" * 32, grids=((2, 2),) * 8)
    with pytest.raises(CheckpointError, match=r"none of its resolution was taught .4 frames of 3x3 patches"):
        cache.get("0" * 32, grids=((3, 3),) * 4)
    with pytest.raises(CheckpointError, match="lacks a video: it was not taught"):
        cache.get("0" * 32)


def test_an_empty_cache_says_so(tmp_path):
    write(tmp_path, [])
    assert len(TeacherCache(tmp_path)) == 0
    with pytest.raises(CheckpointError, match="the cache is empty"):
        TeacherCache(tmp_path).get("0" * 32, grids=GRIDS)
    assert explain_missing([], None, None) == "the cache is empty"


def test_keys_that_share_their_first_half_are_told_apart(tmp_path):
    near = key_of(1)[:16] + "0" * 16
    with TeacherCacheWriter(tmp_path, SPEC, PATCH_SIZE, shard_bytes=1) as writer:
        for number, key in ((1, key_of(1)), (2, near)):
            writer.add(key, *make_video(number)[1:], GRIDS)
    cache = TeacherCache(tmp_path)
    assert torch.equal(cache.get(near)[1], make_video(2)[2].half())
    assert torch.equal(cache.get(key_of(1))[1], make_video(1)[2].half())
    assert key_of(1)[:16] + "1" * 16 not in cache


# files and processes


def test_few_files_stay_open_and_none_is_read_whole(tmp_path):
    write(tmp_path, range(12), shard_bytes=1)
    cache = TeacherCache(tmp_path, max_open_files=3)
    for number in [*range(12), *range(12)]:
        cache.get(key_of(number))
        assert len(cache._open) <= 3
    kept = list(cache._open.values())
    cache.get(key_of(11))
    assert all(one is other for one, other in zip(kept, cache._open.values(), strict=True))  # not opened again


class Videos(Dataset):
    def __init__(self, cache, count):
        self.cache, self.count = cache, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return os.getpid(), self.cache.get(key_of(index))[1]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_it(tmp_path, start):
    write(tmp_path, range(8), shard_bytes=1)
    cache = TeacherCache(tmp_path)
    cache.get(key_of(0))  # a file is open before the workers are made
    loader = DataLoader(Videos(cache, 8), batch_size=None, num_workers=1, multiprocessing_context=start)
    read = list(loader)
    assert os.getpid() not in {process for process, _ in read}
    for number, (_, frames) in enumerate(read):
        assert torch.equal(frames, make_video(number)[2].half())
    assert torch.equal(cache.get(key_of(0))[1], make_video(0)[2].half())


def test_a_fork_opens_files_of_its_own(tmp_path, monkeypatch):
    write(tmp_path, [1])
    cache = TeacherCache(tmp_path)
    cache.get(key_of(1))
    (before,) = cache._open.values()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    cache.get(key_of(1))
    (after,) = cache._open.values()
    assert after is not before


def test_a_copy_by_pickle_holds_no_open_file(tmp_path):
    write(tmp_path, [1])
    cache = TeacherCache(tmp_path)
    cache.get(key_of(1))
    copy = pickle.loads(pickle.dumps(cache))
    assert not copy._open and cache._open
    assert torch.equal(copy.get(key_of(1))[0], cache.get(key_of(1))[0])
