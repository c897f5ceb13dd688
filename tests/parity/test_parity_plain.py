"""Logits, losses, gradients and greedy tokens of every family against a slow model built from official weights."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache

from internvl.convert.keys import expand
from internvl.convert.official import official_rules
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.build import build
from internvl.models.chat import ChatModel
from plain import PlainChat
from tiny import FAMILIES, IMAGE_TOKEN_ID, tiny_batch, tiny_chat_config, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 12.0],
}
CASES = [
    *((family, "300m", {}) for family in FAMILIES),
    *((family, "6b", {}) for family in FAMILIES),
    ("qwen2", "6b", {"pixel_shuffle": "v1", "feature_layer": -2}),
    ("phi3", "300m", {"pixel_shuffle": "v1"}),
]


def pair(folder: Path, family: str, vision: str, **changes: Any) -> tuple[ChatModel, PlainChat]:
    """Our model, and the slow one from the files that ours wrote."""
    model = tiny_model(family, vision=vision, **changes).eval()
    save_checkpoint(model, None, folder)
    settings = json.loads((folder / "config.json").read_text())
    ours = load_checkpoint(folder).model
    ours.image_token_id = IMAGE_TOKEN_ID
    return ours, PlainChat(load_file(folder / "model.safetensors"), settings, IMAGE_TOKEN_ID)


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: "-".join([case[0], case[1], *map(str, case[2].values())])
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatModel, PlainChat]:
    family, vision, changes = request.param
    return pair(tmp_path_factory.mktemp("model"), family, vision, **changes)


def test_visual_tokens_and_logits(models: tuple[ChatModel, PlainChat]) -> None:
    ours, plain = models
    ids, tiles = tiny_batch(9, 3)
    with torch.no_grad():
        assert_close(ours.encode_tiles(tiles), plain.visual(tiles), **CLOSE)
        assert_close(ours(ids, tiles), plain(ids, tiles), **CLOSE)


def test_losses_and_gradients(models: tuple[ChatModel, PlainChat]) -> None:
    ours, plain = models
    ids, tiles = tiny_batch(10, 2, seed=1)
    labels = torch.where(ids == IMAGE_TOKEN_ID, -100, ids)[:, 1:].flatten()
    losses = [F.cross_entropy(model(ids, tiles)[:, :-1].flatten(0, 1), labels) for model in models]
    assert_close(*losses, atol=1e-5, rtol=1e-5)
    ours.zero_grad()
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    unused = 3 - ours.vision.num_blocks(ours.config.feature_layer)  # blocks beyond the tapped one do not run
    seen = 0
    for entry in expand(official_rules(ours.config), ours.state_dict()):
        if any(gradients[key] is None for key in entry.ours):
            assert unused
            assert all(plain.weights[key].grad is None for key in entry.disk)
            continue
        on_disk = entry.to_disk([gradients[key] for key in entry.ours])
        for key, value in zip(entry.disk, on_disk, strict=True):
            wanted = plain.weights[key].grad
            assert wanted is not None, key
            assert_close(value, wanted, rtol=1e-3, atol=1e-6 + 1e-4 * wanted.abs().max().item(), msg=key)
            seen += 1
    assert seen >= len(plain.weights) - 16 * unused


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_tokens(models: tuple[ChatModel, PlainChat], cached: bool) -> None:
    ours, plain = models
    ids, tiles = tiny_batch(7, 1, seed=2)
    wanted = plain.greedy(ids, tiles, 10)
    cache, out = DynamicCache() if cached else None, []
    with torch.no_grad():
        visual = ours.encode_tiles(tiles)
        logits, embeds = ours(ids, visual=visual, cache=cache), ours.embed(ids, visual=visual)
        for _ in wanted:
            out.append(int(logits[0, -1].argmax()))
            new = torch.tensor([[out[-1]]])
            embeds = torch.cat([embeds, ours.language.embed(new)], 1)
            logits = ours(new, cache=cache) if cached else ours.language.head(ours.language(embeds))
    assert out == wanted


def phi3(kind: str) -> ChatModel:
    config = tiny_chat_config("phi3")
    scaling = {"type": kind, **LONGROPE}
    settings = {**config.language.settings, "rope_scaling": scaling, "max_position_embeddings": 512}
    model = build(replace(config, language=replace(config.language, settings=settings)))
    model.image_token_id = IMAGE_TOKEN_ID
    return model


@pytest.mark.parametrize("length", [24, 128, 129, 200])
@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_switches_its_factors_at_the_original_length(tmp_path: Path, kind: str, length: int) -> None:
    """Phi-3: short factors up to original_max_position_embeddings (128 here), long ones above; "su" is the old name."""
    model = phi3(kind)
    factors = LONGROPE["long_factor" if length > 128 else "short_factor"]
    angles = torch.arange(length)[:, None] / (torch.tensor(factors) * 10000.0 ** (torch.arange(0, 16, 2) / 16))
    strength = math.sqrt(1 + math.log(512 / 128) / math.log(128))
    cos, sin = model.language.model.model.rotary_emb(torch.zeros(1, length, 64), torch.arange(length)[None])
    assert_close(cos[0], torch.cat([angles, angles], -1).cos() * strength, **CLOSE)
    assert_close(sin[0], torch.cat([angles, angles], -1).sin() * strength, **CLOSE)
    save_checkpoint(model, None, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["llm_config"]["rope_scaling"] == {"type": kind, **LONGROPE}
    ours = load_checkpoint(tmp_path).model
    ours.image_token_id = IMAGE_TOKEN_ID
    settings["llm_config"]["rope_scaling"]["type"] = "longrope"  # transformers 5 knows this name only
    plain = PlainChat(load_file(tmp_path / "model.safetensors"), settings, IMAGE_TOKEN_ID)
    ids, tiles = tiny_batch(length - 4, 1)
    with torch.no_grad():
        assert_close(ours(ids, tiles), plain(ids, tiles), **CLOSE)


@pytest.mark.parametrize("length", [512, 513, 700])
def test_dynamic_scaling_acts_beyond_the_trained_length(length: int) -> None:
    """InternLM2: the base grows with the length of the row above max_position_embeddings (modeling_internlm2.py)."""
    rotary = build(tiny_chat_config("internlm2")).language.model.model.rotary_emb
    base = 10000.0
    if length > 512:
        base *= (2.0 * length / 512 - 1.0) ** (16 / 14)
    angles = torch.arange(length)[:, None] / base ** (torch.arange(0, 16, 2) / 16)
    cos, _ = rotary(torch.zeros(1, length, 64), torch.arange(length)[None])
    assert_close(cos[0], torch.cat([angles, angles], -1).cos(), atol=1e-4, rtol=1e-4)
