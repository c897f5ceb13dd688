"""Layers that torchao rounds: measured and undone as our own; what is missing is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import internvl
from internvl.evaluate.subject import weights_sha256
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.chat import ChatModel
from internvl.models.choose import why_not_fused
from internvl.models.int8 import Int8Linear, divergence, is_rounded, quantise, stored
from internvl.models.torchao_layers import GROUP, Form, torchao_rounding
from tiny import FAMILIES, tiny_batch, tiny_model, tiny_tokenizer

FORMS: tuple[Form, ...] = ("int8", "int4")


def probe(model: ChatModel) -> torch.Tensor:
    ids, tiles = tiny_batch(40, 2)
    logits: torch.Tensor = model(ids, tiles.bfloat16())
    return logits


def bfloat16(family: str = "llama") -> ChatModel:
    return tiny_model(family, dtype=torch.bfloat16).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that the fused path does not compute, with a tokenizer."""
    save_checkpoint(tiny_model("phi3", vocab_size=300).eval(), tiny_tokenizer(), tmp_path / "phi3")
    return tmp_path / "phi3"


@pytest.fixture
def _installed() -> None:
    pytest.importorskip("torchao", minversion="0.18")


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_stays_within_half_a_level(form: Form, bias: bool) -> None:
    plain = torch.nn.Linear(2 * GROUP, 64, bias=bias).bfloat16()
    layer, eye = torchao_rounding(form)(plain), torch.eye(2 * GROUP).bfloat16()
    assert type(plain.weight) is torch.nn.Parameter
    assert is_rounded(layer.weight)
    assert layer.bias is plain.bias
    weight = plain.weight.detach().float().view(64, -1, GROUP if form == "int4" else 2 * GROUP)
    levels = (weight.amax(-1) - weight.amin(-1)) / 15 if form == "int4" else weight.abs().amax(-1) / 127
    with torch.no_grad():
        shift = 0 if plain.bias is None else plain.bias
        error = ((layer(eye) - shift).t().float() - plain.weight.float()).abs().view_as(weight)
    assert bool((error <= 0.6 * levels[..., None] + 2e-3).all())  # bfloat16 scales, sums and bias
    assert float(error.max()) > 0


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_measured(family: str, form: Form) -> None:
    model, plain = bfloat16(family), bfloat16(family)
    drift = quantise(model, probe, 10.0, rounding=torchao_rounding(form))
    with torch.no_grad():
        assert (drift.mean_kl, drift.max_kl, drift.agreement) == divergence(probe(plain), probe(model))
    assert 0 < drift.mean_kl < (0.01 if form == "int8" else 0.5)
    layers = [m for m in model.language.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 2 * (4 if family == "phi3" else 7)
    assert all(is_rounded(layer.weight) for layer in layers)
    numbers = sum(layer.weight.numel() for layer in layers)
    rows = sum(layer.out_features for layer in layers)
    held = 2 * numbers - (drift.bytes_before - drift.bytes_after)
    if form == "int8":  # levels, a float32 scale and a zero a row
        assert numbers + 4 * rows <= held <= numbers + 8 * rows
    else:
        assert held == numbers // 2 + 4 * numbers // GROUP
    with pytest.raises(ValueError, match="no plain linear layers"):
        quantise(model, probe, 10.0, rounding=torchao_rounding(form))
    assert "rounded" in (why_not_fused(model.language) or "") or family == "phi3"


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("form", FORMS)
def test_too_much_drift_is_undone(form: Form) -> None:
    model = bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"by \S+ nats a position, limit 1e-09; the model is as it was"):
        quantise(model, probe, 1e-9, rounding=torchao_rounding(form))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("form", FORMS)
def test_a_rounded_model_is_not_saved_and_has_a_fingerprint(form: Form, tmp_path: Path) -> None:
    model = bfloat16()
    plain = weights_sha256(model)
    quantise(model, probe, 10.0, rounding=torchao_rounding(form))
    with pytest.raises(ValueError, match="int8 or int4 weights, which no layout holds"):
        save_checkpoint(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert weights_sha256(model) == weights_sha256(model) != plain


@pytest.mark.usefixtures("_installed")
def test_a_width_without_whole_groups_is_refused() -> None:
    with pytest.raises(ValueError, match=f"width {GROUP + 8}: 4-bit weights need a multiple of {GROUP}"):
        torchao_rounding("int4")(torch.nn.Linear(GROUP + 8, 8))
    with pytest.raises(ValueError, match="on meta: they run on cpu and cuda"):
        torchao_rounding("int4")(torch.nn.Linear(GROUP, 8, device="meta"))


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize("form", FORMS)
def test_asked_for_it_rounds_any_model(folder: Path, form: Form) -> None:
    chat = internvl.load(folder, dtype=form, quantiser="torchao", max_kl=10.0)
    assert not chat.int4
    assert is_rounded(chat.model.language.model.model.layers[0].mlp.down_proj.weight)
    assert chat.chat("What?", max_new_tokens=4).usage.new_tokens == 4
    with pytest.raises(ValueError, match=r"limit 1e-12; the model is as it was: use dtype bfloat16"):
        internvl.load(folder, dtype=form, quantiser="torchao", max_kl=1e-12)


@pytest.mark.usefixtures("_installed")
def test_it_is_taken_where_four_bits_have_no_kernels_here(folder: Path) -> None:
    weight = internvl.load(folder, dtype="int4", max_kl=10.0).model.language.model.model.layers[0].mlp.down_proj.weight
    assert len(list(stored(weight))) == 2
    layer = internvl.load(folder, dtype="int8", max_kl=10.0).model.language.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, Int8Linear)
    with pytest.raises(ValueError, match="type phi3 has no fused path; round by torchao"):
        _ = internvl.load(folder, dtype="int4", quantiser="own").engine


@pytest.mark.parametrize("quantiser", ["auto", "torchao"])
def test_without_torchao_the_extra_is_named(folder: Path, quantiser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"int4 by torchao needs: pip install 'internvl\[quantise\]'"):
        internvl.load(folder, dtype="int4", quantiser=quantiser)


def test_a_quantiser_without_a_form_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantiser 'torchao' with dtype bfloat16: it rounds to int8 or int4"):
        internvl.load(folder, dtype="bfloat16", quantiser="torchao")


def test_plain_weights_are_their_own_parts() -> None:
    model = load_checkpoint("tiny-llama").model
    assert all([part is one for part in stored(one)] == [True] for one in model.parameters())
    assert not any(map(is_rounded, model.parameters()))
