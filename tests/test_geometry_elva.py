import random

import pytest
import tiny_elva
import torch
from tiny_elva import END, FRAME, LINE, PATCH, START, batch, video, words

from elva_hf import geometry_elva as geo
from elva_hf.errors_elva import PlaceholderError

KIND_IDS = {
    geo.VIDEO_START: START,
    geo.VIDEO_END: END,
    geo.PATCH: PATCH,
    geo.FRAME: FRAME,
    geo.LINE: LINE,
}
INDEX_FIELDS = ("patch_index", "frame_index", "line_index")
PATCH_FIELDS = ("patch_frame", "patch_line", "patch_row", "patch_column", "patch_video")
FRAME_FIELDS = ("frame_rows", "frame_columns")


def read(input_ids):
    return geo.read_geometry(geo.token_kinds(torch.as_tensor(input_ids), KIND_IDS))


def parse_frame(ids, position):
    """Lengths of the rows of the frame whose `<FRAME>` is at `position`, and where it ends; None if it is cut."""
    rows, length, position = [], 0, position + 1
    while position < len(ids) and ids[position] in (PATCH, LINE):
        if ids[position] == PATCH:
            length += 1
        else:
            rows.append(length)
            length = 0
        position += 1
    whole = rows and length == 0 and rows[0] > 0 and len(set(rows)) == 1
    return (rows, position) if whole else (None, position)


def walk(rows_of_ids):
    """The geometry, token by token, in plain Python; None if a sample is malformed."""
    found = {name: [] for name in INDEX_FIELDS + PATCH_FIELDS + FRAME_FIELDS}
    tubes = {}
    video_number, width = -1, len(rows_of_ids[0])
    for sample, ids in enumerate(rows_of_ids):
        depth, position = 0, 0
        while position < width:
            token = ids[position]
            depth += (token == START) - (token == END)
            video_number += token == START
            if token in (PATCH, LINE) or (token == FRAME and depth != 1):
                return None
            if token != FRAME:
                position += 1
                continue
            rows, end = parse_frame(ids, position)
            if rows is None:
                return None
            flat = sample * width + position
            found["frame_index"].append(flat)
            found["frame_rows"].append(len(rows))
            found["frame_columns"].append(rows[0])
            for row in range(len(rows)):
                for column in range(rows[0]):
                    flat += 1
                    found["patch_index"].append(flat)
                    found["patch_frame"].append(len(found["frame_index"]) - 1)
                    found["patch_line"].append(len(found["line_index"]))
                    found["patch_row"].append(row)
                    found["patch_column"].append(column)
                    found["patch_video"].append(video_number)
                    tubes[flat] = (video_number, len(rows), rows[0], row, column)
                flat += 1
                found["line_index"].append(flat)
            position = end
    return found, tubes


def random_sample(rng):
    """Videos of one or two resolutions and images, with words between frames, between videos and around."""
    ids = words(rng.randint(0, 3), rng.random().__hash__())
    for _ in range(rng.randint(0, 3)):
        grids = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in range(2)]
        frames = [rng.choice(grids) for _ in range(rng.randint(1, 4))]
        marks = [words(rng.randint(0, 2), i) for i in range(len(frames))]
        ids = ids + video(*frames, marks=marks) + words(rng.randint(0, 2))
    return ids or words(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(12))
def test_geometry_equals_a_walk_over_the_tokens(seed, side):
    rng = random.Random(seed)
    ids = batch([random_sample(rng) for _ in range(rng.randint(1, 4))] + [video((1, 2))], side)["input_ids"]
    found, tubes = walk(ids.tolist())
    geometry = read(ids)
    for name, expected in found.items():
        assert getattr(geometry, name).tolist() == expected, name

    same = geometry.tube_ids.flatten()
    expected = [tubes.get(i, ("alone", i)) for i in range(ids.numel())]
    groups = {}
    for i, key in enumerate(expected):
        groups.setdefault(key, []).append(int(same[i]))
    assert all(len(set(members)) == 1 for members in groups.values())
    assert len({members[0] for members in groups.values()}) == len(groups)
    assert (geometry.num_patches, geometry.num_frames, geometry.num_lines) == tuple(
        len(found[name]) for name in INDEX_FIELDS
    )


def test_a_place_is_one_tube_through_the_frames_of_its_grid():
    ids = video((2, 2), (1, 3), (2, 2), marks=[[], words(1)])
    tubes = read([ids]).tube_ids[0][torch.tensor(ids) == PATCH].tolist()
    high, low, later = tubes[:4], tubes[4:7], tubes[7:]
    assert high == later
    assert len({*high, *low}) == 7


