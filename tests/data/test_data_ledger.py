"""Nothing is lost: accepted + rejected = given at any batch, with workers and after a resume; images are never cut."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl.data.batching import BatchSettings
from internvl.data.encode import Encoder
from internvl.data.ledger import Ledger, Quarantine, Rejection
from internvl.data.loader import Loader
from internvl.data.mixture import DataSet
from internvl.data.packing import Packing
from internvl.data.records import Record, RecordError
from internvl.data.templates import Turn
from internvl.tokens import IGNORE_INDEX, IMAGE_TOKEN, token_id
from tiny import tiny_chat_config, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))


def line(number: int, answer: str = "A cat.", **more: Any) -> str:
    turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": number, "conversations": turns, **more})


def write(folder: Path, name: str, lines: list[str]) -> DataSet:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return DataSet(str(path), str(folder), name)


@pytest.fixture
def sets(tmp_path: Path) -> list[DataSet]:
    """Twenty records: one of another's picture, one of no picture, one of a wrong role, one broken, two too long."""
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    one = [line(n, image="a.png") for n in range(10)]
    one[2], one[5] = line(2, image="gone.png"), line(5, image="bad.png")
    two = [line(n) for n in range(10)]
    two[1], two[4], two[7], two[8] = (
        "{broken",
        line(4).replace("gpt", "me"),
        line(7, "word " * 99),
        line(8, "word " * 99),
    )
    return [write(tmp_path, "one", one), write(tmp_path, "two", two)]


def make(sets: list[DataSet], samples: int = 3, **rest: Any) -> Loader:
    encoder = Encoder(TOKENIZER, tiny_chat_config(max_tiles=4), max_length=400)
    return Loader(sets, encoder, 0, BatchSettings(samples=samples), seed=5, on_error="skip", **rest)


