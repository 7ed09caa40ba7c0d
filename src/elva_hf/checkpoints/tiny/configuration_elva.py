"""Hub entry point: the installed package, by the name that a checkpoint's `auto_map` asks for."""

from elva_hf import ElvaConfig, MavorsConfig, VideoPandaConfig

__all__ = ["ElvaConfig", "MavorsConfig", "VideoPandaConfig"]
