"""The task heads of a teacher on the model: configuration, construction, saving, loading, export, text-only batches."""

import json
import math
import shutil

import pytest
import torch
from guided_elva import GUIDANCE, WIDTH, guided_model
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from saved_elva import build_checkpoint
from tiny_elva import batch, sample_inputs, tiny_config, tiny_model, video, words

from elva_hf.configuration_elva import ElvaConfig
from elva_hf.errors_elva import ConfigurationError
from elva_hf.guidance_elva import MAX_LOGIT_SCALE
from elva_hf.hub import drop_training_weights, export_hub_files
from elva_hf.modeling_elva import ElvaForCausalLM, ElvaModel

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked by PEFT


def weight_names(folder):
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += list(file.keys())
    return names


@pytest.mark.parametrize(
    ("guidance", "named"),
    [
        ({}, "teacher_width"),
        ({"teacher_width": 0}, "teacher_width=0"),
        ({"teacher_width": True}, "teacher_width=True"),
        ({"teacher_width": 6.0}, "teacher_width=6.0"),
        ({"teacher_width": 6, "tube_wieght": 1.0}, "tube_wieght"),
        ({"teacher_width": 6, "tube_weight": -1.0}, "tube_weight=-1.0"),
        ({"teacher_width": 6, "frame_weight": math.inf}, "frame_weight=inf"),
        ({"teacher_width": 6, "frame_weight": "1"}, "frame_weight='1'"),
        ({"teacher_width": 6, "logit_scale_init": math.nan}, "logit_scale_init=nan"),
        ({"teacher_width": 6, "mask_same_video": 1}, "mask_same_video=1"),
        ({"teacher_width": 6, "tube_weight": 0, "frame_weight": 0}, "both weights are 0"),
        ({"teacher_width": 6, "patch_weight": -1.0}, "patch_weight=-1.0"),
        ({"teacher_width": 6, "patch_loss": "l1"}, "patch_loss='l1'"),
    ],
)
def test_a_malformed_guidance_is_refused_at_construction_and_when_set(guidance, named):
    with pytest.raises(ConfigurationError, match=named):
        tiny_config(guidance=guidance)
    with pytest.raises(ConfigurationError, match=named):
        tiny_config().guidance = guidance


def test_a_guidance_that_is_no_mapping_is_refused():
    with pytest.raises((ConfigurationError, StrictDataclassFieldValidationError), match="guidance"):
        tiny_config(guidance=[6])


def test_a_guidance_is_completed_and_survives_saving(tmp_path):
    config = tiny_config(guidance={"teacher_width": 6, "frame_weight": 0.5})
    config.save_pretrained(tmp_path)
    expected = {
        "teacher_width": 6,
        "tube_weight": 1.0,
        "frame_weight": 0.5,
        "logit_scale_init": math.log(1 / 0.07),
        "mask_same_video": False,
        "patch_weight": 0.0,
        "patch_loss": "cosine",
    }
    assert config.guidance == ElvaConfig.from_pretrained(tmp_path).guidance == expected
    assert tiny_config().guidance is None


def test_a_model_without_guidance_has_no_heads():
    model = tiny_model()
    assert model.guidance is None
    assert not [name for name in model.state_dict() if "guidance" in name]


