"""What a sample may cost: checked before anything is decoded, refused with a setting that fits, or fitted."""

import math

import numpy as np
import pytest
import torch
from clips_elva import byte_tokenizer, write_counter
from hypothesis import given, settings
from hypothesis import strategies as st

import elva_hf.sampled_elva
from elva_hf.container_elva import ContainerReader
from elva_hf.errors_elva import ConfigurationError, ContextOverflowError, VideoError
from elva_hf.fitting_elva import Sample, choose_frames
from elva_hf.options_elva import SAMPLING_FIELDS, Budgets, VideoClip
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.video_processing_elva import ElvaVideoProcessor

PATCH = 4
SMALL = {"patch_size": PATCH, "longest_edge": 16, "low_res_longest_edge": 8}
HIGH, LOW = 1 + 4 * 5, 1 + 2 * 3  # tokens of a square frame
BYTES = 4 * 3 * PATCH**2  # of a patch


@pytest.fixture(scope="module")
def processor():
    return ElvaProcessor.from_tokenizer(byte_tokenizer(), **SMALL, num_high_res_frames=4, num_low_res_frames=8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_counter(tmp_path_factory.mktemp("clips") / "clip.mp4", 30)


def draw(num_frames, height=16, width=16):
    return np.broadcast_to(np.uint8(90), (num_frames, height, width, 3))


def metadata(processor, text, videos, **options):
    return processor(text=text, videos=videos, return_metadata=True, **options)


def counts(video):
    return sum(video.high), video.num_frames - sum(video.high)


def replaced(options, settings):
    """The options of a call, changed as the error says: a way to count frames replaces another."""
    counted = any(name in SAMPLING_FIELDS for name in settings)
    return {
        **{name: value for name, value in options.items() if not counted or name not in SAMPLING_FIELDS},
        **settings,
    }


def test_the_error_names_the_numbers_and_what_would_fit():
    processor = ElvaVideoProcessor(num_frames=64)
    with pytest.raises(ContextOverflowError) as caught:
        processor(draw(64, 672, 672), max_visual_tokens=4096)
    assert str(caught.value) == (
        "the video gives 38464 visual tokens, max_visual_tokens is 4096; this would fit: num_high_res_frames=0, "
        'num_low_res_frames=26; or let overflow="fit" choose.'
    )
    assert (caught.value.budget, caught.value.needed, caught.value.limit) == ("max_visual_tokens", 38464, 4096)
    assert caught.value.settings == {"num_high_res_frames": 0, "num_low_res_frames": 26}


BEYOND = {
    "max_visual_tokens": ({"max_visual_tokens": 100}, "the video gives 140 visual tokens, max_visual_tokens is 100"),
    "max_memory": ({"max_memory": 15_000}, "the video gives 18432 bytes of pixel_values_videos, max_memory is 15000"),
    "memory as text": ({"max_memory": "15KB"}, "the video gives 18432 bytes of pixel_values_videos, max_memory is"),
    "context_length": ({"context_length": 120}, r"the prompt has 147 tokens \(140 of them visual\), context_length is"),
    "max_length": ({"truncation": True, "max_length": 120}, r"the text up to its last frame has 144 tokens \(140 of"),
}


@pytest.mark.parametrize("case", BEYOND)
def test_every_budget_refuses_with_a_setting_that_fits_and_no_better_one_would(processor, case):
    options, message = BEYOND[case]
    with pytest.raises(ContextOverflowError, match=message) as caught:
        processor(text="ab<video>cde", videos=draw(12), **options)
    found = caught.value.settings
    assert set(found) == {"num_high_res_frames", "num_low_res_frames"}
    (video,) = metadata(processor, "ab<video>cde", draw(12), **options, **found)["video_metadata"]
    assert counts(video) == tuple(found.values())
    (fitted,) = metadata(processor, "ab<video>cde", draw(12), **options, overflow="fit")["video_metadata"]
    assert fitted == video
    high, low = found.values()
    for better in (
        {**found, "num_low_res_frames": low + 1},
        {"num_high_res_frames": high + 1, "num_low_res_frames": low - 1},
    ):
        if sum(better.values()) > 12:
            continue
        with pytest.raises(ContextOverflowError):
            processor(text="ab<video>cde", videos=draw(12), **options, **better)


def test_what_just_fits_is_left_alone(processor):
    asked = metadata(processor, "ab<video>", draw(12))["video_metadata"]
    memory = processor(text="<video>", videos=draw(12))["pixel_values_videos"].nbytes
    for options in ({"max_visual_tokens": 140}, {"max_memory": memory}, {"context_length": 144}):
        for overflow in ("error", "fit"):
            assert metadata(processor, "ab<video>", draw(12), **options, overflow=overflow)["video_metadata"] == asked
        (name, limit), *_ = options.items()
        with pytest.raises(ContextOverflowError) as caught:
            processor(text="ab<video>", videos=draw(12), **{name: limit - 1})
        assert (caught.value.needed, caught.value.limit) == (limit, limit - 1)


def test_nothing_but_the_first_frame_is_decoded_before_a_budget_is_checked(processor, clip, monkeypatch):
    readers, reads = [], []
    look, read = ContainerReader._look, ContainerReader.read
    monkeypatch.setattr(ContainerReader, "_look", lambda self: (readers.append(self), look(self))[1])
    monkeypatch.setattr(
        ContainerReader, "read", lambda self, indices: (reads.append(list(indices)), read(self, indices))[1]
    )
    texts, videos = ["<video>", "b<video>"], [clip, clip]
    for options, _ in BEYOND.values():
        with pytest.raises(ContextOverflowError, match="sample 0"):
            processor(text=texts, videos=videos, num_frames=20, **options)
    assert not reads
    assert all(reader.work.frames <= 1 for reader in readers) and len(readers) == 2 * len(BEYOND)
    out = metadata(processor, texts, videos, num_frames=20, overflow="fit", max_visual_tokens=100)
    assert reads == [list(video.indices) for video in out["video_metadata"]]
    readers.clear()


def test_readers_are_closed_whatever_happens(processor, clip, monkeypatch):
    readers, closed = [], set()
    look, close = ContainerReader._look, ContainerReader.close
    monkeypatch.setattr(ContainerReader, "_look", lambda self: (readers.append(self), look(self))[1])
    monkeypatch.setattr(ContainerReader, "close", lambda self: (closed.add(id(self)), close(self))[1])
    with pytest.raises(ContextOverflowError):
        processor(text="<video><video>", videos=[clip, clip], max_visual_tokens=100)
    with pytest.raises(VideoError):
        processor(text="<video><video>", videos=[clip, "missing.mp4"])
    processor(text="<video><video>", videos=[clip, clip])
    processor.count_tokens(clip)
    assert len(readers) == 6 and closed == {id(reader) for reader in readers}  # held here, so none closed itself
    readers.clear()


def test_a_neighbour_in_the_batch_changes_nothing(processor):
    texts = ["<video>", "a<video>b<video>", "words only", "<video>" + 30 * "x"]
    videos = [[draw(12)], [draw(9), draw(12, 8, 16)], [], [draw(12)]]
    for options in ({"max_visual_tokens": 90}, {"max_memory": 9000}, {"context_length": 110}):
        options["overflow"] = "fit"
        batch = metadata(processor, texts, videos, **options, return_tensors="pt")
        taken, rows = iter(batch["video_metadata"]), zip(batch["input_ids"], batch["attention_mask"], strict=True)
        for text, own, (row, mask) in zip(texts, videos, rows, strict=True):
            alone = metadata(processor, text, own or None, **options, return_tensors="pt")
            assert torch.equal(row[mask.bool()], alone["input_ids"][0])
            assert [next(taken) for _ in own] == alone["video_metadata"]
    with pytest.raises(ContextOverflowError, match=r"^sample 1: the 2 videos give"):
        processor(text=texts, videos=videos, max_visual_tokens=150)


def test_videos_of_one_sample_share_its_budget(processor):
    out = metadata(processor, "<video><video>", [draw(12), draw(12)], max_visual_tokens=160, overflow="fit")
    assert [counts(video) for video in out["video_metadata"]] == [(0, 11), (0, 11)]
    tokens = sum(video.num_visual_tokens for video in out["video_metadata"])
    assert tokens <= 160
    with pytest.raises(ContextOverflowError, match="the 2 videos give 280 visual tokens") as caught:
        processor(text="<video><video>", videos=[draw(12), draw(12)], max_visual_tokens=160)
    again = metadata(processor, "<video><video>", [draw(12), draw(12)], max_visual_tokens=160, **caught.value.settings)
    assert [counts(video) for video in again["video_metadata"]] == [(0, 11), (0, 11)]


def test_no_more_high_frames_are_advised_than_were_asked_for(processor):
    wide = draw(12, 4, 16)  # a high frame takes 6 tokens, a low one 5
    asked = {"num_high_res_frames": 1, "num_low_res_frames": 11, "low_res_longest_edge": 12, "max_visual_tokens": 59}
    with pytest.raises(ContextOverflowError, match="the video gives 61") as caught:
        processor(text="<video>", videos=wide, **asked)
    assert caught.value.settings == {"num_high_res_frames": 1, "num_low_res_frames": 10}
    (video,) = metadata(processor, "<video>", wide, **asked, overflow="fit")["video_metadata"]
    assert counts(video) == (1, 10)


def test_an_image_gives_way_too(processor):
    image = draw(1)[0]
    out = processor(text="<image>", images=image, max_visual_tokens=HIGH - 1, overflow="fit", return_metadata=True)
    assert out["video_metadata"][0].high == (False,) and len(out["pixel_values_videos"]) == 4
    with pytest.raises(ContextOverflowError) as caught:
        processor(text="<image>", images=image, max_visual_tokens=HIGH - 1)
    assert caught.value.settings == {"longest_edge": 12}
    processor(text="<image>", images=image, max_visual_tokens=HIGH - 1, longest_edge=12)


def test_smaller_frames_are_named_where_one_frame_is_too_many(processor):
    with pytest.raises(ContextOverflowError, match="this would fit") as caught:
        processor(text="<video>", videos=draw(12), max_visual_tokens=LOW - 1)
    assert caught.value.settings == {"num_high_res_frames": 0, "num_low_res_frames": 1, "longest_edge": 4}
    processor(text="<video>", videos=draw(12), max_visual_tokens=LOW - 1, **caught.value.settings)
    with pytest.raises(ContextOverflowError, match=r"this would fit: [^;]*\.$"):  # nor does it advise what was tried
        processor(text="<video>", videos=draw(12), max_visual_tokens=LOW - 1, overflow="fit")
    with pytest.raises(ContextOverflowError, match=r"not even one small frame .* raise max_visual_tokens") as caught:
        processor(text="<video>", videos=draw(12), max_visual_tokens=2)
    assert caught.value.settings is None


def test_a_text_that_is_too_long_alone_is_told_so(processor):
    with pytest.raises(ContextOverflowError, match=r"the prompt has 50 tokens .* is 20; shorten the text") as caught:
        processor(text=50 * "x", context_length=20)
    assert caught.value.settings is None
    for overflow in ("error", "fit"):
        with pytest.raises(ContextOverflowError, match="shorten the text") as caught:
            processor(text="<video>" + 50 * "x", videos=draw(12), context_length=52, overflow=overflow)
        assert caught.value.settings is None


def test_a_clip_that_counts_its_own_frames_is_told_to_fit(processor):
    clip = VideoClip(draw(12), num_frames=12)
    with pytest.raises(ContextOverflowError, match='or let overflow="fit" choose') as caught:
        processor(text="<video>", videos=clip, max_visual_tokens=100)
    fitted = metadata(processor, "<video>", clip, max_visual_tokens=100, **caught.value.settings)["video_metadata"]
    assert fitted[0].num_visual_tokens <= 100
    both = [clip, draw(12)]  # only the second listens to the options of the call
    with pytest.raises(ContextOverflowError) as caught:
        processor(text="<video><video>", videos=both, max_visual_tokens=300)
    taken = metadata(processor, "<video><video>", both, max_visual_tokens=300, **caught.value.settings)[
        "video_metadata"
    ]
    assert counts(taken[0]) == (12, 0) and sum(video.num_visual_tokens for video in taken) <= 300


def test_truncation_cuts_text_only_and_with_fit_frames_go_first(processor):
    text = "<video>" + 30 * "x"
    cut = {"truncation": True, "max_length": 150}
    kept = processor(text=text, videos=draw(12), **cut)["input_ids"][0]
    assert len(kept) == 150 and kept.count(processor.frame_token_id) == 12
    fitted = processor(text=text, videos=draw(12), **cut, overflow="fit")["input_ids"][0]
    assert processor.decode(fitted).endswith(30 * "x") and 150 - HIGH + LOW < len(fitted) <= 150
    assert processor(text=["no video" * 9, text], videos=draw(12), **cut, overflow="fit")["input_ids"][1] == fitted
    words_only = processor(text=40 * "x", truncation=True, max_length=10, context_length=20, overflow="fit")
    assert len(words_only["input_ids"][0]) == 10
    with pytest.raises(ContextOverflowError, match="context_length is 100"):
        processor(text=text, videos=draw(12), **cut, context_length=100)


def test_truncation_on_the_left_cuts_only_what_stands_before_the_video(processor):
    other = ElvaProcessor.from_tokenizer(processor.tokenizer, **SMALL, num_frames=2)
    other.tokenizer.truncation_side = "left"
    kept = other(text="b" * 30 + "<video>xy", videos=draw(2), truncation=True, max_length=50)["input_ids"][0]
    assert len(kept) == 50 and other.decode(kept).startswith("bbbb<|vision_start|>")
    with pytest.raises(ContextOverflowError, match="the text from its first frame on has 46 tokens") as caught:
        other(text="b" * 30 + "<video>xy", videos=draw(2), truncation=True, max_length=45)
    cut = other(text="b" * 30 + "<video>xy", videos=draw(2), truncation=True, max_length=45, **caught.value.settings)
    assert cut["input_ids"][0].count(other.frame_token_id) == 2


def test_the_processors_own_budgets_hold_and_a_call_goes_before_them(tmp_path):
    made = ElvaProcessor.from_tokenizer(byte_tokenizer(), **SMALL, num_frames=12, max_visual_tokens=100, overflow="fit")
    made.save_pretrained(tmp_path)
    loaded = ElvaProcessor.from_pretrained(tmp_path)
    for processor in (made, loaded):
        (video,) = metadata(processor, "<video>", draw(12))["video_metadata"]
        assert video.num_visual_tokens <= 100
        assert metadata(processor, "<video>", draw(12), max_visual_tokens=252)["video_metadata"][0].num_frames == 12
        with pytest.raises(ContextOverflowError):
            processor(text="<video>", videos=draw(12), overflow="error")
        assert processor.count_tokens(draw(12)).videos == (video,)


def test_counting_and_planning_hold_the_budgets_of_one_sample(processor, config):
    options = {"max_visual_tokens": 150, "overflow": "fit"}
    counted = processor.count_tokens([draw(12), draw(12)], **options)
    assert counted.num_visual_tokens <= 150
    planned = processor.plan([draw(12), draw(12)], config=config, **options)
    assert planned.num_tokens == counted.num_tokens
    room = processor.plan(draw(12), config=config, text_tokens=40, context_length=120, overflow="fit")
    assert room.num_tokens <= 120
    with pytest.raises(ContextOverflowError, match="the prompt has 182 tokens"):
        processor.plan(draw(12), config=config, text_tokens=40, context_length=120)


def test_a_video_processor_alone_holds_budgets_for_each_video():
    processor = ElvaVideoProcessor(**SMALL, num_frames=12)
    out = processor([draw(12), draw(4)], max_visual_tokens=100, overflow="fit", return_metadata=True)
    assert [video.num_frames for video in out["video_metadata"]] == [12, 4]
    assert out["video_metadata"][1].num_visual_tokens == 4 * HIGH
    assert processor.sample(draw(12), max_visual_tokens=100, overflow="fit") == out["video_metadata"][0]
    with pytest.raises(ContextOverflowError, match="the prompt has 254 tokens"):
        processor(draw(12), context_length=253)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_visual_tokens": 0}, "max_visual_tokens is 0"),
        ({"context_length": 2.5}, "context_length is 2.5"),
        ({"context_length": True}, "context_length is True"),
        ({"max_memory": "lots"}, "max_memory is 'lots'"),
        ({"overflow": "reduce"}, "overflow is 'reduce'; give 'error' or 'fit'"),
        ({"max_visual_token": 9}, "did you mean max_visual_tokens"),
    ],
)
def test_a_budget_that_is_none_is_refused(processor, options, message):
    with pytest.raises(ConfigurationError, match=message):
        processor(text="<video>", videos=draw(2), **options)


