"""Drawings beside the collected pictures: which may be shown, and which the align stage may learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from internvl.data import build_pocket, drawings, pocket_records
from internvl.data.collect import Picture, look
from internvl.data.library import ADDED, Library
from internvl.data.pocket_records import Plan, Shop


def painted(seed: int, colour: str = "red") -> Image.Image:
    """A cut-out that looks like no other: sixteen random bars."""
    image = Image.new("RGBA", (120, 100), (0, 0, 0, 0))
    draw, generator = ImageDraw.Draw(image), np.random.default_rng(seed)
    draw.rectangle((0, 0, 118, 98), fill=colour)
    for left, top in generator.integers(0, 90, (16, 2)).tolist():
        draw.rectangle((left, top, left + 12, top + 9), fill="black")
    return image


def row(name: str, head: str, **other: Any) -> dict[str, Any]:
    return {
        "id": name, "file": f"pictures/{name}.webp", "source": "test", "kind": "drawing", "title": head, "name": head,
        "head": head, "accept": [head], "wider": [], "group_kind": "object" if head else "", "names": {},
        "captions": [], "keywords": [], "category": "", "cutout": True, "background": False, "colour": "red",
        "fill": 0.7, "parts": 1, "proper": False, "split": "train", "name_seen": True, "path": f"{name}.svg",
        "group": name, "width": 120, "height": 100, **other,
    }  # fmt: skip


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """Training knows dog, cup and kite; a fox and a dog are held out; two grounds."""
    folder = tmp_path / "collected"
    (folder / "pictures").mkdir(parents=True)
    rows = [
        row("dog", "dog"), row("cup", "cup"), row("kite", "kite"),
        row("1F98A", "fox", split="heldout", category="emoji"), row("held", "dog", split="heldout"),
        row("hill", "", background=True, cutout=False, colour=None),
        row("lake", "", background=True, cutout=False, colour=None, split="heldout"),
    ]  # fmt: skip
    for seed, one in enumerate(rows):
        image = painted(seed) if one["cutout"] else Image.effect_noise((300, 260), 40 + seed).convert("RGB")
        image.save(folder / one["file"], lossless=True)
    (folder / "pictures.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def drawn(seed: int, name: str, head: str, series: str = "", **other: Any) -> Picture:
    image = painted(seed)
    return Picture(row(name, head, category="icons", **other), b"", look(image), series)


def left(collected: Path, *pictures: Picture, pool: drawings.Pool = "fresh") -> list[str]:
    rows = [json.loads(line) for line in (collected / "pictures.jsonl").read_text().splitlines()]
    kept = list(drawings.apart(list(pictures), rows, collected, pool))
    assert all(picture.row["split"] == pool for picture in kept)
    return [picture.row["id"] for picture in kept]


def test_drawings_bear_names_that_training_knows(collected: Path) -> None:
    assert left(collected, drawn(50, "a", "dog"), drawn(51, "b", "zebra"), drawn(52, "c", "")) == ["a"]
    assert left(collected, drawn(58, "known-of-held-out-pictures-alone", "fox")) == []


def test_what_is_held_out_is_not_drawn_again(collected: Path) -> None:
    same_emoji = drawn(53, "same-code", "dog", "emoji/\U0001f98a")
    other_emoji = drawn(54, "other-code", "dog", "emoji/\U0001f436")
    assert left(collected, same_emoji, other_emoji) == ["other-code"]
    rows = [*(collected / "pictures.jsonl").read_text().splitlines(), json.dumps(row("fox", "fox"))]
    (collected / "pictures.jsonl").write_text("\n".join(rows) + "\n")
    named = [drawn(55, "emoji-set", "fox", source="streamline-emojis"), drawn(56, "signs", "fox", source="game-icons")]
    assert left(collected, *named) == ["signs"]


def test_kinds_may_be_unknown_and_of_emoji_that_another_artist_drew(collected: Path) -> None:
    same_emoji = drawn(53, "same-code", "fox", "emoji/\U0001f98a", source="twemoji")
    pictures = same_emoji, drawn(51, "unknown", "zebra"), drawn(52, "nameless", "")
    assert left(collected, *pictures, pool="kinds") == ["same-code", "unknown"]


@pytest.mark.parametrize("pool", ["fresh", "kinds"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_what_looks_like_a_held_out_picture_is_left_out(collected: Path, mirrored: bool, pool: drawings.Pool) -> None:
    image = painted(4)
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
    double = Picture(row("double", "cup"), b"", look(image), "")
    assert left(collected, double, drawn(57, "other", "cup"), pool=pool) == ["other"]


@pytest.mark.parametrize("pool", ["fresh", "kinds"])
def test_looks_further_off_count_as_the_same_only_under_the_same_name(collected: Path, pool: drawings.Pool) -> None:
    """A held-out picture, a few of its bits turned: no double of another name, a double of its own."""
    seen = look(painted(4))
    turned = seen.copy()
    turned[0, :12] ^= 1
    pictures = [Picture(row(head, head, category="icons"), b"", turned, "") for head in ("cup", "dog")]
    assert left(collected, *pictures, pool=pool) == ["cup"]


@pytest.fixture
def shop(collected: Path, tmp_path: Path) -> Shop:
    pools: tuple[tuple[drawings.Pool, str, str, tuple[str, ...]], ...] = (
        ("fresh", "new", "blue", ("dog", "cup", "kite")),
        ("kinds", "kind", "yellow", ("dog", "zebra", "kite")),
    )
    for pool, name, colour, heads in pools:
        folder = collected / Path(ADDED[pool]).stem
        folder.mkdir()
        lines = []
        for seed, head in enumerate(heads * 2):
            file = f"{folder.name}/{name}{seed}.webp"
            one = row(f"{name}{seed}", head, split=pool, file=file, colour=colour, source="icons")
            painted(60 + seed, colour).save(collected / file, lossless=True)
            lines.append(json.dumps(one) + "\n")
        (collected / ADDED[pool]).write_text("".join(lines))
        (tmp_path / f"images/{pool}/000").mkdir(parents=True)
    return Shop(Plan(collected, tmp_path, fresh=40), Library(collected, "train"))


def test_fresh_records_show_drawings_on_training_grounds_and_nothing_else(shop: Shop) -> None:
    library = shop.fresh
    assert {entry.id for entry in library.entries} == {f"new{seed}" for seed in range(6)}
    assert [entry.id for entry in library.backgrounds] == ["hill"]
    assert all(entry.split != "fresh" for entry in shop.library.all)
    assert set(library.known_heads) == {"dog", "cup", "kite"}


def _number(line: dict[str, Any]) -> int:
    return int(line["id"].split("-")[1]) % 8


def test_fresh_records_say_nothing_to_the_align_stage_and_ask_every_kind_of_question(shop: Shop) -> None:
    made = [one for index in range(160) if (one := pocket_records.make_fresh(shop, index))]
    assert all("regions" not in line and not asked for line, asked in made)
    turns = [turn["value"] for line, _ in made for turn in line["conversations"][1::2]]
    assert {"yes", "no", "blue", "left", "above", "1", "2", "a dog"} <= set(turns)
    assert {turn["value"] for line, _ in made if _number(line) == 2 for turn in line["conversations"][1::2]} == {
        "yes", "no"
    }  # fmt: skip
    sides = {turn["value"] for line, _ in made if _number(line) == 6 for turn in line["conversations"][1::2]}
    assert sides <= {"left", "right", "above", "below", "yes", "no"}
    assert len(sides) > 2
    alone = [line for line, _ in made if _number(line) == 7]
    assert len(alone) == 20


def test_records_of_kinds_say_what_is_where_and_ask_for_kinds_in_vain(shop: Shop) -> None:
    library = shop.kinds
    assert {entry.id for entry in library.entries} == {f"kind{seed}" for seed in range(6)}
    assert [entry.id for entry in library.backgrounds] == ["hill"]
    assert set(library.known_heads) == {"dog", "cup", "kite", "zebra"}
    made = {index: one for index in range(160) if (one := pocket_records.make_kinds(shop, index))}
    assert all(line["regions"] and not asked for line, asked in made.values())
    names = {region["text"].split(" ")[-1] for line, _ in made.values() for region in line["regions"]}
    assert names == {"dog", "zebra", "kite"}
    alone = [line for index, (line, _) in made.items() if index % 2]
    assert len(alone) == 80
    assert all(len(line["regions"]) == 1 for line in alone)
    turns = [line["conversations"] for line, _ in made.values()]
    said = {
        (turn["value"], answer["value"]) for some in turns for turn, answer in zip(some[::2], some[1::2], strict=True)
    }
    answers = {answer for _, answer in said}
    assert {"yes", "no", "yellow", "left", "above", "1", "2", "a zebra"} <= answers
    assert {"yes", "no"} <= {answer for question, answer in said if "zebra" in question}


def test_half_of_many_shows_drawings_without_regions(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "images/many/000").mkdir(parents=True)
    made = {index: one[0] for index in range(64) if (one := pocket_records.make_many(shop, index))}
    kinds = {index: pocket_records._MANY[index % 8][0] for index in made}
    assert {index for index, line in made.items() if "regions" not in line} == {
        index for index in made if index // 8 % 2 and kinds[index] != "shapes"
    }  # fmt: skip


@pytest.mark.parametrize("pool", ["fresh", "kinds"])
def test_a_build_without_drawings_says_how_to_do_without(collected: Path, tmp_path: Path, pool: drawings.Pool) -> None:
    numbers = {"fresh": 0, "kinds": 0, pool: 5}
    with pytest.raises(FileNotFoundError, match=rf"{ADDED[pool]}: no such file, and 5 records .* `--{pool} 0`"):
        build_pocket.build(Plan(collected, tmp_path / "out", 0, 0, 0, 0, 0, 0, **numbers))
    assert not (tmp_path / "out").exists()


def test_drawings_are_added_once(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(drawings, "_add", lambda folder, target, pool, workers: (calls.append(pool), target.touch()))
    assert drawings.add(collected) == drawings.add(collected) == collected / "drawings.jsonl"
    assert drawings.add(collected, "kinds") == drawings.add(collected, "kinds") == collected / "kinds.jsonl"
    assert calls == ["fresh", "kinds"]


@pytest.mark.parametrize("pool", ["fresh", "kinds"])
def test_where_drawings_cannot_be_brought_the_way_without_them_is_named(
    collected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: drawings.Pool
) -> None:
    from internvl import fetch as fetching
    from internvl.commands import data as command

    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    monkeypatch.setattr(drawings, "wordnet", lambda: None)
    other = "--kinds" if pool == "fresh" else "--fresh"
    with pytest.raises(OSError, match=rf"no npm; .* build without these drawings: --{pool} 0"):
        command.main(["build", "--collected", str(collected), "--out", str(tmp_path / "out"), other, "0"])
    assert not (tmp_path / "out").exists()
