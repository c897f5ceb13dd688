"""The align stage: which token a region covers, and that the connector learns the words it is shown."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from internvl.data.images import normalise, open_image
from internvl.data.mixture import read_sets
from internvl.data.tiling import single
from internvl.train.cells import WAVES, Cells, Wording, cells_under, centres_under, directions, place_waves, texts_under
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule
from internvl.train.stages.align import BACKGROUND_TOKENS, CENTRES, NAMES, PLACES, Align, open_align
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


BOXES = st.lists(
    st.tuples(*[st.integers(0, 999)] * 2, *[st.integers(0, 1000)] * 2).map(
        lambda box: [box[0], box[1], min(1000, box[0] + box[2]), min(1000, box[1] + box[3])]
    ),
    max_size=6,
)


@given(BOXES, st.sampled_from([1, 2, 3, 8]), st.sampled_from([0.0, 0.05, 0.3, 2.0]))
def test_centres_are_as_many_as_regions(boxes: list[list[int]], side: int, blur: float) -> None:
    regions = [{"text": "x", "box": box} for box in boxes]
    centres = centres_under(regions, side, blur)
    assert centres.shape == (side**2,)
    assert centres.min() >= 0
    assert float(centres.sum()) == pytest.approx(len(boxes), abs=1e-5)


@given(BOXES, st.sampled_from([1, 2, 3, 8]))
def test_a_centre_lies_in_a_token_that_its_region_covers(boxes: list[list[int]], side: int) -> None:
    for box in boxes:
        region = {"text": "x", "box": box}
        (place,) = np.flatnonzero(centres_under([region], side))
        row, column = divmod(int(place), side)
        assert row <= (box[1] + box[3]) / 2000 * side <= row + 1
        assert column <= (box[0] + box[2]) / 2000 * side <= column + 1
        assert cells_under([region], side)[place]


def test_who_is_not_sure_shares_a_centre_out_by_how_likely_it_is_there() -> None:
    middle, edge = ({"text": "x", "box": [left, 400, left + 100, 600]} for left in (575, 450))
    sure, unsure = centres_under([middle], 4, 0.01), centres_under([middle], 4, 0.5).reshape(4, 4)
    assert sure[[6, 10]].tolist() == pytest.approx([0.5, 0.5])  # on a line, in the middle between two others
    assert unsure[:, 2].sum() == pytest.approx(math.erf(0.5 / (0.5 * math.sqrt(2))), abs=1e-6)
    assert unsure[1] == pytest.approx(unsure[2])
    assert centres_under([edge], 4).tolist().index(1) == 10
    assert centres_under([edge], 4, 0.2)[5:7].tolist() == pytest.approx([0.25, 0.25], abs=1e-6)


def test_the_directions_of_boxes_are_those_of_before_centres_had_one() -> None:
    """Connectors that were taught without centres keep what they say."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.linalg.qr(torch.randn(64, 8 * len(WAVES), generator=generator))[0].T
    found = directions(64, 2.0)
    torch.testing.assert_close(found[:-1], waves * (2.0 * 0.5 / math.sqrt(4 * len(WAVES))))
    assert float((found[:-1] @ found[-1]).abs().max()) < 1e-5
    assert float(found[-1].norm()) == pytest.approx(0.7)


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