def test_fitting_needs_low_frames_that_are_whole_patches():
    processor = ElvaVideoProcessor(patch_size=20, longest_edge=100, num_frames=4)  # 336 is no multiple of 20
    with pytest.raises(ConfigurationError, match="low_res_longest_edge is 336"):
        processor(draw(4, 100, 100), max_visual_tokens=100, overflow="fit")
    with pytest.raises(ContextOverflowError) as caught:
        processor(draw(4, 100, 100), max_visual_tokens=100)
    assert caught.value.settings == {"num_high_res_frames": 3, "num_low_res_frames": 0}
    assert "fit" not in str(caught.value).split("would fit")[1]
    assert processor(draw(4, 100, 100), max_visual_tokens=100, **caught.value.settings)["video_grids"] == [[(5, 5)] * 3]


def test_where_the_estimate_was_too_low_it_looks_again():
    processor = ElvaVideoProcessor(**SMALL, num_frames=12)

    def count(videos):
        return sum(video.num_visual_tokens for video in videos)

    with processor.open([draw(12)]) as videos:
        for extra in (0, 1, 13, 40):
            sample = Sample(videos, lambda chosen, extra=extra: count(chosen) + extra, count)
            chosen = choose_frames(sample, Budgets(context_length=100, overflow="fit"))
            best = choose_frames(Sample(videos, count, count), Budgets(context_length=100 - extra, overflow="fit"))
            assert chosen == best
        with pytest.raises(ContextOverflowError) as caught:
            choose_frames(Sample(videos, lambda chosen: count(chosen) + 40, count), Budgets(context_length=100))
        assert caught.value.settings == {"num_high_res_frames": 0, "num_low_res_frames": 8}
        for extra in (99, 102, 500):  # with 102 the room left is exactly none
            sample = Sample(videos, lambda chosen, extra=extra: count(chosen) + extra, count)
            with pytest.raises(ContextOverflowError, match="not even one"):
                choose_frames(sample, Budgets(context_length=100, overflow="fit"))


