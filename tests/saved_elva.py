"""A tiny random checkpoint on disk and short clips, for the tests of the pipeline and the command line.

Answers of a random model mean nothing, but they depend on every pixel and every word of the prompt.
"""

from pathlib import Path

import av
import numpy as np
import torch

from elva_hf.configuration_elva import SPECIAL_TOKENS, ElvaConfig
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.video_processing_elva import ElvaVideoProcessor

QUESTION = "What color is the square?"


def build_checkpoint():
    """A random model and its processor; 8 frames of at most 64x64, patches of 16."""
    torch.manual_seed(0)
    tokenizer = build_toy_tokenizer()
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_TOKENS.items()}
    config = ElvaConfig.from_preset("tiny", **ids)
    config.initializer_range = config.text_config.initializer_range = 0.2
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.max_position_embeddings = 2048
    model = ElvaForCausalLM(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    video_processor = ElvaVideoProcessor(patch_size=16, longest_edge=64, low_res_longest_edge=32, num_frames=8)
    return model, ElvaProcessor(tokenizer=tokenizer, video_processor=video_processor)


def save_checkpoint(folder):
    model, processor = build_checkpoint()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def draw_frames(seed=0, num_frames=8, height=64, width=64):
    """`(T, H, W, 3)` uint8: a bright square wandering over a coloured ground."""
    generator = np.random.default_rng(seed)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    frames[:] = generator.integers(0, 120, 3)
    color = generator.integers(130, 255, 3)
    for t in range(num_frames):
        row, column = generator.integers(0, height - 16), generator.integers(0, width - 16)
        frames[t, row : row + 16, column : column + 16] = color
    return frames


def write_clip(path, frames, rate=8):
    """Encode frames as H.264 in whatever container the suffix names."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def write_sound(path):
    """An mp4 without pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Path(path)
