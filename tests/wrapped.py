"""Official checkpoints as training with LoRA leaves them: wrapped key names, written without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = "base_model.model."
TARGETS = {
    "vision_model.": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "internlm2": ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "phi3": ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj"),
    "llama": (*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
}
"""wrap_backbone_lora and wrap_llm_lora of the official modeling_internvl_chat.py."""
FIELDS = {"vision_model.": "use_backbone_lora", "language_model.": "use_llm_lora"}


def wrap(
    folder: Path, family: str, *, vision_rank: int = 2, language_rank: int = 3, old_peft: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Wrap an official checkpoint in place; returns the plain weights with the changes added in float64."""
    generator = torch.Generator().manual_seed(seed)
    weights, merged = load_file(folder / "model.safetensors"), {}
    ranks = {"vision_model.": vision_rank, "language_model.": language_rank}
    stored: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        prefix = next((p for p in ranks if key.startswith(p) and ranks[p]), None)
        merged[key] = value
        if prefix is None:
            stored[key] = value
            continue
        inner = ROOT + key.removeprefix(prefix)
        module, _, leaf = inner.rpartition(".")
        targets = TARGETS[prefix] if prefix in TARGETS else TARGETS.get(family, TARGETS["llama"])
        if not module.endswith(targets):
            stored[prefix + inner] = value
            continue
        stored[f"{prefix}{module}.{leaf}" if old_peft else f"{prefix}{module}.base_layer.{leaf}"] = value
        if leaf == "weight":
            rank = ranks[prefix]
            down = 0.3 * torch.randn(rank, value.shape[1], generator=generator)
            up = 0.3 * torch.randn(value.shape[0], rank, generator=generator)
            stored[f"{prefix}{module}.lora_A.default.weight"] = down.to(value.dtype)
            stored[f"{prefix}{module}.lora_B.default.weight"] = up.to(value.dtype)
            change = 2 * up.to(value.dtype).double() @ down.to(value.dtype).double()  # alpha / rank = 2, always
            merged[key] = (value.double() + change).to(value.dtype)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings |= {FIELDS[prefix]: rank for prefix, rank in ranks.items()}
    (folder / "config.json").write_text(json.dumps(settings))
    return merged
