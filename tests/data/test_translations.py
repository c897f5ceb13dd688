"""Texts in many languages and the English that they mean: told by the picture, which is never opened."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from wordnet_files import animals

from internvl.batch import TextBatch
from internvl.data.dual_nouns import META, noun_lines, write_texts
from internvl.data.dual_texts import TEXT_PREFIX, DualTokeniser
from internvl.data.mixture import DataSet, read_sets
from internvl.data.translations import TextLoader, is_english
from internvl.train.recipes.tiny import byte_tokenizer
from internvl.zoo import DUAL

TOKENIZER = byte_tokenizer()
WORDS = DualTokeniser(TOKENIZER, DUAL["tiny-dual"].language)
LINES: list[dict[str, Any]] = [
    {"image": "../a.png", "caption": "un chat", "language": "fr"},
    {"image": "../a.png", "caption": ["A cat.", "cat, pet"], "language": "en"},
    {"image": "../a.png", "caption": "貓", "language": "zh-TW"},
    {"image": "../a.png", "caption": "A moggy.", "language": "en-GB"},
    {"image": "../b.png", "caption": "A dog.", "language": "en"},
    {"caption": "freedom"},
]


def write(folder: Path, lines: list[dict[str, Any]], name: str = "texts.jsonl") -> DataSet:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return DataSet(str(path), str(folder))


def loader(folder: Path, lines: list[dict[str, Any]] = LINES, samples: int = 4, **settings: Any) -> TextLoader:
    return TextLoader([write(folder, lines)], WORDS, samples, **settings)


def pairs(texts: TextLoader, batch: TextBatch) -> list[tuple[str, str]]:
    """What is read, and the English that it is said to mean."""
    rows = [row[row > 0].tolist() for row in batch.texts.ids]
    read = [TOKENIZER.decode(row, skip_special_tokens=True).removeprefix(TEXT_PREFIX) for row in rows]
    return list(zip(read, (texts.english[n] for n in batch.english.tolist()), strict=True))


def test_every_language_means_the_first_english_caption_of_its_picture(tmp_path: Path) -> None:
    texts = loader(tmp_path)
    seen = {pair: foreign for batch in islice(texts, 30) for pair, foreign in zip(
        pairs(texts, batch), batch.translated.tolist(), strict=True)}  # fmt: skip
    assert seen == {
        ("un chat", "A cat."): True,
        ("A cat.", "A cat."): False,
        ("cat, pet", "cat, pet"): False,
        ("貓", "A cat."): True,
        ("A moggy.", "A moggy."): False,
        ("A dog.", "A dog."): False,
        ("freedom", "freedom"): False,
    }
    assert sorted(texts.english) == sorted({english for _, english in seen})
    assert [is_english(x) for x in ("", "en", "en-gb", "eng", "fr")] == [True, True, True, False, False]


def test_a_picture_is_one_by_its_path_from_any_set(tmp_path: Path) -> None:
    (tmp_path / "fr").mkdir()
    other = write(tmp_path / "fr", [{"image": "../../a.png", "caption": "un chat", "language": "fr"}])
    texts = TextLoader([write(tmp_path, [LINES[1]]), other], WORDS, 2, shuffle=False)
    assert pairs(texts, next(texts.once()))[1] == ("un chat", "A cat.")


def test_a_text_without_english_is_an_error_or_counted(tmp_path: Path) -> None:
    alone = [*LINES, {"image": "c.png", "caption": "un loup", "language": "fr"}, {"caption": "loup", "language": "fr"}]
    with pytest.raises(ValueError, match=r"texts\.jsonl:7: 'fr', but no English line has its picture; add an English"):
        loader(tmp_path, alone)
    texts = loader(tmp_path, [*alone, {"image": "d.png"}], on_error="skip")
    assert len(texts.skipped) == 3
    whys = list(texts.skipped.values())
    for why, start in zip(
        whys, ("`caption` is 'None'", "'fr', but no English line", "'fr', but it has no picture"), strict=True
    ):
        assert why.split(": ", 1)[1].startswith(start)
    assert sum(len(batch.sources) for batch in texts.once()) == len(LINES)
    with pytest.raises(ValueError, match=r"an epoch without a usable line; the last: .*no English line"):
        next(iter(loader(tmp_path, alone[6:7], on_error="skip")))


def test_epochs_follow_without_a_gap_and_resume_at_any_batch(tmp_path: Path) -> None:
    texts = loader(tmp_path, samples=4)
    assert len(texts) == 2
    batches, states = [], []
    for batch in islice(texts, 9):
        batches.append(batch)
        states.append(json.loads(json.dumps(texts.state_dict())))
    counts = Counter(source for batch in batches for source in batch.sources)
    assert set(counts.values()) == {6}  # 36 texts are six epochs of six
    again = loader(tmp_path, samples=4)
    again.load_state_dict(states[4])
    for expected, found in zip(batches[5:], again, strict=False):
        assert found.sources == expected.sources
        assert torch.equal(found.texts.ids, expected.texts.ids)
        assert torch.equal(found.english, expected.english)
    with pytest.raises(ValueError, match="the state is of other data or settings"):
        loader(tmp_path, samples=4, seed=1).load_state_dict(states[0])
    with pytest.raises(ValueError, match=r"data\.batch_samples is 0"):
        loader(tmp_path, samples=0)


def test_places_that_older_checkpoints_hold_mean_the_same(tmp_path: Path) -> None:
    """An epoch, a place in it, and a hash of what decides the order; ten of six texts are the fifth of the second."""
    texts = loader(tmp_path, samples=5, seed=7)
    tuple(islice(texts, 2))
    described = [(str(tmp_path / "texts.jsonl"), 6, 1.0)]
    expected = hashlib.sha256(repr((described, 7, True)).encode()).hexdigest()[:16]
    state = texts.state_dict()
    assert state.pop("contents").keys() == {str(tmp_path / "texts.jsonl")}
    assert state == {"epoch": 1, "place": 4, "fingerprint": expected}
    other = loader(tmp_path, samples=5, seed=7)
    other.load_state_dict(state)  # says nothing about contents
    assert other.state_dict() == texts.state_dict()


def test_changed_texts_are_refused_or_gone_on_with(tmp_path: Path) -> None:
    """Fewer lines can be used now than the place has behind it: the next epoch begins."""
    texts = loader(tmp_path, samples=5)
    next(iter(texts))
    state = json.loads(json.dumps(texts.state_dict()))
    assert (state["epoch"], state["place"]) == (0, 5)
    lost: list[dict[str, Any]] = [{**line, "caption": ""} for line in LINES[:4]] + LINES[4:]
    with pytest.raises(ValueError, match=r"texts\.jsonl changed since; put the old file back"):
        loader(tmp_path, lost, samples=5, on_error="skip").load_state_dict(state)
    accepting = loader(tmp_path, lost, samples=5, on_error="skip", changed="accept")
    with pytest.warns(UserWarning, match=r"texts\.jsonl changed since; going on"):
        accepting.load_state_dict(state)
    assert len(next(iter(accepting)).sources) == 5
    assert accepting.state_dict()["epoch"] == 3  # two, two and one of two


def test_ranks_share_the_joint_batch(tmp_path: Path) -> None:
    """Over the ends of epochs; all come to the same place, and none can have less than another."""
    joint = loader(tmp_path, samples=4)
    ranks = [loader(tmp_path, samples=4, rank=rank, ranks=2) for rank in range(2)]
    for whole, *parts in islice(zip(joint, *ranks, strict=False), 5):
        assert sum((part.sources for part in parts), ()) == whole.sources
        assert torch.equal(torch.cat([part.english for part in parts]), whole.english)
        for one, places in zip(parts, ([0, 1], [2, 3]), strict=True):
            assert [row[row > 0].tolist() for row in one.texts.ids] == [
                row[row > 0].tolist() for row in whole.texts.ids[places]
            ]
        assert [one.state_dict() for one in ranks] == [joint.state_dict()] * 2
    with pytest.raises(ValueError, match="batch_samples is 4 texts a step, which 3 ranks cannot share evenly"):
        loader(tmp_path, samples=4, ranks=3)


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    texts = loader(tmp_path, [{"caption": "a" * 200}], samples=1)
    assert next(iter(texts)).texts.ids.shape == (1, 80)
    assert texts.num_cut == 1


def test_drawable_nouns_become_english_texts(tmp_path: Path) -> None:
    nouns = animals(tmp_path / "wordnet")
    assert [(line["id"], line["caption"]) for line in noun_lines(nouns)] == [
        ("noun-animal", ["An animal.", "animal: meaning"]),
        ("noun-bird", ["A bird.", "bird: meaning"]),
        ("noun-eagle", ["An eagle.", "eagle: meaning"]),
    ]  # a beast is an animal called otherwise
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"has no english\.jsonl; make it by `internvl data dual"):
        write_texts(out, nouns)
    (out / "heldout").mkdir(parents=True)
    write(out, [LINES[1]], "english.jsonl")
    write(out / "heldout", [LINES[4]], "english.jsonl")
    (out / "quiz.jsonl").touch()
    assert write_texts(out, nouns) == 3
    sets = read_sets(out / META)
    assert {data.name: (len(data), data.repeat) for data in sets} == {"english": (1, 4.0), "texts": (3, 0.6)}
    texts = TextLoader(sets, WORDS, 4)
    assert set(texts.english) >= {"A cat.", "A bird.", "eagle: meaning"}
    assert [data.name for data in read_sets(out / "heldout" / META)] == ["english"]
