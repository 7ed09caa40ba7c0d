import math
import random
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from tiny_elva import END, FRAME, LINE, PATCH, START, batch, video, words

from elva_hf import geometry_elva as geo
from elva_hf import merging_elva as merging
from elva_hf.errors_elva import ElvaError

F64 = torch.float64
WIDTH = 6


@dataclass
class Place:
    """What is known of a token in plain Python: nothing for text, and for a patch where it stands."""

    sample: int
    video: int | None = None
    frame: int | None = None  # counted in its video
    tube: tuple | None = None
    segment: tuple | None = None  # of the tube, as cut by window and max_run
    group: tuple | None = None


@dataclass
class Row:
    """A packed row: places in plain Python, and the tensors that say the same."""

    places: list[Place]
    hidden: torch.Tensor
    tube_ids: torch.Tensor
    groups: torch.Tensor
    group_names: list[tuple]

    def __len__(self):
        return len(self.places)


def random_places(rng, samples=4):
    """Samples with text and up to three videos of one or two resolutions, tokens in the order of the sequence."""
    places, videos = [], 0
    for sample in range(rng.randint(1, samples)):
        places += [Place(sample)] * rng.randint(0, 3)
        for _ in range(rng.randint(0, 3)):
            grids = [(rng.randint(1, 2), rng.randint(1, 3)) for _ in range(rng.randint(1, 2))]
            for frame in range(rng.randint(1, 7)):
                places += [Place(sample)] * rng.randint(1, 2)  # a time mark, <FRAME>
                grid = rng.choice(grids)
                for row in range(grid[0]):
                    for column in range(grid[1]):
                        places.append(Place(sample, videos, frame, (videos, *grid, row, column)))
                    places.append(Place(sample))  # <LINE>
            videos += 1
    return places


def cut_in_a_loop(places, window, max_run):
    """Segments and groups, token by token."""
    members, cut = {}, []
    for place in places:
        if place.tube is None:
            cut.append(place)
            continue
        part = place.frame // window if window else 0
        before = members.get((place.tube, part), 0)
        members[place.tube, part] = before + 1
        block = before // max_run if max_run else 0
        cut.append(replace(place, segment=(place.tube, part, block), group=(place.video, part)))
    return cut


