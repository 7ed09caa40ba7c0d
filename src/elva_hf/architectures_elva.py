"""The systems of this package by name: ELVA and its siblings, each with its classes."""

from __future__ import annotations

from typing import NamedTuple

from elva_hf.configuration_elva import ElvaConfig, VideoDecoderConfig
from elva_hf.errors_elva import ConfigurationError
from elva_hf.modeling_elva import ElvaForCausalLM, ElvaModel
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.siblings.mavors.configuration_mavors import MavorsConfig
from elva_hf.siblings.mavors.modeling_mavors import MavorsForCausalLM, MavorsModel
from elva_hf.siblings.mavors.processing_mavors import MavorsProcessor, MavorsVideoProcessor
from elva_hf.siblings.video_panda.configuration_video_panda import VideoPandaConfig
from elva_hf.siblings.video_panda.modeling_video_panda import VideoPandaForCausalLM, VideoPandaModel
from elva_hf.siblings.video_panda.processing_video_panda import VideoPandaProcessor, VideoPandaVideoProcessor
from elva_hf.video_processing_elva import ElvaVideoProcessor


class Architecture(NamedTuple):
    """The classes of a system.

    Args:
        config: Configuration.
        model: The decoder without a head.
        causal_lm: With the language-model head.
        processor: Text, videos and images to inputs.
        video_processor: Videos and images to pixels.
    """

    config: type[VideoDecoderConfig]
    model: type[ElvaModel]
    causal_lm: type[ElvaForCausalLM]
    processor: type[ElvaProcessor]
    video_processor: type[ElvaVideoProcessor]


ARCHITECTURES = {
    "elva": Architecture(ElvaConfig, ElvaModel, ElvaForCausalLM, ElvaProcessor, ElvaVideoProcessor),
    "mavors": Architecture(MavorsConfig, MavorsModel, MavorsForCausalLM, MavorsProcessor, MavorsVideoProcessor),
    "video-panda": Architecture(
        VideoPandaConfig, VideoPandaModel, VideoPandaForCausalLM, VideoPandaProcessor, VideoPandaVideoProcessor
    ),
}
"""By name, as a recipe and the command line write it; the `model_type` of each has `_` for `-`."""


def find_architecture(name: str) -> Architecture:
    """The classes of a system, by its name or its `model_type`.

    Raises:
        ConfigurationError: There is no such system.
    """
    architecture = ARCHITECTURES.get(name.replace("_", "-"))
    if architecture is None:
        raise ConfigurationError(f"architecture {name!r} is not known; choose one of {', '.join(ARCHITECTURES)}.")
    return architecture


def read_preset(name: str) -> tuple[Architecture, VideoDecoderConfig]:
    """The system that has a preset of this name, and its configuration.

    Raises:
        ConfigurationError: No system has one.
    """
    for architecture in ARCHITECTURES.values():
        if name in architecture.config.presets():
            return architecture, architecture.config.from_preset(name)
    known = [preset for architecture in ARCHITECTURES.values() for preset in architecture.config.presets()]
    raise ConfigurationError(f"preset {name!r} is not known; choose one of {', '.join(known)}.")
