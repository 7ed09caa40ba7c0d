"""`processor.plan`: what files and arrays cost a model, before anything is decoded."""

import numpy as np
import pytest
import torch
from clips_elva import byte_tokenizer, write_counter
from tiny_elva import tiny_config

from elva_hf.errors_elva import ConfigurationError, VideoError
from elva_hf.ledger_elva import plan_tokens
from elva_hf.processing_elva import ElvaProcessor

OPTIONS = {"patch_size": 4, "longest_edge": 16, "low_res_longest_edge": 8, "num_frames": 3}


@pytest.fixture(scope="module")
def processor():
    return ElvaProcessor.from_tokenizer(byte_tokenizer(), **OPTIONS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_counter(tmp_path_factory.mktemp("clips") / "clip.mp4", 12)


@pytest.fixture(scope="module")
def config():
    return tiny_config(text={"num_hidden_layers": 6})


def test_a_plan_is_the_prompt_the_processor_writes(processor, clip, config, monkeypatch):
    image = np.zeros((8, 12, 3), np.uint8)
    prompts = {}
    for options in ({}, {"num_frames": 7}, {"num_high_res_frames": 2, "num_low_res_frames": 4}, {"fps": 12.5}):
        ids = processor(text="a<video>bc<image>d", videos=clip, images=image, **options)["input_ids"][0]
        prompts[len(ids)] = options
    monkeypatch.setattr("elva_hf.sampled_elva.read_frames", None)  # nothing is decoded
    assert len(prompts) == 4
    for length, options in prompts.items():
        plan = processor.plan(clip, image, config=config, merge_schedule="none", text_tokens=4, **options)
        assert plan.num_tokens == length
        assert [layer.maximum for layer in plan.layers] == 6 * [length]
        counted = processor.count_tokens(clip, image, **options)
        assert plan.tokens_per_frame == tuple(video.tokens_per_frame for video in counted.videos)


def test_a_plan_follows_the_schedule_of_the_call_or_the_model(processor, clip, config):
    grids = [video.grids for video in processor.count_tokens([clip, clip]).videos]
    for schedule in (None, "paper", "table5", [{"layer": 2, "target_ratio": 0.7}]):
        plan = processor.plan([clip, clip], config=config, merge_schedule=schedule, text_tokens=9)
        assert plan == plan_tokens(grids, config, schedule, 9)
    halved = processor.plan(clip, config=config, merge_schedule="table5")
    assert halved.layers[1].maximum < halved.layers[0].maximum
    assert torch.tensor([layer.is_exact for layer in halved.layers]).all()


def test_without_a_model_a_plan_knows_tokens_only(processor, clip):
    plan = processor.plan(clip)
    assert plan.num_tokens == processor.count_tokens(clip).num_tokens and plan.layers is None
    assert processor.plan().num_tokens == 0


def test_mistakes_reach_the_caller(processor, clip, config):
    with pytest.raises(VideoError):
        processor.plan("nowhere.mp4", config=config)
    with pytest.raises(ConfigurationError, match="none, paper, table5"):
        processor.plan(clip, config=config, merge_schedule="tabel5")
    with pytest.raises(ConfigurationError, match=r"config=model\.config"):
        processor.plan(clip, merge_schedule="paper")
    with pytest.raises(ConfigurationError, match="num_frames"):
        processor.plan(clip, config=config, num_framse=3)
