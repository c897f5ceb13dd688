"""JPEG augmentation as official: every tile, at one of 26 qualities drawn evenly, of pictures alone (spec 3.1)."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvl.data.encode import Encoder
from internvl.data.images import jpeg_augment
from internvl.data.loader import encoder_of
from internvl.data.mixture import DataSet
from internvl.data.records import Record
from internvl.data.templates import Turn
from tiny import tiny_chat_config, tiny_tokenizer

QUALITIES = range(75, 101)
NOISE = np.random.default_rng(3).integers(0, 256, (56, 56, 3), np.uint8)


def at_quality(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Pillow's own JPEG, there and back."""
    with io.BytesIO() as buffer:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer).convert("RGB"))


def encoder(augment: bool = True, **config: Any) -> Encoder:
    return Encoder(tiny_tokenizer(), tiny_chat_config(**config), augment=augment)


def record(*images: Any, video: str | None = None) -> Record:
    mark = "<video>\n" if video else "<image>\n" * len(images)
    return Record((Turn("user", f"{mark}Q"), Turn("assistant", "A")), images, video)


def test_every_tile_is_compressed_at_an_even_choice_of_26_qualities() -> None:
    """Probability 1, no quality outside, each as likely: chi-square with 25 degrees of freedom, 0.9999 quantile."""
    known = {at_quality(NOISE, quality).tobytes(): quality for quality in QUALITIES}
    assert len(known) == 26
    tiles = torch.from_numpy(NOISE.transpose(2, 0, 1).copy()).expand(2600, -1, -1, -1)
    found = jpeg_augment(tiles, np.random.default_rng(0)).numpy().transpose(0, 2, 3, 1)
    drawn = Counter(known[tile.tobytes()] for tile in found)  # a KeyError is another quality, or none
    assert set(drawn) == set(QUALITIES)
    assert sum((count - 100) ** 2 / 100 for count in drawn.values()) < 60.1


@given(st.integers(0, 10_000), st.tuples(st.integers(60, 240), st.integers(60, 240)))
def test_tiles_of_one_picture_have_qualities_of_their_own(seed: int, size: tuple[int, int]) -> None:
    """Cut first, compressed after: each tile is its own plain tile at some quality, and they are not all the same."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))
    plain = encoder(augment=False, max_tiles=4).encode(record(image)).tiles
    tiles = encoder(max_tiles=4).encode(record(image), np.random.default_rng(seed)).tiles
    assert len(tiles) == len(plain)
    for before, after in zip(plain.numpy(), tiles.numpy(), strict=True):
        pixels = np.ascontiguousarray(before.transpose(1, 2, 0))
        assert any(np.array_equal(at_quality(pixels, quality), after.transpose(1, 2, 0)) for quality in QUALITIES)


def test_qualities_differ_inside_a_picture() -> None:
    known = {at_quality(NOISE, quality).tobytes(): quality for quality in QUALITIES}
    tiles = torch.from_numpy(NOISE.transpose(2, 0, 1).copy()).expand(8, -1, -1, -1)
    found = jpeg_augment(tiles, np.random.default_rng(1)).numpy().transpose(0, 2, 3, 1)
    assert len({known[tile.tobytes()] for tile in found}) > 3


def test_without_dynamic_tiling_the_picture_is_compressed_before_it_is_resized() -> None:
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (80, 120, 3), np.uint8))
    tiles = encoder(dynamic_tiles=False).encode(record(image), np.random.default_rng(2)).tiles
    plain = encoder(augment=False, dynamic_tiles=False)
    possible = [plain.encode(record(Image.fromarray(at_quality(np.asarray(image), q)))).tiles for q in QUALITIES]
    assert sum(torch.equal(tiles, some) for some in possible) == 1


def test_frames_of_a_video_are_left_alone(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(np.roll(NOISE, number, 0)).save(tmp_path / f"frame_{number}.png")
    video = record(video=str(tmp_path))
    made = [encoder(augment).encode(video, np.random.default_rng(4)).tiles for augment in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("run", "data_set", "expected"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_a_run_or_a_set_switches_it_on(run: bool, data_set: bool, expected: bool) -> None:
    data = replace(DataSet("x.jsonl"), augment=data_set)
    assert encoder_of(encoder(augment=run), data).augment is expected


def test_nothing_is_compressed_without_a_generator() -> None:
    image = Image.fromarray(NOISE)
    assert torch.equal(encoder().encode(record(image)).tiles, encoder(augment=False).encode(record(image)).tiles)
