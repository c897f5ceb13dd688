"""Visual tokens told by regions: what they say, which tiles they replace, and that a run on them learns and resumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken import break_off
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_stage import IMAGE_ID
from torch.nn import functional as F

from internvl.train import told as told_module
from internvl.train.cells import Wording, cells_under, directions, place_waves
from internvl.train.chat_records import open_loader
from internvl.train.loop import train
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule, Tokens
from internvl.train.stages.sft import Prepared, Sft
from internvl.train.told import Told, drawn
from tiny import tiny_model, tiny_tokenizer

SMALL, WIDE = "a dog", "a cat"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """One tile with a region, one without regions, one of several tiles with a region, one text."""
    shapes = {SMALL: (56, 56), "": (56, 56), WIDE: (168, 56)}
    lines: list[dict[str, Any]] = []
    for number, (text, size) in enumerate(shapes.items()):
        Image.fromarray(np.full((size[1], size[0], 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
        regions = {"regions": [{"text": text, "box": [0, 0, 500, 1000]}]} if text else {}
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text or "none"}]
        lines.append({"image": f"{number}.png", "conversations": turns, **regions})
    lines.append({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "set.jsonl"


def tiny_run(records: Path, *, told: float = 1.0, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "out": str(records.parent / "run"),
        "language": Part("full"),
        "connector": Part("full"),
        "data": Data(meta=str(records), batch_samples=4, max_tiles=4, told=told),
        "optimiser": Optimiser(peak_lr=1e-3),
        "schedule": Schedule(steps=6),
        "save_every": 1,
        "export": "none",
        "device": "cpu",
    }
    return RunConfig(**{**settings, **changes})


def tiny_stage(run: RunConfig) -> Sft:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), image_token_id=IMAGE_ID)
    return Sft(run, model, tokenizer, open_loader(run, tokenizer, model.config, run.data.meta, learning=True), None)


def begun(records: Path, **changes: Any) -> Sft:
    run = tiny_run(records, **changes)
    stage = tiny_stage(run)
    stage.begin(run, torch.device("cpu"))
    return stage


def first_batch(stage: Sft) -> Prepared:
    return stage.prepare(next(batch for batch in stage.batches() if batch is not None))


def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told_module, "LEAST_NOISE", 0.0)
    monkeypatch.setattr(told_module, "MOST_NOISE", 0.0)
    monkeypatch.setattr(told_module, "WAVE_NOISE", 0.0)
    monkeypatch.setattr(told_module, "CENTRE_NOISE", 0.0)
    monkeypatch.setattr(told_module, "MOST_BLUR", 0.0)


WORDLESS = Told.__new__(Told)
"""Knows how to word what is said, and no records."""
WORDLESS.wording = Wording(tiny_tokenizer())


def told_of(stage: Sft) -> Told:
    assert stage.told is not None
    return stage.told


def test_a_told_token_is_nearest_to_the_word_of_its_region(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    stage = begun(records)
    told = told_of(stage)
    word = told.wording.ids(SMALL)
    tokens = told.tokens(first_batch(stage).said)[0]
    inside = {place for place, under in enumerate(cells_under([{"box": [0, 0, 500, 1000]}], told.side)) if under}
    cosines = F.normalize(tokens, dim=-1) @ F.normalize(told.table.float(), dim=-1).T
    for place in range(told.side**2):
        own = cosines[place, word].mean()
        assert (float(own) > 0.3) == (place in inside)


def test_a_told_token_has_the_length_of_a_word_and_says_its_box(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    stage = begun(records)
    told = told_of(stage)
    said = first_batch(stage).said
    assert said is not None
    assert float(said.centres.sum()) == len(said.tiles)
    said = replace(said, centres=torch.zeros_like(said.centres))
    tokens = told.tokens(said).flatten(0, 1)
    unplaced = sorted(set(range(len(tokens))) - set(said.placed.tolist()))
    torch.testing.assert_close(tokens[unplaced].norm(dim=-1), torch.full((len(unplaced),), told.length * 0.75**0.5))
    basis = directions(tokens.shape[1], told.length)
    bare = told.tokens(replace(said, placed=said.placed[:0], boxes=said.boxes[:0]))
    heard = (tokens - bare.flatten(0, 1))[said.placed] @ (basis / basis.square().sum(-1, keepdim=True)).T
    torch.testing.assert_close(heard[:, :-1], place_waves(said.boxes), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(heard[:, -1], torch.zeros(len(heard)), rtol=0, atol=1e-4)


def test_what_is_said_goes_where_the_batch_goes(records: Path) -> None:
    there = first_batch(begun(records)).to(torch.device("meta"))
    assert {value.device.type for value in (there.batch.tiles, there.targets, there.said.centres)} == {"meta"}


def test_told_tokens_are_whole_where_the_run_computes_in_bfloat16(records: Path) -> None:
    stage = begun(records)
    told, said = told_of(stage), first_batch(stage).said
    with torch.autocast("cpu", torch.bfloat16):
        assert told.tokens(said).dtype is torch.float32


def test_what_is_said_of_places_and_centres_is_uncertain(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an encoder; every draw another."""
    silent(monkeypatch)
    stage = begun(records)
    told, said = told_of(stage), first_batch(stage).said
    monkeypatch.setattr(told_module, "WAVE_NOISE", 0.4)
    monkeypatch.setattr(told_module, "CENTRE_NOISE", 0.15)
    basis = directions(told.table.shape[1], told.length)
    along = (basis / basis.square().sum(-1, keepdim=True)).T
    one, other = (told.tokens(said).flatten(0, 1) @ along for _ in range(2))
    placed = torch.zeros(len(one), dtype=torch.bool).index_fill(0, said.placed, True)
    assert float((one - other)[placed, :-1].abs().max()) > 1e-3
    assert float((one - other)[:, -1].abs().max()) > 1e-3
    assert float((one - other)[~placed, :-1].abs().max()) < 1e-5


