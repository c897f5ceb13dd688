"""Pillow's bicubic resize on several threads, as planes: the same bytes, since bands share nothing.

Pillow 12 resizes along rows, rounds, then along columns. Rows do not see each other in the first pass, columns not in
the second, so bands of them give what the whole gives. Pillow releases the interpreter lock meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice, pairwise

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image

from internvl.data.threads import spread, threads_for

BICUBIC = Image.Resampling.BICUBIC
_PILLOW = int(PIL.__version__.split(".")[0])
Grid = UInt8[np.ndarray, "_ _ 3 side side"]
"""Rows and columns of square tiles of three planes, as they lie in the picture."""


def planes(image: Image.Image, *grids: Grid) -> None:
    """Write an RGB picture into each grid, resized to its size."""
    if image.mode != "RGB":
        raise ValueError(f"a picture of mode {image.mode}; make it RGB with open_image first")
    threads = threads_for(image.width * image.height + sum(grid.size // 3 for grid in grids))
    if threads == 1 or not _rows_come_first(image):
        spread(lambda grid: _write(image, grid), grids, threads)
        return
    work: list[Callable[[], None]] = [partial(_write, image, grid) for grid in grids if _fits(image, grid)]
    resized = [grid for grid in grids if not _fits(image, grid)]
    edges = _edges(image.height, 2 * threads) if resized else []
    bands = [image.crop((0, top, image.width, bottom)) for top, bottom in edges]
    passes = [(band, _width(grid)) for grid in resized for band in bands]
    narrow = iter(spread(lambda each: _along_rows(*each), passes, threads))
    for grid in resized:
        rows = list(islice(narrow, len(bands)))
        # Bands of columns, each inside one column of tiles, and enough of them to keep the threads equally busy.
        parts = _edges(grid.shape[-1], 2 * threads if grid.shape[1] < threads else 2)
        for column in range(grid.shape[1]):
            work += [partial(_write_columns, rows, grid, column, *part) for part in parts]
    spread(lambda write: write(), work, threads)


def _edges(length: int, parts: int) -> list[tuple[int, int]]:
    places = [round(part * length / parts) for part in range(parts + 1)]
    return [(first, last) for first, last in pairwise(places) if last > first]


def _rows_come_first(image: Image.Image) -> bool:
    # Pillow 12 (Image.resize) begins with the columns of pictures a hundred times as tall as wide; 13 has another rule.
    return _PILLOW < 13 and image.height <= 100 * image.width


def _write(image: Image.Image, grid: Grid) -> None:
    rows, columns, _, side, _ = grid.shape
    for channel, plane in enumerate(image.resize((columns * side, rows * side), BICUBIC).split()):
        grid[:, :, channel] = np.asarray(plane).reshape(rows, side, columns, side).transpose(0, 2, 1, 3)


def _write_columns(rows: list[Image.Image], grid: Grid, column: int, first: int, last: int) -> None:
    """These columns of one column of tiles, from the picture that the bands of rows make up."""
    side = grid.shape[-1]
    band = _columns(rows, column * side + first, last - first).resize((last - first, _height(grid)), BICUBIC)
    for channel, plane in enumerate(band.split()):
        grid[:, column, channel, :, first:last] = np.asarray(plane).reshape(-1, side, last - first)


def _along_rows(band: Image.Image, width: int) -> Image.Image:
    return band if band.width == width else band.resize((width, band.height), BICUBIC)


def _columns(bands: list[Image.Image], left: int, width: int) -> Image.Image:
    """These columns of the picture that the bands make up."""
    joined = Image.new("RGB", (width, sum(band.height for band in bands)), None)
    top = 0
    for band in bands:
        joined.paste(band, (-left, top))  # Pillow copies only what falls inside
        top += band.height
    return joined


def _fits(image: Image.Image, grid: Grid) -> bool:
    return image.size == (_width(grid), _height(grid))


def _width(grid: Grid) -> int:
    return int(grid.shape[1] * grid.shape[-1])


def _height(grid: Grid) -> int:
    return int(grid.shape[0] * grid.shape[-1])
