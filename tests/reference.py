"""Recorded outputs of other implementations: where they are, how they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

FOLDER = Path(os.environ.get("INTERNVL_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden"))


def golden(name: str) -> Path:
    """Path of a reference file; the test is skipped where the folder is not there."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no reference values at {path}; set INTERNVL_GOLDEN to their folder")
    return path


def golden_tensors(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and the JSON metadata of a reference file."""
    with safe_open(golden(name), "pt") as file:
        keys = list(file.keys())  # not a dict: it does not iterate itself
        return {key: file.get_tensor(key) for key in keys}, json.loads(file.metadata()["golden"])


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def official_model(name: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """Our model with the weights of a reference file, the file's tensors, and its notes."""
    from internvl.convert.keys import expand
    from internvl.convert.official import from_official, official_rules
    from internvl.models.build import build

    tensors, notes = golden_tensors(name)
    config = from_official({"model_type": "internvl_chat", **notes["config"]})
    model = build(config)
    weights, state = part(tensors, "w/"), {}
    entries = expand(official_rules(config), model.state_dict())
    assert sorted(key for entry in entries for key in entry.disk) == sorted(weights)
    for entry in entries:
        state |= dict(zip(entry.ours, entry.to_ours([weights[key] for key in entry.disk]), strict=True))
    model.load_state_dict(state)
    model.image_token_id = notes["img_context_token_id"]
    return model, tensors, notes


def official_dual(name: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """Our InternVL-G with the weights of a reference file, the file's tensors, and its notes."""
    from internvl.convert import dual
    from internvl.convert.keys import expand
    from internvl.models.build import build_dual

    tensors, notes = golden_tensors(name)
    given = notes["config"]
    heads = {key: value for key, value in given.items() if key not in ("vision", "qllama")}
    settings = {"model_type": "internvl", "vision_config": given["vision"], "qllama_config": given["qllama"], **heads}
    model = build_dual(dual.from_official(settings))
    weights = part(tensors, "w/")
    entries = expand(dual.OFFICIAL_RULES, model.state_dict())
    assert sorted(key for entry in entries for key in entry.disk) == sorted(weights)
    model.load_state_dict({entry.ours[0]: weights[entry.disk[0]] for entry in entries})
    return model, tensors, notes
