"""What worker processes keep: no batch in a heap of their own, no copy of what the parent holds."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from internvl.data.batching import BatchSettings
from internvl.data.collate import collate, collate_packed
from internvl.data.encode import Encoder
from internvl.data.loader import Loader
from internvl.data.measure import unchanged
from internvl.data.mixture import DataSet
from internvl.data.sample import Sample
from internvl.data.work import Made, Work
from tiny import tiny_chat_config, tiny_tokenizer


def sample(tiles: int) -> Sample:
    ids = torch.arange(4)
    return Sample(ids, ids.clone(), torch.randint(0, 256, (tiles, 3, 8, 8), dtype=torch.uint8), "a:1", 0)


class _Collated(Dataset[Any]):
    """What a worker says about the tiles of its batches, and what they should be."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> Any:
        torch.manual_seed(number)
        samples = [sample(2), sample(0), sample(3)]
        batch = (collate, collate_packed)[number](samples, 0)
        return batch.tiles.is_shared(), batch.tiles, torch.cat([samples[0].tiles, samples[2].tiles])


def test_a_worker_puts_tiles_where_they_are_shared() -> None:
    loader = DataLoader(
        _Collated(), batch_size=None, num_workers=1, collate_fn=unchanged, multiprocessing_context="fork"
    )
    for is_shared, tiles, expected in loader:
        assert is_shared
        assert torch.equal(tiles, expected)
    assert not _Collated()[0][0]  # without workers nothing is shared


def test_workers_pass_over_what_they_inherit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection in a worker looks at its own objects only; the parent's are again as they were."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": "a.png", "conversations": turns}) + "\n")
    inherited = len(gc.get_objects())
    seen: list[int] = []
    made = Work.__getitem__

    def counting(work: Work, plan: Any) -> Made:
        batch = made(work, plan)
        assert batch.batch is not None
        batch.batch.loss_weights.fill_(gc.get_freeze_count())
        return batch

    monkeypatch.setattr(Work, "__getitem__", counting)
    encoder = Encoder(tiny_tokenizer(), tiny_chat_config())
    loader = Loader([DataSet(str(path), str(tmp_path))], encoder, 0, BatchSettings(samples=1), workers=1)
    seen += [int(batch.loss_weights[0, 0]) for batch in loader.once()]
    assert min(seen) > 0.9 * inherited
    assert gc.get_freeze_count() == 0
