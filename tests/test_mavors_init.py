"""`elva init --architecture mavors`: a text model and a SigLIP image tower become a checkpoint that answers."""

import pytest
import torch
from clips_elva import byte_tokenizer, write_counter
from mavors_towers import PATCH, bare_weights, tower
from tiny_elva import tiny_text_config
from transformers import AutoModelForCausalLM, AutoProcessor, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from elva_hf.cli.application import app
from elva_hf.errors_elva import CheckpointError
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text model with its tokenizer, and a SigLIP image tower."""
    root = tmp_path_factory.mktemp("towers")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    fields = tiny_text_config(vocab_size=len(tokenizer), max_position_embeddings=2048)
    Qwen2ForCausalLM(Qwen2Config(**fields)).save_pretrained(root / "text")
    tokenizer.save_pretrained(root / "text")
    tower(torch.float32).save_pretrained(root / "siglip")
    return root


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_checkpoint_starts_from_both_towers(folders, tmp_path):
    out = tmp_path / "out"
    done = run("init", folders / "text", out, "--architecture", "mavors", "--image-tower", folders / "siglip")
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(out)
    processor = AutoProcessor.from_pretrained(out)
    assert type(model) is MavorsForCausalLM
    assert model.config.patch_size == processor.video_processor.patch_size == 2 * PATCH
    assert processor.video_processor.image_size == model.config.vision_config.image_size == 24
    weights = bare_weights(tower(torch.float32))
    kernel = model.model.patch_embed.encoder.patch_embedding.weight
    assert all(torch.equal(kernel[:, :, t], weights["embeddings.patch_embedding.weight"]) for t in range(16))
    text = Qwen2ForCausalLM.from_pretrained(folders / "text").get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(text)], text)
    clip = write_counter(tmp_path / "clip.mp4", 30, rate=10)
    answered = run("ask", clip, "what?", "--model", out, "--frames", 3, "--max-new-tokens", 2, "--device", "cpu")
    assert answered.exit_code == 0, answered.output
    planned = run("plan", clip, "--model", out)
    assert planned.exit_code == 0, planned.output


def test_only_mavors_has_an_image_tower(folders, tmp_path):
    failed = run("init", folders / "text", tmp_path / "out", "--image-tower", folders / "siglip")
    assert failed.exit_code != 0
    assert "no image tower" in failed.output + failed.stderr


def test_a_folder_without_a_tower_is_refused(folders):
    with pytest.raises(CheckpointError, match="'qwen2'"):
        MavorsForCausalLM.from_towers(folders / "text", folders / "text", tokenizer=byte_tokenizer())