SIDES = st.sampled_from([4, 7, 8, 12, 16, 30])
COUNTS = st.one_of(
    st.fixed_dictionaries({"num_frames": st.integers(1, 14)}),
    st.tuples(st.integers(0, 6), st.integers(0, 9))
    .filter(any)
    .map(lambda pair: dict(zip(("num_high_res_frames", "num_low_res_frames"), pair, strict=True))),
    st.fixed_dictionaries({"fps": st.sampled_from([0.5, 1.0, 3.0])}),
    st.fixed_dictionaries({"frame_times": st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.45]), min_size=1, max_size=4)}),
)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_visual_tokens": st.integers(1, 300),
        "max_memory": st.integers(100, 40_000),
        "context_length": st.integers(1, 400),
        "max_length": st.integers(1, 400),
    },
).filter(bool)


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(3, 16), SIDES, SIDES), min_size=1, max_size=3),
    asked=COUNTS,
    limits=LIMITS,
    words=st.integers(0, 30),
    timestamps=st.booleans(),
)
def test_what_is_fitted_never_exceeds_and_what_is_advised_fits(processor, sizes, asked, limits, words, timestamps):
    videos = [draw(*size) for size in sizes]
    text = len(videos) * "<video>" + words * "x"
    options = {**limits, "video_metadata": {"fps": 6.0}, "timestamps": timestamps, "return_metadata": True}
    if "max_length" in options:
        options["truncation"] = True

    def check(**more):
        out = processor(text=text, videos=videos, **replaced(asked, more), **options)
        taken, ids = out["video_metadata"], out["input_ids"][0]
        assert sum(video.num_visual_tokens for video in taken) <= limits.get("max_visual_tokens", math.inf)
        assert out["pixel_values_videos"].nbytes <= limits.get("max_memory", math.inf)
        assert len(ids) <= min(limits.get("context_length", math.inf), limits.get("max_length", math.inf))
        assert ids.count(processor.frame_token_id) == sum(video.num_frames for video in taken)
        return out

    try:
        plain = check()
    except ContextOverflowError as error:
        plain, advice = None, error.settings
        if advice is not None:
            check(**advice)
    try:
        fitted = check(overflow="fit")
    except ContextOverflowError:
        assert plain is None or "max_length" in limits  # cutting the text is no fit
    else:
        assert plain is None or "max_length" in limits or fitted["video_metadata"] == plain["video_metadata"]
        assert check(overflow="fit")["video_metadata"] == fitted["video_metadata"]


