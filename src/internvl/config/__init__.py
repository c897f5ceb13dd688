"""Sizes of every architecture as frozen dataclasses; derived numbers are properties. No torch, no files.

Released checkpoints are rows of `zoo/`; reading and writing `config.json` is `convert/`.
"""

from internvl.config.chat import FORM_1_0, ChatConfig
from internvl.config.dual import DualConfig
from internvl.config.parts import LanguageConfig, LanguageFamily, VisionConfig

__all__ = ["FORM_1_0", "ChatConfig", "DualConfig", "LanguageConfig", "LanguageFamily", "VisionConfig"]
