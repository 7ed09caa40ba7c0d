"""Video-Panda's distillation, its three stages by their recipe, and a checkpoint made of a text model."""

import json

import pytest
import torch
from guided_elva import LAYOUTS, SAMPLES, WIDTH, DrawnTeacher, collate, eight_bits
from safetensors.torch import load_file
from saved_elva import draw_frames, write_clip
from tiny_elva import pixels, video
from tiny_video_panda import tiny_panda
from torch import nn
from toy_runs import read_log, save_teacher, small, toy_source
from transformers import AutoModelForCausalLM, AutoProcessor
from typer.testing import CliRunner

from elva_hf.cli import app
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.errors_elva import ConfigurationError
from elva_hf.siblings.video_panda.configuration_video_panda import VideoPandaConfig
from elva_hf.siblings.video_panda.modeling_video_panda import VideoPandaForCausalLM
from elva_hf.siblings.video_panda.processing_video_panda import VideoPandaProcessor
from elva_hf.training.distillation import distillation_loss
from elva_hf.training.guidance import GuidanceHook
from elva_hf.training.plan import plan_recipe
from elva_hf.training.recipe import read_recipe
from elva_hf.training.run import train
from elva_hf.training.teacher import pool_map, teacher_targets
from elva_hf.training.toy import ToyDataset
from elva_hf.training.toy import build_model as build_toy_model
from elva_hf.training.toy import collate as collate_toy
from elva_hf.training.toy import read_recipe as read_toy_recipe

WEIGHTS = {"teacher_width": WIDTH, "tube_weight": 0.0, "frame_weight": 0.0, "patch_weight": 2.0}
STEPS = {"alignment": 12, "integration": 4, "instruction": 4}


def test_the_distillation_is_eq_19_or_the_squared_error():
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    cosines = [float(s @ t / (s.norm() * t.norm())) for s, t in zip(student, teacher, strict=True)]
    assert float(distillation_loss(student, teacher)) == pytest.approx(-sum(cosines) / 5)
    assert float(distillation_loss(student, student * 3)) == pytest.approx(-1)
    assert float(distillation_loss(student, teacher, "mse")) == pytest.approx(
        float((student - teacher).square().mean())
    )
    empty = torch.zeros(0, 3)
    assert all(float(distillation_loss(empty, empty, kind)) == 0 for kind in ("cosine", "mse"))
    with pytest.raises(ConfigurationError, match=r"\(5, 3\) and teacher features \(4, 3\)"):
        distillation_loss(student, teacher[:4])


def test_a_map_is_pooled_to_the_students_grid():
    features = torch.arange(16.0).view(4, 4, 1)
    assert pool_map(features, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_map(features[:2, :2], (4, 2)).flatten().tolist() == [0, 1, 0, 1, 4, 5, 4, 5]


class PlacedTeacher(DrawnTeacher):
    """Tells the four quarters of a frame apart, and one frame from the next."""

    def each(self, videos):
        for maps in super().each(videos):
            places = torch.arange(4.0).view(2, 2, 1) + torch.arange(len(maps)).view(-1, 1, 1, 1)
            yield maps + places


def test_targets_of_patches_are_those_of_their_frame_and_place():
    model = tiny_panda()
    ids = torch.tensor([video((2, 2), (1, 2)) + video((2, 1))])
    geometry = model.model.read_geometry(ids)
    patches = eight_bits(pixels(ids))
    targets = teacher_targets(PlacedTeacher(), patches, geometry, patch_size=4, with_patches=True)
    whole = torch.cat(list(PlacedTeacher().each([[torch.zeros(3, 8, 8)] * 2]))) - torch.cat(
        list(DrawnTeacher().each([[torch.zeros(3, 8, 8)] * 2]))
    )
    base = targets.patches[0] - whole[0, 0, 0]  # the frame's own colours
    torch.testing.assert_close(targets.patches[:4], base + whole[0].flatten(0, 1))
    assert targets.patches.shape == (4 + 2 + 2, WIDTH)
    second = targets.patches[4:6] - whole[1].mean(0)
    torch.testing.assert_close(second[0], second[1])  # two columns of one row, pooled over both rows of the teacher
    assert teacher_targets(PlacedTeacher(), patches, geometry, patch_size=4).patches is None


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_hook_adds_the_distillation_with_its_gradients(kind):
    model = tiny_panda(guidance={**WEIGHTS, "patch_loss": kind}).train()
    assert model.guidance.tube_head is not None and model.guidance.frame_head is None
    batch = collate([SAMPLES[i] for i in (0, 2, 3, 5)], targets=False)
    batch.pop("sample_ids")
    plain = model(**batch, output_hidden_states=True)
    geometry = model.model.read_geometry(batch["input_ids"])
    student = model.guidance.tube_head(plain.hidden_states[-1].flatten(0, 1)[geometry.patch_index])
    teacher = PlacedTeacher()
    targets = teacher_targets(teacher, batch["pixel_values_videos"], geometry, patch_size=4, with_patches=True)
    expected = distillation_loss(student, targets.patches, kind)
    (plain.loss + 2 * expected).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hook = GuidanceHook(teacher)
    handle = hook.attach(model)
    out = model(**batch)
    torch.testing.assert_close(out.loss, plain.loss + 2 * expected)
    torch.testing.assert_close(hook.components["loss_distill"], expected.detach())
    assert set(hook.components) == {"loss_gen", "loss_distill"}
    out.loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, msg=name)
    text = collate([SAMPLES[2]], targets=False)
    model.zero_grad()
    model(**text).loss.backward()
    assert all(p.grad is not None for p in model.guidance.parameters())
    handle.remove()
    assert LAYOUTS[2] == []


