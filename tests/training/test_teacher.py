import json
import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from saved_elva import build_checkpoint, draw_frames
from tiny_elva import END, FRAME, LINE, PATCH, START, batch, video, words
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from elva_hf import geometry_elva as geo
from elva_hf.errors_elva import CheckpointError, ConfigurationError
from elva_hf.training.teacher import (
    TeacherSpec,
    VisualTeacher,
    denormalize,
    frames_from_patches,
    summarize,
    teacher_targets,
)
from elva_hf.training.towers import PixelSettings, clip_lengths, prepare_frames
from elva_hf.video_processing_elva import ElvaVideoProcessor, normalize, patchify

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 7}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
PRISM = {
    "image_size": 36,
    "num_frames": 4,
    "tubelet_size": [1, 9, 9],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_spatial_layers": 2,
    "num_temporal_layers": 2,
    "num_auxiliary_layers": 1,
}
JEPA = {
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": 4,
    "tubelet_size": 2,
    "hidden_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
}
SIDES = {"siglip": 28, "siglip2": 28, "clip": 28, "videoprism": 36, "vjepa2": 32}
IMAGE_FAMILIES = ("siglip", "siglip2", "clip")
FAMILIES = tuple(SIDES)
KIND_IDS = {geo.VIDEO_START: START, geo.VIDEO_END: END, geo.PATCH: PATCH, geo.FRAME: FRAME, geo.LINE: LINE}


def build(family):
    """A tiny random model of a family, whole where it has a text tower, and its image processor if it has one."""
    torch.manual_seed(3)
    config = {"vision_config": {**VISION, "image_size": 28}, "text_config": TEXT}
    if family == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(**config)), SiglipImageProcessorPil(
            size={"height": 28, "width": 28}
        )
    if family == "clip":
        return transformers.CLIPModel(transformers.CLIPConfig(**config)), CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
    if family == "siglip2":
        config["vision_config"] = {**VISION, "num_patches": 16}
        return transformers.Siglip2Model(transformers.Siglip2Config(**config)), Siglip2ImageProcessorPil(
            patch_size=7, max_num_patches=16
        )
    if family == "videoprism":
        return transformers.VideoPrismVisionModel(transformers.VideoPrismVisionConfig(**PRISM)), None
    return transformers.VJEPA2Model(transformers.VJEPA2Config(**JEPA)), None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Per family: folder, model and image processor."""
    made = {}
    for family in FAMILIES:
        model, processor = build(family)
        with torch.no_grad():  # position tables of some families start at zero, and all of them small
            for name, parameter in model.named_parameters():
                if "position" in name:
                    parameter.normal_(std=0.3)
        folder = tmp_path_factory.mktemp(family)
        model.eval().save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        made[family] = folder, model, processor
    return made


@pytest.fixture(scope="module")
def teachers(saved):
    return {family: VisualTeacher.from_pretrained(saved[family][0]) for family in FAMILIES}


def draw(num_frames, size, seed=0):
    """`(T, 3, size, size)` uint8, smooth enough that resampling is no matter of taste."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_frames, 3, 5, 5, generator=generator) * 255
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear").round().to(torch.uint8)


