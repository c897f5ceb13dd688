"""Packing: the official packs, and the laws: nothing lost, limits hold, rows full, ranks alike, exact resume."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data_loader import same, write_set

from internvl.batch import ChatBatch
from internvl.data.batching import BatchSettings
from internvl.data.collate import collate_packed
from internvl.data.encode import Encoder
from internvl.data.loader import Loader
from internvl.data.mixture import DataSet
from internvl.data.packing import Packer, Packing, Room, Row, deal, simulate
from internvl.data.sample import Sample
from internvl.data.splitting import Layout, Segment, Span, own_cut
from internvl.tokens import IGNORE_INDEX
from reference import golden
from tiny import tiny_chat_config, tiny_tokenizer

OFFICIAL = Packing(search="official", buffer=8)


def order_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples as the official code selects them: a stream drawn by weight, dropped when it has ended."""
    streams = case["streams"]
    if len(streams) == 1:
        return list(streams[0])
    rng, found = np.random.default_rng(0), []
    live, given_ = list(range(len(streams))), [0] * len(streams)
    while live:
        weights = np.array([case["args"]["weights"][stream] for stream in live])
        stream = live[int(rng.choice(len(live), p=weights / weights.sum()))]
        if given_[stream] == len(streams[stream]):
            live.remove(stream)
            continue
        found.append(streams[stream][given_[stream]])
        given_[stream] += 1
    return found


def layout_of(sample: dict[str, Any]) -> Layout:
    ids = np.array(sample["ids"])
    starts, ends = np.flatnonzero(ids == 5), np.flatnonzero(ids == 7) + 1
    tiles = sample["tiles"] // max(1, len(starts))
    learned = np.arange(len(ids)) >= len(ids) - sample["n_label"]
    return Layout(tuple(Span(int(a), int(b), tiles) for a, b in zip(starts, ends, strict=True)), learned)


def official_cases() -> list[Any]:
    try:
        return [pytest.param(c, id=c["name"]) for c in json.loads(golden("packing.json").read_text())["cases"]]
    except pytest.skip.Exception:
        return []


@pytest.mark.parametrize("case", official_cases())
def test_packs_are_the_official_ones(case: dict[str, Any]) -> None:
    samples, args = order_of(case), case["args"]
    packing = Packing(
        search="official",
        buffer=args["max_buffer_size"],
        overflow="official" if args["allow_overflow"] else "never",
    )
    room = Room(args["max_packed_tokens"], args["num_images_expected"])
    packer = Packer(room, packing, lambda place: layout_of(samples[place]))
    rows: list[Row] = []
    for place, sample in enumerate(samples):
        rows += packer.add(Segment(place, len(sample["ids"]), sample["tiles"]))  # a dummy tile counts there
    rows += packer.drain()
    assert len(rows) == len(case["packs"])
    for row, pack in zip(rows, case["packs"], strict=True):
        cuts = [samples[p.place]["ids"][p.start : p.start + p.tokens] for p in row.segments]
        assert [token for cut in cuts for token in cut] == pack["input_ids"]
        assert [p.tokens for p in row.segments] == [length for _, length in pack["segments"]]
        assert (row.tokens, row.tiles) == (pack["n_tokens"], pack["n_tiles"])
        learned = [layout_of(samples[p.place]).learned[p.start : p.start + p.tokens].sum() for p in row.segments]
        assert sum(learned) == pack["n_labels"]


