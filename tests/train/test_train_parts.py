"""What learns: parameter groups, token rows beside a frozen table, features kept on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stage import IMAGE_ID, VOCAB, tie, tiny_run

from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import trainable
from internvl.train.features import DiskStore, MemoryStore, digests, key
from internvl.train.settings import Optimiser, Part, Tokens
from tiny import tiny_model, tiny_tokenizer

ROWS = [token_id(tiny_tokenizer(), token) for token in SPECIAL_TOKENS]


def model(tied: bool = False) -> Any:
    made = tiny_model(vocab_size=VOCAB, image_token_id=IMAGE_ID)
    return tie(made) if tied else made


def test_groups_by_part_with_rates_and_decay(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path,
        vision=Part("full", lr_scale=0.1),
        connector=Part("full", lr_scale=2.0),
        language=Part(),
        tokens=Tokens(learn=True, lr_scale=3.0),
        optimiser=Optimiser(weight_decay=0.05),
    )
    learner = trainable.choose(model(), run, ROWS)
    groups = trainable.groups(learner)
    assert {(g["part"], g["lr_scale"], g["weight_decay"]) for g in groups} == {
        ("vision", 0.1, 0.05),
        ("vision", 0.1, 0.0),
        ("connector", 2.0, 0.05),
        ("connector", 2.0, 0.0),
        ("token_rows", 3.0, 0.0),
    }
    decayed = {name for g in groups if g["weight_decay"] for name in g["names"]}
    assert "vision.layers.0.attention.qkv.weight" in decayed
    spared = {name for g in groups if not g["weight_decay"] for name in g["names"]}
    assert {"connector.norm.weight", "connector.fc1.bias", "vision.embeddings.class_embedding"} <= spared
    assert decayed | spared == set(learner.parameters)


def test_the_table_counts_every_parameter(tmp_path: Path) -> None:
    learner = trainable.choose(model(), tiny_run(tmp_path, language=Part()), ROWS)
    lines = {name: (learned, frozen) for name, _, learned, frozen in trainable.table(learner)}
    assert lines["language"][0] == 0
    assert lines["vision"][1] == 0
    assert sum(map(sum, lines.values())) == sum(p.numel() for p in learner.model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_equal_a_whole_table_that_learns(tmp_path: Path, tied: bool) -> None:
    ids = torch.tensor([[5, ROWS[0], 17, ROWS[4], ROWS[4], 30]])
    targets = torch.tensor([ROWS[0], 17, ROWS[3], ROWS[4], 30, 3])

    def loss(some: Any) -> Any:
        hidden = some.language(some.language.embed(ids))
        return torch.nn.functional.cross_entropy(some.language.head(hidden)[0], targets)

    whole = model(tied)
    table, head = whole.language.model.get_input_embeddings(), whole.language.model.get_output_embeddings()
    expected = loss(whole)
    expected.backward()
    part = model(tied)
    learner = trainable.choose(
        part, tiny_run(tmp_path, vision=Part(), language=Part(), tokens=Tokens(learn=True)), ROWS
    )
    value = loss(part)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert learner.rows is not None
    torch.testing.assert_close(learner.rows.input.grad, table.weight.grad[ROWS])
    torch.testing.assert_close(learner.rows.output.grad, head.weight.grad[ROWS])
    assert (learner.rows.input is learner.rows.output) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_settled_rows_give_the_same_logits(tmp_path: Path, tied: bool) -> None:
    some = model(tied)
    run = tiny_run(tmp_path, vision=Part(), language=Part(), tokens=Tokens(learn=True))
    rows = trainable.choose(some, run, ROWS).rows
    assert rows is not None
    with torch.no_grad():
        for parameter in rows.parameters():
            parameter.add_(torch.randn(parameter.shape))
        hidden = some.language.embed(torch.tensor([[*ROWS, 5]]))
        before = hidden, some.language.head(hidden)
        rows.settle()
        hidden = some.language.embed(torch.tensor([[*ROWS, 5]]))
        after = hidden, some.language.head(hidden)
    torch.testing.assert_close(after, before)


def test_rows_of_a_table_that_learns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokens\.no-learn"):
        trainable.choose(model(), tiny_run(tmp_path, tokens=Tokens(learn=True)), ROWS)


def test_too_many_blocks_are_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, vision=Part("full", layers_from=-4))
    with pytest.raises(ValueError, match="layers_from is -4 but the part has 3 blocks"):
        trainable.choose(model(), run, ROWS)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_tile_is_computed_once(tmp_path: Path, kind: str) -> None:
    tiles = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    tiles[3] = tiles[1]
    computed: list[int] = []

    def compute(some: torch.Tensor) -> torch.Tensor:
        computed.append(len(some))
        return some.float().mean((2, 3))[:, None]

    store = DiskStore(tmp_path, (1, 3), torch.float32) if kind == "disk" else MemoryStore()
    for _ in range(2):
        found = store.gather(tiles, digests(tiles), compute)
        torch.testing.assert_close(found, tiles.float().mean((2, 3))[:, None])
    assert sum(computed) == 4
    assert len(store) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_on_disk_outlive_the_process_and_a_torn_end(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {bytes([i]) * 16: torch.randn(2, 3).to(dtype) for i in range(4)}
    store = DiskStore(tmp_path, (2, 3), dtype)
    for name, value in values.items():
        store.put(name, value)
    del store
    features = tmp_path / "features.bin"
    features.write_bytes(features.read_bytes()[:-1])
    again = DiskStore(tmp_path, (2, 3), dtype)
    assert len(again) == 3
    names = list(values)
    assert names[3] not in again
    again.put(names[3], values[names[3]])
    once_more = DiskStore(tmp_path, (2, 3), dtype)
    assert all(torch.equal(once_more.get(name), value) for name, value in values.items())
    with pytest.raises(ValueError, match="for a store of"):
        again.put(b"0" * 16, torch.zeros(3, 3, dtype=dtype))


def test_the_key_of_features_follows_weights_and_settings() -> None:
    vision = model().vision
    first = key(vision, side=56)
    assert first == key(vision, side=56) != key(vision, side=28)
    with torch.no_grad():
        vision.layers[0].mlp.fc2.bias[3] += 1e-6
    assert key(vision, side=56) != first


def test_keeping_features_of_what_learns_is_refused(tmp_path: Path) -> None:
    from tiny_stage import tiny_stage

    run = tiny_run(tmp_path)
    run = replace(run, data=replace(run.data, features="memory"))
    with pytest.raises(ValueError, match="frozen vision part"):
        tiny_stage(run).begin(run, torch.device("cpu"))
