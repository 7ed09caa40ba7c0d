"""Transformers' common tests on ELVA, Video-Panda and Mavors; run by `make mixins` (scripts/run_mixins.py).

Nothing of transformers' tests is copied here. Its sdist lacks three modules that the common tests import;
they are replaced by empty ones, and what they would have tested is named below.
"""

import json
import os
import sys
import types
import unittest

import torch
from mavors_models import film, mavors_config
from tiny_elva import tiny_config
from tiny_video_panda import tiny_panda_config
from transformers.models.auto import modeling_auto

from elva_hf.configuration_elva import TOKEN_ID_FIELDS, ElvaConfig
from elva_hf.modeling_elva import ElvaForCausalLM, ElvaModel
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM, MavorsModel
from elva_hf.siblings.video_panda.configuration_video_panda import VideoPandaConfig
from elva_hf.siblings.video_panda.modeling_video_panda import VideoPandaForCausalLM, VideoPandaModel


def _stand_in(name, **contents):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


# Missing from the sdist. Generation is tested by tests/test_generation_elva.py; export is not offered.
_stand_in("tests.exporters")
_stand_in("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
_stand_in("tests.generation")
_stand_in("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
_stand_in("tests.utils")
_stand_in("tests.utils.test_configuration_utils", config_common_kwargs={})

from tests import test_configuration_common, test_modeling_common, test_training_mixin  # noqa: E402

# The common tests tell heads from base models by these static tables of names.
for _type, _name in (("elva", "Elva"), ("video_panda", "VideoPanda"), ("mavors", "Mavors")):
    modeling_auto.MODEL_MAPPING_NAMES[_type] = f"{_name}Model"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_type] = f"{_name}ForCausalLM"

START, END, PATCH, FRAME, LINE, IMAGE = range(20, 26)  # above the words of the training test, below a cut vocabulary
HIGH, LOW = (FRAME, *2 * [PATCH, PATCH, LINE]), (FRAME, PATCH, PATCH, PATCH, LINE)
FRAMES = (*HIGH, *LOW, *HIGH)
CHUNK = (FRAME, PATCH, LINE, PATCH)
MERGE_SCHEDULE = json.loads(os.environ.get("ELVA_MERGE_SCHEDULE", '"none"'))


class ElvaModelTester:
    """What the common tests ask of a tester, with one video of two grids per sample and flat patches."""

    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32

    def __init__(self, parent, batch_size=3, frames=None):
        self.parent = parent
        self.base_model_class, self.causal_lm_class = parent.all_model_classes
        self.batch_size = batch_size
        self.frames = parent.frames if frames is None else frames
        self.sample = [30, 31, START, *self.frames, END, 32, 33, 34]
        self.seq_length = len(self.sample)
        self.rows = len(parent.draw_pixels(self.frames, 0))

    def get_config(self):
        """Tiny, with the usual small initial weights."""
        return self.parent.tiny_config(
            text={"initializer_range": 0.02},
            initializer_range=0.02,
            video_start_token_id=START,
            video_end_token_id=END,
            video_token_id=PATCH,
            frame_token_id=FRAME,
            line_token_id=LINE,
            image_token_id=IMAGE,
            merge_schedule=MERGE_SCHEDULE,
        )

    def prepare_config_and_inputs_for_common(self):
        """Every sample holds the same visual tokens, other words and other pixels."""
        config = self.get_config()
        input_ids = torch.tensor(self.batch_size * [self.sample])
        words = input_ids >= 30
        input_ids[words] = torch.randint(30, 80, (int(words.sum()),))
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.cat([self.parent.draw_pixels(self.frames, i) for i in range(self.batch_size)]),
        }


class OnePatchTester(ElvaModelTester):
    """Seven samples of one patch each: the eager/sdpa tests cut every input to seven entries on its first axis."""

    def __init__(self, parent):
        super().__init__(parent, batch_size=7, frames=parent.one_patch)


class TextTester(ElvaModelTester):
    """Text only, for tests that draw ids from the whole vocabulary: the visual tokens have ids beyond it."""

    def get_config(self):
        """The training test also reads the vocabulary's size from the outer config."""
        config = super().get_config()
        for i, name in enumerate(TOKEN_ID_FIELDS):
            setattr(config, name, 1000 + i)
        config.vocab_size = config.text_config.vocab_size
        return config

    def prepare_config_and_inputs_for_common(self):
        """Without pixels."""
        _, inputs = super().prepare_config_and_inputs_for_common()
        return self.get_config(), {name: value for name, value in inputs.items() if "pixel" not in name}


class ElvaModelTest(test_modeling_common.ModelTesterMixin, test_training_mixin.TrainingTesterMixin, unittest.TestCase):
    """The common model tests and the overfitting test."""

    all_model_classes = (ElvaModel, ElvaForCausalLM)
    config_class = ElvaConfig
    tiny_config = staticmethod(tiny_config)
    frames, one_patch = FRAMES, (FRAME, PATCH, LINE)
    _is_composite = True
    skip_test_video_features_output_shape = True
    additional_model_inputs = ["pixel_values_videos"]  # for the eager/sdpa tests
    model_tester = None

    def setUp(self):
        special = [tester for prefix, tester in TESTERS.items() if self._testMethodName.startswith(prefix)]
        self.model_tester = (special or [ElvaModelTester])[0](self)
        self.config_tester = test_configuration_common.ConfigTester(
            self, config_class=self.config_class, has_text_modality=False
        )

    def draw_pixels(self, frames, seed):
        """Rows of `pixel_values_videos` of one sample."""
        return torch.rand(frames.count(PATCH), 3 * self.tiny_config().patch_size ** 2)

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        """Flat patches cannot be cut on their first axis, as the common tests would."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        cut = {name: batch_size * (self.model_tester.rows if "pixel" in name else 1) for name in inputs}
        config.text_config.eos_token_id = config.text_config.forced_eos_token_id = None
        return config, {name: value[: cut[name]] for name, value in inputs.items()}

    def test_config(self):
        """ConfigTester's checks."""
        self.config_tester.run_common_tests()