def test_a_cache_without_features_of_patches_is_refused():
    model = tiny_panda(guidance=WEIGHTS).train()
    GuidanceHook().attach(model)
    with pytest.raises(ConfigurationError, match="no features of single patches"):
        model(**collate([SAMPLES[0]]))
    with pytest.raises(ConfigurationError, match=r"guidance.patch_weight needs guidance.teacher"):
        read_recipe("video_panda", ["guidance.teacher=null", "guidance.cache=somewhere"])


# The recipe ---------------------------------------------------------------------------------------------------------


def test_the_stages_have_the_values_of_table_6():
    stages = {stage.name: stage for stage in read_recipe("video_panda").stages}
    assert list(stages) == list(STEPS)
    training = [stage.training for stage in stages.values()]
    assert [t.batch_size for t in training] == [2048, 2048, 1024]
    assert [t.learning_rate for t in training] == [4e-4, 4e-5, 2e-5]
    assert [t.warmup_ratio for t in training] == [0.03, 0.01, 0.01]
    for stage in stages.values():
        assert stage.training.lr_scheduler_type == "cosine" and stage.training.weight_decay == 0
        assert stage.training.num_train_epochs == 1 and stage.training.optim is None  # AdamW
        assert (stage.video.num_frames, stage.video.longest_edge) == (8, 448)
        assert (stage.guidance.patch_weight, stage.guidance.patch_loss) == (1, "cosine")
        assert stage.guidance.tube_weight == stage.guidance.frame_weight == 0
    samples = [next(iter(stage.data.sources.values())) for stage in stages.values()]
    assert [source.max_samples or source.num_samples for source in samples] == [351_000, 702_000, 100_000]
    assert stages["alignment"].trainable == ["patch_embed", "guidance"]


def test_the_plan_freezes_the_decoder_in_stage_1_and_counts_45_million():
    plans = plan_recipe(read_recipe("video_panda"), 8)
    trained = plans[0].trained
    assert trained["patch_embed"] + trained["projector"] == 45_067_602
    assert trained.keys() == {"patch_embed", "projector", "guidance"}
    assert plans[0].frozen > 6.7e9 and plans[1].frozen == 0
    assert [plan.num_steps for plan in plans] == [172, 343, 98]
    assert plans[0].tokens == 2184 + 2
    assert "L_distill, teacher facebook/vjepa2" in "\n".join(plans[0].lines())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder in which the three stages have run on the toy world, each from the one before."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("panda")
    save_teacher(folder / "teacher")
    changes = small(folder / "run", batch_size=4, per_device_train_batch_size=4, logging_steps=1, learning_rate=3e-3)
    sized = [
        f"stages.{name}.training.{key}={steps}" for name, steps in STEPS.items() for key in ("max_steps", "save_steps")
    ]
    teacher = f"guidance.teacher={folder / 'teacher'}"
    toy = toy_source(num_frames=3, num_videos=256, questions_per_video=1)
    recipe = read_recipe("video_panda", [*changes, *sized, "model.preset=video-panda-tiny", teacher, toy])
    assert train(recipe) == folder / "run" / "model"
    return folder / "run"


