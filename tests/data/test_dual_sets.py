"""The sets of `pocket-dual`: two sides that share nothing, many languages, any number of processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl.commands.data import main as data_command
from internvl.data.build_dual import CUTOUT_PX, PHOTO_PX, Plan, build, draw
from internvl.data.collect import collected_folder
from internvl.data.heldout_dual import MASK_CLASSES, NUM_STAMPS, caption_key, is_real_stamp, mask, split
from internvl.data.labelled import read_ade20k, read_image_folder, read_mask
from internvl.data.library import Entry, Library
from internvl.data.multilingual import FILE, brief, language_code, read_captions
from internvl.data.scenes import Scene, Thing


def entry(number: int, group: int | None = None, **fields: Any) -> Entry:
    """A collected picture; its id begins with a number that decides its side."""
    row: dict[str, Any] = {
        "id": f"{number:08x}00000000", "file": "", "source": "stamps", "kind": "photo", "title": "", "name": "",
        "head": "", "accept": (), "wider": frozenset(), "group_kind": "", "names": {},
        "captions": (f"Thing {number}.",), "keywords": (), "category": "", "cutout": True, "background": False,
        "colour": None, "fill": 1.0, "parts": 1, "proper": False, "name_seen": True, "width": 64, "height": 64,
        "path": "",
        "group": f"{number if group is None else group:08x}00000000",
    }  # fmt: skip
    row["split"] = "heldout" if int(row["group"][:8], 16) % 1000 < 100 else "train"
    return Entry(**{**row, **fields})


@st.composite
def collections(draw: st.DrawFn) -> list[Entry]:
    numbers = draw(st.lists(st.integers(0, 999), min_size=30, max_size=60, unique=True))
    every = [
        entry(
            number,
            draw(st.sampled_from(numbers[: place + 1])) if place % 3 == 0 else None,
            source=draw(st.sampled_from(["stamps", "stamps", "openclipart"])),
            kind=draw(st.sampled_from(["photo", "photo", "drawing"])),
            captions=(f"A thing {draw(st.integers(0, 40))}.",),
        )
        for place, number in enumerate(numbers)
    ]
    return [*every, *(entry(2000 + n, captions=(f"More {n}.",)) for n in range(5))]


@given(collections())
@settings(max_examples=40, deadline=None)
def test_the_two_sides_share_no_group_and_no_caption_of_a_stamp(every: list[Entry]) -> None:
    found = split(every, num_stamps=5)
    held = {e.id for e in every if e.split == "heldout"}
    assert held <= found.held_out  # what pocket keeps back, this keeps back
    sides = {e.group: e.id in found.held_out for e in every}
    assert all(sides[e.group] == (e.id in found.held_out) for e in every)
    stamps = [e for e in every if e.source == "stamps"]
    assert not {caption_key(e) for e in stamps if e.id in found.held_out} & {
        caption_key(e) for e in stamps if e.id not in found.held_out
    }
    chosen = [e for e in every if e.id in found.stamps]
    assert len(chosen) == len({caption_key(e) for e in chosen}) == 5
    assert all(is_real_stamp(e) and e.id in found.held_out for e in chosen)
    assert split(every[::-1], num_stamps=5) == found


def test_too_few_stamps_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 captions of real stamps, 2 wanted"):
        split([entry(1), entry(2, kind="drawing")], num_stamps=2)


def test_a_mask_shows_what_was_pasted_last_and_leaves_soft_edges_out() -> None:
    opacity = np.full((4, 4), 255, np.uint8)
    opacity[0], opacity[3] = 128, 10
    things = [
        Thing("cat", "cat", (1, 1, 5, 5), None, entry(1, group_kind="animal"), Image.fromarray(opacity), (1, 1)),
        Thing("bun", "bun", (4, 1, 8, 5), None, entry(2, group_kind="food"), Image.fromarray(opacity), (4, 1)),
        Thing("eye", "eye", (0, 6, 2, 8), None, entry(3, group_kind="body part"), Image.new("L", (2, 2), 255), (0, 6)),
        Thing("not pasted", "dog", (0, 0, 0, 0), None, entry(4, group_kind="animal")),
    ]
    scene = Scene(Image.new("RGB", (9, 8)), things, "mixed", "white")
    values = np.asarray(mask(scene))
    animal, food = 1 + MASK_CLASSES.index("animal"), 1 + MASK_CLASSES.index("food")
    assert values[0].tolist() == [1] * 9
    assert values[1].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert values[2].tolist() == values[3].tolist() == [1, animal, animal, animal, food, food, food, food, 1]
    assert values[4].tolist() == [1] * 9
    assert values[6].tolist() == values[7].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_cutouts_stand_on_white_squares_and_photos_keep_their_shape() -> None:
    patch = Image.new("RGBA", (40, 20), (0, 0, 255, 255))
    square = np.asarray(draw(patch, cutout=True))
    assert square.shape == (CUTOUT_PX, CUTOUT_PX, 3)
    blue = np.argwhere(square[..., 0] < 128)
    assert np.ptp(blue[:, 1]) + 1 == pytest.approx(0.95 * CUTOUT_PX, abs=1)
    assert np.ptp(blue[:, 0]) + 1 == pytest.approx(0.475 * CUTOUT_PX, abs=1)
    assert tuple(square[0, 0]) == (255, 255, 255)
    assert draw(Image.new("RGB", (512, 384)), cutout=False).size == (PHOTO_PX, 3 * PHOTO_PX // 4)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collected folder of squares: stamps of animals in three languages, emoji, one of them held out by pocket."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "pictures").mkdir()
    rows, lines = [], []
    for number in range(1, 141):
        emoji = number > 130
        one = entry(
            7 * number, group=7 * (number - number % 2) if number < 20 else None, name=f"beast{number % 9}",
            head=f"beast{number % 9}", source="openmoji" if emoji else "stamps", kind="drawing" if emoji else "photo",
            group_kind="animal", category="animals", keywords=("animals", "birds" if number % 3 else "fish"),
        )  # fmt: skip
        values = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in vars(one).items()}
        rows.append(values | {"file": f"pictures/{one.id}.webp"})
        Image.new("RGBA", (50, 40), (number, 90, 200, 255)).save(folder / "pictures" / f"{one.id}.webp", lossless=True)
        texts = {"en": [one.captions[0], "a beast"], "fr": [f"Une chose {number}."]}
        lines.append({"id": one.id, "captions": texts | ({"ja": [f"もの{number}"]} if number % 2 else {})})
    for name, content in (("pictures.jsonl", rows), (FILE, lines)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.fixture(scope="module")
def built(collected: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built")
    build(Plan(collected, out, scenes=6, workers=1))
    return out


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_any_number_of_processes_builds_the_same(collected: Path, built: Path, tmp_path: Path) -> None:
    asked = ["dual", "--collected", str(collected), "--out", str(tmp_path), "--scenes", "6", "--workers", "2"]
    assert data_command(asked) == 0
    assert all_files(tmp_path) == all_files(built)


def every_line(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for meta in (folder / "meta.json", folder / "heldout" / "meta.json"):
        for one in json.loads(meta.read_text()).values():
            found = records(meta.parent, one["annotation"])
            assert len(found) == one["length"]
            assert set(one) == {"root", "annotation", "repeat_time", "length"}
            for line in found:
                yield meta.parent / one["root"], line


def test_every_line_has_its_picture_caption_and_language(built: Path) -> None:
    seen: Counter[str] = Counter()
    for folder, line in every_line(built):
        assert set(line) == {"id", "image", "caption", "language"}
        texts = [line["caption"]] if isinstance(line["caption"], str) else line["caption"]
        assert texts
        assert all(text.strip() for text in texts)
        with Image.open(folder / line["image"]) as image:
            assert image.size == (CUTOUT_PX, CUTOUT_PX)
        seen[line["language"]] += 1
    assert set(seen) == {"en", "fr", "ja"}
    assert isinstance(records(built, "english.jsonl")[0]["caption"], list)


def test_no_training_line_shows_a_held_out_picture(collected: Path, built: Path) -> None:
    found = split(Library(collected, "train").all)
    train = {
        line["id"].split("-")[0] for name in ("english", "stamps", "emoji") for line in records(built, f"{name}.jsonl")
    }
    held = {line["id"].split("-")[0] for line in records(built, "heldout/english.jsonl")}
    assert held == found.held_out
    assert len(train) + len(held) == 140
    assert not train & held
    groups = {e.id: e.group for e in Library(collected, "train").all}
    assert not {groups[id] for id in train} & {groups[id] for id in held}


def test_the_hundred_are_asked_in_every_language_that_knows_them(built: Path) -> None:
    assert sorted(p.stem for p in (built / "heldout" / "stamps").glob("*.jsonl")) == ["en", "fr"]  # ja knows half
    for language in ("en", "fr"):
        lines = records(built, f"heldout/stamps/{language}.jsonl")
        assert len(lines) == len({line["image"] for line in lines}) == NUM_STAMPS
        assert all((built / "heldout" / "stamps" / line["image"]).is_file() for line in lines)


def test_classes_and_masks_are_read_as_what_they_are(built: Path) -> None:
    sides = [read_image_folder(built / "classes" / side) for side in ("train", "heldout")]
    assert sides[0].classes == sides[1].classes == ("bird", "fish")
    names = [{item.path.name for item in side.items} for side in sides]
    assert all(names)
    assert not names[0] & names[1]
    masked = read_ade20k(built / "masks", "training")
    assert [len(masked), len(read_ade20k(built / "masks", "validation"))] == [6, 2]
    assert (built / "masks" / "classes.txt").read_text().split() == list(MASK_CLASSES)
    values = torch.cat([read_mask(one.mask, len(MASK_CLASSES)).flatten() for one in masked])
    assert {0, 1} <= set(values.tolist()) <= {0, 1, 255}  # background, animals, soft edges


def test_codes_of_languages_have_one_spelling() -> None:
    codes = {code: language_code(code) for code in ("fr", "zh", "zh_CN", "pt_BR", "sr@latin", "ca@valencia")}
    assert list(codes.values()) == ["fr", "zh-CN", "zh-CN", "pt-BR", "sr-Latn", "ca-valencia"]


def test_long_texts_give_their_first_sentence_or_nothing() -> None:
    long = "A very " + "long " * 40 + "sentence."
    assert brief(["This is the high Dome of St. Peter. It is in Rome.", "Dome"]) == [
        "This is the high Dome of St. Peter.",
        "Dome",
    ]
    assert brief([long + " More.", "Dome"]) == ["Dome"]
    assert brief(["聖彼得大教堂" * 4 + "。它在羅馬。"]) == ["聖彼得大教堂" * 4 + "。"]
    assert brief([long]) == [long]
    assert brief([]) == []


@pytest.mark.pocket_data
def test_real_sides_and_languages() -> None:
    every = Library(collected_folder(), "train").all
    found = split(every)
    assert len(found.stamps) == NUM_STAMPS
    assert {e.id for e in every if e.split == "heldout"} <= found.held_out
    captions = read_captions(collected_folder())
    languages = {language for texts in captions.values() for language in texts}
    assert len(languages) == 79
    assert captions["7fbb4b433aed67f6"]["fr"] == ["Une grenouille."]
