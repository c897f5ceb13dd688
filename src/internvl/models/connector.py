"""From vision features to language width: pixel shuffle, then LayerNorm and a two-layer MLP (`mlp1` on disk)."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
    """Patches of square tiles, without the class token, to tokens of the language model's width."""

    def __init__(self, vision_width: int, language_width: int, ratio: float, version: str) -> None:
        super().__init__()
        self.ratio, self.version = ratio, version
        width = vision_width * round(1 / ratio) ** 2
        self.norm = nn.LayerNorm(width)
        self.fc1 = Linear(width, language_width)
        self.fc2 = Linear(language_width, language_width)

    def forward(self, x: Float[Tensor, "tiles patches dim"]) -> Float[Tensor, "tiles tokens width"]:
        side = int(x.shape[1] ** 0.5)
        if side * side != x.shape[1]:
            raise ValueError(f"{x.shape[1]} patches are not a square grid; tiles must be square")
        x = pixel_shuffle(x.unflatten(1, (side, side)), self.ratio, self.version).flatten(1, 2)
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out