def drifting(places, rng, width=WIDTH, dtype=F64):
    """Hidden states in which a place drifts from frame to frame, now slowly and now fast; text is noise."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    last, rows = {}, []
    for place in places:
        row = torch.randn(width, generator=generator, dtype=F64)
        if place.tube in last and place.tube:
            stay = rng.choice([0.0, 0.5, 0.9, 0.98])
            row = stay * last[place.tube] + math.sqrt(1 - stay**2) * row
        last[place.tube] = row
        rows.append(row)
    return torch.stack(rows).to(dtype) if rows else torch.empty(0, width, dtype=dtype)


def build_row(places, hidden, window=None, max_run=None):
    """The tensors of a packed row, with tube ids that are neither dense nor sorted."""
    where = [i for i, place in enumerate(places) if place.tube]
    names = sorted({places[i].tube for i in where})
    code = dict(zip(names, torch.randperm(len(names)).mul(7).add(3).tolist(), strict=True))
    frames = torch.tensor([places[i].frame for i in where], dtype=torch.long)
    cut = merging.cut_tubes(
        torch.tensor([code[places[i].tube] for i in where], dtype=torch.long), frames, window, max_run
    )
    tube_ids = -1 - torch.arange(len(places))
    tube_ids[where] = cut
    places = cut_in_a_loop(places, window, max_run)
    group_names = sorted({place.group for place in places if place.group})
    groups = torch.tensor([group_names.index(place.group) if place.group else -1 for place in places])
    return Row(places, hidden, tube_ids, groups.long(), group_names)


def random_row(seed, window=None, max_run=None, dtype=F64):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    places = random_places(rng)
    return build_row(places, drifting(places, rng, dtype=dtype), window, max_run)


def host_counts(row):
    """What the host knows of each group: patches and distinct segments."""
    patches = [sum(place.group == name for place in row.places) for name in row.group_names]
    floors = [len({place.segment for place in row.places if place.group == name}) for name in row.group_names]
    return patches, floors


@dataclass
class State:
    """A packed row on its way through the steps."""

    hidden: torch.Tensor
    sizes: torch.Tensor
    tube_ids: torch.Tensor
    groups: torch.Tensor
    index: torch.Tensor  # of the token in the input
    stands: torch.Tensor  # for each token of the input, where its survivor is now


def start(row):
    everyone = torch.arange(len(row))
    return State(row.hidden, torch.ones(len(row)), row.tube_ids, row.groups, everyone, everyone)


def decide(state, policy, counts=None):
    """One decision: `policy` is `{"similarity_threshold": ...}` or `{"target_ratio": ..., "ratio_of": ...}`."""
    links = merging.link_tubes(state.tube_ids)
    similarity = merging.similarity_to_next(state.hidden, links)
    if "similarity_threshold" in policy:
        return links, merging.merge_above(similarity, policy["similarity_threshold"])
    inputs, floors = counts
    present = [int((state.groups == g).sum()) for g in range(len(inputs))]
    removals = merging.count_removals(present, inputs, floors, **policy)
    return links, merging.merge_most_similar(similarity, state.groups[links.order], torch.tensor(removals).long())


def apply(state, links, merge, survivor="last"):
    survivors = merging.find_survivors(merge, links, survivor)
    hidden, sizes, kept, new_index = merging.merge_tokens(
        state.hidden, state.sizes, survivors, len(survivors) - int(merge.sum())
    )
    return State(hidden, sizes, state.tube_ids[kept], state.groups[kept], state.index[kept], new_index[state.stands])


def merge_all(row, policies, survivor="last"):
    state = start(row)
    for policy in policies:
        state = apply(state, *decide(state, policy, host_counts(row)), survivor)
    return state


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def merge_in_a_loop(row, policies, survivor="last"):
    """Eq. 1 as written, in plain Python and float64: a list of runs, each a list of input tokens.

    Returns the survivor (index in the input) and the members of every token left.
    """
    alive = [(i, [i]) for i in range(len(row))]  # in the order of the sequence
    inputs, floors = (dict(zip(row.group_names, counts, strict=True)) for counts in host_counts(row))
    for policy in policies:
        mean = [row.hidden[members].double().mean(0) for _, members in alive]
        found = []
        for a, (i, _) in enumerate(alive):
            segment = row.places[i].segment
            later = [b for b in range(a + 1, len(alive)) if row.places[alive[b][0]].segment == segment]
            if segment and later:
                found.append((cosine(mean[a], mean[later[0]]), a, later[0], row.places[i].group))
        if "similarity_threshold" in policy:
            chosen = [link for link in found if link[0] > policy["similarity_threshold"]]
        else:
            chosen = []
            for group in inputs:
                present = sum(row.places[i].group == group for i, _ in alive)
                base = inputs[group] if policy.get("ratio_of") == "input" else present
                target = max(math.ceil(Fraction(str(policy["target_ratio"])) * base), floors[group])
                best_first = sorted((link for link in found if link[3] == group), key=lambda link: (-link[0], link[1]))
                chosen += best_first[: max(present - target, 0)]
        joins = {a: b for _, a, b, _ in chosen}
        runs, taken = [], set()
        for a in range(len(alive)):
            if a in taken:
                continue
            run = [a]
            while run[-1] in joins:
                run.append(joins[run[-1]])
            taken.update(run)
            stays = run[-1] if survivor == "last" else run[0]
            runs.append((alive[stays][0], sorted(i for b in run for i in alive[b][1])))
        alive = sorted(runs)
    return alive


def random_policies(rng):
    policies = [{"similarity_threshold": rng.uniform(0.2, 0.9)} for _ in range(rng.randint(0, 2))]
    for _ in range(rng.randint(0 if policies else 1, 2)):
        policies.append({"target_ratio": rng.randint(1, 20) / 20, "ratio_of": rng.choice(["current", "input"])})
    return policies


def case(seed, dtype=F64):
    """A random row, one to four steps, and the side the survivor is on."""
    rng = random.Random(1000 + seed)
    row = random_row(seed, rng.choice([None, None, 1, 2, 3]), rng.choice([None, None, 1, 2, 3]), dtype)
    return row, random_policies(rng), rng.choice(["last", "last", "first"])


@pytest.mark.parametrize("seed", range(200))
def test_merging_equals_a_plain_loop(seed):
    row, policies, survivor = case(seed)
    expected = merge_in_a_loop(row, policies, survivor)
    state = merge_all(row, policies, survivor)
    assert state.index.tolist() == [i for i, _ in expected]
    assert state.sizes.tolist() == [len(members) for _, members in expected]
    means = [row.hidden[members].mean(0) for _, members in expected]  # over all input tokens it stands for
    if means:
        torch.testing.assert_close(state.hidden, torch.stack(means), rtol=0, atol=1e-12)
    for now, (_, members) in enumerate(expected):
        assert state.stands[members].tolist() == len(members) * [now]


@pytest.mark.parametrize("seed", range(200))
def test_what_every_merge_keeps(seed):
    row, policies, survivor = case(seed)
    state = start(row)
    for policy in policies:
        links, merge = decide(state, policy, host_counts(row))
        survivors = merging.find_survivors(merge, links, survivor)
        assert torch.equal(survivors[survivors], survivors)
        assert not merge[~links.has_next].any()
        before, state = state, apply(state, links, merge, survivor)
        kept = state.index
        assert (kept.diff() > 0).all()
        assert len(before.index) - len(kept) == int(merge.sum())
        assert state.sizes.sum() == len(row)
        assert set(state.stands.tolist()) == set(range(len(kept)))
        ends = {}
        for i, place in enumerate(row.places):
            if place.segment is None:
                assert i in kept
            elif survivor == "last" or place.segment not in ends:
                ends[place.segment] = i
        assert set(ends.values()) <= set(kept.tolist())


def row_of(*values, dtype=torch.float32):
    """One tube whose tokens are `values`."""
    hidden = torch.tensor(values, dtype=dtype)
    return hidden, merging.link_tubes(torch.zeros(len(values), dtype=torch.long))


def test_the_threshold_is_strict():
    hidden, links = row_of([1.0, 1, 1, 1], [1.0, 1, 1, -1])
    similarity = merging.similarity_to_next(hidden, links)
    assert similarity.tolist() == [0.5, -math.inf]
    assert merging.merge_above(similarity, 0.5).tolist() == [False, False]
    assert merging.merge_above(similarity, 0.4999999).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_tokens_are_no_more_similar_than_1(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(500, 37, dtype=dtype).repeat_interleave(2, 0)
    norms = hidden[::2].square().sum(-1).sqrt()
    assert (
        (hidden[::2] * hidden[1::2]).sum(-1) / (norms * norms) > 1
    ).any()  # what rounding does to the plain quotient
    links = merging.link_tubes(torch.arange(500).repeat_interleave(2))
    similarity = merging.similarity_to_next(hidden, links)
    assert similarity.max() == 1
    assert not merging.merge_above(similarity, 1.0).any()
    assert merging.merge_above(similarity, 0.99999).sum() == 500


def test_a_threshold_above_1_merges_nothing():
    row = random_row(3)
    assert len(merge_all(row, [{"similarity_threshold": 1.5}, {"target_ratio": 1.0}]).index) == len(row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("count", [2, 3, 7, 32])
@pytest.mark.parametrize("survivor", ["last", "first"])
def test_equal_frames_leave_one_frame_with_its_exact_values(dtype, count, survivor):
    torch.manual_seed(0)
    frame = torch.randn(12, 19).to(dtype)
    links = merging.link_tubes(torch.arange(12).repeat(count))
    similarity = merging.similarity_to_next(frame.repeat(count, 1), links)
    survivors = merging.find_survivors(merging.merge_above(similarity, 0.6), links, survivor)
    sizes = torch.randint(1, 9, (12 * count,)).float()  # whatever they stood for before
    hidden, new_sizes, kept, _ = merging.merge_tokens(frame.repeat(count, 1), sizes, survivors, 12)
    assert torch.equal(hidden, frame)
    assert hidden.dtype == dtype
    assert torch.equal(new_sizes, sizes.view(count, 12).sum(0))
    assert kept.tolist() == list(range(12 * (count - 1), 12 * count) if survivor == "last" else range(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_tokens_that_merge_with_nothing_keep_their_exact_values(dtype):
    row = random_row(11, dtype=dtype)
    assert row.places[0].tube is None
    row.hidden[0] = torch.finfo(dtype).max
    state = apply(start(row), *decide(start(row), {"similarity_threshold": 0.6}))
    alone = state.sizes == 1
    assert 0 < (~alone).sum() < len(state.sizes)
    assert torch.equal(state.hidden[alone], row.hidden[state.index[alone]])


def test_means_are_summed_in_float32():
    """Rounded once, at the end: with bfloat16 sums most means are off by a last place."""
    torch.manual_seed(0)
    hidden, sizes = torch.randn(16, 50, 32).bfloat16(), torch.randint(1, 9, (16, 50)).float()
    survivors = torch.arange(750, 800).repeat(16)
    means, _, _, _ = merging.merge_tokens(hidden.flatten(0, 1), sizes.flatten(), survivors, 50)
    exact = (hidden.double() * sizes[..., None]).sum(0) / sizes.double().sum(0)[:, None]
    assert means.dtype == torch.bfloat16
    assert (means == exact.bfloat16()).double().mean() > 0.99


def test_sizes_are_summed_exactly_in_low_precision():
    hidden, sizes, _, _ = merging.merge_tokens(
        torch.tensor([[2.0], [0.0]], dtype=torch.bfloat16), torch.tensor([257.0, 514.0]), torch.tensor([1, 1]), 1
    )
    assert sizes.item() == 771
    assert hidden.item() == torch.tensor(2 / 3).bfloat16().item()


def test_similarity_is_summed_in_float32():
    """One of 1024 ones is missing: the cosine is .9995, which is 1 in bfloat16."""
    ones = torch.ones(2, 1024, dtype=torch.bfloat16)
    ones[1, 0] = 0
    similarity = merging.similarity_to_next(ones, merging.link_tubes(torch.zeros(2, dtype=torch.long)))
    assert similarity.dtype == torch.float32
    assert not merging.merge_above(similarity, 0.9997).any()
    assert merging.merge_above(similarity, 0.9993)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_similarity_of_any_dtype_is_the_float64_cosine_of_its_values(dtype):
    row = random_row(5, dtype=dtype)
    links = merging.link_tubes(row.tube_ids)
    close = merging.similarity_to_next(row.hidden, links)
    exact = merging.similarity_to_next(row.hidden.double(), links)
    assert (close.dtype, exact.dtype) == (torch.float32, F64)
    torch.testing.assert_close(close.double(), exact, rtol=0, atol=1e-6)


def test_a_token_of_zeros_resembles_nothing():
    similarity = merging.similarity_to_next(*row_of([0.0, 0], [0.0, 0], [1.0, 0]))
    assert similarity[:2].tolist() == [0, 0]


def test_similarity_has_no_gradient():
    row = random_row(5)
    similarity = merging.similarity_to_next(row.hidden.requires_grad_(), merging.link_tubes(row.tube_ids))
    assert not similarity.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_does_not_depend_on_the_chunk(dtype):
    torch.manual_seed(0)
    hidden, links = torch.randn(50, 96).to(dtype), merging.link_tubes(torch.arange(5).repeat(10))
    whole = merging.similarity_to_next(hidden, links)
    for chunk in (1, 2, 7, 49, 50, 51):
        assert torch.equal(merging.similarity_to_next(hidden, links, chunk), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 96])
def test_means_do_not_depend_on_the_chunk(dtype, width):
    torch.manual_seed(0)
    hidden, sizes = torch.randn(200, width).to(dtype), torch.randint(1, 9, (200,)).float()
    survivors = torch.arange(180, 200).repeat(10)
    whole, *_ = merging.merge_tokens(hidden, sizes, survivors, 20)
    for chunk in (1, 7, 179, 180, 181):
        assert torch.equal(merging.merge_tokens(hidden, sizes, survivors, 20, chunk)[0], whole)


def read_tubes(*samples, **cuts):
    """Ids of the tokens of a right-padded batch, and their tubes as the model reads them."""
    kinds = {geo.VIDEO_START: START, geo.VIDEO_END: END, geo.PATCH: PATCH, geo.FRAME: FRAME, geo.LINE: LINE}
    ids = batch(samples, "right")["input_ids"]
    return ids, geo.read_geometry(geo.token_kinds(ids, kinds)).tubes(**cuts)


def links_between_equal_tokens(*samples):
    _, tubes = read_tubes(*samples)
    links = merging.link_tubes(tubes.ids.flatten())
    similarity = merging.similarity_to_next(torch.ones(tubes.ids.numel(), 3), links)
    assert torch.equal(similarity > 0, links.has_next)
    return int(merging.merge_above(similarity, 0.6).sum())


def test_links_join_the_same_place_of_the_same_grid_of_the_same_video():
    assert links_between_equal_tokens(video((2, 2), (2, 2), (2, 2))) == 8
    assert links_between_equal_tokens(video((2, 2), (1, 3), (2, 2), (1, 3))) == 7
    assert links_between_equal_tokens(video((2, 3), (3, 2), (6, 1))) == 0
    assert links_between_equal_tokens(video((2, 2), (2, 2), marks=[words(1), words(2)])) == 4


def test_videos_are_never_linked():
    assert links_between_equal_tokens(video((2, 2)) + video((2, 2))) == 0
    assert links_between_equal_tokens(video((2, 2), (2, 2)) + video((2, 2), (2, 2))) == 8
    assert links_between_equal_tokens(video((2, 2)), video((2, 2))) == 0
    assert links_between_equal_tokens(words(7), video((1, 1)) + words(1)) == 0


def test_tubes_of_a_batch_serve_a_ratio_step_as_they_are():
    ids, tubes = read_tubes(words(2) + video(*4 * [(2, 2)]) + video((1, 3)), words(1), video(*6 * [(1, 2)]))
    links = merging.link_tubes(tubes.ids.flatten())
    similarity = merging.similarity_to_next(torch.randn(ids.numel(), 4), links)
    removals = merging.count_removals(tubes.patches, tubes.patches, tubes.floors, 0.5)
    groups = tubes.groups.flatten()[links.order]
    merge = merging.merge_most_similar(similarity, groups, torch.tensor(removals))
    assert (tubes.patches, tubes.floors, removals) == ([16, 3, 12], [4, 3, 2], [8, 0, 6])
    assert torch.bincount(groups[merge], minlength=3).tolist() == removals


def test_a_ratio_is_kept_by_every_group_and_never_pooled():
    """A still video beside a busy one: pooled, the still one would pay for both."""
    torch.manual_seed(0)
    still, busy = torch.randn(1, 8).expand(10, 8) + 0.01 * torch.randn(10, 8), torch.randn(10, 8)
    hidden, groups = torch.cat([still, busy]), torch.arange(2).repeat_interleave(10)
    links = merging.link_tubes(groups)
    similarity = merging.similarity_to_next(hidden, links)
    assert similarity[:9].min() > similarity[10:19].max()
    merge = merging.merge_most_similar(similarity, groups, torch.tensor([5, 5]))
    assert torch.bincount(groups[merge]).tolist() == [5, 5]
    for group in (0, 1):
        inside = (groups == group) & links.has_next
        assert similarity[inside & merge].min() > similarity[inside & ~merge].max()
    assert merging.merge_most_similar(similarity, groups, torch.tensor([0, 9])).sum() == 9


@pytest.mark.parametrize("removals", [0, 1, 4, 6])
def test_ties_are_broken_by_order(removals):
    hidden, links = torch.ones(11, 3), merging.link_tubes(torch.tensor([-1, 0, 1, -2, 0, 1, 0, 1, -3, 0, 1]))
    groups = torch.tensor([-1, 0, 0, -1, 0, 0, 0, 0, -1, 0, 0])[links.order]
    merge = merging.merge_most_similar(merging.similarity_to_next(hidden, links), groups, torch.tensor([removals]))
    assert merge.nonzero().flatten().tolist() == links.has_next.nonzero().flatten().tolist()[:removals]


@pytest.mark.parametrize(
    "patches, inputs, floor, ratio, ratio_of, removed",
    [
        (100, 100, 10, 0.5, "current", 50),
        (101, 101, 10, 0.5, "current", 50),  # 51 are kept
        (30, 30, 1, 0.1, "current", 27),  # 0.1 * 30 is more than 3 in floats
        (100, 100, 1, 0.07, "current", 93),
        (100, 100, 60, 0.5, "current", 40),  # not below one token per tube
        (60, 60, 60, 0.5, "current", 0),
        (40, 100, 10, 0.5, "current", 20),
        (40, 100, 10, 0.5, "input", 0),  # thresholds have already done more
        (70, 100, 10, 0.5, "input", 20),
        (70, 100, 60, 0.5, "input", 10),
        (7, 7, 1, 1, "current", 0),
        (7, 7, 1, 1e-12, "current", 6),
    ],
)
def test_how_many_a_ratio_removes(patches, inputs, floor, ratio, ratio_of, removed):
    assert merging.count_removals([patches, 5], [inputs, 5], [floor, 5], ratio, ratio_of) == [removed, 0]


def test_a_ratio_of_whole_percents_is_exact():
    for percent in range(1, 101):
        patches = list(range(1, 400))
        kept = [max(math.ceil(Fraction(percent, 100) * count), 1) for count in patches]
        removals = merging.count_removals(patches, patches, len(patches) * [1], percent / 100)
        assert [count - gone for count, gone in zip(patches, removals, strict=True)] == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_a_sample_does_not_depend_on_its_companions(seed, dtype):
    rng = random.Random(seed)
    parts, policies = [], [{"similarity_threshold": 0.7}, {"target_ratio": 0.5}, {"target_ratio": 0.6}]
    for i in range(4):
        places = [replace(place, sample=i) for place in [*random_places(rng, samples=1), Place(0)]]
        parts.append((places, drifting(places, rng, width=64, dtype=dtype)))
    solo = [merge_all(build_row(places, hidden), policies) for places, hidden in parts]

    order = rng.sample(range(4), 4)
    packed_places = [
        replace(place, video=(i, place.video), tube=(i, *place.tube)) if place.tube else place
        for i in order
        for place in parts[i][0]
    ]
    together = merge_all(build_row(packed_places, torch.cat([parts[i][1] for i in order])), policies)
    offset = 0
    for i in order:
        mine = (together.index >= offset) & (together.index < offset + len(parts[i][0]))
        assert torch.equal(together.index[mine] - offset, solo[i].index)
        assert torch.equal(together.hidden[mine], solo[i].hidden)
        assert torch.equal(together.sizes[mine], solo[i].sizes)
        offset += len(parts[i][0])


@pytest.mark.parametrize("survivor", ["last", "first"])
def test_the_gradient_of_a_merge(survivor):
    torch.manual_seed(0)
    links = merging.link_tubes(torch.tensor([-1, 0, 1, 2, -2, 0, 1, 2, 0, 1, 2, -3]))
    merge = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    survivors = merging.find_survivors(merge, links, survivor)
    sizes = torch.randint(1, 5, (12,)).double()
    hidden = torch.randn(12, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merging.merge_tokens(x, sizes, survivors, 8)[0], hidden)


def test_the_gradient_of_a_mean_reaches_its_members_by_size():
    hidden = torch.randn(3, 2, requires_grad=True)
    merged = merging.merge_tokens(hidden, torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2, 2, 2]), 1)[0]
    merged.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, 1], [2.0, 2], [5.0, 5]]) / 8)


def test_a_ratio_step_needs_nothing_from_the_device():
    """Meta tensors cannot be read on the host."""
    device = torch.device("meta")
    links = merging.link_tubes(torch.zeros(3000, dtype=torch.long, device=device))
    hidden = torch.zeros(3000, 8, dtype=torch.bfloat16, device=device)
    similarity = merging.similarity_to_next(hidden, links)
    groups = torch.zeros(3000, dtype=torch.long, device=device)
    merge = merging.merge_most_similar(similarity, groups, torch.zeros(2, dtype=torch.long, device=device))
    for survivor in ("last", "first"):
        survivors = merging.find_survivors(merge, links, survivor)
        merged = merging.merge_tokens(hidden, torch.ones(3000, device=device), survivors, 1700)
        assert [tuple(x.shape) for x in merged] == [(1700, 8), (1700,), (1700,), (3000,)]
    assert merging.merge_above(similarity, 0.6).shape == (3000,)
    assert merging.cut_tubes(groups, groups, 4, 2).shape == (3000,)


def test_a_row_without_tokens_or_without_patches_stays_as_it_is():
    for places in ([], [Place(0)], 5 * [Place(0)]):
        row = build_row(places, torch.randn(len(places), WIDTH))
        state = merge_all(row, [{"similarity_threshold": -0.9}, {"target_ratio": 0.1}])
        assert torch.equal(state.hidden, row.hidden)


@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("max_run", [None, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_tubes_are_cut_at_windows_and_at_the_longest_run(seed, window, max_run):
    row = random_row(seed, window, max_run)
    patches = row.tube_ids[row.tube_ids >= 0].tolist()
    segments = [place.segment for place in row.places if place.segment]
    assert sorted(set(patches)) == list(range(len(set(segments))))
    assert len(set(zip(patches, segments, strict=True))) == len(set(segments))  # one to one


def test_blocks_of_the_longest_run_are_counted_from_the_start_of_the_window():
    frames = torch.arange(8).repeat_interleave(2)
    ids = merging.cut_tubes(torch.tensor([9, 4]).repeat(8), frames, window=5, max_run=2)
    assert ids.tolist() == [5, 0, 5, 0, 6, 1, 6, 1, 7, 2, 8, 3, 8, 3, 9, 4]


def test_no_run_outgrows_its_cut_however_often_it_merges():
    rng = random.Random(0)
    places = [Place(0, 0, frame, (0, 0, cell)) for frame in range(23) for cell in range(2)]
    row = build_row(places, torch.ones(46, 3) + 0.01 * drifting(places, rng, 3).float(), window=10, max_run=4)
    state = merge_all(row, [{"target_ratio": 0.7}, {"target_ratio": 0.5}, {"target_ratio": 0.01}])
    assert state.sizes.tolist() == [4, 4, 4, 4, 2, 2, 4, 4, 4, 4, 2, 2, 3, 3]
    assert [row.places[i].frame for i in state.index[::2].tolist()] == [3, 7, 9, 13, 17, 19, 22]


def drift(similarity, num_frames, width=1024, seed=0):
    """A place that drifts: neighbours have this cosine, frames k apart its k-th power."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randn(4, width, generator=generator)]
    for _ in range(num_frames - 1):
        noise = torch.randn(4, width, generator=generator)
        frames.append(similarity * frames[-1] + math.sqrt(1 - similarity**2) * noise)
    return torch.cat(frames)