def test_grids_of_equally_many_patches_do_not_share_tubes():
    ids = video((2, 3), (3, 2), (6, 1), (1, 6))
    tubes = read([ids]).tube_ids[0][torch.tensor(ids) == PATCH]
    assert len(tubes.unique()) == 24


def test_adjacent_images_are_not_one_video():
    def tubes(ids):
        return read([ids]).tube_ids[0][torch.tensor(ids) == PATCH]

    assert len(tubes(video((2, 2)) + video((2, 2))).unique()) == 8
    assert len(tubes(video((2, 2), (2, 2))).unique()) == 4


def test_videos_of_different_samples_do_not_share_tubes():
    tubes = read(batch([video((2, 2)), video((2, 2))])["input_ids"]).tube_ids
    assert len(tubes.unique()) == tubes.numel()


def test_every_other_token_has_a_tube_of_its_own():
    ids = batch([words(3) + video((1, 1), (1, 1)), words(2)])["input_ids"]
    tubes = read(ids).tube_ids[ids != PATCH]
    assert len(tubes.unique()) == tubes.numel()
    assert (tubes < 0).all()


def test_a_batch_without_visual_tokens_has_no_geometry():
    assert read(batch([words(5), words(2)])["input_ids"]) is None
    assert read([[START, END]]) is None


def test_padding_does_not_change_what_is_read():
    samples = list(tiny_elva.RAGGED)
    left, right = (read(batch(samples, side)["input_ids"]) for side in ("left", "right"))
    wide = read([ids + 20 * [tiny_elva.PAD] for ids in batch(samples)["input_ids"].tolist()])
    for name in PATCH_FIELDS + FRAME_FIELDS:
        assert getattr(left, name).tolist() == getattr(right, name).tolist() == getattr(wide, name).tolist()
    for a in (right, wide):
        assert a.tube_ids[a.tube_ids >= 0].tolist() == left.tube_ids[left.tube_ids >= 0].tolist()


def test_kinds_from_embeddings_equal_kinds_from_ids():
    ids = batch(list(tiny_elva.RAGGED))["input_ids"]
    table = torch.randn(tiny_elva.VOCAB, 8)
    rows = {kind: table[token] for kind, token in KIND_IDS.items()}
    assert torch.equal(geo.token_kinds_from_embeddings(table[ids], rows), geo.token_kinds(ids, KIND_IDS))


FRAME_2X2 = [FRAME, PATCH, PATCH, LINE, PATCH, PATCH, LINE]


@pytest.mark.parametrize(
    "ids, position",
    [
        ([9, PATCH], 1),
        ([9, 9, FRAME], 2),
        ([LINE, 9], 0),
        (FRAME_2X2, 0),
        ([START, END, *FRAME_2X2], 2),
        ([START, PATCH, *FRAME_2X2, END], 1),
        ([START, FRAME, END], 1),
        ([START, FRAME, LINE, END], 1),
        ([START, *FRAME_2X2[:-1], END], 1),
        ([START, *FRAME_2X2[:-2], END], 1),
        ([START, *FRAME_2X2, FRAME, PATCH, END], 8),
        ([START, FRAME, PATCH, PATCH, LINE, PATCH, LINE, END], 1),
        ([START, FRAME, PATCH, LINE, PATCH, PATCH, LINE, END], 1),
        ([START, *FRAME_2X2, LINE, END], 1),
        ([START, FRAME, PATCH, START, LINE, END], 1),
        ([START, START, *FRAME_2X2, END], 2),
        ([START, FRAME, PATCH, END, LINE], 1),
        ([START, FRAME, PATCH, 9, LINE, END], 1),
        ([START, FRAME, PATCH, LINE, 9, PATCH, LINE, END], 1),
    ],
)
def test_malformed_sequences_raise_where_they_break(ids, position):
    good = [START, *FRAME_2X2, END]
    rows = batch([good, ids], "right")["input_ids"]
    with pytest.raises(PlaceholderError, match=rf"sample 1, token {position}: "):
        read(rows)
    with pytest.raises(PlaceholderError, match=rf"sample 0, token {position}: "):
        read([ids])


