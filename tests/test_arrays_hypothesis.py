"""Arrays and images of any shape, type, layout and value: the frames a plain reading gives, or one clear error."""

import io
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutating import check_error, check_video
from PIL import Image

from elva_hf.decoding_elva import read_video
from elva_hf.errors_elva import ConfigurationError, VideoError
from elva_hf.frames_elva import FramePlan

ci = settings(max_examples=400, deadline=None, derandomize=True)

SIDES = st.sampled_from([0, 1, 3, *range(4, 10), 4, 4, 16, 16])
CHANNELS = st.sampled_from([0, 1, 2, 3, 3, 3, 4, 4, 5])
VALUES = st.sampled_from(["usable", "usable", "usable", "nan", "inf", "-inf", "negative", "large", "tiny negative"])
KINDS = ["u1", "u1", "u1", "u1", "f4", "f8", ">f4", "f2", "g", "i1", "i8", "u2", "?", "c8", "O", "U3", "S2", "M8[s]"]
NUMPY_TYPES = st.sampled_from([*KINDS, "m8[s]", "V3", [("r", "u1"), ("g", "f4")]])
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
TORCH_TYPES = st.sampled_from(
    [torch.uint8, torch.uint8, torch.uint8, *FLOATS, torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint16]
)
MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
]
MODES += ["I;16B", "I;16L"]


@st.composite
def shapes(draw, least=0, most=6):
    """Mostly what a video or an image may have; now and then anything."""
    if draw(st.integers(0, 9)) == 0:
        return tuple(draw(st.lists(SIDES, min_size=least, max_size=most)))
    frame = [draw(SIDES), draw(SIDES)]
    frame.insert(draw(st.sampled_from([0, 2])), draw(CHANNELS))
    return tuple(frame) if draw(st.booleans()) else (draw(st.sampled_from([0, 1, 2, 3, 4, 5])), *frame)


