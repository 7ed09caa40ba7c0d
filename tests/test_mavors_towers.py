"""Loading a SigLIP image tower into the chunk encoder of Mavors."""

import json
import shutil

import pytest
import torch
from mavors_towers import PATCH, chunk_encoder, image, patches, tower, tower_config
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig

from elva_hf.errors_elva import CheckpointError
from elva_hf.siblings.mavors.encoder_mavors import MavorsChunkEncoder
from elva_hf.siblings.mavors.towers_mavors import inflate_tower, load_tower, read_tower_config, read_tower_weights


def whole_siglip():
    torch.manual_seed(0)
    text = SiglipTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4
    )
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=tower_config().to_dict())).eval()
    source = tower(torch.float32)
    model.vision_model.load_state_dict(source.state_dict())
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same tower as four kinds of file, and what it gives."""
    root = tmp_path_factory.mktemp("siglip")
    source = tower(torch.float32)
    whole_siglip().save_pretrained(root / "whole")
    source.save_pretrained(root / "tower")
    for name, old_name in (("whole", "old whole"), ("tower", "old tower")):
        shutil.copytree(root / name, root / old_name)
        weights = load_file(root / name / "model.safetensors")
        bare = {key.removeprefix("vision_model."): value for key, value in weights.items()}
        prefixed = {
            key if key.startswith(("text_model.", "logit_")) else f"vision_model.{key}": value
            for key, value in bare.items()
        }
        prefixed["vision_model.embeddings.position_ids"] = torch.arange(36)[None]  # files of older transformers
        save_file(bare, root / name / "model.safetensors")
        save_file(prefixed, root / old_name / "model.safetensors")
    frame = image(6, 6, torch.float32)
    with torch.no_grad():
        return root, frame, source(frame).last_hidden_state


KINDS = ["whole", "old whole", "tower", "old tower"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_file_gives_the_towers_features(saved, kind):
    root, frame, expected = saved
    config = read_tower_config(root / kind)
    assert (config.hidden_size, config.patch_size) == (32, PATCH)
    for path in (root / kind, root / kind / "model.safetensors"):
        encoder = MavorsChunkEncoder(config, 16, 2, "repeat")
        torch.manual_seed(1)
        load_tower(encoder, read_tower_weights(path))
        pixels = patches(frame).expand(1, 16, -1, -1)
        torch.testing.assert_close(encoder.encode_pixels(pixels, 6, 6), expected, atol=1e-4, rtol=1e-4)


def test_the_four_kinds_differ_in_their_names(saved):
    root, _, _ = saved
    names = {kind: set(load_file(root / kind / "model.safetensors")) for kind in KINDS}
    assert "embeddings.patch_embedding.weight" in names["tower"] & names["whole"]
    assert "vision_model.embeddings.patch_embedding.weight" in names["old tower"] & names["old whole"]
    assert any(name.startswith("text_model.") for name in names["whole"] & names["old whole"])
    assert any("head." in name for name in names["tower"])  # the pooling head, which is left out


def test_what_transformers_writes_itself_is_read(tmp_path):
    whole_siglip().save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    weights = read_tower_weights(tmp_path)
    expected = tower(torch.float32).state_dict()
    assert weights.keys() == {name for name in expected if not name.startswith("head.")}
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_kernels_are_repeated_and_not_divided(saved):
    weights = read_tower_weights(saved[0] / "tower")
    inflated = inflate_tower(weights, 5)
    kernel = weights["embeddings.patch_embedding.weight"]
    assert all(torch.equal(inflated["patch_embedding.weight"][:, :, t], kernel) for t in range(5))
    assert torch.equal(inflated["patch_embedding.bias"], weights["embeddings.patch_embedding.bias"])


def test_a_tower_of_another_size_is_refused(saved):
    weights = read_tower_weights(saved[0] / "tower")
    encoder = MavorsChunkEncoder(tower_config(num_hidden_layers=3), 16, 2, "repeat")
    with pytest.raises(CheckpointError, match=r"layers\.2.* missing"):
        load_tower(encoder, weights)
    encoder = MavorsChunkEncoder(tower_config(image_size=32), 16, 2, "repeat")
    with pytest.raises(CheckpointError, match=r"position_embedding.weight is \(36, 32\), expected \(64, 32\)"):
        load_tower(encoder, weights)
    del weights["post_layernorm.bias"]
    with pytest.raises(CheckpointError, match=r"post_layernorm\.bias is missing"):
        load_tower(chunk_encoder(tower(torch.float32)), weights)


def test_files_that_are_no_tower_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        read_tower_weights(tmp_path)
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds 0 tensors"):
        read_tower_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_tower_weights(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tower_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {}}))
    with pytest.raises(CheckpointError, match="'clip'"):
        read_tower_config(tmp_path)


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    index = {"weight_map": {"embeddings.patch_embedding.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_tower_weights(tmp_path)