def test_rows_collate_as_officially() -> None:
    """From the stream to the batch: packs by our packer, tensors by our collation, against recorded ones."""
    stored = json.loads(golden("packing.json").read_text())["cases"][0]
    samples = order_of(stored)
    packer = Packer(Room(64, 6), OFFICIAL)
    rows = [row for n, s in enumerate(samples) for row in packer.add(Segment(n, len(s["ids"]), s["tiles"]))]
    rows += packer.drain()
    for case in json.loads(golden("collate.json").read_text())["packed_collate"]:
        row = rows[case["pack_index"]]
        made = []
        for segment in row.segments:
            sample = samples[segment.place]
            ids = torch.tensor(sample["ids"])
            labels = torch.where(torch.from_numpy(layout_of(sample).learned), ids, IGNORE_INDEX)
            tiles = torch.zeros(sample["tiles"] * sample["flag"], 3, 2, 2, dtype=torch.uint8)
            made.append(Sample(ids, labels, tiles))
        batch = collate_packed(made, 0, case["loss_reduction"], length=case["max_item_length"])
        expected = case["batch"]
        for field in ("input_ids", "labels", "position_ids"):
            assert getattr(batch, field).tolist() == expected[field]
        assert batch.segments is not None
        assert batch.segments.tolist() == expected["attention_mask"][0]
        torch.testing.assert_close(batch.loss_weights, torch.tensor(expected["loss_weight"]))


lengths = st.integers(1, 60) | st.integers(1, 6)  # so that now tokens bind, now tiles
sizes = st.lists(st.tuples(lengths, st.integers(0, 5)), min_size=1, max_size=60)


@given(
    sizes, st.sampled_from([None, 7]), st.sampled_from([None, 3]), st.integers(1, 6), st.booleans(), st.integers(0, 60)
)
def test_every_sample_is_in_one_row_and_limits_hold(
    counts: list[tuple[int, int]], tiles: int | None, samples: int | None, buffer: int, official: bool, stop: int
) -> None:
    room = Room(64, tiles, samples)
    packing = Packing(buffer=buffer, search="official" if official else "fullest")
    packer, rows = Packer(room, packing), []
    for place, (tokens, num_tiles) in enumerate(counts):
        if place == stop:  # another packer goes on from the state
            state = json.loads(json.dumps(packer.state()))
            packer = Packer(room, packing)
            packer.load(state)
        rows += packer.add(Segment(place, tokens, num_tiles))
    rows += packer.drain()
    assert packer.is_empty
    assert sorted(segment.place for row in rows for segment in row.segments) == list(range(len(counts)))
    for row in rows:
        assert row.tokens == sum(counts[p.place][0] for p in row.segments) <= 64
        assert row.tiles == sum(counts[p.place][1] for p in row.segments) <= (tiles or 99**9)
        assert len(row.segments) <= (samples or 99**9)


@given(sizes, st.integers(1, 6), st.integers(0, 59), st.booleans())
def test_a_state_goes_on_with_the_same_rows(
    counts: list[tuple[int, int]], buffer: int, stop: int, official: bool
) -> None:
    packing = Packing(buffer=buffer, search="official" if official else "fullest")

    def rows(stop: int | None) -> list[Row]:
        packer, found = Packer(Room(64, 6), packing), []
        for place, size in enumerate(counts):
            if place == stop:
                state = packer.state()
                packer = Packer(Room(64, 6), packing)
                packer.load(state)
            found += packer.add(Segment(place, *size))
        return found + packer.drain()

    assert rows(stop) == rows(None)


@st.composite
def layouts(draw: Any) -> Layout:
    """A sample of questions, pictures and answers; pictures only in what is not learned."""
    learned: list[bool] = [False]
    pictures = []
    for _ in range(draw(st.integers(1, 5))):
        for _ in range(draw(st.integers(0, 2))):
            length = draw(st.integers(3, 14))
            pictures.append(Span(len(learned), len(learned) + length, draw(st.integers(1, 3))))
            learned += [False] * length
        learned += [False] * draw(st.integers(1, 10)) + [True] * draw(st.integers(1, 20))
    return Layout(tuple(pictures), np.array(learned))


