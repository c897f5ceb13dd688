"""Dynamic tiling: choose the grid, cut, thumbnail, put back together (spec 3.2; official dynamic_preprocess).

Opening pictures and making floats of the tiles is images.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from internvl.data.images import Source, open_image
from internvl.data.resize import BICUBIC, planes

TILE_SIZE = 448
"""Side in pixels of every official release."""


@dataclass(frozen=True)
class Tiling:
    """The tiles of one picture, row by row; the thumbnail, when there is one, is last."""

    grid: tuple[int, int]
    """Columns, rows."""
    tiles: list[Image.Image]

    @property
    def has_thumbnail(self) -> bool:
        return len(self.tiles) > self.grid[0] * self.grid[1]


@lru_cache(maxsize=64)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles {min_tiles} and max_tiles {max_tiles}; they must be 1 <= min_tiles <= max_tiles")
    # Built as the official set is: among grids of one area the order of a set decides exact ties.
    found = {
        (columns, rows)
        for area in range(min_tiles, max_tiles + 1)
        for columns in range(1, area + 1)
        for rows in range(1, area + 1)
        if min_tiles <= columns * rows <= max_tiles
    }
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


@lru_cache(maxsize=65536)
def choose_grid(
    width: int, height: int, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = TILE_SIZE
) -> tuple[int, int]:
    """Columns and rows: the nearest ratio; of equal ratios the largest with less than twice the picture's area."""
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} px; both sides must be at least 1")
    ratio, area = width / height, width * height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(ratio - columns / rows)
        fills = area > 0.5 * tile_size * tile_size * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (columns, rows), distance
    return best


def count_tiles(
    width: int,
    height: int,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = TILE_SIZE,
    thumbnail: bool = True,
) -> int:
    """Tiles of a picture of this size, the thumbnail included."""
    columns, rows = choose_grid(width, height, min_tiles, max_tiles, tile_size)
    return columns * rows + int(thumbnail and columns * rows != 1)


def tile(
    image: Source,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
    tile_size: int = TILE_SIZE,
) -> Tiling:
    """The tiles of a picture as pictures, with the official pixels."""
    image = open_image(image)
    columns, rows = choose_grid(*image.size, min_tiles, max_tiles, tile_size)
    resized = image.resize((columns * tile_size, rows * tile_size), BICUBIC)
    tiles = [
        resized.crop((x, y, x + tile_size, y + tile_size))
        for y in range(0, rows * tile_size, tile_size)
        for x in range(0, columns * tile_size, tile_size)
    ]
    if thumbnail and len(tiles) != 1:
        tiles.append(image.resize((tile_size, tile_size), BICUBIC))
    return Tiling((columns, rows), tiles)


def join(tiling: Tiling) -> Image.Image:
    """The picture that the tiles were cut from, at the size of its grid."""
    columns, rows = tiling.grid
    side = tiling.tiles[0].width
    whole = Image.new(tiling.tiles[0].mode, (columns * side, rows * side))
    for number, part in enumerate(tiling.tiles[: columns * rows]):
        whole.paste(part, (number % columns * side, number // columns * side))
    return whole


def cut(
    image: Image.Image,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
    tile_size: int = TILE_SIZE,
) -> UInt8[Tensor, "tiles 3 {tile_size} {tile_size}"]:
    """The pixels of `tile`, without its crops: resized planes are written where they belong."""
    columns, rows = choose_grid(*image.size, min_tiles, max_tiles, tile_size)
    count = columns * rows
    out = np.empty((count + int(thumbnail and count != 1), 3, tile_size, tile_size), np.uint8)
    grids = [out[:count].reshape(rows, columns, *out.shape[1:]), out[count:, None]]
    planes(image, *(grid for grid in grids if len(grid)))
    return torch.from_numpy(out)


def single(image: Image.Image, tile_size: int = TILE_SIZE) -> UInt8[Tensor, "1 3 {tile_size} {tile_size}"]:
    """The whole picture as one tile, its sides stretched."""
    out = np.empty((1, 3, tile_size, tile_size), np.uint8)
    planes(image, out[None])
    return torch.from_numpy(out)
