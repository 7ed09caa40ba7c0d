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

from elva_hf.architectures_elva import ARCHITECTURES
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
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM, MavorsModel
from elva_hf.siblings.mavors.processing_mavors import MavorsProcessor, MavorsVideoProcessor
from elva_hf.siblings.video_panda.configuration_video_panda import VideoPandaConfig
from elva_hf.siblings.video_panda.modeling_video_panda import VideoPandaForCausalLM, VideoPandaModel
from elva_hf.siblings.video_panda.processing_video_panda import VideoPandaProcessor, VideoPandaVideoProcessor
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


def tiny_checkpoint() -> Path:
    """Path of the checkpoint that ships with the package: a small model of a procedural world."""
    return Path(__file__).parent / "checkpoints" / "tiny"


for _system in ARCHITECTURES.values():
    AutoConfig.register(_system.config.model_type, _system.config, exist_ok=True)
    AutoModel.register(_system.config, _system.model, exist_ok=True)
    for _head in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        _head.register(_system.config, _system.causal_lm, exist_ok=True)
    AutoProcessor.register(_system.config, _system.processor, exist_ok=True)
    AutoVideoProcessor.register(_system.config, _system.video_processor, exist_ok=True)
register_pipeline()
