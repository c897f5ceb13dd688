"""Pairs of pictures and captions: lines, texts, crops, and batches that lose, repeat and mix up nothing."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
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

from internvl.batch import PairBatch, Texts
from internvl.data.crop import RATIOS, random_box, random_crop, squash
from internvl.data.dual_texts import CAPTION_PROMPT, TEXT_PREFIX, DualTokeniser, Row, pad
from internvl.data.image_text import PairEncoder, PairSample, PairSettings, alike, parse_pair
from internvl.data.mixture import read_sets
from internvl.data.pair_loader import PairLoader, _Work
from internvl.zoo import DUAL
from tiny import tiny_tokenizer

WORDS = DualTokeniser(tiny_tokenizer(), DUAL["tiny-dual"].language)
SETTINGS = PairSettings(side=28, patch_size=14)


@pytest.fixture(scope="module")
def meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets: seven pairs, and three pairs that come twice an epoch."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, count, first in (("a", 7, 0), ("b", 3, 7)):
        lines = []
        for n in range(first, first + count):
            Image.new("RGB", (30 + n, 40), (20 * n, 90, 255 - 20 * n)).save(folder / f"{n}.png")
            lines.append({"id": n, "image": f"{n}.png", "caption": [f"number {n}", f"第{n}张"] if n % 2 else f"n {n}"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = {name: {"root": str(folder), "annotation": f"{name}.jsonl"} for name in "ab"}
    sets["b"]["repeat_time"] = 2
    (folder / "meta.json").write_text(json.dumps(sets))
    return folder / "meta.json"


def loader(meta: Path, samples: int = 4, settings: PairSettings = SETTINGS, **changes: Any) -> PairLoader:
    return PairLoader(read_sets(meta), PairEncoder(WORDS, settings), samples, **changes)


def take(batches: PairLoader, count: int) -> list[PairBatch]:
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def same(a: PairBatch, b: PairBatch) -> bool:
    texts = (a.contrast, b.contrast, a.match, b.match, a.caption, b.caption, a.negatives, b.negatives)
    assert all((x is None) == (y is None) for x, y in zip(texts[::2], texts[1::2], strict=True))
    ids = all(torch.equal(x.ids, y.ids) for x, y in zip(texts[::2], texts[1::2], strict=True) if x is not None)
    kept = a.kept is b.kept or torch.equal(a.kept, b.kept)
    return a.sources == b.sources and torch.equal(a.pixels, b.pixels) and torch.equal(a.same, b.same) and ids and kept


# lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"f\.jsonl:3: not JSON"),
        (b"[1]", r"f\.jsonl:3: `image` is 'None'; give the path of one picture"),
        (b'{"image": ["a.png"], "caption": "x"}', r"f\.jsonl:3: `image` is"),
        (b'{"image": "a.png"}', r"f\.jsonl:3: `caption` is 'None'; it is a text or a list of texts"),
        (b'{"image": "a.png", "caption": ["x", 1]}', r"`caption` is"),
        (b'{"image": "a.png", "caption": ["", "  "]}', r"f\.jsonl:3: an empty caption; remove the line"),
        (b'{"image": "a.png", "caption": "x", "language": 1}', r"`language` is 1"),
    ],
)
def test_a_line_that_is_no_pair_is_named(line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pair(line, "root", "f.jsonl:3")


def test_a_line_becomes_a_pair() -> None:
    pair = parse_pair(json.dumps({"image": "a.png", "caption": [" 猫 ", ""], "language": "ZH"}).encode(), "root")
    assert (pair.path, pair.captions, pair.language) == ("root/a.png", ("猫",), "zh")
    assert pair.number != replace(pair, path="root/b.png").number


# texts


@given(st.text(max_size=120))
def test_rows_are_prefix_text_and_end(text: str) -> None:
    """Byte by byte, so any script; never more than 80 tokens, and a cut is told."""
    row = WORDS.row(TEXT_PREFIX + text)
    whole = tiny_tokenizer()(TEXT_PREFIX + text, add_special_tokens=False)["input_ids"]
    assert row.ids == [1, *whole[:78], 2]
    assert row.is_cut == (len(whole) > 78)


@given(st.text(alphabet="abc xyzäß猫", min_size=1, max_size=120))
def test_captions_learn_the_text_and_the_last_piece_of_the_prompt(text: str) -> None:
    row, labels = WORDS.caption(text)
    prompt = WORDS.row(CAPTION_PROMPT, end=False).ids
    assert row.ids[: len(prompt)] == prompt
    assert row.ids[-1] == 2
    assert len(row.ids) == len(labels) <= 80
    assert labels[: len(prompt) - 1] == [-100] * (len(prompt) - 1)
    assert labels[len(prompt) - 1 :] == row.ids[len(prompt) - 1 :]
    content = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert row.is_cut == (len(prompt) + len(content) + 1 > 80)


def test_padding_is_zero_on_the_right() -> None:
    texts = pad([[1, 5, 2], [1, 2]])
    assert texts.ids.tolist() == [[1, 5, 2], [1, 2, 0]]
    assert texts.mask.tolist() == [[True] * 3, [True, True, False]]


# pictures


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 1.0)).map(lambda pair: (min(pair), max(pair))),
    st.integers(0, 2**32),
)
def test_random_boxes_lie_inside_and_keep_their_limits(
    size: tuple[int, int], area: tuple[float, float], seed: int
) -> None:
    width, height = size
    left, top, right, bottom = random_box(size, area, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    wide, high = right - left, bottom - top
    if min(size) > 60 and RATIOS[0] < width / height < RATIOS[1] and area[1] < 0.7:
        assert area[0] * 0.9 - 0.01 <= wide * high / (width * height) <= area[1] * 1.1 + 0.01
        assert RATIOS[0] * 0.85 <= wide / high <= RATIOS[1] / 0.85


def test_crops_show_a_part_and_squashing_the_whole() -> None:
    image = Image.fromarray((np.arange(60 * 90) % 251).reshape(60, 90).astype(np.uint8)).convert("RGB")
    whole = random_crop(image, 60, (1.0, 1.0), np.random.default_rng(0))
    assert whole.shape == squash(image, 60).shape == (3, 60, 60)
    crops = [random_crop(image, 28, (0.3, 0.5), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert torch.equal(squash(image.resize((28, 28)), 28), squash(image.resize((28, 28)), 28))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"side": 30}, "pairs.side is 30 px; it must be a multiple of the patch size 14"),
        ({"area": (0.0, 1.0)}, "pairs.area is"),
        ({"area": (0.9, 0.5)}, "pairs.area is"),
        ({"mask_share": 1.0}, "pairs.mask_share is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_settings_without_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


# batches


def test_every_epoch_has_every_pair_and_batches_are_equal(meta: Path) -> None:
    """13 entries in batches of 4: four epochs are 13 batches, with three pairs twice an epoch."""
    batches = take(loader(meta), 13)
    assert {batch.num_pairs for batch in batches} == {4}
    sources = [source for batch in batches for source in batch.sources]
    for first in range(0, 52, 13):
        counts = Counter(sources[first : first + 13])
        assert sorted(counts.values()) == [1] * 7 + [2] * 3
    assert sources[:13] != sources[13:26]
    assert len(loader(meta)) == 4


ALL = PairSettings(side=28, patch_size=14, area=(0.5, 1.0), mask_share=0.5, forms="all")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cursor_brings_back_the_very_next_batch(meta: Path, workers: int) -> None:
    settings = {"samples": 3, "settings": ALL, "negatives": True}
    whole = take(loader(meta, **settings), 8)
    first = loader(meta, **settings, workers=workers)
    take(first, 5)
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(meta, **settings, workers=workers)
    second.load_state_dict(state)
    for old, new in zip(whole[5:], take(second, 3), strict=True):
        assert same(old, new)
    with pytest.raises(ValueError, match="other data or settings"):
        loader(meta, samples=3).load_state_dict(state)


def test_places_that_older_checkpoints_hold_mean_the_same(meta: Path) -> None:
    """Pairs dealt so far, and a hash of what decides the order and the pictures."""
    batches = loader(meta, seed=7)
    take(batches, 3)
    described = [(data.annotation, len(data.lines), data.repeat) for data in batches.sets]
    settings = (7, True, False, batches.encoder.settings)
    expected = hashlib.sha256(repr((described, settings)).encode()).hexdigest()[:16]
    state = batches.state_dict()
    assert state.pop("contents").keys() == {data.annotation for data in batches.sets}
    assert state == {"entry": 12, "fingerprint": expected}
    other = loader(meta, seed=7)
    other.load_state_dict(state)  # says nothing about contents
    assert other.state_dict() == batches.state_dict()


def test_changed_pairs_are_refused_or_gone_on_with(meta: Path, tmp_path: Path) -> None:
    meta = Path(shutil.copytree(meta.parent, tmp_path / "own")) / meta.name
    batches = loader(meta)
    take(batches, 2)
    state = json.loads(json.dumps(batches.state_dict()))
    path = Path(batches.sets[0].annotation)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path.name} changed since; put the old file back, .* data\.changed to acc"):
        loader(meta).load_state_dict(state)
    accepting = loader(meta, changed="accept")
    with pytest.warns(UserWarning, match=rf"{path.name} changed since; going on with what it says now"):
        accepting.load_state_dict(state)
    assert accepting.state_dict()["entry"] == 8
    loader(meta).load_state_dict(accepting.state_dict())
    path.write_text("".join([*lines, lines[0]]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"other data or settings .*{path.name} changed since"):
        loader(meta, changed="accept").load_state_dict(state)


def test_workers_pass_over_what_they_inherit(meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inherited, made = len(gc.get_objects()), _Work.__getitem__

    def counting(work: _Work, entries: Any) -> Any:
        found = made(work, entries)
        return found._replace(num_cut=gc.get_freeze_count())

    monkeypatch.setattr(_Work, "__getitem__", counting)
    batches = loader(meta, workers=1)
    take(batches, 1)
    assert batches.num_cut > 0.9 * inherited
    assert gc.get_freeze_count() < 0.1 * inherited


def test_ranks_share_the_joint_batch(meta: Path) -> None:
    joint = take(loader(meta, samples=4, settings=ALL, negatives=True), 5)
    parts = [take(loader(meta, samples=4, settings=ALL, negatives=True, rank=r, ranks=2), 5) for r in range(2)]
    for number, batch in enumerate(joint):
        assert batch.sources == parts[0][number].sources + parts[1][number].sources
        assert torch.equal(batch.pixels, torch.cat([parts[r][number].pixels for r in range(2)]))
        assert torch.equal(batch.kept, torch.cat([parts[r][number].kept for r in range(2)]))


def test_masks_keep_a_share_of_the_patches(meta: Path) -> None:
    batch = take(loader(meta, settings=replace(ALL, side=56)), 1)[0]
    assert batch.kept.shape == (4, 8)
    for row in batch.kept.tolist():
        assert sorted(set(row)) == row
        assert 0 <= row[0] <= row[-1] < 16


def text_of(texts: Texts, row: int) -> str:
    return tiny_tokenizer().decode(texts.ids[row][texts.mask[row]].tolist(), skip_special_tokens=True)


def test_foreign_texts_are_never_the_own_ones(meta: Path) -> None:
    seen = set()
    for batch in take(loader(meta, settings=ALL, negatives=True), 40):
        for row, source in enumerate(batch.sources):
            file, line = source.rsplit(":", 1)
            captions = json.loads(Path(file).read_text().splitlines()[int(line) - 1])["caption"]
            foreign = text_of(batch.negatives, row)
            assert foreign not in captions
            seen.add(foreign)
    assert len(seen) == 15  # every caption of every picture is drawn


def test_one_picture_alone_has_no_foreign_text(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "one.jsonl").write_text('{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": "y"}\n')
    with pytest.raises(ValueError, match=r"one\.jsonl:\d: 100 draws gave no text of another picture"):
        take(loader(tmp_path / "one.jsonl", samples=1, settings=ALL, negatives=True), 1)


@pytest.fixture
def bad(meta: Path, tmp_path: Path) -> Path:
    """Two of seven lines cannot be used."""
    lines = (meta.parent / "a.jsonl").read_text().splitlines()
    lines[2], lines[4] = '{"image": "2.png", "caption": ""}', '{"image": "gone.png", "caption": "x"}'
    (tmp_path / "bad.jsonl").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "bad.json").write_text(json.dumps({"bad": {"root": str(meta.parent), "annotation": "bad.jsonl"}}))
    return tmp_path / "bad.json"


def test_pairs_that_cannot_be_used_end_the_run_or_are_counted(bad: Path) -> None:
    with pytest.raises(ValueError, match=r"bad\.jsonl:3: an empty caption"):
        take(loader(bad, 3, shuffle=False), 3)
    batches = loader(bad, 7, shuffle=False, on_error="skip")
    batch = take(batches, 1)[0]
    assert batch.valid.tolist() == [True, True, False, True, False, True, True]
    whole = dict(zip(batch.sources, batch.same.tolist(), strict=True))
    assert len(whole) <= 5
    for row in (2, 4):  # one of the usable five
        assert batch.sources[row].rsplit(":", 1)[1] not in ("3", "5")
    assert sorted(source.rsplit(":", 1)[1] for source in batches.skipped) == ["3", "5"]
    assert "gone.png" in next(why for source, why in batches.skipped.items() if source.endswith(":5"))
    (bad.parent / "bad.jsonl").write_text('{"image": "gone.png", "caption": "x"}\n')
    with pytest.raises(ValueError, match=r"gone\.png.*; 100 draws gave no pair to stand in its place"):
        take(loader(bad, 1, on_error="skip"), 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_stands_in_does_not_depend_on_ranks(bad: Path, ranks: int) -> None:
    settings: dict[str, Any] = {"samples": 4, "settings": ALL, "negatives": True, "on_error": "skip"}
    joint = take(loader(bad, **settings), 7)
    parts = [take(loader(bad, **settings, rank=rank, ranks=ranks), 7) for rank in range(ranks)]
    assert sum(int((~batch.valid).sum()) for batch in joint) == 8  # in each of four epochs two
    for whole, *shares in zip(joint, *parts, strict=True):
        assert sum((share.sources for share in shares), ()) == whole.sources
        for name in ("pixels", "kept", "valid", "reading"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole, name)), name


def test_long_captions_are_cut_and_counted(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "caption": "猫" * length} for length in (2, 23, 80)]  # three bytes a letter
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batches = loader(tmp_path / "long.jsonl", 3, shuffle=False)
    batch = next(iter(batches))
    assert batch.contrast.mask.sum(1).tolist() == [2 + 10 + 6, 80, 80]
    assert batches.num_cut == 2
    assert (batch.contrast.ids[2, 79], batch.contrast.ids[1, 79]) == (2, 2)


def test_kept_pictures_are_not_opened_and_change_nothing_else(meta: Path) -> None:
    plain = take(loader(meta, settings=replace(SETTINGS, forms="all"), negatives=True), 3)
    known: set[bytes] = set(named(meta)[:2])
    some = take(loader(meta, settings=replace(SETTINGS, forms="all"), negatives=True, known=known.__contains__), 3)
    for a, b in zip(plain, some, strict=True):
        assert a.sources == b.sources
        assert torch.equal(a.caption.ids, b.caption.ids)
        assert torch.equal(a.negatives.ids, b.negatives.ids)
        shown = [row for row, name in enumerate(b.names) if name not in known]
        assert torch.equal(a.pixels[shown], b.pixels)
        assert b.fresh == tuple(b.names[row] for row in shown)


def named(meta: Path) -> list[bytes]:
    return [name for batch in loader(meta, known=lambda _: False).once() for name in batch.names]


@given(
    places=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12),
)
def test_equal_pictures_and_equal_texts_are_one_group(places: list[tuple[int, int]]) -> None:
    """Groups are the connected parts of the graph of pictures and texts, found here by walking it."""
    made = [
        PairSample(None, None, Row([9, text], False), None, None, None, None, b"", 100 - picture, "")
        for picture, text in places
    ]
    found = alike(made)
    for a, start in enumerate(places):
        reached = {start}
        while True:
            wider = {p for p in places if any(p[0] == q[0] or p[1] == q[1] for q in reached)}
            if wider == reached:
                break
            reached = wider
        assert [found[b] == found[a] for b in range(len(places))] == [p in reached for p in places]
        assert found[a] == min(100 - picture for picture, _ in reached)
