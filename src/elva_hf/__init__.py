"""elva-hf: encoder-free video-language models for transformers.

Importing the package registers the configuration, the models, the processor and the pipeline task
`"video-text-to-text"`; after that the ordinary calls of transformers work.
"""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from elva_hf.configuration_elva import ElvaConfig
from elva_hf.errors_elva import (
    CheckpointError,
    ConfigurationError,
    ContextOverflowError,
    ElvaError,
    PlaceholderError,
    TrainingError,
    VideoError,
)
from elva_hf.limits_elva import DecodingLimits, UrlPolicy
from elva_hf.modeling_elva import ElvaForCausalLM, ElvaModel, ElvaPreTrainedModel
from elva_hf.options_elva import VideoClip
from elva_hf.pipeline_elva import ElvaPipeline, register_pipeline
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.schedule_elva import MergeSchedule, MergeStep
from elva_hf.video_processing_elva import ElvaVideoProcessor

__version__ = "0.1.0"

__all__ = [
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
    "MergeSchedule",
    "MergeStep",
    "PlaceholderError",
    "TrainingError",
    "UrlPolicy",
    "VideoClip",
    "VideoError",
    "tiny_checkpoint",
]


def tiny_checkpoint() -> Path:
    """Path of the checkpoint that ships with the package: a small model of a procedural world."""
    return Path(__file__).parent / "checkpoints" / "tiny"


AutoConfig.register("elva", ElvaConfig, exist_ok=True)
AutoModel.register(ElvaConfig, ElvaModel, exist_ok=True)
for _head in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _head.register(ElvaConfig, ElvaForCausalLM, exist_ok=True)
AutoProcessor.register(ElvaConfig, ElvaProcessor, exist_ok=True)
AutoVideoProcessor.register(ElvaConfig, ElvaVideoProcessor, exist_ok=True)
register_pipeline()