@pytest.mark.parametrize("name", STEPS)
def test_both_losses_of_a_stage_are_logged(run, name):
    log = read_log(run if name == "instruction" else run / name)
    assert log[-1]["step"] == STEPS[name]
    assert {key for key in log[0] if key.startswith("loss_")} == {"loss_gen", "loss_distill"}
    assert all(line["loss"] == pytest.approx(line["loss_gen"] + line["loss_distill"], abs=1e-3) for line in log)


def test_the_first_stage_learns_with_the_decoder_frozen_and_the_second_moves_all(run):
    log = read_log(run / "alignment")
    assert sum(line["loss_distill"] for line in log[-3:]) < sum(line["loss_distill"] for line in log[:3]) - 0.1
    first, second = (
        load_file(folder / "model" / "model.safetensors") for folder in (run / "alignment", run / "integration")
    )
    frozen = [name for name in first if "language_model" in name or "lm_head" in name]
    assert frozen and any(not torch.equal(first[name], second[name]) for name in frozen)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert type(model) is VideoPandaForCausalLM and model.guidance is not None
    assert type(AutoProcessor.from_pretrained(run / "model")) is VideoPandaProcessor


def test_freezing_leaves_the_decoder_as_it_was(run):
    """Weights of the frozen parts after stage 1 are those that the same seed draws."""
    from transformers import set_seed

    from elva_hf.training.building import build_model, build_processor

    stage = read_recipe("video_panda", ["model.preset=video-panda-tiny"]).stages[0]
    set_seed(stage.training.seed)
    fresh = build_model(stage, build_processor(stage), 32)
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("model.patch_embed.", "guidance.")) for name in trained)
    after = load_file(run / "alignment" / "model" / "model.safetensors")
    moved = {
        name for name, weight in fresh.state_dict().items() if name in after and not torch.equal(after[name], weight)
    }
    assert moved <= trained and moved


def test_the_toy_recipe_builds_its_model_and_a_step_of_it_learns():
    recipe, stages = read_toy_recipe("video_panda_tiny")
    torch.manual_seed(0)
    tokenizer = build_toy_tokenizer()
    model = build_toy_model(recipe, tokenizer).train()
    assert type(model) is VideoPandaForCausalLM and model.config.text_config.num_hidden_layers == 6
    common = {"num_questions": 2, "patch_size": model.config.patch_size, "aspects": recipe["teacher"]}
    for row_tokens in (True, False):
        layout = model.config.frame_layout._replace(line_token=row_tokens)
        data = ToyDataset(stages[1], tokenizer, length=2, seed=0, split="train", **common)
        data.layout = layout
        batch = collate_toy([data[0], data[1]], tokenizer.pad_token_id)
        batch.pop("teacher_features")
        model.config.row_tokens = row_tokens
        assert model.model.read_geometry(batch["input_ids"]).num_patches == len(batch["pixel_values_videos"])
    model.config.row_tokens = True


# From a text model --------------------------------------------------------------------------------------------------


def test_elva_init_builds_video_panda_on_a_text_model(tmp_path, monkeypatch):
    from transformers import AutoConfig

    tokenizer = build_toy_tokenizer()
    text = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        )
    )  # fmt: skip
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    arguments = ["init", str(tmp_path / "text"), str(tmp_path / "out"), "--architecture", "video-panda"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "a random visual front end to be trained" in result.output
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model_type"] == "video_panda"
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_elva.VideoPandaForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is VideoPandaForCausalLM and type(model.config) is VideoPandaConfig
    assert model.config.longest_edge == 448 and model.config.num_high_res_frames == 8
    block = sum(p.numel() for p in model.model.patch_embed.parameters())
    assert block == 24_087_890 + nn.Linear(1024, 32).weight.numel() + 32 + 32 * 32 + 32  # STAB, and a small projector
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor) is VideoPandaProcessor and processor.video_processor.num_high_res_frames == 8


def test_elva_plan_counts_a_clip_by_a_preset(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", draw_frames(num_frames=8, height=448, width=448))
    result = CliRunner().invoke(app, ["plan", str(clip), "--preset", "video-panda-7b"])
    assert result.exit_code == 0, result.output
    assert "2184: 2048 patches, 136 <FRAME> and <LINE>" in result.output
    refused = CliRunner().invoke(app, ["plan", str(clip), "--preset", "video-panda-8b"])
    assert refused.exit_code == 2 and "video-panda-7b" in refused.output
