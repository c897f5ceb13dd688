"""Rendered words: each on one side of the split, legible, letters where they are said to be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.data import words
from internvl.data.library import Library


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
    if not letters:  # turned text has no level boxes
        return
    assert "".join(letter for letter, _ in letters) == text
    edges = [box[0] for _, box in letters] + [letters[-1][1][2]]
    assert edges == sorted(edges)
    assert all(-20 <= left <= right <= 1020 and 0 <= top < bottom <= 1000 for _, (left, top, right, bottom) in letters)


def test_ink_stands_out_from_its_ground(library: Library) -> None:
    for seed in range(20):
        picture, letters = words.render_placed(library, "HOUSE", np.random.default_rng(seed))
        if letters:
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
