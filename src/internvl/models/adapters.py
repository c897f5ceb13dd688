"""LoRA through peft, part by part: where adapters go, merge, and the folders that peft reads and writes.

On disk names are those of the official modules, so that peft puts the folders onto an official or a transformers model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from internvl.models.chat import ChatModel

ADAPTER = "default"
DISK_PREFIX = "base_model.model."

# Official wrap_backbone_lora and wrap_llm_lora; InternLM2 runs as Llama here, so its fused wqkv is q, k and v.
VISION_TARGETS = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
SPLIT_TARGETS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
FUSED_TARGETS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")

VISION_NAMES = (("layers.", "encoder.layers."), (".attention.", ".attn."))
"""Ours -> official, inside the vision part."""


def targets(model: ChatModel, part: str) -> tuple[str, ...]:
    """Ends of the names of the linear layers that get an adapter."""
    if part == "vision":
        return VISION_TARGETS
    if part != "language":
        raise ValueError(f"part {part!r} takes no adapters; it is vision or language")
    return FUSED_TARGETS if model.config.language.family == "phi3" else SPLIT_TARGETS


def add_adapters(
    model: ChatModel,
    rank: int,
    alpha: int | None = None,
    dropout: float = 0.05,
    parts: Sequence[str] = ("language", "vision"),
) -> None:
    """Put fresh adapters, which change nothing yet, beside every linear layer of the blocks; alpha is 2 x rank."""
    from peft import inject_adapter_in_model

    for part in parts:
        module = _module(model, part)
        if any(True for _ in _layers(module)):
            raise ValueError(f"the {part} part has adapters already; merge them first")
        inject_adapter_in_model(_config(model, part, rank, alpha or 2 * rank, dropout), module, ADAPTER)
        found, depth = sum(1 for _ in _layers(module)), len(_blocks(model, part))
        if found != depth * len(targets(model, part)):
            raise ValueError(
                f"{found} adapters in {depth} {part} blocks; {', '.join(targets(model, part))} should have one each"
            )


def merge(model: ChatModel, parts: Sequence[str] = ("language", "vision")) -> None:
    """Add every adapter to its layer, in the layer's own type, and take it off."""
    for part in parts:
        module = _module(model, part)
        for name, layer in list(_layers(module)):
            layer.merge(safe_merge=True)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, layer.get_base_layer())


def save(model: ChatModel, out: str | Path, part: str, dtype: torch.dtype | None = None) -> None:
    """Write one part's adapters as a peft folder."""
    folder, tensors = Path(out), dict[str, Tensor]()
    layers = list(_layers(_module(model, part)))
    if not layers:
        raise ValueError(f"the {part} part has no adapters to save; call add_adapters first")
    for name, layer in layers:
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)[ADAPTER].weight.detach().cpu()
            tensors[f"{DISK_PREFIX}{_to_disk(name, part)}.{matrix}.weight"] = weight.to(
                dtype or weight.dtype
            ).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    first = layers[0][1]
    config = _config(model, part, first.r[ADAPTER], first.lora_alpha[ADAPTER], _dropout(first))
    config.target_modules = sorted(_to_disk(end, part) for end in targets(model, part))
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load(model: ChatModel, folder: str | Path, part: str, dropout: float = 0.0) -> None:
    """Add the adapters of a peft folder; every one must find its layer, and every layer its adapter."""
    settings = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    add_adapters(model, settings["r"], settings["lora_alpha"], dropout, (part,))
    expected = {
        f"{DISK_PREFIX}{_to_disk(name, part)}.{matrix}.weight": getattr(layer, matrix)[ADAPTER].weight
        for name, layer in _layers(_module(model, part))
        for matrix in ("lora_A", "lora_B")
    }
    if unlike := set(tensors) ^ set(expected):
        raise ValueError(f"{folder}: {len(unlike)} adapters do not match the {part} part, such as {min(unlike)}")
    with torch.no_grad():
        for name, weight in expected.items():
            if weight.shape != tensors[name].shape:
                raise ValueError(f"{folder}: {name} is {tuple(tensors[name].shape)}, must be {tuple(weight.shape)}")
            weight.copy_(tensors[name])


def _config(model: ChatModel, part: str, rank: int, alpha: int | float, dropout: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets(model, part)), bias="none"
    )


def _module(model: ChatModel, part: str) -> nn.Module:
    """What peft sees as the model of a part."""
    targets(model, part)
    module: nn.Module = model.vision if part == "vision" else model.language.model
    return module


def _blocks(model: ChatModel, part: str) -> Any:
    return model.vision.layers if part == "vision" else model.language.model.model.layers


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def _dropout(layer: Any) -> float:
    return float(getattr(layer.lora_dropout[ADAPTER], "p", 0.0))


def _to_disk(name: str, part: str) -> str:
    if part == "vision":
        for ours, official in VISION_NAMES:
            name = f".{name}".replace(f".{ours.lstrip('.')}", f".{official.lstrip('.')}").removeprefix(".")
    return name
