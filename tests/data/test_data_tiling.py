"""Tiling laws: header counts are real counts, `cut` is `tile`, tiles join again, the examples of the paper."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import internvl
from internvl.data import resize
from internvl.data import threads as data_threads
from internvl.data.tiling import _grids, choose_grid, count_tiles, cut, join, tile

side = st.integers(1, 300)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@given(side, side, st.integers(1, 4), st.integers(4, 12), st.booleans())
def test_header_counts_are_real_counts(width: int, height: int, low: int, high: int, thumbnail: bool) -> None:
    image = noise(width, height)
    tiling = tile(image, low, high, thumbnail, 28)
    columns, rows = tiling.grid
    assert low <= columns * rows <= high
    assert len(tiling.tiles) == columns * rows + tiling.has_thumbnail
    assert count_tiles(width, height, low, high, 28, thumbnail) == len(tiling.tiles)
    assert all(part.size == (28, 28) for part in tiling.tiles)
    array = np.stack([np.asarray(part) for part in tiling.tiles])
    assert np.array_equal(cut(image, low, high, thumbnail, 28).permute(0, 2, 3, 1), array)


@given(side, side, st.integers(1, 12))
def test_tiles_join_to_the_resized_picture(width: int, height: int, high: int) -> None:
    image = noise(width, height)
    tiling = tile(image, 1, high, True, 28)
    whole = join(tiling)
    assert np.array_equal(np.asarray(whole), np.asarray(image.resize(whole.size, Image.Resampling.BICUBIC)))


@given(st.integers(1, 6), st.integers(1, 6))
def test_a_picture_of_the_grids_size_is_only_cut(columns: int, rows: int) -> None:
    image = noise(columns * 28, rows * 28)
    tiling = tile(image, columns * rows, columns * rows, False, 28)
    assert tiling.grid == (columns, rows)
    assert np.array_equal(np.asarray(join(tiling)), np.asarray(image))


def test_resizing_a_tile_to_its_size_is_the_identity() -> None:
    image = noise(56, 56)
    assert np.array_equal(np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC)), np.asarray(image))


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((800, 1300), [(2, 3), (2, 3), (5, 8)]),
        ((448, 448), [(1, 1), (1, 1), (1, 1)]),
        ((600, 600), [(1, 1), (1, 1), (1, 1)]),
        ((640, 640), [(2, 2), (2, 2), (2, 2)]),
        ((1000, 1000), [(3, 3), (2, 2), (3, 3)]),
        ((1024, 768), [(4, 3), (3, 2), (4, 3)]),
        ((1920, 1080), [(4, 2), (2, 1), (7, 4)]),
        ((1200, 400), [(3, 1), (3, 1), (3, 1)]),
    ],
)
def test_examples(size: tuple[int, int], grids: list[tuple[int, int]]) -> None:
    assert [choose_grid(*size, 1, high) for high in (12, 6, 40)] == grids


def test_numbers_of_grids() -> None:
    assert [len(_grids(1, high)) for high in (12, 6, 40)] == [35, 14, 158]
    assert len({columns / rows for columns, rows in _grids(1, 12)}) == 29


@pytest.mark.parametrize("limits", [(0, 6), (4, 3), (1, 0)])
def test_impossible_limits_are_named(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"min_tiles {limits[0]} and max_tiles {limits[1]}"):
        choose_grid(100, 100, *limits)


def test_a_picture_without_area_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 10 px"):
        choose_grid(0, 10)


def test_a_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ValueError, match="mode L; make it RGB with open_image"):
        cut(Image.new("L", (30, 30)))


def test_public_names() -> None:
    tiling = internvl.tile(noise(200, 100), max_tiles=2, tile_size=56)
    assert isinstance(tiling, internvl.Tiling)
    assert tiling.grid == (2, 1)
    assert len(tiling.tiles) == 3


def test_cut_owns_its_memory() -> None:
    image = noise(56, 56)
    tiles = cut(image, tile_size=56)
    tiles.zero_()
    assert np.asarray(image).any()
    assert tiles.is_contiguous()
    assert tiles.dtype == torch.uint8


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    "size", [(600, 403), (403, 600), (1, 700), (700, 1), (500, 112), (112, 500), (448, 224), (2, 439), (4, 451)]
)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_give_the_same_bytes(size: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_threads, "_WORTH_THREADS", 0)
    image = noise(*size)
    torch.set_num_threads(threads)
    for width, height in ((112, 112), (336, 224), (224, 448)):
        out = np.zeros((height // 112, width // 112, 3, 112, 112), np.uint8)
        resize.planes(image, out)
        expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        assert np.array_equal(out.transpose(0, 3, 1, 4, 2).reshape(height, width, 3), expected)