@pytest.mark.parametrize("neighbours, chained, capped", [(0.7, 0.21, 0.69), (0.8, 0.26, 0.78)])
def test_a_slow_drift_chains_and_the_longest_run_bounds_it(neighbours, chained, capped):
    """DESIGN's reason for `max_run`: a threshold on neighbours is single linkage."""
    hidden = drift(neighbours, 128)
    places = [Place(0, 0, frame, (0, cell)) for frame in range(128) for cell in range(4)]
    for max_run, left, resemblance in ((None, 1, chained), (8, 16, capped)):
        state = merge_all(build_row(places, hidden, max_run=max_run), [{"similarity_threshold": 0.6}])
        assert len(state.index) == 4 * left
        cosines = torch.cosine_similarity(state.hidden[state.stands], hidden)
        assert abs(cosines.mean().item() - resemblance) < 0.02


SURVIVORS = (
    torch.tensor([[0, 1, 4, 3, 4, 5, 6], [-1, -1, 2, 5, 6, 5, 6]]),
    torch.tensor([[0, 1, 6, 3, 6, 5, 6], [-1, -1, 2, 5, 6, 5, 6]]),
)
FRAMES = torch.tensor([[-1, 0, 0, 1, 1, 2, 2], [-1, -1, -1, 0, 0, 1, 1]])


