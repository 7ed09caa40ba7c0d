"""Tiny SigLIP towers, chunks of frames and inflated encoders for the tests of Mavors."""

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from elva_hf.siblings.mavors.encoder_mavors import MavorsChunkEncoder
from elva_hf.siblings.mavors.towers_mavors import load_tower

SIDE, PATCH, FRAMES = 24, 4, 16
CHANNELS = 3 * PATCH**2

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def tower_config(**overrides):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "attn_implementation": "sdpa",
    }
    return SiglipVisionConfig(**{**sizes, **overrides})


def tower(dtype=torch.float64, seed=0, **overrides):
    """A random tower whose biases, which transformers sets to zero, are filled."""
    torch.manual_seed(seed)
    model = SiglipVisionModel(tower_config(**overrides)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
    return model


def chunk_encoder(source=None, chunk_frames=FRAMES, short_chunk="repeat"):
    """The encoder inflated from a tower."""
    source = source if source is not None else tower()
    encoder = MavorsChunkEncoder(source.config, chunk_frames, 2, short_chunk).to(source.dtype).eval()
    load_tower(encoder, bare_weights(source))
    return encoder


def bare_weights(source):
    return {name: weight for name, weight in source.state_dict().items() if not name.startswith("head.")}


def image(rows, columns, dtype=torch.float64, seed=0):
    """`(1, 3, H, W)` a normalised image of so many patches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, rows * PATCH, columns * PATCH, generator=generator, dtype=torch.float64).to(dtype)


def patches(frame):
    """`(1, 3, H, W)` to `(rows * columns, 3 * p * p)`, channel, row, column inside a patch."""
    return nn.functional.unfold(frame.double(), PATCH, stride=PATCH)[0].T.to(frame.dtype)
