"""Titles of pictures as names to ask for, against a small WordNet written here."""

from __future__ import annotations

import pytest

from internvl.data import names
from internvl.data.packaged.wordnet import Nouns

# word, lexicographer file, line of its wider term
_SENSES = [
    ("thing", 3, None), ("animal", 5, 0), ("bear", 5, 1), ("polar_bear", 5, 2), ("teddy_bear", 6, 0), ("apple", 13, 0),
    ("pizza", 13, 0), ("slice", 13, 0), ("guitar", 6, 0), ("binoculars", 6, 0), ("freedom", 7, None), ("child", 18, 0),
    ("cherry", 13, 0), ("screwdriver", 6, 0), ("helmet", 6, 0), ("knight", 18, 0), ("chick", 5, 1), ("egg", 13, 0),
    ("driver", 18, 0), ("screw", 6, 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def nouns(tmp_path_factory: pytest.TempPathFactory) -> Nouns:
    folder = tmp_path_factory.mktemp("wordnet")
    offsets: list[int] = []
    data = ""
    for word, kind, wider in _SENSES:
        offsets.append(len(data))
        pointer = f"001 @ {offsets[wider]:08d} n 0000" if wider is not None else "000"
        data += f"{len(data):08d} {kind:02d} n 01 {word} 0 {pointer} | a gloss\n"
    index = "".join(f"{w} n 1 0 1 0 {o:08d}\n" for (w, _, _), o in zip(_SENSES, offsets, strict=True))
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text(index)
    (folder / "noun.exc").write_text("children child\n")
    for part in ("verb", "adj", "adv"):
        (folder / f"index.{part}").write_text("red a 1 0 1 0 00000000\n")
    return Nouns(folder)


@pytest.mark.parametrize(
    ("title", "name", "head"),
    [
        ("A red apple.", "red apple", "apple"),
        ("guitar_02", "guitar", "guitar"),
        ("A pair of binoculars.", "binoculars", "binoculars"),
        ("A slice of pizza.", "slice of pizza", "pizza"),
        ("polar bear", "polar bear", "bear"),
        ("teddy bear", "teddy bear", "teddy bear"),
        ("Some cherries.", "cherries", "cherry"),
        ("children", "children", "child"),
        ("Apple (B and W)", "apple", "apple"),
        ("screw Driver", "screwdriver", "screwdriver"),
        ("A knight’s helmet.", "knight's helmet", "helmet"),
        ("A chick hatched from an egg.", "chick", "chick"),
        ("An apple. It is eaten by a bear.", "apple", "apple"),
        ("clip art of a bear", "bear", "bear"),
    ],
)
def test_titles(nouns: Nouns, title: str, name: str, head: str) -> None:
    found = names.name(title, nouns)
    assert found is not None
    assert (found.name, found.head) == (name, head)
    assert head in found.accept


@pytest.mark.parametrize("title", ["freedom", "untitled", "", "Lucchetto grigio", "12", "A boy plays soccer"])
def test_what_cannot_be_drawn_has_no_name(nouns: Nouns, title: str) -> None:
    assert names.name(title, nouns) is None


def test_strict_wants_every_word_known(nouns: Nouns) -> None:
    assert names.name("mela apple", nouns) is not None
    assert names.name("mela apple", nouns, strict=True) is None
    assert names.name("red apple", nouns, strict=True) is not None


@pytest.mark.parametrize(
    ("phrase", "many"),
    [("red apple", "red apples"), ("box", "boxes"), ("cherry", "cherries"), ("man", "men"), ("key", "keys")],
)
def test_plural(phrase: str, many: str) -> None:
    assert names.plural(phrase) == many


@pytest.mark.parametrize(
    ("phrase", "said"), [("apple", "an apple"), ("unicorn", "a unicorn"), ("red apple", "a red apple")]
)
def test_article(phrase: str, said: str) -> None:
    assert names.with_article(phrase) == said
