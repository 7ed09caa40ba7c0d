"""Clips whose every frame carries its own number, and a bare byte-level tokenizer, for the tests of the way in."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BITS, CELL = 8, 16
THOUSANDTH = Fraction(1, 1000)
HEIGHT, WIDTH = 48, BITS * CELL
MAKERS = {
    "mp4": ("libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "mkv": ("libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "webm": ("libvpx-vp9", "yuv420p", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "gif": ("gif", "rgb8", {}),
    "ts": ("libx264", "yuv420p", {"g": "12", "bf": "2"}),
    "avi": ("mpeg4", "yuv420p", {"g": "12"}),
}


def paint(number, height=HEIGHT):
    """`(height, WIDTH, 3)` uint8: the number in black and white cells, most significant first; dark at the bottom."""
    bits = [(number >> (BITS - 1 - i)) & 1 for i in range(BITS)]
    frame = np.repeat(np.array(bits, np.uint8) * 200 + 28, CELL)[None, :, None]
    frame = np.broadcast_to(frame, (height, WIDTH, 3)).copy()
    frame[height // 2 :] = 28
    return frame


def read(frame):
    """The number in a `(C, h, w)` frame of any size."""
    upper = torch.as_tensor(frame)[:, : frame.shape[1] // 4].float().mean((0, 1))
    cells = upper[: len(upper) // BITS * BITS].view(BITS, -1).mean(1)
    return sum(int(cell > 128) << (BITS - 1 - i) for i, cell in enumerate(cells))


def write_counter(path, num_frames=40, rate=25, pts=None, rotation=None, codec=None, options=None):
    """Encode numbered frames; `pts` gives each frame's time in 1/1000 s."""
    kind = Path(path).suffix[1:]
    name, pixels, defaults = MAKERS[kind]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or name, rate=rate, options={**defaults, **(options or {})})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
        if pts is not None:
            stream.codec_context.time_base = THOUSANDTH
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(paint(number), format="rgb24").reformat(format=pixels)
            if pts is not None:
                frame.pts, frame.time_base = pts[number], THOUSANDTH
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def write_sound(path):
    """A file without pictures."""
    with av.open(str(path), "w") as container:
        codec, form = ("pcm_s16le", "s16") if Path(path).suffix == ".wav" else ("aac", "fltp")
        stream = container.add_stream(codec, rate=16000, layout="mono")
        kind = np.int16 if form == "s16" else np.float32
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), kind), format=form, layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)


def byte_tokenizer(*, bos=False):
    """256 bytes and `<pad>`, `<eos>`, `<bos>`; with `bos=True` it opens every text with `<bos>`, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", **({"bos_token": "<bos>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
