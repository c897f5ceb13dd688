"""InternViT against the official code, and the laws of its parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from internvl.config import VisionConfig
from internvl.convert.keys import expand
from internvl.convert.official import from_official
from internvl.convert.parts import VISION_FIELDS, VISION_RULES
from internvl.models.internvit import InternViT
from internvl.models.layers import DropPath, RMSNorm, drop_path_rates, resize_positions
from internvl.zoo import VIT_TINY, VIT_TINY_6B
from reference import golden_tensors, part

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def random_vit(config: VisionConfig, seed: int = 0) -> InternViT:
    torch.manual_seed(seed)
    vit = InternViT(config)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit.eval()


def official_keys(vit: InternViT) -> dict[str, str]:
    """Our key to the official one, both from the vision model on."""
    entries = expand(VISION_RULES, [f"vision.{key}" for key in vit.state_dict()])
    return {e.ours[0].removeprefix("vision."): e.disk[0].removeprefix("vision_model.") for e in entries}


@pytest.fixture(scope="module")
def reference() -> tuple[InternViT, dict[str, torch.Tensor], dict]:
    tensors, notes = golden_tensors("vit_300m.safetensors")
    fields = {ours: notes["config"][disk] for ours, disk in VISION_FIELDS.items() if disk in notes["config"]}
    vit = InternViT(VisionConfig(**fields))
    weights = part(tensors, "w/")
    keys = official_keys(vit)
    assert set(keys.values()) == set(weights)
    vit.load_state_dict({ours: weights[disk] for ours, disk in keys.items()})
    return vit.eval(), tensors, notes


def test_every_hidden_state_is_the_official_one(reference) -> None:
    vit, tensors, _ = reference
    states = vit.hidden_states(tensors["in/pixel_values"])
    assert len(states) == 4
    for index, state in enumerate(states):
        assert_close(state, tensors[f"out/hidden_states.{index}"], **CLOSE)


def test_another_image_size_is_the_official_one(reference) -> None:
    vit, tensors, _ = reference
    assert_close(vit(tensors["in/pixel_values_84x112"]), tensors["out/last_hidden_state_84x112"], **CLOSE)
    with torch.no_grad():
        assert_close(vit(tensors["in/pixel_values_84x112"]), tensors["out/last_hidden_state_84x112"], **CLOSE)
    resized = resize_positions(vit.embeddings.position_embedding, 6, 6)
    assert_close(resized, tensors["out/position_embedding_resized_84"], **CLOSE)


def test_gradients_are_the_official_ones(reference) -> None:
    vit, tensors, _ = reference
    vit.zero_grad()
    (vit(tensors["in/pixel_values"]) * tensors["in/grad_target"]).mean().backward()
    parameters = dict(vit.named_parameters())
    for ours, disk in official_keys(vit).items():
        wanted = tensors[f"grad/{disk}"]
        assert_close(parameters[ours].grad, wanted, rtol=1e-3, atol=1e-6 + 1e-4 * wanted.abs().max().item())


def test_bfloat16_is_as_near_as_the_official_one(reference) -> None:
    vit, tensors, notes = reference
    half = InternViT(vit.config).to(torch.bfloat16).eval()
    half.load_state_dict(vit.state_dict())
    with torch.no_grad():
        out = half(tensors["in/pixel_values"].bfloat16())
    assert out.dtype == torch.bfloat16
    error = (out.float() - tensors["out/last_hidden_state"]).abs().max().item()
    assert error <= 1.5 * notes["bf16_vs_fp64"]


@pytest.mark.parametrize("config", [VIT_TINY, VIT_TINY_6B], ids=["300m", "6b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_and_training_forward_agree(config: VisionConfig, dtype: torch.dtype) -> None:
    vit = random_vit(config).to(dtype)
    tiles = torch.randn(2, 3, 56, 56)
    learning = vit(tiles)
    with torch.no_grad():
        plain = vit(tiles)
    noise = {"atol": 0.0, "rtol": 0.0} if dtype == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    if dtype == torch.float32:
        noise = {"atol": 2e-5, "rtol": 1e-4}
    assert_close(plain, learning.detach(), **noise)


@pytest.mark.parametrize("config", [VIT_TINY, VIT_TINY_6B], ids=["300m", "6b"])
def test_a_tile_does_not_depend_on_its_batch(config: VisionConfig) -> None:
    vit, tiles = random_vit(config), torch.randn(5, 3, 56, 56)
    with torch.no_grad():
        assert_close(vit(tiles)[3:4], vit(tiles[3:4]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("feature_layer", [-1, -2, -4, 0, 2, 3])
def test_the_tap_is_the_hidden_state_and_later_blocks_do_not_run(feature_layer: int) -> None:
    vit, tiles = random_vit(VIT_TINY), torch.randn(1, 3, 56, 56)
    states = vit.hidden_states(tiles)
    assert torch.equal(vit(tiles, feature_layer), states[feature_layer])
    for index in range(vit.num_blocks(feature_layer), len(vit.layers)):
        vit.layers[index] = torch.nn.Identity()  # would change the result if it ran
    assert torch.equal(vit(tiles, feature_layer), states[feature_layer])


@pytest.mark.parametrize("feature_layer", [4, -5, 100])
def test_a_tap_that_does_not_exist_is_refused(feature_layer: int) -> None:
    with pytest.raises(ValueError, match=rf"feature layer {feature_layer} .*3 blocks.*\[-4, 3\]"):
        random_vit(VIT_TINY)(torch.randn(1, 3, 56, 56), feature_layer)


@pytest.mark.parametrize(("height", "width"), [(57, 56), (56, 1), (0, 56)])
def test_a_tile_that_is_not_whole_patches_is_refused(height: int, width: int) -> None:
    vit = random_vit(VIT_TINY)
    if height == 0:
        with pytest.raises((ValueError, RuntimeError)):
            vit(torch.randn(1, 3, height, width))
        return
    with pytest.raises(ValueError, match=f"{width}x{height}.*14"):
        vit(torch.randn(1, 3, height, width))


def test_kept_positions_follow_every_change_of_the_weights() -> None:
    vit, tiles = random_vit(VIT_TINY), torch.randn(1, 3, 84, 112)

    def fresh() -> torch.Tensor:
        return resize_positions(vit.embeddings.position_embedding.detach(), 6, 8)

    with torch.no_grad():
        vit(tiles)
        assert torch.equal(vit.embeddings.positions(6, 8), fresh())
        kept = vit.embeddings.positions(6, 8)
        assert vit.embeddings.positions(6, 8) is kept
        vit.embeddings.position_embedding.mul_(2.0)  # an optimiser step
        assert torch.equal(vit.embeddings.positions(6, 8), fresh())
        vit.load_state_dict(random_vit(VIT_TINY, seed=1).state_dict())
        assert torch.equal(vit.embeddings.positions(6, 8), fresh())
        vit.load_state_dict(random_vit(VIT_TINY, seed=2).state_dict(), assign=True)
        assert torch.equal(vit.embeddings.positions(6, 8), fresh())
        vit.to(torch.bfloat16)
        assert vit.embeddings.positions(6, 8).dtype == torch.bfloat16
        assert torch.equal(vit.embeddings.positions(6, 8), fresh())
        assert torch.equal(vit.embeddings.positions(3, 2), resize_positions(vit.embeddings.position_embedding, 3, 2))


def test_positions_learn_through_the_interpolation() -> None:
    vit = random_vit(VIT_TINY)
    with torch.no_grad():
        vit(torch.randn(1, 3, 84, 84))
    vit(torch.randn(1, 3, 84, 84)).square().mean().backward()
    assert vit.embeddings.position_embedding.grad.abs().sum() > 0


def test_positions_survive_inference_mode() -> None:
    with torch.inference_mode():
        vit = random_vit(VIT_TINY)
        assert vit(torch.randn(1, 3, 84, 84)).shape == (1, 37, 64)
    vit = random_vit(VIT_TINY)
    with torch.inference_mode():
        first = vit(torch.ones(1, 3, 84, 84)).clone()
    assert_close(vit(torch.ones(1, 3, 84, 84)).detach(), first, **CLOSE)


@given(st.integers(1, 9), st.integers(1, 9))
def test_interpolated_constant_positions_stay_constant(rows: int, columns: int) -> None:
    positions = torch.full((1, 17, 4), 0.5)
    assert_close(resize_positions(positions, rows, columns), torch.full((1, rows * columns + 1, 4), 0.5))


@pytest.mark.parametrize("config", [VIT_TINY, VIT_TINY_6B], ids=["300m", "6b"])
def test_checkpointing_changes_no_gradient(config: VisionConfig) -> None:
    vit, tiles = random_vit(config), torch.randn(2, 3, 56, 56)
    vit(tiles).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in vit.named_parameters()}
    vit.zero_grad()
    vit.checkpointing = True
    vit(tiles).square().mean().backward()
    for name, parameter in vit.named_parameters():
        assert torch.equal(parameter.grad, plain[name]), name


def test_query_norm_is_over_all_heads_in_float32() -> None:
    norm = RMSNorm(64, 1e-6)
    x = 100 * torch.randn(2, 5, 64, dtype=torch.bfloat16)
    wanted = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert (norm.to(torch.bfloat16)(x) == wanted).float().mean() > 0.99  # sums in bfloat16 would be off in a third
    vit = random_vit(VIT_TINY_6B)
    assert vit.layers[0].attention.q_norm.weight.shape == (64,)
    tiles = torch.randn(1, 3, 56, 56)
    before = vit(tiles)
    with torch.no_grad():
        vit.layers[0].attention.qkv.weight[:128] *= 10  # queries and keys; the norm takes the factor away
    assert_close(vit(tiles), before, atol=1e-4, rtol=1e-3)


def test_drop_path_rates() -> None:
    assert drop_path_rates(0.3, 4, "linear") == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 3, "uniform") == [0.3] * 3
    assert drop_path_rates(0.3, 1, "linear") == [0.0]
    assert [b.drop_path.rate for b in InternViT(replace(VIT_TINY, drop_path=0.4)).layers] == pytest.approx(
        [0, 0.2, 0.4]
    )


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 2, 3))
    per_sample = out.flatten(1)
    assert per_sample.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (per_sample.min(1).values == per_sample.max(1).values).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(torch.ones(3, 2)), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"1\.0"):
        DropPath(1.0)


def test_absent_fields_mean_the_official_defaults() -> None:
    language = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 8}
    language |= {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    config = from_official(
        {"model_type": "internvl_chat", "template": "x", "vision_config": {}, "llm_config": language}
    )
    assert config.vision == VisionConfig(3200, 48, 25, 12800, 224, norm="rms_norm", qkv_bias=False, qk_norm=True)
    assert config.pixel_shuffle == "v1"
    assert config.max_tiles == 6
    assert not config.dynamic_tiles