@pytest.mark.parametrize("seed", range(150))
def test_a_random_edit_raises_exactly_when_the_walk_fails(seed):
    rng = random.Random(seed)
    ids = random_sample(rng) + video((2, 2), (1, 2))
    position = rng.randrange(len(ids))
    other = rng.choice([START, END, PATCH, FRAME, LINE, 9])
    edit = rng.choice(["delete", "insert", "replace"])
    ids[position : position + (edit != "insert")] = [] if edit == "delete" else [other]
    rows = batch([ids, video((1, 1))], rng.choice(["left", "right"]))["input_ids"]
    expected = walk(rows.tolist())
    if expected is None:
        with pytest.raises(PlaceholderError):
            read(rows)
    else:
        geometry = read(rows)
        assert geometry.frame_rows.tolist() == expected[0]["frame_rows"]
        assert geometry.patch_column.tolist() == expected[0]["patch_column"]


def test_one_host_copy_is_all_that_reading_needs():
    """Meta tensors cannot be read on the host: everything but `read_geometry`'s own copy must run on them."""
    flags = [torch.zeros(24, dtype=torch.bool, device="meta") for _ in range(4)]
    video_numbers = torch.zeros(24, dtype=torch.long, device="meta")
    assert geo.find_malformed(*flags, video_numbers).shape == (24,)
    built = geo._build_geometry(
        *flags[:3], video_numbers, [4, 1, 2], torch.ones(2, 12, dtype=torch.bool, device="meta")
    )
    assert built.tube_ids.shape == (2, 12)


HYBRID = [
    words(2, 1) + video((2, 2), (1, 1), (2, 2), (1, 1), (2, 2)) + words(3, 2),
    video((1, 2), (1, 2)) + words(1, 3) + video((1, 2)) + words(4, 4),
    words(5, 5),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("window", "max_run"), [(None, None), (2, None), (None, 2), (3, 2)])
def test_tubes_equal_a_walk_over_frames(side, window, max_run):
    """Two patches share a tube when grid, place and video agree and no border of a window or a run lies between."""
    inputs = batch(HYBRID, side)
    geometry = geo.read_geometry(geo.token_kinds(inputs["input_ids"], KIND_IDS), inputs["attention_mask"])
    tubes = geometry.tubes(window, max_run)
    keys, groups, seen = {}, {}, {}
    for patch, index in enumerate(geometry.patch_index.tolist()):
        frame, number = int(geometry.patch_frame[patch]), int(geometry.patch_video[patch])
        first = int(geometry.patch_frame[geometry.patch_video == number].min())
        part = (frame - first) // window if window else 0
        grid = (int(geometry.frame_rows[frame]), int(geometry.frame_columns[frame]))
        place = (number, part, grid, int(geometry.patch_row[patch]), int(geometry.patch_column[patch]))
        seen[place] = seen.get(place, 0) + 1
        keys[index] = (*place, (seen[place] - 1) // max_run if max_run else 0)
        groups[index] = (number, part)
    ids, group_ids = tubes.ids.flatten().tolist(), tubes.groups.flatten().tolist()
    for a in keys:
        assert [ids[a] == ids[b] for b in keys] == [keys[a] == keys[b] for b in keys]
        assert [group_ids[a] == group_ids[b] for b in keys] == [groups[a] == groups[b] for b in keys]
    others = [i for i in range(len(ids)) if i not in keys]
    assert all(ids[i] < 0 for i in others) and len({ids[i] for i in others}) == len(others)
    assert all(group_ids[i] == -1 for i in others)
    length = inputs["input_ids"].shape[1]
    for number in range(max(group_ids) + 1):
        members = [i for i in keys if group_ids[i] == number]
        assert tubes.patches[number] == len(members)
        assert tubes.floors[number] == len({ids[i] for i in members})
        assert {i // length for i in members} == {tubes.samples[number]}
    assert tubes.tail == min(length - 1 - i % length for i in keys)


def test_frames_are_counted_in_their_sample():
    inputs = batch(HYBRID, "left")
    geometry = geo.read_geometry(geo.token_kinds(inputs["input_ids"], KIND_IDS), inputs["attention_mask"])
    for ids, numbers in zip(inputs["input_ids"].tolist(), geometry.frame_numbers.tolist(), strict=True):
        frame, wanted = -1, []
        for token in ids:
            frame += token == FRAME
            wanted.append(frame if token in (PATCH, FRAME, LINE) else -1)
        assert numbers == wanted


def test_a_patch_hidden_by_the_mask_cannot_merge():
    inputs = batch(HYBRID[:1])
    inputs["attention_mask"][0, 4] = 0
    geometry = geo.read_geometry(geo.token_kinds(inputs["input_ids"], KIND_IDS), inputs["attention_mask"])
    with pytest.raises(PlaceholderError, match="sample 0, token 4: attention_mask hides a patch"):
        geometry.tubes()
