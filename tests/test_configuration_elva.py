import copy
import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_elva import TEXT_TYPES, tiny_config
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from elva_hf.configuration_elva import PRESETS, SPECIAL_TOKENS, TOKEN_ID_FIELDS, ElvaConfig
from elva_hf.errors_elva import ConfigurationError
from elva_hf.schedule_elva import MergeSchedule, MergeStep

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


SCHEDULES = (
    "none",
    "paper",
    [{"layer": 1, "similarity_threshold": 0.7}, {"layer": 5, "target_ratio": 0.5}],
    [MergeStep(2, target_ratio=0.25)],
    {"steps": "table5", "max_run": 8},
    {"steps": [MergeStep(1, 0.9)], "survivor": "first"},
    MergeSchedule.resolve({"steps": "paper", "window": 4, "ratio_of": "input"}, 6),
)


@pytest.mark.parametrize("value", SCHEDULES, ids=str)
def test_a_merge_schedule_round_trips(tmp_path, value):
    config = tiny_config(text={"num_hidden_layers": 6}, merge_schedule=value)
    config.save_pretrained(tmp_path)
    loaded = ElvaConfig.from_pretrained(tmp_path)
    assert loaded.merge_schedule == config.merge_schedule
    assert loaded.resolve_merge_schedule() == config.resolve_merge_schedule() == MergeSchedule.resolve(value, 6)
    assert json.loads((tmp_path / "config.json").read_text()).get("merge_schedule", "none") == config.merge_schedule


def test_what_json_can_say_is_stored_as_written():
    for value in ("paper", SCHEDULES[2], SCHEDULES[4]):
        assert tiny_config(text={"num_hidden_layers": 6}, merge_schedule=value).merge_schedule == value


def test_a_merge_schedule_given_later_is_stored_as_json_too():
    config = tiny_config()
    config.merge_schedule = MergeSchedule([MergeStep(1, target_ratio=0.5)], max_run=2)
    assert config.merge_schedule == {
        "steps": [{"layer": 1, "target_ratio": 0.5}],
        "ratio_of": "current",
        "max_run": 2,
        "window": None,
        "survivor": "last",
    }
    assert config.resolve_merge_schedule().max_run == 2


def test_a_preset_takes_threshold_ratio_and_depth_from_the_config():
    config = tiny_config(
        text={"num_hidden_layers": 8}, merge_schedule="paper", similarity_threshold=0.8, target_ratio=0.25
    )
    steps = (MergeStep(1, 0.8), MergeStep(3, 0.8), MergeStep(4, target_ratio=0.25))
    assert config.resolve_merge_schedule().steps == steps


def test_a_call_can_have_a_merge_schedule_of_its_own():
    config = tiny_config(text={"num_hidden_layers": 8}, merge_schedule="paper", target_ratio=0.25)
    assert not config.resolve_merge_schedule("none")
    assert [step.target_ratio for step in config.resolve_merge_schedule("table5").steps] == [0.25, 0.25, 0.25]
    assert config.resolve_merge_schedule(MergeSchedule()) == MergeSchedule()
    assert len(config.resolve_merge_schedule(None).steps) == 3
    with pytest.raises(ConfigurationError, match=r"layer 8: the decoder has 8 layers"):
        config.resolve_merge_schedule([{"layer": 8, "target_ratio": 0.5}])


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"merge_schedule": "papers"}, r"merge_schedule='papers' is not known; choose one of none, paper, table5"),
        ({"merge_schedule": "paper"}, r"needs a decoder of at least 4; this one has 2"),
        ({"merge_schedule": [{"layer": 2, "target_ratio": 0.5}]}, r"layer 2: the decoder has 2 layers"),
        ({"merge_schedule": {"max_runs": 2}}, r"no 'max_runs'"),
        ({"similarity_threshold": -1}, r"similarity_threshold=-1"),
        ({"target_ratio": 0}, r"target_ratio=0"),
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


@pytest.mark.parametrize("fields", [{"patch_size": "28"}, {"merge_schedule": 0.5}, {"merge_schedule": None}], ids=str)
def test_wrong_types_are_refused(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        tiny_config(**fields)


def test_unknown_presets_are_refused_with_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"elva-70b.*elva-1\.5b"):
        ElvaConfig.from_preset("elva-70b")


def test_auto_config_knows_elva_once_it_is_registered(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ElvaConfig
