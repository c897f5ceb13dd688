"""Reading answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from internvl.generate.answers import final_answer, option, picture_size, regions, yes_or_no


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Yes, there is.", True),
        ("yes", True),
        (" No.", False),
        ("No, it is green.", False),
        ("是的。", True),
        ("不是。", False),
        ("Oui.", True),
        ("Nothing is there", None),
        ("Yesterday", None),
        ("A cat", None),
        ("", None),
    ],
)
def test_yes_or_no(text: str, wanted: bool | None) -> None:
    assert yes_or_no(text) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("C. a cat", "C"),
        ("The answer is D.", "D"),
        ("A cat is there", None),
        ("It is (B), the dog", "B"),
        ("dog", None),
    ],
)
def test_option(text: str, wanted: str | None) -> None:
    assert option(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"So \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("Two and two.\nFinal answer: 4.", "4"),
        ("I think the answer is a cat.", "a cat"),
        ("Blue", "Blue"),
    ],
)
def test_final_answer(text: str, wanted: str) -> None:
    assert final_answer(text) == wanted


def test_regions_are_scaled_to_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert picture_size(tmp_path / "turned.jpg") == (20, 40)
    assert picture_size(Image.new("L", (7, 9))) == (7, 9)
    (box,) = regions("<ref>sun</ref><box>[[0, 500, 1000, 1000]]</box>", (20, 40))
    assert (box.name, box.box_px) == ("sun", (0, 20, 20, 40))