def test_a_merge_map_tells_who_is_left_and_for_how_many():
    merge_map = merging.MergeMap((1, 3), SURVIVORS, FRAMES)
    assert merge_map.token_sizes(0).tolist() == [[1, 1, 0, 1, 2, 1, 1], [0, 0, 1, 0, 0, 2, 2]]
    assert merge_map.token_sizes().tolist() == [[1, 1, 0, 1, 0, 1, 3], [0, 0, 1, 0, 0, 2, 2]]
    for step in (0, 1):
        assert torch.equal(merge_map.kept(step), merge_map.token_sizes(step) > 0)
        assert torch.equal(merge_map.token_sizes(step).sum(1), torch.tensor([7, 5]))
    assert torch.equal(merge_map.kept(), merge_map.kept(1))
    assert [frames.tolist() for frames in merge_map.kept_per_frame(0)] == [[1, 2, 2], [0, 2]]
    assert [frames.tolist() for frames in merge_map.kept_per_frame()] == [[1, 1, 2], [0, 2]]


def test_a_merge_map_counts_no_frames_in_a_sample_without_any():
    merge_map = merging.MergeMap((1,), SURVIVORS[:1], torch.stack([FRAMES[0], torch.full((7,), -1)]))
    assert [frames.tolist() for frames in merge_map.kept_per_frame()] == [[1, 2, 2], []]


