"""Filters of pairs: kept + rejected = given, each rule for its reason, near duplicates as a slow search finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from internvl.cli import main
from internvl.curate.duplicates import Look, Looks, look
from internvl.curate.pair_sets import filter_pairs
from internvl.curate.pairs import PairFilter, PairRules
from internvl.data.image_text import Pair
from internvl.data.mixture import read_sets
from internvl.data.shards import write_tar
from internvl.train.recipes.v1_0 import write_tiny_model


def picture(path: Path, seed: int, size: tuple[int, int] = (240, 220)) -> Path:
    """A smooth random picture: what photographs share."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def judged(pairs: list[Pair], **rules: Any) -> list[str]:
    judge = PairFilter(PairRules(**rules))
    return [judge.judge(pair).reason for pair in pairs]


@pytest.mark.parametrize(
    ("size", "caption", "language", "rules", "reason"),
    [
        ((200, 600), "a small red house", "", {}, ""),
        ((199, 400), "a small red house", "", {}, "small"),
        ((200, 601), "a small red house", "", {}, "long_shape"),
        ((240, 220), "red house", "", {}, "short"),
        ((240, 220), "a b c", "", {}, "short"),
        ((240, 220), "红色的小房子", "zh", {}, ""),
        ((240, 220), "红房", "zh", {}, "short"),
        ((240, 220), "两只狗在跑", "zh", {}, ""),
        ((240, 220), "แมวตัวหนึ่งนั่งอยู่บนกำแพง", "th", {}, ""),
        ((240, 220), "แมวนั่ง", "th", {}, "short"),
        ((240, 220), "ឆ្មាអង្គុយលើជញ្ជាំង", "km", {}, ""),
        ((240, 220), "ཞི་མི་ཞིག་", "bo", {}, ""),
        ((240, 220), "قطة على الجدار", "ar", {}, ""),
        ((240, 220), "a small red house", "", {"most_words": 3}, "long"),
        ((240, 220), "a small red house", "en", {"languages": ("zh", "en")}, ""),
        ((240, 220), "a small red house", "", {"languages": ("zh", "en")}, "language"),
        ((240, 220), "ein kleines rotes Haus", "de", {"languages": ("zh", "en")}, "language"),
    ],
)
def test_each_rule_has_its_reason(
    tmp_path: Path, size: tuple[int, int], caption: str, language: str, rules: Any, reason: str
) -> None:
    path = picture(tmp_path / "a.png", 0, size)
    assert judged([Pair(str(path), (caption,), language)], **rules) == [reason]


def test_duplicates_are_found_and_other_captions_stay(tmp_path: Path) -> None:
    first, other = picture(tmp_path / "a.png", 1), picture(tmp_path / "b.png", 2)
    with Image.open(first) as image:
        image.resize((480, 440)).save(tmp_path / "near.jpg", quality=60)
    (tmp_path / "copy.png").write_bytes(first.read_bytes())
    pairs = [
        Pair(str(first), ("one red house", "two blue houses"), source="f:1"),
        Pair(str(tmp_path / "copy.png"), ("One  red house",), source="f:2"),
        Pair(str(tmp_path / "copy.png"), ("three green houses",), source="f:3"),
        Pair(str(tmp_path / "near.jpg"), ("four white houses",), source="f:4"),
        Pair(str(other), ("one red house",), source="f:5"),
    ]
    assert judged(pairs) == ["", "exact", "", "near", ""]
    assert judged(pairs, near=None) == ["", "exact", "", "", ""]
    judge = PairFilter(PairRules())
    judge.hold_out(Pair(str(tmp_path / "near.jpg"), ("any",)))
    assert [judge.judge(pair).reason for pair in pairs] == ["held_out"] * 4 + [""]
    assert PairFilter(PairRules()).judge(pairs[0]).captions == pairs[0].captions


def test_plain_pictures_are_told_apart_by_colour(tmp_path: Path) -> None:
    pairs = []
    for number, colour in enumerate([(200, 30, 30), (30, 30, 200), (205, 28, 33)]):
        Image.new("RGB", (240, 240), colour).save(tmp_path / f"{number}.png")
        pairs.append(Pair(str(tmp_path / f"{number}.png"), ("one plain picture",)))
    assert judged(pairs) == ["", "", "near"]


looks = st.builds(Look, st.integers(0, 2**64 - 1), st.lists(st.integers(0, 255), min_size=3, max_size=3).map(np.array))


@given(st.lists(looks, max_size=12), looks, st.integers(0, 12), st.lists(st.integers(0, 63), max_size=12))
def test_near_looks_are_those_that_a_slow_search_finds(
    seen: list[Look], wanted: Look, bits: int, flips: list[int]
) -> None:
    flipped = wanted.edges
    for bit in flips:
        flipped ^= 1 << bit
    seen = [*seen, Look(flipped, wanted.colours)]
    index = Looks(bits)
    for number, one in enumerate(seen):
        index.add(one, str(number))
    slow = [str(number) for number, one in enumerate(seen) if wanted.near(one, bits)]
    found = index.find(wanted)
    assert (found in slow) if slow else found is None
    assert ((wanted.edges ^ flipped).bit_count() <= bits) <= (found is not None)