def direct(family, saved, frames):
    """Penultimate hidden state of the model itself, on what its own processor makes of the frames: `(T, h, w, D)`."""
    _, model, processor = saved[family]
    with torch.no_grad():
        if family in IMAGE_FAMILIES:
            images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
            states = model.vision_model(**processor(images, return_tensors="pt"), output_hidden_states=True)
            states = states.hidden_states[-2]
            return (states[:, 1:] if family == "clip" else states).view(len(frames), 4, 4, -1)
        values = frames.float() / 255
        if family == "videoprism":
            options = {"interpolate_pos_encoding": len(frames) != PRISM["num_frames"], "output_hidden_states": True}
            states = model(values[None], **options).hidden_states[-2]  # (places, T, D)
            return states.transpose(0, 1).reshape(len(frames), 4, 4, -1)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        values = (values - mean[:, None, None]) / std[:, None, None]
        states = model(values[None], output_hidden_states=True).hidden_states[-2]
        return states.view(len(frames) // 2, 4, 4, -1).repeat_interleave(2, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_a_direct_call_at_the_native_size(family, saved, teachers):
    frames = draw(4, SIDES[family])
    torch.testing.assert_close(teachers[family].features(frames), direct(family, saved, frames), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_larger_frames_are_resized_as_the_image_processor_does(family, saved, teachers):
    frames = draw(3, 96)
    expected = direct(family, saved, frames)
    error = (teachers[family].features(frames) - expected).abs()
    assert error.mean() < 0.01 and error.max() < 0.1  # a few pixels differ by a level of 8 bits
    assert expected.std() > 0.2


def test_resized_pixels_are_those_of_pillow_to_a_level():
    frames = torch.from_numpy(draw_frames(2, 2, 48, 80)).permute(0, 3, 1, 2)
    for name, number in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        settings = PixelSettings((28, 28), (0.0,) * 3, (1.0,) * 3, name)
        ours = prepare_frames(list(frames), settings) * 255
        for frame, mine in zip(frames, ours, strict=True):
            pillow = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((28, 28), number)
            assert np.abs(np.asarray(pillow, np.float32).transpose(2, 0, 1) - mine.numpy()).max() <= 1.01


def test_overshoot_at_black_and_white_edges_is_cut_off():
    frame = 255 * (torch.from_numpy(draw_frames(2, 1, 48, 80))[0].permute(2, 0, 1) > 125).to(torch.uint8)
    ours = prepare_frames([frame], PixelSettings((28, 28), (0.0,) * 3, (1.0,) * 3, "bicubic"))[0] * 255
    pillow = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC)
    error = np.abs(np.asarray(pillow, np.float32).transpose(2, 0, 1) - ours.numpy())
    assert ours.min() == 0 and ours.max() == 255
    assert error.mean() < 0.2 and error.max() < 12  # Pillow cuts off after rows and again after columns


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_columns_of_the_map_are_those_of_the_picture(family, teachers):
    side = SIDES[family]
    plain = torch.full((2, 3, side, side), 128, dtype=torch.uint8)
    patch = side // 4
    marked = plain.clone()
    marked[..., :patch, 2 * patch : 3 * patch] = 0  # row 0, column 2
    change = (teachers[family].features(marked) - teachers[family].features(plain)).norm(dim=-1)
    for frame in change:
        assert divmod(int(frame.argmax()), 4) == (0, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wide_picture_fills_the_whole_map(family, teachers):
    """Square resize: nothing is cropped, so a change at the far left shows in the first column."""
    plain = torch.full((2, 3, 32, 96), 128, dtype=torch.uint8)
    marked = plain.clone()
    marked[..., :12] = 0
    change = (teachers[family].features(marked) - teachers[family].features(plain)).norm(dim=-1).mean((0, 1))
    assert change.argmax() == 0


def test_the_class_token_is_no_place_of_the_map(saved, teachers):
    frames = draw(1, 28)
    _, model, processor = saved["clip"]
    pixels = processor([Image.fromarray(frames[0].permute(1, 2, 0).numpy())], return_tensors="pt")
    with torch.no_grad():
        states = model.vision_model(**pixels, output_hidden_states=True).hidden_states[-2][0]
    maps = teachers["clip"].features(frames)[0]
    assert maps.shape == (4, 4, 32) and len(states) == 17
    torch.testing.assert_close(maps[0, 0], states[1], rtol=1e-5, atol=1e-5)
    assert (maps - states[0]).norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_is_frozen_in_eval_mode_and_gives_no_gradient(family, teachers):
    teacher = teachers[family]
    assert not any(parameter.requires_grad for parameter in teacher.tower.model.parameters())
    assert not any(module.training for module in teacher.tower.model.modules())
    frames = draw(2, SIDES[family]).float().div(255).requires_grad_()
    features = teacher.features(frames)
    assert not features.requires_grad and not features.is_inference()


def test_train_of_a_student_that_holds_a_teacher_does_not_reach_it(teachers):
    student = nn.Linear(2, 2)
    student.teacher = teachers["siglip"]
    before = set(student.state_dict())
    student.train().requires_grad_(True).bfloat16()
    assert set(student.state_dict()) == before == {"weight", "bias"}
    model = teachers["siglip"].tower.model
    assert not model.training and model.dtype == torch.float32 and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_changes_nothing(family, teachers):
    frames = draw(2, 40)
    plain = teachers[family].features(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teachers[family].features(frames), plain)


def test_chunks_change_nothing(teachers, monkeypatch):
    frames = draw(7, 28)
    whole = teachers["siglip"].features(frames)
    sizes = []
    model = teachers["siglip"].tower.model
    watch = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr("elva_hf.training.teacher.FRAMES_PER_CHUNK", 3)
    parts = teachers["siglip"].features(frames)
    watch.remove()
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_short_videos_are_seen_together_and_come_out_apart(teachers, monkeypatch):
    videos = [list(draw(count, 28, seed=count)) for count in (1, 2, 1, 5, 1)]
    expected = [teachers["siglip"].features(video) for video in videos]
    sizes = []
    watch = teachers["siglip"].tower.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    monkeypatch.setattr("elva_hf.training.teacher.FRAMES_PER_CHUNK", 4)
    found = list(teachers["siglip"].each(iter(videos)))
    watch.remove()
    assert sizes == [4, 4, 1, 1]  # 1 + 2 + 1, 5, 1
    for maps, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(maps, alone, rtol=1e-5, atol=1e-5)
    assert list(teachers["siglip"].each([])) == []


def test_videos_of_a_video_tower_do_not_see_each_other(teachers):
    videos = [list(draw(count, 32, seed=count)) for count in (1, 3)]
    found = list(teachers["vjepa2"].each(videos))
    assert [
        torch.equal(maps, teachers["vjepa2"].features(video)) for maps, video in zip(found, videos, strict=True)
    ] == [
        True,
        True,
    ]


def test_floats_and_bytes_are_the_same_frames(teachers):
    frames = draw(2, 40)
    assert torch.equal(teachers["siglip"].features(frames), teachers["siglip"].features(frames.float() / 255))


@pytest.mark.parametrize("factor", [255.0, -1.0, float("nan")])
def test_floats_outside_the_unit_range_are_refused(factor, teachers):
    with pytest.raises(ConfigurationError, match=r"give uint8, or floats in \[0, 1\]"):
        teachers["siglip"].features(draw(1, 28).float() / 255 * factor)


def test_frames_of_several_sizes_keep_their_order(teachers):
    large, small = draw(2, 56), draw(2, 28, seed=1)
    mixed = teachers["siglip"].features([large[0], small[0], large[1], small[1]])
    alone = torch.cat([teachers["siglip"].features(frame[None]) for frame in (large[0], small[0], large[1], small[1])])
    torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-5)


# video towers


def test_a_tubelet_that_is_not_full_is_filled_with_the_last_frame(teachers):
    frames = draw(3, 32)
    features = teachers["vjepa2"].features(frames)
    filled = teachers["vjepa2"].features(torch.cat([frames, frames[-1:]]))
    assert features.shape == (3, 4, 4, 48)
    assert torch.equal(features, filled[:3])
    assert torch.equal(features[0], features[1]) and not torch.equal(features[1], features[2])


def test_an_image_is_a_video_of_one_frame(teachers):
    for family in ("vjepa2", "videoprism"):
        assert teachers[family].features(draw(1, 32)).shape[:3] == (1, 4, 4)


def test_a_long_video_is_seen_in_even_clips(teachers):
    for family, parts in (("vjepa2", (4, 3)), ("videoprism", (4, 3))):
        frames = draw(7, SIDES[family])
        features = teachers[family].features(frames)
        apart = torch.cat([teachers[family].features(part) for part in frames.split(parts)])
        torch.testing.assert_close(features, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_frames", "max_frames", "tubelet", "expected"),
    [
        (64, 64, 2, [64]),
        (65, 64, 2, [34, 31]),
        (1, 64, 2, [1]),
        (20, 16, 1, [10, 10]),
        (5, 4, 2, [4, 1]),
        (3, 1, 2, [2, 1]),
    ],
)
def test_clips_are_few_even_and_of_whole_tubelets(num_frames, max_frames, tubelet, expected):
    assert clip_lengths(num_frames, max_frames, tubelet) == expected


@pytest.mark.parametrize("layer", [-5, -4, -3, -2, -1])
def test_every_layer_of_videoprism_is_in_the_order_of_frames_and_places(layer, saved):
    """The state of a layer run by hand: spatial layers frame by frame, temporal ones place by place."""
    folder, model, _ = saved["videoprism"]
    frames = draw(4, 36)
    with torch.no_grad():
        values = model.spatial_embeddings(frames.float()[None] / 255)
        states = [values]
        for spatial in model.spatial_layers:
            states.append(spatial(states[-1]))
        hidden = model.temporal_embeddings(model.layernorm1(states[-1]), (1, *frames.shape), False)
        for temporal in model.temporal_layers:
            hidden = temporal(hidden)
            states.append(hidden.transpose(0, 1))
        states[-1] = model.layernorm2(hidden).transpose(0, 1)
    features = VisualTeacher.from_pretrained(folder, layer=layer).features(frames)
    torch.testing.assert_close(features.flatten(1, 2), states[layer], rtol=1e-5, atol=1e-5)


# checkpoints


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_tower_saved_alone_is_the_same_teacher(family, saved, teachers, tmp_path):
    folder, _, processor = saved[family]
    getattr(transformers, teachers[family].tower.family.tower).from_pretrained(folder).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    alone = VisualTeacher.from_pretrained(tmp_path)
    assert not alone.spec.differences(teachers[family].spec)
    frames = draw(2, 28)
    assert torch.equal(alone.features(frames), teachers[family].features(frames))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_vision_tower_is_kept(family, teachers):
    names = [name for name, _ in teachers[family].tower.model.named_parameters()]
    assert names and not any("text" in name or "predictor" in name for name in names)


def test_loading_says_nothing_of_the_weights_it_leaves_out(saved, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    VisualTeacher.from_pretrained(saved["siglip"][0])
    assert "LOAD REPORT" not in caplog.text
    transformers.SiglipVisionModel.from_pretrained(saved["siglip"][0])
    assert "LOAD REPORT" in caplog.text  # nothing stays silenced


def test_the_tower_inside_a_whole_videoprism_is_found(tmp_path):
    config = transformers.VideoPrismConfig(vision_config=PRISM, text_config=TEXT)
    model = transformers.VideoPrismClipModel(config).eval()
    model.save_pretrained(tmp_path)
    frames = draw(4, 36)
    expected = model.video_model.vision_model(frames[None] / 255, output_hidden_states=True).hidden_states[-2]
    features = VisualTeacher.from_pretrained(tmp_path).features(frames)
    torch.testing.assert_close(features.flatten(1, 2), expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_a_tower_beside_a_bert_is_found(saved, teachers, tmp_path):
    """Table 4's towers were trained with BERT: transformers' vision-text-dual-encoder."""
    tower = transformers.SiglipVisionModel.from_pretrained(saved["siglip"][0])
    bert = transformers.BertModel(transformers.BertConfig(**TEXT))
    transformers.VisionTextDualEncoderModel(vision_model=tower, text_model=bert).save_pretrained(tmp_path)
    saved["siglip"][2].save_pretrained(tmp_path)
    assert not VisualTeacher.from_pretrained(tmp_path).spec.differences(teachers["siglip"].spec)


def test_the_spec_says_what_the_teacher_is(teachers):
    spec = teachers["clip"].spec
    assert (spec.kind, spec.layer, spec.width, spec.tubelet) == ("image", -2, 32, 1)
    assert (spec.image_size, spec.grid) == ((28, 28), (4, 4))
    assert spec.image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert (teachers["vjepa2"].spec.kind, teachers["vjepa2"].spec.tubelet) == ("video", 2)
    assert TeacherSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_another_layer_or_other_weights_are_another_teacher(saved, teachers, tmp_path):
    folder, model, processor = saved["siglip"]
    assert VisualTeacher.from_pretrained(folder, layer=2).spec == teachers["siglip"].spec
    other = VisualTeacher.from_pretrained(folder, layer=-3).spec
    assert other.differences(teachers["siglip"].spec) == ["layer -3 against -2"]
    changed, _ = build("siglip")
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.vision_model.encoder.layers[0].mlp.fc1.bias[0] += 1e-3
    changed.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (difference,) = VisualTeacher.from_pretrained(tmp_path).spec.differences(teachers["siglip"].spec)
    assert difference.startswith("fingerprint ")


def test_a_dtype_is_that_of_the_features_and_not_of_the_fingerprint(saved, teachers):
    half = VisualTeacher.from_pretrained(saved["siglip"][0], dtype="bfloat16")
    assert half.spec == teachers["siglip"].spec
    frames = draw(1, 28)
    assert half.features(frames).dtype == torch.bfloat16
    torch.testing.assert_close(half.features(frames).float(), teachers["siglip"].features(frames), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("layer", [-5, 4])
def test_a_layer_that_is_not_there_is_refused(layer, saved):
    with pytest.raises(ConfigurationError, match=f"layer {layer} is none of .* 4 hidden states, from -4 to 3"):
        VisualTeacher.from_pretrained(saved["siglip"][0], layer=layer)


def test_a_model_that_is_no_known_vision_tower_is_refused(tmp_path):
    transformers.BertConfig(**TEXT).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"model_type 'bert'.* siglip, .*EVA-CLIP is not in transformers"):
        VisualTeacher.from_pretrained(tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        VisualTeacher.from_pretrained(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused_not_filled_at_random(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved["siglip"][0]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "vision" in name and "layers.1.mlp.fc1.weight" in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 weights of SiglipVisionModel, .*layers\.1\.mlp\.fc1\.weight"):
        VisualTeacher.from_pretrained(tmp_path)


# pixels


def write_processor(folder, saved, **fields):
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved["siglip"][0] / name).read_bytes())
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return VisualTeacher.from_pretrained(folder)


def test_mean_deviation_and_scale_are_the_checkpoints(saved, tmp_path):
    teacher = write_processor(tmp_path, saved, image_mean=[0.1, 0.2, 0.3], image_std=0.25, resample=2)
    assert teacher.spec.image_mean == pytest.approx((0.1, 0.2, 0.3)) and teacher.spec.image_std == pytest.approx(
        (0.25,) * 3
    )
    assert teacher.spec.resample == "bilinear"
    teacher = write_processor(tmp_path, saved, do_normalize=False, rescale_factor=1 / 127.5)  # pixels in [0, 2]
    assert teacher.spec.image_mean == (0.0,) * 3 and teacher.spec.image_std == pytest.approx((0.5,) * 3)
    teacher = write_processor(tmp_path, saved, do_rescale=False, image_mean=127.5, image_std=127.5)
    assert teacher.spec.image_mean == pytest.approx((0.5,) * 3) and teacher.spec.image_std == pytest.approx((0.5,) * 3)


@pytest.mark.parametrize("name", ["image_processor", "video_processor"])
def test_settings_inside_a_processor_are_found(name, saved, tmp_path):
    write_processor(tmp_path, saved)
    (tmp_path / "preprocessor_config.json").unlink()
    fields = {
        "processor_class": "SiglipProcessor",
        name: {"image_mean": [0.2] * 3, "image_std": [0.3] * 3},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(fields))
    assert VisualTeacher.from_pretrained(tmp_path).spec.image_mean == pytest.approx((0.2,) * 3)


def test_a_checkpoint_without_a_processor_takes_its_familys_default_and_says_so(saved, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("elva_hf.training.towers.logger.warning_once", said.append)
    saved["clip"][1].save_pretrained(tmp_path)
    teacher = VisualTeacher.from_pretrained(tmp_path)
    assert teacher.spec.image_std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert len(said) == 1 and "published default of CLIPVisionModel" in said[0]


def test_a_way_to_resize_that_torch_has_not_is_refused(saved, tmp_path):
    with pytest.raises(ConfigurationError, match="resample=1"):
        write_processor(tmp_path, saved, resample=1)


# the student's pixels


def geometry_of(*samples):
    ids = batch(list(samples))["input_ids"]
    return geo.read_geometry(geo.token_kinds(ids, KIND_IDS))


def encode(videos, **options):
    """What `ElvaVideoProcessor` makes of videos, and the geometry of a sample for each."""
    processor = ElvaVideoProcessor(patch_size=16, longest_edge=64, low_res_longest_edge=32, **options)
    encoded = processor(videos)
    samples = [[*words(2), *video(*grids), *words(1)] for grids in encoded["video_grids"]]
    return encoded["pixel_values_videos"], geometry_of(*samples), processor


VIDEOS = [draw_frames(0, 6), draw_frames(1, 3, 32, 64), draw_frames(2, 1, 48, 32)[0]]
STATISTICS = [(0.5, 0.5), ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])]


@pytest.mark.parametrize(("mean", "std"), STATISTICS)
def test_frames_come_back_bit_for_bit(mean, std):
    """Hybrid grids, several videos, an image; the frames are already of the processor's sizes."""
    patches, geometry, _ = encode(VIDEOS[:2], num_frames=3, image_mean=mean, image_std=std)
    frames = frames_from_patches(patches, geometry, 16, mean, std)
    assert [len(of_video) for of_video in frames] == [3, 3]
    for frame, expected in zip(frames[1], VIDEOS[1], strict=True):
        assert frame.dtype == torch.uint8 and torch.equal(frame, torch.from_numpy(expected).permute(2, 0, 1))
    taken = torch.from_numpy(VIDEOS[0])[[1, 3, 5]].permute(0, 3, 1, 2)
    assert torch.equal(torch.stack(frames[0]), taken)


def test_frames_of_hybrid_videos_and_images_come_back_in_their_sizes():
    patches, geometry, processor = encode(VIDEOS, num_high_res_frames=2, num_low_res_frames=3)
    frames = frames_from_patches(patches, geometry, 16)
    assert [len(of_video) for of_video in frames] == [5, 3, 1]
    assert {tuple(frame.shape) for frame in frames[0]} == {(3, 64, 64), (3, 32, 32)}
    again = torch.cat([patchify(frame, 16) for of_video in frames for frame in of_video])
    again = normalize(again, processor.image_mean, processor.image_std)
    torch.testing.assert_close(again, patches, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_level_survives_the_way_there_and_back(dtype):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3)[None]
    patches = normalize(levels, [0.5] * 3, [0.5] * 3).to(dtype)
    assert torch.equal(denormalize(patches, 0.5, 0.5), levels)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.45), (0.45, 0.5), (0.2, 0.5)])
