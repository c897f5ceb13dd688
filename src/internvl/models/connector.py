"""From vision features to language width: pixel shuffle, then LayerNorm and a two-layer MLP (`mlp1` on disk).

Queries of QLLaMA have an MLP of their own (1.0; official TwoMLP).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from internvl.config import ChatConfig
from internvl.models.layers import Linear


def pixel_shuffle(
    x: Float[Tensor, "tiles rows columns dim"], ratio: float, version: str
) -> Float[Tensor, "tiles new_rows new_columns new_dim"]:
    """Neighbouring patches become channels (top left, top right, bottom left, bottom right).

    v2 emits tokens row by row; v1 column by column, as the first releases learnt it (spec 2.3).
    """
    tiles, rows, columns, dim = x.shape
    step = round(1 / ratio)
    if rows % step or columns % step:
        raise ValueError(f"a grid of {rows} x {columns} patches does not divide by {step}; change the tile size")
    if version not in ("v1", "v2"):
        raise ValueError(f"pixel shuffle {version!r}; it is v1 or v2")
    x = x.reshape(tiles, rows // step, step, columns // step, step, dim)
    x = x.permute(0, 1, 3, 2, 4, 5) if version == "v2" else x.permute(0, 3, 1, 2, 4, 5)
    return x.reshape(tiles, x.shape[1], x.shape[2], step * step * dim)


class Connector(nn.Module):
    """Patches of square tiles, without the class token, to tokens of the language model's width.

    With `num_queries` each tile begins with so many queries of `query_width` channels; the narrower of both kinds is
    filled up with zeros (`ChatModel.look`), and they come out first.
    """

    def __init__(
        self,
        vision_width: int,
        language_width: int,
        ratio: float,
        version: str,
        norm: bool = True,
        num_queries: int = 0,
        query_width: int = 0,
    ) -> None:
        super().__init__()
        self.ratio, self.version = ratio, version
        self.vision_width, self.num_queries, self.query_width = vision_width, num_queries, query_width
        width = vision_width * round(1 / ratio) ** 2
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1 = Linear(width, language_width)
        self.fc2 = Linear(language_width, language_width)
        if num_queries:
            self.query_fc1 = Linear(query_width, language_width)
            self.query_fc2 = Linear(language_width, language_width)

    def forward(self, x: Float[Tensor, "tiles positions dim"]) -> Float[Tensor, "tiles tokens width"]:
        if not self.num_queries:
            return self.patches(x)
        queries = x[:, : self.num_queries, : self.query_width]
        said = self.query_fc2(F.gelu(self.query_fc1(queries)))
        return torch.cat([said, self.patches(x[:, self.num_queries :, : self.vision_width])], dim=1)

    def patches(self, x: Float[Tensor, "tiles patches dim"]) -> Float[Tensor, "tiles patch_tokens width"]:
        side = int(x.shape[1] ** 0.5)
        if side * side != x.shape[1]:
            raise ValueError(f"{x.shape[1]} patches are not a square grid; tiles must be square")
        x = pixel_shuffle(x.unflatten(1, (side, side)), self.ratio, self.version).flatten(1, 2)
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


def connector_of(config: ChatConfig) -> Connector:
    """The connector of a chat model, with weights as `torch.nn` draws them."""
    queries = config.queries
    return Connector(
        config.vision.width,
        config.language.width,
        config.downsample,
        config.pixel_shuffle,
        config.connector_norm,
        config.num_queries,
        0 if queries is None else queries.language.width,
    )
