"""Tiny random Mavors models and hand-built token sequences for its tests."""

import torch
from tiny_elva import END, FRAME, IMAGE, LINE, PATCH, START, batch, tiny_text_config, with_pixels, words
from torch import nn

from elva_hf.siblings.mavors.chunks_mavors import POSITION_UNIT
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM
from elva_hf.siblings.mavors.rows_mavors import header

SQUARE, CHUNK = 8, 4


def mavors_config(text=None, vision=None, **overrides):
    fields = {
        "text_config": tiny_text_config(**(text or {})),
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": SQUARE // 2,
            "vision_use_head": False,
            **(vision or {}),
        },
        "patch_size": SQUARE,
        "chunk_frames": CHUNK,
        "longest_edge": 64,
        "low_res_longest_edge": 32,
        "initializer_range": 0.3,
        "video_start_token_id": START,
        "video_end_token_id": END,
        "video_token_id": PATCH,
        "frame_token_id": FRAME,
        "line_token_id": LINE,
        "image_token_id": IMAGE,
    }
    return MavorsConfig(**{**fields, **overrides})


def mavors_model(seed=0, text=None, filled=True, dtype=torch.float32, **overrides):
    """A random model; `filled` draws what starts at zero too, so that every part of it acts."""
    torch.manual_seed(seed)
    model = MavorsForCausalLM(mavors_config(text, **overrides)).eval()
    if filled:
        with torch.no_grad():
            for parameter in model.model.patch_embed.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


class Clip:
    """A video or image of a sample: chunks of `(frames, rows, columns)` tokens, and where they are in time."""

    def __init__(self, chunks, positions=None):
        self.chunks = chunks
        self.positions = positions or [index * POSITION_UNIT for index in range(len(chunks))]

    @property
    def ids(self):
        ids = [START]
        for _, rows, columns in self.chunks:
            ids += [FRAME, *(columns - 1) * [PATCH], *(rows - 1) * [LINE, *(columns - 1) * [PATCH]]]
        return [*ids, END]

    def rows(self, seed=0, change=1.0):
        """Rows of pixels: each place of the grid a walk through the chunks, in steps of `change`."""
        generator = torch.Generator().manual_seed(seed)
        rows, now = [], {}
        for (frames, height, width), position in zip(self.chunks, self.positions, strict=True):
            for place in range(height * width):
                drawn = torch.randn(frames, 3 * SQUARE**2, generator=generator)
                before = now.get((height, width, place))
                values = drawn if before is None else (1 - change**2) ** 0.5 * before + change * drawn[0]
                values = values if before is None or frames == len(before) else values[:frames]
                now[height, width, place] = values
                for frame in range(frames):
                    rows.append(torch.cat([values[frame], torch.tensor(header(frame, position))]))
        return torch.stack(rows)


def film(*lengths, grid=(2, 3), positions=None):
    """A video whose chunks have so many frames."""
    return Clip([(frames, *grid) for frames in lengths], positions)


def picture(*grids):
    """An image: a thumbnail and sub-images of these grids."""
    return Clip([(1, *grid) for grid in grids], [0] * len(grids))


SAMPLES = (
    [words(3, 1), film(4, 4, 2), words(4, 2)],
    [
        words(1, 3),
        picture((1, 2), (2, 2), (2, 2)),
        words(2, 4),
        film(4, grid=(1, 1)),
        film(3, grid=(2, 1)),
        words(2, 5),
    ],
    [words(6, 6)],
    [film(4, 4, 4, grid=(1, 3), positions=[0, 3 * POSITION_UNIT, 7_500_000]), words(2, 9)],
)
"""Videos of several lengths and grids, an image with sub-images, a text-only row, an accelerated video."""


def ids_of(sample):
    return [token for part in sample for token in (part.ids if isinstance(part, Clip) else part)]


def rows_of_sample(sample, seed=0, change=1.0):
    clips = [part for part in sample if isinstance(part, Clip)]
    return torch.cat([clip.rows(100 * seed + i, change) for i, clip in enumerate(clips)]) if clips else None


def sample_inputs(sample, seed=0, change=1.0):
    """A batch of one."""
    return with_pixels(batch([ids_of(sample)]), rows_of_sample(sample, seed, change))


def batch_inputs(samples, side="left", change=1.0):
    """A padded batch; sample `i` has the pixels of `sample_inputs(samples[i], i)`."""
    rows = [rows_of_sample(sample, i, change) for i, sample in enumerate(samples)]
    rows = [part for part in rows if part is not None]
    return with_pixels(batch([ids_of(sample) for sample in samples], side), torch.cat(rows) if rows else None)