def test_values_of_another_mean_or_deviation_are_refused(mean, std):
    patches, geometry, _ = encode(VIDEOS[:1], num_frames=2)
    with pytest.raises(ConfigurationError, match="of an 8-bit level off"):
        frames_from_patches(patches, geometry, 16, mean, std)


def test_values_beyond_8_bits_are_refused():
    with pytest.raises(ConfigurationError, match="image_mean and image_std"):
        denormalize(torch.full((1, 12), 1 + 2 / 255), 0.5, 0.5)


@pytest.mark.parametrize("family", ["siglip", "vjepa2"])
def test_the_teacher_sees_the_flips_and_crops_of_the_student(family, teachers):
    """Eight frames, flipped, cut and shifted before the processor: targets are those of just these frames."""
    clip = draw_frames(4, 8)
    flipped = np.ascontiguousarray(clip[:, :, ::-1])
    cropped = np.ascontiguousarray(clip[:, 16:64, 8:56])
    patches, geometry, _ = encode([flipped, cropped], num_frames=8)
    targets = teacher_targets(teachers[family], patches, geometry, patch_size=16)
    for number, frames in enumerate((flipped, cropped)):
        maps = teachers[family].features(torch.from_numpy(frames).permute(0, 3, 1, 2))
        assert torch.equal(targets.tubes[number], maps.mean(0))
        assert torch.equal(targets.frames[8 * number : 8 * number + 8], maps.mean((1, 2)))
    straight = teachers[family].features(torch.from_numpy(clip).permute(0, 3, 1, 2))
    assert not torch.allclose(targets.tubes[0], straight.mean(0), atol=1e-3)


