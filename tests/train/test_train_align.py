"""The align stage: which token a region covers, and that the connector learns the words it is shown."""

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

from internvl.data.images import normalise, open_image
from internvl.data.mixture import read_sets
from internvl.data.tiling import single
from internvl.train.cells import WAVES, Wording, cells_under, place_waves, texts_under
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule
from internvl.train.stages.align import BACKGROUND_TOKENS, NAMES, PLACES, Align
from tiny import tiny_model, tiny_tokenizer


def test_a_region_covers_the_tokens_whose_centre_it_holds() -> None:
    cells = cells_under([{"text": "dog", "box": [0, 0, 500, 250]}], side=4)
    assert [place for place, texts in enumerate(cells) if texts] == [0, 1]


def test_a_small_region_goes_to_the_token_that_holds_half_of_it() -> None:
    cells = cells_under([{"text": "a", "box": [270, 300, 320, 340]}], side=4)
    assert [place for place, texts in enumerate(cells) if texts] == [5]


def test_a_thin_region_goes_to_all_tokens_along_it() -> None:
    cells = cells_under([{"text": "l", "box": [270, 240, 320, 800]}], side=4)
    assert [place for place, texts in enumerate(cells) if texts] == [5, 9]


@given(st.tuples(*[st.integers(0, 999)] * 2), st.tuples(*[st.integers(0, 1000)] * 2), st.sampled_from([2, 3, 4, 8]))
def test_every_region_reaches_a_token(corner: tuple[int, int], size: tuple[int, int], side: int) -> None:
    box = [*corner, min(1000, corner[0] + size[0]), min(1000, corner[1] + size[1])]
    assert any(cells_under([{"text": "x", "box": box}], side))


def test_a_second_letter_under_a_token_is_said_otherwise() -> None:
    regions = [{"text": text} for text in ("e", "e", "dog", "cat")]
    assert texts_under(regions, [0, 1]) == ["e", " e"]
    assert texts_under(regions, [1]) == ["e"]
    assert texts_under(regions, [2, 3]) == ["dog", "cat"]
    wording = Wording(tiny_tokenizer())
    assert wording.ids(" e") == [*wording.ids(" "), *wording.ids("e")]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    lines = []
    for number, (colour, word) in enumerate([((250, 10, 10), "red"), ((10, 10, 250), "blue")] * 4):
        Image.fromarray(np.full((28, 28, 3), colour, np.uint8)).save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "regions": [{"text": word, "box": [0, 0, 1000, 1000]}]})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "set.jsonl"


def stage(records: Path, **data: Any) -> Align:
    run = RunConfig(
        stage="align",
        connector=Part("full"),
        data=Data(meta=str(records), batch_samples=4, **data),
        schedule=Schedule(steps=1),
        optimiser=Optimiser(peak_lr=1e-3),
    )
    tokenizer = tiny_tokenizer()
    made = Align(run, tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, read_sets(records))
    made.begin(run, torch.device("cpu"))
    return made


def test_the_connector_learns_the_words(records: Path) -> None:
    made = stage(records)
    optimiser = torch.optim.AdamW(made.model.connector.parameters(), 1e-2)
    for _, batch in zip(range(40), made.batches(), strict=False):
        losses = made.losses(made.prepare(batch))
        optimiser.zero_grad()
        (losses[NAMES] / made.weights(batch)[NAMES]).backward()
        optimiser.step()
    red, blue = ({*made.wording.ids(word)} for word in ("red", "blue"))
    for name, word, other in (("0.png", red, blue), ("1.png", blue, red)):
        tile = single(open_image(records.parent / name), made.model.config.tile_size)
        said = made.model.encode_tiles(normalise(tile, made.model.config.normalize))
        nearest = (
            torch.nn.functional.normalize(said[0].mean(0), dim=0) @ torch.nn.functional.normalize(made.table, dim=-1).T
        )
        ids = list(made.words)
        assert max(float(nearest[ids.index(t)]) for t in word - other) > max(
            float(nearest[ids.index(t)]) for t in other - word
        )


def test_tokens_learn_where_the_box_is_that_they_lie_in(records: Path) -> None:
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        left = line["regions"][0]["text"] == "red"
        line["regions"][0]["box"] = [0, 0, 500, 1000] if left else [250, 0, 1000, 1000]
    records.write_text("\n".join(map(json.dumps, lines)) + "\n")
    made = stage(records)
    optimiser = torch.optim.AdamW(made.model.connector.parameters(), 1e-2)
    found = []
    for _, batch in zip(range(80), made.batches(), strict=False):
        places = made.losses(made.prepare(batch))[PLACES] / made.weights(batch)[PLACES]
        optimiser.zero_grad()
        places.backward()
        optimiser.step()
        found.append(float(places))
    assert found[-1] < 0.05 * found[0]


def test_a_letter_says_its_place_too(records: Path) -> None:
    before = next(stage(records).batches())
    records.write_text(records.read_text().replace('"red"', '"r"'))
    after = next(stage(records).batches())
    assert torch.equal(before.placed, after.placed)
    assert torch.equal(before.boxes, after.boxes)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boxes_that_differ_have_waves_that_differ(one: list[float], other: list[float]) -> None:
    boxes = torch.tensor([one, other], dtype=torch.float64)
    waves = place_waves(boxes)
    assert waves.shape == (2, 8 * len(WAVES))
    # The slowest sine and cosine alone: 2 |sin(pi d / 2)| >= 2 d for sides d apart.
    assert float((waves[0] - waves[1]).norm()) >= 2 * float((boxes[0] - boxes[1]).norm()) - 1e-9


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_kept_features_give_the_losses_of_fresh_ones(records: Path, where: str) -> None:
    fresh = stage(records)
    kept = stage(records, features=where, augment="off", features_folder=str(records.parent / "features"))
    for _, one, other in zip(range(5), fresh.batches(), kept.batches(), strict=False):
        assert torch.equal(one.tokens, other.tokens)
        a, b = fresh.losses(fresh.prepare(one)), kept.losses(kept.prepare(other))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-4)
    assert kept.store is not None
    assert len(kept.store) == 2  # eight records, two different pictures
    assert len(other.tiles) == 0
    assert len(one.tiles) == 4


def test_few_background_tokens_are_looked_at_and_not_the_same_each_time(records: Path) -> None:
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        line["regions"][0]["box"] = [0, 0, 500, 500]
    records.write_text("\n".join(map(json.dumps, lines)) + "\n")
    made = stage(records)
    made.side, batches = 8, made.batches()
    looked = [{int(token) for token in next(batches).tokens} for _ in range(3)]
    assert all(len(some) == 4 * (16 + BACKGROUND_TOKENS) for some in looked)
    assert looked[0] != looked[1]


def test_the_cursor_gives_the_batches_that_remain(records: Path) -> None:
    made, again = stage(records), stage(records)
    batches = made.batches()
    for _ in range(3):
        next(batches)
    again.seek(made.cursor())
    assert next(again.batches()).sources == next(batches).sources
