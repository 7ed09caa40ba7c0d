"""Tiny random models and hand-built token sequences for the tests of the model.

A sample is a list of ids put together from `words(...)` and `video(...)`; `batch(...)` pads samples
and `pixels(...)` draws the patches they ask for.
"""

import math

import torch
from torch import nn

from elva_hf.configuration_elva import ElvaConfig
from elva_hf.modeling_elva import ElvaForCausalLM

PAD, BOS, EOS = 0, 1, 2
START, END, PATCH, FRAME, LINE, IMAGE = range(3, 9)
FIRST_WORD, VOCAB = 9, 99
PATCH_SIZE = 4
PIXELS = 3 * PATCH_SIZE**2
TEXT_TYPES = ("qwen2", "qwen3", "llama", "mistral")


def tiny_text_config(model_type="qwen2", **overrides):
    text = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # random models with the usual 0.02 repeat one token, whatever they see
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": None,
    }
    return {**text, **overrides}


def tiny_config(model_type="qwen2", text=None, **overrides):
    fields = {
        "text_config": tiny_text_config(model_type, **(text or {})),
        "patch_size": PATCH_SIZE,
        "patch_embed_dim": 16,
        "patch_embed_num_heads": 2,
        "initializer_range": 0.3,
        "video_start_token_id": START,
        "video_end_token_id": END,
        "video_token_id": PATCH,
        "frame_token_id": FRAME,
        "line_token_id": LINE,
        "image_token_id": IMAGE,
    }
    return ElvaConfig(**{**fields, **overrides})


def tiny_model(model_type="qwen2", seed=0, text=None, **overrides):
    torch.manual_seed(seed)
    return ElvaForCausalLM(tiny_config(model_type, text, **overrides)).eval()


def words(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCAB, (count,), generator=generator).tolist()


def video(*grids, marks=()):
    """Ids of a video: one `(rows, columns)` per frame; `marks[i]` are words before frame `i`."""
    ids = [START]
    for i, (rows, columns) in enumerate(grids):
        ids += list(marks[i]) if i < len(marks) else []
        ids += [FRAME] + rows * (columns * [PATCH] + [LINE])
    return [*ids, END]


def batch(samples, side="left"):
    """Pad samples to `input_ids` and `attention_mask`, both `(B, N)`."""
    longest = max(map(len, samples))
    rows, mask = [], []
    for ids in samples:
        padding = (longest - len(ids)) * [PAD]
        rows.append(padding + ids if side == "left" else ids + padding)
        real = len(ids) * [1]
        mask.append((len(padding) * [0] + real) if side == "left" else (real + len(padding) * [0]))
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def pixels(ids, seed=0):
    """`(P, PIXELS)` random patches for a sample (list of ids) or a batch of ids; None if it has none."""
    count = int((torch.as_tensor(ids) == PATCH).sum())
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, PIXELS, generator=generator) if count else None


def sample_inputs(ids, seed=0):
    """A batch of one."""
    return with_pixels(batch([ids]), pixels(ids, seed))


def batch_inputs(samples, side="left"):
    """A padded batch; sample `i` has the pixels of `sample_inputs(samples[i], i)`."""
    drawn = [pixels(ids, i) for i, ids in enumerate(samples)]
    drawn = [patches for patches in drawn if patches is not None]
    return with_pixels(batch(samples, side), torch.cat(drawn) if drawn else None)


def with_pixels(inputs, patches):
    return inputs if patches is None else {**inputs, "pixel_values_videos": patches}


RAGGED = (
    words(3, 1) + video((2, 2), (2, 2), (1, 1)) + words(4, 2),
    words(1, 3) + video((1, 3)) + words(2, 4) + video((2, 1), (2, 1)) + video((2, 1)) + words(5, 5),
    words(6, 6),
    video((3, 2), (1, 2), (3, 2), (1, 2), marks=[words(2, 7), [], words(1, 8)]) + words(2, 9),
)
"""Videos of different length and size, several in one sample, text between frames, and a text-only row."""


def embed_in_a_loop(embedding, pixels, ids, config):
    """Embeddings of all patch, frame and line tokens of a batch, one frame and one row at a time, in float64."""
    embedding = embedding.double()
    attention = embedding.cross_attention
    features = iter(embedding.pixel_proj(pixels.double()))

    def see(which, members):
        token = embedding.special_tokens[which]
        if attention is None:
            return token
        norm = attention.norm
        q, k, v = attention.q_proj(norm(token)), attention.k_proj(norm(members)), attention.v_proj(norm(members))
        heads = (
            nn.functional.softmax(k_h @ q_h / math.sqrt(len(q_h)), 0) @ v_h
            for q_h, k_h, v_h in zip(
                q.chunk(attention.num_heads),
                k.chunk(attention.num_heads, -1),
                v.chunk(attention.num_heads, -1),
                strict=True,
            )
        )
        seen = attention.o_proj(torch.cat(list(heads)))
        return token + seen if config.patch_embed_residual else seen

    patches, frames, lines = [], [], []
    for sample in ids.tolist():
        in_frame, in_row = None, []
        for token in [*sample, FRAME]:  # the extra <FRAME> closes the last frame
            if token == FRAME and in_frame:
                frames.append(see(0, torch.stack(in_frame)))
                in_frame = None
            if token == FRAME:
                in_frame, in_row, row = [], [], 0
            elif token == PATCH:
                feature = next(features)
                if embedding.positions is not None:
                    feature = feature + embedding.positions[0, row] + embedding.positions[1, len(in_row)]
                patches.append(feature)
                in_frame.append(feature)
                in_row.append(feature)
            elif token == LINE:
                lines.append(see(1, torch.stack(in_row)))
                in_row, row = [], row + 1
    return [embedding.out_proj(torch.stack(part)) for part in (patches, frames, lines)]
