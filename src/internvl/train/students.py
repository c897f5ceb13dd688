"""What distillation teaches: the vision encoder inside a chat model or InternVL-C/-G, behind one face.

Teachers are teachers.py's, learning is stages/distill.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from internvl.config import ChatConfig
from internvl.data.images import normalise
from internvl.data.tiling import cut, single
from internvl.generate.opening import is_dual_name
from internvl.load import load_checkpoint
from internvl.load_dual import load_dual
from internvl.models.chat import ChatModel
from internvl.models.contrastive import DualModel
from internvl.models.internvit import InternViT
from internvl.train import dual, trainable
from internvl.train.export import export_chat
from internvl.train.run import RunConfig
from internvl.train.trainable import Learner


@dataclass(frozen=True)
class Student:
    """A whole model, of which the vision encoder learns."""

    model: ChatModel | DualModel
    tokenizer: Any = None

    @property
    def vision(self) -> InternViT:
        return self.model.vision

    @property
    def width(self) -> int:
        return self.model.config.vision.width

    @property
    def side(self) -> int:
        """Pixels of a tile."""
        config = self.model.config
        return config.tile_size if isinstance(config, ChatConfig) else config.side

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.side // self.model.config.vision.patch_size

    @property
    def tap(self) -> int:
        """Number of the state that the model reads."""
        config = self.model.config
        return config.feature_layer if isinstance(config, ChatConfig) else -1

    def tiles(self, image: Image.Image, most: int | None) -> UInt8[Tensor, "tiles 3 side side"]:
        """As the model cuts a picture, at most so many tiles and a thumbnail; one where it knows nothing else."""
        config = self.model.config
        if isinstance(config, ChatConfig):
            config = config if most is None else replace(config, max_tiles=most)
            if config.dynamic_tiles and config.max_tiles > 1:
                return cut(image, config.min_tiles, config.max_tiles, config.thumbnail, config.tile_size)
        return single(image, self.side)

    def pixels(self, tiles: UInt8[Tensor, "tiles 3 side side"]) -> Float[Tensor, "tiles 3 side side"]:
        config = self.model.config
        return normalise(tiles, config.normalize if isinstance(config, ChatConfig) else "imagenet")

    def choose(self, run: RunConfig) -> Learner:
        """The encoder's parameters that learn, as the run says."""
        if isinstance(self.model, ChatModel):
            return trainable.choose(self.model, run)
        if run.vision.drop_path is not None:
            self.vision.set_drop_path(run.vision.drop_path, run.pairs.drop_path_schedule)
        return dual.choose(self.model, run, lambda name: name.startswith("vision."))

    def export(self, learner: Learner[Any], out: Path) -> None:
        """The whole model with its new encoder."""
        (export_chat if isinstance(self.model, ChatModel) else dual.export)(learner, self.tokenizer, out)


def open_student(name: str) -> Student:
    """A chat or InternVL-C/-G folder, hub id, `pocket`, `pocket-dual` or a tiny model; in float32."""
    if is_dual_name(name):
        opened = load_dual(name, dtype=torch.float32)
        return Student(opened.model, opened.tokenizer)
    loaded = load_checkpoint(name)
    return Student(loaded.model, loaded.tokenizer)
