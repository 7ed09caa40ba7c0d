"""Samples, moving pictures, schedules and models for the tests of merging.

Tiny random models tell no two random patches alike, so pixels move slowly: each place of a grid is a
walk through time, and a schedule merges some of its neighbours and not all.
"""

import copy
from types import MethodType

import torch
from tiny_elva import END, FRAME, LINE, PATCH, PIXELS, START, batch, tiny_model, video, with_pixels, words

LAYERS = 6
EXACT = 1e-10

BUSY = (
    words(3, 1) + video(*6 * [(2, 2)]) + words(4, 2),
    words(1, 3) + video((1, 3)) + words(2, 4) + video(*5 * [(2, 1)]) + video((2, 1)) + words(5, 5),
    words(6, 6),
    video(*3 * [(3, 2), (1, 2), (1, 2)], marks=[words(2, 7), [], words(1, 8)]) + words(2, 9),
    words(2, 10) + video((1, 1), (1, 1), (2, 1), (1, 1)) + words(1, 11) + video(*4 * [(1, 2)]),
)
"""Videos of one grid and of two in turn, images, adjacent videos, a text-only row, text between frames, none after."""

SCHEDULES = {
    "none": "none",
    "never": [{"layer": 1, "similarity_threshold": 1.5}, {"layer": 3, "target_ratio": 1.0}],
    "threshold": [{"layer": 1, "similarity_threshold": 0.8}],
    "thresholds": [{"layer": 1, "similarity_threshold": 0.85}, {"layer": 3, "similarity_threshold": 0.7}],
    "ratio": [{"layer": 2, "target_ratio": 0.5}],
    "ratios": [{"layer": 1, "target_ratio": 0.8}, {"layer": 2, "target_ratio": 0.7}, {"layer": 4, "target_ratio": 0.6}],
    "paper": {"steps": [{"layer": 1, "similarity_threshold": 0.85}, {"layer": 2, "similarity_threshold": 0.8},
                        {"layer": 3, "target_ratio": 0.5}]},
    "table5": "table5",
    "of input": {"steps": [{"layer": 1, "similarity_threshold": 0.85}, {"layer": 3, "target_ratio": 0.6},
                           {"layer": 5, "target_ratio": 0.4}], "ratio_of": "input"},
    "max_run": {"steps": [{"layer": 1, "similarity_threshold": 0.9}, {"layer": 3, "target_ratio": 0.5}], "max_run": 2},
    "window": {"steps": [{"layer": 1, "similarity_threshold": 0.7}, {"layer": 3, "target_ratio": 0.6}], "window": 3},
    "window and max_run": {"steps": [{"layer": 1, "target_ratio": 0.8}, {"layer": 4, "target_ratio": 0.5}],
                           "window": 4, "max_run": 2},
    "first": {"steps": [{"layer": 1, "similarity_threshold": 0.8}, {"layer": 3, "target_ratio": 0.6}],
              "survivor": "first"},
}  # fmt: skip
"""Every policy, alone and mixed, over the six layers of `deep_model`."""

MERGING = {name: value for name, value in SCHEDULES.items() if name not in ("none", "never")}
MIXED = SCHEDULES["paper"]


def deep_model(model_type="qwen2", seed=0, text=None, **overrides):
    """A tiny model of six layers, in float32 and eval mode."""
    return tiny_model(model_type, seed, {"num_hidden_layers": LAYERS, **(text or {})}, **overrides)


def double_model(model_type="qwen2", seed=0, text=None, **overrides):
    """The same in float64, every operation of it: the norms and the rotary angles too.

    The front end is the one without cross-attention, whose sums are in float32 by design.
    """
    return in_double(deep_model(model_type, seed, text, **{"patch_embed_type": "naive", **overrides}))


def in_double(module):
    """Cast a module to float64 and take the float32 casts out of its norms and rotary embeddings, in place."""
    module.double()
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = MethodType(_norm_in_double, part)
        elif type(part).__name__.endswith("RotaryEmbedding"):
            part.forward = MethodType(_rotary_in_double, part)
    return module


def _norm_in_double(norm, hidden):
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def _rotary_in_double(rotary, hidden, position_ids):
    angles = position_ids[..., None].double() * rotary.inv_freq.double()
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def moving_pixels(ids, seed=0, change=0.6):
    """`(P, PIXELS)` patches of one sample, each place of each grid a walk; None if the sample has none.

    A step changes a place by a random share of `change`, so neighbours in time are alike to differing degrees.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn, places, rows = [], {}, []
    for token in [*ids, START]:
        if token in (START, FRAME, END) and rows and any(rows):
            grid = (len(rows) - 1, len(rows[0]))
            for r, row in enumerate(rows[:-1]):
                for c in range(len(row)):
                    noise = torch.randn(PIXELS, generator=generator)
                    share = change * torch.rand((), generator=generator)
                    before = places.get((*grid, r, c))
                    now = noise if before is None else (1 - share**2).sqrt() * before + share * noise
                    places[*grid, r, c] = now
                    drawn.append(now)
            rows = []
        if token == START:
            places = {}
        elif token == FRAME:
            rows = [[]]
        elif token == PATCH:
            rows[-1].append(token)
        elif token == LINE:
            rows.append([])
    return torch.stack(drawn) if drawn else None


def movie(ids, seed=0, dtype=torch.float64):
    """A batch of one with moving pixels and explicit positions."""
    return movies([ids], seeds=[seed], dtype=dtype)


def movies(samples, side="left", seeds=None, dtype=torch.float64):
    """A padded batch; sample `i` has the pixels of `movie(samples[i], seeds[i])`, where seeds count up from 0."""
    seeds = range(len(samples)) if seeds is None else seeds
    drawn = [moving_pixels(ids, seed) for ids, seed in zip(samples, seeds, strict=True)]
    drawn = [patches.to(dtype) for patches in drawn if patches is not None]
    inputs = batch(samples, side)
    inputs["position_ids"] = positions(inputs["attention_mask"])
    return with_pixels(inputs, torch.cat(drawn) if drawn else None)


def positions(mask):
    """Positions of a padded batch as generate() counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def without(inputs, *names):
    return {name: value for name, value in inputs.items() if name not in names}


def rows_of(tensor, inputs):
    """The real tokens of each row of a `(B, N, ...)` output, padding taken out."""
    return [row[real.bool()] for row, real in zip(tensor, inputs["attention_mask"], strict=True)]


def assert_exact(actual, expected, bound=EXACT):
    """Equal to `bound`, relative to the largest value where that exceeds one."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    worst = float((actual - expected).abs().max()) if expected.numel() else 0.0
    assert worst <= bound * scale, f"differs by {worst:.2e}, largest value {scale:.2e}"


def gradients(model):
    """Gradient of every parameter by name; None becomes zeros."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def copy_of(model):
    """A deep copy with gradients cleared."""
    twin = copy.deepcopy(model)
    twin.zero_grad(set_to_none=True)
    return twin