def fill(shape, dtype, values, seed):
    """An array of any type; floating-point ones are in [0, 1] but for one value."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind != "f":
        numbers = rng.integers(0, 256, shape)
        return np.asarray(numbers, np.uint8).astype(dtype) if dtype.names is None else np.zeros(shape, dtype)
    array = np.asarray(rng.integers(0, 1025, shape) / 1024)
    if array.size and values != "usable":
        spoilt = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "negative": -0.5, "large": 255.0}
        array.flat[rng.integers(array.size)] = spoilt.get(values, -1e-7)
    return array.astype(dtype)


@st.composite
def numpy_arrays(draw, least=0):
    array = fill(draw(shapes(least)), draw(NUMPY_TYPES), draw(VALUES), draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(["plain", "fortran", "reversed", "strided", "read-only", "broadcast", "unaligned"]))
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "reversed" and array.ndim:
        return array[(slice(None, None, -1),) * array.ndim]
    if layout == "strided" and array.ndim:
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "broadcast" and array.ndim and len(array) == 1:
        return np.broadcast_to(array, (3, *array.shape[1:]))
    if layout == "unaligned" and not array.dtype.hasobject and array.size:
        copy = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:]
        return copy.view(array.dtype).reshape(array.shape)
    if layout == "read-only":
        array.flags.writeable = False
    return array


@st.composite
def tensors(draw, least=0):
    dtype = draw(TORCH_TYPES)
    array = fill(draw(shapes(least)), "f8" if dtype.is_floating_point else "u1", draw(VALUES), draw(st.integers(0, 99)))
    tensor = torch.from_numpy(array).to(dtype)
    layout = draw(
        st.sampled_from(["plain", "plain", "moved", "gradient", "expanded", "negative bit", "sparse", "meta"])
    )
    if layout == "moved" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gradient" and dtype in FLOATS[:4]:
        return tensor.requires_grad_()
    if layout == "expanded" and tensor.ndim and len(tensor) == 1:
        return tensor.expand(3, *tensor.shape[1:])
    if layout == "negative bit" and dtype in FLOATS[:2]:
        return torch.complex(tensor, -tensor).conj().imag
    if layout == "sparse" and dtype in (torch.uint8, torch.float32):
        return tensor.to_sparse()
    return tensor.to("meta") if layout == "meta" else tensor


@st.composite
def images(draw):
    mode, height, width = draw(st.sampled_from(MODES)), draw(SIDES), draw(SIDES)
    pixels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (16, 16, 4), np.uint8)
    try:
        image = Image.new(mode, (width, height)) if 0 in (height, width) else Image.frombytes(
            mode, (width, height), pixels.tobytes()[: len(Image.new(mode, (width, height)).tobytes())]
        )  # fmt: skip
    except (ValueError, KeyError):
        return Image.new("L", (4, 4))
    if mode in ("L", "RGB", "P", "1") and draw(st.booleans()):
        image.info["transparency"] = draw(st.sampled_from([0, 7, (1, 2, 3), b"\0\x80", bytes(256)]))
    return image


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3), st.just(object()),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2), st.lists(st.integers(), max_size=2),
    st.sampled_from([np, np.float32(1)]),
)  # fmt: skip
RATES = st.sampled_from([None, None, None, 25, 29.97, 1e-3, 0.5, Fraction(30000, 1001), np.float32(24), 1000])
BAD_RATES = [-1, -25.0, math.nan, math.inf, -math.inf, "25", True, (25, 1), [25], {}, 1e-320, 1e320, 10**400, 10**5000]
BAD_RATES += [b"25", 3j, np.eye(2), object()]


def try_reading(source, fps=None, plan=None):
    """What `read_video` gives, checked in form; or the error, which is of a kind that may be raised."""
    asked = {}

    def every(info):
        count = min(info.num_frames, 8)
        asked["plan"] = FramePlan(tuple(range(count)), (True,) * count, count)
        return asked["plan"]

    try:
        video = read_video(source, plan or every, keep, fps=fps)
    except VideoError as error:
        check_error(error)
        return error
    except ConfigurationError as error:
        assert "\n" not in str(error)
        return error
    check_video(video, asked["plan"], keep)
    return video


def keep(height, width, high):
    return height, width


# The oracle


def complaints(array, *, is_frame=False):
    """Every reason for which an array is no video (or, in a list, no frame)."""
    shape, found = tuple(array.shape), set()
    usable_axes = (3,) if is_frame else (3, 4)
    if len(shape) not in usable_axes or not {shape[-1], shape[-3]} & {1, 3, 4}:
        found.add("bad_shape")
    elif min(shape[-3:-1] if channels_stand_last(shape) else shape[-2:]) < 4:
        found.add("too_small")
    if 0 in shape:
        found.add("empty")
    values = plain(array)
    if values is None:
        return found | {"bad_dtype"}
    if values.dtype == np.uint8 or 0 in shape:
        return found
    if not np.isfinite(values).all():
        found.add("not_finite")
    if (values < 0).any() or (values > 1).any():
        found.add("bad_range")
    return found


def plain(array):
    """The values as numpy uint8 or float64; None of any other type."""
    if isinstance(array, torch.Tensor):
        if array.dtype == torch.uint8:
            return array.detach().to_dense().numpy()
        return array.detach().to_dense().double().resolve_neg().numpy() if array.is_floating_point() else None
    return array if array.dtype == np.uint8 else array.astype(np.float64) if array.dtype.kind == "f" else None


def channels_first(frame):
    """`(C, H, W)` of `(H, W, C)` or `(C, H, W)`; where both may be, three channels stand last and others first."""
    return frame.transpose(2, 0, 1) if channels_stand_last(frame.shape) else frame


def channels_stand_last(shape):
    return shape[-1] in (1, 3, 4) and not (shape[-3] in (1, 3, 4) and shape[-1] != 3)


def levels(frame):
    """`(3, H, W)` levels from 0 to 255, not rounded, of `(C, H, W)`; transparent ones lie on white."""
    frame = frame * (1.0 if frame.dtype == np.uint8 else 255.0)
    if len(frame) == 4:
        return (frame[:3] * frame[3:] + 255.0 * (255.0 - frame[3:])) / 255.0
    return np.broadcast_to(frame, (3, *frame.shape[1:]))


def compare(video, frames):
    """Each frame is the nearest whole levels of `(C, H, W)`; laid on white from rounded levels, further off."""
    for got, frame in zip(video.frames, frames, strict=False):
        off = np.abs(got.numpy().astype(np.float64) - levels(frame))
        assert off.max() <= (1.51 if len(frame) == 4 and frame.dtype != np.uint8 else 0.501)


def judge(result, source, reasons, frames, may_refuse=()):
    if reasons:
        assert isinstance(result, VideoError), f"accepted {source!r}, which has {reasons}"
        assert result.reason in {*reasons, *may_refuse}, f"{result.reason}, not {reasons}: {result}"
    elif isinstance(result, VideoError):
        assert result.reason in may_refuse, result
    else:
        compare(result, map(channels_first, frames))


@given(numpy_arrays())
@ci
def test_a_numpy_array_is_read_as_it_is_or_refused_for_what_is_wrong_with_it(array):
    before = array.copy()
    result = try_reading(array)
    reasons = complaints(array)
    values = None if reasons else plain(array)
    judge(result, array, reasons, values if array.ndim == 4 else [values])
    if not isinstance(result, VideoError):
        for frame in result.frames:
            frame.fill_(7)
    assert array.tobytes() == before.tobytes()  # neither written to nor shared


@given(tensors())
@ci
def test_a_tensor_is_read_as_it_is_or_refused_for_what_is_wrong_with_it(tensor):
    result = try_reading(tensor)
    if tensor.is_meta:
        assert isinstance(result, VideoError)
        return
    reasons = complaints(tensor)
    values = None if reasons else plain(tensor)
    may_refuse = {"bad_type"} if tensor.is_sparse else {"bad_dtype"} if tensor.dtype in FLOATS[4:] else set()
    judge(result, tensor, reasons, values if tensor.ndim == 4 else [values], may_refuse)


@pytest.mark.parametrize("dtype", FLOATS[:4])
def test_a_view_that_only_torch_understands_is_read(dtype):
    values = torch.rand(2, 5, 6, 3).to(dtype)
    views = [values.requires_grad_(), values.detach().transpose(1, 2).contiguous().transpose(1, 2)]
    if dtype in FLOATS[:2]:
        views.append(torch.complex(values, -values).conj().imag)
        assert views[-1].is_neg()
    for view in views:
        compare(try_reading(view), map(channels_first, plain(view)))


@given(st.lists(numpy_arrays(3) | tensors(3), min_size=1, max_size=3))
@ci
def test_a_list_of_arrays_is_read_frame_by_frame(frames):
    result = try_reading(frames)
    if any(isinstance(frame, torch.Tensor) and frame.is_meta for frame in frames):
        assert isinstance(result, VideoError)
        return
    reasons = set().union(*(complaints(frame, is_frame=True) for frame in frames))
    values = [] if reasons else [plain(frame) for frame in frames]
    may_refuse = set()
    if any(isinstance(frame, torch.Tensor) and (frame.is_sparse or frame.dtype in FLOATS[4:]) for frame in frames):
        may_refuse = {"bad_type", "bad_dtype"}
    if (
        len({channels_first(frame).shape[1:] for frame in values}) > 1
    ):  # frames of several sizes: the first one's is kept
        assert isinstance(result, VideoError) or {frame.shape for frame in result.frames} == {result.frames[0].shape}
    else:
        judge(result, frames, reasons, values, may_refuse)


@given(images(), st.booleans())
@ci
def test_an_image_of_any_mode_is_read_as_pillow_shows_it(image, alone):
    result = try_reading(image if alone else [image, image])
    if 0 in image.size:
        assert isinstance(result, VideoError) and result.reason == "empty"
    elif image.mode in ("I", "F"):  # of no known range
        assert isinstance(result, VideoError) and result.reason in ("bad_range", "too_small")
    elif isinstance(result, VideoError):
        assert result.reason in ("bad_image" if "transparency" in image.info else "", "too_small")
        assert result.reason == "bad_image" or min(image.size) < 4
    elif image.mode.startswith("I;16"):
        gray = np.asarray(image).astype(np.float64)[None] / 65535
        compare(result, [gray] * len(result.frames))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        compare(result, [np.asarray(image.convert("RGBA")).transpose(2, 0, 1)] * len(result.frames))
    elif image.mode not in ("La", "RGBa"):
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        assert all(np.array_equal(frame.numpy(), expected) for frame in result.frames)


def test_an_image_of_colours_times_opacity_is_read_as_one_with_both():
    straight = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8))
    expected = try_reading(straight).frames[0].int()
    assert (try_reading(straight.convert("RGBa")).frames[0].int() - expected).abs().max() <= 3
    gray = straight.convert("LA")
    assert (try_reading(gray.convert("La")).frames[0].int() - try_reading(gray).frames[0].int()).abs().max() <= 3


@pytest.mark.parametrize("alone", [True, False])
def test_a_float_image_from_0_to_1_is_read_and_any_other_refused(alone):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for spoilt, reasons in ((0.5, None), (-0.1, "bad_range"), (2, "bad_range"), (math.nan, "bad_range not_finite")):
        values[3, 3] = spoilt
        image = Image.fromarray(values)
        result = try_reading(image if alone else [image])
        if reasons:
            assert result.reason in reasons.split()
        else:
            compare(result, [values[None].astype(np.float64)])


@given(st.lists(st.one_of(ANYTHING, images(), numpy_arrays(), tensors()), max_size=4), st.sampled_from([list, tuple]))
@ci
def test_a_list_of_anything_is_a_video_or_one_clear_error(items, kind):
    result = try_reading(kind(items))
    kinds = {
        "image" if isinstance(item, Image.Image) else isinstance(item, (np.ndarray, torch.Tensor)) for item in items
    }
    if not items:
        assert result.reason == "empty"
    elif len(kinds) > 1 or kinds == {False}:
        assert result.reason == "bad_type"


@given(ANYTHING.filter(lambda thing: not isinstance(thing, (str, bytes, list))))
@ci
def test_anything_else_is_no_video(thing):
    assert try_reading(thing).reason == "bad_type"


@given(RATES, st.integers(1, 5))
@ci
def test_a_known_rate_gives_times(fps, count):
    video = try_reading(np.zeros((count, 4, 4, 3), np.uint8), fps)
    if fps is None:
        assert video.times is None and video.info.duration is None
    else:
        assert video.times == pytest.approx([i / fps for i in range(count)])
        assert video.info.duration == pytest.approx(count / fps)


@pytest.mark.parametrize("fps", BAD_RATES, ids=range(len(BAD_RATES)))
def test_a_rate_that_is_none_is_refused(fps):
    for source in (np.zeros((2, 4, 4, 3), np.uint8), [Image.new("L", (4, 4))] * 2):
        assert isinstance(try_reading(source, fps), (VideoError, ConfigurationError))


@pytest.mark.parametrize("dtype", ["u1", "f2", "f8"])
@pytest.mark.parametrize(
    "shape", [(10**6, 1000, 1000, 3), (10**9, 4, 4, 3), (1, 10_000, 10_000, 3), (10_000, 10_000, 3)]
)
def test_an_array_that_claims_more_than_there_is_is_refused_unread(shape, dtype):
    giant = np.broadcast_to(np.zeros((1,) * len(shape), dtype), shape)
    tensor = torch.from_numpy(np.zeros((1,) * len(shape), dtype)).expand(shape)
    for source in (giant, tensor, *([[giant], [tensor] * 2] if len(shape) == 3 else [])):
        started = time.process_time()
        assert try_reading(source).reason.startswith("too_many")
        assert time.process_time() - started < 1


def test_a_picture_that_claims_more_than_there_is_is_refused_unread():
    file = io.BytesIO()
    Image.new("1", (8000, 5000)).save(file, "PNG")
    assert len(file.getvalue()) < 20_000
    for alone in (True, False):
        image = Image.open(file)
        assert try_reading(image if alone else [image]).reason == "too_many_pixels"


def test_an_image_whose_file_is_cut_or_closed_is_one_clear_error(tmp_path):
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    for source in (Image.open(tmp_path / "cut.png"), [Image.open(tmp_path / "cut.png")]):
        assert try_reading(source).reason == "bad_image"
    closed = Image.open(tmp_path / "whole.png")
    closed.close()
    assert try_reading(closed).reason == "bad_image"


def test_a_name_that_never_ends_is_cut_in_the_message():
    deep = np.zeros((1,) * 60 + (0, 10**9, 10**9))
    many = [type("Kind" * 20 + str(number), (), {})() for number in range(50)]
    for source in (deep, [deep, deep], many, type("K" * 1000, (), {})()):
        assert isinstance(try_reading(source), VideoError)