@given(layouts(), st.integers(16, 40))
def test_a_cut_sample_loses_no_learned_token_and_no_half_picture(layout: Layout, limit: int) -> None:
    parts = own_cut(Segment(3, len(layout.learned), sum(s.tiles for s in layout.pictures)), limit, layout)
    taught: Counter[int] = Counter()
    for part in parts:
        end = part.start + part.tokens
        assert part.tokens <= limit
        assert part.place == 3
        inside = [s for s in layout.pictures if part.start <= s.start < end]
        assert all(s.end <= end for s in inside)
        assert not any(s.start < part.start < s.end for s in layout.pictures)
        assert part.tiles == sum(s.tiles for s in inside)
        assert part.first_tile == sum(s.tiles for s in layout.pictures if s.start < part.start)
        taught.update((np.flatnonzero(layout.learned[part.start + 1 : end]) + part.start + 1).tolist())
    assert taught == Counter(np.flatnonzero(layout.learned).tolist())


def test_a_picture_longer_than_a_row_is_named() -> None:
    layout = Layout((Span(1, 40, 3),), np.arange(50) > 45)
    with pytest.raises(ValueError, match="a row has 20; raise batch_tokens or lower max_tiles"):
        own_cut(Segment(0, 50, 3), 20, layout)


def realistic(count: int, seed: int) -> list[tuple[int, int]]:
    """Text lognormal; 15 % text alone, 70 % one picture of 1 to 13 tiles, 10 % several, 5 % videos."""
    rng = np.random.default_rng(seed)
    found = []
    for kind in rng.random(count):
        text = int(np.clip(rng.lognormal(4.8, 0.8), 16, 3000))
        if kind < 0.15:
            tiles = 0
        elif kind < 0.85:
            tiles = int(rng.choice([1, 3, 5, 7, 9, 13], p=[0.2, 0.1, 0.15, 0.3, 0.1, 0.15]))
        else:
            tiles = int(rng.integers(2, 5)) * 2 if kind < 0.95 else int(rng.integers(8, 25))
        found.append((text + 256 * tiles, tiles))
    return found


@pytest.mark.parametrize("search", ["fullest", "official"])
def test_tiles_alone_can_fill_a_row(search: Any) -> None:
    for row in simulate([(1, 3)] * 20 + [(9, 2)] * 20, Room(640, 7), Packing(search=search))[1]:
        assert row.tiles <= 7


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("room", [Room(8192, 48), Room(16384, 96)])
def test_rows_are_full_and_eight_ranks_hardly_wait(room: Room, seed: int) -> None:
    found = simulate(realistic(6000, seed), room, ranks=8, seed=seed)[0].read()
    assert found["fill"] >= 0.97
    assert found["idle_tokens"] <= 0.02
    assert found["idle_tiles"] <= 0.02
    official = simulate(realistic(6000, seed), room, Packing(search="official", buffer=20), ranks=8, seed=seed)[
        0
    ].read()
    assert found["fill"] > official["fill"]


def test_where_tiles_bind_rows_are_full_of_tiles() -> None:
    found = simulate(realistic(6000, 0), Room(16384, 48))[0].read()  # the official stage 1
    assert found["fill_tiles"] >= 0.97
    assert max(found["idle_tokens"], found["idle_tiles"]) <= 0.02


def test_what_is_left_at_the_end_is_packed_once_more() -> None:
    sizes = realistic(300, 1)  # all rows are open at the end
    rows = simulate(sizes, Room(8192, 48), seed=None)[1]
    assert sorted(segment.place for row in rows for segment in row.segments) == list(range(300))
    assert len(rows) == -(-sum(tokens for tokens, _ in sizes) // 8192)  # 58 without, and 57 are the least


def test_undealt_rows_would_keep_ranks_waiting() -> None:
    rows = simulate(realistic(6000, 0), Room(8192, 48), seed=None)[1]
    waits = [8 * max(row.tiles for row in rows[at : at + 8]) for at in range(0, len(rows) - 7, 8)]
    assert 1 - sum(row.tiles for row in rows[: len(waits) * 8]) / sum(waits) > 0.05


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=40), st.integers(1, 9), st.integers(0, 99))
def test_dealing_loses_nothing_and_puts_like_rows_together(counts: list[tuple[int, int]], hand: int, seed: int) -> None:
    rows = [Row([Segment(n, *size)], *size) for n, size in enumerate(counts)]
    dealt = deal(rows, hand, np.random.default_rng(seed))
    assert sorted(row.segments[0].place for row in dealt) == list(range(len(counts)))
    hands = [dealt[first : first + hand] for first in range(0, len(dealt) - hand + 1, hand)]
    ranges = sorted((min(row.tiles for row in h), max(row.tiles for row in h)) for h in hands)
    assert all(high <= low for (_, high), (low, _) in pairwise(ranges) if high != low) or hand == 1
    assert deal(rows, hand, None) == rows