def test_a_centre_is_shared_out_as_by_an_encoder_that_is_not_sure(records: Path) -> None:
    said = first_batch(begun(records)).said
    assert float(said.centres.sum()) == pytest.approx(len(said.tiles))
    assert 0 < float(said.centres.max()) < 0.999


def test_a_told_token_says_the_centres_under_it(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent(monkeypatch)
    stage = begun(records)
    told, said = told_of(stage), first_batch(stage).said
    assert said is not None
    basis = directions(told.table.shape[1], told.length)
    without = told.tokens(replace(said, centres=torch.zeros_like(said.centres)))
    heard = (told.tokens(said) - without).flatten(0, 1) @ basis[-1] / basis[-1].square().sum()
    torch.testing.assert_close(heard, said.centres, rtol=1e-4, atol=1e-4)
    assert said.centres.tolist() == [0, 0, 1, 0]  # of the left half, 2 x 2 tokens: on the line, so below


@given(st.text("abc:/", min_size=1, max_size=8))
def test_a_name_is_said_partly_as_another_and_its_colour_is_not(source: str) -> None:
    told = WORDLESS
    spoken = told._spoken(["red dog", "cat", "q"], ["blue bird", "dog", "p"], source)
    assert spoken == told._spoken(["red dog", "cat", "q"], ["blue bird", "dog", "p"], source)
    assert spoken["q"] == told._weighted("q", 1.0)
    colour, dog, bird = (told.wording.ids(text) for text in ("red", "dog", "bird"))
    said = spoken["red dog"]
    assert said[: len(colour)] == told._weighted("red", 1.0)
    own, other = said[len(colour) : len(colour) + len(dog)], said[len(colour) + len(dog) :]
    assert [token for token, _ in own] == dog
    assert [token for token, _ in other] in ([], bird)
    assert sum(weight for _, weight in own + other) == pytest.approx(len(dog))
    assert sum(weight for _, weight in other) <= told_module.MOST_CONFUSED * len(dog)
    assert told._spoken(["cat"], ["red cat", "x"], source)["cat"] == told._weighted("cat", 1.0)


def test_about_as_many_names_are_confused_as_said() -> None:
    sources = [f"set.jsonl:{number}" for number in range(500)]
    whole = WORDLESS._weighted("dog", 1.0)
    confused = [source for source in sources if WORDLESS._spoken(["dog"], ["bird"], source)["dog"] != whole]
    assert 0.5 < len(confused) / len(sources) < 0.7


def test_only_single_tiles_with_regions_are_told(records: Path) -> None:
    stage = begun(records)
    prepared = first_batch(stage)
    batch, said = prepared.batch, prepared.said
    assert said is not None
    counts = (batch.input_ids == stage.image_token_id).sum(1) // told_of(stage).side ** 2
    firsts = (counts.cumsum(0) - counts).tolist()
    expected = [first for first, source in zip(firsts, batch.sources, strict=True) if source.endswith(":1")]
    assert said.tiles.tolist() == expected
    assert sorted(said.tiles.tolist() + said.looked.tolist()) == list(range(batch.num_tiles))


def test_sets_of_which_nothing_can_be_told_are_refused(records: Path) -> None:
    records.write_text(records.read_text().replace('"regions"', '"places"'))
    with pytest.raises(ValueError, match=r"data.told is 1.0 but no line of .*set.jsonl has regions; write them"):
        begun(records)


def test_the_encoder_sees_what_is_not_told_and_nothing_else(records: Path) -> None:
    stage = begun(records)
    prepared = first_batch(stage)
    seen: list[int] = []
    look = stage._features
    stage._features = lambda tiles: seen.append(len(tiles)) or look(tiles)  # type: ignore[method-assign,func-returns-value]
    torch.manual_seed(0)
    visual = stage._visual(prepared)
    assert seen == [len(prepared.said.looked)]
    torch.testing.assert_close(visual[prepared.said.looked], stage.see(prepared.batch.tiles[prepared.said.looked]))
    torch.manual_seed(0)
    torch.testing.assert_close(visual[prepared.said.tiles], told_of(stage).tokens(prepared.said))


@pytest.mark.parametrize(("ranks", "runs"), [(1, 0), (2, 1)])
def test_of_several_ranks_none_leaves_the_encoder_out(
    records: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, runs: int
) -> None:
    records.write_text(records.read_text().splitlines()[0] + "\n")
    stage = begun(records)
    prepared = first_batch(stage)
    seen: list[int] = []
    look = stage._features
    stage._features = lambda tiles: seen.append(len(tiles)) or look(tiles)  # type: ignore[method-assign,func-returns-value]
    monkeypatch.setattr("internvl.parallel.collectives.num_ranks", lambda: ranks)
    visual = stage._visual(prepared)
    assert len(visual) == prepared.batch.num_tiles > 0
    assert len(seen) == runs


def test_a_share_of_nothing_is_plain_training(records: Path) -> None:
    plain, told = begun(records, told=0.0), begun(records, told=1e-12)
    torch.testing.assert_close(plain.losses(first_batch(plain)), told.losses(first_batch(told)))


def test_held_out_records_are_seen(records: Path) -> None:
    stage = begun(records)
    stage.held_out = open_loader(stage.run, stage.tokenizer, stage.model.config, str(records), learning=False)
    stage.told.tokens = None  # type: ignore[union-attr,method-assign,assignment]
    assert stage.evaluate(torch.device("cpu"))["held_out_loss"] > 0


@given(st.text())
def test_the_draw_is_a_share_and_the_same_each_time(source: str) -> None:
    assert 0 <= drawn(source) < 1
    assert drawn(source) == drawn(source)


def test_draws_are_even() -> None:
    found = np.sort([drawn(f"set.jsonl:{number}") for number in range(2000)])
    assert np.abs(found - np.arange(2000) / 2000).max() < 0.04


def test_a_told_run_resumes_to_the_bit(records: Path) -> None:
    whole = tiny_run(records)
    train(whole, tiny_stage(whole))
    broken = replace(whole, out=str(records.parent / "broken"))
    break_off(broken, 3, tiny_stage(broken))
    torch.manual_seed(1)
    train(broken, tiny_stage(broken))
    a, b = (load_file(Path(run.out) / "checkpoints/step-00000006/learned.safetensors") for run in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def earlier(records: Path) -> RunConfig:
    """A run that left a connector, adapters and token rows."""
    adapted = {"language": Part("lora", rank=4, dropout=0.0), "vision": Part("lora", rank=4, dropout=0.0)}
    run = tiny_run(records, export="last", tokens=Tokens(learn=True), **adapted)
    train(run, tiny_stage(run))
    return replace(run, out=str(records.parent / "later"), start=(str(Path(run.out) / "parts"),))


def test_a_run_begins_with_the_parts_of_another(earlier: RunConfig) -> None:
    fresh, later = tiny_stage(replace(earlier, start=())), tiny_stage(earlier)
    learners = [stage.begin(stage.run, torch.device("cpu")) for stage in (fresh, later)]
    checkpoint = Path(earlier.start[0]).parent / "checkpoints/step-00000006/learned.safetensors"
    for name, value in load_file(checkpoint).items():
        begun, new = (learner.parameters[name] for learner in reversed(learners))
        assert begun.requires_grad
        assert torch.equal(begun, value), name
        assert not torch.equal(new, value), name


def test_what_it_goes_on_with_is_exported_whole(earlier: RunConfig) -> None:
    run = replace(earlier, optimiser=Optimiser(peak_lr=1e-12), schedule=Schedule(steps=1))
    train(run, tiny_stage(run))
    for file in ("connector.safetensors", "embeddings.safetensors", "language/adapter_model.safetensors"):
        before, after = (load_file(folder / file) for folder in (Path(earlier.start[0]), Path(run.out) / "parts"))
        for name, value in before.items():
            torch.testing.assert_close(after[name], value)


def test_several_starts_are_their_mean(earlier: RunConfig) -> None:
    other = replace(earlier, out=str(Path(earlier.out).parent / "other"), export="last", seed=1)
    train(other, tiny_stage(other))
    both = replace(earlier, start=(*earlier.start, str(Path(other.out) / "parts")))
    stages = [tiny_stage(replace(earlier, start=(start,))) for start in both.start] + [tiny_stage(both)]
    one, two, mean = (stage.begin(stage.run, torch.device("cpu")).parameters for stage in stages)
    assert not torch.equal(one["connector.fc1.weight"], two["connector.fc1.weight"])
    for name, value in mean.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": Part("lora", rank=8)}, "r is 4, the language model's adapters have 8; set the rank"),
        ({"language": Part("lora", rank=4, alpha=3)}, "lora_alpha is 8, the language model's adapters have 3"),
        ({"language": Part("frozen")}, "adapters, but language.learn is 'frozen'; set --language.learn lora"),
        ({"tokens": Tokens()}, "token rows, but tokens.learn is off"),
        ({"start": ("nowhere",)}, "start is nowhere, where there are no parts"),
        ({"start": ("EARLIER", "nowhere")}, "is not there but .* is; a mean is taken of runs"),
    ],
)
def test_parts_that_find_no_place_are_refused(earlier: RunConfig, changes: dict[str, Any], message: str) -> None:
    run = replace(earlier, **changes)
    run = replace(run, start=tuple(earlier.start[0] if name == "EARLIER" else name for name in run.start))
    with pytest.raises(ValueError, match=message):
        tiny_stage(run).begin(run, torch.device("cpu"))


@pytest.mark.parametrize("file", ["connector.safetensors", "embeddings.safetensors"])
def test_parts_of_another_shape_are_refused_by_name(earlier: RunConfig, file: str) -> None:
    path = Path(earlier.start[0]) / file
    values = load_file(path)
    name = max(values)
    for wrong in ({**values, name: values[name][:-1].contiguous()}, {k: v for k, v in values.items() if k != name}):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=rf"{file}: {name} is .*in this run's model it is \(.*give the parts of"):
            tiny_stage(earlier).begin(earlier, torch.device("cpu"))


def test_only_stages_with_parts_begin_with_them() -> None:
    with pytest.raises(ValueError, match="stage 'contrastive' cannot begin with parts"):
        RunConfig(stage="contrastive", start=("runs/x/parts",), connector=Part("full"), schedule=Schedule(steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"told": 1.5}, r"data.told is 1.5; it is a share"),
        ({"told": 0.5, "packed": True, "batch_tokens": 64}, "packed rows cannot be told"),
    ],
)
def test_what_cannot_be_told_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(language=Part("full"), data=Data(**changes), schedule=Schedule(steps=1))
