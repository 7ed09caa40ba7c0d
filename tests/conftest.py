"""Shared fixtures: one thread, one seed, and a tiny model with random weights."""

import pytest
import torch
from tiny_elva import tiny_config, tiny_model

torch.set_num_threads(1)

collect_ignore = ["mixins"]  # run by `make mixins` (scripts/run_mixins.py)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def config():
    """A fresh tiny `ElvaConfig`."""
    return tiny_config()


@pytest.fixture(scope="session")
def model():
    """A tiny `ElvaForCausalLM` in eval mode, shared: do not change it."""
    return tiny_model()