@settings(max_examples=60, deadline=None)
@given(asked=st.tuples(st.integers(0, 5), st.integers(0, 6)).filter(any), limits=LIMITS, timestamps=st.booleans())
def test_one_video_gets_the_most_frames_and_then_the_most_high_ones(processor, asked, limits, timestamps):
    limits = {name: value for name, value in limits.items() if name != "max_length"}
    options = {"video_metadata": {"fps": 4.0}, "timestamps": timestamps, "return_metadata": True}
    pairs = [
        (high, frames - high) for frames in range(sum(asked), 0, -1) for high in range(min(asked[0], frames), -1, -1)
    ]

    def fits(pair):
        try:
            names = ("num_high_res_frames", "num_low_res_frames")
            processor(text="ab<video>", videos=draw(11), **options, **limits, **dict(zip(names, pair, strict=True)))
        except ContextOverflowError:
            return False
        return True

    best = next(filter(fits, pairs), None)
    how = {"num_high_res_frames": asked[0], "num_low_res_frames": asked[1], **limits, "overflow": "fit"}
    if best is None:
        with pytest.raises(ContextOverflowError):
            processor(text="ab<video>", videos=draw(11), **options, **how)
    else:
        (video,) = processor(text="ab<video>", videos=draw(11), **options, **how)["video_metadata"]
        assert counts(video) == best


def test_nothing_is_read_at_all_when_options_are_wrong(processor, clip, monkeypatch):
    monkeypatch.setattr(elva_hf.sampled_elva, "read_frames", lambda *args, **options: pytest.fail("decoded"))
    with pytest.raises(ConfigurationError):
        processor(text="<video>", videos=clip, overflow="maybe")
