"""Videos, images and text -> inputs of Mavors, Auto classes, pipeline, LoRA."""

import numpy as np
import pytest
import torch
from clips_elva import byte_tokenizer, write_counter
from mavors_models import SQUARE, mavors_config
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, pipeline
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

import elva_hf
from elva_hf.configuration_elva import TOKEN_ID_FIELDS
from elva_hf.decoding_elva import resize_frame
from elva_hf.errors_elva import ConfigurationError, ContextOverflowError
from elva_hf.ledger_elva import plan_tokens
from elva_hf.siblings.mavors.chunks_mavors import POSITION_UNIT
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM
from elva_hf.siblings.mavors.processing_mavors import MavorsProcessor, MavorsVideoProcessor
from elva_hf.siblings.mavors.rows_mavors import HEADER, read_frames, read_positions
from elva_hf.video_processing_elva import normalize, patchify

OPTIONS = {"patch_size": SQUARE, "image_size": 32, "chunk_frames": 4, "longest_edge": 64, "low_res_longest_edge": 32}


@pytest.fixture(scope="module")
def processor():
    return MavorsProcessor.from_tokenizer(byte_tokenizer(), **OPTIONS)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    ids = {name: getattr(processor, name) for name in TOKEN_ID_FIELDS}
    config = mavors_config(text={"vocab_size": len(processor.tokenizer), "max_position_embeddings": 2048}, **ids)
    return MavorsForCausalLM(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("mavors")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def draw(num_frames=10, height=36, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def expanded(*grids):
    chunks = []
    for rows, columns in grids:
        chunks.append("<FRAME>" + (columns - 1) * "<video>" + (rows - 1) * ("<LINE>" + (columns - 1) * "<video>"))
    return "<|vision_start|>" + "".join(chunks) + "<|vision_end|>"


def expected_row(frame, size, row, column):
    """Normalised pixels of one token of a frame, `(3 * s * s,)`."""
    resized = resize_frame(torch.from_numpy(frame), size)
    patches = normalize(patchify(resized, SQUARE), (0.5,) * 3, (0.5,) * 3)
    return patches[row * (size[1] // SQUARE) + column]


def test_a_chunk_is_written_as_its_tokens_alone(processor):
    out = processor(text="a<video>b", videos=draw(), num_frames=10, return_tensors="pt")
    assert set(out) == {"input_ids", "attention_mask", "pixel_values_videos"}
    assert processor.decode(out["input_ids"][0]) == f"a{expanded((3, 5), (3, 5), (3, 5))}b"
    assert out["pixel_values_videos"].shape == (10 * 15, 3 * SQUARE**2 + HEADER)


def test_rows_hold_the_pixels_of_each_token_frame_by_frame(processor):
    video = draw()
    rows = processor(text="<video>", videos=video, num_frames=10, return_tensors="pt")["pixel_values_videos"]
    assert read_frames(rows).tolist() == [*(2 * 15 * [0, 1, 2, 3]), *(15 * [0, 1])]
    assert read_positions(rows).unique_consecutive().tolist() == [0, POSITION_UNIT, 2 * POSITION_UNIT]
    chunk, token, frame = 1, 7, 2
    row = rows[chunk * 60 + token * 4 + frame, :-HEADER]
    torch.testing.assert_close(row, expected_row(video[chunk * 4 + frame], (24, 40), 1, 2))
    last = rows[120 + 14 * 2 + 1, :-HEADER]
    torch.testing.assert_close(last, expected_row(video[9], (24, 40), 2, 4))


def test_chunks_stand_at_their_true_times(processor):
    video = draw(48)
    metadata = {"fps": 4.0}
    options = {"videos": [video], "video_metadata": [metadata], "return_tensors": "pt"}
    plain = processor(text="<video>", **options)  # 12 seconds at 2 frames a second: 24 frames, 6 chunks
    assert read_positions(plain["pixel_values_videos"]).unique_consecutive().tolist() == [
        i * POSITION_UNIT for i in range(6)
    ]
    fast = processor(text="<video>", **options, max_chunks=2)  # every third of them: 8 frames
    assert read_positions(fast["pixel_values_videos"]).unique_consecutive().tolist() == [0, 3 * POSITION_UNIT]
    sparse = processor(text="<video>", **options, num_frames=8)
    assert read_positions(sparse["pixel_values_videos"]).unique_consecutive().tolist() == [0, 3 * POSITION_UNIT]
    dense = processor(text="<video>", **options, fps=4.0)
    assert read_positions(dense["pixel_values_videos"]).unique_consecutive().tolist() == [
        i * POSITION_UNIT for i in range(12)
    ]


def test_a_video_file_is_read_at_2_frames_per_second(processor, tmp_path):
    clip = write_counter(tmp_path / "clip.mp4", 100, rate=10)
    out = processor(text="<video>", videos=clip, return_tensors="pt", return_metadata=True)
    (sampled,) = out["video_metadata"]
    assert sampled.num_frames == 20
    assert read_positions(out["pixel_values_videos"]).unique_consecutive().tolist() == [
        i * POSITION_UNIT for i in range(5)
    ]


def test_an_image_becomes_a_thumbnail_and_sub_images(processor):
    pixels = draw(1, 64, 96)[0]  # 6 times the tower's 1024 pixels: (3, 2)
    out = processor(text="<image>", images=Image.fromarray(pixels), return_tensors="pt", return_metadata=True)
    assert processor.decode(out["input_ids"][0]) == expanded((3, 5), *6 * [(4, 4)])
    rows = out["pixel_values_videos"]
    assert len(rows) == 15 + 6 * 16  # one row for each token: nothing is repeated
    assert not read_frames(rows).any()
    assert not read_positions(rows).any()
    torch.testing.assert_close(rows[6, :-HEADER], expected_row(pixels, (24, 40), 1, 1))
    part = np.ascontiguousarray(pixels[32:, 64:])  # the last of 3 columns and 2 rows
    torch.testing.assert_close(rows[-1, :-HEADER], expected_row(part, (32, 32), 3, 3))
    assert out["video_metadata"][0].num_tokens == len(out["input_ids"][0])


def test_sub_images_can_be_limited_and_switched_off(processor):
    pixels = Image.fromarray(draw(1, 64, 96)[0])
    assert len(processor(text="<image>", images=pixels, sub_images=False)["input_ids"][0]) == 17
    few = processor(text="<image>", images=pixels, max_sub_images=2)["input_ids"][0]
    assert len(few) == 2 + 15 + 2 * 15  # (2, 1): parts of 48x64


def test_tokens_are_counted_before_decoding(processor):
    video, image = draw(), Image.fromarray(draw(1, 64, 96)[0])
    out = processor(text="<video><image>", videos=video, images=image, num_frames=10)
    counted = processor.count_tokens(video, image, num_frames=10)
    assert counted.num_tokens == len(out["input_ids"][0])
    assert counted.num_frames == 11
    assert processor.plan(video, image, num_frames=10).num_tokens == counted.num_tokens


def test_serving_engines_are_told_the_tokens_of_sizes(processor):
    counts = processor._get_num_multimodal_tokens([(64, 96), (8, 8)], [(10, 36, 64)], num_frames=10)
    assert counts["num_image_tokens"] == [2 + 15 + 6 * 16, 3]
    assert counts["num_image_patches"] == [111, 1]
    assert counts["num_video_tokens"] == [2 + 3 * 15]


def test_the_ledger_knows_the_paper_size():
    config = MavorsConfig.from_preset("mavors-7b")
    for grid, tokens in (((14, 14), 11_760), ((10, 18), 10_800)):
        plan = plan_tokens([[grid] * 960], config)
        assert plan.num_visual_tokens == tokens
        assert plan.num_frames == 960
        assert plan.layers[0].minimum == tokens + 2
    processor = MavorsVideoProcessor()
    for (height, width), tokens in (((720, 720), 11_760), ((1080, 1920), 10_800)):
        options = processor.resolve_options()
        plan = plan_tokens([[options.grid(height, width)] * 960], config)
        assert plan.num_visual_tokens == tokens


def test_flops_of_a_chunk_are_those_of_its_parts():
    """Multiply-accumulates of a chunk at the tower's own size: convolution 7.9 G, ViT 333 G (notes of the lead)."""
    config = MavorsConfig.from_preset("mavors-7b")
    native = 27**2 / 4
    convolution = config._chunk_macs(1) - 27 * (4 * (4 * 1152**2 + 2 * 1152 * 4304) + 2 * 4**2 * 1152)
    assert convolution == 4 * 16 * 3 * 14**2 * 1152
    patches = 4 * native
    vit = 27 * (patches * (4 * 1152**2 + 2 * 1152 * 4304) + 2 * patches**2 * 1152)
    assert convolution * native / 1e9 == pytest.approx(7.9, abs=0.05)
    assert vit / 1e9 == pytest.approx(333, abs=1)


@torch.no_grad()
def test_flops_of_the_ledger_are_those_that_torch_counts(processor):
    """Without the aggregator, whose attention torch counts as if it were not causal."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = {name: getattr(processor, name) for name in TOKEN_ID_FIELDS}
    text = {"vocab_size": len(processor.tokenizer)}
    model = MavorsForCausalLM(mavors_config(text=text, ifa_num_layers=0, **ids)).eval()
    model.set_attn_implementation("eager")
    out = processor(text="<video>", videos=draw(8), num_frames=8, return_tensors="pt")
    front = model.model.patch_embed
    with FlopCounterMode(display=False) as counter:
        features = front.encode_pixels(out["pixel_values_videos"])
        front(features, model.model._geometry(out["input_ids"], None, None, features))
    assert counter.get_total_flops() == model.config.patch_embed_flops([[(3, 5)] * 8])


@torch.no_grad()
def test_60_chunks_of_16_frames_run():
    processor = MavorsProcessor.from_tokenizer(byte_tokenizer(), **{**OPTIONS, "chunk_frames": 16})
    ids = {name: getattr(processor, name) for name in TOKEN_ID_FIELDS}
    text = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 2048}
    model = MavorsForCausalLM(mavors_config(text=text, chunk_frames=16, **ids)).eval()
    out = processor(text="<video>?", videos=draw(960, 16, 16), num_frames=960, return_tensors="pt")
    assert len(out["pixel_values_videos"]) == 960 * 4
    assert len(read_positions(out["pixel_values_videos"]).unique()) == 60
    assert len(out["input_ids"][0]) == 60 * 4 + 3
    logits = model(**out).logits
    assert logits.shape[1] == 60 * 4 + 3
    assert logits.isfinite().all()


def test_a_budget_takes_fewer_frames(processor):
    video = draw(40)
    with pytest.raises(ContextOverflowError) as caught:
        processor(text="<video>", videos=video, num_frames=40, context_length=100)
    assert caught.value.settings is not None
    fitted = processor(text="<video>", videos=video, **caught.value.settings, context_length=100)
    assert 50 < len(fitted["input_ids"][0]) <= 100
    fitted = processor(text="<video>", videos=video, num_frames=40, context_length=100, overflow="fit")
    assert 50 < len(fitted["input_ids"][0]) <= 100


def test_memory_is_counted_in_rows(processor):
    video = draw()
    rows = processor(text="<video>", videos=video, num_frames=10, return_tensors="pt")["pixel_values_videos"]
    enough = rows.numel() * 4
    processor(text="<video>", videos=video, num_frames=10, max_memory=enough)
    with pytest.raises(ContextOverflowError, match=f"{enough} bytes"):
        processor(text="<video>", videos=video, num_frames=10, max_memory=enough - 1)


def test_times_stand_before_chunks(processor):
    out = processor(text="<video><image>", videos=[draw(48)], images=[draw(1, 8, 8)[0]], timestamps=True,
                    video_metadata=[{"fps": 4.0}] * 2, max_chunks=2)  # fmt: skip
    text = processor.decode(out["input_ids"][0])
    assert "<|vision_start|>0.2s<FRAME>" in text
    assert "6.2s<FRAME>" in text


def test_low_resolution_frames_are_refused(processor):
    with pytest.raises(ConfigurationError, match="one resolution"):
        processor(text="<video>", videos=draw(), num_high_res_frames=2, num_low_res_frames=2)


@pytest.mark.parametrize("options", [{"max_chunks": 0}, {"image_size": -1}, {"max_sub_images": 0}, {"sub_images": 1}])
def test_values_that_are_none_are_refused(processor, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        processor(text="<video>", videos=draw(), **options)


def test_a_processor_is_saved_with_all_its_fields(processor, tmp_path):
    changed = MavorsProcessor.from_tokenizer(
        byte_tokenizer(), **OPTIONS, max_sub_images=None, sub_images=False, num_frames=7, playback_fps=3.0, max_chunks=5
    )
    changed.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MavorsProcessor
    assert type(AutoVideoProcessor.from_pretrained(tmp_path)) is MavorsVideoProcessor
    assert vars(loaded.video_processor) == vars(changed.video_processor)


def test_auto_classes_find_it(saved):
    assert type(AutoConfig.from_pretrained(saved)) is MavorsConfig
    assert type(AutoModelForCausalLM.from_pretrained(saved)) is MavorsForCausalLM
    assert elva_hf.MavorsForCausalLM is MavorsForCausalLM


def test_the_pipeline_answers_videos_images_and_text_in_batches(saved):
    pipe = pipeline("video-text-to-text", model=str(saved), max_new_tokens=3, do_sample=False)
    requests = [
        {"video": draw(), "text": "what?"},
        {"image": Image.fromarray(draw(1, 64, 96)[0]), "text": "and this?"},
        {"text": "hello"},
        {"video": draw(5, 20, 20), "text": "?"},
    ]
    together = pipe(requests, num_frames=6, batch_size=4)
    assert together == [pipe(request, num_frames=6) for request in requests]
    assert pipe(draw(), "what?", num_frames=6, max_chunks=1)


def test_lora_trains_the_decoder_by_default(model, processor):
    from peft import LoraConfig, get_peft_model

    config = model.config
    twin = MavorsForCausalLM(config)
    adapted = get_peft_model(twin, LoraConfig(r=2))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("language_model.layers" in name for name in trained)
    out = processor(text="<video>?", videos=draw(), num_frames=6, return_tensors="pt")
    adapted(**out, labels=out["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
