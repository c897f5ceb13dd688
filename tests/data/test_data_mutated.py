"""Damaged records and pictures: no crash, no hang, each rejected one listed; accepted + rejected = given."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from internvl.curate.filter_sets import filter_sets
from internvl.curate.filters import Rules
from internvl.data.batching import BatchSettings
from internvl.data.check import Checks, check
from internvl.data.encode import Encoder
from internvl.data.findings import NOTES, SUSPECT
from internvl.data.loader import Loader
from internvl.data.mixture import DataSet
from internvl.data.records import Reason
from mutations import Maker
from tiny import tiny_chat_config, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))

    def stop(*_: Any) -> None:
        raise TimeoutError("a record took too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(400)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_mutated_record_is_learned_from_or_listed(tmp_path: Path, count: int) -> None:
    path = tmp_path / "set.jsonl"
    lines = Maker(tmp_path, seed=count).lines(count)
    path.write_bytes(b"\n".join(lines) + b"\n")
    data = DataSet(str(path), str(tmp_path), "set")
    encoder = Encoder(tiny_tokenizer(), tiny_chat_config(max_tiles=4), max_length=900)

    report = check([data], encoder, Checks(decode=True))
    refused = {some.line: some for some in report.findings if some.reason not in NOTES | SUSPECT}
    (made,) = report.sets
    assert made.given == count == made.accepted + made.rejected
    assert len(refused) == made.rejected
    assert 0.2 * count < made.rejected < 0.9 * count
    assert {some.reason for some in refused.values()} <= set(get_args(Reason))
    assert all(some.file == str(path) and some.message.isprintable() for some in refused.values())

    aside = tmp_path / "quarantine.jsonl"
    loader = Loader(
        [data],
        encoder,
        0,
        BatchSettings(samples=8),
        on_error="quarantine",
        quarantine=aside,
        workers=2 if count > 999 else 0,
    )
    learned = [source for batch in loader.once() for source in batch.sources]
    assert loader.ledger.num_given == count
    assert loader.ledger.num_accepted == len(learned) == len(set(learned)) == made.accepted
    assert loader.ledger.num_rejected == len(loader.skipped) == made.rejected
    assert not set(learned) & loader.skipped.keys()
    listed = {entry["line"]: entry for entry in map(json.loads, aside.read_text().splitlines())}
    assert {line: entry["reason"] for line, entry in listed.items()} == {n: some.reason for n, some in refused.items()}

    (counts,) = filter_sets([data], tmp_path / "out", Rules())
    kept = (tmp_path / "out" / "set.kept.jsonl").read_bytes().splitlines()
    gone = [json.loads(line) for line in (tmp_path / "out" / "set.rejected.jsonl").read_text().splitlines()]
    assert counts.kept + counts.rejected.total() == len(kept) + len(gone) == count
    assert sorted(kept + [lines[entry["line"] - 1] for entry in gone]) == sorted(lines)