def test_a_merge_map_without_frames_says_so():
    with pytest.raises(ElvaError, match=r"no frame_index.*token_sizes"):
        merging.MergeMap((1, 3), SURVIVORS).kept_per_frame()


@pytest.mark.parametrize("seed", range(20))
def test_a_merge_map_of_a_real_merge_agrees_with_it(seed):
    row, policies, survivor = case(seed)
    state = merge_all(row, policies, survivor)
    merge_map = merging.MergeMap((1,), (state.index[state.stands][None],))
    assert merge_map.kept()[0].nonzero().flatten().tolist() == state.index.tolist()
    assert torch.equal(merge_map.token_sizes()[0][state.index], state.sizes.long())


def test_the_random_rows_hold_what_they_are_for():
    """Several videos, two grids in one, runs of more than two, and tokens that stay alone."""
    rows = [random_row(seed) for seed in range(200)]
    assert sum(len(row.group_names) > 1 for row in rows) > 100
    grids = [{(place.video, place.tube[1:3]) for place in row.places if place.tube} for row in rows]
    assert sum(len(found) > len({v for v, _ in found}) for found in grids) > 50
    sizes = torch.cat([merge_all(row, [{"similarity_threshold": 0.6}]).sizes for row in rows])
    assert (sizes > 2).sum() > 200
    assert (sizes == 1).sum() > 200
