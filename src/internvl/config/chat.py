"""Chat models of every generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from internvl.config.dual import DualConfig
from internvl.config.parts import LanguageConfig, VisionConfig


@dataclass(frozen=True)
class ChatConfig:
    """InternVL-Chat: InternViT, pixel shuffle and MLP, language model (official configuration_internvl_chat.py).

    1.0 (official internvl_chat_llava) is downsample 1.0 without norm and marks, and QLLaMA's `queries` in some.
    """

    vision: VisionConfig
    language: LanguageConfig
    tile_size: int = 448
    """Side of a tile in pixels; `force_image_size` on disk."""
    downsample: float = 0.5
    """Pixel shuffle ratio per side: 0.5 makes one token of 2 x 2 patches."""
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    """Token order: v1 column-major, v2 row-major. A checkpoint must run with the order it learnt."""
    feature_layer: int = -1
    """Index into [embeddings, block 1, ..., block L]; `select_layer` on disk."""
    template: str = "internvl2_5"
    system_message: str | None = None
    """Replaces the template's system text when given."""
    dynamic_tiles: bool = True
    thumbnail: bool = True
    min_tiles: int = 1
    max_tiles: int = 12
    pad_to_square: bool = False
    normalize: Literal["imagenet", "clip", "siglip"] = "imagenet"
    connector_norm: bool = True
    """LayerNorm before the MLP of the connector; 1.0 has none."""
    image_marks: bool = True
    """`<img>` and `</img>` around the tokens of a picture; 1.0 has none."""
    crop: bool = False
    """Without dynamic tiles: the middle square of a picture (1.0), where else the whole is stretched."""
    queries: DualConfig | None = None
    """InternVL-G whose queries, asking the last block, stand before the patches of each tile (1.0 with QLLaMA)."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a config.json that nothing here reads; written back as they were."""

    def __post_init__(self) -> None:
        per_side = self.tile_size // self.vision.patch_size * self.downsample
        if self.tile_size % self.vision.patch_size or per_side != int(per_side):
            raise ValueError(
                f"tile size {self.tile_size} with patch size {self.vision.patch_size} and downsample "
                f"{self.downsample} gives {per_side} tokens a side; it must be a whole number"
            )
        if self.queries is not None and (self.queries.vision != self.vision or not self.queries.generative):
            raise ValueError(
                "queries belong to another vision encoder, or to InternVL-C alone; give those of its own G"
            )

    @property
    def tokens_per_tile(self) -> int:
        """Language-model positions that one tile takes: 256 at 448 px, 64 at 224 px; in 1.0 queries and patches."""
        return self.num_queries + self.patch_tokens

    @property
    def patch_tokens(self) -> int:
        """Positions of one tile that stand for patches, a square number."""
        return int(self.tile_size // self.vision.patch_size * self.downsample) ** 2

    @property
    def num_queries(self) -> int:
        """Positions of one tile that stand for queries of QLLaMA."""
        return 0 if self.queries is None else self.queries.num_queries

    @property
    def picture_marks(self) -> int:
        """Positions around the tokens of a picture."""
        return 2 if self.image_marks else 0

    @property
    def connector_width(self) -> int:
        """Channels of one token after pixel shuffle."""
        return self.vision.width * round(1 / self.downsample) ** 2

    @property
    def connector_parameters(self) -> int:
        """Numbers in the connector: LayerNorm and two linear layers; two more where queries have their own."""
        norm = 2 * self.connector_width if self.connector_norm else 0
        of_queries = 0 if self.queries is None else self.mlp_parameters(self.queries.language.width)
        return norm + self.mlp_parameters(self.connector_width) + of_queries

    def mlp_parameters(self, width: int) -> int:
        """Numbers in the two linear layers from so many channels."""
        return (width + 1) * self.language.width + (self.language.width + 1) * self.language.width

    @property
    def tower_parameters(self) -> int:
        """Numbers in what looks at a picture: the encoder, and QLLaMA where there is one."""
        return self.vision.num_parameters + (0 if self.queries is None else self.queries.look_parameters)

    @property
    def num_parameters(self) -> int:
        """Numbers in the whole model, a tied head counted once."""
        return self.tower_parameters + self.connector_parameters + self.language.num_parameters


FORM_1_0: Mapping[str, Any] = {
    "downsample": 1.0,
    "feature_layer": -4,
    "dynamic_tiles": False,
    "thumbnail": False,
    "max_tiles": 1,
    "pad_to_square": True,
    "crop": True,
    "connector_norm": False,
    "image_marks": False,
}
"""Fields in which the chat models of 1.0 differ from every later one (official internvl_chat_llava)."""