EXPECTED = {
    "one": {"given": 10, "accepted": 8, "cut": 0, "rejected": {"missing": 1, "unreadable": 1}},
    "two": {"given": 10, "accepted": 6, "cut": 0, "rejected": {"fields": 1, "json": 1, "too_long": 2}},
}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_record_of_an_epoch_is_counted_once(sets: list[DataSet], workers: int) -> None:
    loader = make(sets, workers=workers)
    learned = Counter(source for batch in loader.once() for source in batch.sources)
    assert loader.ledger.state() == EXPECTED
    assert loader.ledger.num_given == 20 == sum(learned.values()) + len(loader.skipped)
    assert max(learned.values()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_agree_at_every_batch_and_after_a_resume(sets: list[DataSet], workers: int) -> None:
    """What was given follows from the plan alone: all records of the batches before the cursor."""
    whole = make(sets)
    states = [whole.state_dict() for _ in islice(whole, 16)]
    given = 0
    for state in states:
        epochs = state["epoch"] * 20 + min(20, state["batch"] * 3)
        assert sum(entry["given"] for entry in state["counts"].values()) == epochs > given
        given = epochs
        for entry in state["counts"].values():
            assert entry["given"] == entry["accepted"] + sum(entry["rejected"].values())
    loader = make(sets, workers=workers)
    assert [loader.state_dict() for _ in islice(loader, 5)] == states[:5]
    resumed = make(sets, workers=workers)
    resumed.load_state_dict(json.loads(json.dumps(states[4])))
    assert [resumed.state_dict() for _ in islice(resumed, 11)] == states[5:]


def test_cut_records_are_accepted_and_counted(sets: list[DataSet]) -> None:
    encoder = Encoder(TOKENIZER, tiny_chat_config(max_tiles=4), max_length=400, overlong="cut")
    loader = Loader(sets, encoder, 0, BatchSettings(samples=3), on_error="skip")
    list(loader.once())
    assert loader.num_cut == 2
    assert loader.ledger.state()["two"] == {"given": 10, "accepted": 8, "cut": 2, "rejected": {"fields": 1, "json": 1}}


def test_a_sample_over_the_budget_of_a_batch_is_rejected_too(sets: list[DataSet]) -> None:
    encoder = Encoder(TOKENIZER, tiny_chat_config(max_tiles=4))
    loader = Loader(sets, encoder, 0, BatchSettings(None, tokens=400), on_error="skip")
    assert sum(batch.num_samples for batch in loader.once()) == 14
    assert loader.ledger.state()["two"]["rejected"] == {"budget": 2, "fields": 1, "json": 1}


@pytest.mark.parametrize(
    ("tiles", "packing", "rejected"),
    [
        (None, Packing(), {"one": 0, "two": 2}),
        (None, Packing(search="official"), {"one": 0, "two": 2}),
        (1, Packing(), {"one": 8, "two": 2}),
        (1, Packing(search="official", buffer=1), {"one": 8, "two": 2}),
        (1, Packing(overflow="split"), {"one": 8, "two": 0}),
        (1, Packing(search="official", overflow="official"), {"one": 8, "two": 0}),
    ],
)
def test_a_sample_over_the_budget_of_a_row_is_rejected_too(
    sets: list[DataSet], tiles: int | None, packing: Packing, rejected: dict[str, int]
) -> None:
    """As of a padded batch: one long record among many must not end a run that may leave records out."""
    Image.new("RGB", (240, 60), "red").save(Path(sets[0].root) / "a.png")  # four tiles and a thumbnail
    encoder = Encoder(TOKENIZER, tiny_chat_config(max_tiles=4))
    settings = BatchSettings(None, tokens=400, tiles=tiles, packed=True, packing=packing)
    loader = Loader(sets, encoder, 0, settings, on_error="skip")
    sizes = loader.sizes()
    seen = Counter(source for batch in loader.once() for source in batch.sources)
    reasons = {name: entry["rejected"].get("budget", 0) for name, entry in loader.ledger.state().items()}
    assert reasons == rejected
    lost = 2 * (packing.overflow == "official")  # long texts: that cut drops rows without a picture
    assert len(seen) == loader.ledger.num_accepted == 20 - loader.ledger.num_rejected - lost
    assert max(size.tokens for size in sizes) <= 400
    assert loader.make(max(range(len(sizes)), key=lambda at: sizes[at].tokens)).num_samples
    strict = replace(loader, on_error="error")
    with pytest.raises(ValueError, match="a batch may have"):
        strict.sizes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_record_of_several_parts_is_counted_once(sets: list[DataSet], workers: int) -> None:
    """Rows of 250 tokens: the two long records are split, and each is one accepted record."""
    encoder = Encoder(TOKENIZER, tiny_chat_config(max_tiles=4))
    settings = BatchSettings(None, tokens=250, packed=True, packing=Packing(overflow="split"))
    loader = Loader(sets, encoder, 0, settings, on_error="skip", workers=workers)
    seen = Counter(source for batch in loader.once() for source in batch.sources)
    assert len(seen) == 16
    assert max(seen.values()) > 1
    two = {"given": 10, "accepted": 8, "cut": 0, "rejected": {"fields": 1, "json": 1}}
    assert loader.ledger.state() == {"one": EXPECTED["one"], "two": two}


def test_counts_of_the_ranks_add_up(sets: list[DataSet]) -> None:
    """Each rank counts its own records; 7 batches of an epoch, dealt to two ranks over two epochs."""
    total: Counter[str] = Counter()
    for rank in range(2):
        loader = make(sets)
        for _ in islice(loader.dealt(rank, 2), 14):
            pass
        for entry in loader.ledger.state().values():
            total.update(given=entry["given"], accepted=entry["accepted"], rejected=sum(entry["rejected"].values()))
    assert total == {"given": 40, "accepted": 28, "rejected": 12}


def test_quarantine_holds_each_record_once_whole(sets: list[DataSet], tmp_path: Path) -> None:
    aside = tmp_path / "run" / "quarantine.jsonl"
    settings = {"quarantine": aside}
    first = quarantining(sets, **settings)
    for _ in islice(first, 9):  # more than an epoch
        pass
    state = first.state_dict()
    with open(aside, "a") as file:
        file.write('{"file": "cut off by a ki')
    second = quarantining(sets, **settings)
    second.load_state_dict(state)
    for _ in islice(second, 9):
        pass
    entries = [json.loads(row) for row in aside.read_text().splitlines()]
    assert sorted((entry["set"], entry["line"], entry["reason"]) for entry in entries) == [
        ("one", 3, "missing"),
        ("one", 6, "unreadable"),
        ("two", 2, "json"),
        ("two", 5, "fields"),
        ("two", 8, "too_long"),
        ("two", 9, "too_long"),
    ]
    for entry in entries:
        given_line = Path(entry["file"]).read_text().splitlines()[entry["line"] - 1]
        assert entry["record"] == (given_line if entry["reason"] == "json" else json.loads(given_line))
    fresh = quarantining(sets[1:], **settings)  # another run in the same folder begins anew
    list(fresh.once())
    assert len(aside.read_text().splitlines()) == 4


def quarantining(sets: list[DataSet], **rest: Any) -> Loader:
    encoder = Encoder(TOKENIZER, tiny_chat_config(max_tiles=4), max_length=400)
    return Loader(sets, encoder, 0, BatchSettings(samples=3), seed=5, on_error="quarantine", **rest)


def test_policy_and_file_come_together(sets: list[DataSet], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_error is 'quarantine' and quarantine None"):
        quarantining(sets)
    with pytest.raises(ValueError, match="on_error is 'skip'"):
        make(sets, quarantine=tmp_path / "x.jsonl")


@pytest.mark.parametrize("workers", [0, 1])
def test_too_large_a_share_ends_the_run(sets: list[DataSet], workers: int) -> None:
    assert len(list(make(sets, workers=workers, max_rejected=0.3).once())) == 7
    said = (
        r"6 of 20 records rejected \(.*2 too_long.*\): 30.00%; the limit is 29.00%; .*data.max_rejected.*\.jsonl:\d+: "
    )
    with pytest.raises(ValueError, match=said):
        list(make(sets, workers=workers, max_rejected=0.29).once())


names = st.sampled_from(["a", "b", "é:1"])
reasons = st.sampled_from(["json", "missing", "marks"])


@given(st.lists(st.tuples(names, st.booleans())), st.lists(st.tuples(names, reasons)))
def test_a_ledger_adds_up_and_survives_json(accepted: list[tuple[str, bool]], rejected: list[tuple[str, Any]]) -> None:
    ledger = Ledger()
    ledger.add(accepted, [Rejection(0, name, "x:1", reason, "") for name, reason in rejected])
    state = ledger.state()
    assert sum(entry["given"] for entry in state.values()) == len(accepted) + len(rejected) == ledger.num_given
    assert sum(entry["cut"] for entry in state.values()) == sum(cut for _, cut in accepted)
    assert Ledger.of(json.loads(json.dumps(state))).state() == state


def test_a_record_of_any_bytes_can_be_set_aside(tmp_path: Path) -> None:
    aside = Quarantine(tmp_path / "q.jsonl", keep=False)
    lines = [b'\xff\x00{"a"', b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": 1e999}', b"{}"]
    for number, content in enumerate(lines):
        aside.add(Rejection(number, "set", f"/odd: name\n.jsonl:{number + 1}", "json", "why"), content)
    entries = [json.loads(row) for row in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [1, 2, 3, 4, 5]
    assert {entry["file"] for entry in entries} == {"/odd: name\n.jsonl"}


# truncation

sides = st.tuples(st.integers(1, 200), st.integers(1, 200))


@settings(max_examples=150)
@given(
    st.lists(st.lists(sides, max_size=2), min_size=1, max_size=3),
    st.tuples(st.sampled_from(["images", "learned", "length", "any"]), st.integers(-4, 4), st.integers(1, 600)),
    st.integers(1, 40),
)
def test_truncation_never_cuts_an_image(
    rounds: list[list[tuple[int, int]]], where: tuple[str, int, int], words: int
) -> None:
    """A cut sample is the head of the whole one, with every image whole and something to learn; or it is refused."""
    turns, images = [], []
    for pictures in rounds:
        turns += [Turn("user", "<image>\n" * len(pictures) + "What?"), Turn("assistant", "word " * words)]
        images += [Image.new("RGB", size) for size in pictures]
    record = Record(tuple(turns), tuple(images), source="set.jsonl:1")
    config = tiny_chat_config(max_tiles=4)
    whole = Encoder(TOKENIZER, config).encode(record)
    image_id = token_id(TOKENIZER, IMAGE_TOKEN)
    expected = whole.num_tiles * config.tokens_per_tile
    assert int((whole.input_ids == image_id).sum()) == expected
    ends = np.flatnonzero(whole.input_ids.numpy() == image_id)[-1:] + 2
    first = int((whole.labels != IGNORE_INDEX).nonzero()[0])
    places = {"images": max(ends, default=9), "learned": first, "length": len(whole.input_ids), "any": where[2]}
    limit = max(1, int(places[where[0]]) + where[1])  # around the places where something changes
    encoder = Encoder(TOKENIZER, config, max_length=limit, overlong="cut")
    if limit < len(whole.input_ids) and (limit <= first or limit < max(ends, default=0)):
        with pytest.raises(RecordError) as refused:
            encoder.encode(record)
        assert refused.value.reason == ("too_long" if limit < max(ends, default=0) else "no_answer")
        return
    sample = encoder.encode(record)
    kept = len(sample.input_ids)
    assert kept == min(limit, len(whole.input_ids))
    assert sample.num_cut == len(whole.input_ids) - kept
    assert sample.input_ids.equal(whole.input_ids[:kept])
    assert sample.labels.equal(whole.labels[:kept])
    assert int((sample.input_ids == image_id).sum()) == expected == sample.num_tiles * config.tokens_per_tile
    assert sample.num_learned > 0
    assert encoder.outline(record) == (len(whole.input_ids), sample.num_tiles, sample.num_learned, sample.num_cut)
