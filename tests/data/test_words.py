"""Rendered words: each on one side of the split, legible, letters where they are said to be."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from internvl.data import pocket_records, words
from internvl.data.library import Library
from internvl.data.records import parse_record
from internvl.data.templates import Turn


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    matplotlib = pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("library")
    (folder / "fonts").mkdir()
    shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", folder / "fonts")
    names = "apple bread chair dance eagle flame grape house island juice knife lemon mouse night ocean piano"
    (folder / "words.txt").write_text("\n".join(names.split()))
    (folder / "pictures.jsonl").write_text("")
    return Library(folder, "train")


@given(st.integers(0, 2**32 - 1), st.sampled_from(["number", "letters"]), st.sampled_from(["train", "heldout"]))
def test_a_text_stands_on_its_side(library: Library, seed: int, sort: Any, split: Any) -> None:
    text = words.text_for(library.folder, split, np.random.default_rng(seed), sort)
    assert words.side_of(text) == split
    assert words.side_of(text.upper()) == split


@given(st.integers(0, 2**32 - 1), st.text("abcdefghijkmnopqrstuvwxyzABC", min_size=1, max_size=9))
def test_letters_stand_in_reading_order_inside_the_picture(library: Library, seed: int, text: str) -> None:
    picture, letters = words.render_placed(library, text, np.random.default_rng(seed))
    assert picture.mode == "RGB"
    assert "".join(letter for letter, _ in letters) == text
    middles = [box[0] + box[2] for _, box in letters]
    assert middles == sorted(middles)
    assert all(0 <= left <= right <= 1000 and 0 <= top < bottom <= 1000 for _, (left, top, right, bottom) in letters)


def test_ink_stands_out_from_its_ground(library: Library) -> None:
    for seed in range(20):
        picture, letters = words.render_placed(library, "HOUSE", np.random.default_rng(seed))
        left, top, right, bottom = letters[0][1][0], letters[0][1][1], letters[-1][1][2], letters[0][1][3]
        width, height = picture.size
        crop = picture.crop(
            (left * width // 1000, top * height // 1000, right * width // 1000, bottom * height // 1000)
        )
        grey = np.asarray(crop.convert("L"), np.int16)
        assert np.percentile(grey, 98) - np.percentile(grey, 2) > 60, seed


def test_the_question_has_the_text_as_its_answer() -> None:
    asked = words.ask("Lemon", np.random.default_rng(0))
    assert (asked.task, asked.answer, asked.accept) == ("words", "Lemon", ("Lemon",))


def test_a_record_is_spelled_and_says_where_its_letters_are(library: Library, tmp_path: Path) -> None:
    shop = pocket_records.Shop(pocket_records.Plan(library.folder, tmp_path), library)
    (tmp_path / "images/words/000").mkdir(parents=True)
    line, (asked,) = pocket_records.make_words(shop, 0)
    letters = "".join(region["text"] for region in line["regions"])
    assert letters == asked.answer.replace(" ", "")
    assert parse_record(line).turns[-1] == Turn("assistant", asked.answer, spelled=True)


TEXTS = ("gulp", "WAVE", "two\nlines", "a\nlonger\nx")


def font(size: int = 40) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        found = ImageFont.load_default(size)
        if not isinstance(found, ImageFont.FreeTypeFont):
            pytest.skip("this Pillow has no scalable font of its own")
        return found


def drawn(text: str, size: tuple[int, int] = (420, 260)) -> np.ndarray:
    layer = Image.new("L", size)
    ImageDraw.Draw(layer).multiline_text((30, 40), text, fill=255, font=font(), align="center")
    return np.asarray(layer) > 128


def inside(boxes: list[tuple[float, ...]], shape: tuple[int, ...], margin: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.any(
        [
            (columns >= a - margin) & (columns <= c + margin) & (rows >= b - margin) & (rows <= d + margin)
            for a, b, c, d in boxes
        ],
        axis=0,
    )


@pytest.mark.parametrize("text", TEXTS)
def test_all_ink_lies_in_the_boxes_and_each_box_has_ink(text: str) -> None:
    ink, letters = drawn(text), words._letters(text, font(), (30.0, 40.0))
    assert "".join(letter for letter, _ in letters) == text.replace("\n", "")
    assert not (ink & ~inside([box for _, box in letters], ink.shape, 1.5)).any()
    for _, box in letters:
        assert (ink & inside([box], ink.shape, 0)).any()


@pytest.mark.parametrize("angle", [-9.0, 4.0, 9.0])
@pytest.mark.parametrize("text", TEXTS)
def test_boxes_turn_with_the_picture(text: str, angle: float) -> None:
    layer = Image.fromarray(drawn(text).astype(np.uint8) * 255)
    turned = layer.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    for _, box in words._letters(text, font(), (30.0, 40.0)):
        one = Image.new("L", layer.size)
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        ImageDraw.Draw(one).rectangle([centre[0] - 2, centre[1] - 2, centre[0] + 2, centre[1] + 2], fill=255)
        rows, columns = np.nonzero(np.asarray(one.rotate(angle, Image.Resampling.BICUBIC, expand=True)) > 128)
        left, top, right, bottom = words._turned(box, angle, layer.size, turned.size)
        assert math.hypot(columns.mean() - (left + right) / 2, rows.mean() - (top + bottom) / 2) < 1.5
        assert (right - left, bottom - top) == pytest.approx((box[2] - box[0], box[3] - box[1]))


def test_boxes_stay_on_the_grid() -> None:
    assert words._on_grid([-0.1, 0.25, 1.2, 0.5]) == (0, 250, 1000, 500)
