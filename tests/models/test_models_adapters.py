"""Adapters: every target is found, saved ones load, merged equals adapted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from internvl.load import load_checkpoint, save_checkpoint
from internvl.models import adapters
from internvl.models.chat import ChatModel
from tiny import FAMILIES, tiny_batch, tiny_model

PARTS = ("language", "vision")


def adapted(family: str = "llama", seed: int = 0, **options: object) -> ChatModel:
    """A model whose adapters do something: peft starts them at zero."""
    model = tiny_model(family)
    adapters.add_adapters(model, **{"rank": 4, "alpha": 8, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: ChatModel) -> torch.Tensor:
    ids, tiles = tiny_batch()
    with torch.no_grad():
        return model(ids, tiles)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_gets_an_adapter_and_nothing_changes_yet(family: str) -> None:
    model = tiny_model(family).eval()
    before = logits(model)
    per_layer = 4 if family == "phi3" else 7
    assert adapters.add_adapters(model, rank=2) == 2 * per_layer + 3 * 4
    assert torch.equal(logits(model), before)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("connector.") for name in learning)
    assert len([name for name in learning if ".lora_" in name]) == 2 * (2 * per_layer + 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_adapted(family: str) -> None:
    model, plain = adapted(family), tiny_model(family).eval()
    before = logits(model)
    assert (before - logits(plain)).abs().max() > 0.05
    assert adapters.merge(model) < 1e-3
    assert_close(logits(model), before, atol=2e-5, rtol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert adapters.merge(model) == 0.0
    adapters.add_adapters(model, rank=2)  # a second round starts afresh


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_load(tmp_path: Path, family: str) -> None:
    model = adapted(family)
    fresh = tiny_model(family).eval()
    for part in PARTS:
        adapters.save(model, tmp_path / part, part)
        adapters.load(fresh, tmp_path / part, part)
    assert torch.equal(logits(fresh), logits(model))
    settings = json.loads((tmp_path / "vision" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["target_modules"] == ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"]
    assert (settings["r"], settings["lora_alpha"], settings["inference_mode"]) == (4, 8, True)
    keys = set(load_file(tmp_path / "vision" / "adapter_model.safetensors"))
    assert "base_model.model.encoder.layers.2.attn.qkv.lora_A.weight" in keys
    adapters.add_adapters(tiny_model(family), rank=1)
    adapters.save(model, tmp_path / "again", "vision")  # saving leaves the adapter as it was
    assert (tmp_path / "again" / "adapter_config.json").read_text() == json.dumps(settings, indent=2, sort_keys=True)


def test_peft_itself_loads_a_language_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted()
    adapters.save(model, tmp_path, "language")
    peer = PeftModel.from_pretrained(tiny_model().eval().language.model, str(tmp_path))
    ids, _ = tiny_batch(8, 0)
    with torch.no_grad():
        assert torch.equal(peer(ids).logits, model(ids))


def test_unused_and_missing_keys_are_errors(tmp_path: Path) -> None:
    adapters.save(adapted(), tmp_path, "language")
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    some = next(iter(weights))
    save_file(
        {**weights, some.replace("layers.0", "layers.7").replace("layers.1", "layers.7"): weights[some].clone()}, path
    )
    with pytest.raises(ValueError, match=r"1 keys do not fit the language model.*layers\.7"):
        adapters.load(tiny_model(), tmp_path, "language")
    save_file({key: value for key, value in weights.items() if key != some}, path)
    with pytest.raises(ValueError, match="1 keys do not fit"):
        adapters.load(tiny_model(), tmp_path, "language")
    save_file({**weights, some: weights[some][:, :3].contiguous()}, path)
    with pytest.raises(ValueError, match="1 keys do not fit"):
        adapters.load(tiny_model(), tmp_path, "language")
    with pytest.raises(ValueError, match="no module of the language model is called"):
        adapters.load(tiny_model("phi3"), tmp_path, "language")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        adapters.load(tiny_model(), tmp_path / "nothing", "vision")


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'connector'"):
        adapters.add_adapters(tiny_model(), rank=2, parts=("connector",))
    with pytest.raises(ValueError, match="rank 0"):
        adapters.add_adapters(tiny_model(), rank=0)
    with pytest.raises(ValueError, match="has adapters already"):
        adapters.add_adapters(adapted(), rank=2)
    with pytest.raises(ValueError, match="has no adapters"):
        adapters.save(tiny_model(), tmp_path, "vision")
    with pytest.raises(ValueError, match="merge"):
        save_checkpoint(adapted(), None, tmp_path)


def test_a_merge_that_moves_the_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    model = adapted()
    monkeypatch.setattr(Linear, "merge", lambda self, safe_merge: None)  # forgets to add the change
    with pytest.raises(ValueError, match="merging moved the outputs"):
        adapters.merge(model)


def test_a_merged_model_is_an_official_checkpoint(tmp_path: Path) -> None:
    model = adapted()
    adapters.merge(model)
    save_checkpoint(model, None, tmp_path)
    again = load_checkpoint(tmp_path).model.eval()
    again.image_token_id = model.image_token_id
    assert torch.equal(logits(again), logits(model))


def test_adapters_learn_under_checkpointing() -> None:
    model = adapted().train()
    ids, tiles = tiny_batch()
    gradients = []
    for on in (False, True):
        model.checkpoint(on)
        model.zero_grad()
        model(ids, tiles).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if ".lora_" in n})
    assert all(value.abs().sum() > 0 for value in gradients[0].values())
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