def test_looks_survive_scaling_and_compression(tmp_path: Path) -> None:
    others = [look(Image.open(picture(tmp_path / f"{n}.png", n)).convert("RGB")) for n in range(20)]
    with Image.open(tmp_path / "3.png") as image:
        image.resize((120, 110)).save(tmp_path / "small.jpg", quality=50)
    with Image.open(tmp_path / "small.jpg") as image:
        again = look(image.convert("RGB"))
    assert [n for n, other in enumerate(others) if again.near(other, 3)] == [3]


# sets


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    lines: list[Any] = []
    for n in range(4):
        picture(tmp_path / f"{n}.png", n)
        lines.append({"id": n, "image": f"{n}.png", "caption": [f"the picture number {n}", "x"], "language": "en"})
    lines += [{"image": "gone.png", "caption": "this one is gone"}, {"image": "0.png"}]
    lines.append({"image": "1.png", "caption": "The picture  number 1", "language": "en"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "a.jsonl").write_text(text + "not json\n")
    sets = {"a set": {"root": str(tmp_path), "annotation": "a.jsonl", "repeat_time": 2}}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    return tmp_path / "meta.json"


def test_kept_and_rejected_make_up_what_was_given(meta: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["curate", "pairs", str(meta), "--out", str(out), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    expected = {"given": 8, "kept": 4, "rejected": {"exact": 1, "unreadable": 3}, "captions_left_out": 4}
    assert counts == [{"name": "a_set", **expected}]
    assert json.loads((out / "counts.json").read_text()) == counts
    sets = read_sets(out / "meta.json")
    assert (len(sets), len(sets[0].lines), sets[0].repeat) == (1, 4, 2.0)
    kept = [json.loads(line) for line in (out / "a_set.kept.jsonl").read_text().splitlines()]
    assert kept[2] == {"id": 2, "image": "2.png", "caption": ["the picture number 2"], "language": "en"}
    rejected = [json.loads(line) for line in (out / "a_set.rejected.jsonl").read_text().splitlines()]
    assert [(line["source"].rsplit(":", 1)[1], line["reason"]) for line in rejected] == [
        ("5", "unreadable"),
        ("6", "unreadable"),
        ("7", "exact"),
        ("8", "unreadable"),
    ]
    assert rejected[2]["detail"].endswith("a.jsonl:2")
    assert main(["curate", "pairs", str(meta), "--out", str(out)]) == 1
    assert "already holds filtered sets" in capsys.readouterr().err
    assert main(["curate", "pairs", str(meta), "--out", str(tmp_path / "b"), "--rules.least-side", "230"]) == 0
    assert "8 pairs in, 0 out" in capsys.readouterr().out


def test_vectors_decide_what_fits(meta: Path, tmp_path: Path, capsys: Any) -> None:
    """Pictures 0 to 3 have two captions each; the sixth readable line is the copy."""
    images = torch.eye(8)[[0, 1, 2, 3, 4, 1]]
    texts = torch.eye(8)[[0, 7, 1, 7, 7, 7, 3, 7, 4, 1]]
    save_file({"images": images, "texts": texts}, tmp_path / "v.safetensors")
    words = ["curate", "pairs", str(meta), "--rules.least-similarity", "0.3", "--rules.near", "None"]
    assert main([*words, "--out", str(tmp_path / "a"), "--vectors", str(tmp_path / "v.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)[0]
    assert report["rejected"] == {"exact": 1, "unlike": 1, "unreadable": 3}
    save_file({"images": images[:3], "texts": texts}, tmp_path / "v.safetensors")
    assert main([*words, "--out", str(tmp_path / "b"), "--vectors", str(tmp_path / "v.safetensors")]) == 1
    assert "3 vectors of pictures and 10 of captions end here" in capsys.readouterr().err
    save_file({"images": torch.eye(8), "texts": texts}, tmp_path / "v.safetensors")  # one a line, not one a pair
    assert main([*words, "--out", str(tmp_path / "e"), "--vectors", str(tmp_path / "v.safetensors")]) == 1
    assert "8 vectors of pictures and 10 of captions for 6 pairs with 10 captions" in capsys.readouterr().err
    assert not (tmp_path / "e" / "meta.json").exists()
    assert main([*words, "--out", str(tmp_path / "c")]) == 1
    assert "give --vectors or --model" in capsys.readouterr().err
    write_tiny_model(tmp_path / "model")
    assert main([*words, "--out", str(tmp_path / "d"), "--model", str(tmp_path / "model"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)[0]
    assert report["kept"] + sum(report["rejected"].values()) == 8


def test_other_layouts_become_lines(tmp_path: Path, capsys: Any) -> None:
    for n in range(5):
        picture(tmp_path / f"{n}.png", n)
    images = [
        {"filename": f"{n}.png", "split": "train", "sentences": [{"raw": f"karpathy number {n}"}]} for n in range(2)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    notes = [{"image_id": 7, "caption": "coco number two"}, {"image_id": 9, "caption": "of no picture"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": [{"id": 7, "file_name": "2.png"}], "annotations": notes}))
    samples = [
        (f"../{n}", {"png": (tmp_path / f"{n}.png").read_bytes(), "txt": f"tar number {n}".encode()}) for n in (3, 4)
    ]
    write_tar(tmp_path / "t.tar", [*samples, ("alone", {"txt": b"no picture"})])
    root = str(tmp_path)
    sets = {
        "k": {"root": root, "annotation": "k.json", "layout": "karpathy"},
        "c": {"root": root, "annotation": "c.json", "layout": "coco"},
        "t": {"annotation": "t.tar", "layout": "tar"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    out = tmp_path / "out"
    assert main(["curate", "pairs", str(tmp_path / "meta.json"), "--out", str(out), "--json"]) == 0
    counts = {one["name"]: (one["given"], one["kept"]) for one in json.loads(capsys.readouterr().out)}
    assert counts == {"k": (2, 2), "c": (1, 1), "t": (2, 2), "layouts": (2, 0)}
    assert sum(len(data.lines) for data in read_sets(out / "meta.json")) == 5
    words = ["curate", "pairs", str(tmp_path / "meta.json"), "--against", str(tmp_path / "held.json"), "--json"]
    (tmp_path / "held.json").write_text(json.dumps({"k": sets["k"]}))
    assert main([*words, "--out", str(tmp_path / "apart")]) == 0
    counts = {one["name"]: one["rejected"] for one in json.loads(capsys.readouterr().out)}
    assert counts["k"] == {"held_out": 2}
    assert counts["c"] == {}
    (tmp_path / "held.json").write_text(json.dumps({"t": sets["t"]}))
    assert main([*words, "--out", str(tmp_path / "cut")]) == 1
    assert "(1 such in " in capsys.readouterr().err
    assert not list(tmp_path.parent.glob("[34].png"))
    sets["t"]["layout"] = "zip"
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    assert main(["curate", "pairs", str(tmp_path / "meta.json"), "--out", str(tmp_path / "x")]) == 1
    assert "layout 'zip'; it is one of jsonl, karpathy, coco, tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"most_ratio": 0.5}, "most_ratio is 0.5"),
        ({"least_similarity": 2.0}, "least_similarity is 2.0"),
        ({"most_words": 1}, "most_words is 1, below least_words 3"),
        ({"least_side": -5}, "least_side is -5; it must be at least 0"),
    ],
)
def test_rules_without_meaning_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairRules(**rules)
    with pytest.raises(ValueError, match="near is 64 bits"):
        PairFilter(PairRules(near=64))


def test_pictures_without_a_caption_are_counted(tmp_path: Path, capsys: Any) -> None:
    """A layout's reader leaves them out before there are lines."""
    for n in range(2):
        picture(tmp_path / f"{n}.png", n)
    texts = (["two words here", ""], ["", " "])
    images = [
        {"filename": f"{n}.png", "split": "train", "sentences": [{"raw": text} for text in group]}
        for n, group in enumerate(texts)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    sets = {"k": {"root": str(tmp_path), "annotation": "k.json", "layout": "karpathy"}}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    assert main(["curate", "pairs", str(tmp_path / "meta.json"), "--out", str(tmp_path / "o"), "--json"]) == 0
    counts = {one["name"]: (one["given"], one["kept"]) for one in json.loads(capsys.readouterr().out)}
    assert counts == {"k": (1, 1), "layouts": (1, 0)}
    assert "1.png" in (tmp_path / "o" / "layouts.rejected.jsonl").read_text()


def test_half_surrogate_pairs_and_unseen_pictures_are_said(tmp_path: Path, capsys: Any) -> None:
    picture(tmp_path / "0.png", 0)
    lines = [
        {"image": "0.png", "caption": "half \ud83d a pair"},
        {"image": "0.png", "caption": "a whole one", "id": "\ud83d"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["curate", "pairs", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "o"), "--json"]) == 0
    (counts,) = json.loads(capsys.readouterr().out)
    assert (counts["kept"], counts["rejected"]) == (1, {"unreadable": 1})
    assert json.loads((tmp_path / "o" / "a.kept.jsonl").read_text())["id"] == "\ud83d"
    (tmp_path / "held.jsonl").write_text('{"image": "none.png", "caption": "any"}\n')
    words = ["curate", "pairs", str(tmp_path / "a.jsonl"), "--against", str(tmp_path / "held.jsonl")]
    assert main([*words, "--out", str(tmp_path / "p")]) == 1
    said = capsys.readouterr().err
    assert "held.jsonl:1: " in said
    assert "what cannot be seen cannot be held out" in said


def test_nothing_given_nothing_named(tmp_path: Path) -> None:
    picture(tmp_path / "0.png", 0)
    (tmp_path / "a.jsonl").write_text('{"image": "0.png", "caption": "the only picture"}\n')
    reports = filter_pairs(read_sets(tmp_path / "a.jsonl"), tmp_path / "out", PairRules(least_side=999))
    assert (reports[0].kept, dict(reports[0].rejected)) == (0, {"small": 1})
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == {}
