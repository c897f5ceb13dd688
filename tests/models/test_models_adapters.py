"""Adapters: fresh ones change nothing, merged equals adapted, folders there and back, peft reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from internvl.models import adapters
from tiny import FAMILIES, tiny_batch, tiny_model


def randomise(model: Any, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05, generator=generator)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(*tiny_batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_change_nothing_and_merged_equals_adapted(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    names = set(model.state_dict())
    adapters.add_adapters(model, 4)
    torch.testing.assert_close(logits(model), before)
    randomise(model)
    adapted = logits(model)
    assert not torch.allclose(adapted, before, atol=1e-3)
    adapters.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("part", ["language", "vision"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_folders_there_and_back(tmp_path: Path, family: str, part: str) -> None:
    model = tiny_model(family)
    adapters.add_adapters(model, 3, alpha=5, parts=(part,))
    randomise(model)
    adapters.save(model, tmp_path, part)
    again = tiny_model(family)
    adapters.load(again, tmp_path, part)
    assert torch.equal(logits(again), logits(model))


def test_peft_puts_the_folder_onto_the_transformers_model(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_model()
    adapters.add_adapters(model, 3, parts=("language",))
    randomise(model)
    adapters.save(model, tmp_path, "language")
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        expected = model.eval().language.model(ids).logits
        theirs = PeftModel.from_pretrained(tiny_model().language.model, str(tmp_path)).eval()
        torch.testing.assert_close(theirs(ids).logits, expected)


def test_vision_adapters_have_official_names(tmp_path: Path) -> None:
    model = tiny_model()
    adapters.add_adapters(model, 2, parts=("vision",))
    adapters.save(model, tmp_path, "vision", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.encoder.layers.0.attn.qkv.lora_A.weight" in tensors
    assert "base_model.model.encoder.layers.2.mlp.fc2.lora_B.weight" in tensors
    assert len(tensors) == 3 * 4 * 2
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no adapters to save"):
        adapters.save(model, tmp_path, "language")
    with pytest.raises(ValueError, match="takes no adapters"):
        adapters.add_adapters(model, 2, parts=("connector",))
    adapters.add_adapters(model, 2, parts=("language",))
    with pytest.raises(ValueError, match="has adapters already"):
        adapters.add_adapters(model, 2, parts=("language",))
    adapters.save(model, tmp_path, "language")
    with pytest.raises(ValueError, match="do not match the language part"):
        adapters.load(tiny_model("phi3"), tmp_path, "language")