def test_heads_map_hidden_states_to_the_teachers_width():
    model = guided_model()
    heads, hidden = model.guidance, model.config.text_config.hidden_size
    patches, frames = torch.randn(5, hidden), torch.randn(2, hidden)
    tubes, contrast, scale = heads(patches, frames)
    first, _, last = heads.tube_head
    assert (first.in_features, first.out_features, last.out_features) == (hidden, hidden, WIDTH)
    by_hand = torch.nn.functional.gelu(patches @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(tubes, by_hand)
    assert tubes.shape == (5, WIDTH)
    assert contrast.shape == (2, WIDTH)
    assert heads.logit_scale.shape == (1,)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_tau_is_never_above_its_ceiling():
    heads = guided_model().guidance
    with torch.no_grad():
        heads.logit_scale.fill_(50.0)
    assert heads.scale.item() == MAX_LOGIT_SCALE == 100.0


def test_a_head_of_weight_0_does_not_exist():
    tubes, frames = guided_model({"frame_weight": 0}).guidance, guided_model({"tube_weight": 0}).guidance
    assert tubes.frame_head is None
    assert tubes.logit_scale is None
    assert tubes.scale is None
    assert frames.tube_head is None
    assert frames.logit_scale is not None


def test_the_initial_tau_is_that_of_the_configuration():
    assert guided_model({"logit_scale_init": 1.5}).guidance.logit_scale.item() == 1.5


def test_guidance_can_be_set_changed_and_removed():
    model = tiny_model().bfloat16()
    model.set_guidance(GUIDANCE)
    assert model.guidance.tube_head[2].weight.dtype == torch.bfloat16
    assert not model.guidance.tube_head[0].bias.any()  # as the model's own linear layers begin
    kept = model.guidance.tube_head[0].weight.clone()
    model.set_guidance({**GUIDANCE, "frame_weight": 0})
    assert torch.equal(model.guidance.tube_head[0].weight, kept)  # the next stage goes on with this head
    assert model.guidance.frame_head is None
    model.set_guidance({"teacher_width": 9})
    assert model.guidance.tube_head[2].out_features == model.config.guidance["teacher_width"] == 9
    model.set_guidance(None)
    assert model.guidance is None
    assert model.config.guidance is None
    with pytest.raises(ConfigurationError):
        model.set_guidance({"teacher_width": -1})


def test_a_training_checkpoint_holds_the_heads(tmp_path):
    model = guided_model()
    with torch.no_grad():
        model.guidance.logit_scale.fill_(0.25)
    model.save_pretrained(tmp_path)
    loaded = ElvaForCausalLM.from_pretrained(tmp_path)
    for name, value in model.guidance.state_dict().items():
        assert torch.equal(loaded.guidance.state_dict()[name], value)


@pytest.mark.parametrize("head", [ElvaForCausalLM, ElvaModel])
def test_heads_that_the_configuration_does_not_want_are_ignored_at_load(head, tmp_path, caplog):
    guided_model().save_pretrained(tmp_path)
    model, report = head.from_pretrained(tmp_path, guidance=None, output_loading_info=True)
    assert getattr(model, "guidance", None) is None
    assert "guidance" not in f"{report} {caplog.text}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with heads and a processor; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    model, processor = build_checkpoint()
    model.set_guidance(GUIDANCE)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model


def test_an_export_has_no_heads_and_the_same_answers(trained, tmp_path):
    source, model = trained
    folder = shutil.copytree(source, tmp_path / "exported")
    assert [name for name in weight_names(folder) if name.startswith("guidance.")]
    written = export_hub_files(folder)
    assert folder / "model.safetensors" in written
    assert not [name for name in weight_names(folder) if name.startswith("guidance.")]
    assert "guidance" not in json.loads((folder / "config.json").read_text())
    exported = ElvaForCausalLM.from_pretrained(folder)
    assert exported.guidance is None
    state = exported.state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith("guidance.") or torch.equal(state[name], value)
    assert not list(folder.glob(".*"))


def test_an_export_of_several_files_mends_the_index(trained, tmp_path):
    _, model = trained
    model.save_pretrained(tmp_path, max_shard_size="400KB")
    before = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(before["weight_map"].values())) > 2
    drop_training_weights(tmp_path)
    after = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(after["weight_map"]) == sorted(weight_names(tmp_path))
    assert not [name for name in after["weight_map"] if name.startswith("guidance.")]
    assert set(after["weight_map"].values()) == {path.name for path in tmp_path.glob("*.safetensors")}
    heads = sum(parameter.numel() for parameter in model.guidance.parameters())
    assert before["metadata"]["total_size"] - after["metadata"]["total_size"] == 4 * heads
    assert ElvaForCausalLM.from_pretrained(tmp_path, guidance=None).guidance is None
    assert drop_training_weights(tmp_path) == []


def test_an_export_without_heads_leaves_the_weights_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert drop_training_weights(tmp_path) == []
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


def train_on_text(model):
    inputs = batch([words(5), words(3, 1)], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss


def test_a_batch_of_text_gives_the_patch_embedding_a_zero_gradient():
    model = tiny_model(patch_embed_positions=4, patch_embed_norm=True, patch_embed_output_projection=True).train()
    loss = train_on_text(model)
    for name, parameter in model.model.patch_embed.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert torch.equal(loss, train_on_text(model.eval()))


def test_a_batch_of_text_reaches_the_patch_embedding_that_peft_trains():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["v_proj"], modules_to_save=["patch_embed"]))
    train_on_text(model.train())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "patch_embed" in name}
    assert len(trained) == len(list(tiny_model().model.patch_embed.parameters()))
    assert all(parameter.grad is not None for parameter in trained.values())


def test_text_in_evaluation_does_not_run_the_patch_embedding(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.model.patch_embed), "forward", None)
    model(**batch([words(5)]))
    with torch.no_grad():
        model.train()(**batch([words(5)]))


def test_a_batch_without_labels_reaches_every_parameter():
    model = tiny_model(tie_word_embeddings=False).train()
    inputs = sample_inputs([*video((2, 2)), *words(4)])
    model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
