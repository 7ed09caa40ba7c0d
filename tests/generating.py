"""Ways of generating that the tests compare."""

import torch

NEW = 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
BEAMS = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}


def new_tokens(out, inputs):
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()
