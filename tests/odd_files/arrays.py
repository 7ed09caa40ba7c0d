"""Frames in memory; `tests/test_decoding_elva.py` has more of them."""

import numpy as np
from PIL import Image

from .records import Case, Fails, Shows, shows
from .strangers import given
from .writing import painted

FRAMES = np.stack([painted(number) for number in range(4)])
DOUBLE = np.kron(FRAMES[1], np.ones((2, 2, 1), np.uint8))
FOUR = Shows(range(4), None, facts={"duration": None, "is_image": False})
ARRAYS = [
    Case("uint8-thwc", "uint8 (T, H, W, 3)", given(FRAMES), FOUR),
    Case("uint8-tchw", "uint8 (T, 3, H, W)", given(FRAMES.transpose(0, 3, 1, 2)), FOUR),
    Case("float-thwc", "float32 in [0, 1]", given((FRAMES / 255).astype(np.float32)), FOUR),
    Case("pil-list", "list of PIL images", given([Image.fromarray(frame) for frame in FRAMES]), FOUR),
    Case("one-array", "uint8 (H, W, 3): a still", given(FRAMES[2]), shows([2], [0.0], facts={"is_image": True})),
    Case("mixed-sizes", "list of arrays of two sizes", given([FRAMES[0], DOUBLE]), Shows((0, 1), None)),
    Case("uint16", "uint16", given(FRAMES.astype(np.uint16)), Fails("bad_dtype")),
    Case("bool", "bool", given(FRAMES > 9), Fails("bad_dtype")),
    Case("float-255", "float32 in [0, 255]", given(FRAMES.astype(np.float32)), Fails("bad_range")),
    Case("normalised", "float in [-1, 1]", given(FRAMES / 127.5 - 1), Fails("bad_range")),
    Case("nan", "NaN", given(np.full((1, 8, 8, 3), np.nan)), Fails("not_finite")),
    Case("infinite", "infinity", given(np.full((1, 8, 8, 3), np.inf)), Fails("not_finite")),
    Case("no-channels", "(T, H, W, 2)", given(np.zeros((2, 9, 9, 2), np.uint8)), Fails("bad_shape")),
    Case("two-axes", "(H, W)", given(np.zeros((9, 9), np.uint8)), Fails("bad_shape")),
    Case("five-axes", "(1, T, H, W, 3)", given(FRAMES[None]), Fails("bad_shape")),
    Case("no-frames", "(0, H, W, 3)", given(FRAMES[:0]), Fails("empty")),
    Case("no-list", "an empty list", given([]), Fails("empty")),
    Case("no-pixels", "(T, 0, W, 3)", given(FRAMES[:, :0]), Fails("empty")),
    Case("tiny-array", "(T, 2, 2, 3)", given(FRAMES[:, :2, :2]), Fails("too_small")),
    Case("none", "None", given(None), Fails("bad_type")),
    Case("list-of-paths", "a list of paths", given(["a.mp4", "b.mp4"]), Fails("bad_type")),
]  # fmt: skip

CASES = {"Frames in memory": ARRAYS}
