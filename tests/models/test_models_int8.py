"""Weight-only int8: rounding is exact to half a level, the damage is measured, too much of it is undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from internvl.load import save_checkpoint
from internvl.models import adapters
from internvl.models.chat import ChatModel
from internvl.models.int8 import Int8Linear, divergence, quantise, rounded
from tiny import FAMILIES, tiny_batch, tiny_model


def probe(model: ChatModel) -> torch.Tensor:
    return model(*tiny_batch(40, 2))


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 40), st.sampled_from([1e-6, 1.0, 1e4]))
def test_rounding_is_within_half_a_level(seed: int, rows: int, columns: int, size: float) -> None:
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    levels, scale = rounded(weight)
    assert levels.dtype == torch.int8
    assert int(levels.abs().max()) == 127
    error = (levels.float() * scale[:, None] - weight).abs()
    assert bool((error <= 0.5001 * scale[:, None]).all())
    negative, _ = rounded(-weight)
    assert torch.equal(negative, -levels)


def test_a_row_of_zeros_stays_zero() -> None:
    levels, scale = rounded(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert levels.tolist() == [[0, 0], [64, -127]]
    assert_close(scale, torch.tensor([1.0, 2 / 127]))


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_what_its_levels_say(bias: bool) -> None:
    plain = torch.nn.Linear(24, 10, bias=bias)
    layer, x = Int8Linear(plain), torch.randn(3, 5, 24)
    weight = layer.levels.float() * layer.scale[:, None]
    assert_close(layer(x), torch.nn.functional.linear(x, weight, plain.bias), atol=1e-5, rtol=1e-5)
    assert layer(x.double().float()).shape == (3, 5, 10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_is_measured(family: str, dtype: torch.dtype) -> None:
    model, plain = (tiny_model(family, dtype=dtype).eval() for _ in range(2))

    def typed(m: ChatModel) -> torch.Tensor:
        ids, tiles = tiny_batch(40, 2)
        return m(ids, tiles.to(dtype))

    drift = quantise(model, typed)
    with torch.no_grad():
        mean, largest, agreement = divergence(typed(plain), typed(model))
    assert (drift.mean_kl, drift.max_kl, drift.agreement) == (mean, largest, agreement)
    assert 0 < drift.mean_kl <= drift.max_kl < 0.01
    layers = [m for m in model.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 2 * (4 if family == "phi3" else 7)
    saved = sum(layer.levels.numel() * (dtype.itemsize - 1) - layer.scale.nbytes for layer in layers)
    assert drift.bytes_before - drift.bytes_after == saved
    with pytest.raises(ValueError, match="no plain linear layers"):
        quantise(model, typed)


def test_too_much_drift_is_undone() -> None:
    model = tiny_model().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"move the answers by \S+ nats a position, limit 1e-09; the model is as it was"
    ):
        quantise(model, probe, limit=1e-9)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="KL limit"):
        quantise(tiny_model().eval(), probe, limit=limit)


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        model.language.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="nan nats"):
        quantise(model, probe)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_adapters_must_be_merged_first() -> None:
    model = tiny_model()
    adapters.add_adapters(model, rank=2)
    with pytest.raises(ValueError, match="merge adapters first"):
        quantise(model.eval(), probe)


def test_a_quantised_model_is_not_saved_as_a_checkpoint(tmp_path: Any) -> None:
    model = tiny_model().eval()
    quantise(model, probe)
    with pytest.raises(ValueError, match="int8"):
        save_checkpoint(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_divergence_is_the_formula() -> None:
    plain, other = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    p, q = plain.softmax(-1), other.softmax(-1)
    each = (p * (p / q).log()).sum(-1)[0]
    mean, largest, agreement = divergence(plain, other)
    assert mean == pytest.approx(float(each.mean()))
    assert largest == pytest.approx(float(each.max()))
    assert agreement == 1.0
    one = torch.tensor([[True, False]])
    assert divergence(plain, other, one)[0] == pytest.approx(float(each[0]))
    with pytest.raises(ValueError, match="counts no position"):
        divergence(plain, other, torch.zeros(1, 2, dtype=torch.bool))
