import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import elva_hf

ROOT = Path(__file__).parents[1]

PUBLIC = [
    "CheckpointError",
    "ConfigurationError",
    "ContextOverflowError",
    "DecodingLimits",
    "ElvaConfig",
    "ElvaError",
    "ElvaForCausalLM",
    "ElvaModel",
    "ElvaPipeline",
    "ElvaPreTrainedModel",
    "ElvaProcessor",
    "ElvaVideoProcessor",
    "MavorsConfig",
    "MavorsForCausalLM",
    "MavorsModel",
    "MavorsProcessor",
    "MavorsVideoProcessor",
    "MergeSchedule",
    "MergeStep",
    "PlaceholderError",
    "TrainingError",
    "UrlPolicy",
    "VideoClip",
    "VideoError",
    "VideoPandaConfig",
    "VideoPandaForCausalLM",
    "VideoPandaModel",
    "VideoPandaProcessor",
    "VideoPandaVideoProcessor",
    "tiny_checkpoint",
]


def test_public_names_are_these():
    assert elva_hf.__all__ == PUBLIC
    assert all(hasattr(elva_hf, name) for name in PUBLIC)


@pytest.mark.parametrize("name", ["configuration_elva", "modeling_elva", "processing_elva"])
def test_root_files_name_exactly_what_the_package_does(name):
    spec = importlib.util.spec_from_file_location(f"root_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for public in module.__all__:
        assert getattr(module, public) is getattr(elva_hf, public)


@pytest.mark.parametrize(
    "error",
    [
        "CheckpointError",
        "ConfigurationError",
        "ContextOverflowError",
        "PlaceholderError",
        "TrainingError",
        "VideoError",
    ],
)
def test_every_error_is_an_elva_error(error):
    assert issubclass(getattr(elva_hf, error), elva_hf.ElvaError)
    assert issubclass(elva_hf.ElvaError, ValueError)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True).stdout


def test_importing_the_package_changes_no_class_of_transformers():
    code = """
import inspect
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.llama import modeling_llama
from transformers import cache_utils, masking_utils, modeling_utils, processing_utils

def snapshot():
    modules = [modeling_qwen2, modeling_llama, cache_utils, masking_utils, modeling_utils, processing_utils]
    return {
        (module.__name__, name, key): id(value)
        for module in modules
        for name, thing in vars(module).items()
        if inspect.isclass(thing) or inspect.isfunction(thing)
        for key, value in (vars(thing) if inspect.isclass(thing) else {"": thing}).items()
    }

before = snapshot()
import elva_hf
print(before == snapshot())
"""
    assert run(code).strip() == "True"


def test_importing_twice_is_safe_and_registers_every_head():
    code = """
import importlib
import elva_hf
importlib.reload(elva_hf)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForMultimodalLM
from transformers.pipelines import PIPELINE_REGISTRY
path = elva_hf.tiny_checkpoint()
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    print(type(auto.from_pretrained(path)).__name__)
print(type(AutoModel.from_pretrained(path)).__name__, type(AutoConfig.from_pretrained(path)).__name__)
print("video-text-to-text" in PIPELINE_REGISTRY.get_supported_tasks())
"""
    assert run(code).split() == ["ElvaForCausalLM"] * 3 + ["ElvaModel", "ElvaConfig", "True"]


@pytest.mark.parametrize("package", ["torchvision", "torchcodec", "sklearn", "matplotlib", "datasets"])
def test_importing_the_package_needs_no_optional_package(package):
    assert run(f"import sys; import elva_hf; print({package!r} in sys.modules)").strip() == "False"
