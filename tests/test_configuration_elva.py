import copy

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_elva import TEXT_TYPES, tiny_config
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from elva_hf.configuration_elva import PRESETS, SPECIAL_TOKENS, TOKEN_ID_FIELDS, ElvaConfig
from elva_hf.errors_elva import ConfigurationError

TEXT_CLASSES = dict(zip(TEXT_TYPES, (Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig), strict=True))


@pytest.mark.parametrize(
    "preset, hidden, intermediate, heads, kv_heads, tied, longest_edge",
    [
        ("elva-1.5b", 1536, 8960, 12, 2, True, 672),
        ("elva-7b", 3584, 18944, 28, 4, False, 672),
        ("elva-7b-hd", 3584, 18944, 28, 4, False, 1344),
    ],
)
def test_presets_have_the_shapes_of_qwen2(preset, hidden, intermediate, heads, kv_heads, tied, longest_edge):
    config = ElvaConfig.from_preset(preset)
    text = config.text_config
    assert isinstance(text, Qwen2Config)
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (hidden, intermediate, 28)
    assert (text.num_attention_heads, text.num_key_value_heads) == (heads, kv_heads)
    assert text.rope_parameters["rope_theta"] == 1_000_000
    assert config.tie_word_embeddings is tied
    assert (config.longest_edge, config.low_res_longest_edge) == (longest_edge, 336)
    assert (config.num_high_res_frames, config.num_low_res_frames) == (32, 32)
    assert (config.patch_size, config.patch_embed_dim) == (28, 1024)
    assert max(config.special_token_ids) < text.vocab_size


def test_the_numbers_of_eq_1_are_those_of_section_3_1():
    config = ElvaConfig()
    assert (config.similarity_threshold, config.target_ratio) == (0.6, 0.5)


def test_the_tiny_preset_is_self_consistent():
    config = ElvaConfig.from_preset("tiny")
    assert config.longest_edge % config.patch_size == 0
    assert config.low_res_longest_edge % config.patch_size == 0
    assert sorted(config.special_token_ids) == list(range(506, 512))


def test_presets_take_overrides_and_are_not_changed_by_use():
    before = copy.deepcopy(PRESETS)
    config = ElvaConfig.from_preset("tiny", patch_size=8)
    config.text_config.rope_parameters["rope_theta"] = 1.0
    config.text_config.hidden_size = 1
    assert config.patch_size == 8
    assert before == PRESETS
    assert ElvaConfig.from_preset("tiny").text_config.hidden_size == 128


@pytest.mark.parametrize("model_type", TEXT_TYPES)
@pytest.mark.parametrize("as_object", [False, True])
def test_any_text_config_round_trips(tmp_path, model_type, as_object):
    config = tiny_config(model_type)
    if as_object:
        config = ElvaConfig(**{**config.to_dict(), "text_config": config.text_config})
    config.save_pretrained(tmp_path)
    loaded = ElvaConfig.from_pretrained(tmp_path)
    assert type(loaded.text_config) is TEXT_CLASSES[model_type]
    assert loaded.to_dict() == config.to_dict()
    assert loaded.get_text_config() is loaded.text_config


def test_the_text_config_is_qwen2_when_none_is_named():
    assert isinstance(ElvaConfig().text_config, Qwen2Config)
    assert isinstance(ElvaConfig(text_config={"hidden_size": 64, "num_attention_heads": 4}).text_config, Qwen2Config)


def test_every_special_token_has_an_id_field():
    assert len(TOKEN_ID_FIELDS) == len(SPECIAL_TOKENS) == 6
    config = tiny_config()
    assert config.special_token_ids == [getattr(config, name) for name in TOKEN_ID_FIELDS]


def test_tied_text_embeddings_tie_the_model():
    assert tiny_config(text={"tie_word_embeddings": True}).tie_word_embeddings
    assert not tiny_config(text={"tie_word_embeddings": False}).tie_word_embeddings


def test_the_attention_kernel_reaches_the_decoder():
    config = tiny_config()
    config._attn_implementation = "eager"
    assert config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"merge_schedule": "paper"}, "merge_schedule"),
        ({"patch_embed_type": "fancy"}, "patch_embed_type"),
        ({"patch_embed_dim": 10, "patch_embed_num_heads": 4}, "patch_embed_num_heads=4"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"longest_edge": -1}, "longest_edge=-1"),
        ({"frame_token_id": 8}, "special token ids must differ"),
    ],
)
def test_impossible_values_are_refused_by_name(fields, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny_config(**fields)


def test_wrong_types_are_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="patch_size"):
        tiny_config(patch_size="28")


def test_unknown_presets_are_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"elva-70b.*elva-1\.5b"):
        ElvaConfig.from_preset("elva-70b")


def test_auto_config_knows_elva_once_it_is_registered(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ElvaConfig
