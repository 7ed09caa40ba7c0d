import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from saved_elva import draw_frames, write_clip
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from elva_hf.data.datasets import BadSamples
from elva_hf.data.mixtures import DataSource
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import render, sample_scene
from elva_hf.errors_elva import ConfigurationError, ElvaError
from elva_hf.training.recipe import read_body
from elva_hf.training.sections import DataSection, TrainingSection
from elva_hf.training.teacher import VisualTeacher
from elva_hf.training.towers import PixelSettings
from elva_hf.training.video_teacher import (
    ClipCaptionCollator,
    ClipCaptions,
    VideoTeacherRecipe,
    clip_caption_loss,
    load_dual_encoder,
    read_clip,
    train_video_teacher,
)

VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "max_position_embeddings": 16}
PIXELS = PixelSettings((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic")
STEPS = 40


def caption_row(frames, caption, **fields):
    asked = {"role": "user", "content": [{"type": "video", **frames}, {"type": "text", "text": "Describe."}]}
    return {"messages": [asked, {"role": "assistant", "content": caption}], **fields}


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A file of 16 clips of the toy world, one object each, no two of a kind, with captions."""
    folder = tmp_path_factory.mktemp("captions")
    rows, seen, seed = [], set(), 0
    while len(rows) < 16:
        scene = sample_scene(seed, num_frames=4, single=True)
        seed += 1
        thing = scene.objects[0]
        if (thing.color, thing.shape) not in seen:
            seen.add((thing.color, thing.shape))
            write_clip(folder / f"{seed}.mp4", render(scene))
            rows.append(caption_row({"path": f"{seed}.mp4"}, f"a {thing.color} {thing.shape}", id=str(seed)))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tiny random SigLIP with the toy world's tokenizer."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    tokenizer = build_toy_tokenizer()
    config = transformers.SiglipConfig(
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={**TEXT, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None},
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


def make_recipe(captions, tower, **fields):
    training = TrainingSection(
        batch_size=8,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        max_steps=STEPS,
        bf16=False,
        use_cpu=True,
        save_steps=STEPS,
        logging_steps=5,
    )
    data = DataSection(sources={"toy": DataSource(name="toy", path=str(captions))}, num_workers=0)
    chosen = {"model": str(tower), "num_frames": 2, "max_text_length": 8, "logit_scale_init": math.log(1 / 0.07)}
    return VideoTeacherRecipe(data=data, training=training, **{**chosen, **fields})


@pytest.fixture(scope="module")
def trained(captions, tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train_video_teacher(make_recipe(captions, tower), folder), folder


def logged(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_the_loss_falls(trained):
    losses = [entry["loss"] for entry in logged(trained[1])]
    assert losses[0] > 1.5  # ln(8) = 2.08 for a tower that tells nothing apart
    assert losses[-1] < 0.5 * losses[0]


def test_the_scale_is_learnt_and_logged(trained):
    scales = [entry["logit_scale"] for entry in logged(trained[1])]
    assert scales[0] == pytest.approx(1 / 0.07, rel=0.1) and scales[-1] != scales[0]


def test_the_result_is_a_plain_checkpoint_and_a_teacher(trained, tower):
    folder, _ = trained
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is transformers.SiglipModel
    assert transformers.AutoTokenizer.from_pretrained(folder)("a red circle")["input_ids"]
    teacher, before = VisualTeacher.from_pretrained(folder), VisualTeacher.from_pretrained(tower)
    differences = teacher.spec.differences(before.spec)
    assert len(differences) == 1 and differences[0].startswith("fingerprint ")  # and the same pixels
    frames = torch.from_numpy(draw_frames(0, 2, 32, 32)).permute(0, 3, 1, 2)
    pixels = (frames / 255 - 0.4) / 0.5
    expected = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(teacher.features(frames).flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_every_weight_but_the_bias_was_trained(trained, tower):
    before = transformers.SiglipModel.from_pretrained(tower).state_dict()
    after = transformers.SiglipModel.from_pretrained(trained[0]).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "logit_bias" in same
    assert not [name for name in same if name.endswith("weight") and "key" not in name]


def test_a_finished_run_goes_on_from_its_checkpoint(trained, captions, tower):
    folder, run = trained
    weights = (folder / "model.safetensors").read_bytes()
    assert train_video_teacher(make_recipe(captions, tower), run) == folder
    assert (folder / "model.safetensors").read_bytes() == weights  # no step was left to do


def test_a_tower_and_a_bert_are_joined(captions, tower, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tower)
    bert = transformers.BertModel(transformers.BertConfig(**TEXT, vocab_size=len(tokenizer)))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    pair = {"model": None, "vision_model": str(tower), "text_model": str(tmp_path / "bert"), "projection_dim": 16}
    recipe = make_recipe(captions, tower, **pair)
    recipe = replace(recipe, training=replace(recipe.training, max_steps=2, save_steps=2))
    folder = train_video_teacher(recipe, tmp_path / "run")
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "vision-text-dual-encoder"
    assert VisualTeacher.from_pretrained(folder).spec.grid == (4, 4)


# the loss


def test_the_loss_equals_a_loop_over_clips():
    torch.manual_seed(1)
    frames, texts, counts = torch.randn(6, 5), torch.randn(3, 5), torch.tensor([3, 1, 2])
    clips = [part.mean(0) for part in frames.split(counts.tolist())]
    scores = torch.stack([torch.stack([F.cosine_similarity(c, t, dim=0) for t in texts]) for c in clips]) * 7.0
    pairs = torch.arange(3)
    expected = (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2
    loss = clip_caption_loss(frames, texts, counts, torch.tensor(7.0))
    torch.testing.assert_close(loss, expected)


def test_frames_texts_and_scale_have_gradients():
    frames, texts = torch.randn(6, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    scale = torch.tensor(7.0, requires_grad=True)
    clip_caption_loss(frames, texts, torch.tensor([3, 1, 2]), scale).backward()
    assert all(value.grad.abs().max() > 0 for value in (frames, texts, scale))


# rows and batches


def make_clips(rows, folder, **fields):
    bad = BadSamples(folder / "bad.jsonl", 0.9, min_samples=100)
    return ClipCaptions(rows, PIXELS, **{"num_frames": 4, "seed": 0, "bad_samples": bad, **fields})


def test_a_clip_is_its_frames_at_the_towers_size(tmp_path):
    frames = draw_frames(0, 8, 32, 32)
    clip = make_clips([caption_row({"video": frames}, " a thing ")], tmp_path)[0]
    taken = torch.from_numpy(frames)[[1, 3, 5, 7]].permute(0, 3, 1, 2)
    assert clip["caption"] == "a thing"
    torch.testing.assert_close(clip["frames"], (taken / 255 - 0.5) / 0.5)


def test_a_wide_clip_keeps_its_height(tmp_path):
    """48 rows of 192 columns for a tower of 32 pixels: first to 64 columns, not to 32, or 8 rows would be left."""
    frames = draw_frames(0, 4, 48, 192)
    processor = make_clips([], tmp_path).processor
    assert processor.longest_edge == 64 and processor.patch_size == 1
    assert make_clips([caption_row({"video": frames}, "x")], tmp_path)[0]["frames"].shape == (4, 3, 32, 32)


def test_images_and_short_clips_have_fewer_frames(tmp_path):
    image = {"type": "image", "image": draw_frames(0, 1, 32, 32)[0]}
    row = {"messages": [{"role": "user", "content": [image]}, {"role": "assistant", "content": "a thing"}]}
    short = caption_row({"video": draw_frames(1, 3, 32, 32)}, "another")
    clips = make_clips([row, short], tmp_path)
    batch = ClipCaptionCollator(build_toy_tokenizer(), 8)([clips[0], clips[1]])
    assert batch["frames_per_clip"].tolist() == [1, 3]
    assert batch["pixel_values"].shape == (4, 3, 32, 32) and batch["input_ids"].shape == (2, 8)


def test_captions_are_padded_on_the_right_and_cut_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr("elva_hf.training.video_teacher.logger.warning_once", said.append)
    tokenizer = build_toy_tokenizer()
    items = [{"frames": torch.zeros(1, 3, 4, 4), "caption": text} for text in ("a red circle", "red " * 20)]
    ids = tokenizer("a red circle")["input_ids"]
    batch = ClipCaptionCollator(tokenizer, 8)(items[:1])
    assert batch["input_ids"][0].tolist() == ids + [tokenizer.pad_token_id] * (8 - len(ids)) and not said
    assert ClipCaptionCollator(tokenizer, 8)(items)["input_ids"].shape == (2, 8)
    assert said == ["captions of more than max_text_length=8 tokens are cut to it."]


def test_a_row_that_cannot_be_read_is_replaced_and_written_down(tmp_path):
    good = [caption_row({"video": draw_frames(i, 4, 32, 32)}, f"thing {i}") for i in range(3)]
    clips = make_clips([caption_row({"path": "nowhere.mp4"}, "lost", id="lost"), *good], tmp_path)
    first = clips[0]
    assert first["caption"].startswith("thing ") and clips[0]["caption"] == first["caption"]
    line = json.loads((tmp_path / "bad.jsonl").read_text().splitlines()[0])
    assert (line["id"], line["index"], line["reason"]) == ("lost", 0, "not_found")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "no clip"}],
        [{"type": "video", "path": "a.mp4"}, {"type": "video", "path": "b.mp4"}],
        [{"type": "video", "path": "a.mp4"}, {"type": "image", "path": "b.png"}],
    ],
)
def test_a_row_of_no_or_several_clips_is_no_pair(content):
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(ElvaError, match=r"a pair is one clip and its caption; this row has [02] clips"):
        read_clip(row)


def test_what_the_assistant_says_is_the_caption():
    row = caption_row({"path": "a.mp4"}, "One.")
    row["messages"] += [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "Two."}]
    source, is_image, caption = read_clip(row)
    assert (is_image, caption) == (False, "One. Two.") and "a.mp4" in str(source)
    with pytest.raises(ElvaError, match="says ''"):
        read_clip(caption_row({"path": "a.mp4"}, " "))


# the recipe


def test_the_shipped_recipe_is_read_and_its_numbers_hold():
    body, folder = read_body(VideoTeacherRecipe, "teacher_video", ["data.sources.webvid.path=/data/webvid.jsonl"])
    assert (body.vision_model, folder) == ("google/siglip-so400m-patch14-384", "runs/teacher_video")
    assert body.logit_scale_init == pytest.approx(math.log(1 / 0.07))
    samples = sum(source.num_samples for source in body.data.sources.values())
    assert samples == 10_000_000 and math.ceil(samples / body.training.batch_size) == 9766
    assert body.data.sources["webvid"].path == "/data/webvid.jsonl"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "give model, or vision_model and text_model"),
        ({"vision_model": "a", "text_model": "b"}, "one of the two"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"resume": "perhaps"}, "resume='perhaps'"),
    ],
)
def test_recipes_that_cannot_be_are_refused(fields, message, captions, tower):
    with pytest.raises(ConfigurationError, match=message):
        make_recipe(captions, tower, **fields)


def test_a_tower_without_text_and_a_video_tower_are_refused(captions, tower, tmp_path):
    transformers.SiglipVisionModel.from_pretrained(tower).save_pretrained(tmp_path / "vision")
    build_toy_tokenizer().save_pretrained(tmp_path / "vision")
    with pytest.raises(ConfigurationError, match="has no text tower; give it as vision_model, with a text_model"):
        load_dual_encoder(make_recipe(captions, tmp_path / "vision"))
    transformers.VideoPrismVisionConfig().save_pretrained(tmp_path / "prism")
    with pytest.raises(ConfigurationError, match="choose a SigLIP or CLIP image tower"):
        load_dual_encoder(make_recipe(captions, tmp_path / "prism"))


def test_a_run_of_other_fields_is_refused_or_begun_anew(trained, captions, tower, tmp_path):
    recipe = make_recipe(captions, tower)
    short = replace(recipe, training=replace(recipe.training, max_steps=2, save_steps=1))
    train_video_teacher(short, tmp_path)
    other = replace(short, training=replace(short.training, learning_rate=2e-3))
    with pytest.raises(ConfigurationError, match=r"a run of other fields \(training.learning_rate\)"):
        train_video_teacher(other, tmp_path)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    train_video_teacher(replace(other, resume="never"), tmp_path)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.glob("nonfinite*")] == []


def test_every_epoch_has_an_order_of_its_own_and_a_resumed_one_too(captions, tower, tmp_path):
    recipe = make_recipe(captions, tower)
    recipe = replace(recipe, training=replace(recipe.training, max_steps=5, save_steps=1, save_total_limit=9))
    whole = train_video_teacher(recipe, tmp_path / "run")  # two steps an epoch
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    for name in ("model", "checkpoint-4", "checkpoint-5"):
        shutil.rmtree(tmp_path / "stopped" / name)
    resumed = train_video_teacher(recipe, tmp_path / "stopped")
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (whole, resumed))
    assert first == second
