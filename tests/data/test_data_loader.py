"""Loader laws: resumed equals uninterrupted, workers change nothing, every record once an epoch, budgets hold."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvl.batch import ChatBatch
from internvl.data.batching import BatchSettings, group
from internvl.data.encode import Encoder
from internvl.data.lines import Lines
from internvl.data.loader import Loader
from internvl.data.mixture import DataSet, Mixture, by_square_root, read_sets
from internvl.data.packing import Packing
from tiny import tiny_chat_config, tiny_tokenizer

FIELDS = ("input_ids", "labels", "loss_weights", "position_ids", "tiles", "attention_mask", "segments")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))


def write_set(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        record: dict[str, Any] = {
            "id": number,
            "conversations": [
                {"from": "human", "value": "question " * int(rng.integers(1, 6))},
                {"from": "gpt", "value": "answer " * int(rng.integers(1, 12))},
            ],
        }
        if number % 3:
            size = (int(rng.integers(20, 200)), int(rng.integers(20, 200)))
            path = folder / f"{name}_{number}.png"
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
            record["image"] = path.name
        lines.append(json.dumps(record))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def sets(tmp_path: Path) -> list[DataSet]:
    return [
        DataSet(str(write_set(tmp_path, "one", 13, 1)), str(tmp_path), "one", augment=True),
        DataSet(str(write_set(tmp_path, "two", 10, 2)), str(tmp_path), "two", max_tiles=2, repeat=1.5),
    ]


def make(sets: list[DataSet], settings: BatchSettings, **rest: Any) -> Loader:
    return Loader(sets, Encoder(tiny_tokenizer(), tiny_chat_config(max_tiles=4)), 0, settings, seed=5, **rest)


def take(loader: Loader, count: int) -> list[ChatBatch]:
    return list(islice(loader, count))


def same(first: ChatBatch, second: ChatBatch) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in FIELDS]
    return first.sources == second.sources and all(a is b or torch.equal(a, b) for a, b in pairs)


SETTINGS = {
    "samples": BatchSettings(samples=3),
    "grouped": BatchSettings(samples=4, grouped=True, window=8),
    "tokens": BatchSettings(samples=None, tokens=500, tiles=12, window=16),
    "packed": BatchSettings(samples=None, tokens=400, packed=True, weighting="square", window=16),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", SETTINGS)
def test_resumed_equals_uninterrupted(sets: list[DataSet], kind: str, workers: int) -> None:
    count = 14
    whole = take(make(sets, SETTINGS[kind]), count)
    loader = make(sets, SETTINGS[kind], workers=workers)
    start = take(loader, 4)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(sets, SETTINGS[kind], workers=workers)
    resumed.load_state_dict(state)
    rest = take(resumed, count - 4)
    assert len(whole) == len(start + rest) == count
    assert all(same(a, b) for a, b in zip(whole, start + rest, strict=True))


def test_an_iterator_left_behind_changes_nothing(sets: list[DataSet]) -> None:
    whole = take(make(sets, SETTINGS["samples"]), 6)
    loader = make(sets, SETTINGS["samples"], workers=1)
    pieces = take(loader, 2) + take(loader, 4)
    assert all(same(a, b) for a, b in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_epoch_has_every_record_as_often_as_said(sets: list[DataSet], kind: str) -> None:
    loader = make(sets, SETTINGS[kind])
    seen = Counter(source for batch in loader.once() for source in batch.sources)
    assert len(loader) == len(list(loader.once()))
    assert sum(seen.values()) == 13 + 15
    assert sum(seen.values()) == sum(batch.num_samples for batch in make(sets, SETTINGS[kind]).once())
    for number in range(13):
        assert seen[f"{sets[0].annotation}:{number + 1}"] == 1
    assert sorted(seen[f"{sets[1].annotation}:{number + 1}"] for number in range(10)) == [1] * 5 + [2] * 5


def test_budgets_hold(sets: list[DataSet]) -> None:
    for batch in make(sets, SETTINGS["tokens"]).once():
        assert batch.input_ids.numel() <= 500
        assert batch.num_tiles <= 12
    for batch in make(sets, SETTINGS["packed"]).once():
        assert batch.input_ids.numel() <= 400
        assert batch.segments is not None
        assert len(batch.segments) == batch.num_samples + 1


def test_epochs_differ_and_seeds_repeat(sets: list[DataSet]) -> None:
    mixture = Mixture(sets, seed=3)
    assert not np.array_equal(mixture.epoch(0), mixture.epoch(1))
    assert np.array_equal(mixture.epoch(1), Mixture(sets, seed=3).epoch(1))
    assert not np.array_equal(mixture.epoch(0), Mixture(sets, seed=4).epoch(0))
    assert np.array_equal(Mixture(sets[:1], shuffle=False).epoch(7), np.arange(13))


@pytest.mark.parametrize(("repeat", "times"), [(0.5, {0: 7, 1: 6}), (2.0, {2: 13}), (2.25, {2: 10, 3: 3})])
def test_repeats(sets: list[DataSet], repeat: float, times: dict[int, int]) -> None:
    mixture = Mixture([replace(sets[0], repeat=repeat)])
    first, second = (np.bincount(mixture.epoch(epoch), minlength=13) for epoch in range(2))
    assert Counter(first.tolist()) == Counter(second.tolist()) == times
    assert repeat == 2 or not np.array_equal(first, second)  # the random part is drawn anew


def test_shares_by_square_root(tmp_path: Path) -> None:
    """25 records beside 4: as many in all, 5 to 2; the two files of an entry share as one, `repeat_time` counts."""
    write_set(tmp_path, "large", 25)
    for name, count in (("part_a", 3), ("part_b", 1)):
        write_set(tmp_path, name, count)
    meta = {"large": {"annotation": "large.jsonl"}, "small": {"annotation": "part_*.jsonl"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    shared = by_square_root(read_sets(tmp_path / "meta.json"))
    mixture = Mixture(shared)
    assert mixture.entries == len(mixture) == 29
    times = np.bincount(mixture.epoch(0), minlength=29)
    assert times[:25].sum() == 21  # 29 * 5 / 7
    assert set(times[:25].tolist()) == {0, 1}
    assert times[25:].sum() == 8
    assert times[25:28].sum() == 6
    sets = read_sets(tmp_path / "meta.json")
    often = by_square_root([replace(sets[0], repeat=4.0), *sets[1:]])
    assert often[0].repeat * 25 == pytest.approx(104 * 10 / 12)


def test_an_epoch_without_records_is_an_error(sets: list[DataSet]) -> None:
    with pytest.raises(ValueError, match="13 records, none of them in an epoch; raise repeat_time"):
        next(iter(make([replace(sets[0], repeat=0.01)], SETTINGS["samples"])))


def test_augmentation_and_tiles_follow_the_set(sets: list[DataSet]) -> None:
    encoders = make(sets, SETTINGS["samples"])._work.encoders
    assert [encoder.augment for encoder in encoders] == [True, False]
    assert [encoder.config.max_tiles for encoder in encoders] == [4, 2]


def broken_set(tmp_path: Path) -> DataSet:
    path = write_set(tmp_path, "bad", 6)
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("bad_1.png", "gone.png")
    lines[4] = "{broken"
    path.write_text("\n".join(lines))
    return DataSet(str(path), str(tmp_path), "bad")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_ends_the_run_with_file_and_line(tmp_path: Path, workers: int) -> None:
    loader = make([broken_set(tmp_path)], BatchSettings(samples=2), shuffle=False, workers=workers)
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: .*gone\.png: no such picture"):
        list(loader.once())


@pytest.mark.parametrize("settings", [SETTINGS["samples"], SETTINGS["tokens"]])
def test_bad_records_can_be_skipped_counted_and_named(tmp_path: Path, settings: BatchSettings) -> None:
    data = broken_set(tmp_path)
    loader = make([data], settings, on_error="skip")
    assert sum(batch.num_samples for batch in loader.once()) == 4
    assert loader.num_skipped == 2
    assert sorted(loader.skipped) == [f"{data.annotation}:2", f"{data.annotation}:5"]
    assert "not a JSON line" in loader.skipped[f"{data.annotation}:5"]


def test_a_set_without_a_usable_record_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("{}\n" * 3)
    with pytest.raises(ValueError, match="no usable record"):
        next(iter(make([DataSet(str(path))], BatchSettings(samples=1), on_error="skip")))


def test_a_sample_over_the_budget_is_named(sets: list[DataSet]) -> None:
    with pytest.raises(ValueError, match=r"\.jsonl:\d+: \d+ tokens; a batch may have 40"):
        list(make(sets, BatchSettings(samples=None, tokens=40)).once())


def test_a_state_of_other_settings_is_refused(sets: list[DataSet]) -> None:
    state = make(sets, SETTINGS["samples"]).state_dict()
    with pytest.raises(ValueError, match="other data or settings"):
        make(sets, SETTINGS["packed"]).load_state_dict(state)
    with pytest.raises(ValueError, match="other data or settings"):
        make(sets[:1], SETTINGS["samples"]).load_state_dict(state)


@pytest.mark.parametrize("kind", SETTINGS)
def test_changed_records_are_refused_or_gone_on_with(sets: list[DataSet], tmp_path: Path, kind: str) -> None:
    """The same number of records, other words: what a row was planned to hold is not what it would hold."""
    loader = make(sets, SETTINGS[kind])
    take(loader, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    path = Path(sets[1].annotation)
    path.write_text(path.read_text().replace("answer", "another answer"))
    changed = [replace(data) for data in sets]
    with pytest.raises(
        ValueError, match=r"two\.jsonl changed since; put the old file back, .* data\.changed to accept"
    ):
        make(changed, SETTINGS[kind]).load_state_dict(state)
    loader = make(changed, SETTINGS[kind], changed="accept")
    with pytest.warns(UserWarning, match=r"two\.jsonl changed since; going on with what it says now"):
        loader.load_state_dict(state)
    took = take(loader, 6)
    limit = SETTINGS[kind].tokens
    assert limit is None or max(batch.input_ids.numel() for batch in took) <= limit
    make(changed, SETTINGS[kind]).load_state_dict(loader.state_dict())


def test_a_moved_or_touched_file_is_the_same(sets: list[DataSet]) -> None:
    loader = make(sets, SETTINGS["packed"])
    take(loader, 2)
    os.utime(sets[0].annotation, (0, 0))
    again = make([replace(data) for data in sets], SETTINGS["packed"])
    again.load_state_dict(loader.state_dict())


def test_another_number_of_records_names_the_file(sets: list[DataSet]) -> None:
    state = make(sets, SETTINGS["samples"]).state_dict()
    with open(sets[0].annotation, "a") as file:
        file.write(Path(sets[0].annotation).read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=r"other data or settings .*one\.jsonl changed since"):
        make([replace(data) for data in sets], SETTINGS["samples"], changed="accept").load_state_dict(state)


def test_open_rows_of_cut_samples_cannot_be_sized_anew(sets: list[DataSet]) -> None:
    settings = replace(SETTINGS["packed"], packing=Packing(overflow="split"))
    loader = make(sets, settings)
    take(loader, 2)
    state = loader.state_dict()
    path = Path(sets[1].annotation)
    path.write_text(path.read_text().replace("answer", "another answer"))
    with (
        pytest.warns(UserWarning, match="changed since"),
        pytest.raises(ValueError, match="overflow is 'split': of changed records nobody"),
    ):
        make([replace(data) for data in sets], settings, changed="accept").load_state_dict(state)


def test_counts_are_kept_until_the_file_or_a_setting_changes(sets: list[DataSet], tmp_path: Path) -> None:
    loader = make(sets[:1], SETTINGS["tokens"])
    first = loader._counts
    kept = list((tmp_path / "cache" / "counts").iterdir())
    assert len(kept) == 1
    np.save(kept[0], first + 1)
    assert np.array_equal(make(sets[:1], SETTINGS["tokens"])._counts, first + 1)
    os.utime(sets[0].annotation, (1, 1))
    assert np.array_equal(make(sets[:1], SETTINGS["tokens"])._counts, first)
    other = Loader(sets[:1], replace(loader.encoder, max_length=300, overlong="cut"), 0, SETTINGS["tokens"], workers=2)
    assert np.array_equal(other._counts, np.minimum(first, [300, 99]))


@given(st.lists(st.sampled_from([b"{}", b"", b"[1, 2]", b"\r", b"x" * 40]), max_size=12), st.booleans())
def test_lines_are_those_of_the_file(lines: list[bytes], ends: bool) -> None:
    import tempfile

    content = b"\n".join(lines) + (b"\n" if ends else b"")
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        expected = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        if not expected:
            with pytest.raises(ValueError, match="at least one"):
                Lines(file.name)
            return
        found = Lines(file.name)
        assert [(int(found.numbers[i]), found.read(i).strip()) for i in range(len(found))] == expected


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 5)), min_size=1, max_size=40),
    st.sampled_from([None, 3]),
    st.booleans(),
)
def test_groups_hold_every_sample_once_and_the_limits(
    counts: list[tuple[int, int]], samples: int | None, packed: bool
) -> None:
    settings = BatchSettings(samples=samples, tokens=100, tiles=7, packed=packed)
    sizes = np.asarray(counts)
    groups = list(group(sizes, settings))
    assert sorted(member for found in groups for member in found) == list(range(len(counts)))
    for found in groups:
        tokens = sizes[found, 0]
        assert (tokens.sum() if packed else tokens.max() * len(found)) <= 100
        assert sizes[found, 1].sum() <= 7
        assert len(found) <= (samples or 99)


def test_the_official_meta_json_is_read(tmp_path: Path) -> None:
    write_set(tmp_path, "set", 3)
    meta = tmp_path / "meta.json"
    entry = {"root": "pictures", "annotation": "set.jsonl", "data_augment": True, "max_dynamic_patch": 6}
    meta.write_text(json.dumps({"my_set": {**entry, "repeat_time": 2, "length": 3}}))
    annotation, root = str(tmp_path / "set.jsonl"), str(tmp_path / "pictures")
    assert read_sets(meta) == [DataSet(annotation, root, "my_set", True, 6, 2.0, 3)]
    assert read_sets(tmp_path / "set.jsonl") == [DataSet(str(tmp_path / "set.jsonl"), str(tmp_path), "set")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a meta JSON"),
        ("{", "not JSON"),
        ('{"a": {"root": ""}}', "a: `annotation` is None"),
        ('{"a": {"annotation": "a.jsonl", "repeat_time": 0}}', "a: repeat_time 0.0"),
    ],
)
def test_bad_meta_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "meta.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sets(path)
