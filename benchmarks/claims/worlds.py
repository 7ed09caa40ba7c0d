"""Where the videos and questions of claims come from, by name."""

from claims.captions import Captions
from claims.detail import Detail
from claims.hard_scenes import HardScenes, MixedScenes
from claims.needle import Needle
from claims.scenes import Scenes
from claims.world import World

WORLDS: dict[str, World] = {
    "scenes": Scenes(),
    "hard": HardScenes(),
    "mixed": MixedScenes(),
    "captions": Captions(),
    "hybrid": Detail(),
    "needle": Needle(),
}