def test_targets_equal_a_plain_loop(teachers):
    patches, geometry, _ = encode(VIDEOS, num_high_res_frames=2, num_low_res_frames=3)
    targets = teacher_targets(teachers["siglip"], patches, geometry, patch_size=16)
    tubes, frames = [], []
    for of_video in frames_from_patches(patches, geometry, 16):
        maps = [teachers["siglip"].features(frame[None])[0] for frame in of_video]
        frames += [one.flatten(0, 1).mean(0) for one in maps]
        clips = {}
        for frame, one in zip(of_video, maps, strict=True):
            clips.setdefault(frame.shape, []).append(one)
        tubes += [sum(members) / len(members) for members in clips.values()]
    assert targets.tubes.shape == (5, 4, 4, 32) and targets.frames.shape == (9, 32)
    torch.testing.assert_close(targets.tubes, torch.stack(tubes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.frames, torch.stack(frames), rtol=1e-5, atol=1e-5)


def test_equal_grids_of_two_videos_stay_two_clips(teachers):
    patches, geometry, _ = encode([draw_frames(0, 2), draw_frames(1, 2)], num_frames=2)
    targets = teacher_targets(teachers["siglip"], patches, geometry, patch_size=16)
    assert len(targets.tubes) == 2 and not torch.allclose(targets.tubes[0], targets.tubes[1])


def test_averages_are_taken_in_float32():
    maps = torch.full((64, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    maps[0] = 1.0078125
    targets = summarize(maps, [0] * 64)
    assert targets.tubes.dtype == torch.float32 and targets.tubes.item() == pytest.approx(1 + 0.0078125 / 64, abs=1e-7)


def test_targets_fit_the_batch_of_a_model(teachers):
    model, processor = build_checkpoint()
    clip = draw_frames(3)
    inputs = processor(text="<video> What?", videos=[clip], return_tensors="pt")
    geometry = geo.read_geometry(model.model.token_kinds(inputs["input_ids"]))
    targets = teacher_targets(teachers["clip"], inputs["pixel_values_videos"], geometry, patch_size=16)
    maps = teachers["clip"].features(torch.from_numpy(clip).permute(0, 3, 1, 2))
    assert torch.equal(targets.frames, maps.mean((1, 2)))
