"""Names to configurations: `pocket`, `tiny-*`, and every released chat checkpoint. No weights, no files."""

from internvl.zoo.dual import DUAL
from internvl.zoo.languages import LANGUAGES, Base
from internvl.zoo.released import RELEASED, Release
from internvl.zoo.small import CHAT, VIT_POCKET, VIT_TINY, VIT_TINY_6B
from internvl.zoo.vision import VISION

__all__ = [
    "CHAT",
    "DUAL",
    "LANGUAGES",
    "RELEASED",
    "VISION",
    "VIT_POCKET",
    "VIT_TINY",
    "VIT_TINY_6B",
    "Base",
    "Release",
]