# --- the loader -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sets(tmp_path: Path) -> list[DataSet]:
    return [
        DataSet(str(write_set(tmp_path, "one", 31, 1)), str(tmp_path), "one"),
        DataSet(str(write_set(tmp_path, "two", 20, 2)), str(tmp_path), "two", repeat=1.5),
    ]


def make(sets: list[DataSet], tokens: int = 420, workers: int = 0, **packing: Any) -> Loader:
    settings = BatchSettings(
        None, tokens, 14, packed=True, packing=Packing(**{"buffer": 3, "window": 6, "hand": 2, **packing})
    )
    return Loader(sets, Encoder(tiny_tokenizer(), tiny_chat_config(max_tiles=4)), 0, settings, seed=5, workers=workers)


def run(loader: Loader, ranks: int, steps: int) -> list[ChatBatch]:
    """What all ranks of a run make in these steps, in order; the loader then stands where each of theirs does."""
    state = loader.state_dict()
    made: list[list[ChatBatch]] = []
    for rank in range(ranks):
        loader.load_state_dict(state)
        dealt = loader.dealt(rank, ranks)
        made.append([])
        made[-1] += [batch for batch in islice(dealt, steps * ranks) if batch is not None]
    return [made[rank][step] for step in range(steps) for rank in range(ranks)]


def test_ranks_and_workers_may_change_on_the_way(sets: list[DataSet]) -> None:
    loader = make(sets)
    count = len(loader)
    whole = [*islice(loader, 2 * count)]
    segments: list[ChatBatch] = []
    state = make(sets).state_dict()
    for ranks, steps, workers in ((1, 3, 0), (3, 2, 1), (2, 3, 0), (3, 1, 0), (1, 2, 2)):
        part = make(sets, workers=workers)
        part.load_state_dict(json.loads(json.dumps(state)))
        segments += run(part, ranks, steps)
        state = part.state_dict()
    assert len(segments) == 20
    assert all(same(a, b) for a, b in zip(segments, whole, strict=False))


def test_an_epoch_has_every_sample_as_often_as_said(sets: list[DataSet]) -> None:
    loader = make(sets)
    count = len(loader)
    for _ in range(2):  # epochs
        seen = Counter(s for batch in islice(loader, count) for s in batch.sources)
        assert sum(seen.values()) == 31 + 30
        assert all(seen[f"{sets[0].annotation}:{n + 1}"] == 1 for n in range(31))
        assert sorted(seen[f"{sets[1].annotation}:{n + 1}"] for n in range(20)) == [1] * 10 + [2] * 10
        count = len(loader)


def test_the_cursor_holds_the_open_rows_and_stays_small(sets: list[DataSet]) -> None:
    loader = make(sets)
    list(islice(loader, 9))
    state = loader.state_dict()
    assert state["open"]
    assert all(len(segment) == 5 for row in state["open"] for segment in row)
    assert len(json.dumps(state)) < 3000