TESTERS = {
    "test_eager_matches_sdpa_inference": OnePatchTester,
    "test_model_rope_scaling_from_config": TextTester,
    "test_training_overfit": TextTester,
}

SKIPPED = {
    "test_attn_implementation_composite_models": "attention layers name the kernel's wrapper: test_modeling_elva.py",
    "test_generation_tester_mixin_inheritance": "the generation mixin is not in the sdist: test_generation_elva.py",
    "test_get_video_features_attentions": "it ends before any attention: with a linear map or a convolution",
    "test_get_video_features_hidden_states": "it has one layer: a linear map or a convolution",
}
"""Tests that mean nothing here, or cannot be had, by name, each with its reason."""

SKIPPED_WITH_MERGING = dict.fromkeys(
    (
        "test_attention_outputs",
        "test_capture_outputs_decorator",
        "test_model_outputs_equivalence",
        "test_retain_grad_hidden_states_attentions",
    ),
    "asks for attention weights of equal shape in all layers, which merging refuses",
)
"""Tests that assume layers of equal length; everything else passes with merging too."""

NOT_HERE = {
    "transformers runs it for models on its own list only": ("test_can_init_all_missing_weights",),
    "no weight is renamed on loading": (
        "test_can_load_from_already_mapped_keys",
        "test_reverse_loading_mapping",
    ),
    "needs an accelerator": (
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_bin",
        "test_disk_offload_safetensors",
        "test_flex_attention_with_grads",
        "test_sdpa_can_compile_dynamic",
        "test_sdpa_can_dispatch_on_flash",
    ),
    "for mixtures of experts": (
        "test_eager_matches_batched_and_grouped_inference_0_fp16",
        "test_eager_matches_batched_and_grouped_inference_1_fp32",
        "test_eager_matches_batched_and_grouped_inference_2_bf16",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ),
    "asks for `output_attentions` in forward's signature; it is passed on to the decoder": (
        "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",
    ),
    "for encoder-decoders": ("test_encoder_decoder_loss_no_double_shift",),
    "needs flash-attn and a GPU": (
        "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break",
        "test_flash_attn_2_can_dispatch_composite_models",
        "test_flash_attn_2_fp32_ln",
        "test_flash_attn_2_from_config",
        "test_flash_attn_2_inference_equivalence",
        "test_flash_attn_2_inference_equivalence_right_padding",
        "test_flash_attn_3_can_dispatch_composite_models",
        "test_flash_attn_3_from_config",
        "test_flash_attn_3_inference_equivalence",
        "test_flash_attn_3_inference_equivalence_right_padding",
        "test_flash_attn_4_can_dispatch_composite_models",
        "test_flash_attn_4_from_config",
        "test_flash_attn_4_inference_equivalence",
        "test_flash_attn_4_inference_equivalence_right_padding",
    ),
    "needs the kernels library": (
        "test_flash_attn_kernels_inference_equivalence",
        "test_kernels_can_load_without_crashing",
    ),
    "needs Apple's MPS": ("test_flash_attn_kernels_mps_inference_equivalence",),
    "no module is kept in float32": (
        "test_keep_in_fp32_modules",
        "test_keep_in_fp32_modules_exist",
    ),
    "needs several accelerators": ("test_model_parallelism",),
    "no partial rotation": ("test_model_rope_with_partial_rotation",),
    "needs deepspeed": (
        "test_resize_embeddings_untied_with_deepspeed",
        "test_resize_embeddings_untied_with_deepspeed_multi_gpu",
        "test_resize_tokens_embeddings_with_deepspeed",
        "test_resize_tokens_embeddings_with_deepspeed_multi_gpu",
    ),
    "no learned positions in the decoder": ("test_resize_position_vector_embeddings",),
    "there is no vision tower that is a model of its own": ("test_sdpa_can_dispatch_composite_models",),
    "for models without sub-configurations": ("test_sdpa_can_dispatch_non_composite_models",),
    "the decoder of the tester does not slide": ("test_sliding_window_mask",),
    "slow test of torch.compile on an accelerator": ("test_torch_compile_for_training",),
    "no axial rotation": ("test_vision_axial_rope",),
}
"""Tests that transformers skips by itself, by reason; any other skip fails the run (conftest.py)."""

for _name, _reason in {**SKIPPED, **(SKIPPED_WITH_MERGING if MERGE_SCHEDULE != "none" else {})}.items():
    setattr(ElvaModelTest, _name, unittest.skip(_reason)(getattr(ElvaModelTest, _name)))


class VideoPandaModelTest(ElvaModelTest):
    """The same on Video-Panda."""

    all_model_classes = (VideoPandaModel, VideoPandaForCausalLM)
    config_class = VideoPandaConfig
    tiny_config = staticmethod(tiny_panda_config)


class MavorsModelTest(ElvaModelTest):
    """The same on Mavors: a chunk of four frames and one of three in each sample; rows carry their place in time."""

    all_model_classes = (MavorsModel, MavorsForCausalLM)
    config_class = MavorsConfig
    tiny_config = staticmethod(mavors_config)
    frames, one_patch = (*CHUNK, *CHUNK), (FRAME,)

    def draw_pixels(self, frames, seed):
        """A chunk of one frame has one row for its one token."""
        video = film(1, grid=(1, 1)) if frames == self.one_patch else film(4, 3, grid=(2, 2))
        return video.rows(seed)
