"""Dealing batches to ranks: nothing lost, nothing doubled, and another number of ranks goes on at the same place."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internvl.data.batching import BatchSettings
from internvl.data.encode import Encoder
from internvl.data.loader import Loader
from internvl.data.mixture import DataSet
from internvl.parallel.collectives import deal_once
from tiny import tiny_chat_config, tiny_tokenizer


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("records")
    lines = []
    for number in range(11):
        turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer " * (1 + number % 3)}]
        lines.append(json.dumps({"id": number, "conversations": turns if number != 4 else turns[:1]}))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return DataSet(str(folder / "records.jsonl"), str(folder), "records")


def make(records: DataSet, packed: bool) -> Loader:
    encoder = Encoder(tiny_tokenizer(), tiny_chat_config())
    return Loader([records], encoder, 0, BatchSettings(samples=1, packed=packed), seed=3, on_error="skip")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(1, 4), then=st.integers(1, 4), rounds=st.integers(1, 5), packed=st.booleans())
def test_dealt_batches_are_the_whole_stream(records: DataSet, first: int, then: int, rounds: int, packed: bool) -> None:
    """`first` ranks take some rounds, `then` others go on. Record 5 cannot be used: its place is an empty batch."""
    count = rounds * first + 3 * then
    alone = make(records, packed).dealt(0, 1)
    expected = [batch.sources for batch in islice(alone, count) if batch is not None]
    found, cursor = [], None
    for num_ranks, num_rounds in ((first, rounds), (then, 3)):
        by_rank, cursors = [], []
        for rank in range(num_ranks):
            loader = make(records, packed)
            if cursor is not None:
                loader.load_state_dict(cursor)
            dealt = list(islice(loader.dealt(rank, num_ranks), num_rounds * num_ranks))
            assert [batch is not None for batch in dealt] == [k % num_ranks == rank for k in range(len(dealt))]
            by_rank.append([batch for batch in dealt if batch is not None])
            place = {name: value for name, value in loader.state_dict().items() if name != "counts"}  # each its own
            cursors.append(json.dumps(place))
        assert len(set(cursors)) == 1
        cursor = json.loads(cursors[0])
        found += [by_rank[rank][turn].sources for turn in range(num_rounds) for rank in range(num_ranks)]
    assert found == expected
    assert count < 11 or () in found


def test_alone_everything_is_dealt_and_counts() -> None:
    assert list(deal_once(iter("abc"))) == [("a", True), ("b", True), ("c", True)]