def test_long_samples_are_cut_and_each_answer_is_learned_once(tmp_path: Path) -> None:
    records = []
    for number in range(12):
        turns = []
        for turn in range(6):
            turns += [
                {"from": "human", "value": f"question {number} {turn}"},
                {"from": "gpt", "value": f"{number}-{turn} " * (2 + 5 * (number % 3))},
            ]
        records.append({"id": number, "conversations": turns})
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    data = [DataSet(str(path))]
    expected = Counter(t for batch in make(data, tokens=4000).once() for t in learned_words(batch))
    batches = list(make(data, tokens=200, overflow="split", buffer=2).once())
    assert Counter(t for batch in batches for t in learned_words(batch)) == expected
    assert max(batch.input_ids.numel() for batch in batches) <= 200
    for batch in batches:
        assert batch.segments is not None
        assert all(int(batch.labels[0, start]) == IGNORE_INDEX for start in batch.segments[:-1].tolist())
    with pytest.raises(ValueError, match=r"long\.jsonl:\d+: \d+ tokens; a batch may have 200"):
        list(make(data, tokens=200).once())
    with pytest.raises(ValueError, match="the official cut lost all"):  # it drops rows without a picture
        next(iter(make(data, tokens=200, overflow="official", search="official", buffer=1)))


def test_the_official_cut_works_on_records_with_pictures(tmp_path: Path) -> None:
    data = [DataSet(str(write_set(tmp_path, "one", 40, 1)), str(tmp_path))]
    whole = Counter(t for batch in make(data).once() for t in learned_words(batch))
    batches = list(make(data, tokens=150, overflow="official", search="official", buffer=4).once())
    found = Counter(t for batch in batches for t in learned_words(batch))
    assert max(batch.input_ids.numel() for batch in batches) <= 150
    assert found
    assert not found - whole
    assert found != whole  # words before the next picture are lost
    for batch in batches:
        image = Encoder(tiny_tokenizer(), tiny_chat_config()).tokeniser.image_token_id
        assert int((batch.input_ids == image).sum()) == 4 * batch.num_tiles


def learned_words(batch: ChatBatch) -> list[tuple[str, int]]:
    """Learned tokens, each with its sample."""
    assert batch.segments is not None
    found = []
    for source, (start, end) in zip(batch.sources, pairwise(batch.segments.tolist()), strict=True):
        labels = batch.labels[0, start:end]
        found += [(source, int(label)) for label in labels if label != IGNORE_INDEX]
    return found


def test_layout_is_that_of_the_sample(sets: list[DataSet]) -> None:
    encoder = Encoder(tiny_tokenizer(), tiny_chat_config(max_tiles=4))
    for position in range(8):
        record = sets[0].record(position)
        sample, layout = encoder.encode(record), encoder.layout(record)
        assert np.array_equal(layout.learned, sample.labels.numpy() != IGNORE_INDEX)
        assert sum(span.tiles for span in layout.pictures) == sample.num_tiles
        for span in layout.pictures:
            inside = sample.input_ids[span.start + 1 : span.end - 1]
            assert set(inside.tolist()) == {encoder.tokeniser.image_token_id}
            assert len(inside) == span.tiles * encoder.config.tokens_per_tile
            assert encoder.tokeniser.image_token_id not in sample.input_ids[[span.start, span.end - 1]].tolist()


def test_company_and_room_are_told(sets: list[DataSet]) -> None:
    loader = make(sets)
    dealt = [*islice(loader.dealt(1, 2), 6)]
    assert [batch is not None for batch in dealt] == [False, True] * 3
    for batch in dealt[1::2]:
        assert batch is not None
        assert batch.room == 420
        assert batch.company.ranks == 2
        assert batch.company.longest >= batch.input_ids.numel()
        assert batch.company.tokens >= batch.input_ids.numel()
        assert batch.company.most_tiles >= batch.num_tiles


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"buffer": 0}, "packing.buffer is 0"),
        ({"hand": 0}, "packing.hand is 0"),
        ({"overflow": "official"}, "set both, or overflow to 'split'"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packing(**wrong)


def test_a_state_of_other_packing_is_refused(sets: list[DataSet]) -> None:
    with pytest.raises(ValueError, match="other data or settings"):
        make(sets, hand=4).load_state_dict(make(sets).state_dict())
