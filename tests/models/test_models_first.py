"""Chat models of 1.0: which layer says what, in which order, and the laws of every chat model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import DynamicCache

from internvl.config import ChatConfig
from internvl.models import placement
from internvl.models.build import build_dual
from internvl.models.chat import ChatModel
from internvl.train.run import RunConfig
from internvl.train.settings import Part, Schedule
from internvl.train.trainable import choose, table
from internvl.zoo import CHAT
from tiny import IMAGE_TOKEN_ID, tiny_first, tiny_pictures

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
QUERIES, PATCHES, WIDTH, QUERY_WIDTH = 5, 16, 64, 80


def prompt(num_tiles: int, tokens: int, seed: int = 0, num_text: int = 8) -> torch.Tensor:
    """A row of ids with the places of some tiles in its middle."""
    text = torch.randint(10, 160, (num_text,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([text[:3], torch.full((tokens * num_tiles,), IMAGE_TOKEN_ID), text[3:]])[None]


@pytest.fixture(scope="module", params=[True, False], ids=["qllama", "plain"])
def model(request: pytest.FixtureRequest) -> ChatModel:
    return tiny_first(request.param).eval()


@pytest.fixture
def asking() -> ChatModel:
    return tiny_first().eval()


# who says what


@torch.no_grad()
def test_the_queries_are_those_of_the_dual_model_alone_and_come_first(asking: ChatModel) -> None:
    assert asking.config.queries is not None
    assert asking.qllama is not None
    dual = build_dual(asking.config.queries)
    dual.vision.load_state_dict(asking.vision.state_dict())
    dual.qllama.load_state_dict(asking.qllama.state_dict(), strict=False)
    tiles = tiny_pictures(2)
    wanted = dual.qllama.look(dual.vision(tiles))
    seen = asking.look(tiles)
    assert seen.shape == (2, QUERIES + PATCHES, QUERY_WIDTH)
    assert torch.equal(seen[:, :QUERIES], wanted)
    mlp = asking.connector
    said = F.linear(F.gelu(F.linear(wanted, mlp.query_fc1.weight, mlp.query_fc1.bias)), mlp.query_fc2.weight)
    assert_close(asking.encode_tiles(tiles)[:, :QUERIES], said + mlp.query_fc2.bias, **CLOSE)


@torch.no_grad()
def test_patches_are_those_of_the_fourth_state_from_the_last_row_by_row(model: ChatModel) -> None:
    tiles = tiny_pictures(2)
    patches = model.vision.hidden_states(tiles)[-4][:, 1:]
    mlp = model.connector
    said = F.linear(F.gelu(F.linear(patches, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)
    tokens = model.encode_tiles(tiles)
    assert tokens.shape[1] == model.config.tokens_per_tile == model.config.num_queries + PATCHES
    assert_close(tokens[:, model.config.num_queries :], said, **CLOSE)


@torch.no_grad()
def test_blocks_behind_the_tap_reach_the_queries_alone(asking: ChatModel) -> None:
    tiles = tiny_pictures(1)
    before = asking.encode_tiles(tiles)
    asking.vision.layers[-1].mlp.fc2.bias.add_(1.0)
    after = asking.encode_tiles(tiles)
    assert torch.equal(after[:, QUERIES:], before[:, QUERIES:])
    assert not torch.isclose(after[:, :QUERIES], before[:, :QUERIES]).all()
    asking.vision.layers[0].mlp.fc2.bias.add_(1.0)
    assert not torch.isclose(asking.encode_tiles(tiles)[:, QUERIES:], after[:, QUERIES:]).all()


@torch.no_grad()
def test_qllama_reaches_the_queries_alone(asking: ChatModel) -> None:
    assert asking.qllama is not None
    tiles = tiny_pictures(1)
    before = asking.encode_tiles(tiles)
    asking.qllama.queries.add_(1.0)
    after = asking.encode_tiles(tiles)
    assert torch.equal(after[:, QUERIES:], before[:, QUERIES:])
    assert not torch.isclose(after[:, :QUERIES], before[:, :QUERIES]).any(-1).all()


def test_sizes() -> None:
    for name in ("tiny-1.0", "tiny-1.0-qllama"):
        config, model = CHAT[name], tiny_first("qllama" in name)
        assert config.num_parameters == sum(p.numel() for p in model.parameters())
        assert config.connector_parameters == sum(p.numel() for p in model.connector.parameters())
        assert config.tower_parameters == sum(p.numel() for p in model.eyes.parameters())


def test_queries_of_another_encoder_are_refused() -> None:
    config = CHAT["tiny-1.0-qllama"]
    assert config.queries is not None
    with pytest.raises(ValueError, match="another vision encoder"):
        replace(config, vision=replace(config.vision, depth=6))
    with pytest.raises(ValueError, match="another vision encoder, or to InternVL-C"):
        replace(config, queries=replace(config.queries, generative=False))


def test_positions_stored_for_another_size_stay_those_of_both(asking: ChatModel) -> None:
    asking.config = replace(asking.config, tile_size=84)
    tiles = tiny_pictures(1, 84)
    with torch.no_grad():
        before = asking.encode_tiles(tiles)
        asking.resize_positions()
        assert isinstance(asking.config, ChatConfig)
        assert asking.config.queries is not None
        assert asking.config.vision.image_size == asking.config.queries.vision.image_size == 84
        assert before.shape == (1, QUERIES + 36, WIDTH)
        assert_close(asking.encode_tiles(tiles), before, **CLOSE)


# the laws of every chat model


@torch.no_grad()
def test_cached_is_uncached(model: ChatModel) -> None:
    tokens = model.config.tokens_per_tile
    ids, tiles = prompt(1, tokens), tiny_pictures(1)
    whole, cache = model(ids, tiles), DynamicCache()
    steps = [model(ids[:, :-3], tiles, cache=cache)]
    steps += [model(ids[:, at : at + 1], cache=cache) for at in range(ids.shape[1] - 3, ids.shape[1])]
    assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_or_its_packing(model: ChatModel) -> None:
    tokens = model.config.tokens_per_tile
    rows = [prompt(count, tokens, seed=count) for count in (1, 2, 0)]
    tiles = tiny_pictures(3)
    alone = [model(rows[0], tiles[:1]), model(rows[1], tiles[1:]), model(rows[2])]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([F.pad(row, (0, longest - row.shape[1])) for row in rows])
    together = model(ids, tiles, attention_mask=ids != 0)
    for row, wanted in enumerate(alone):
        assert_close(together[row, : wanted.shape[1]][None], wanted, **CLOSE)
    bounds = torch.tensor([0, *torch.tensor([row.shape[1] for row in rows]).cumsum(0)], dtype=torch.int32)
    packed = model(torch.cat(rows, dim=1), tiles, segments=bounds)
    assert_close(packed, torch.cat(alone, dim=1), **CLOSE)


@pytest.mark.parametrize(("places", "given"), [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_other_counts_are_an_error_with_both_numbers(model: ChatModel, places: int, given: int) -> None:
    tokens = model.config.tokens_per_tile
    message = rf"{places * tokens} <IMG_CONTEXT> tokens but {given * tokens} visual tokens .* needs {tokens}"
    with pytest.raises(ValueError, match=message):
        model(prompt(places, tokens), tiny_pictures(given) if given else None)


@torch.no_grad()
def test_the_token_of_a_picture_needs_no_row(model: ChatModel) -> None:
    """In 1.0 it is no token of the language model: any id that no text contains will do."""
    ids, tiles = prompt(2, model.config.tokens_per_tile), tiny_pictures(2)
    wanted = model(ids, tiles)
    other = torch.where(ids == IMAGE_TOKEN_ID, 160, ids)
    model.image_token_id = 160
    try:
        assert torch.equal(model(other, tiles), wanted)
    finally:
        model.image_token_id = IMAGE_TOKEN_ID


def test_the_tower_is_frozen_and_both_mlps_learn(model: ChatModel) -> None:
    run = RunConfig(connector=Part("full"), language=Part("full"), schedule=Schedule(steps=1))
    for part in ((), ("language",)):
        mine = tiny_first(model.qllama is not None)
        learner = choose(mine, run if part else replace(run, language=Part()))
        learner.train_mode()
        assert mine.qllama is None or not mine.qllama.training
        mine(prompt(1, mine.config.tokens_per_tile), tiny_pictures(1)).square().mean().backward()
        names = {name for name, p in mine.named_parameters() if p.grad is not None}
        assert names == set(learner.parameters)
        assert {name.split(".")[0] for name in names} == {"connector", *part}
        for name, p in mine.connector.named_parameters():
            assert p.grad is not None
            assert p.grad.abs().sum() > 0, name
        frozen = {name: (how, count) for name, how, _, count in table(learner)}
        assert frozen["vision"][1] == mine.config.vision.num_parameters
        if mine.config.queries is not None:
            assert frozen["qllama"] == ("frozen", mine.config.queries.look_parameters)


def test_checkpointing_and_autocast(asking: ChatModel) -> None:
    ids, tiles = prompt(1, asking.config.tokens_per_tile), tiny_pictures(1)
    gradients = []
    asking.train()
    for on in (False, True):
        asking.checkpoint(on)
        asking.zero_grad()
        asking(ids, tiles).square().mean().backward()
        gradients.append([p.grad.clone() for p in asking.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = asking(ids, tiles)
    assert_close(low.float(), asking(ids, tiles).detach(), atol=0.15, rtol=0.1)


def test_every_weight_has_a_place_on_a_device(model: ChatModel) -> None:
    sizes = placement.sizes(model)
    assert sum(sizes.values()) == sum(p.nbytes for p in model.parameters())
    places = placement.place(model, "auto", {"a": 10**9, "b": 10**9})
    assert {places[name] for name in sizes if name in ("vision", "qllama", "connector")} == {"a"}
    assert all(placement.device_of(key, places) for key in model.state_dict())
