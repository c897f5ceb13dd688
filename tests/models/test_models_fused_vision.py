"""The encoder that answers on a CPU gives what the readable one gives, and stands in only where it may."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from internvl.config import VisionConfig
from internvl.generate.engine import Engine
from internvl.models import adapters
from internvl.models.choose import choose_vision
from internvl.models.fused_vision import FusedInternViT
from internvl.models.internvit import InternViT
from internvl.models.products import blocked_is_available
from internvl.zoo import VIT_TINY, VIT_TINY_6B
from tiny import tiny_first, tiny_model

pytestmark = pytest.mark.skipif(not blocked_is_available(torch.float32), reason="torch was built without oneDNN")

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def vit(config: VisionConfig) -> InternViT:
    """Random in every weight, norms and scales of branches too."""
    torch.manual_seed(0)
    made = InternViT(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def pixels(count: int, height: int, width: int) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [VIT_TINY, VIT_TINY_6B, replace(VIT_TINY, qkv_bias=False)])
@pytest.mark.parametrize("count", [1, 3])
def test_every_layer_is_the_same(config: VisionConfig, count: int) -> None:
    plain = vit(config)
    fused, patch = FusedInternViT(plain), config.patch_size
    for rows, columns in ((4, 4), (3, 5), (20, 20)):
        tiles = pixels(count, rows * patch, columns * patch)
        with torch.inference_mode():
            for mine, wanted in zip(fused.hidden_states(tiles), plain.hidden_states(tiles), strict=True):
                assert_close(mine, wanted, **CLOSE)


def test_taps_and_kept_patches_are_the_same() -> None:
    plain = vit(VIT_TINY)
    fused, tiles = FusedInternViT(plain), pixels(2, 4 * VIT_TINY.patch_size, 4 * VIT_TINY.patch_size)
    kept = torch.tensor([[0, 3, 9], [1, 2, 15]])
    with torch.inference_mode():
        assert_close(fused.taps(tiles, (0, -2, -1)), plain.taps(tiles, (0, -2, -1)), **CLOSE)
        assert_close(fused(tiles, kept=kept), plain(tiles, kept=kept), **CLOSE)


@pytest.mark.skipif(not blocked_is_available(torch.bfloat16), reason="no bfloat16 products by oneDNN here")
def test_bfloat16_is_as_near_to_float32_as_the_plain_encoder() -> None:
    wide = vit(VIT_TINY)
    plain = copy.deepcopy(wide).bfloat16()
    tiles = pixels(4, 20 * VIT_TINY.patch_size, 20 * VIT_TINY.patch_size)
    with torch.inference_mode():
        truth = wide(tiles)
        off, plain_off = (
            (one(tiles.bfloat16()).float() - truth).norm() / truth.norm() for one in (FusedInternViT(plain), plain)
        )
    assert off < 1.2 * plain_off


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.vision.train()
    fused = choose_vision(model.vision)
    assert isinstance(fused, FusedInternViT)
    assert all(part.training for part in model.vision.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("first", [False, True])
def test_the_engine_sees_what_the_model_sees(first: bool) -> None:
    model = tiny_first().eval() if first else tiny_model().eval()
    engine, side = Engine(model), model.config.tile_size
    assert isinstance(engine.vision, FusedInternViT)
    tiles = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    seen = engine.encode(tiles)
    engine.vision = model.vision
    assert_close(seen, engine.encode(tiles), **CLOSE)


def test_weights_that_are_not_plain_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = tiny_model()
    adapters.add_adapters(adapted, 2, parts=("vision",))
    rounded = tiny_model().vision
    monkeypatch.setattr("internvl.models.choose.is_rounded", lambda weight: weight is rounded.layers[1].mlp.fc2.weight)
    elsewhere, half = InternViT(VIT_TINY).to("meta"), tiny_model().vision.half()
    for vision in (adapted.vision, rounded, elsewhere, half):
        assert choose_vision(vision) is vision
    assert isinstance(choose_vision(tiny_model().vision), FusedInternViT)


def test_a_copy_is_made_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    vision = tiny_model().vision
    size = sum(parameter.nbytes for parameter in vision.parameters())
    monkeypatch.setattr("internvl.models.choose.free_memory", lambda: 1.9 * size)
    assert choose_vision(vision) is vision
    monkeypatch.setattr("internvl.models.choose.free_memory", lambda: 2.1 * size)
    assert isinstance(choose_vision(vision), FusedInternViT)
    assert not any(isinstance(part, nn.Linear) for part in choose_vision(vision).modules())