def stage(records: Path, size: int = 4, **data: Any) -> Align:
    run = RunConfig(
        stage="align",
        connector=Part("full"),
        data=Data(meta=str(records), batch_samples=size, **data),
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


def test_only_tokens_in_a_box_learn_places_and_all_that_are_looked_at_centres(records: Path) -> None:
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        line["regions"][0]["box"] = [500, 500, 1000, 1000]  # the last of four tokens: those before are background
    records.write_text("\n".join(map(json.dumps, lines)) + "\n")
    made = stage(records)
    batch = next(made.batches())
    said = torch.randn(4, made.side**2, made.table.shape[1], requires_grad=True)
    made.model.connector.forward = lambda seen: said  # type: ignore[method-assign]
    for loss, learning in ((PLACES, batch.tokens[batch.placed]), (CENTRES, batch.tokens)):
        (given,) = torch.autograd.grad(made.losses(batch)[loss], said)
        found = torch.nonzero(given.flatten(0, 1).abs().sum(-1)).flatten()
        assert found.tolist() == sorted(learning.tolist())
    assert len(batch.placed) == 4
    assert len(batch.tokens) == 16


def test_tokens_learn_which_of_them_holds_the_centre(records: Path) -> None:
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        red = line["regions"][0]["text"] == "red"
        line["regions"][0]["box"] = [0, 0, 500, 500] if red else [500, 500, 1000, 1000]
        image = Image.new("RGB", (28, 28), "white")
        image.paste("red" if red else "blue", (0, 0, 14, 14) if red else (14, 14, 28, 28))
        image.save(records.parent / line["image"])
    records.write_text("\n".join(map(json.dumps, lines)) + "\n")
    made = stage(records)
    optimiser = torch.optim.AdamW(made.model.connector.parameters(), 1e-2)
    for _, batch in zip(range(80), made.batches(), strict=False):
        optimiser.zero_grad()
        (made.losses(made.prepare(batch))[CENTRES] / made.weights(batch)[CENTRES]).backward()
        optimiser.step()
    along = made.directions[-1] / made.directions[-1].square().sum()
    for name, place in (("0.png", 0), ("1.png", 3)):
        tile = single(open_image(records.parent / name), made.model.config.tile_size)
        heard = made.model.encode_tiles(normalise(tile, made.model.config.normalize))[0].float() @ along
        assert [int(place) for place in torch.nonzero(heard > 0.4)] == [place]


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


def test_sets_come_as_often_as_they_are_repeated(records: Path) -> None:
    lines = records.read_text().splitlines(keepends=True)
    (records.parent / "often.jsonl").write_text("".join(lines[:2]))
    (records.parent / "seldom.jsonl").write_text("".join(lines[2:]) + '{"image": "0.png", "conversations": []}\n')
    sets = {name: {"annotation": f"{name}.jsonl", "repeat_time": n} for name, n in (("often", 3), ("seldom", 0.5))}
    meta = records.parent / "meta.json"
    meta.write_text(json.dumps(sets))
    made = stage(meta)
    epochs = [made.order(epoch) for epoch in range(8)]
    assert all(Counter(epoch)[0] == Counter(epoch)[1] == 3 for epoch in epochs)
    seldom = [[number for number in epoch if number > 1] for epoch in epochs]
    assert {len(some) for some in seldom} <= {3, 4}  # half of seven, of which one has no regions
    assert {number for some in seldom for number in some} == set(range(2, 8))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    shown = [source for _, batch in zip(range(2), made.batches(), strict=False) for source in batch.sources]
    assert shown == [made.sets[at].source(line) for at, line in (made.lines[number] for number in epochs[0][:8])]
    with pytest.raises(ValueError, match=r"batch_samples is 11 but an epoch has (9|10) pictures"):
        next(stage(meta, size=11).batches())


def with_held_out(records: Path, monkeypatch: pytest.MonkeyPatch, samples: int | None = None) -> Align:
    """Three kept pictures, the last with a word that no other has; none with one that others have."""
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line, word in zip(lines, ("red", "red", "quiz"), strict=False):
        line["regions"] = [{"text": word, "box": [0, 0, 500, 500]}]
    (records.parent / "kept.jsonl").write_text("\n".join(map(json.dumps, lines[:3])) + "\n")
    made = stage(records)
    data = replace(made.run.data, held_out=str(records.parent / "kept.jsonl"), held_out_samples=samples)
    loaded = SimpleNamespace(model=made.model, tokenizer=made.tokenizer)
    monkeypatch.setattr("internvl.train.stages.align.load_checkpoint", lambda *_, **__: loaded)
    return open_align(replace(made.run, data=data))


def perfect(made: Align, batch: Cells) -> torch.Tensor:
    """What a connector would say that made no mistake in words and centres."""
    said = torch.zeros(len(batch.sources) * made.side**2, made.table.shape[1])
    words = torch.zeros(len(batch.tokens), len(made.words))
    words[batch.cell, batch.word] = batch.share
    meant, centre = words @ F.normalize(made.table, dim=-1), made.directions[-1]
    meant -= (meant @ centre / centre.square().sum())[:, None] * centre  # a word tells nothing of centres
    said[batch.tokens] = meant + batch.centres[:, None] * centre
    return said.view(len(batch.sources), made.side**2, -1)


def test_a_connector_without_mistakes_is_found_so_on_held_out_pictures(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_held_out(records, monkeypatch)
    assert made.held_out is not None
    monkeypatch.setattr(made.held_out, "_said", lambda batch: perfect(made.held_out, batch))
    found = made.evaluate(torch.device("cpu"))
    assert found["held_out_nearest"] == 1
    assert found["held_out_off"] == pytest.approx(0, abs=1e-4)
    assert found["held_out_centres"] < 0.1
    more = made.held_out.directions[-1]  # as if less than none lay under the last token
    monkeypatch.setattr(
        made.held_out, "_said", lambda batch: perfect(made.held_out, batch) - more * (torch.arange(4) == 3)[:, None]
    )
    worse = made.evaluate(torch.device("cpu"))
    assert worse["held_out_off"] == pytest.approx(1, abs=1e-4)
    assert worse["held_out_centres"] > found["held_out_centres"] + 0.1


def test_held_out_words_are_candidates_there_and_change_no_training(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, alone = with_held_out(records, monkeypatch), stage(records)
    assert made.held_out is not None
    assert made.words == alone.words
    assert set(made.words) < set(made.held_out.words)
    assert set(made.wording.ids("quiz")) <= set(made.held_out.words)
    batch = next(made.batches())
    for name, loss in alone.losses(next(alone.batches())).items():
        assert made.losses(batch)[name] == loss


def test_the_held_out_loss_is_that_of_the_same_pictures_in_training(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_held_out(records, monkeypatch)
    assert made.held_out is not None
    batch = made.held_out.made(range(3), np.random.default_rng(0))
    weights = made.held_out.weights(batch)
    means = {name: float(loss) / weights[name] for name, loss in made.held_out.losses(batch).items()}
    found = made.evaluate(torch.device("cpu"))
    assert {name: found[f"held_out_{name}"] for name in means} == pytest.approx(means, rel=1e-5)
    assert found["held_out_loss"] == pytest.approx(sum(made.coefficients[name] * means[name] for name in means))
    assert found == made.evaluate(torch.device("cpu"))
    one = with_held_out(records, monkeypatch, samples=1)
    assert one.evaluate(torch.device("cpu"))["held_out_loss"] != found["held_out_loss"]
    assert "held_out_loss" not in stage(records).evaluate(torch.device("cpu"))
